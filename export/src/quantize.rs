//! How weights are stored: floats of any width, int8 rows, or small integers in blocks. Takes blocks of f32 rows, gives the
//! bytes of the tensors that the operators take.

use std::thread;

use crate::blocks;
use crate::graph::DataType;
use crate::tensor::{extend_with_bf16, extend_with_f16, extend_with_f32};

/// How the values of a weight become bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Encoding {
    /// One tensor of floats.
    Float(DataType),
    /// s8 `[N, K]` and an f32 scale per row `[N]`; values are within `-max..=max`.
    Int8Rows { max: u8 },
    /// `MatMulNBits`: u8 `[N, blocks, block_size * bits / 8]`, a scale per block, zero points per block.
    Blocks(BlockFormat),
}

/// Integers of few bits in blocks along a row, each block with a scale and, where it pays, a zero point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BlockFormat {
    pub(crate) bits: u32,
    pub(crate) block_size: usize,
    /// Type of the scales: that of the activations.
    pub(crate) scale: DataType,
    pub(crate) rounding: Rounding,
}

/// How block weights are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// Scale and zero point from the block's extremes.
    Nearest,
    /// Scale and zero point with the smallest squared error of those tried.
    #[default]
    Search,
}

impl BlockFormat {
    pub(crate) fn num_blocks(self, row_size: usize) -> usize {
        row_size.div_ceil(self.block_size)
    }

    pub(crate) fn block_bytes(self) -> usize {
        self.block_size * self.bits as usize / 8
    }

    /// 8-bit blocks are symmetric around 128, the operator's default.
    pub(crate) fn has_zero_points(self) -> bool {
        self.bits < 8
    }

    /// Bytes of a row's zero points.
    pub(crate) fn zero_point_bytes(self, row_size: usize) -> usize {
        (self.num_blocks(row_size) * self.bits as usize).div_ceil(8)
    }
}

/// What one block of rows became.
#[derive(Default)]
pub(crate) struct Encoded {
    /// Bytes of the main tensor.
    pub(crate) data: Vec<u8>,
    /// Bytes of the scales.
    pub(crate) scales: Vec<u8>,
    /// Bytes of the zero points.
    pub(crate) zero_points: Vec<u8>,
}

impl Encoded {
    fn clear(&mut self) {
        self.data.clear();
        self.scales.clear();
        self.zero_points.clear();
    }

    fn append(&mut self, other: &mut Self) {
        self.data.append(&mut other.data);
        self.scales.append(&mut other.scales);
        self.zero_points.append(&mut other.zero_points);
    }
}

/// Encodes rows on one core.
type RowEncoder = fn(Encoding, &[f32], usize, Option<&[f32]>, &mut Encoded);

impl Encoding {
    /// Encodes whole rows of `row_size` values into `encoded`, which is emptied first; `importance` says how much an error in
    /// each of a row's values weighs. Quantisation uses all cores.
    pub(crate) fn encode(self, rows: &[f32], row_size: usize, importance: Option<&[f32]>, encoded: &mut Encoded) {
        encoded.clear();
        let encode_rows: RowEncoder = match self {
            Self::Float(DataType::F16) => return extend_with_f16(&mut encoded.data, rows),
            Self::Float(DataType::BF16) => return extend_with_bf16(&mut encoded.data, rows),
            Self::Float(_) => return extend_with_f32(&mut encoded.data, rows),
            Self::Int8Rows { .. } => encode_int8_rows,
            Self::Blocks(_) => encode_blocks,
        };
        let num_threads = thread::available_parallelism().map_or(1, usize::from);
        let rows_per_thread = (rows.len() / row_size).div_ceil(num_threads).max(1);
        let mut pieces: Vec<Encoded> = Vec::new();
        thread::scope(|scope| {
            let spawn = |piece| {
                scope.spawn(move || {
                    let mut encoded = Encoded::default();
                    encode_rows(self, piece, row_size, importance, &mut encoded);
                    encoded
                })
            };
            let threads: Vec<_> = rows.chunks(rows_per_thread * row_size).map(spawn).collect();
            pieces.extend(threads.into_iter().map(|thread| thread.join().expect("bug: encoding panicked")));
        });
        pieces.iter_mut().for_each(|piece| encoded.append(piece));
    }
}

fn encode_int8_rows(
    encoding: Encoding,
    rows: &[f32],
    row_size: usize,
    _importance: Option<&[f32]>,
    encoded: &mut Encoded,
) {
    let Encoding::Int8Rows { max } = encoding else { unreachable!("bug: {encoding:?} is not int8") };
    for row in rows.chunks_exact(row_size) {
        let scale = largest(row) / f32::from(max);
        let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
        encoded.scales.extend(scale.to_le_bytes());
        encoded.data.extend(row.iter().map(|value| blocks::round(value * inverse) as i8 as u8));
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

fn encode_blocks(encoding: Encoding, rows: &[f32], row_size: usize, importance: Option<&[f32]>, encoded: &mut Encoded) {
    let Encoding::Blocks(format) = encoding else { unreachable!("bug: {encoding:?} has no blocks") };
    blocks::encode(format, rows, row_size, importance, encoded);
}
