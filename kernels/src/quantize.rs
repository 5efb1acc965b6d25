//! f32 rows to u8 rows with scales, after a norm if there is one.
//!
//! A value becomes `round(x * 127 / max|x|) + 128`, the maximum taken over the row or over each block of it. Where it is NaN or
//! infinite, the scale becomes NaN (so that whatever uses the row becomes NaN) and the values 128; below 1e-30 it counts as 0.

use crate::error::check_len;
use crate::level::Work;
use crate::math::{Square, SquareFrom, Value, sum_of};
use crate::simd::{LANES, Simd};
use crate::workers::{Shared, Workers, part_of};
use crate::{Error, Level};

/// What happens to a row before it is quantised.
#[derive(Clone, Copy, Debug)]
pub enum Norm<'a> {
    /// Nothing.
    None,
    /// `x / sqrt(mean(x^2) + epsilon) * weight`.
    Rms {
        /// `[k]`
        weight: &'a [f32],
        /// Added to the mean square.
        epsilon: f32,
    },
    /// `(x - mean) / sqrt(variance + epsilon) * weight + bias`.
    Layer {
        /// `[k]`
        weight: &'a [f32],
        /// `[k]`
        bias: &'a [f32],
        /// Added to the variance.
        epsilon: f32,
    },
}

/// Distance between the rows of quantised activations: k rounded up to a multiple of 4.
pub fn stride(k: usize) -> usize {
    k.next_multiple_of(4)
}

/// Quantised activations.
#[derive(Clone, Copy, Debug)]
pub struct Quantized<'a> {
    /// Elements of a row.
    pub k: usize,
    /// Elements that share a scale, a multiple of 4; 0 for one scale a row.
    pub block: usize,
    /// `[rows, stride(k)]`, offset by 128.
    pub values: &'a [u8],
    /// `[rows, ceil(k / block)]`, or `[rows]`.
    pub scales: &'a [f32],
}

/// Where quantised activations are to go: as [`Quantized`].
#[derive(Debug)]
pub struct QuantizedMut<'a> {
    /// Elements of a row.
    pub k: usize,
    /// Elements that share a scale, a multiple of 4; 0 for one scale a row.
    pub block: usize,
    /// `[rows, stride(k)]`
    pub values: &'a mut [u8],
    /// `[rows, ceil(k / block)]`, or `[rows]`.
    pub scales: &'a mut [f32],
}

/// Scales of a row.
pub fn num_scales(k: usize, block: usize) -> usize {
    if block == 0 { 1 } else { k.div_ceil(block) }
}

/// Rows of one task: small enough for any number of threads, large enough to be worth a call.
const TASK_ROWS: usize = 8;

/// Quantises `x` `[rows, k]`, after `norm`.
pub fn quantize_rows(
    level: Level,
    workers: &dyn Workers,
    x: &[f32],
    norm: Norm<'_>,
    out: QuantizedMut<'_>,
) -> Result<(), Error> {
    let (k, block) = (out.k, out.block);
    if k == 0 || !x.len().is_multiple_of(k) || !block.is_multiple_of(4) {
        return Err(Error::Shape(format!("quantize: {} elements in rows of {k}, blocks of {block}", x.len())));
    }
    let rows = x.len() / k;
    check_len("values", rows * stride(k), out.values.len())?;
    check_len("scales", rows * num_scales(k, block), out.scales.len())?;
    match norm {
        Norm::None => {}
        Norm::Rms { weight, .. } => check_len("norm weight", k, weight.len())?,
        Norm::Layer { weight, bias, .. } => {
            check_len("norm weight", k, weight.len())?;
            check_len("norm bias", k, bias.len())?;
        }
    }
    let (values, scales) = (Shared::new(out.values), Shared::new(out.scales));
    let num_tasks = rows.div_ceil(TASK_ROWS);
    workers.for_each(num_tasks, &|task| {
        let rows = part_of(rows, num_tasks, task);
        // SAFETY: tasks have disjoint rows.
        let (values, scales) = unsafe {
            let each = num_scales(k, block);
            (
                values.part(rows.start * stride(k), rows.len() * stride(k)),
                scales.part(rows.start * each, rows.len() * each),
            )
        };
        level.dispatch(Rows {
            x: &x[rows.start * k..rows.end * k],
            norm,
            out: QuantizedMut { k, block, values, scales },
        });
    });
    Ok(())
}

/// Some rows, on one thread.
struct Rows<'a> {
    x: &'a [f32],
    norm: Norm<'a>,
    out: QuantizedMut<'a>,
}

impl Work for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let QuantizedMut { k, block, values, scales } = self.out;
        let rows = self.x.chunks_exact(k).zip(values.chunks_exact_mut(stride(k)));
        for ((x, values), scales) in rows.zip(scales.chunks_exact_mut(num_scales(k, block))) {
            values[k..].fill(128);
            let values = &mut values[..k];
            match self.norm {
                Norm::None => quantize(s, Plain { x }, block, values, scales),
                Norm::Rms { weight, epsilon } => {
                    let mean = sum_of(s, x, Square) / k as f32;
                    let factor = s.splat(1.0 / (mean + epsilon).sqrt());
                    quantize(s, RmsNormed { x, weight, factor }, block, values, scales);
                }
                Norm::Layer { weight, bias, epsilon } => {
                    let mean = s.splat(sum_of(s, x, Value) / k as f32);
                    let variance = sum_of(s, x, SquareFrom(mean)) / k as f32;
                    let factor = s.splat(1.0 / (variance + epsilon).sqrt());
                    quantize(s, LayerNormed { x, weight, bias, mean, factor }, block, values, scales);
                }
            }
        }
    }
}

/// A row to quantise. (Not a closure: one that is not inlined is compiled without the instruction set.)
trait Row<S: Simd>: Copy {
    /// Its vector of `len` elements (at most 16) from `at` on.
    fn at(self, s: S, at: usize, len: usize) -> S::F;
}

#[derive(Clone, Copy)]
struct Plain<'a> {
    x: &'a [f32],
}

#[derive(Clone, Copy)]
struct RmsNormed<'a, F> {
    x: &'a [f32],
    weight: &'a [f32],
    factor: F,
}

#[derive(Clone, Copy)]
struct LayerNormed<'a, F> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    mean: F,
    factor: F,
}

impl<S: Simd> Row<S> for Plain<'_> {
    #[inline(always)]
    fn at(self, s: S, at: usize, len: usize) -> S::F {
        s.load_part(&self.x[at..at + len])
    }
}

impl<S: Simd> Row<S> for RmsNormed<'_, S::F> {
    #[inline(always)]
    fn at(self, s: S, at: usize, len: usize) -> S::F {
        s.mul(s.mul(s.load_part(&self.x[at..at + len]), self.factor), s.load_part(&self.weight[at..at + len]))
    }
}

impl<S: Simd> Row<S> for LayerNormed<'_, S::F> {
    #[inline(always)]
    fn at(self, s: S, at: usize, len: usize) -> S::F {
        let x = s.mul(s.sub(s.load_part(&self.x[at..at + len]), self.mean), self.factor);
        s.fma(x, s.load_part(&self.weight[at..at + len]), s.load_part(&self.bias[at..at + len]))
    }
}

/// Quantises one row, whose elements are computed twice, which is cheaper than keeping them.
#[inline(always)]
fn quantize<S: Simd>(s: S, row: impl Row<S>, block: usize, values: &mut [u8], scales: &mut [f32]) {
    let block = if block == 0 { values.len() } else { block };
    for ((b, values), scale) in values.chunks_mut(block).enumerate().zip(scales) {
        let (start, whole) = (b * block, values.len() / LANES * LANES);
        let mut largest = s.splat_i32(0);
        for at in (0..whole).step_by(LANES) {
            largest = s.max_i32(largest, magnitude(s, row.at(s, start + at, LANES)));
        }
        if whole < values.len() {
            let len = values.len() - whole;
            let v = s.first(len, row.at(s, start + whole, len), s.splat(0.0));
            largest = s.max_i32(largest, magnitude(s, v));
        }
        let largest = f32::from_bits(s.largest_i32(largest) as u32);
        if !largest.is_finite() || largest < 1e-30 {
            *scale = if largest.is_finite() { 0.0 } else { f32::NAN };
            values.fill(128);
            continue;
        }
        *scale = largest / 127.0;
        let inverse = s.splat(127.0 / largest);
        let (chunks, tail) = values.as_chunks_mut::<LANES>();
        for (i, to) in chunks.iter_mut().enumerate() {
            s.store_u8(quantized(s, row.at(s, start + i * LANES, LANES), inverse), to);
        }
        if !tail.is_empty() {
            let mut lanes = [0; LANES];
            s.store_u8(quantized(s, row.at(s, start + whole, tail.len()), inverse), &mut lanes);
            tail.copy_from_slice(&lanes[..tail.len()]);
        }
    }
}

/// Of non-negative floats the larger has the larger bits; infinities and NaN have the largest of all.
#[inline(always)]
fn magnitude<S: Simd>(s: S, v: S::F) -> S::I {
    s.and_i32(s.bits(v), s.splat_i32(i32::MAX))
}

#[inline(always)]
fn quantized<S: Simd>(s: S, v: S::F, inverse: S::F) -> S::I {
    s.add_i32(s.round(s.mul(v, inverse)), s.splat_i32(128))
}
