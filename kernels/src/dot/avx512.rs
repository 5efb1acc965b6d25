//! `vpdpbusd` on 512-bit registers: two of them hold a step of a panel.

use std::arch::x86_64::*;

use super::{COLUMNS, Dot, ROWS, Scales, Sums, Tile, with_rows};
use crate::simd::avx512::Avx512;

impl Dot for Avx512 {
    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        with_rows!(rows, |R| product::<R>(tile, sums), 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

impl Avx512 {
    /// [`Simd::add_tile`](crate::simd::Simd::add_tile).
    #[inline(always)]
    pub(crate) fn add_product(self, rows: usize, tile: Tile<'_>, scales: Scales<'_>, acc: &mut [[f32; COLUMNS]; ROWS]) {
        tile.check(rows);
        with_rows!(rows, |R| product_add::<R>(tile, (scales, acc)), 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn product<const R: usize>(tile: Tile<'_>, sums: &mut Sums) {
    // SAFETY: by contract.
    let acc = unsafe { in_registers::<R>(tile) };
    for (acc, sums) in acc.iter().zip(sums) {
        let to: *mut __m512i = sums.as_mut_ptr().cast();
        // SAFETY: a row of sums has 32 i32.
        unsafe {
            _mm512_storeu_si512(to, acc[0]);
            _mm512_storeu_si512(to.add(1), acc[1]);
        }
    }
}

/// As [`product`], scaled and added to floats without a way through memory.
///
/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn product_add<const R: usize>(tile: Tile<'_>, (scales, to): (Scales<'_>, &mut [[f32; COLUMNS]; ROWS])) {
    // SAFETY: by contract.
    let sums = unsafe { in_registers::<R>(tile) };
    let columns = scales.columns;
    // SAFETY: 32 columns.
    let columns = unsafe { [_mm512_loadu_ps(columns.as_ptr()), _mm512_loadu_ps(columns[16..].as_ptr())] };
    for (r, (sums, to)) in sums.iter().zip(to).enumerate() {
        let to = to.as_mut_ptr();
        for i in 0..2 {
            let scale = _mm512_mul_ps(_mm512_set1_ps(scales.rows[r]), columns[i]);
            // SAFETY: a row has 32 f32.
            unsafe {
                let to = to.add(16 * i);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i]), scale, _mm512_loadu_ps(to)));
            }
        }
    }
}

/// # Safety
/// `tile.check(R)` holds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn in_registers<const R: usize>(tile: Tile<'_>) -> [[__m512i; 2]; R] {
    let init: *const __m512i = tile.init.as_ptr().cast();
    // SAFETY: `init` has 32 i32.
    let init = unsafe { [_mm512_loadu_si512(init), _mm512_loadu_si512(init.add(1))] };
    let mut acc = [init; R];
    for (k, b) in tile.b.iter().enumerate() {
        if let Some(next) = tile.next.get(k) {
            _mm_prefetch::<_MM_HINT_T1>(next.as_ptr());
            // SAFETY: inside `next`, 128 bytes long.
            _mm_prefetch::<_MM_HINT_T1>(unsafe { next.as_ptr().add(64) });
        }
        let b: *const __m512i = b.as_ptr().cast();
        // SAFETY: a step has 128 bytes.
        let b = unsafe { [_mm512_loadu_si512(b), _mm512_loadu_si512(b.add(1))] };
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: a row and a step of a checked tile.
            let four = _mm512_set1_epi32(unsafe { tile.four(r, k) });
            acc[0] = _mm512_dpbusd_epi32(acc[0], four, b[0]);
            acc[1] = _mm512_dpbusd_epi32(acc[1], four, b[1]);
        }
    }
    acc
}
