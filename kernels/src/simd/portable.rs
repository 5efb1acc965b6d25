//! Plain Rust: what the other instruction sets must agree with.

use half::f16;

use super::{LANES, Simd};

/// The portable instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; LANES];
type I = [i32; LANES];

#[inline(always)]
fn zip<T: Copy, U>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> U) -> [U; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn tree<T: Copy>(mut v: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
        half /= 2;
    }
    v[0]
}

impl Simd for Portable {
    type F = F;
    type I = I;
    const ACCUMULATORS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &F) -> F {
        *from
    }

    #[inline(always)]
    fn store(self, v: F, to: &mut F) {
        *to = v;
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> F {
        from.map(f16::to_f32_const)
    }

    #[inline(always)]
    fn store_f16(self, v: F, to: &mut [f16; LANES]) {
        *to = v.map(f16::from_f32_const);
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn first(self, n: usize, a: F, b: F) -> F {
        std::array::from_fn(|i| if i < n { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> I {
        [x; LANES]
    }

    #[inline(always)]
    fn load_i32(self, from: &I) -> I {
        *from
    }

    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        zip(a, b, i32::wrapping_add)
    }

    #[inline(always)]
    fn max_i32(self, a: I, b: I) -> I {
        zip(a, b, i32::max)
    }

    #[inline(always)]
    fn and_i32(self, a: I, b: I) -> I {
        zip(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn shl23(self, a: I) -> I {
        a.map(|a| a << 23)
    }

    #[inline(always)]
    fn store_u8(self, v: I, to: &mut [u8; LANES]) {
        *to = v.map(|x| x as u8);
    }

    #[inline(always)]
    fn round(self, v: F) -> I {
        v.map(|x| x.round_ties_even() as i32)
    }

    #[inline(always)]
    fn to_f32(self, v: I) -> F {
        v.map(|x| x as f32)
    }

    #[inline(always)]
    fn bits(self, v: F) -> I {
        v.map(|x| x.to_bits() as i32)
    }

    #[inline(always)]
    fn with_bits(self, v: I) -> F {
        v.map(|x| f32::from_bits(x as u32))
    }

    #[inline(always)]
    fn sum(self, v: F) -> f32 {
        tree(v, |a, b| a + b)
    }

    #[inline(always)]
    fn largest(self, v: F) -> f32 {
        tree(v, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn largest_i32(self, v: I) -> i32 {
        tree(v, i32::max)
    }
}
