//! AVX2 with FMA and F16C: two registers hold the sixteen lanes.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Simd, add_sums};
use crate::dot::avx2::{CHUNK, STEPS_AHEAD, tile_rows};
use crate::dot::{COLUMNS, ROWS, Scales, Sums, Tile};
use crate::level::Work;

/// The proof that AVX2, FMA and F16C are there; with `VNNI`, AVX-VNNI too.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(());

/// Runs `work`, compiled with these instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn call<W: Work>(work: W) -> W::Output {
    work.run(Avx2::<false>(()))
}

/// Runs `work`, compiled with these instructions and AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(crate) fn call_vnni<W: Work>(work: W) -> W::Output {
    work.run(Avx2::<true>(()))
}

/// Intrinsics in a method of the token.
macro_rules! has {
    ($e:expr) => {
        // SAFETY: an `Avx2` exists only inside `call` and `call_vnni`, whose callers have the instructions; the pointers
        // passed to loads and stores come from references to arrays of at least their size.
        unsafe { $e }
    };
}

/// Lanes 0 to 7 and 8 to 15.
type F = [__m256; 2];
type I = [__m256i; 2];

/// The bits of `_mm256_cvtps_ph`'s rounding: to nearest even.
const TO_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    const STEPS_AHEAD: usize = STEPS_AHEAD;

    #[inline(always)]
    fn tile_rows(rows: usize, k: usize, _blockwise: bool) -> usize {
        if VNNI { ROWS } else { tile_rows(rows, k) }
    }

    #[inline(always)]
    fn add_tile(
        self,
        rows: usize,
        tile: Tile<'_>,
        scales: Scales<'_>,
        sums: &mut Sums,
        acc: &mut [[f32; COLUMNS]; ROWS],
    ) {
        if !VNNI && tile.b.len() <= CHUNK {
            return Avx2::<false>(()).add_product(rows, tile, scales, acc);
        }
        add_sums(self, rows, tile, scales, sums, acc);
    }

    type F = F;
    type I = I;
    const ACCUMULATORS: usize = 6;

    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        has!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        has!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> F {
        has!([_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))])
    }

    #[inline(always)]
    fn store(self, v: F, to: &mut [f32; LANES]) {
        has!({
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        });
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> F {
        let from: *const __m128i = from.as_ptr().cast();
        has!([_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))])
    }

    #[inline(always)]
    fn store_f16(self, v: F, to: &mut [f16; LANES]) {
        let to: *mut __m128i = to.as_mut_ptr().cast();
        has!({
            _mm_storeu_si128(to, _mm256_cvtps_ph::<TO_NEAREST>(v[0]));
            _mm_storeu_si128(to.add(1), _mm256_cvtps_ph::<TO_NEAREST>(v[1]));
        });
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        has!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        has!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        has!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        has!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        has!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        has!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        has!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn first(self, n: usize, a: F, b: F) -> F {
        has!({
            let n = _mm256_set1_epi32(n.min(LANES) as i32);
            let low = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            [
                _mm256_blendv_ps(b[0], a[0], _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(b[1], a[1], _mm256_castsi256_ps(high)),
            ]
        })
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> I {
        has!([_mm256_set1_epi32(x); 2])
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> I {
        let from: *const __m256i = from.as_ptr().cast();
        has!([_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))])
    }

    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        has!([_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn max_i32(self, a: I, b: I) -> I {
        has!([_mm256_max_epi32(a[0], b[0]), _mm256_max_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn and_i32(self, a: I, b: I) -> I {
        has!([_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])])
    }

    #[inline(always)]
    fn shl23(self, a: I) -> I {
        has!([_mm256_slli_epi32::<23>(a[0]), _mm256_slli_epi32::<23>(a[1])])
    }

    #[inline(always)]
    fn store_u8(self, v: I, to: &mut [u8; LANES]) {
        has!({
            let low = _mm256_set1_epi32(0xff);
            let pairs = _mm256_packus_epi32(_mm256_and_si256(v[0], low), _mm256_and_si256(v[1], low));
            let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        });
    }

    #[inline(always)]
    fn round(self, v: F) -> I {
        has!([_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])])
    }

    #[inline(always)]
    fn to_f32(self, v: I) -> F {
        has!([_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])])
    }

    #[inline(always)]
    fn bits(self, v: F) -> I {
        has!([_mm256_castps_si256(v[0]), _mm256_castps_si256(v[1])])
    }

    #[inline(always)]
    fn with_bits(self, v: I) -> F {
        has!([_mm256_castsi256_ps(v[0]), _mm256_castsi256_ps(v[1])])
    }

    #[inline(always)]
    fn sum(self, v: F) -> f32 {
        has!({
            let v = _mm256_add_ps(v[0], v[1]);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    fn largest(self, v: F) -> f32 {
        has!({
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    fn largest_i32(self, v: I) -> i32 {
        let mut lanes = [0; LANES];
        let to: *mut __m256i = lanes.as_mut_ptr().cast();
        has!({
            _mm256_storeu_si256(to, v[0]);
            _mm256_storeu_si256(to.add(1), v[1]);
        });
        lanes.into_iter().fold(i32::MIN, i32::max)
    }
}
