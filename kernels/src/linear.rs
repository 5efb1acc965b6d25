//! y = x W^T: u8 activations, packed s8 weights, exact integer sums, f32 out.
//!
//! For one row and column, with row scale r and column scale c: `(sum * r) * c`. With scales per block along k, the blocks'
//! sums are added in order, `acc = fma(sum, r * c, acc)`. Then bias, activation, residual. An output depends on its row and
//! column alone.

use std::cell::RefCell;

use crate::dot::{Aligned, Blocks, COLUMNS, ROWS, Step, Tile};
use crate::error::check_len;
use crate::level::Work;
use crate::math::{gelu, gelu_tanh, swish};
use crate::pack::PackedWeights;
use crate::quantize::Quantized;
use crate::simd::{LANES, Simd};
use crate::workers::{Shared, Workers, part_of};
use crate::{Error, Level};

/// What is applied to the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `x sigmoid(1.702 x)`
    QuickGelu,
    /// `x Phi(x)`
    Gelu,
    /// GELU's approximation by tanh.
    GeluTanh,
    /// `gate sigmoid(gate) up`: for gated weights, and only for them.
    SwiGlu,
}

/// What is added at the end.
#[derive(Clone, Copy, Debug)]
pub enum Residual<'a> {
    /// Nothing.
    None,
    /// `[rows, columns]`
    Add(&'a [f32]),
    /// What the output holds before the call.
    InPlace,
}

/// What follows the product.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue<'a> {
    /// `[weights' rows]`: for gated weights the gate's, then up's.
    pub bias: Option<&'a [f32]>,
    /// After the bias.
    pub activation: Activation,
    /// After the activation.
    pub residual: Residual<'a>,
}

/// Activation bytes of one task's rows: they stay in the second-level cache while panels pass.
const TASK_BYTES: usize = 384 << 10;

/// Weight bytes that make a task worth a call.
const MIN_TASK_WEIGHTS: usize = 64 << 10;

/// Tasks wanted for each thread, so that an unlucky one does not wait long.
const TASKS_PER_THREAD: usize = 4;

/// Computes `out` `[rows, columns]`.
///
/// # Errors
/// For shapes that do not fit each other.
pub fn linear(
    level: Level,
    workers: &dyn Workers,
    x: &Quantized,
    weights: &PackedWeights<'_>,
    epilogue: &Epilogue<'_>,
    out: &mut [f32],
) -> Result<(), Error> {
    let spec = weights.spec();
    if (x.k(), x.block()) != (spec.k, spec.block) {
        let (xk, xb, k, block) = (x.k(), x.block(), spec.k, spec.block);
        return Err(Error::Shape(format!(
            "linear: activations of k {xk}, block {xb}; weights of k {k}, block {block}"
        )));
    }
    if (epilogue.activation == Activation::SwiGlu) != spec.gated {
        return Err(Error::Shape("linear: SwiGLU and gated weights go together".to_owned()));
    }
    let rows = x.rows();
    check_len("out", rows * spec.columns, out.len())?;
    if let Some(bias) = epilogue.bias {
        check_len("bias", spec.rows(), bias.len())?;
    }
    if let Residual::Add(residual) = epilogue.residual {
        check_len("residual", out.len(), residual.len())?;
    }
    if out.is_empty() {
        return Ok(());
    }
    let panels = spec.num_panels();
    let row_parts = rows.div_ceil((TASK_BYTES / spec.k).max(4 * ROWS));
    let tiles = rows.div_ceil(ROWS);
    let wanted = (TASKS_PER_THREAD * workers.num_threads()).div_ceil(row_parts);
    let most = (panels * spec.num_steps() * 4 * COLUMNS * tiles.div_ceil(row_parts)).div_ceil(MIN_TASK_WEIGHTS);
    let panel_parts = if workers.num_threads() == 1 { 1 } else { wanted.min(most).clamp(1, panels) };
    let out = Shared::new(out);
    let product = Product { x, weights: *weights, epilogue: *epilogue, out: &out };
    workers.for_each(row_parts * panel_parts, &|task| {
        // Whole tiles, so that a cut adds none.
        let tiles = part_of(tiles, row_parts, task / panel_parts);
        let rows = tiles.start * ROWS..rows.min(tiles.end * ROWS);
        level.dispatch(Part { product, rows, panels: part_of(panels, panel_parts, task % panel_parts) });
    });
    Ok(())
}

/// The whole product.
#[derive(Clone, Copy)]
struct Product<'a> {
    x: &'a Quantized,
    weights: PackedWeights<'a>,
    epilogue: Epilogue<'a>,
    out: &'a Shared<'a, f32>,
}

/// One task: disjoint from all others.
struct Part<'a> {
    product: Product<'a>,
    rows: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
}

thread_local! {
    // Taken out while it is used: a closure around a task would be compiled without the instruction set's features.
    static STARTS: RefCell<Vec<[i32; COLUMNS]>> = RefCell::default();
}

impl Work for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { product, rows, panels } = self;
        let (weights, spec) = (product.weights, product.weights.spec());
        let (blockwise, zero_point) = (spec.block > 0, product.x.zero_point());
        let num_tiles = rows.len().div_ceil(S::tile_rows(rows.len(), spec.k, blockwise));
        let all_steps = weights.panels(panels.clone());
        let (mut sums, mut acc) = (Aligned([[0; COLUMNS]; ROWS]), Aligned([[0.0; COLUMNS]; ROWS]));
        let (Aligned(sums), Aligned(acc)) = (&mut sums, &mut acc);
        let mut starts = STARTS.take();
        for panel in panels.clone() {
            let (steps, corrections) = (weights.panel(panel), weights.corrections(panel));
            starts.clear();
            if blockwise {
                for (steps, &corrections) in steps.chunks(spec.block / 4).zip(corrections) {
                    starts.push(s.start(steps, spec.bounded, corrections, zero_point));
                }
            } else {
                starts.push(s.start(steps, spec.bounded, corrections[0], zero_point));
            }
            // Of several tiles, each fetches a part of the next panel.
            let ahead = if num_tiles == 1 { S::STEPS_AHEAD.min(steps.len()) } else { steps.len() };
            let next = &all_steps[((panel - panels.start) * steps.len() + ahead).min(all_steps.len())..];
            let next = &next[..next.len().min(steps.len())];
            let bias = product.bias(s, panel);
            for tile in 0..num_tiles {
                let part = part_of(rows.len(), num_tiles, tile);
                let (first, count) = (rows.start + part.start, part.len());
                let next = &next[part_of(next.len(), num_tiles, tile)];
                if blockwise {
                    s.sum_blocks(count, product.blocks(first, panel, &starts, next), sums, acc);
                } else {
                    s.tile_f32(count, product.tile(first, panel, &starts[0], next), sums, acc);
                }
                product.finish(s, panel, bias, first, &acc[..count]);
            }
        }
        STARTS.set(starts);
    }
}

impl<'a> Product<'a> {
    /// The operands of rows from `first` on and of a panel that has one block.
    #[inline(always)]
    fn tile(&self, first: usize, panel: usize, init: &'a [i32; COLUMNS], next: &'a [Step]) -> Tile<'a> {
        Tile {
            a: self.x.values_from(0, first),
            stride: self.x.stride(),
            b: self.weights.panel(panel),
            bounded: self.weights.spec().bounded,
            corrections: &self.weights.corrections(panel)[0],
            init,
            next,
        }
    }

    /// The operands of rows from `first` on and of a panel, block by block.
    #[inline(always)]
    fn blocks(&self, first: usize, panel: usize, starts: &'a [[i32; COLUMNS]], next: &'a [Step]) -> Blocks<'a> {
        let spec = self.weights.spec();
        Blocks {
            a: self.x.values_from(0, first),
            stride: self.x.stride(),
            b: self.weights.panel(panel),
            num_steps: spec.block / 4,
            bounded: spec.bounded,
            corrections: self.weights.corrections(panel),
            starts,
            row_scales: &self.x.scales()[first..],
            row_scales_stride: self.x.rows(),
            column_scales: self.weights.scales(panel),
            next,
        }
    }

    /// The bias of a panel's columns.
    #[inline(always)]
    fn bias<S: Simd>(&self, s: S, panel: usize) -> Option<[S::F; 2]> {
        let bias = self.epilogue.bias?;
        let mut of_columns = [0.0; COLUMNS];
        for (column, to) in of_columns.iter_mut().enumerate() {
            *to = self.weights.spec().row_of(panel, column).map_or(0.0, |row| bias[row]);
        }
        let of_columns = of_columns.as_chunks::<LANES>().0;
        Some([s.load(&of_columns[0]), s.load(&of_columns[1])])
    }

    /// Remaining scales, bias, activation, residual. (No closures: they would be compiled without the instruction set.)
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, panel: usize, bias: Option<[S::F; 2]>, first: usize, acc: &[[f32; COLUMNS]]) {
        match self.epilogue.activation {
            Activation::Identity => self.write_rows(s, Identity, panel, bias, first, acc),
            Activation::QuickGelu => self.write_rows(s, QuickGelu, panel, bias, first, acc),
            Activation::Gelu => self.write_rows(s, Gelu, panel, bias, first, acc),
            Activation::GeluTanh => self.write_rows(s, GeluTanh, panel, bias, first, acc),
            Activation::SwiGlu => self.write_rows(s, SwiGlu, panel, bias, first, acc),
        }
    }

    #[inline(always)]
    fn write_rows<S: Simd, A: Activate<S, N>, const N: usize>(
        &self,
        s: S,
        activation: A,
        panel: usize,
        bias: Option<[S::F; 2]>,
        first: usize,
        acc: &[[f32; COLUMNS]],
    ) {
        let spec = self.weights.spec();
        let columns = self.weights.scales(panel)[0].as_chunks::<LANES>().0;
        let columns = [s.load(&columns[0]), s.load(&columns[1])];
        let rows = if spec.block == 0 { Some(&self.x.scales()[first..][..acc.len()]) } else { None };
        let start = panel * N * LANES;
        let width = (N * LANES).min(spec.columns - start);
        for (r, acc) in acc.iter().enumerate() {
            let acc = acc.as_chunks::<LANES>().0;
            let mut v = [s.load(&acc[0]), s.load(&acc[1])];
            if let Some(rows) = rows {
                let row = s.splat(rows[r]);
                v = [s.mul(s.mul(v[0], row), columns[0]), s.mul(s.mul(v[1], row), columns[1])];
            }
            if let Some(bias) = bias {
                v = [s.add(v[0], bias[0]), s.add(v[1], bias[1])];
            }
            let v = activation.apply(s, v);
            let at = (first + r) * spec.columns + start;
            // SAFETY: rows and columns of this task, which no other has.
            let out = unsafe { self.out.part(at, width) };
            let residual = match self.epilogue.residual {
                Residual::Add(residual) => Some(&residual[at..at + width]),
                Residual::None | Residual::InPlace => None,
            };
            if width == N * LANES {
                for i in 0..N {
                    self.write(
                        s,
                        v[i],
                        residual.map(|residual| &residual[i * LANES..][..LANES]),
                        &mut out[i * LANES..][..LANES],
                    );
                }
                continue;
            }
            for (i, out) in out.chunks_mut(LANES).enumerate() {
                self.write(s, v[i], residual.map(|residual| &residual[i * LANES..][..out.len()]), out);
            }
        }
    }

    #[inline(always)]
    fn write<S: Simd>(&self, s: S, v: S::F, residual: Option<&[f32]>, out: &mut [f32]) {
        let v = match (self.epilogue.residual, residual) {
            (Residual::InPlace, _) => s.add(v, s.load_part(out)),
            (_, Some(residual)) => s.add(v, s.load_part(residual)),
            (_, None) => v,
        };
        s.store_part(v, out);
    }
}

/// An activation of a panel's two vectors, which makes N of them. (Not a closure, as everywhere.)
trait Activate<S: Simd, const N: usize>: Copy {
    fn apply(self, s: S, v: [S::F; 2]) -> [S::F; N];
}

#[derive(Clone, Copy)]
struct Identity;

#[derive(Clone, Copy)]
struct QuickGelu;

#[derive(Clone, Copy)]
struct Gelu;

#[derive(Clone, Copy)]
struct GeluTanh;

#[derive(Clone, Copy)]
struct SwiGlu;

impl<S: Simd> Activate<S, 2> for Identity {
    #[inline(always)]
    fn apply(self, _: S, v: [S::F; 2]) -> [S::F; 2] {
        v
    }
}

impl<S: Simd> Activate<S, 2> for QuickGelu {
    #[inline(always)]
    fn apply(self, s: S, v: [S::F; 2]) -> [S::F; 2] {
        [swish(s, v[0], 1.702), swish(s, v[1], 1.702)]
    }
}

impl<S: Simd> Activate<S, 2> for Gelu {
    #[inline(always)]
    fn apply(self, s: S, v: [S::F; 2]) -> [S::F; 2] {
        [gelu(s, v[0]), gelu(s, v[1])]
    }
}

impl<S: Simd> Activate<S, 2> for GeluTanh {
    #[inline(always)]
    fn apply(self, s: S, v: [S::F; 2]) -> [S::F; 2] {
        [gelu_tanh(s, v[0]), gelu_tanh(s, v[1])]
    }
}

impl<S: Simd> Activate<S, 1> for SwiGlu {
    #[inline(always)]
    fn apply(self, s: S, [gate, up]: [S::F; 2]) -> [S::F; 1] {
        [s.mul(swish(s, gate, 1.0), up)]
    }
}
