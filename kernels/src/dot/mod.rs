//! The integer product of a tile: up to [`ROWS`] rows of u8 activations with one panel of 32 columns of s8 weights.
//!
//! Exact at every level: sums wrap at 32 bits and no step saturates, so all levels give the same integers.

use crate::quantize::EIGHT;

mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

/// Most rows of a tile: 12 x 2 accumulators of 16 lanes, two weights and an activation fit in 32 registers.
pub(crate) const ROWS: usize = 12;

/// Columns of a panel.
pub(crate) const COLUMNS: usize = 32;

/// Four successive k of each of a panel's columns.
pub(crate) type Step = [i8; 4 * COLUMNS];

/// Sums of one tile.
pub(crate) type Sums = [[i32; COLUMNS]; ROWS];

/// At the beginning of a cache line: vectors that reach from one line into the next take twice the time.
#[repr(C, align(64))]
pub(crate) struct Aligned<T>(pub(crate) T);

/// The operands of one tile.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// Row `r`'s activations of steps 2 `i` and 2 `i` + 1 are `a[i * stride + 8 * r..][..8]`.
    pub(crate) a: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) b: &'a [Step],
    /// Whether the weights are ([`PackSpec::bounded`](crate::PackSpec)).
    pub(crate) bounded: bool,
    /// What takes the activations' offset away.
    pub(crate) corrections: &'a [i32; COLUMNS],
    /// What the sums start from, by [`Dot::start`].
    pub(crate) init: &'a [i32; COLUMNS],
    /// Weights to fetch meanwhile, since they are needed next; not longer than `b`.
    pub(crate) next: &'a [Step],
}

/// What a block's sums are multiplied by: the rounded product of a row's and a column's.
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    pub(crate) rows: &'a [f32; ROWS],
    pub(crate) columns: &'a [f32; COLUMNS],
}

/// The operands of one tile whose sums are scaled block by block along k.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    /// As [`Tile::a`], of all blocks.
    pub(crate) a: &'a [u8],
    pub(crate) stride: usize,
    /// The whole panel.
    pub(crate) b: &'a [Step],
    /// Of each block but the last, which may have fewer. Even.
    pub(crate) num_steps: usize,
    pub(crate) bounded: bool,
    /// `[blocks]`: as [`Tile::corrections`].
    pub(crate) corrections: &'a [[i32; COLUMNS]],
    /// `[blocks]`: as [`Tile::init`].
    pub(crate) starts: &'a [[i32; COLUMNS]],
    /// Those of block `b` from `b * row_scales_stride` on.
    pub(crate) row_scales: &'a [f32],
    pub(crate) row_scales_stride: usize,
    /// `[blocks]`
    pub(crate) column_scales: &'a [[f32; COLUMNS]],
    /// As [`Tile::next`].
    pub(crate) next: &'a [Step],
}

impl<'a> Blocks<'a> {
    /// The blocks, one after the other.
    pub(crate) fn tiles(self) -> impl Iterator<Item = (usize, Tile<'a>)> {
        let Self { a, stride, b, num_steps, bounded, corrections, starts, next, .. } = self;
        let starts = corrections.iter().zip(starts);
        b.chunks(num_steps).zip(starts).enumerate().map(move |(block, (b, (corrections, init)))| {
            let next = next.get(block * num_steps..).unwrap_or(&[]);
            let next = &next[..next.len().min(b.len())];
            (block, Tile { a: &a[block * num_steps / 2 * stride..], stride, b, bounded, corrections, init, next })
        })
    }

    /// What the kernels' unchecked reads rely on.
    fn check(&self, rows: usize) {
        let last = self.b.len().div_ceil(2).saturating_sub(1);
        let num_blocks = self.b.len().div_ceil(self.num_steps);
        assert!(
            (1..=ROWS).contains(&rows)
                && last * self.stride + EIGHT * rows <= self.a.len()
                && self.num_steps.is_multiple_of(2)
                && num_blocks.saturating_sub(1) * self.row_scales_stride + rows <= self.row_scales.len()
                && (self.starts.len(), self.corrections.len()) == (num_blocks, num_blocks)
                && self.column_scales.len() == num_blocks,
            "bug: a tile reaches beyond its activations"
        );
    }

    /// The factors of the first `rows` rows' sums over `block`, zeros behind them.
    pub(crate) fn row_scales(&self, rows: usize, block: usize) -> [f32; ROWS] {
        let mut scales = [0.0; ROWS];
        scales[..rows].copy_from_slice(&self.row_scales[block * self.row_scales_stride..][..rows]);
        scales
    }
}

/// One instruction set's integer products.
pub(crate) trait Dot {
    /// What the sums over some weights start from: the corrections, which take the activations' offset away, and what this
    /// instruction set's products leave out. `zero_point`: the offset, where it is known.
    #[inline(always)]
    fn start(self, _b: &[Step], _bounded: bool, corrections: [i32; COLUMNS], _zero_point: Option<u8>) -> [i32; COLUMNS]
    where
        Self: Sized,
    {
        corrections
    }

    /// Fills the first `rows` (1 to [`ROWS`]) rows of `sums`.
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums);
}

impl Tile<'_> {
    /// What the kernels' unchecked reads rely on.
    fn check(&self, rows: usize) {
        let last = self.b.len().div_ceil(2).saturating_sub(1);
        assert!(
            (1..=ROWS).contains(&rows)
                && last * self.stride + EIGHT * rows <= self.a.len()
                && self.next.len() <= self.b.len(),
            "bug: a tile reaches beyond its activations"
        );
    }

    /// The four activations of row `r` for step `k`.
    ///
    /// # Safety
    /// A checked tile's row and step.
    #[inline(always)]
    unsafe fn four(&self, r: usize, k: usize) -> i32 {
        let at = k / 2 * self.stride + EIGHT * r + k % 2 * 4;
        // SAFETY: by contract; `check` knows of eight for each row.
        unsafe { self.a.as_ptr().add(at).cast::<i32>().read_unaligned() }
    }

    /// Without the first rows.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn skip_rows(self, first: usize) -> Self {
        Self { a: &self.a[EIGHT * first..], ..self }
    }
}

/// `$call` with the constant `$n` for the one of the literals that equals `$rows`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! with_rows {
    ($rows:expr, |$n:ident| $call:expr, $($literal:literal)*) => {
        match $rows {
            $($literal => {
                const $n: usize = $literal;
                // SAFETY: called in a method of the token that proves the instructions; `check` proved the reads.
                unsafe { $call }
            })*
            _ => unreachable!("bug: a tile of {} rows", $rows),
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use with_rows;
