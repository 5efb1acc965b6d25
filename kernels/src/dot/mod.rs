//! The integer product of a tile: up to [`ROWS`] rows of u8 activations with one panel of 32 columns of s8 weights.
//!
//! Exact at every level: sums wrap at 32 bits and no step saturates, so all levels give the same integers.

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod pairs;

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
    /// What the sums start from: takes the activations' offset away.
    pub(crate) init: &'a [i32; COLUMNS],
    /// Weights to fetch meanwhile, since the next tiles need them; not longer than `b`.
    pub(crate) next: &'a [Step],
    /// The same weights made ready, where they are.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other instruction set has a form of its own")
    )]
    pub(crate) prepared: Option<Chunks<'a>>,
}

/// What a block's sums are multiplied by.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    Rows(&'a [f32; ROWS]),
    Columns(&'a [f32; COLUMNS]),
    /// The product of the two, rounded.
    Both(&'a [f32; ROWS], &'a [f32; COLUMNS]),
}

/// A panel in the form that an instruction set multiplies fastest.
#[cfg(target_arch = "x86_64")]
pub(crate) use pairs::{Chunks, Prepared};

/// No instruction set here has a form of its own.
#[cfg(not(target_arch = "x86_64"))]
mod unprepared {
    #[derive(Debug, Default)]
    pub(crate) struct Prepared(());

    impl Prepared {
        pub(crate) fn block(&self, _: usize) -> Chunks<'_> {
            Chunks(self)
        }
    }

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Chunks<'a>(#[expect(dead_code, reason = "stands for a block")] &'a Prepared);
}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use unprepared::{Chunks, Prepared};

/// One instruction set's integer products.
pub(crate) trait Dot {
    /// Rows of a task from which on it pays to make its panels ready.
    const PREPARED_ROWS: usize = usize::MAX;

    /// Makes a panel ready whose blocks have `steps_of_block` steps.
    #[inline(always)]
    fn prepare(self, _panel: &[Step], _steps_of_block: usize, _to: &mut Prepared)
    where
        Self: Sized,
    {
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
