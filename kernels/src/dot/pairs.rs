//! Weights for `vpmaddubsw`, the only product of bytes that AVX2 has: 32 products at a time, summed in pairs to 16 bits, which
//! saturate.
//!
//! Activations are at most 255, so the sum of a pair cannot saturate while its two weights add up to at most 128 in size:
//! 255 x 128 < 2^15. That holds for nearly all pairs of trained weights. A vector in which it does not is written as two, which
//! add up to it and whose pairs are safe; both are multiplied with the same activations. So the sums are exact, and a panel is
//! made ready once for all rows of a task.

use std::arch::x86_64::*;

use super::{COLUMNS, Step, Tile, with_rows};

/// Steps whose activations are put side by side: 12 rows of them take 6 KB, which leaves most of the first-level cache to weights.
const CHUNK: usize = 128;

/// Columns of a vector, with four k each.
const EIGHT: usize = 8;

/// Vectors of a step.
const PARTS: usize = COLUMNS / EIGHT;

/// A panel made ready.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    /// Of one chunk and eight columns after the other.
    weights: Vec<[i8; 4 * EIGHT]>,
    /// Of each vector, where in the chunk its four activations begin.
    places: Vec<u16>,
    /// Where the vectors of a chunk's eight columns end, `[chunks][PARTS]`.
    ends: Vec<usize>,
    /// Chunks of one block.
    chunks_of_block: usize,
}

impl Prepared {
    /// Makes a panel ready whose blocks have `steps_of_block` steps.
    #[target_feature(enable = "avx2")]
    pub(super) fn fill(&mut self, panel: &[Step], steps_of_block: usize) {
        let most = 2 * PARTS * panel.len();
        if self.weights.len() < most {
            self.weights.resize(most, [0; 4 * EIGHT]);
            self.places.resize(most, 0);
        }
        self.ends.clear();
        self.chunks_of_block = steps_of_block.div_ceil(CHUNK);
        let mut end = 0;
        for chunk in panel.chunks(steps_of_block).flat_map(|block| block.chunks(CHUNK)) {
            for part in 0..PARTS {
                for (k, step) in chunk.iter().enumerate() {
                    let (vectors, is_two) = safe(step[32 * part..][..32].try_into().expect("bug: a part has 32 bytes"));
                    let (weights, places) = (&mut self.weights[end..end + 2], &mut self.places[end..end + 2]);
                    for ((vector, weights), place) in vectors.into_iter().zip(weights).zip(places) {
                        // SAFETY: 32 bytes.
                        unsafe { _mm256_storeu_si256(weights.as_mut_ptr().cast(), vector) };
                        *place = 4 * k as u16;
                    }
                    end += 1 + usize::from(is_two);
                }
                self.ends.push(end);
            }
        }
    }

    /// The chunks of a block.
    pub(crate) fn block(&self, block: usize) -> Chunks<'_> {
        Chunks { prepared: self, first: block * self.chunks_of_block, count: self.chunks_of_block }
    }
}

/// Some chunks of a panel, one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunks<'a> {
    prepared: &'a Prepared,
    first: usize,
    count: usize,
}

impl<'a> Chunks<'a> {
    /// The vectors of a chunk's eight columns, with their places.
    #[inline]
    fn vectors(&self, chunk: usize, part: usize) -> impl Iterator<Item = (&'a [i8; 32], u16)> + use<'a> {
        let at = (self.first + chunk) * PARTS + part;
        let ends = &self.prepared.ends;
        let range = if at == 0 { 0 } else { ends[at - 1] }..ends[at];
        self.prepared.weights[range.clone()].iter().zip(self.prepared.places[range].iter().copied())
    }
}

/// Vectors with safe pairs that add up to `weights`: the first alone, or both.
#[inline]
#[target_feature(enable = "avx2")]
fn safe(weights: &[i8; 32]) -> ([__m256i; 2], bool) {
    // SAFETY: 32 bytes.
    let whole = unsafe { _mm256_loadu_si256(weights.as_ptr().cast()) };
    let pairs = _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), whole));
    let large = _mm256_cmpgt_epi16(pairs, _mm256_set1_epi16(128));
    let is_two = _mm256_testz_si256(large, large) == 0;
    // Half of a byte, rounded down: shifted as an unsigned number that is 128 larger.
    let raised = _mm256_xor_si256(whole, _mm256_set1_epi8(-128));
    let half = _mm256_and_si256(_mm256_srli_epi16::<1>(raised), _mm256_set1_epi8(127));
    let half = _mm256_sub_epi8(half, _mm256_set1_epi8(64));
    let rest = _mm256_sub_epi8(whole, half);
    let first = _mm256_blendv_epi8(whole, half, _mm256_set1_epi8(-i8::from(is_two)));
    ([first, rest], is_two)
}

/// The products of a tile's rows with a block made ready.
///
/// # Safety
/// `tile.check(rows)` holds, and the block has as many steps as the tile.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn product(rows: usize, tile: Tile<'_>, block: Chunks<'_>, sums: &mut [[i32; COLUMNS]]) {
    with_rows!(rows, product_of(tile, block, sums), 1 2 3 4 5 6 7 8 9 10 11 12);
}

/// # Safety
/// That of [`product`], with R rows.
#[target_feature(enable = "avx2")]
unsafe fn product_of<const R: usize>(tile: Tile<'_>, block: Chunks<'_>, sums: &mut [[i32; COLUMNS]]) {
    let sums: &mut [[i32; COLUMNS]; R] = (&mut sums[..R]).try_into().expect("bug: a slice of its length");
    sums.fill(*tile.init);
    let ones = _mm256_set1_epi16(1);
    // Rows of activations may be a power of two apart, which a cache does not like: here they are side by side.
    let mut near = [const { [std::mem::MaybeUninit::<u8>::uninit(); 4 * CHUNK] }; R];
    for (number, steps) in tile.b.chunks(CHUNK).enumerate().take(block.count) {
        for (r, near) in near.iter_mut().enumerate() {
            let a = &tile.a[r * tile.stride + number * 4 * CHUNK..][..4 * steps.len()];
            // SAFETY: a chunk has at most as many bytes, and neither lies in the other.
            unsafe { std::ptr::copy_nonoverlapping(a.as_ptr(), near.as_mut_ptr().cast(), a.len()) };
        }
        let near: *const [u8; 4 * CHUNK] = near.as_ptr().cast();
        for part in 0..PARTS {
            let at = EIGHT * part;
            let mut acc = [_mm256_setzero_si256(); R];
            for (acc, sums) in acc.iter_mut().zip(&*sums) {
                // SAFETY: eight i32.
                *acc = unsafe { _mm256_loadu_si256(sums[at..][..EIGHT].as_ptr().cast()) };
            }
            for (weights, place) in block.vectors(number, part) {
                // SAFETY: 32 bytes.
                let weights = unsafe { _mm256_loadu_si256(weights.as_ptr().cast()) };
                for (r, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: the places of this chunk lie in what was copied, which is as long as it.
                    let four = unsafe { near.add(r).cast::<u8>().add(place.into()).cast::<i32>().read_unaligned() };
                    let pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), weights);
                    *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pairs, ones));
                }
            }
            for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                // SAFETY: eight i32.
                unsafe { _mm256_storeu_si256(sums[at..][..EIGHT].as_mut_ptr().cast(), *acc) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "needs the instructions")]
    fn every_pair_of_bytes_is_split_into_safe_pairs_that_add_up_to_it() {
        if !is_x86_feature_detected!("avx2") {
            return;
        }
        for pair in 0..=u16::MAX {
            let [x, y] = pair.to_le_bytes().map(|byte| byte as i8);
            let weights: [i8; 32] = std::array::from_fn(|i| [x, y, 1, -1][i % 4]);
            // SAFETY: detected.
            let (vectors, is_two) = unsafe { safe(&weights) };
            let of: Vec<[i8; 32]> = vectors[..1 + usize::from(is_two)]
                .iter()
                // SAFETY: both have 32 bytes.
                .map(|&vector| unsafe { std::mem::transmute(vector) })
                .collect();
            for i in 0..32 {
                assert_eq!(of.iter().map(|v| i32::from(v[i])).sum::<i32>(), weights[i].into(), "{x} {y}");
            }
            for pair in of.iter().flat_map(|v| v.as_chunks::<2>().0) {
                for activations in [[0, 255], [255, 0], [255, 255]] {
                    let sum: i32 = pair.iter().zip(activations).map(|(&w, a)| i32::from(w) * a).sum();
                    assert!(i16::try_from(sum).is_ok(), "{x} {y}: {pair:?} with {activations:?}");
                }
            }
            assert_eq!(is_two, (i32::from(x) + i32::from(y)).abs() > 128, "{x} {y}");
        }
    }
}
