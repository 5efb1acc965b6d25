//! AVX2, with and without VNNI.
//!
//! Without it, panels are made ready for `vpmaddubsw` (see [`super::pairs`]). Where rows are so few that this does not pay,
//! bytes are widened to 16 bits and multiplied with `vpmaddwd`, whose sums of two products cannot overflow.

use std::arch::x86_64::*;

use super::{COLUMNS, Dot, Prepared, Step, Sums, Tile, pairs, with_rows};
use crate::simd::avx2::Avx2;

/// Rows at a time with VNNI: 3 x 4 accumulators of 8 lanes leave four registers for operands.
const VNNI_ROWS: usize = 3;

/// Rows at a time of widened bytes: few, or they would not be multiplied in this way.
const WIDE_ROWS: usize = 3;

/// Steps for which activations are widened at a time.
const WIDE_STEPS: usize = 64;

impl<const VNNI: bool> Dot for Avx2<VNNI> {
    const PREPARED_ROWS: usize = if VNNI { usize::MAX } else { WIDE_ROWS + 1 };

    #[inline(always)]
    fn prepare(self, panel: &[Step], steps_of_block: usize, to: &mut Prepared) {
        // SAFETY: the token proves the instructions.
        unsafe { to.fill(panel, steps_of_block) };
    }

    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        if !VNNI {
            match tile.prepared {
                // SAFETY: the token proves the instructions, `check` the reads.
                Some(block) => unsafe { pairs::product(rows, tile, block, sums) },
                // SAFETY: the same.
                None => unsafe { product(rows, tile, sums) },
            }
            return;
        }
        for first in (0..rows).step_by(VNNI_ROWS) {
            let tile = Tile { a: &tile.a[first * tile.stride..], ..tile };
            let (rows, sums) = (VNNI_ROWS.min(rows - first), &mut sums[first..]);
            with_rows!(rows, product_vnni(tile, sums), 1 2 3);
        }
    }
}

/// A step of activations, of 16 bits each.
type Wide = [u16; 4];

/// Widens the activations of some rows and steps once for all columns, and multiplies.
///
/// # Safety
/// `tile.check(rows)` holds.
#[target_feature(enable = "avx2")]
unsafe fn product(rows: usize, tile: Tile<'_>, sums: &mut Sums) {
    let mut wide = [[[0; 4]; WIDE_STEPS]; WIDE_ROWS];
    sums[..rows].fill(*tile.init);
    for first in (0..rows).step_by(WIDE_ROWS) {
        let rows = WIDE_ROWS.min(rows - first);
        for (chunk, b) in tile.b.chunks(WIDE_STEPS).enumerate() {
            for (r, wide) in wide.iter_mut().enumerate().take(rows) {
                let a = &tile.a[(first + r) * tile.stride + chunk * 4 * WIDE_STEPS..][..4 * b.len()];
                let wide = wide.as_flattened_mut();
                let (whole, tail) = a.as_chunks::<16>();
                for (a, wide) in whole.iter().zip(wide.as_chunks_mut::<16>().0) {
                    // SAFETY: both have 16 elements.
                    unsafe {
                        let a = _mm_loadu_si128(a.as_ptr().cast());
                        _mm256_storeu_si256(wide.as_mut_ptr().cast(), _mm256_cvtepu8_epi16(a));
                    }
                }
                wide[16 * whole.len()..].iter_mut().zip(tail).for_each(|(wide, &a)| *wide = a.into());
            }
            let sums = &mut sums[first..];
            with_rows!(rows, product_of_wide(&wide, b, sums), 1 2 3);
        }
    }
}

/// Adds the products of R rows with some steps of all columns to their sums.
///
/// # Safety
/// There are R rows of activations and sums.
#[target_feature(enable = "avx2")]
unsafe fn product_of_wide<const R: usize>(a: &[[Wide; WIDE_STEPS]], b: &[Step], sums: &mut [[i32; COLUMNS]]) {
    let a: &[[Wide; WIDE_STEPS]; R] = a[..R].try_into().expect("bug: a slice of its length");
    for eight in 0..COLUMNS / 8 {
        // acc[r][j]: columns 4 j to 4 j + 3 of the eight, each as two partial sums.
        let mut acc = [[_mm256_setzero_si256(); 2]; R];
        for (k, b) in b.iter().enumerate().take(WIDE_STEPS) {
            let b: *const __m128i = b[32 * eight..].as_ptr().cast();
            // SAFETY: a quarter of a step has 32 bytes.
            let b = unsafe { [_mm_loadu_si128(b), _mm_loadu_si128(b.add(1))] }.map(|b| _mm256_cvtepi8_epi16(b));
            for (a, acc) in a.iter().zip(&mut acc) {
                // SAFETY: k is below WIDE_STEPS.
                let four = unsafe { a.as_ptr().add(k).cast::<i64>().read_unaligned() };
                let four = _mm256_set1_epi64x(four);
                acc[0] = _mm256_add_epi32(acc[0], _mm256_madd_epi16(four, b[0]));
                acc[1] = _mm256_add_epi32(acc[1], _mm256_madd_epi16(four, b[1]));
            }
        }
        for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
            let sum = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(acc[0], acc[1]));
            let to: *mut __m256i = sums[8 * eight..][..8].as_mut_ptr().cast();
            // SAFETY: eight i32.
            unsafe { _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sum)) };
        }
    }
}

/// The products with one of the two encodings of 256-bit `vpdpbusd`: AVX-VNNI's, and AVX-512's for processors that have no
/// other, where it stands in for the first in tests.
macro_rules! vnni {
    ($name:ident, $features:literal, $dot:ident) => {
        /// # Safety
        /// `tile.check(R)` holds.
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize>(tile: Tile<'_>, sums: &mut [[i32; COLUMNS]]) {
            let init: *const __m256i = tile.init.as_ptr().cast();
            // SAFETY: `init` has 32 i32.
            let init = unsafe { [0, 1, 2, 3].map(|j| _mm256_loadu_si256(init.add(j))) };
            let mut acc = [init; R];
            for (k, b) in tile.b.iter().enumerate() {
                let b: &Step = b;
                let b: *const __m256i = b.as_ptr().cast();
                let mut fours = [_mm256_setzero_si256(); R];
                for (r, four) in fours.iter_mut().enumerate() {
                    let a = tile.a.as_ptr();
                    // SAFETY: step k of row r, inside `tile.a` by `check`.
                    *four = _mm256_set1_epi32(unsafe { a.add(r * tile.stride + 4 * k).cast::<i32>().read_unaligned() });
                }
                for j in 0..4 {
                    // SAFETY: a step has 128 bytes.
                    let b = unsafe { _mm256_loadu_si256(b.add(j)) };
                    for r in 0..R {
                        acc[r][j] = $dot(acc[r][j], fours[r], b);
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                let to: *mut __m256i = sums.as_mut_ptr().cast();
                for (j, &acc) in acc.iter().enumerate() {
                    // SAFETY: a row of sums has 32 i32.
                    unsafe { _mm256_storeu_si256(to.add(j), acc) };
                }
            }
        }
    };
}

vnni!(product_vnni, "avx2,avxvnni", _mm256_dpbusd_avx_epi32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Portable;

    vnni!(product_evex, "avx2,avx512vl,avx512vnni", _mm256_dpbusd_epi32);

    #[test]
    #[cfg_attr(miri, ignore = "needs the instructions")]
    fn the_256_bit_vnni_product_equals_the_portable_one() {
        if !is_x86_feature_detected!("avx512vl") || !is_x86_feature_detected!("avx512vnni") {
            return;
        }
        let a: Vec<u8> = (0..3 * 52).map(|i| (i * 89 % 256) as u8).collect();
        let b: Vec<Step> = (0..13).map(|k| std::array::from_fn(|i| (k * 31 + i * 57) as u8 as i8)).collect();
        let init = std::array::from_fn(|i| i as i32 - 9);
        let tile = Tile { a: &a, stride: 52, b: &b, init: &init, next: &[], prepared: None };
        let (mut want, mut got) = ([[0; COLUMNS]; 12], [[0; COLUMNS]; 12]);
        Portable.tile(3, tile, &mut want);
        tile.check(3);
        // SAFETY: the features were detected and the tile checked.
        unsafe { product_evex::<3>(tile, &mut got) };
        assert_eq!(want, got);
    }
}
