//! Weights as small integers in blocks along a row, in the layout of ONNX Runtime's `MatMulNBits`: `w = (q - zero_point) *
//! scale`, two 4-bit integers to a byte, the first in the low half.

use crate::graph::DataType;
use crate::quantize::{BlockFormat, Encoded, Rounding};
use crate::tensor::extend_with_f16;

/// Zero point of symmetric 8-bit blocks.
const MIDDLE_OF_8_BITS: f32 = 128.0;
/// Largest 4-bit integer.
const MAX_4_BITS: f32 = 15.0;

/// Encodes whole rows.
pub(crate) fn encode(format: BlockFormat, rows: &[f32], row_size: usize, encoded: &mut Encoded) {
    let mut padded = vec![0.0; format.block_size];
    let mut scales = Vec::new();
    for row in rows.chunks_exact(row_size) {
        let mut zero_points = Vec::new();
        for block in row.chunks(format.block_size) {
            padded.fill(0.0);
            padded[..block.len()].copy_from_slice(block);
            match format.bits {
                8 => scales.push(encode_8_bits(&padded, &mut encoded.data)),
                _ => {
                    let grid = Grid::of(format.rounding, &padded);
                    grid.pack(&padded, &mut encoded.data);
                    scales.push(grid.scale);
                    zero_points.push(grid.zero_point as u8);
                }
            }
        }
        encoded.zero_points.extend(zero_points.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |high| high << 4)));
    }
    match format.scale {
        DataType::F16 => extend_with_f16(&mut encoded.scales, &scales),
        _ => encoded.scales.extend(scales.iter().flat_map(|scale| scale.to_le_bytes())),
    }
}

/// Symmetric around 128; returns the scale.
fn encode_8_bits(block: &[f32], data: &mut Vec<u8>) -> f32 {
    let largest = block.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    data.extend(
        block.iter().map(|value| (value * inverse).round_ties_even() as i32 as f32 + MIDDLE_OF_8_BITS).map(|q| q as u8),
    );
    scale
}

/// Scale and zero point of a 4-bit block.
#[derive(Clone, Copy, Debug)]
struct Grid {
    scale: f32,
    /// An integer within `0..=15`.
    zero_point: f32,
}

impl Grid {
    fn of(rounding: Rounding, block: &[f32]) -> Self {
        match rounding {
            Rounding::Nearest | Rounding::Search => Self::between_extremes(block),
        }
    }

    /// The grid from the smallest to the largest value; zero is always on it.
    fn between_extremes(block: &[f32]) -> Self {
        let (min, max) = block.iter().fold((0.0_f32, 0.0_f32), |(min, max), &value| (min.min(value), max.max(value)));
        let scale = (max - min) / MAX_4_BITS;
        let zero_point = if scale > 0.0 { (-min / scale).round_ties_even() } else { 0.0 };
        Self { scale, zero_point }
    }

    fn pack(self, block: &[f32], data: &mut Vec<u8>) {
        let inverse = if self.scale > 0.0 { self.scale.recip() } else { 0.0 };
        let quantize = |value: f32| (value * inverse + self.zero_point).round_ties_even().clamp(0.0, MAX_4_BITS) as u8;
        data.extend(block.as_chunks::<2>().0.iter().map(|[low, high]| quantize(*low) | quantize(*high) << 4));
    }
}
