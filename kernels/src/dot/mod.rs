//! The integer product of a tile: up to [`ROWS`] rows of u8 activations with one panel of 32 columns of s8 weights.
//!
//! Exact at every level: sums wrap at 32 bits and no step saturates, so all levels give the same integers.

mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
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

/// The operands of one tile.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// Row `r`'s activations are `a[r * stride..][..4 * b.len()]`.
    pub(crate) a: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) b: &'a [Step],
    /// What the sums start from, by [`Dot::start`].
    pub(crate) init: &'a [i32; COLUMNS],
    /// Weights to fetch meanwhile, since the next tiles need them; not longer than `b`.
    pub(crate) next: &'a [Step],
}

/// What a block's sums are multiplied by.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    Rows(&'a [f32; ROWS]),
    Columns(&'a [f32; COLUMNS]),
    /// The product of the two, rounded.
    Both(&'a [f32; ROWS], &'a [f32; COLUMNS]),
}

/// One instruction set's integer products.
pub(crate) trait Dot {
    /// What the sums over some weights start from: the corrections, which take the activations' offset away, and what this
    /// instruction set's products leave out.
    #[inline(always)]
    fn start(self, _b: &[Step], corrections: [i32; COLUMNS]) -> [i32; COLUMNS]
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
        assert!(
            (1..=ROWS).contains(&rows)
                && (rows - 1) * self.stride + 4 * self.b.len() <= self.a.len()
                && self.next.len() <= self.b.len(),
            "bug: a tile reaches beyond its activations"
        );
    }
}

/// Calls `$f::<N>($arguments)` for the N that equals `$rows`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! with_rows {
    ($rows:expr, $f:ident $arguments:tt, $($n:literal)*) => {
        match $rows {
            // SAFETY: called in a method of the token that proves the instructions; `check` proved the reads.
            $($n => unsafe { with_rows!(@ $f $n $arguments) },)*
            _ => unreachable!("bug: a tile of {} rows", $rows),
        }
    };
    (@ $f:ident $n:literal ($($argument:expr),*)) => { $f::<$n>($($argument),*) };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use with_rows;
