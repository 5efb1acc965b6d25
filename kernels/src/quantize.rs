//! f32 rows to u8 rows with scales, after a norm if there is one.
//!
//! A value becomes `round(x * 127 / max|x|) + 128`, the maximum taken over the row or over each block of it. Where it is NaN or
//! infinite, the scale becomes NaN (so that whatever uses the row becomes NaN) and the values 128; below 1e-30 it counts as 0.

use crate::error::check_len;
use crate::level::Work;
use crate::math::{Square, SquareFrom, Value, sum_of};
use crate::pack::ZERO_POINT;
use crate::simd::{LANES, Simd};
use crate::workers::{Shared, Workers};
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

/// Elements of a row that lie together: two steps of a product.
pub(crate) const EIGHT: usize = 8;

/// Quantised activations, in memory that is used again. They lie as products read them, `[k / 8, rows, 8]`, so that the rows of a
/// tile are side by side; behind k the values of zero.
#[derive(Clone, Debug, Default)]
pub struct Quantized {
    rows: usize,
    k: usize,
    block: usize,
    /// What stands for zero in `values`, where it is known.
    zero_point: Option<u8>,
    /// At least as many as there are now.
    values: Vec<u8>,
    /// `[ceil(k / block), rows]`, or `[rows]`: those of a tile's rows are side by side. At least as many.
    scales: Vec<f32>,
}

impl Quantized {
    /// The samples of pictures, `[rows, k]`, as activations that count by themselves.
    ///
    /// # Errors
    /// When there is no whole number of rows.
    pub fn set_samples(&mut self, samples: &[u8], k: usize) -> Result<(), Error> {
        self.start(samples.len(), k, 0)?;
        self.zero_point = None;
        self.scales[..self.rows].fill(1.0);
        let stride = self.stride();
        for (row, samples) in samples.chunks_exact(k).enumerate() {
            for (group, samples) in samples.chunks(EIGHT).enumerate() {
                let mut eight = [ZERO_POINT; EIGHT];
                eight[..samples.len()].copy_from_slice(samples);
                self.values[group * stride + row * EIGHT..][..EIGHT].copy_from_slice(&eight);
            }
        }
        Ok(())
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Elements that share a scale, a multiple of 8; 0 for one scale a row.
    pub fn block(&self) -> usize {
        self.block
    }

    /// What stands for zero: 128; in samples what the weights' corrections take it for.
    pub fn zero_point(&self) -> Option<u8> {
        self.zero_point
    }

    /// An element of a row, offset by the zero point.
    pub fn value(&self, row: usize, k: usize) -> u8 {
        assert!(row < self.rows && k < self.k, "no such element");
        self.values[k / EIGHT * self.stride() + row * EIGHT + k % EIGHT]
    }

    /// The scale of a row's elements in a block; of the whole row where they share one.
    pub fn scale(&self, row: usize, block: usize) -> f32 {
        assert!(row < self.rows && block < self.scales_per_row(), "no such block");
        self.scales[block * self.rows + row]
    }

    /// `[ceil(k / block), rows]`, or `[rows]`.
    pub fn scales(&self) -> &[f32] {
        &self.scales[..self.rows * self.scales_per_row()]
    }

    /// The elements from group `group` of eight and row `row` on.
    pub(crate) fn values_from(&self, group: usize, row: usize) -> &[u8] {
        &self.values[..self.num_values()][group * self.stride() + row * EIGHT..]
    }

    /// The distance between groups of eight k: an odd number of cache lines, so that groups do not fall on the same ones.
    pub(crate) fn stride(&self) -> usize {
        (self.rows * EIGHT).div_ceil(LINE) / 2 * 2 * LINE + LINE
    }

    fn scales_per_row(&self) -> usize {
        if self.block == 0 { 1 } else { self.k.div_ceil(self.block) }
    }

    fn num_values(&self) -> usize {
        // Of no rows any k may be claimed.
        if self.rows == 0 { 0 } else { self.k.div_ceil(EIGHT) * self.stride() }
    }

    /// Makes room for `len` elements in rows of `k`.
    fn start(&mut self, len: usize, k: usize, block: usize) -> Result<(), Error> {
        if k == 0 || !len.is_multiple_of(k) || !block.is_multiple_of(EIGHT) {
            return Err(Error::Shape(format!("quantize: {len} elements in rows of {k}, blocks of {block}")));
        }
        (self.rows, self.k, self.block, self.zero_point) = (len / k, k, block, Some(ZERO_POINT));
        let (values, scales) = (self.num_values(), self.rows * self.scales_per_row());
        if self.values.len() < values {
            self.values.resize(values, 0);
        }
        if self.scales.len() < scales {
            self.scales.resize(scales, 0.0);
        }
        Ok(())
    }
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Rows of one task: a cache line of their values.
const TASK_ROWS: usize = LINE / EIGHT;

/// Quantises `x` `[rows, k]`, after `norm`, with a scale for each `block` elements, or with 0 for each row.
///
/// # Errors
/// For lengths that do not fit each other, or a block that is no multiple of 8.
pub fn quantize_rows(
    level: Level,
    workers: &dyn Workers,
    (x, k): (&[f32], usize),
    norm: Norm<'_>,
    block: usize,
    out: &mut Quantized,
) -> Result<(), Error> {
    match norm {
        Norm::None => {}
        Norm::Rms { weight, .. } => check_len("norm weight", k, weight.len())?,
        Norm::Layer { weight, bias, .. } => {
            check_len("norm weight", k, weight.len())?;
            check_len("norm bias", k, bias.len())?;
        }
    }
    out.start(x.len(), k, block)?;
    let (rows, stride) = (out.rows, out.stride());
    let (values, scales) = (Shared::new(&mut out.values), Shared::new(&mut out.scales));
    let to = Output { values: &values, stride, scales: &scales, rows };
    let num_tasks = rows.div_ceil(TASK_ROWS);
    workers.for_each(num_tasks, &|task| {
        let rows = task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS);
        let x = &x[rows.start * k..rows.end * k];
        level.dispatch(Rows { x, k, norm, block, first: rows.start, to });
    });
    Ok(())
}

/// Some rows, on one thread.
struct Rows<'a> {
    x: &'a [f32],
    k: usize,
    norm: Norm<'a>,
    block: usize,
    /// The number of the first row.
    first: usize,
    to: Output<'a>,
}

/// Where all rows go.
#[derive(Clone, Copy)]
struct Output<'a> {
    values: &'a Shared<'a, u8>,
    stride: usize,
    scales: &'a Shared<'a, f32>,
    rows: usize,
}

impl Work for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, k, norm, block, first, to } = self;
        let block = if block == 0 { k } else { block };
        for (row, x) in x.chunks_exact(k).enumerate() {
            let to = OutputRow { to, row: first + row };
            match norm {
                Norm::None => quantize(s, Plain { x }, (k, block), to),
                Norm::Rms { weight, epsilon } => {
                    let mean = sum_of(s, x, Square) / k as f32;
                    let factor = s.splat(1.0 / (mean + epsilon).sqrt());
                    quantize(s, RmsNormed { x, weight, factor }, (k, block), to);
                }
                Norm::Layer { weight, bias, epsilon } => {
                    let mean = s.splat(sum_of(s, x, Value) / k as f32);
                    let variance = sum_of(s, x, SquareFrom(mean)) / k as f32;
                    let factor = s.splat(1.0 / (variance + epsilon).sqrt());
                    quantize(s, LayerNormed { x, weight, bias, mean, factor }, (k, block), to);
                }
            }
        }
    }
}

/// Where a row goes.
#[derive(Clone, Copy)]
struct OutputRow<'a> {
    to: Output<'a>,
    row: usize,
}

impl OutputRow<'_> {
    #[inline(always)]
    fn write_scale(self, block: usize, scale: f32) {
        // SAFETY: tasks have disjoint rows, and nothing else of this row is borrowed.
        unsafe { self.to.scales.part(block * self.to.rows + self.row, 1)[0] = scale };
    }

    /// Writes the first of these to elements `at..at + len`, where `at` is a multiple of 8, and others to what completes eight.
    #[inline(always)]
    fn write(self, at: usize, len: usize, values: [u8; LANES]) {
        let groups = values.as_chunks::<EIGHT>().0.iter().take(len.div_ceil(EIGHT));
        for (group, values) in groups.enumerate() {
            let at = (at / EIGHT + group) * self.to.stride + self.row * EIGHT;
            // SAFETY: as above.
            unsafe { self.to.values.part(at, EIGHT) }.copy_from_slice(values);
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
fn quantize<S: Simd>(s: S, row: impl Row<S>, (k, block): (usize, usize), to: OutputRow<'_>) {
    for b in 0..k.div_ceil(block) {
        let (start, end) = (b * block, k.min((b + 1) * block));
        let whole = start + (end - start) / LANES * LANES;
        let mut largest = s.splat_i32(0);
        for at in (start..whole).step_by(LANES) {
            largest = s.max_i32(largest, magnitude(s, row.at(s, at, LANES)));
        }
        if whole < end {
            let v = s.first(end - whole, row.at(s, whole, end - whole), s.splat(0.0));
            largest = s.max_i32(largest, magnitude(s, v));
        }
        let largest = f32::from_bits(s.largest_i32(largest) as u32);
        if !largest.is_finite() || largest < 1e-30 {
            to.write_scale(b, if largest.is_finite() { 0.0 } else { f32::NAN });
            (start..end).step_by(LANES).for_each(|at| to.write(at, LANES.min(end - at), [ZERO_POINT; LANES]));
            continue;
        }
        to.write_scale(b, largest / 127.0);
        let inverse = s.splat(127.0 / largest);
        let mut lanes = [0; LANES];
        for at in (start..whole).step_by(LANES) {
            s.store_u8(quantized(s, row.at(s, at, LANES), inverse), &mut lanes);
            to.write(at, LANES, lanes);
        }
        if whole < end {
            let v = s.first(end - whole, row.at(s, whole, end - whole), s.splat(0.0));
            s.store_u8(quantized(s, v, inverse), &mut lanes);
            to.write(whole, end - whole, lanes);
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
    s.add_i32(s.round(s.mul(v, inverse)), s.splat_i32(i32::from(ZERO_POINT)))
}
