//! Sixteen lanes of f32 or i32 on every processor.
//!
//! The operations are IEEE 754 ones (add, multiply, fused multiply-add, divide, conversions that round to even) or defined
//! bit for bit (`max` and `min` as x86 has them, sums over lanes in one fixed tree), so code that is generic over
//! [`Simd`] gives the same bits at every level. A value of an implementing type is the proof that its instructions exist.

use half::f16;

mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

pub(crate) use portable::Portable;

use crate::dot::{Blocks, COLUMNS, Dot, ROWS, Scales, Sums, Tile};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// One instruction set's vectors of sixteen lanes.
pub(crate) trait Simd: Copy + Send + Sync + Dot {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// Vectors of accumulators that fit in registers beside operands.
    const ACCUMULATORS: usize;

    /// How far ahead of the weights it reads a lone tile fetches others, in steps; at most a panel.
    const STEPS_AHEAD: usize = usize::MAX;

    /// Rows of a tile that products over `k` are fastest with, where there are `rows`; `blockwise`: of [`Self::sum_blocks`].
    #[inline(always)]
    fn tile_rows(_rows: usize, _k: usize, _blockwise: bool) -> usize {
        ROWS
    }

    /// A hint that the cache line at `address`, which may be any, is going to be read.
    #[inline(always)]
    fn prefetch<T>(self, _address: *const T) {}

    /// Sixteen rows as sixteen columns.
    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut lanes = [[0.0; LANES]; LANES];
        for (i, row) in rows.into_iter().enumerate() {
            let mut of_row = [0.0; LANES];
            self.store(row, &mut of_row);
            lanes.iter_mut().zip(of_row).for_each(|(column, x)| column[i] = x);
        }
        let mut columns = rows;
        for (column, lanes) in columns.iter_mut().zip(&lanes) {
            *column = self.load(lanes);
        }
        columns
    }

    fn splat(self, x: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, to: &mut [f32; LANES]);
    fn load_f16(self, from: &[f16; LANES]) -> Self::F;
    /// Rounds to nearest even.
    fn store_f16(self, v: Self::F, to: &mut [f16; LANES]);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lanes below `n` of `a`, the others of `b`.
    fn first(self, n: usize, a: Self::F, b: Self::F) -> Self::F;

    fn splat_i32(self, x: i32) -> Self::I;
    fn load_i32(self, from: &[i32; LANES]) -> Self::I;
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn max_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn and_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Each lane shifted left by 23 bits: into an f32's exponent.
    fn shl23(self, a: Self::I) -> Self::I;
    /// The low byte of each lane.
    fn store_u8(self, v: Self::I, to: &mut [u8; LANES]);

    /// Nearest integer, ties to even. NaN gives a number whose low 9 bits are zero; beyond i32 it is unspecified.
    fn round(self, v: Self::F) -> Self::I;
    fn to_f32(self, v: Self::I) -> Self::F;
    fn bits(self, v: Self::F) -> Self::I;
    fn with_bits(self, v: Self::I) -> Self::F;

    /// Lanes added in a tree: i with i + 8, then + 4, + 2, + 1.
    fn sum(self, v: Self::F) -> f32;
    /// The largest lane by [`Self::max`], in the same tree.
    fn largest(self, v: Self::F) -> f32;
    /// The largest lane.
    fn largest_i32(self, v: Self::I) -> i32;

    /// `acc = fma(sum, scale, acc)` for the first `rows` rows, with a tile's sums. `sums` is scratch.
    #[inline(always)]
    fn add_tile(
        self,
        rows: usize,
        tile: Tile<'_>,
        scales: Scales<'_>,
        sums: &mut Sums,
        acc: &mut [[f32; COLUMNS]; ROWS],
    ) {
        add_sums(self, rows, tile, scales, sums, acc);
    }

    /// The sums of a tile as floats, in the first `rows` rows of `acc`. `sums` is scratch.
    #[inline(always)]
    fn tile_f32(self, rows: usize, tile: Tile<'_>, sums: &mut Sums, acc: &mut [[f32; COLUMNS]; ROWS]) {
        self.tile(rows, tile, sums);
        for (acc, sums) in acc.iter_mut().zip(&*sums).take(rows) {
            for (acc, sums) in acc.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0) {
                self.store(self.to_f32(self.load_i32(sums)), acc);
            }
        }
    }

    /// The scaled sums of a tile's blocks in the first `rows` rows of `acc`: from zero on, block after block, as
    /// [`Self::add_tile`]. `sums` is scratch.
    #[inline(always)]
    fn sum_blocks(self, rows: usize, blocks: Blocks<'_>, sums: &mut Sums, acc: &mut [[f32; COLUMNS]; ROWS]) {
        acc[..rows].fill([0.0; COLUMNS]);
        for (block, tile) in blocks.tiles() {
            let of_rows = blocks.row_scales(rows, block);
            let scales = Scales { rows: &of_rows, columns: &blocks.column_scales[block] };
            self.add_tile(rows, tile, scales, sums, acc);
        }
    }

    /// The first `from.len()` lanes (at most 16), zero in the others.
    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Self::F {
        if let Ok(all) = from.try_into() {
            return self.load(all);
        }
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first `to.len()` lanes (at most 16).
    #[inline(always)]
    fn store_part(self, v: Self::F, to: &mut [f32]) {
        if let Ok(all) = <&mut [f32; LANES]>::try_from(&mut *to) {
            return self.store(v, all);
        }
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }
}

/// [`Simd::add_tile`] by way of the sums.
#[inline(always)]
pub(crate) fn add_sums<S: Simd>(
    s: S,
    rows: usize,
    tile: Tile<'_>,
    scales: Scales<'_>,
    sums: &mut Sums,
    acc: &mut [[f32; COLUMNS]; ROWS],
) {
    s.tile(rows, tile, sums);
    for (r, (acc, sums)) in acc.iter_mut().zip(&*sums).enumerate().take(rows) {
        let (acc, sums) = (acc.as_chunks_mut::<LANES>().0, sums.as_chunks::<LANES>().0);
        for (i, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
            let scale = s.mul(s.splat(scales.rows[r]), s.load(&scales.columns.as_chunks().0[i]));
            s.store(s.fma(s.to_f32(s.load_i32(sums)), scale, s.load(acc)), acc);
        }
    }
}
