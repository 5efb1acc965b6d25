//! How weights are stored: floats of any width, fp8 or int8 with scales, or small integers in blocks. Takes blocks of
//! f32 rows, gives the bytes of the tensors that the operators take.

use std::borrow::Cow;
use std::thread;

use half::f16;
use recaption_kernels::{PANEL_COLUMNS, PackSpec, pack_panel, quantize_weights};

use crate::blocks;
use crate::error::Result;
use crate::float8;
use crate::graph::DataType;
use crate::tensor::extend_with_floats;
use crate::weight::Weight;

/// How the values of a weight become bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Encoding {
    /// One tensor of floats.
    Float(DataType),
    /// FLOAT8E4M3FN `[N, K]` and one f16 scale of all of them, `[]`.
    Float8 {
        /// None until [`Self::settle`].
        scale: Option<f16>,
    },
    /// s8 `[N, K]` and an f32 scale per row `[N]`; values are within `-max..=max`.
    Int8Rows { max: u8 },
    /// `MatMulNBits`: u8 `[N, blocks, block_size * bits / 8]`, a scale per block, zero points per block.
    Blocks(BlockFormat),
    /// s8 panels with scales and corrections, for `recaption.QuantizedLinear`; takes groups of rows in panel order.
    Packed(PackedFormat),
}

/// A matrix packed for this project's kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PackedFormat {
    pub(crate) spec: PackSpec,
    /// What stands for zero in the activations.
    pub(crate) zero_point: u8,
}

/// Rows that are packed at a time. Of gated weights a group is so many rows halved: the gate's, then as many of up's.
pub(crate) const GROUP_ROWS: usize = 16 * PANEL_COLUMNS;

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
    /// Bytes of the zero points, or of packed weights' corrections.
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

impl Encoding {
    /// Rows that have to be encoded together, where it is not one.
    pub(crate) fn group_rows(self) -> Option<usize> {
        matches!(self, Self::Packed(_)).then_some(GROUP_ROWS)
    }

    /// Whether the values are fp16 in the graph: larger ones are brought to its end first, and counted.
    pub(crate) fn is_f16(self) -> bool {
        matches!(self, Self::Float(DataType::F16) | Self::Float8 { .. })
    }

    /// Finds out what must be known of a weight before its first row is encoded: it streams once more for that.
    pub(crate) fn settle(self, weight: &Weight<'_>) -> Result<Self> {
        let Self::Float8 { scale: None } = self else { return Ok(self) };
        let mut all = 0.0_f32;
        weight.stream(&mut |rows| {
            all = all.max(largest(rows));
            Ok(())
        })?;
        // What fp16 does not have is brought to its end (`Self::is_f16`).
        let scale = float8::scale(all.min(f16::MAX.to_f32())).expect("bug: a stored weight is finite");
        Ok(Self::Float8 { scale: Some(scale) })
    }

    /// Encodes whole rows of `row_size` values into `encoded`, which is emptied first; `importance` says how much an error in
    /// each of a row's values weighs. Quantisation uses all cores.
    pub(crate) fn encode(self, rows: &[f32], row_size: usize, importance: Option<&[f32]>, encoded: &mut Encoded) {
        encoded.clear();
        match self {
            Self::Float(data_type) => extend_with_floats(&mut encoded.data, data_type, rows),
            Self::Float8 { scale } => {
                let scale = scale.expect("bug: the weight was not settled").to_f32();
                on_all_cores(rows, row_size, encoded, |rows, encoded| float8::encode(scale, rows, &mut encoded.data));
            }
            Self::Int8Rows { max } => {
                on_all_cores(rows, row_size, encoded, |rows, encoded| encode_int8_rows(max, rows, row_size, encoded));
            }
            Self::Blocks(format) => on_all_cores(rows, row_size, encoded, |rows, encoded| {
                blocks::encode(format, rows, row_size, importance, encoded);
            }),
            Self::Packed(format) => {
                let panels = in_panels(format.spec.gated, rows, row_size);
                on_all_cores(&panels, PANEL_COLUMNS * row_size, encoded, |panels, encoded| {
                    panels
                        .chunks_exact(PANEL_COLUMNS * row_size)
                        .for_each(|panel| encode_panel(format, panel, encoded));
                });
            }
        }
    }
}

/// A group of rows in the order of the panels' columns.
fn in_panels(is_gated: bool, rows: &[f32], row_size: usize) -> Cow<'_, [f32]> {
    if !is_gated {
        return Cow::Borrowed(rows);
    }
    let (gate, up) = rows.split_at(rows.len() / 2);
    let half = PANEL_COLUMNS / 2 * row_size;
    let pairs = gate.chunks_exact(half).zip(up.chunks_exact(half));
    Cow::Owned(pairs.flat_map(|(gate, up)| gate.iter().chain(up).copied()).collect())
}

/// One panel's columns, row by row as the checkpoint has them.
fn encode_panel(PackedFormat { spec, zero_point }: PackedFormat, panel: &[f32], encoded: &mut Encoded) {
    let mut values = vec![0; panel.len()];
    let (mut scales, mut of_row) = (vec![0.0; spec.num_blocks() * PANEL_COLUMNS], vec![0.0; spec.num_blocks()]);
    for (column, (row, values)) in panel.chunks_exact(spec.k).zip(values.chunks_exact_mut(spec.k)).enumerate() {
        quantize_weights(&spec, row, values, &mut of_row).expect("bug: a spec that the kernels do not take");
        of_row.iter().enumerate().for_each(|(b, &scale)| scales[b * PANEL_COLUMNS + column] = scale);
    }
    let [_, steps, columns, each] = spec.weight_dims();
    let mut packed = vec![0; steps * columns * each];
    let mut corrections = vec![0; spec.num_blocks() * PANEL_COLUMNS];
    pack_panel(&spec, zero_point, &values, &mut packed, &mut corrections);
    encoded.data.extend(packed.into_iter().map(|value| value as u8));
    encoded.scales.extend(scales.into_iter().flat_map(f32::to_le_bytes));
    encoded.zero_points.extend(corrections.into_iter().flat_map(i32::to_le_bytes));
}

/// Gives each core some of the rows.
fn on_all_cores(rows: &[f32], row_size: usize, encoded: &mut Encoded, encode: impl Fn(&[f32], &mut Encoded) + Sync) {
    let num_threads = thread::available_parallelism().map_or(1, usize::from);
    let rows_per_thread = (rows.len() / row_size).div_ceil(num_threads).max(1);
    thread::scope(|scope| {
        let encode = &encode;
        let spawn = |piece| {
            scope.spawn(move || {
                let mut encoded = Encoded::default();
                encode(piece, &mut encoded);
                encoded
            })
        };
        let threads: Vec<_> = rows.chunks(rows_per_thread * row_size).map(spawn).collect();
        for thread in threads {
            encoded.append(&mut thread.join().expect("bug: encoding panicked"));
        }
    });
}

fn encode_int8_rows(max: u8, rows: &[f32], row_size: usize, encoded: &mut Encoded) {
    for row in rows.chunks_exact(row_size) {
        let scale = largest(row) / f32::from(max);
        let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
        encoded.scales.extend(scale.to_le_bytes());
        encoded.data.extend(row.iter().map(|value| blocks::round(value * inverse) as i8 as u8));
    }
}

/// The largest magnitude.
pub(crate) fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}
