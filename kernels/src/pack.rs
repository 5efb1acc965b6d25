//! s8 weights as the integer products read them: packed at export, mapped from the file at run time.
//!
//! ```text
//! weights      i8  [P, K/4, 32, 4]   P = panels of 32 columns, K padded to a multiple of 4, zeros in the padding
//! corrections  i32 [P, B, 32]        -zero point x the column's sum over block b: takes the activations' offset away
//! scales       f32 [P, B or 1, 32]   B = ceil(k / block), or 1 where block is 0
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
    /// Elements of k that share a scale (a multiple of 4), or 0: neither activations nor weights have block scales.
    pub block: usize,
    /// Whether weights have a scale for each block, too, not only for each column.
    pub block_scales: bool,
    /// Whether the rows are `columns` gate rows and then `columns` up rows.
    pub gated: bool,
}

impl PackSpec {
    /// Rows of the weights, `[rows, k]` in torch's layout.
    pub fn rows(&self) -> usize {
        if self.gated { 2 * self.columns } else { self.columns }
    }

    /// Scales for each row of the weights.
    pub fn scales_per_row(&self) -> usize {
        if self.block_scales { self.num_blocks() } else { 1 }
    }

    /// Blocks along k.
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
        [self.num_panels(), self.scales_per_row(), COLUMNS]
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
        if !self.block.is_multiple_of(4) || (self.block == 0 && self.block_scales) {
            return Err(Error::Shape(format!("block: expected a multiple of 4, got {}", self.block)));
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

/// Packs weights `[rows, k]` with scales `[rows, scales_per_row]`.
pub fn pack(spec: &PackSpec, weights: &[i8], scales: &[f32]) -> Result<Packed, Error> {
    spec.check()?;
    check_len("weights", spec.rows() * spec.k, weights.len())?;
    check_len("weight scales", spec.rows() * spec.scales_per_row(), scales.len())?;
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
            for (b, &scale) in scales[row * spec.scales_per_row()..][..spec.scales_per_row()].iter().enumerate() {
                packed.scales[(panel * spec.scales_per_row() + b) * COLUMNS + column] = scale;
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
        let each = self.spec.scales_per_row();
        &self.scales[panel * each..(panel + 1) * each]
    }
}
