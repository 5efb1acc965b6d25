//! s8 weights as the integer products read them: packed at export, mapped from the file at run time.
//!
//! ```text
//! weights      i8  [P, K/4, 32, 4]   P = panels of 32 columns, K padded to a multiple of 4, zeros in the padding
//! corrections  i32 [P, B, 32]        -zero point x the column's sum over block b: takes the activations' offset away
//! scales       f32 [P, B, 32]        B = ceil(k / block), or 1 where block is 0
//! ```
//! Gated weights (SwiGLU) hold 16 gate and 16 up columns a panel, `columns` counts the pairs.

use std::ops::Range;

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
    /// Whether the products of eight k can be summed in 16 bits, as [`quantize_weights`] makes the weights: of k = 2 j and 2 j + 1,
    /// those of one sign add up to 128 at most; of 8 j, 8 j + 1, 8 j + 4 and 8 j + 5, and of the other four of eight, the sizes add
    /// up to 255 at most. On processors with AVX2 and no VNNI their products take two thirds of the time.
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

/// The k of eight that `vpmaddubsw` sums, with activations up to 255 in 16 bits: weights of one sign add up to [`PAIR_BOUND`].
const PAIRS: [[usize; 2]; 4] = [[0, 1], [2, 3], [4, 5], [6, 7]];
const PAIR_BOUND: i32 = 128;
/// The k of eight that are then added, with activations less 128: sizes of weights add up to [`FOUR_BOUND`].
const FOURS: [[usize; 4]; 2] = [[0, 1, 4, 5], [2, 3, 6, 7]];
const FOUR_BOUND: i32 = 255;

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
            *scale = scale.max(row.chunks(8).map(finest_scale).fold(0.0, f32::max));
        }
        let inverse = if *scale > 0.0 { scale.recip() } else { 0.0 };
        values.iter_mut().zip(row).for_each(|(value, w)| *value = nearest(w * inverse) as i8);
        if spec.bounded {
            row.chunks(8).zip(values.chunks_mut(8)).for_each(|(row, values)| bring_down(row, inverse, values));
        }
    }
    Ok(())
}

/// `value`, at most 2^22, rounded to the nearest integer, ties to even: a sum of this size has no digits behind the point.
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// The finest scale that keeps up to eight weights within their bounds, but for rounding.
fn finest_scale(eight: &[f32]) -> f32 {
    let sum =
        |set: &[usize], size: fn(f32) -> f32| set.iter().filter_map(|&k| eight.get(k)).map(|&w| size(w)).sum::<f32>();
    let pairs = PAIRS.iter().map(|pair| sum(pair, |w| w.max(0.0)).max(sum(pair, |w| (-w).max(0.0))));
    let fours = FOURS.iter().map(|four| sum(four, f32::abs));
    f32::max(pairs.fold(0.0, f32::max) / PAIR_BOUND as f32, fours.fold(0.0, f32::max) / FOUR_BOUND as f32)
}

/// Those sums of up to eight values that are beyond their bound: which k, and which sign they are of, where 0 is both.
fn beyond(values: &[i8]) -> impl Iterator<Item = (&'static [usize], i32)> {
    let of = move |set: &'static [usize], sign: i32, bound: i32| {
        let sizes = set.iter().filter_map(|&k| values.get(k)).map(|&value| match sign {
            0 => i32::from(value).abs(),
            sign => (sign * i32::from(value)).max(0),
        });
        (sizes.sum::<i32>() > bound).then_some((set, sign))
    };
    let pairs = PAIRS.iter().flat_map(move |pair| [1, -1].map(|sign| of(pair, sign, PAIR_BOUND)));
    let fours = FOURS.iter().map(move |four| of(four, 0, FOUR_BOUND));
    pairs.chain(fours).flatten()
}

/// Takes back what rounding took some of eight weights beyond a bound, where it costs least.
fn bring_down(row: &[f32], inverse: f32, values: &mut [i8]) {
    loop {
        let first = beyond(values).next();
        let Some((set, sign)) = first else { return };
        // How much larger than its weight a value is.
        let rounded_up = |k: usize| f32::from(values[k].unsigned_abs()) - (row[k] * inverse).abs();
        let counts = |k: &usize| {
            values.get(*k).is_some_and(|&value| value != 0 && (sign == 0 || i32::from(value.signum()) == sign))
        };
        let most = set.iter().copied().filter(counts).max_by(|&a, &b| rounded_up(a).total_cmp(&rounded_up(b)));
        let k = most.expect("bug: a sum of nothing");
        values[k] -= values[k].signum();
    }
}

/// Whether a row's values are within their bounds.
fn is_bounded(values: &[i8]) -> bool {
    values.chunks(8).all(|eight| beyond(eight).next().is_none())
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
        self.panels(panel..panel + 1)
    }

    /// One after the other.
    pub(crate) fn panels(&self, panels: Range<usize>) -> &'a [Step] {
        let steps = self.spec.num_steps();
        &self.panels[panels.start * steps..panels.end * steps]
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
