//! y = x W^T: u8 activations, packed s8 weights, exact integer sums, f32 out.
//!
//! For one row and column, with row scale r and column scale c: `(sum * r) * c`. With scales per block along k, the blocks'
//! sums are added in order, `acc = fma(sum, r * c, acc)`. Then bias, activation, residual. An output depends on its row and
//! column alone.

use std::cell::RefCell;

use crate::dot::{COLUMNS, ROWS, Scales, Step, Sums, Tile};
use crate::error::check_len;
use crate::level::Work;
use crate::math::{gelu, gelu_tanh, swish};
use crate::pack::PackedWeights;
use crate::quantize::{EIGHT, Quantized};
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
        let num_tiles = rows.len().div_ceil(ROWS);
        let blockwise = spec.block > 0;
        let mut sums = [[0; COLUMNS]; ROWS];
        let mut acc = [[0.0; COLUMNS]; ROWS];
        let mut starts = STARTS.take();
        for panel in panels.clone() {
            let (steps, corrections) = (weights.panel(panel), weights.corrections(panel));
            starts.clear();
            if blockwise {
                for (steps, &corrections) in steps.chunks(spec.block / 4).zip(corrections) {
                    starts.push(s.start(steps, spec.bounded, corrections));
                }
            } else {
                starts.push(s.start(steps, spec.bounded, corrections[0]));
            }
            let next: &[_] = if panel + 1 < panels.end { weights.panel(panel + 1) } else { &[] };
            let bias = product.bias(s, panel);
            for tile in 0..num_tiles {
                let part = part_of(rows.len(), num_tiles, tile);
                let (first, count) = (rows.start + part.start, part.len());
                let next = &next[part_of(next.len(), num_tiles, tile)];
                if blockwise {
                    product.add_blocks(s, panel, &starts, first, count, next, &mut sums, &mut acc);
                } else {
                    s.tile(count, product.tile(first, 0, steps, &starts[0], next), &mut sums);
                    for (acc, sums) in acc.iter_mut().zip(&sums).take(count) {
                        for (acc, sums) in acc.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0) {
                            s.store(s.to_f32(s.load_i32(sums)), acc);
                        }
                    }
                }
                product.finish(s, panel, bias, first, &acc[..count]);
            }
        }
        STARTS.set(starts);
    }
}

impl<'a> Product<'a> {
    /// The operands of rows from `first` on and of the weights `b`, which begin with block `block`.
    #[inline(always)]
    fn tile(&self, first: usize, block: usize, b: &'a [Step], init: &'a [i32; COLUMNS], next: &'a [Step]) -> Tile<'a> {
        let spec = self.weights.spec();
        let a = self.x.values_from(block * spec.block / EIGHT, first);
        Tile { a, stride: self.x.stride(), b, bounded: spec.bounded, init, next }
    }

    /// The scaled sum of the blocks.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "the tile's place and its scratch")]
    fn add_blocks<S: Simd>(
        &self,
        s: S,
        panel: usize,
        starts: &[[i32; COLUMNS]],
        first: usize,
        count: usize,
        next: &[Step],
        sums: &mut Sums,
        acc: &mut [[f32; COLUMNS]; ROWS],
    ) {
        let (x, spec) = (self.x, self.weights.spec());
        let steps = self.weights.panel(panel).chunks(spec.block / 4);
        let num_blocks = spec.num_blocks();
        acc[..count].fill([0.0; COLUMNS]);
        for ((b, steps), init) in steps.enumerate().zip(starts) {
            let next = &next[part_of(next.len(), num_blocks, b)];
            let next = &next[..next.len().min(steps.len())];
            let mut rows = [0.0; ROWS];
            for (r, scale) in rows.iter_mut().enumerate().take(count) {
                *scale = x.scales()[(first + r) * num_blocks + b];
            }
            let scales = Scales { rows: &rows, columns: &self.weights.scales(panel)[b] };
            s.add_tile(count, self.tile(first, b, steps, init, next), scales, sums, acc);
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
        let spec = self.weights.spec();
        let columns = &self.weights.scales(panel)[0];
        let columns = columns.as_chunks::<LANES>().0;
        let columns = [s.load(&columns[0]), s.load(&columns[1])];
        for (r, acc) in acc.iter().enumerate() {
            let row = if spec.block == 0 { Some(s.splat(self.x.scales()[first + r])) } else { None };
            let acc = acc.as_chunks::<LANES>().0;
            let mut v = [s.load(&acc[0]), s.load(&acc[1])];
            for i in 0..2 {
                if let Some(row) = row {
                    v[i] = s.mul(s.mul(v[i], row), columns[i]);
                }
                if let Some(bias) = bias {
                    v[i] = s.add(v[i], bias[i]);
                }
            }
            let start = panel * spec.panel_columns();
            let at = (first + r) * spec.columns + start;
            let width = spec.panel_columns().min(spec.columns - start);
            if spec.gated {
                self.write(s, at, width, s.mul(swish(s, v[0], 1.0), v[1]));
                continue;
            }
            match self.epilogue.activation {
                Activation::Identity | Activation::SwiGlu => {}
                Activation::QuickGelu => v = [swish(s, v[0], 1.702), swish(s, v[1], 1.702)],
                Activation::Gelu => v = [gelu(s, v[0]), gelu(s, v[1])],
                Activation::GeluTanh => v = [gelu_tanh(s, v[0]), gelu_tanh(s, v[1])],
            }
            self.write(s, at, width.min(LANES), v[0]);
            if width > LANES {
                self.write(s, at + LANES, width - LANES, v[1]);
            }
        }
    }

    #[inline(always)]
    fn write<S: Simd>(&self, s: S, at: usize, width: usize, v: S::F) {
        // SAFETY: rows and columns of this task, which no other has.
        let out = unsafe { self.out.part(at, width) };
        let v = match self.epilogue.residual {
            Residual::None => v,
            Residual::Add(residual) => s.add(v, s.load_part(&residual[at..at + width])),
            Residual::InPlace => s.add(v, s.load_part(out)),
        };
        s.store_part(v, out);
    }
}
