//! A tensor of a checkpoint: where its bytes lie, and how its values stream out as f32, block by block, without the
//! file's pages staying in memory.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use crate::checkpoint::{LowRank, Shard};
use crate::error::{Error, Result};
use crate::graph::DataType;

/// Elements converted at a time: 1 MiB of f32, which stays in a core's cache between one step and the next.
const BLOCK_ELEMENTS: usize = 1 << 18;

/// Pages of the file that stay mapped at most: those that are read count as the process's memory.
const RELEASE_BYTES: usize = 64 << 20;

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
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn element_bytes(&self) -> usize {
        if self.dtype == Dtype::F32 { 4 } else { 2 }
    }

    /// Elements of one row: everything after the first axis.
    fn row_size(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Rows `first..first + count` along the first axis.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Self {
        let mut part = self.clone();
        let row_bytes = self.row_size() * self.element_bytes();
        part.shape[0] = count;
        part.start = self.start + first * row_bytes;
        part.end = part.start + count * row_bytes;
        part.update = self.update.as_ref().map(|update| Box::new(update.rows(first)));
        part
    }

    /// Hands the values, a LoRA update added, to `sink` in blocks of whole rows, which it may change, then releases the
    /// file's pages.
    ///
    /// # Errors
    /// [`Error::NonFiniteWeight`] after the last block, or what `sink` returns.
    pub(crate) fn stream(&self, sink: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        let bytes = &self.shard.map[self.start..self.end];
        let rows_per_block = (BLOCK_ELEMENTS / self.row_size().max(1)).max(1);
        let block_bytes = (rows_per_block * self.row_size() * self.element_bytes()).max(1);
        let factors = self.update.as_ref().map(|update| update.factors(self.shape[0])).transpose()?;
        let mut num_non_finite = 0;
        let mut values = Vec::new();
        let mut released = self.start;
        for (index, block) in bytes.chunks(block_bytes).enumerate() {
            values.resize(block.len() / self.element_bytes(), 0.0);
            self.widen(block, &mut values);
            if let Some(factors) = &factors {
                factors.add_to(&mut values, index * rows_per_block, self.row_size());
            }
            num_non_finite += count_non_finite(&values);
            sink(&mut values)?;
            let done = self.start + index * block_bytes + block.len();
            if done - released >= RELEASE_BYTES {
                self.release_pages(released, done)?;
                released = done;
            }
        }
        self.release_pages(self.start, self.end)?;
        if num_non_finite > 0 {
            return Err(Error::NonFiniteWeight { name: self.name.clone(), count: num_non_finite });
        }
        Ok(())
    }

    fn widen(&self, block: &[u8], values: &mut [f32]) {
        match self.dtype {
            Dtype::F32 => {
                values.iter_mut().zip(block.as_chunks::<4>().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
            }
            Dtype::BF16 => widen_bf16(block, values),
            _ => {
                let halves: Vec<f16> = block.as_chunks::<2>().0.iter().map(|bits| f16::from_le_bytes(*bits)).collect();
                halves.convert_to_f32_slice(values);
            }
        }
    }

    #[cfg(unix)]
    fn release_pages(&self, start: usize, end: usize) -> Result<()> {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the mapping is read-only and backed by the file, so dropping its pages loses nothing: a later
        // access reads them again.
        let released = unsafe { self.shard.map.unchecked_advise_range(advice, start, end - start) };
        released.map_err(Error::io("release", &self.shard.path))
    }

    #[cfg(not(unix))]
    fn release_pages(&self, _start: usize, _end: usize) -> Result<()> {
        Ok(())
    }

    /// All values, for tensors small enough to hold.
    pub(crate) fn read_f32(&self) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.num_elements());
        self.stream(&mut |block| {
            values.extend_from_slice(block);
            Ok(())
        })?;
        Ok(values)
    }
}

/// Appends the bytes of `values` as floats of `data_type`, rounded to nearest even.
pub(crate) fn extend_with_floats(bytes: &mut Vec<u8>, data_type: DataType, values: &[f32]) {
    match data_type {
        DataType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            bytes.extend_from_slice(bytemuck::cast_slice(halves.reinterpret_cast()));
        }
        DataType::BF16 => {
            let mut halves = vec![bf16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            bytes.extend_from_slice(bytemuck::cast_slice(halves.reinterpret_cast()));
        }
        _ => bytes.extend_from_slice(bytemuck::cast_slice(values)),
    }
}

#[multiversion::multiversion(targets("x86_64+avx2+fma"))]
fn widen_bf16(block: &[u8], values: &mut [f32]) {
    for (value, bits) in values.iter_mut().zip(block.as_chunks::<2>().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bits)) << 16);
    }
}

/// How many values are NaN or infinite.
#[multiversion::multiversion(targets("x86_64+avx2+fma"))]
fn count_non_finite(values: &[f32]) -> usize {
    // In 32 bits, so that it is one vector instruction a value; a block has fewer values than that counts.
    values.iter().map(|value| u32::from(!value.is_finite())).sum::<u32>() as usize
}
