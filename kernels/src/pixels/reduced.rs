//! The inverse DCT at a half, a quarter or an eighth: each sample is the mean of the samples that it stands for. Per axis, since
//! subsampled chroma is reduced less.

use crate::Level;
use crate::pixels::Block;
use crate::pixels::idct::{lone_coefficient, transform};

/// As [`super::inverse_dct`], with means of `by[0]` samples beside and `by[1]` above one another (1, 2, 4 or 8): block `i` starts
/// at column `8 / by[0] * i`.
///
/// # Panics
/// Where `samples` ends before the last block does, `last` is shorter than `blocks`, or `by` is something else.
pub fn inverse_dct_means(
    level: Level,
    by: [usize; 2],
    blocks: &mut [Block],
    last: &[u8],
    samples: &mut [u8],
    stride: usize,
) {
    assert!(by.iter().all(|by| [1, 2, 4, 8].contains(by)), "means of {by:?}");
    let [columns, rows] = by.map(|by| 8 / by);
    assert!(last.len() >= blocks.len(), "a position for each block");
    assert!(samples.len() >= (rows - 1) * stride + columns * blocks.len(), "room for all blocks");
    for (i, (block, &last)) in blocks.iter_mut().zip(last).enumerate() {
        let samples = &mut samples[columns * i..];
        // The mean of a whole block is its first coefficient.
        if last == 0 || by == [8, 8] {
            for y in 0..rows {
                samples[y * stride..][..columns].fill(lone_coefficient(block[0]));
            }
        } else {
            let whole = transform(level, block);
            let words = whole.map(u64::from_le_bytes);
            match by {
                [2, 2] => {
                    for (y, rows) in words.as_chunks::<2>().0.iter().enumerate() {
                        samples[y * stride..][..4].copy_from_slice(&halves(rows));
                    }
                }
                [4, 4] => {
                    for (y, rows) in words.as_chunks::<4>().0.iter().enumerate() {
                        samples[y * stride..][..2].copy_from_slice(&quarters(rows));
                    }
                }
                _ => means(&whole, by, samples, stride),
            }
        }
        *block = [0; 64];
    }
}

/// Sums of neighbours in a row of eight samples: four of 16 bits.
#[inline(always)]
fn pairs(row: u64) -> u64 {
    const LOW: u64 = 0x00ff_00ff_00ff_00ff;
    (row & LOW) + (row >> 8 & LOW)
}

/// Means of 2 x 2 samples.
#[inline(always)]
fn halves(rows: &[u64; 2]) -> [u8; 4] {
    let sums = pairs(rows[0]) + pairs(rows[1]) + 0x0002_0002_0002_0002;
    let means = sums >> 2 & 0x00ff_00ff_00ff_00ff;
    let means = (means | means >> 8) & 0x0000_ffff_0000_ffff;
    ((means | means >> 16) as u32).to_le_bytes()
}

/// Means of 4 x 4 samples.
#[inline(always)]
fn quarters(rows: &[u64; 4]) -> [u8; 2] {
    let sums = rows.iter().map(|&row| pairs(row)).sum::<u64>();
    let sums = (sums & 0x0000_ffff_0000_ffff) + (sums >> 16 & 0x0000_ffff_0000_ffff);
    [((sums as u32 + 8) >> 4) as u8, (((sums >> 32) as u32 + 8) >> 4) as u8]
}

/// Means of any kind.
fn means(whole: &[[u8; 8]; 8], [by_x, by_y]: [usize; 2], samples: &mut [u8], stride: usize) {
    let count = (by_x * by_y) as u32;
    for (y, rows) in whole.chunks_exact(by_y).enumerate() {
        for (x, sample) in samples[y * stride..][..8 / by_x].iter_mut().enumerate() {
            let sum: u32 = rows.iter().flat_map(|row| &row[by_x * x..][..by_x]).map(|&sample| u32::from(sample)).sum();
            *sample = ((sum + count / 2) / count) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pixels::inverse_dct;

    #[test]
    fn samples_are_means_of_the_whole_blocks_samples() {
        let mut random = 3_u32;
        let mut next = |range: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((random >> 16) % (2 * range)) as i16 - range as i16
        };
        for round in 0..30 {
            let mut block = [0; 64];
            block[0] = next(200);
            for i in 0..round {
                block[(7 * i + 1) % 64] = next(40);
            }
            let last = if round == 0 { 0 } else { 63 };
            let mut whole = [0; 64];
            inverse_dct(Level::PORTABLE, &mut [block], &[last], &mut whole, 8);
            for (by_x, by_y) in [(2, 2), (4, 4), (8, 8), (1, 2), (2, 1), (2, 4), (4, 2), (8, 4), (4, 8), (1, 1)] {
                for level in Level::available() {
                    let mut found = [0; 64];
                    inverse_dct_means(level, [by_x, by_y], &mut [block], &[last], &mut found, 8);
                    for (y, x) in (0..8 / by_y).flat_map(|y| (0..8 / by_x).map(move |x| (y, x))) {
                        let cells = (0..by_y).flat_map(|i| (0..by_x).map(move |j| (by_y * y + i, by_x * x + j)));
                        let sum: f64 = cells.map(|(y, x)| f64::from(whole[8 * y + x])).sum();
                        let difference = f64::from(found[8 * y + x]) - sum / (by_x * by_y) as f64;
                        // A half for rounding; the mean of all comes from the coefficient, not from rounded samples.
                        assert!(difference.abs() <= 1.0, "{by_x} {by_y} {difference} {}", level.name());
                    }
                }
            }
        }
    }
}
