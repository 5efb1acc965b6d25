//! Pillow's resampling of one axis, for the part of the output that is wanted.
//!
//! Takes the lengths along one axis, gives the fixed-point weights of each output pixel, exactly
//! as Pillow's `Resample.c` computes them (`precompute_coeffs`, `normalize_coeffs_8bpc`). Padding
//! is a weight, not pixels. Must never depend on the length of the padded or of the whole resized
//! axis, except in the weights of the output pixels that the picture reaches.

use std::f64::consts::PI;
use std::ops::Range;

use recaption_export::Filter;

/// Pillow's `PRECISION_BITS`: 8 bits of sample, 2 bits for the filters' overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The lengths along one axis, in pixels.
pub(super) struct AxisShape {
    /// Pixels of the picture.
    pub source: u64,
    /// Pixels of the padded picture; `source` without padding.
    pub canvas: u64,
    /// Where the picture starts on the canvas.
    pub source_start: u64,
    /// Pixels that the whole canvas is resized to.
    pub resized: u64,
    /// Where the output starts on the resized canvas; negative where it starts before it.
    pub window_start: i64,
    /// Pixels of the output.
    pub output: u64,
}

/// The weights of one axis, for a contiguous range of output pixels: those that the picture
/// reaches. All others have the colour of the surroundings.
#[derive(Default)]
pub(super) struct Axis {
    first_touched: usize,
    spans: Vec<Span>,
    weights: Vec<i32>,
    /// Weights of one output pixel before they are normalised.
    scratch: Vec<f64>,
}

#[derive(Clone, Copy)]
struct Span {
    /// First source pixel.
    start: usize,
    num_weights: usize,
    first_weight: usize,
    /// Sum of the weights of the padding.
    surroundings_weight: i32,
}

/// The weights of one output pixel.
#[derive(Clone, Copy)]
pub(super) struct Taps<'a> {
    start: usize,
    weights: &'a [i32],
    surroundings_weight: i32,
}

impl Axis {
    /// Computes the weights, reusing the memory of the axis planned before.
    pub(super) fn plan(&mut self, shape: &AxisShape, filter: Filter) {
        self.spans.clear();
        self.weights.clear();
        self.first_touched = 0;
        let scale = shape.canvas as f64 / shape.resized as f64;
        for position in 0..shape.output as i64 {
            let on_canvas = shape.window_start + position;
            if !(0..shape.resized as i64).contains(&on_canvas) {
                continue;
            }
            let center = (on_canvas as f64 + 0.5) * scale;
            let range = canvas_range(filter, center, scale, shape.canvas);
            let source = shape.source_start..shape.source_start + shape.source;
            if range.start >= source.end || range.end <= source.start {
                continue;
            }
            if self.spans.is_empty() {
                self.first_touched = position as usize;
            }
            self.push(filter, center, scale, range, source);
        }
    }

    fn push(&mut self, filter: Filter, center: f64, scale: f64, range: Range<u64>, source: Range<u64>) {
        let inverse = 1.0 / scale.max(1.0);
        self.scratch.clear();
        self.scratch.extend(range.clone().map(|x| weight(filter, (x as f64 - center + 0.5) * inverse)));
        let sum: f64 = self.scratch.iter().sum();
        let first_weight = self.weights.len();
        let mut surroundings_weight = 0;
        for (x, weight) in range.clone().zip(&self.scratch) {
            let weight = if sum == 0.0 { *weight } else { weight / sum };
            let weight = weight * f64::from(1 << PRECISION_BITS);
            // Half away from zero, then towards zero: C's `(int)(0.5 + weight)`.
            let weight = (weight + 0.5_f64.copysign(weight)) as i32;
            if source.contains(&x) {
                self.weights.push(weight);
            } else {
                surroundings_weight += weight;
            }
        }
        self.spans.push(Span {
            start: (range.start.max(source.start) - source.start) as usize,
            num_weights: self.weights.len() - first_weight,
            first_weight,
            surroundings_weight,
        });
    }

    /// Output pixels that the picture reaches.
    pub(super) fn num_touched(&self) -> usize {
        self.spans.len()
    }

    pub(super) fn first_touched(&self) -> usize {
        self.first_touched
    }

    /// The `index`th output pixel that the picture reaches.
    pub(super) fn taps(&self, index: usize) -> Taps<'_> {
        self.resolve(&self.spans[index])
    }

    pub(super) fn touched(&self) -> impl Iterator<Item = Taps<'_>> {
        self.spans.iter().map(|span| self.resolve(span))
    }

    fn resolve(&self, span: &Span) -> Taps<'_> {
        Taps {
            start: span.start,
            weights: &self.weights[span.first_weight..][..span.num_weights],
            surroundings_weight: span.surroundings_weight,
        }
    }

    /// The source pixels that any output pixel needs. Spans move forward with the output.
    pub(super) fn sources(&self) -> Range<usize> {
        match (self.spans.first(), self.spans.last()) {
            (Some(first), Some(last)) => first.start..last.start + last.num_weights,
            _ => 0..0,
        }
    }

    /// Resamples a row of the picture ([source, 3]) into `output` ([num_touched, 3]).
    pub(super) fn resample_row(&self, source: &[u8], surroundings: [u8; 3], output: &mut [u8]) {
        for (taps, pixel) in self.touched().zip(output.chunks_exact_mut(3)) {
            let mut sums = taps.start_sums(surroundings);
            let samples = source[taps.start * 3..].chunks_exact(3);
            for (weight, sample) in taps.weights.iter().zip(samples) {
                sums[0] += weight * i32::from(sample[0]);
                sums[1] += weight * i32::from(sample[1]);
                sums[2] += weight * i32::from(sample[2]);
            }
            pixel.copy_from_slice(&sums.map(to_sample));
        }
    }

    #[cfg(test)]
    pub(super) fn num_weights(&self) -> usize {
        self.weights.capacity()
    }
}

impl Taps<'_> {
    pub(super) fn start(&self) -> usize {
        self.start
    }

    pub(super) fn end(&self) -> usize {
        self.start + self.weights.len()
    }

    pub(super) fn weight_of(&self, source: usize) -> Option<i32> {
        self.weights.get(source.checked_sub(self.start)?).copied()
    }

    /// The sums before any source pixel: one half, for rounding, and the padding's part.
    pub(super) fn start_sums(&self, surroundings: [u8; 3]) -> [i32; 3] {
        let half = 1 << (PRECISION_BITS - 1);
        surroundings.map(|sample| half + self.surroundings_weight * i32::from(sample))
    }
}

/// Pillow's `clip8`.
pub(super) fn to_sample(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// The pixels of the canvas that an output pixel with this centre depends on.
fn canvas_range(filter: Filter, center: f64, scale: f64, canvas: u64) -> Range<u64> {
    if filter == Filter::Nearest {
        // Pillow resizes with NEAREST by another routine: the pixel under the centre.
        let pixel = (center as u64).min(canvas - 1);
        return pixel..pixel + 1;
    }
    let support = support(filter) * scale.max(1.0);
    // `as u64` is zero for negative numbers, as Pillow's lower limit.
    let start = (center - support + 0.5) as u64;
    let end = ((center + support + 0.5) as u64).min(canvas);
    start..end
}

/// Half the width of the filter, in output pixels where the picture shrinks.
fn support(filter: Filter) -> f64 {
    match filter {
        Filter::Nearest | Filter::Box => 0.5,
        Filter::Bilinear | Filter::Hamming => 1.0,
        Filter::Bicubic => 2.0,
        Filter::Lanczos => 3.0,
    }
}

/// Pillow's filter functions, in its order of operations.
fn weight(filter: Filter, x: f64) -> f64 {
    let distance = x.abs();
    match filter {
        Filter::Nearest => 1.0,
        Filter::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
        Filter::Bilinear => (1.0 - distance).max(0.0),
        Filter::Hamming if x == 0.0 => 1.0,
        Filter::Hamming if distance >= 1.0 => 0.0,
        Filter::Hamming => {
            let angle = distance * PI;
            angle.sin() / angle * (0.54 + 0.46 * angle.cos())
        }
        Filter::Bicubic => {
            const A: f64 = -0.5;
            if distance < 1.0 {
                ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0
            } else if distance < 2.0 {
                (((distance - 5.0) * distance + 8.0) * distance - 4.0) * A
            } else {
                0.0
            }
        }
        Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
        Filter::Lanczos => 0.0,
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}
