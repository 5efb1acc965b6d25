//! Keys and values of all captions in flight: per layer one buffer `[slots, kv_heads, max_length, head_dim]`, so that a
//! slot is a contiguous piece. The decoder reads and writes it in place: past and present are the same memory. A decoder
//! that cannot do that (of target tensorrt) gets two sets of buffers and goes from one to the other.
//!
//! Active captions fill slots `0..n` without gaps; [`KvCache::move_slot`] closes a gap when one ends.

use recaption_export::{DataType, Dim, Manifest, Target};
use recaption_kernels::KEY_PANEL;

use crate::error::{Error, Result};
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::session::{Binding, Session};
use crate::runtime::stream::{Rows, Stream};

/// The cache of one engine.
pub(crate) struct KvCache {
    /// Keys and values of each layer: those of the active captions.
    current: Vec<[Buffer; 2]>,
    /// Where a decode step puts them, unless it works in place.
    next: Option<Vec<[Buffer; 2]>>,
    num_swaps: usize,
    shape: CacheShape,
    max_length: usize,
}

/// Which slots a run reads, and where it leaves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheUse {
    /// New captions: nothing is read.
    Prefill,
    /// Active captions: one token is added. Call [`KvCache::advance`] after the run.
    Decode,
}

/// Shape of the cache of one slot, as the decoder's graph declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    pub(crate) num_layers: usize,
    pub(crate) num_kv_heads: usize,
    /// As wide as the graph has it: padded, where its attention needs that.
    pub(crate) head_dim: usize,
    pub(crate) dtype: DataType,
    pub(crate) is_in_place: bool,
    /// Lengths are rounded up to a multiple of this: tokens whose keys lie together.
    pub(crate) length_multiple: usize,
}

impl CacheShape {
    /// # Errors
    /// [`Error::Setting`] when the manifest's decoder has no cache inputs of the expected form.
    pub(crate) fn of(manifest: &Manifest) -> Result<Self> {
        let input = manifest.graphs.decoder.inputs.iter().find(|input| input.name == "past_key_values.0.key");
        match input.map(|input| (input.shape.as_slice(), input.dtype)) {
            Some(([Dim::Named(_), Dim::Fixed(num_kv_heads), Dim::Named(_), Dim::Fixed(head_dim)], dtype)) => Ok(Self {
                num_layers: manifest.decoder.num_layers,
                num_kv_heads: *num_kv_heads,
                head_dim: *head_dim,
                dtype,
                is_in_place: manifest.header.target.updates_cache_in_place(),
                length_multiple: if manifest.header.target == Target::Cpu { KEY_PANEL } else { 1 },
            }),
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
        let Self { num_layers, num_kv_heads, head_dim, dtype, length_multiple, .. } = self;
        let length = max_length.next_multiple_of(length_multiple);
        let factors = [2, self.num_copies(), num_layers, num_kv_heads, length, head_dim, dtype.size()];
        factors.into_iter().fold(1, usize::saturating_mul)
    }

    /// Bytes that the keys and values of one token take, in one copy.
    pub(crate) fn bytes_per_token(self) -> usize {
        let factors = [2, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype.size()];
        factors.into_iter().fold(1, usize::saturating_mul)
    }

    /// How often the whole cache is there.
    pub(crate) fn num_copies(self) -> usize {
        if self.is_in_place { 1 } else { 2 }
    }
}

impl KvCache {
    /// Allocates `num_slots` slots of `max_length` tokens in the memory of the decoder's device.
    pub(crate) fn new(decoder: &Session, shape: CacheShape, num_slots: usize, max_length: usize) -> Result<Self> {
        let max_length = max_length.next_multiple_of(shape.length_multiple);
        let num_elements = num_slots * shape.num_kv_heads * max_length * shape.head_dim;
        let buffer = || decoder.device_buffer(shape.dtype, num_elements);
        let layers = || (0..shape.num_layers).map(|_| Ok([buffer()?, buffer()?])).collect::<Result<Vec<[Buffer; 2]>>>();
        let next = if shape.is_in_place { None } else { Some(layers()?) };
        Ok(Self { current: layers()?, next, num_swaps: 0, shape, max_length })
    }

    /// Binds slots `first..first + count` as the decoder's past and present.
    pub(crate) fn bind(&self, binding: &mut Binding, first: usize, count: usize, usage: CacheUse) -> Result<()> {
        let next = self.next.as_ref().unwrap_or(&self.current);
        let (past, present) = match usage {
            CacheUse::Prefill => (next, &self.current),
            CacheUse::Decode => (&self.current, next),
        };
        for layer in 0..self.shape.num_layers {
            for (index, kind) in ["key", "value"].into_iter().enumerate() {
                let past = self.view(&past[layer][index], first, count)?;
                binding.bind_input(&format!("past_key_values.{layer}.{kind}"), &past)?;
                let present = self.view(&present[layer][index], first, count)?;
                binding.bind_output(&format!("present.{layer}.{kind}"), present)?;
            }
        }
        Ok(())
    }

    /// Takes what a decode step over all active slots has left as the current state.
    pub(crate) fn advance(&mut self) {
        if let Some(next) = &mut self.next {
            std::mem::swap(&mut self.current, next);
            self.num_swaps += 1;
        }
    }

    /// Which of the sets of buffers is the current one: bindings made for one do not serve the other.
    pub(crate) fn parity(&self) -> usize {
        self.num_swaps % 2
    }

    /// How many values [`Self::parity`] takes.
    pub(crate) fn num_parities(&self) -> usize {
        self.shape.num_copies()
    }

    fn view(&self, buffer: &Buffer, first: usize, count: usize) -> Result<TensorView> {
        buffer.view(first * self.slot_size(), &[count, self.shape.num_kv_heads, self.max_length, self.shape.head_dim])
    }

    /// Elements of one slot in one buffer.
    fn slot_size(&self) -> usize {
        self.shape.num_kv_heads * self.max_length * self.shape.head_dim
    }

    /// Copies the first `length` tokens of slot `from` into slot `to`, in the order of `stream`.
    pub(crate) fn move_slot(&mut self, stream: &Stream, from: usize, to: usize, length: usize) -> Result<()> {
        let token_bytes = self.shape.head_dim * self.shape.dtype.size();
        let length = length.next_multiple_of(self.shape.length_multiple);
        let slot_bytes = self.slot_size() * self.shape.dtype.size();
        let rows = Rows {
            num_rows: self.shape.num_kv_heads,
            row_bytes: length * token_bytes,
            pitch: self.max_length * token_bytes,
        };
        self.current
            .iter_mut()
            .flatten()
            .try_for_each(|buffer| stream.copy_rows(buffer, from * slot_bytes, to * slot_bytes, rows))
    }
}
