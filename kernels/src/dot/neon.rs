//! NEON with the dot product of Armv8.2 (`sdot`).
//!
//! It multiplies signed bytes: activations are taken less 128, and 128 times the sum of a column's weights is added at the end.
//! Rust's intrinsic for it is not stable yet, so it is spelled in assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{COLUMNS, Dot, Sums, Tile, with_rows};
use crate::simd::neon::Neon;

/// Rows at a time: (4 + 1) x 4 accumulators of 4 lanes leave twelve registers for operands.
const ROWS: usize = 4;
/// Accumulators of a row: half a panel.
const VECTORS: usize = COLUMNS / 2 / 4;

impl Dot for Neon {
    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        for first in (0..rows).step_by(ROWS) {
            let (rows, tile, sums) = (ROWS.min(rows - first), tile.skip_rows(first), &mut sums[first..]);
            with_rows!(rows, |R| product::<R>(tile, sums), 1 2 3 4);
        }
    }
}

/// Each lane of `acc` plus the products of its four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is there, and reads and writes nothing but these registers.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "neon,dotprod")]
unsafe fn product<const R: usize>(tile: Tile<'_>, sums: &mut [[i32; COLUMNS]]) {
    let ones = vdupq_n_s8(1);
    for half in 0..2 {
        let mut acc = [[vdupq_n_s32(0); VECTORS]; R];
        let mut weights = [vdupq_n_s32(0); VECTORS];
        for (k, b) in tile.b.iter().enumerate() {
            let b = b[4 * 4 * VECTORS * half..].as_ptr();
            // SAFETY: half a step has 64 bytes.
            let b = unsafe { [0, 1, 2, 3].map(|j| vld1q_s8(b.add(16 * j))) };
            for j in 0..VECTORS {
                weights[j] = sdot(weights[j], b[j], ones);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: a row and a step of a checked tile.
                let four = unsafe { tile.four(r, k) } as u32;
                let four = vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x8080_8080));
                for j in 0..VECTORS {
                    acc[j] = sdot(acc[j], b[j], four);
                }
            }
        }
        for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
            for j in 0..VECTORS {
                let at = COLUMNS / 2 * half + 4 * j;
                let (init, to) = (tile.init[at..at + 4].as_ptr(), sums[at..at + 4].as_mut_ptr());
                let sum = vaddq_s32(acc[j], vshlq_n_s32::<7>(weights[j]));
                // SAFETY: both slices have 4 i32.
                unsafe { vst1q_s32(to, vaddq_s32(sum, vld1q_s32(init))) };
            }
        }
    }
}
