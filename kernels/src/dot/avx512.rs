//! `vpdpbusd` on 512-bit registers: two of them hold a step of a panel.

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;

use super::{Blocks, COLUMNS, Dot, ROWS, Step, Sums, Tile, with_rows};
use crate::quantize::{EIGHT, LINE};
use crate::simd::avx512::Avx512;

impl Dot for Avx512 {
    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        with_rows!(rows, |R| product::<R>(tile, sums), 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// Rows whose scaled sums stay in registers: 6 x 2 sums of a block and 6 x 2 of all leave eight for operands.
const ROWS_IN_REGISTERS: usize = 6;

/// Rows of a tile whose sums are scaled by blocks. Where weights come from memory and few rows wait for them, many: each reading
/// has more products to hide behind. Where the products are what takes the time, those that stay in registers: a store of 64
/// bytes takes two cycles. Measured with 1 to 912 rows on a Zen 5: 8 of 8 rows are half as fast again as 4 and 4.
pub(crate) fn block_rows(rows: usize) -> usize {
    match rows {
        ..=ROWS => ROWS,
        13..48 => 8,
        _ => ROWS_IN_REGISTERS,
    }
}

impl Avx512 {
    /// [`Simd::sum_blocks`](crate::simd::Simd::sum_blocks).
    #[inline(always)]
    pub(crate) fn sum_of_blocks(self, rows: usize, blocks: &Blocks<'_>, acc: &mut [[f32; COLUMNS]; ROWS]) {
        blocks.check(rows);
        match rows {
            ..=ROWS_IN_REGISTERS => with_rows!(rows, |R| sum_of_blocks::<R, true>(blocks, acc), 1 2 3 4 5 6),
            _ => with_rows!(rows, |R| sum_of_blocks::<R, false>(blocks, acc), 7 8 9 10 11 12),
        }
    }

    /// [`Simd::tile_f32`](crate::simd::Simd::tile_f32).
    #[inline(always)]
    pub(crate) fn floats(self, rows: usize, tile: Tile<'_>, acc: &mut [[f32; COLUMNS]; ROWS]) {
        tile.check(rows);
        with_rows!(rows, |R| floats::<R>(tile, acc), 1 2 3 4 5 6 7 8 9 10 11 12);
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

/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn floats<const R: usize>(tile: Tile<'_>, to: &mut [[f32; COLUMNS]; ROWS]) {
    // SAFETY: by contract.
    let acc = unsafe { in_registers::<R>(tile) };
    for (sums, to) in acc.iter().zip(to) {
        let to = to.as_mut_ptr();
        // SAFETY: a row has 32 f32.
        unsafe {
            _mm512_storeu_ps(to, _mm512_cvtepi32_ps(sums[0]));
            _mm512_storeu_ps(to.add(16), _mm512_cvtepi32_ps(sums[1]));
        }
    }
}

/// # Safety
/// `blocks.check(R)` holds.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn sum_of_blocks<const R: usize, const IN_REGISTERS: bool>(
    blocks: &Blocks<'_>,
    to: &mut [[f32; COLUMNS]; ROWS],
) {
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let to: *mut f32 = to.as_mut_ptr().cast();
    // The compiler is not to know what this points to: it would take products' registers for it.
    let memory = if IN_REGISTERS { to } else { black_box(to) };
    let mut is_first = true;
    // The compiler is not to know that these are beside the others: it would load both at once, and take them apart.
    let further = black_box(4_usize);
    let (mut a, mut rows) = (blocks.a.as_ptr(), blocks.row_scales.as_ptr());
    let Range { start: mut next, end: last_next } = blocks.next.as_flattened().as_ptr_range();
    // Lines for each two steps: no more than it takes, since the memory has only so many under way.
    let num_lines = (4 * blocks.next.len()).div_ceil(blocks.b.len());
    let operands = blocks.b.chunks(blocks.num_steps).zip(blocks.starts).zip(blocks.column_scales);
    for ((steps, start), columns) in operands {
        let start: *const __m512i = start.as_ptr().cast();
        // SAFETY: 32 i32.
        let mut sums = [unsafe { [_mm512_loadu_si512(start), _mm512_loadu_si512(start.add(1))] }; R];
        let (twos, last) = steps.as_chunks::<2>();
        for two in twos {
            if next < last_next {
                // Hints, which take any address.
                for line in 0..num_lines {
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(LINE * line));
                }
                next = next.wrapping_add(LINE * num_lines);
            }
            // SAFETY: a checked tile's rows of two steps.
            unsafe {
                add_step(&mut sums, a, &two[0]);
                add_step(&mut sums, a.wrapping_add(further), &two[1]);
            }
            a = a.wrapping_add(blocks.stride);
        }
        for step in last {
            // SAFETY: as above.
            unsafe { add_step(&mut sums, a, step) };
        }
        // SAFETY: 32 columns.
        let columns = unsafe { [_mm512_loadu_ps(columns.as_ptr()), _mm512_loadu_ps(columns[16..].as_ptr())] };
        for (r, (acc, sums)) in acc.iter_mut().zip(&sums).enumerate() {
            // SAFETY: a checked tile's scale.
            let row = _mm512_set1_ps(unsafe { *rows.add(r) });
            for i in 0..2 {
                let scale = _mm512_mul_ps(row, columns[i]);
                if IN_REGISTERS {
                    acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i]), scale, acc[i]);
                    continue;
                }
                // SAFETY: a row has 32 f32.
                unsafe {
                    let memory = memory.add(COLUMNS * r + 16 * i);
                    let before = if is_first { _mm512_setzero_ps() } else { _mm512_loadu_ps(memory) };
                    _mm512_storeu_ps(memory, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i]), scale, before));
                }
            }
        }
        is_first = false;
        rows = rows.wrapping_add(blocks.row_scales_stride);
    }
    if IN_REGISTERS {
        for (r, acc) in acc.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                _mm512_storeu_ps(to.add(COLUMNS * r), acc[0]);
                _mm512_storeu_ps(to.add(COLUMNS * r + 16), acc[1]);
            }
        }
    }
}

/// Adds the products of a step; row `r`'s four activations are `a[8 r..][..4]`.
///
/// # Safety
/// The processor has the instructions, and these activations can be read. (Without the attribute that says so: with it, a
/// function cannot be inlined always, and the sums would go through memory.)
#[inline(always)]
unsafe fn add_step<const R: usize>(sums: &mut [[__m512i; 2]; R], a: *const u8, step: &Step) {
    let b: *const __m512i = step.as_ptr().cast();
    // SAFETY: by contract; a step has 128 bytes.
    unsafe {
        let b = [_mm512_loadu_si512(b), _mm512_loadu_si512(b.add(1))];
        for (r, sums) in sums.iter_mut().enumerate() {
            let four = _mm512_set1_epi32(a.add(EIGHT * r).cast::<i32>().read_unaligned());
            sums[0] = _mm512_dpbusd_epi32(sums[0], four, b[0]);
            sums[1] = _mm512_dpbusd_epi32(sums[1], four, b[1]);
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
