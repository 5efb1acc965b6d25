//! AVX2, with and without VNNI.
//!
//! Without it there is only `vpmaddubsw`: unsigned times signed bytes, summed in pairs to 16 bits, which saturate. Bounded
//! weights stay within 16 bits, in pairs and in fours ([`products_of_bounded`]); of others the sign goes to the activation
//! ([`products`]).

use std::arch::x86_64::*;

use super::{COLUMNS, Dot, ROWS, Scales, Step, Sums, Tile, with_rows};
use crate::pack::ZERO_POINT;
use crate::quantize::{EIGHT, LINE};
use crate::simd::avx2::Avx2;
use crate::workers::part_of;

/// Rows at a time with VNNI: 3 x 4 accumulators of 8 lanes leave four registers for operands.
const VNNI_ROWS: usize = 3;

/// Columns of a vector, with four k each.
const GROUP: usize = 8;

/// Rows that all columns of a panel are multiplied with at once, in pieces of [`FEW_AT_ONCE`]: weights that come from memory are
/// then read as they lie. Measured on a Zen 3, which reads them at 1.2 to 1.4 times the rate that way; more rows wait for products.
const FEW: usize = 5;

/// 3 x 4 accumulators of 8 lanes leave four registers for operands.
const FEW_AT_ONCE: usize = 3;

/// How far ahead weights are fetched: 8 KB.
pub(crate) const STEPS_AHEAD: usize = 64;

/// Steps that are taken at a time: 12 rows of their activations take 6 KB, which leaves most of the first-level cache to weights.
pub(crate) const CHUNK: usize = 128;

impl<const VNNI: bool> Dot for Avx2<VNNI> {
    #[inline(always)]
    fn start(self, b: &[Step], bounded: bool, corrections: [i32; COLUMNS], zero_point: Option<u8>) -> [i32; COLUMNS] {
        match (bounded, zero_point) {
            _ if VNNI => corrections,
            // What corrections take away, these products leave out.
            (true, Some(ZERO_POINT)) => [0; COLUMNS],
            // SAFETY: the token proves the instructions.
            (true, _) => unsafe { with_offset(b, corrections) },
            // SAFETY: as above.
            (false, _) => unsafe { with_left_out(b, corrections) },
        }
    }

    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        if !VNNI {
            match tile.bounded {
                true if rows <= FEW => {
                    for (first, rows, tile) in pieces_of_few(rows, tile) {
                        with_rows!(rows, |R| product_of_few::<R>(tile, &mut sums[first..]), 1 2 3);
                    }
                }
                true => with_rows!(rows, |R| product::<R, true>(tile, sums), 6 7 8 9 10 11 12),
                false => with_rows!(rows, |R| product::<R, false>(tile, sums), 1 2 3 4 5 6 7 8 9 10 11 12),
            }
            return;
        }
        for first in (0..rows).step_by(VNNI_ROWS) {
            let (rows, tile, sums) = (VNNI_ROWS.min(rows - first), tile.skip_rows(first), &mut sums[first..]);
            with_rows!(rows, |R| product_vnni::<R>(tile, sums), 1 2 3);
        }
    }
}

impl Avx2<false> {
    /// [`Simd::add_tile`](crate::simd::Simd::add_tile), of one chunk.
    #[inline(always)]
    pub(crate) fn add_product(self, rows: usize, tile: Tile<'_>, scales: Scales<'_>, acc: &mut [[f32; COLUMNS]; ROWS]) {
        tile.check(rows);
        assert!(tile.b.len() <= CHUNK, "bug: sums of several chunks have no place");
        match tile.bounded {
            true if rows <= FEW => {
                for (first, rows, tile) in pieces_of_few(rows, tile) {
                    with_rows!(rows, |R| product_add_of_few::<R>(tile, first, (scales, acc)), 1 2 3);
                }
            }
            true => with_rows!(rows, |R| product_add::<R, true>(tile, (scales, acc)), 6 7 8 9 10 11 12),
            false => with_rows!(rows, |R| product_add::<R, false>(tile, (scales, acc)), 1 2 3 4 5 6 7 8 9 10 11 12),
        }
    }
}

/// Rows of a tile that products are fastest with. 12 leave no registers, which costs up to a twentieth where there are many tiles
/// for each reading of a panel; where a panel fills most of the second-level cache, it is read from there for fewer of them.
pub(crate) fn tile_rows(rows: usize, k: usize) -> usize {
    if rows < 100 || k > 4096 { ROWS } else { 10 }
}

/// A tile of a few rows in pieces: their first row, their rows and what they read. The first fetches for all.
#[inline(always)]
fn pieces_of_few(rows: usize, tile: Tile<'_>) -> impl Iterator<Item = (usize, usize, Tile<'_>)> {
    let pieces = rows.div_ceil(FEW_AT_ONCE);
    (0..pieces).map(move |piece| {
        let part = part_of(rows, pieces, piece);
        let next = if piece == 0 { tile.next } else { &[] };
        (part.start, part.len(), Tile { next, ..tile.skip_rows(part.start) })
    })
}

/// `corrections`, and for each column 128 times its weights, which [`products_of_bounded`] leave out.
#[target_feature(enable = "avx2")]
fn with_offset(b: &[Step], corrections: [i32; COLUMNS]) -> [i32; COLUMNS] {
    let mut starts = corrections;
    // 128 steps of pairs between -256 and 254 are what 16 bits hold.
    for b in b.chunks(128) {
        for (group, starts) in starts.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let mut sums = _mm256_setzero_si256();
            for step in b {
                // SAFETY: a group of a step has 32 bytes.
                let b = unsafe { _mm256_loadu_si256(step[4 * GROUP * group..].as_ptr().cast()) };
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), b));
            }
            let offset = _mm256_madd_epi16(sums, _mm256_set1_epi16(128));
            let to: *mut __m256i = starts.as_mut_ptr().cast();
            // SAFETY: eight i32.
            unsafe { _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), offset)) };
        }
    }
    starts
}

/// `corrections`, and for each column what [`products`] leave out: 128 times its weights, and once the size of the negative ones.
#[target_feature(enable = "avx2")]
fn with_left_out(b: &[Step], corrections: [i32; COLUMNS]) -> [i32; COLUMNS] {
    let mut starts = corrections;
    let (one, zero) = (_mm256_set1_epi8(1), _mm256_setzero_si256());
    // 128 steps of pairs between -256 and 254 are what 16 bits hold.
    for b in b.chunks(128) {
        for (group, starts) in starts.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            // 128 w for a positive weight, 127 w for a negative one: 127 times all and once the positive.
            let (mut all, mut positive) = (zero, zero);
            for step in b {
                // SAFETY: a quarter of a step has 32 bytes.
                let b = unsafe { _mm256_loadu_si256(step[4 * GROUP * group..].as_ptr().cast()) };
                all = _mm256_add_epi16(all, _mm256_maddubs_epi16(one, b));
                positive = _mm256_add_epi16(positive, _mm256_maddubs_epi16(one, _mm256_max_epi8(b, zero)));
            }
            let all = _mm256_madd_epi16(all, _mm256_set1_epi16(127));
            let left_out = _mm256_add_epi32(all, _mm256_madd_epi16(positive, _mm256_set1_epi16(1)));
            let to: *mut __m256i = starts.as_mut_ptr().cast();
            // SAFETY: eight i32.
            unsafe { _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), left_out)) };
        }
    }
    starts
}

/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx2")]
unsafe fn product<const R: usize, const BOUNDED: bool>(tile: Tile<'_>, sums: &mut [[i32; COLUMNS]]) {
    let sums: &mut [[i32; COLUMNS]; R] = (&mut sums[..R]).try_into().expect("bug: a slice of its length");
    for (number, b) in tile.b.chunks(CHUNK).enumerate() {
        let next = tile.next.chunks(CHUNK).nth(number).unwrap_or(&[]);
        let chunk = Tile { a: &tile.a[number * CHUNK / 2 * tile.stride..], b, next, ..tile };
        for group in 0..COLUMNS / GROUP {
            let at = GROUP * group;
            let mut acc = [_mm256_setzero_si256(); R];
            for (acc, sums) in acc.iter_mut().zip(&*sums) {
                let from = if number == 0 { tile.init } else { sums };
                // SAFETY: eight i32.
                *acc = unsafe { _mm256_loadu_si256(from[at..][..GROUP].as_ptr().cast()) };
            }
            // SAFETY: a piece of a checked tile.
            acc =
                unsafe { if BOUNDED { products_of_bounded(acc, &chunk, group) } else { products(acc, &chunk, group) } };
            for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                // SAFETY: eight i32.
                unsafe { _mm256_storeu_si256(sums[at..][..GROUP].as_mut_ptr().cast(), *acc) };
            }
        }
    }
}

/// As [`product`], of one chunk, scaled and added to floats without a way through memory.
///
/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx2,fma")]
unsafe fn product_add<const R: usize, const BOUNDED: bool>(
    tile: Tile<'_>,
    (scales, to): (Scales<'_>, &mut [[f32; COLUMNS]; ROWS]),
) {
    for group in 0..COLUMNS / GROUP {
        let at = GROUP * group;
        // SAFETY: eight i32.
        let acc = [unsafe { _mm256_loadu_si256(tile.init[at..][..GROUP].as_ptr().cast()) }; R];
        // SAFETY: a checked tile.
        let acc = unsafe { if BOUNDED { products_of_bounded(acc, &tile, group) } else { products(acc, &tile, group) } };
        // SAFETY: eight f32.
        let columns = unsafe { _mm256_loadu_ps(scales.columns[at..][..GROUP].as_ptr()) };
        for (r, (acc, to)) in acc.iter().zip(&mut *to).enumerate() {
            let scale = _mm256_mul_ps(_mm256_set1_ps(scales.rows[r]), columns);
            let to = to[at..][..GROUP].as_mut_ptr();
            // SAFETY: eight f32.
            unsafe { _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*acc), scale, _mm256_loadu_ps(to))) };
        }
    }
}

/// The sums of a few rows.
///
/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx2")]
unsafe fn product_of_few<const R: usize>(tile: Tile<'_>, to: &mut [[i32; COLUMNS]]) {
    // SAFETY: a checked tile.
    let sums = unsafe { sums_of_few::<R>(&tile) };
    for (sums, to) in sums.iter().zip(to) {
        for (sums, to) in sums.iter().zip(to.as_chunks_mut::<GROUP>().0) {
            // SAFETY: eight i32.
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), *sums) };
        }
    }
}

/// As [`product_of_few`], scaled and added to floats; the tile is of rows from `first` on.
///
/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx2,fma")]
unsafe fn product_add_of_few<const R: usize>(
    tile: Tile<'_>,
    first: usize,
    (scales, to): (Scales<'_>, &mut [[f32; COLUMNS]; ROWS]),
) {
    // SAFETY: a checked tile.
    let sums = unsafe { sums_of_few::<R>(&tile) };
    for (r, sums) in sums.iter().enumerate() {
        let row = _mm256_set1_ps(scales.rows[first + r]);
        let columns = scales.columns.as_chunks::<GROUP>().0;
        for ((sums, columns), to) in sums.iter().zip(columns).zip(to[first + r].as_chunks_mut::<GROUP>().0) {
            // SAFETY: eight f32.
            unsafe {
                let scale = _mm256_mul_ps(row, _mm256_loadu_ps(columns.as_ptr()));
                let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sums), scale, _mm256_loadu_ps(to.as_ptr()));
                _mm256_storeu_ps(to.as_mut_ptr(), sum);
            }
        }
    }
}

/// The products of bounded weights for all columns, of rows so few that weights wait for memory: each pair is widened by itself,
/// so that there is no offset to be taken away but the activations' own.
///
/// # Safety
/// As [`products_of_bounded`].
#[inline(always)]
unsafe fn sums_of_few<const R: usize>(tile: &Tile<'_>) -> [[__m256i; COLUMNS / GROUP]; R] {
    let init: *const __m256i = tile.corrections.as_ptr().cast();
    // SAFETY: the instructions by contract; 32 corrections; a step has 128 bytes, `four` a checked tile's row and step.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let mut sums = [[0, 1, 2, 3].map(|group| _mm256_loadu_si256(init.add(group))); R];
        for (k, b) in tile.b.iter().enumerate() {
            if let Some(next) = tile.next.get(k) {
                _mm_prefetch::<_MM_HINT_T0>(next.as_ptr());
                _mm_prefetch::<_MM_HINT_T0>(next[LINE..].as_ptr());
            }
            let b: *const __m256i = b.as_ptr().cast();
            for (r, sums) in sums.iter_mut().enumerate() {
                let four = _mm256_set1_epi32(tile.four(r, k));
                for (group, sum) in sums.iter_mut().enumerate() {
                    let pairs = _mm256_maddubs_epi16(four, _mm256_loadu_si256(b.add(group)));
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        sums
    }
}

/// Adds the products of bounded weights for a group of columns: two steps' pairs are added as 16 bits before they are widened.
/// No pair can saturate: its weights of one sign add up to 128 at most, and 255 x 128 is 32,640. The sum of two pairs may wrap
/// until 128 times the weights are taken away; of activations less 128, at most 128 large, and weights whose sizes add up to 255 it
/// is at most 32,640 again. [`with_offset`] makes good for what was taken away.
///
/// # Safety
/// The processor has AVX2; the tile is a checked one of at least R rows. (Without the attribute that says so: with it, a
/// function cannot be inlined always, and the sums would go through memory.)
#[inline(always)]
unsafe fn products_of_bounded<const R: usize>(mut acc: [__m256i; R], tile: &Tile<'_>, group: usize) -> [__m256i; R] {
    let (twos, last) = tile.b.as_chunks::<2>();
    let (mut next, end) = fetched_by(group, tile.next);
    let a = tile.a.as_ptr();
    // The compiler is not to know that these are beside the others: it would load both at once, and take them apart in registers
    // at more than twice the cost.
    let further = std::hint::black_box(a.wrapping_add(4));
    // SAFETY: the instructions by contract; a group of a step has 32 bytes, and what is read of `a` is inside it by `check`.
    unsafe {
        let (ones, offset) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
        for (k, two) in twos.iter().enumerate() {
            if next < end {
                _mm_prefetch::<_MM_HINT_T0>(next);
                next = next.wrapping_add(LINE);
            }
            let b = two.each_ref().map(|b| _mm256_loadu_si256(b[4 * GROUP * group..].as_ptr().cast()));
            let offset = _mm256_add_epi16(_mm256_maddubs_epi16(offset, b[0]), _mm256_maddubs_epi16(offset, b[1]));
            let (a, further) = (a.add(k * tile.stride), further.add(k * tile.stride));
            for (r, acc) in acc.iter_mut().enumerate() {
                let fours = [a, further].map(|a| a.add(EIGHT * r).cast::<i32>().read_unaligned());
                let pairs = _mm256_add_epi16(
                    _mm256_maddubs_epi16(_mm256_set1_epi32(fours[0]), b[0]),
                    _mm256_maddubs_epi16(_mm256_set1_epi32(fours[1]), b[1]),
                );
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(_mm256_sub_epi16(pairs, offset), ones));
            }
        }
        for b in last {
            let b = _mm256_loadu_si256(b[4 * GROUP * group..].as_ptr().cast());
            let offset = _mm256_maddubs_epi16(offset, b);
            for (r, acc) in acc.iter_mut().enumerate() {
                let pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(tile.four(r, 2 * twos.len())), b);
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(_mm256_sub_epi16(pairs, offset), ones));
            }
        }
    }
    acc
}

/// The quarter of `next` that the pass over a group of columns fetches: from where to where. One after the other, as memory is
/// fastest: a line for each two steps.
#[inline(always)]
fn fetched_by(group: usize, next: &[Step]) -> (*const i8, *const i8) {
    let part = part_of(2 * next.len(), COLUMNS / GROUP, group);
    let bytes = next.as_flattened().as_ptr();
    (bytes.wrapping_add(LINE * part.start), bytes.wrapping_add(LINE * part.end))
}

/// Adds the products of any weights for a group of columns. So that no pair can saturate, the unsigned factor is the size of the
/// weight, at most 128, and the signed one the activation less 128, with its bits flipped where the weight is negative: 2 x 128 x
/// -128 is the least that 16 bits hold. Flipped bits are the negative less 1, which [`with_left_out`] makes good for all rows at
/// once.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn products<const R: usize>(mut acc: [__m256i; R], tile: &Tile<'_>, group: usize) -> [__m256i; R] {
    let (mut next, end) = fetched_by(group, tile.next);
    // SAFETY: as above.
    unsafe {
        let (ones, zero, top) = (_mm256_set1_epi16(1), _mm256_setzero_si256(), _mm256_set1_epi8(-128));
        for (k, step) in tile.b.iter().enumerate() {
            if next < end {
                _mm_prefetch::<_MM_HINT_T0>(next);
                next = next.wrapping_add(LINE);
            }
            let b = _mm256_loadu_si256(step[4 * GROUP * group..].as_ptr().cast());
            let (size, flip) = (_mm256_abs_epi8(b), _mm256_xor_si256(_mm256_cmpgt_epi8(zero, b), top));
            for (r, acc) in acc.iter_mut().enumerate() {
                let flipped = _mm256_xor_si256(_mm256_set1_epi32(tile.four(r, k)), flip);
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(_mm256_maddubs_epi16(size, flipped), ones));
            }
        }
    }
    acc
}

/// The products with one of the two encodings of 256-bit `vpdpbusd`: AVX-VNNI's, and AVX-512's for processors that have no
/// other, where it stands in for the first in tests.
macro_rules! vnni {
    ($name:ident, $features:literal, $dot:ident) => {
        /// # Safety
        /// `tile.check(R)` holds.
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize>(tile: Tile<'_>, sums: &mut [[i32; COLUMNS]]) {
            let init: *const __m256i = tile.init.as_ptr().cast();
            // SAFETY: `init` has 32 i32.
            let init = unsafe { [0, 1, 2, 3].map(|j| _mm256_loadu_si256(init.add(j))) };
            let mut acc = [init; R];
            for (k, b) in tile.b.iter().enumerate() {
                let b: *const __m256i = b.as_ptr().cast();
                let mut fours = [_mm256_setzero_si256(); R];
                for (r, four) in fours.iter_mut().enumerate() {
                    // SAFETY: a row and a step of a checked tile.
                    *four = _mm256_set1_epi32(unsafe { tile.four(r, k) });
                }
                for j in 0..4 {
                    // SAFETY: a step has 128 bytes.
                    let b = unsafe { _mm256_loadu_si256(b.add(j)) };
                    for r in 0..R {
                        acc[r][j] = $dot(acc[r][j], fours[r], b);
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                let to: *mut __m256i = sums.as_mut_ptr().cast();
                for (j, &acc) in acc.iter().enumerate() {
                    // SAFETY: a row of sums has 32 i32.
                    unsafe { _mm256_storeu_si256(to.add(j), acc) };
                }
            }
        }
    };
}

vnni!(product_vnni, "avx2,avxvnni", _mm256_dpbusd_avx_epi32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Portable;

    vnni!(product_evex, "avx2,avx512vl,avx512vnni", _mm256_dpbusd_epi32);

    #[test]
    #[cfg_attr(miri, ignore = "needs the instructions")]
    fn the_256_bit_vnni_product_equals_the_portable_one() {
        if !is_x86_feature_detected!("avx512vl") || !is_x86_feature_detected!("avx512vnni") {
            return;
        }
        let a: Vec<u8> = (0..7 * 40).map(|i| (i * 89 % 256) as u8).collect();
        let b: Vec<Step> = (0..13).map(|k| std::array::from_fn(|i| (k * 31 + i * 57) as u8 as i8)).collect();
        let init = std::array::from_fn(|i| i as i32 - 9);
        let tile = Tile { a: &a, stride: 40, b: &b, bounded: false, corrections: &init, init: &init, next: &[] };
        let (mut want, mut got) = ([[0; COLUMNS]; 12], [[0; COLUMNS]; 12]);
        Portable.tile(3, tile, &mut want);
        tile.check(3);
        // SAFETY: the features were detected and the tile checked.
        unsafe { product_evex::<3>(tile, &mut got) };
        assert_eq!(want, got);
    }
}
