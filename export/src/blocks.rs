//! Weights as small integers in blocks along a row, in the layout of ONNX Runtime's `MatMulNBits`: `w = (q - zero_point) *
//! scale`, two 4-bit integers to a byte, the first in the low half.

use crate::quantize::{BlockFormat, Encoded, Rounding, largest};
use crate::tensor::extend_with_floats;

/// Zero point of symmetric 8-bit blocks.
const MIDDLE_OF_8_BITS: f32 = 128.0;
/// Largest 4-bit integer.
const MAX_4_BITS: f32 = 15.0;

/// Encodes whole rows.
pub(crate) fn encode(
    format: BlockFormat,
    rows: &[f32],
    row_size: usize,
    importance: Option<&[f32]>,
    encoded: &mut Encoded,
) {
    let mut padded = vec![0.0; format.block_size];
    let importance = padded_blocks(importance, row_size, format.block_size);
    let mut scales = Vec::new();
    for row in rows.chunks_exact(row_size) {
        let mut zero_points = Vec::new();
        for (block, importance) in row.chunks(format.block_size).zip(importance.chunks_exact(format.block_size)) {
            padded.fill(0.0);
            padded[..block.len()].copy_from_slice(block);
            match format.bits {
                8 => scales.push(encode_8_bits(&padded, &mut encoded.data)),
                _ => {
                    let grid = Grid::of(format.rounding, &padded, importance);
                    grid.pack(&padded, &mut encoded.data);
                    scales.push(grid.scale);
                    zero_points.push(grid.zero_point as u8);
                }
            }
        }
        encoded.zero_points.extend(zero_points.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |high| high << 4)));
    }
    extend_with_floats(&mut encoded.scales, format.scale, &scales);
}

/// A row's importance in whole blocks: even where none is given, none behind the row's end. Each block's is brought to a mean of
/// 1, so that no sum leaves f32's range.
fn padded_blocks(importance: Option<&[f32]>, row_size: usize, block_size: usize) -> Vec<f32> {
    let mut padded = importance.map_or_else(|| vec![1.0; row_size], <[f32]>::to_vec);
    padded.resize(row_size.next_multiple_of(block_size), 0.0);
    for block in padded.chunks_exact_mut(block_size) {
        let mean = block.iter().sum::<f32>() / block_size as f32;
        if mean > 0.0 {
            block.iter_mut().for_each(|value| *value /= mean);
        }
    }
    padded
}

/// Symmetric around 128; returns the scale.
fn encode_8_bits(block: &[f32], data: &mut Vec<u8>) -> f32 {
    let scale = largest(block) / 127.0;
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    data.extend(block.iter().map(|value| (round(value * inverse) + MIDDLE_OF_8_BITS) as u8));
    scale
}

/// Scale and zero point of a 4-bit block.
#[derive(Clone, Copy, Debug)]
struct Grid {
    scale: f32,
    /// An integer within `0..=15`.
    zero_point: f32,
}

/// Spans tried, as shares of the one between the block's extremes: outliers are cut off where that helps the others.
const SPANS: [f32; 8] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.80, 0.76, 0.72];

impl Grid {
    fn of(rounding: Rounding, block: &[f32], importance: &[f32]) -> Self {
        match rounding {
            Rounding::Nearest => Self::between_extremes(block),
            Rounding::Search => search(block, importance),
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
        let quantize = |value: f32| (round(value * inverse) + self.zero_point).clamp(0.0, MAX_4_BITS) as u8;
        data.extend(block.as_chunks::<2>().0.iter().map(|[low, high]| quantize(*low) | quantize(*high) << 4));
    }
}

/// The grid with the least sum of `importance * (w - (q - zero_point) * scale)^2` of those tried. For the integers of a
/// candidate the best scale is known in closed form, so that each candidate is better than its own span.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn search(block: &[f32], importance: &[f32]) -> Grid {
    let (min, max) = block.iter().fold((0.0_f32, 0.0_f32), |(min, max), &value| (min.min(value), max.max(value)));
    let whole = (max - min) / MAX_4_BITS;
    if whole <= f32::MIN_POSITIVE {
        return Grid { scale: 0.0, zero_point: 0.0 };
    }
    // What a candidate explains: its error is the sum of `importance * w^2` less this.
    let mut best = (f32::NEG_INFINITY, Grid::between_extremes(block));
    let exact = -min / whole;
    for span in SPANS {
        let scale = whole * span;
        for zero_point in [exact.floor(), exact.floor() + 1.0] {
            let zero_point = zero_point.clamp(0.0, MAX_4_BITS);
            let (cross, square) = products(block, importance, scale.recip(), zero_point);
            let explained = cross * cross / square.max(f32::MIN_POSITIVE);
            if explained > best.0 {
                best = (explained, Grid { scale: cross / square.max(f32::MIN_POSITIVE), zero_point });
            }
        }
    }
    best.1
}

/// Sums of `importance * q * w` and `importance * q^2` for the integers `q` nearest to `w * inverse_scale`. In lanes, so that
/// they are vector instructions: a sum in one variable may not be reordered.
#[inline(always)]
fn products(block: &[f32], importance: &[f32], inverse_scale: f32, zero_point: f32) -> (f32, f32) {
    const LANES: usize = 8;
    let (least, most) = (-zero_point, MAX_4_BITS - zero_point);
    let (mut cross, mut square) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for (values, weights) in block.as_chunks::<LANES>().0.iter().zip(importance.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            let q = round(values[lane] * inverse_scale).max(least).min(most);
            let weighted = weights[lane] * q;
            cross[lane] += weighted * values[lane];
            square[lane] += weighted * q;
        }
    }
    let sum = |lanes: [f32; LANES]| {
        let [a, b, c, d, e, f, g, h] = lanes;
        ((a + e) + (b + f)) + ((c + g) + (d + h))
    };
    (sum(cross), sum(square))
}

/// To the nearest integer, halves to even, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no bits for a fraction. Unlike
/// `f32::round_ties_even` it is a vector instruction on every processor.
#[inline(always)]
pub(crate) fn round(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(grid: Grid, block: &[f32]) -> f32 {
        let q = |value: f32| (round(value / grid.scale) + grid.zero_point).clamp(0.0, MAX_4_BITS) - grid.zero_point;
        block.iter().map(|&value| (value - q(value) * grid.scale).powi(2)).sum()
    }

    /// Numbers that look random, roughly normal.
    fn numbers(count: usize) -> Vec<f32> {
        let mut state = 7_u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| uniform()).sum()).collect()
    }

    #[test]
    fn what_weighs_more_is_rounded_better() {
        let values = numbers(32);
        let mut importance = [1.0; 32];
        importance[5] = 1e4;
        let error_of = |grid: Grid| {
            let q = (round(values[5] / grid.scale) + grid.zero_point).clamp(0.0, MAX_4_BITS) - grid.zero_point;
            (values[5] - q * grid.scale).abs()
        };
        let (even, weighed) = (search(&values, &[1.0; 32]), search(&values, &importance));
        assert!(error_of(weighed) < 0.5 * error_of(even), "{} {}", error_of(weighed), error_of(even));
    }

    #[test]
    fn blocks_of_zeros_and_of_one_value_are_exact() {
        for value in [0.0, 0.3, -0.3] {
            let block = [value; 32];
            let grid = search(&block, &[1.0; 32]);
            let mut data = Vec::new();
            grid.pack(&block, &mut data);
            let q = f32::from(data[0] & 15) - grid.zero_point;
            assert!((q * grid.scale - value).abs() < 1e-6, "{value}: {grid:?}");
        }
    }

    /// The least error of all zero points and of scales in steps of 0.5 %.
    fn exhaustive(block: &[f32]) -> f32 {
        let whole = Grid::between_extremes(block).scale;
        let zero_points = (0..16).map(|zero_point| zero_point as f32);
        let grids = zero_points
            .flat_map(|zero_point| (80..=220).map(move |step| Grid { scale: whole * step as f32 / 200.0, zero_point }));
        grids.map(|grid| error(grid, block)).fold(f32::INFINITY, f32::min)
    }

    #[test]
    fn search_beats_the_extremes_on_every_block_and_comes_near_the_best_there_is() {
        let values = numbers(32 * 200);
        let (mut best, mut searched) = (0.0, 0.0);
        for block in values.chunks_exact(32) {
            let (extremes, found) = (Grid::between_extremes(block), search(block, &[1.0; 32]));
            let (a, b) = (error(extremes, block), error(found, block));
            assert!(b <= a * 1.001, "{b} > {a}: {extremes:?} {found:?}");
            best += exhaustive(block);
            searched += b;
        }
        assert!(searched < 1.05 * best, "{searched}, the best is {best}");
    }
}
