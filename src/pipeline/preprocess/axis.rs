//! What one axis of a picture goes through on its way to `pixel_values`: padding, resizing, cropping; and which part of
//! it reaches the output, with which weights.

use std::f64::consts::PI;

use recaption_export::{Filter, Geometry, Preprocessing, Resize};
use recaption_kernels::pixels::{WEIGHT_BITS, Weights};

/// One axis: `source` pixels lie on a canvas, the canvas is resized, a window of it is the output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AxisPlan {
    filter: Filter,
    /// Pixels of the picture.
    source: u32,
    /// Pixels of the padded picture; `source` without padding.
    canvas: u32,
    /// Where the picture starts on the canvas.
    source_start: u32,
    /// Pixels that the whole canvas is resized to.
    resized: u64,
    /// Where the output starts on the resized canvas; negative where it starts before it.
    window_start: i64,
    /// Output pixels that the picture reaches.
    touched: (u32, u32),
    /// Canvas pixels that those depend on, and a little more.
    needed: (u32, u32),
}

/// Plans of the horizontal and the vertical axis.
pub(super) fn plan(settings: &Preprocessing, width: u32, height: u32) -> [AxisPlan; 2] {
    let filter = settings.filter;
    match settings.geometry {
        Geometry::Pad { .. } => {
            let side = width.max(height);
            let plan = |source, output: u32| {
                // Rounded down, as `pad_to_square` and LLaVA's `expand2square`.
                AxisPlan::new(source, side, (side - source) / 2, u64::from(output), 0, output, filter)
            };
            [plan(width, settings.width), plan(height, settings.height)]
        }
        Geometry::ResizeCrop { resize } => {
            let [new_width, new_height] = match resize {
                Resize::None => [u64::from(width), u64::from(height)],
                Resize::Exact { height, width } => [u64::from(width), u64::from(height)],
                Resize::ShortestEdge(edge) => {
                    let (short, long) = (u64::from(width.min(height)), u64::from(width.max(height)));
                    // Python's `int(edge * long / short)`: one division, rounded towards zero.
                    let long = ((u64::from(edge) * long) as f64 / short as f64) as u64;
                    if width <= height { [u64::from(edge), long] } else { [long, u64::from(edge)] }
                }
            };
            let plan = |source, resized: u64, output: u32| {
                // transformers' `center_crop`: rounded down where it cuts; where it fills up, the margin before the
                // picture is the larger one. Both are the floor of half.
                let window_start = (resized as i64 - i64::from(output)).div_euclid(2);
                AxisPlan::new(source, source, 0, resized, window_start, output, filter)
            };
            [plan(width, new_width, settings.width), plan(height, new_height, settings.height)]
        }
    }
}

/// Pillow 13 begins with the vertical pass where the height shrinks by more than twice as many pixels as the width (pull
/// request 9549; the limit was measured on Pillow 13.0.0). Before, the horizontal pass always came first.
pub(super) fn is_vertical_first(horizontal: &AxisPlan, vertical: &AxisPlan) -> bool {
    let shrinks_by = |axis: &AxisPlan| u64::from(axis.canvas).saturating_sub(axis.resized);
    shrinks_by(vertical) > 2 * shrinks_by(horizontal)
}

impl AxisPlan {
    fn new(
        source: u32,
        canvas: u32,
        source_start: u32,
        resized: u64,
        window_start: i64,
        output: u32,
        filter: Filter,
    ) -> Self {
        let scale = f64::from(canvas) / resized as f64;
        // One pixel more than the filter's reach, against rounding.
        let reach = support(filter) * scale.max(1.0) + 1.0;
        // Resized pixels that the picture reaches, then those of them that are in the window.
        let (start, end) = (f64::from(source_start), f64::from(source_start + source));
        let first = ((((start - reach) / scale).floor() as i64).max(0) - window_start).max(0);
        let last = ((((end + reach) / scale).ceil() as i64).min(resized as i64) - window_start).min(i64::from(output));
        let (first, last) = (first.min(last - 1).max(0) as u32, last.max(1) as u32);
        let (touched, needed) = ((first, last), (0, canvas));
        let mut plan = Self { filter, source, canvas, source_start, resized, window_start, touched, needed };
        let (start, length) = plan.canvas_box();
        plan.needed =
            ((start - reach).floor().max(0.0) as u32, (start + length + reach).ceil().min(f64::from(canvas)) as u32);
        plan
    }

    /// Output pixels that the picture reaches.
    pub(super) fn num_touched(&self) -> u32 {
        self.touched.1 - self.touched.0
    }

    /// The first of them.
    pub(super) fn first_touched(&self) -> u32 {
        self.touched.0
    }

    /// Start and length on the canvas of what becomes the touched output pixels.
    fn canvas_box(&self) -> (f64, f64) {
        let scale = f64::from(self.canvas) / self.resized as f64;
        let start = (self.window_start + i64::from(self.touched.0)) as f64 * scale;
        (start, (f64::from(self.num_touched()) * scale).min(f64::from(self.canvas) - start))
    }

    /// Start and length of the picture's pixels that the output depends on.
    fn needed_source(&self) -> (u32, u32) {
        let start = self.needed.0.max(self.source_start);
        let end = self.needed.1.min(self.source_start + self.source);
        (start - self.source_start, end - start)
    }

    /// As [`Self::needed_source`], in pixels that stand for `reduction` pixels each.
    pub(super) fn needed_reduced(&self, reduction: u32) -> (u32, u32) {
        let (start, length) = self.needed_source();
        let first = start / reduction;
        (first, (start + length).div_ceil(reduction) - first)
    }

    /// Canvas pixels per output pixel.
    pub(super) fn scale(&self) -> f64 {
        f64::from(self.canvas) / self.resized as f64
    }

    /// What the touched output pixels are made of, counted from the start of [`Self::needed_reduced`]: Pillow's weights, in
    /// its order of operations (`precompute_coeffs` and `normalize_coeffs_8bpc`). What falls on the padding becomes a constant;
    /// a pixel that stands for several has the sum of their weights.
    pub(super) fn weights(&self, reduction: u32, background: [u8; 3], weights: &mut Weights) {
        weights.clear();
        let scale = self.scale();
        let filter_scale = scale.max(1.0);
        let reach = support(self.filter) * filter_scale;
        let canvas = i64::from(self.canvas);
        let (first_needed, num_needed) = self.needed_reduced(reduction);
        let (mut values, mut sums) = (Vec::new(), Vec::new());
        for output in self.touched.0..self.touched.1 {
            let center = ((self.window_start + i64::from(output)) as f64 + 0.5) * scale;
            // As C converts: towards zero.
            let start = ((center - reach + 0.5) as i64).max(0);
            let end = ((center + reach + 0.5) as i64).min(canvas);
            values.clear();
            if self.filter == Filter::Nearest {
                values.push(1.0);
            } else {
                let value = |pixel: i64| weight(self.filter, (pixel as f64 - center + 0.5) * (1.0 / filter_scale));
                values.extend((start..end).map(value));
            }
            let start = if self.filter == Filter::Nearest { (center as i64).min(canvas - 1) } else { start };
            let total: f64 = values.iter().sum();
            let mut surroundings = [0; 3];
            let mut first = None;
            sums.clear();
            for (pixel, value) in (start..).zip(&values) {
                let value = if total == 0.0 { *value } else { *value / total };
                let value = value * f64::from(1 << WEIGHT_BITS);
                let value = if value < 0.0 { (value - 0.5) as i32 } else { (value + 0.5) as i32 };
                let in_source = pixel - i64::from(self.source_start);
                if !(0..i64::from(self.source)).contains(&in_source) {
                    for (sum, sample) in surroundings.iter_mut().zip(background) {
                        *sum += value * i32::from(sample);
                    }
                    continue;
                }
                let reduced = in_source as u32 / reduction - first_needed;
                debug_assert!(reduced < num_needed, "{self:?}: pixel {pixel}");
                let first = *first.get_or_insert(reduced);
                if (reduced - first) as usize == sums.len() {
                    sums.push(value);
                } else if let Some(sum) = sums.last_mut() {
                    *sum += value;
                }
            }
            weights.push(first.unwrap_or(0), &sums, surroundings);
        }
    }
}

/// Half the width of a filter, in output pixels where the picture shrinks.
fn support(filter: Filter) -> f64 {
    match filter {
        Filter::Nearest | Filter::Box => 0.5,
        Filter::Bilinear | Filter::Hamming => 1.0,
        Filter::Bicubic => 2.0,
        Filter::Lanczos => 3.0,
    }
}

/// Pillow's filters (`Resample.c`); its bicubic is Catmull and Rom's (a = -0.5).
fn weight(filter: Filter, x: f64) -> f64 {
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
    match filter {
        Filter::Nearest => 1.0,
        Filter::Box if x > -0.5 && x <= 0.5 => 1.0,
        Filter::Bilinear if x.abs() < 1.0 => 1.0 - x.abs(),
        Filter::Hamming if x == 0.0 => 1.0,
        Filter::Hamming if x.abs() < 1.0 => {
            let x = x.abs() * PI;
            x.sin() / x * (0.54 + 0.46 * x.cos())
        }
        Filter::Bicubic => {
            const A: f64 = -0.5;
            let x = x.abs();
            if x < 1.0 {
                ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
            } else if x < 2.0 {
                (((x - 5.0) * x + 8.0) * x - 4.0) * A
            } else {
                0.0
            }
        }
        Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
        Filter::Box | Filter::Bilinear | Filter::Hamming | Filter::Lanczos => 0.0,
    }
}
