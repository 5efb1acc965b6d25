//! Functions of vectors: the same bits at every level, since they are made of [`Simd`]'s operations alone.

use crate::simd::{LANES, Simd};

/// 2^x for x in [-0.5, 0.5]: interpolates at Chebyshev's nodes, relative error below 2.1e-7.
const EXP2: [f32; 6] = [1.0, std::f32::consts::LN_2, 0.240_221_07, 0.055_503_57, 0.009_676_032, 0.001_339_086_3];

/// 2^x, with x limited to [-125, 126]. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // The limits come first, because max and min give their second operand for NaN.
    let x = s.min(s.splat(126.0), s.max(s.splat(-125.0), x));
    let n = s.round(x);
    let r = s.sub(x, s.to_f32(n));
    let mut p = s.splat(EXP2[5]);
    for &c in EXP2[..5].iter().rev() {
        p = s.fma(p, r, s.splat(c));
    }
    s.with_bits(s.add_i32(s.bits(p), s.shl23(n)))
}

/// e^x, with x limited to [-86.6, 87.3].
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    exp2(s, s.mul(x, s.splat(std::f32::consts::LOG2_E)))
}

/// x / (1 + e^(-slope x)): SiLU with slope 1, QuickGELU with 1.702.
#[inline(always)]
pub(crate) fn swish<S: Simd>(s: S, x: S::F, slope: f32) -> S::F {
    let e = exp(s, s.mul(x, s.splat(-slope)));
    s.div(x, s.add(s.splat(1.0), e))
}

/// x/2 (1 + erf(x / sqrt 2)), with erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7).
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    let z = s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let magnitude = s.max(s.sub(zero, z), z);
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(magnitude, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    // erfc(|z|) / 2, and from it the normal distribution function on either side of zero.
    let tail = s.mul(s.mul(s.mul(p, t), exp(s, s.mul(s.sub(zero, z), z))), s.splat(0.5));
    // x - x tail for x > 0, x tail otherwise: the same as max(x, 0) - |x| tail.
    let size = s.max(s.sub(zero, x), x);
    s.sub(s.max(zero, x), s.mul(size, tail))
}

/// x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let cubic = s.fma(s.mul(s.mul(x, x), x), s.splat(0.044_715), x);
    let e = exp(s, s.mul(cubic, s.splat(-1.595_769)));
    s.div(x, s.add(s.splat(1.0), e))
}

/// What a sum over a row adds up. (Not a closure: one that is not inlined is compiled without the instruction set.)
pub(crate) trait Term<S: Simd>: Copy {
    /// `sum` and what `x` gives.
    fn add(self, s: S, sum: S::F, x: S::F) -> S::F;
}

/// x
#[derive(Clone, Copy)]
pub(crate) struct Value;

/// x^2
#[derive(Clone, Copy)]
pub(crate) struct Square;

/// (x - mean)^2
#[derive(Clone, Copy)]
pub(crate) struct SquareFrom<F>(pub(crate) F);

/// x times a factor
#[derive(Clone, Copy)]
pub(crate) struct Times<F>(pub(crate) F);

impl<S: Simd> Term<S> for Times<S::F> {
    #[inline(always)]
    fn add(self, s: S, sum: S::F, x: S::F) -> S::F {
        s.fma(x, self.0, sum)
    }
}

impl<S: Simd> Term<S> for Value {
    #[inline(always)]
    fn add(self, s: S, sum: S::F, x: S::F) -> S::F {
        s.add(sum, x)
    }
}

impl<S: Simd> Term<S> for Square {
    #[inline(always)]
    fn add(self, s: S, sum: S::F, x: S::F) -> S::F {
        s.fma(x, x, sum)
    }
}

impl<S: Simd> Term<S> for SquareFrom<S::F> {
    #[inline(always)]
    fn add(self, s: S, sum: S::F, x: S::F) -> S::F {
        let d = s.sub(x, self.0);
        s.fma(d, d, sum)
    }
}

/// Sum over a row: element i goes to partial sum i mod 64; the four vectors of partial sums are added in pairs.
#[inline(always)]
pub(crate) fn sum_of<S: Simd>(s: S, row: &[f32], term: impl Term<S>) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let (whole, rest) = row.as_chunks::<{ 4 * LANES }>();
    for chunk in whole {
        let (vectors, _) = chunk.as_chunks::<LANES>();
        for (sum, x) in sums.iter_mut().zip(vectors) {
            *sum = term.add(s, *sum, s.load(x));
        }
    }
    let (vectors, tail) = rest.as_chunks::<LANES>();
    for (sum, x) in sums.iter_mut().zip(vectors) {
        *sum = term.add(s, *sum, s.load(x));
    }
    if !tail.is_empty() {
        let sum = sums[vectors.len()];
        sums[vectors.len()] = s.first(tail.len(), term.add(s, sum, s.load_part(tail)), sum);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
