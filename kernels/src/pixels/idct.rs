//! The inverse DCT: 8 x 8 coefficients to 8 x 8 samples, by Loeffler, Ligtenberg and Moschytz' factorisation ("Practical fast
//! 1-D DCT algorithms with 11 multiplications", ICASSP 1989) in 13-bit fixed point: columns first, two fractional bits kept
//! between the passes. Constants, order and rounding are libjpeg's "islow", so the samples are too.

use crate::Level;

/// Dequantised coefficients; the vertical frequency rises from row to row.
pub type Block = [i16; 64];

/// Fractional bits of the constants.
const FRACTION: i32 = 13;
/// Fractional bits between the passes.
const BETWEEN: i32 = 2;

/// Rebuilds one row of blocks into 8 rows of samples, `stride` apart; block `i` starts at column `8 * i`.
///
/// `last[i]` is the zigzag position of block `i`'s last coefficient that is not zero. All blocks are zero afterwards.
///
/// # Panics
/// Where `samples` ends before the last block does, or `last` is shorter than `blocks`.
pub fn inverse_dct(level: Level, blocks: &mut [Block], last: &[u8], samples: &mut [u8], stride: usize) {
    assert!(last.len() >= blocks.len(), "a position for each block");
    assert!(samples.len() >= 7 * stride + 8 * blocks.len(), "room for all blocks");
    for (i, (block, &last)) in blocks.iter_mut().zip(last).enumerate() {
        let samples = &mut samples[8 * i..];
        if last == 0 {
            let row = [lone_coefficient(block[0]); 8];
            for y in 0..8 {
                samples[y * stride..][..8].copy_from_slice(&row);
            }
            block[0] = 0;
            continue;
        }
        for (y, row) in transform(level, block).iter().enumerate() {
            samples[y * stride..][..8].copy_from_slice(row);
        }
        *block = [0; 64];
    }
}

/// All samples of a block that has its first coefficient only: both passes, with their roundings.
#[inline]
pub(super) fn lone_coefficient(coefficient: i16) -> u8 {
    let sample = ((i32::from(coefficient) + 4) >> 3) + 128;
    sample.clamp(0, 255) as u8
}

/// The samples of a block.
#[inline]
pub(super) fn transform(level: Level, block: &Block) -> [[u8; 8]; 8] {
    match level.has_avx2() {
        // SAFETY: the level is at least AVX2, which is only made where it was detected.
        #[cfg(target_arch = "x86_64")]
        true => unsafe { avx2::transform(block) },
        _ => portable(block),
    }
}

/// What one pass computes with: one number, or eight of them.
trait Lanes: Copy {
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, constant: i32) -> Self;
    /// Divides by 2^`BITS` after adding `bias`.
    fn shift<const BITS: i32>(self, bias: i32) -> Self;
}

impl Lanes for i32 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.wrapping_add(other)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }

    #[inline(always)]
    fn mul(self, constant: i32) -> Self {
        self.wrapping_mul(constant)
    }

    #[inline(always)]
    fn shift<const BITS: i32>(self, bias: i32) -> Self {
        self.wrapping_add(bias) >> BITS
    }
}

/// The 8-point inverse DCT, times 8 and 2^13, shifted by `BITS`.
#[inline(always)]
fn pass<V: Lanes, const BITS: i32>(c: [V; 8], bias: i32) -> [V; 8] {
    // Even part: a rotation of 2 and 6, a butterfly of 0 and 4.
    let rotated = c[2].add(c[6]).mul(4433);
    let (even2, even3) = (rotated.add(c[6].mul(-15_137)), rotated.add(c[2].mul(6270)));
    let (even0, even1) = (c[0].add(c[4]).mul(1 << FRACTION), c[0].sub(c[4]).mul(1 << FRACTION));
    let sums = [even0.add(even3), even1.add(even2), even1.sub(even2), even0.sub(even3)];
    // Odd part.
    let (z1, z2) = (c[7].add(c[1]).mul(-7373), c[5].add(c[3]).mul(-20_995));
    let (z3, z4) = (c[7].add(c[3]), c[5].add(c[1]));
    let z5 = z3.add(z4).mul(9633);
    let (z3, z4) = (z3.mul(-16_069).add(z5), z4.mul(-3196).add(z5));
    let odd = [
        c[1].mul(12_299).add(z1).add(z4),
        c[3].mul(25_172).add(z2).add(z3),
        c[5].mul(16_819).add(z2).add(z4),
        c[7].mul(2446).add(z1).add(z3),
    ];
    let mut out = [c[0]; 8];
    for i in 0..4 {
        out[i] = sums[i].add(odd[i]).shift::<BITS>(bias);
        out[7 - i] = sums[i].sub(odd[i]).shift::<BITS>(bias);
    }
    out
}

/// Rounding of the first pass.
const FIRST_BIAS: i32 = 1 << (FRACTION - BETWEEN - 1);
/// Shift of the second pass: the constants', the first pass' and the factor of 8.
const SECOND: i32 = FRACTION + BETWEEN + 3;
/// Rounding of the second pass, and the level shift of the samples.
const SECOND_BIAS: i32 = (1 << (SECOND - 1)) + (128 << SECOND);

fn portable(block: &Block) -> [[u8; 8]; 8] {
    let mut columns = [[0; 8]; 8];
    for (x, column) in columns.iter_mut().enumerate() {
        let coefficients = std::array::from_fn(|y| i32::from(block[8 * y + x]));
        *column = pass::<i32, { FRACTION - BETWEEN }>(coefficients, FIRST_BIAS);
    }
    std::array::from_fn(|y| {
        let row = std::array::from_fn(|x| columns[x][y]);
        pass::<i32, SECOND>(row, SECOND_BIAS).map(|sample| sample.clamp(0, 255) as u8)
    })
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{BETWEEN, Block, FIRST_BIAS, FRACTION, Lanes, SECOND, SECOND_BIAS, pass};

    #[derive(Clone, Copy)]
    struct Eight(__m256i);

    /// Intrinsics in a method of [`Eight`].
    macro_rules! has {
        ($e:expr) => {
            // SAFETY: an `Eight` is made inside `transform` only, whose callers have AVX2.
            unsafe { $e }
        };
    }

    impl Lanes for Eight {
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(has!(_mm256_add_epi32(self.0, other.0)))
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(has!(_mm256_sub_epi32(self.0, other.0)))
        }

        #[inline(always)]
        fn mul(self, constant: i32) -> Self {
            Self(has!(_mm256_mullo_epi32(self.0, _mm256_set1_epi32(constant))))
        }

        #[inline(always)]
        fn shift<const BITS: i32>(self, bias: i32) -> Self {
            Self(has!(_mm256_srai_epi32::<BITS>(_mm256_add_epi32(self.0, _mm256_set1_epi32(bias)))))
        }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn transform(block: &Block) -> [[u8; 8]; 8] {
        let rows = block.as_chunks::<8>().0;
        let coefficients: [Eight; 8] = std::array::from_fn(|y| {
            // SAFETY: eight values of 16 bits are 16 bytes.
            let row = unsafe { _mm_loadu_si128(rows[y].as_ptr().cast()) };
            Eight(_mm256_cvtepi16_epi32(row))
        });
        let columns = pass::<Eight, { FRACTION - BETWEEN }>(coefficients, FIRST_BIAS);
        let rows = pass::<Eight, SECOND>(transposed(columns), SECOND_BIAS);
        let rows = transposed(rows);
        let mut samples = [[0_u8; 8]; 8];
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        for (rows, samples) in rows.as_chunks::<4>().0.iter().zip(samples.as_chunks_mut::<4>().0) {
            let [a, b] = [_mm256_packs_epi32(rows[0].0, rows[1].0), _mm256_packs_epi32(rows[2].0, rows[3].0)];
            let packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
            // SAFETY: four rows of eight samples are 32 bytes.
            unsafe { _mm256_storeu_si256(samples.as_mut_ptr().cast(), packed) };
        }
        samples
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn transposed(v: [Eight; 8]) -> [Eight; 8] {
        let v = v.map(|v| v.0);
        let pairs: [[__m256i; 2]; 4] = std::array::from_fn(|i| {
            [_mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1])]
        });
        // Columns 0 to 3 of rows 0 to 3 (and 4 to 7) in the low lane, columns 4 to 7 in the high lane.
        let fours: [[__m256i; 4]; 2] = std::array::from_fn(|i| {
            let [a, b] = [pairs[2 * i], pairs[2 * i + 1]];
            [
                _mm256_unpacklo_epi64(a[0], b[0]),
                _mm256_unpackhi_epi64(a[0], b[0]),
                _mm256_unpacklo_epi64(a[1], b[1]),
                _mm256_unpackhi_epi64(a[1], b[1]),
            ]
        });
        std::array::from_fn(|i| {
            let (a, b) = (fours[0][i % 4], fours[1][i % 4]);
            Eight(match i < 4 {
                true => _mm256_permute2x128_si256::<0x20>(a, b),
                false => _mm256_permute2x128_si256::<0x31>(a, b),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(block: &Block) -> [[f64; 8]; 8] {
        let basis = |x: usize, k: usize| {
            let scale = if k == 0 { 0.5_f64.sqrt() } else { 1.0 };
            scale / 2.0 * ((2 * x + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos()
        };
        std::array::from_fn(|y| {
            std::array::from_fn(|x| {
                let terms = (0..64).map(|i| f64::from(block[i]) * basis(y, i / 8) * basis(x, i % 8));
                (terms.sum::<f64>() + 128.0).clamp(0.0, 255.0)
            })
        })
    }

    #[test]
    fn every_level_gives_the_dct_of_the_definition_and_the_same_bits() {
        let mut random = 7_u32;
        let mut next = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random >> 16
        };
        for density in 1..60 {
            let mut block = [0; 64];
            block[0] = (next() % 2000) as i16 - 1000;
            for _ in 0..density % 20 {
                block[(next() % 64) as usize] = (next() % 200) as i16 - 100;
            }
            let last = if block[1..].iter().any(|&c| c != 0) { 63 } else { 0 };
            let expected = reference(&block);
            let mut first = None;
            for level in Level::available() {
                let mut samples = [0; 8 * 11 + 8];
                let mut blocks = [block];
                inverse_dct(level, &mut blocks, &[last], &mut samples, 11);
                assert_eq!(blocks, [[0; 64]]);
                for (y, x) in (0..8).flat_map(|y| (0..8).map(move |x| (y, x))) {
                    let difference = f64::from(samples[11 * y + x]) - expected[y][x];
                    assert!(difference.abs() <= 1.0, "{difference}");
                }
                assert_eq!(*first.get_or_insert(samples), samples, "{}", level.name());
            }
        }
    }

    #[test]
    fn extreme_coefficients_do_not_panic() {
        for value in [i16::MIN, i16::MAX] {
            for level in Level::available() {
                inverse_dct(level, &mut [[value; 64]; 2], &[63, 0], &mut [0; 7 * 16 + 16], 16);
            }
        }
    }
}
