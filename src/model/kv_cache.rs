//! Keys and values of all captions in flight: per layer one buffer `[slots, kv_heads, max_length, head_dim]`, so that a
//! slot is a contiguous piece. The decoder reads and writes it in place: past and present are the same memory.
//!
//! Active captions fill slots `0..n` without gaps; [`KvCache::move_slot`] closes a gap when one ends.

use recaption_export::{DataType, Dim, Manifest};

use crate::error::{Error, Result};
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::session::{Binding, Session};

/// The cache of one engine.
pub(crate) struct KvCache {
    /// Keys and values of each layer.
    layers: Vec<[Buffer; 2]>,
    shape: CacheShape,
    max_length: usize,
}

/// Shape of the cache of one slot, as the decoder's graph declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    num_layers: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl CacheShape {
    /// # Errors
    /// [`Error::Setting`] when the manifest's decoder has no cache inputs of the expected form.
    pub(crate) fn of(manifest: &Manifest) -> Result<Self> {
        let shape = manifest.graphs.decoder.inputs.iter().find(|input| input.name == "past_key_values.0.key");
        match shape.map(|input| input.shape.as_slice()) {
            Some([Dim::Named(_), Dim::Fixed(num_kv_heads), Dim::Named(_), Dim::Fixed(head_dim)]) => {
                Ok(Self { num_layers: manifest.decoder.num_layers, num_kv_heads: *num_kv_heads, head_dim: *head_dim })
            }
            found => Err(Error::Setting {
                reason: format!(
                    "decoder input `past_key_values.0.key`: expected [batch, heads, length, width], got {found:?}"
                ),
                hint: "export the checkpoint again with --overwrite".to_owned(),
            }),
        }
    }

    /// Bytes that one slot of `max_length` tokens takes.
    pub(crate) fn bytes_per_slot(self, max_length: usize) -> usize {
        2 * self.num_layers * self.num_kv_heads * max_length * self.head_dim * DataType::F32.size()
    }
}

impl KvCache {
    /// Allocates `num_slots` slots of `max_length` tokens in the memory of the decoder's device.
    pub(crate) fn new(decoder: &Session, shape: CacheShape, num_slots: usize, max_length: usize) -> Result<Self> {
        let num_elements = num_slots * shape.num_kv_heads * max_length * shape.head_dim;
        let buffer = || decoder.device_buffer(DataType::F32, num_elements);
        let layers = (0..shape.num_layers).map(|_| Ok([buffer()?, buffer()?])).collect::<Result<_>>()?;
        Ok(Self { layers, shape, max_length })
    }

    /// Binds slots `first..first + count` as the decoder's past and present.
    pub(crate) fn bind(&self, binding: &mut Binding, first: usize, count: usize) -> Result<()> {
        for (layer, buffers) in self.layers.iter().enumerate() {
            for (buffer, kind) in buffers.iter().zip(["key", "value"]) {
                binding.bind_input(&format!("past_key_values.{layer}.{kind}"), &self.view(buffer, first, count)?)?;
                binding.bind_output(&format!("present.{layer}.{kind}"), self.view(buffer, first, count)?)?;
            }
        }
        Ok(())
    }

    fn view(&self, buffer: &Buffer, first: usize, count: usize) -> Result<TensorView> {
        buffer.view(first * self.slot_size(), &[count, self.shape.num_kv_heads, self.max_length, self.shape.head_dim])
    }

    /// Elements of one slot in one buffer.
    fn slot_size(&self) -> usize {
        self.shape.num_kv_heads * self.max_length * self.shape.head_dim
    }

    /// Copies the first `length` tokens of slot `from` into slot `to`.
    pub(crate) fn move_slot(&mut self, from: usize, to: usize, length: usize) -> Result<()> {
        let (slot_size, head_size) = (self.slot_size(), self.max_length * self.shape.head_dim);
        for buffer in self.layers.iter_mut().flatten() {
            if !buffer.is_host() {
                buffer.copy_within_device(from * slot_size, to * slot_size, slot_size)?;
                continue;
            }
            let values = buffer.as_mut_slice::<f32>();
            for head in 0..self.shape.num_kv_heads {
                let source = from * slot_size + head * head_size;
                values.copy_within(source..source + length * self.shape.head_dim, to * slot_size + head * head_size);
            }
        }
        Ok(())
    }
}
