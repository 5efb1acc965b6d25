//! s8 weights as the integer products read them: packed at export, mapped from the file at run time.
//!
//! ```text
//! weights      i8  [P, K/4, 32, 4]   P = panels of 32 columns, K padded to a multiple of 4, zeros in the padding
//! corrections  i32 [P, B, 32]        -zero point x the column's sum over block b: takes the activations' offset away
//! scales       f32 [P, B, 32]        B = ceil(k / block), or 1 where block is 0
//! ```
//! Gated weights (SwiGLU) hold 16 gate and 16 up columns a panel, `columns` counts the pairs.

use crate::Error;
use crate::dot::Step;
use crate::error::check_len;

/// Columns of a panel.
pub const PANEL_COLUMNS: usize = crate::dot::COLUMNS;
const COLUMNS: usize = PANEL_COLUMNS;

/// What stands for zero in activations that this crate quantises.
pub const ZERO_POINT: u8 = 128;

/// Largest k: an exact sum of 127 x 127 x k fits in 31 bits.
const MAX_K: usize = 131_072;

/// What a packed matrix is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackSpec {
    /// Columns of the product; for gated weights of its output, which is half the rows of the weights.
    pub columns: usize,
    /// Length of the inner products.
    pub k: usize,
    /// Elements of k that share a scale in activations and in weights (a multiple of 8), or 0: a scale for each row and column.
    pub block: usize,
    /// Whether the rows are `columns` gate rows and then `columns` up rows.
    pub gated: bool,
    /// Whether of each column's k = 8 j, 8 j + 1, 8 j + 4 and 8 j + 5, and likewise of the other four of eight, the positive
    /// weights add up to 128 at most and the negative ones to -128 at least, as [`quantize_weights`] makes them. On
    /// processors with AVX2 and no VNNI their products take two thirds of the time.
    pub bounded: bool,
}

impl PackSpec {
    /// Rows of the weights, `[rows, k]` in torch's layout.
    pub fn rows(&self) -> usize {
        if self.gated { 2 * self.columns } else { self.columns }
    }

    /// Blocks along k, each with a scale for each row of the weights.
    pub fn num_blocks(&self) -> usize {
        if self.block == 0 { 1 } else { self.k.div_ceil(self.block) }
    }

    /// Dimensions of the weights, `[panels, steps, 32, 4]`.
    pub fn weight_dims(&self) -> [usize; 4] {
        [self.num_panels(), self.num_steps(), COLUMNS, 4]
    }

    /// Dimensions of the corrections, `[panels, blocks, 32]`.
    pub fn correction_dims(&self) -> [usize; 3] {
        [self.num_panels(), self.num_blocks(), COLUMNS]
    }

    /// Dimensions of the scales, `[panels, scales per row, 32]`.
    pub fn scale_dims(&self) -> [usize; 3] {
        [self.num_panels(), self.num_blocks(), COLUMNS]
    }

    /// Bytes of the packed form.
    pub fn num_bytes(&self) -> usize {
        let elements = |dims: &[usize]| dims.iter().product::<usize>();
        elements(&self.weight_dims()) + 4 * (elements(&self.correction_dims()) + elements(&self.scale_dims()))
    }

    /// Output columns of a panel.
    pub(crate) fn panel_columns(&self) -> usize {
        if self.gated { COLUMNS / 2 } else { COLUMNS }
    }

    pub(crate) fn num_panels(&self) -> usize {
        self.columns.div_ceil(self.panel_columns())
    }

    /// Steps of four k.
    pub(crate) fn num_steps(&self) -> usize {
        self.k.div_ceil(4)
    }

    /// # Errors
    /// [`Error::Shape`] for sizes that the kernels do not take.
    pub fn check(&self) -> Result<(), Error> {
        if self.k == 0 || self.k > MAX_K {
            return Err(Error::Shape(format!("k: expected 1 to {MAX_K}, got {}", self.k)));
        }
        if !self.block.is_multiple_of(8) {
            return Err(Error::Shape(format!("block: expected a multiple of 8, got {}", self.block)));
        }
        if self.columns > 1 << 31 {
            return Err(Error::Shape(format!("columns: expected at most 2^31, got {}", self.columns)));
        }
        Ok(())
    }

    /// The row of the weights that is a panel's column, if it is not padding.
    pub(crate) fn row_of(&self, panel: usize, column: usize) -> Option<usize> {
        let each = self.panel_columns();
        let index = panel * each + column % each;
        (index < self.columns).then_some(index + if column < each { 0 } else { self.columns })
    }
}

/// The most that those weights of a sum of 16 bits add up to that are of one sign: 255 times as much is below 2^15.
const BOUND: i32 = 128;

/// The k of eight whose products with bounded weights are summed in 16 bits.
const SUMMED: [[usize; 4]; 2] = [[0, 1, 4, 5], [2, 3, 6, 7]];

/// Quantises a row of weights, `[k]`, to values of 8 bits, `[k]`, and scales, `[num_blocks]`: the nearest ones with the
/// finest scale that keeps a block within 127 and, for bounded weights, within their bound.
///
/// # Errors
/// For other lengths, and sizes that the kernels do not take.
pub fn quantize_weights(spec: &PackSpec, row: &[f32], values: &mut [i8], scales: &mut [f32]) -> Result<(), Error> {
    spec.check()?;
    check_len("row", spec.k, row.len())?;
    check_len("values", spec.k, values.len())?;
    check_len("scales", spec.num_blocks(), scales.len())?;
    let block = if spec.block == 0 { spec.k } else { spec.block };
    for ((row, values), scale) in row.chunks(block).zip(values.chunks_mut(block)).zip(scales) {
        let largest = row.iter().fold(0.0_f32, |largest, w| largest.max(w.abs()));
        *scale = largest / 127.0;
        if spec.bounded {
            *scale = scale.max(row.chunks(8).map(largest_of_one_sign).fold(0.0, f32::max) / BOUND as f32);
        }
        let inverse = if *scale > 0.0 { scale.recip() } else { 0.0 };
        values.iter_mut().zip(row).for_each(|(value, w)| *value = nearest(w * inverse) as i8);
        if spec.bounded {
            row.chunks(8).zip(values.chunks_mut(8)).for_each(|(row, values)| bound(row, inverse, values));
        }
    }
    Ok(())
}

/// `value`, at most 2^22, rounded to the nearest integer, ties to even: a sum of this size has no digits behind the point.
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// The largest sum of those weights of one sign that are summed together, of up to eight.
fn largest_of_one_sign(eight: &[f32]) -> f32 {
    let weights = |set: [usize; 4]| set.into_iter().filter_map(|k| eight.get(k));
    let sums = SUMMED.map(|set| {
        let (positive, negative) = weights(set).fold((0.0, 0.0), |(p, n), &w| (p + w.max(0.0), n + (-w).max(0.0)));
        f32::max(positive, negative)
    });
    f32::max(sums[0], sums[1])
}

/// Takes back what rounding took some of eight weights beyond the bound, where it costs least.
fn bound(row: &[f32], inverse: f32, values: &mut [i8]) {
    for (set, sign) in SUMMED.iter().flat_map(|set| [(set, 1), (set, -1)]) {
        let size = |values: &[i8], k: usize| values.get(k).map_or(0, |&value| (sign * i32::from(value)).max(0));
        while set.iter().map(|&k| size(values, k)).sum::<i32>() > BOUND {
            let beyond = |k: usize| size(values, k) as f32 - sign as f32 * row[k] * inverse;
            let largest =
                set.iter().copied().filter(|&k| size(values, k) > 0).max_by(|&a, &b| beyond(a).total_cmp(&beyond(b)));
            values[largest.expect("bug: a sum of nothing")] -= sign as i8;
        }
    }
}

/// Whether a row's values are bounded.
fn is_bounded(values: &[i8]) -> bool {
    values.chunks(8).all(|eight| {
        SUMMED.iter().all(|set| {
            let of_sign = |sign: i32| {
                set.iter().filter_map(|&k| eight.get(k)).map(|&value| (sign * i32::from(value)).max(0)).sum::<i32>()
            };
            of_sign(1) <= BOUND && of_sign(-1) <= BOUND
        })
    })
}

/// Packs the weights of one panel, `[32, k]`: its columns one after the other, for gated weights 16 gate and then 16 up, zeros
/// in the padding. `weights` is `[K/4, 32, 4]` of [`PackSpec::weight_dims`], `corrections` `[blocks, 32]`.
pub fn pack_panel(spec: &PackSpec, zero_point: u8, rows: &[i8], weights: &mut [i8], corrections: &mut [i32]) {
    let block = if spec.block == 0 { spec.k } else { spec.block };
    assert_eq!(rows.len(), COLUMNS * spec.k, "a panel has 32 columns");
    assert_eq!(weights.len(), spec.num_steps() * 4 * COLUMNS, "panel weights");
    assert_eq!(corrections.len(), spec.num_blocks() * COLUMNS, "panel corrections");
    for (column, row) in rows.chunks_exact(spec.k).enumerate() {
        for (step, four) in row.chunks(4).enumerate() {
            weights[(step * COLUMNS + column) * 4..][..four.len()].copy_from_slice(four);
        }
        for (b, weights) in row.chunks(block).enumerate() {
            let sum = weights.iter().map(|&w| i32::from(w)).sum::<i32>();
            corrections[b * COLUMNS + column] = -i32::from(zero_point) * sum;
        }
    }
}

/// Packed weights in memory of their own.
#[derive(Clone, Debug)]
pub struct Packed {
    spec: PackSpec,
    weights: Vec<i8>,
    corrections: Vec<i32>,
    scales: Vec<f32>,
}

/// Packs weights `[rows, k]` with scales `[rows, num_blocks]`.
///
/// # Errors
/// For other lengths, sizes that the kernels do not take, and weights beyond the bound that `spec` promises.
pub fn pack(spec: &PackSpec, weights: &[i8], scales: &[f32]) -> Result<Packed, Error> {
    spec.check()?;
    check_len("weights", spec.rows() * spec.k, weights.len())?;
    if spec.bounded && !weights.chunks(spec.k).all(is_bounded) {
        return Err(Error::Shape("weights: said to be bounded, and are not".to_owned()));
    }
    check_len("weight scales", spec.rows() * spec.num_blocks(), scales.len())?;
    let mut packed = Packed {
        spec: *spec,
        weights: vec![0; spec.weight_dims().iter().product()],
        corrections: vec![0; spec.correction_dims().iter().product()],
        scales: vec![0.0; spec.scale_dims().iter().product()],
    };
    let steps = 4 * COLUMNS * spec.num_steps();
    let panels =
        packed.weights.chunks_exact_mut(steps).zip(packed.corrections.chunks_exact_mut(spec.num_blocks() * COLUMNS));
    let mut rows = vec![0; COLUMNS * spec.k];
    for (panel, (panel_weights, corrections)) in panels.enumerate() {
        rows.fill(0);
        for (column, row) in (0..COLUMNS).filter_map(|column| Some((column, spec.row_of(panel, column)?))) {
            rows[column * spec.k..][..spec.k].copy_from_slice(&weights[row * spec.k..][..spec.k]);
            for (b, &scale) in scales[row * spec.num_blocks()..][..spec.num_blocks()].iter().enumerate() {
                packed.scales[(panel * spec.num_blocks() + b) * COLUMNS + column] = scale;
            }
        }
        pack_panel(spec, ZERO_POINT, &rows, panel_weights, corrections);
    }
    Ok(packed)
}

impl Packed {
    /// What the kernels take.
    pub fn view(&self) -> PackedWeights<'_> {
        PackedWeights::new(self.spec, &self.weights, &self.corrections, &self.scales).expect("bug: `pack` checked it")
    }
}

/// Packed weights in somebody's memory, checked.
#[derive(Clone, Copy, Debug)]
pub struct PackedWeights<'a> {
    spec: PackSpec,
    panels: &'a [Step],
    corrections: &'a [[i32; COLUMNS]],
    scales: &'a [[f32; COLUMNS]],
}

impl<'a> PackedWeights<'a> {
    /// Views tensors with the dimensions that `spec` gives. The weights should begin at a multiple of 64.
    ///
    /// # Errors
    /// When a length is another, or `spec` is not one that the kernels take.
    pub fn new(spec: PackSpec, weights: &'a [i8], corrections: &'a [i32], scales: &'a [f32]) -> Result<Self, Error> {
        spec.check()?;
        check_len("packed weights", spec.weight_dims().iter().product(), weights.len())?;
        check_len("corrections", spec.correction_dims().iter().product(), corrections.len())?;
        check_len("weight scales", spec.scale_dims().iter().product(), scales.len())?;
        let (panels, corrections, scales) = (weights.as_chunks().0, corrections.as_chunks().0, scales.as_chunks().0);
        Ok(Self { spec, panels, corrections, scales })
    }

    /// What they are like.
    pub fn spec(&self) -> PackSpec {
        self.spec
    }

    pub(crate) fn panel(&self, panel: usize) -> &'a [Step] {
        let steps = self.spec.num_steps();
        &self.panels[panel * steps..(panel + 1) * steps]
    }

    /// One for each block.
    pub(crate) fn corrections(&self, panel: usize) -> &'a [[i32; COLUMNS]] {
        let blocks = self.spec.num_blocks();
        &self.corrections[panel * blocks..(panel + 1) * blocks]
    }

    /// One for each block, or one.
    pub(crate) fn scales(&self, panel: usize) -> &'a [[f32; COLUMNS]] {
        let each = self.spec.num_blocks();
        &self.scales[panel * each..(panel + 1) * each]
    }
}
