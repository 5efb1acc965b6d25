//! AArch64 with the dot product. Every AArch64 has NEON, so the plain loops of the portable form become its instructions, and
//! only what they cannot say (`dot`) is written for it.

use half::f16;

use super::{LANES, Portable, Simd};
use crate::level::Work;

/// The proof that NEON and its dot product are there.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

/// Runs `work`, compiled with these instructions.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn call<W: Work>(work: W) -> W::Output {
    work.run(Neon(()))
}

/// Methods that are the portable ones.
macro_rules! portable {
    ($($name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: $type),*) $(-> $result)? {
                Portable.$name($($arg),*)
            }
        )*
    };
}

type F = [f32; LANES];
type I = [i32; LANES];

impl Simd for Neon {
    type F = F;
    type I = I;
    const ACCUMULATORS: usize = 6;

    portable! {
        splat(x: f32) -> F;
        load(from: &F) -> F;
        store(v: F, to: &mut F);
        load_f16(from: &[f16; LANES]) -> F;
        store_f16(v: F, to: &mut [f16; LANES]);
        add(a: F, b: F) -> F;
        sub(a: F, b: F) -> F;
        mul(a: F, b: F) -> F;
        div(a: F, b: F) -> F;
        fma(a: F, b: F, c: F) -> F;
        max(a: F, b: F) -> F;
        min(a: F, b: F) -> F;
        first(n: usize, a: F, b: F) -> F;
        splat_i32(x: i32) -> I;
        load_i32(from: &I) -> I;
        add_i32(a: I, b: I) -> I;
        max_i32(a: I, b: I) -> I;
        and_i32(a: I, b: I) -> I;
        shl23(a: I) -> I;
        store_u8(v: I, to: &mut [u8; LANES]);
        round(v: F) -> I;
        to_f32(v: I) -> F;
        bits(v: F) -> I;
        with_bits(v: I) -> F;
        sum(v: F) -> f32;
        largest(v: F) -> f32;
        largest_i32(v: I) -> i32;
    }
}
