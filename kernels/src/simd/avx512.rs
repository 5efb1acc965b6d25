//! AVX-512: one register holds the sixteen lanes.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Simd};
use crate::dot::avx512::block_rows;
use crate::dot::{Blocks, COLUMNS, ROWS, Sums, Tile};
use crate::level::Work;

/// The proof that F, BW, DQ, VL and VNNI, with AVX2, FMA and F16C below them, are there.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Runs `work`, compiled with these instructions.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn call<W: Work>(work: W) -> W::Output {
    work.run(Avx512(()))
}

/// Intrinsics in a method of the token.
macro_rules! has {
    ($e:expr) => {
        // SAFETY: an `Avx512` exists only inside `call`, whose caller has the instructions; the pointers passed to loads
        // and stores come from references to arrays of their size.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    #[inline(always)]
    fn tile_rows(rows: usize, _k: usize, blockwise: bool) -> usize {
        if blockwise { block_rows(rows) } else { ROWS }
    }

    #[inline(always)]
    fn sum_blocks(self, rows: usize, blocks: Blocks<'_>, _sums: &mut Sums, acc: &mut [[f32; COLUMNS]; ROWS]) {
        self.sum_of_blocks(rows, &blocks, acc);
    }

    #[inline(always)]
    fn tile_f32(self, rows: usize, tile: Tile<'_>, _sums: &mut Sums, acc: &mut [[f32; COLUMNS]; ROWS]) {
        self.floats(rows, tile, acc);
    }

    type F = __m512;
    type I = __m512i;
    const ACCUMULATORS: usize = 24;

    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        has!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
        has!({
            // Four by four within 128 bits, then the 128 bits of four vectors, then of all.
            let mut v = rows;
            for i in (0..LANES).step_by(4) {
                let low = [_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpacklo_ps(v[i + 2], v[i + 3])];
                let high = [_mm512_unpackhi_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i + 2], v[i + 3])];
                v[i] = _mm512_shuffle_ps::<0x44>(low[0], low[1]);
                v[i + 1] = _mm512_shuffle_ps::<0xee>(low[0], low[1]);
                v[i + 2] = _mm512_shuffle_ps::<0x44>(high[0], high[1]);
                v[i + 3] = _mm512_shuffle_ps::<0xee>(high[0], high[1]);
            }
            // Quarter q of vector 4 i + j is rows 4 i to 4 i + 3 of column 4 q + j.
            let mut columns = v;
            for j in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x88>(v[j], v[4 + j]);
                let high = _mm512_shuffle_f32x4::<0xdd>(v[j], v[4 + j]);
                let further_low = _mm512_shuffle_f32x4::<0x88>(v[8 + j], v[12 + j]);
                let further_high = _mm512_shuffle_f32x4::<0xdd>(v[8 + j], v[12 + j]);
                columns[j] = _mm512_shuffle_f32x4::<0x88>(low, further_low);
                columns[8 + j] = _mm512_shuffle_f32x4::<0xdd>(low, further_low);
                columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(high, further_high);
                columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(high, further_high);
            }
            columns
        })
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        has!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        has!(_mm512_loadu_ps(from.as_ptr()))
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; LANES]) {
        has!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> __m512 {
        has!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }

    #[inline(always)]
    fn store_f16(self, v: __m512, to: &mut [f16; LANES]) {
        has!(_mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        has!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn first(self, n: usize, a: __m512, b: __m512) -> __m512 {
        let mask = if n < LANES { (1u16 << n) - 1 } else { u16::MAX };
        has!(_mm512_mask_blend_ps(mask, b, a))
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        has!(_mm512_set1_epi32(x))
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> __m512i {
        has!(_mm512_loadu_si512(from.as_ptr().cast()))
    }

    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        has!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn max_i32(self, a: __m512i, b: __m512i) -> __m512i {
        has!(_mm512_max_epi32(a, b))
    }

    #[inline(always)]
    fn and_i32(self, a: __m512i, b: __m512i) -> __m512i {
        has!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn shl23(self, a: __m512i) -> __m512i {
        has!(_mm512_slli_epi32::<23>(a))
    }

    #[inline(always)]
    fn store_u8(self, v: __m512i, to: &mut [u8; LANES]) {
        has!(_mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v)));
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512i {
        has!(_mm512_cvtps_epi32(v))
    }

    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        has!(_mm512_cvtepi32_ps(v))
    }

    #[inline(always)]
    fn bits(self, v: __m512) -> __m512i {
        has!(_mm512_castps_si512(v))
    }

    #[inline(always)]
    fn with_bits(self, v: __m512i) -> __m512 {
        has!(_mm512_castsi512_ps(v))
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        has!({
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        has!({
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    fn largest_i32(self, v: __m512i) -> i32 {
        has!(_mm512_reduce_max_epi32(v))
    }
}
