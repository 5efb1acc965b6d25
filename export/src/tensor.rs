//! A tensor of a checkpoint: where its bytes lie, and how they stream out as f32, block by block, without the file's pages
//! staying in memory.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::checkpoint::{LowRank, Shard};
use crate::error::{Error, Result};

/// Elements converted at a time: 4 MiB of f32.
pub(crate) const BLOCK_ELEMENTS: usize = 1 << 20;

/// A tensor in a mapped shard, or some of its rows.
#[derive(Clone)]
pub(crate) struct StoredTensor<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range within the shard file.
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) shard: &'a Shard,
    /// What a LoRA adapter adds.
    pub(crate) update: Option<Box<LowRank<'a>>>,
}

impl StoredTensor<'_> {
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn element_bytes(&self) -> usize {
        if self.dtype == Dtype::F32 { 4 } else { 2 }
    }

    /// Rows `first..first + count` along the first axis.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Self {
        let mut part = self.clone();
        let row_bytes = self.shape[1..].iter().product::<usize>() * self.element_bytes();
        part.shape[0] = count;
        part.start = self.start + first * row_bytes;
        part.end = part.start + count * row_bytes;
        part.update = self.update.as_ref().map(|update| Box::new(update.rows(first)));
        part
    }

    /// Hands the values to `sink` as little-endian f32 bytes, block by block, then releases the file's pages.
    pub(crate) fn stream_f32(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if let Some(update) = &self.update {
            return update.stream(&Self { update: None, ..self.clone() }, sink);
        }
        let bytes = &self.shard.map[self.start..self.end];
        let mut num_non_finite = 0;
        let mut converted = Vec::new();
        for block in bytes.chunks(BLOCK_ELEMENTS * self.element_bytes()) {
            match self.dtype {
                Dtype::F32 => {
                    num_non_finite += count_non_finite(block);
                    sink(block)?;
                }
                Dtype::F16 => {
                    widen(block, |bits| f16::from_bits(bits).to_f32(), &mut converted);
                    num_non_finite += count_non_finite(&converted);
                    sink(&converted)?;
                }
                _ => {
                    widen(block, |bits| bf16::from_bits(bits).to_f32(), &mut converted);
                    num_non_finite += count_non_finite(&converted);
                    sink(&converted)?;
                }
            }
        }
        #[cfg(unix)]
        {
            // SAFETY: the mapping is read-only and backed by the file, so dropping its pages loses nothing: a later
            // access reads them again.
            let released = unsafe {
                self.shard.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    self.start,
                    self.end - self.start,
                )
            };
            released.map_err(Error::io("release", &self.shard.path))?;
        }
        if num_non_finite > 0 {
            return Err(Error::NonFiniteWeight { name: self.name.clone(), count: num_non_finite });
        }
        Ok(())
    }

    /// All values, for tensors small enough to hold.
    pub(crate) fn read_f32(&self) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.num_elements());
        self.stream_f32(&mut |block| {
            values.extend(floats(block));
            Ok(())
        })?;
        Ok(values)
    }
}

fn widen(block: &[u8], convert: impl Fn(u16) -> f32, converted: &mut Vec<u8>) {
    converted.clear();
    converted.extend(block.as_chunks::<2>().0.iter().flat_map(|bits| convert(u16::from_le_bytes(*bits)).to_le_bytes()));
}

fn floats(block: &[u8]) -> impl Iterator<Item = f32> + '_ {
    block.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
}

fn count_non_finite(block: &[u8]) -> usize {
    floats(block).filter(|value| !value.is_finite()).count()
}
