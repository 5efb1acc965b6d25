//! AVX2, with and without VNNI.
//!
//! Without it, bytes are widened to 16 bits and multiplied with `vpmaddwd`, whose sums of two products cannot overflow;
//! `vpmaddubsw` would saturate.

use std::arch::x86_64::*;

use super::{COLUMNS, Dot, Step, Sums, Tile, with_rows};
use crate::simd::avx2::Avx2;

/// Rows at a time: 3 x 4 accumulators of 8 lanes leave four registers for operands.
const ROWS: usize = 3;

impl<const VNNI: bool> Dot for Avx2<VNNI> {
    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        for first in (0..rows).step_by(ROWS) {
            let tile = Tile { a: &tile.a[first * tile.stride..], ..tile };
            let (rows, sums) = (ROWS.min(rows - first), &mut sums[first..]);
            if VNNI {
                with_rows!(rows, product_vnni(tile, sums), 1 2 3);
            } else {
                with_rows!(rows, product(tile, sums), 1 2 3);
            }
        }
    }
}

/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx2")]
unsafe fn product<const R: usize>(tile: Tile<'_>, sums: &mut [[i32; COLUMNS]]) {
    for half in 0..2 {
        // acc[r][j]: columns 4 j to 4 j + 3 of the half, each as two partial sums.
        let mut acc = [[_mm256_setzero_si256(); 4]; R];
        for (k, b) in tile.b.iter().enumerate() {
            let b: *const __m128i = b[64 * half..].as_ptr().cast();
            // SAFETY: half a step has 64 bytes.
            let b = unsafe { [0, 1, 2, 3].map(|j| _mm_loadu_si128(b.add(j))) }.map(|b| _mm256_cvtepi8_epi16(b));
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: step k of row r, inside `tile.a` by `check`.
                let four = unsafe { tile.a.as_ptr().add(r * tile.stride + 4 * k).cast::<i32>().read_unaligned() };
                let four = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
                for j in 0..4 {
                    acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(four, b[j]));
                }
            }
        }
        for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
            for j in 0..2 {
                let sum = _mm256_hadd_epi32(acc[2 * j], acc[2 * j + 1]);
                let sum = _mm256_permute4x64_epi64::<0b11_01_10_00>(sum);
                let at = 16 * half + 8 * j;
                let init: *const __m256i = tile.init[at..at + 8].as_ptr().cast();
                let to: *mut __m256i = sums[at..at + 8].as_mut_ptr().cast();
                // SAFETY: both slices have 8 i32.
                unsafe { _mm256_storeu_si256(to, _mm256_add_epi32(sum, _mm256_loadu_si256(init))) };
            }
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
        let tile = Tile { a: &a, stride: 52, b: &b, init: &init, next: &[] };
        let (mut want, mut got) = ([[0; COLUMNS]; 12], [[0; COLUMNS]; 12]);
        Portable.tile(3, tile, &mut want);
        tile.check(3);
        // SAFETY: the features were detected and the tile checked.
        unsafe { product_evex::<3>(tile, &mut got) };
        assert_eq!(want, got);
    }
}
