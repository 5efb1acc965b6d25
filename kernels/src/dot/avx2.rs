//! AVX2, with and without VNNI.
//!
//! Without it, the sign of a weight goes to the activation, so that no sum of 16 bits saturates (see [`products`]).

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{COLUMNS, Dot, ROWS, Scales, Step, Sums, Tile, with_rows};
use crate::simd::avx2::Avx2;

/// Rows at a time with VNNI: 3 x 4 accumulators of 8 lanes leave four registers for operands.
const VNNI_ROWS: usize = 3;

/// Columns of a vector, with four k each.
const EIGHT: usize = 8;

/// Steps whose activations are put side by side: 12 rows of them take 6 KB, which leaves most of the first-level cache to weights.
pub(crate) const CHUNK: usize = 128;

impl<const VNNI: bool> Dot for Avx2<VNNI> {
    #[inline(always)]
    fn start(self, b: &[Step], corrections: [i32; COLUMNS]) -> [i32; COLUMNS] {
        if VNNI {
            return corrections;
        }
        // SAFETY: the token proves the instructions.
        unsafe { with_left_out(b, corrections) }
    }

    #[inline(always)]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        if !VNNI {
            with_rows!(rows, product(tile, sums), 1 2 3 4 5 6 7 8 9 10 11 12);
            return;
        }
        for first in (0..rows).step_by(VNNI_ROWS) {
            let tile = Tile { a: &tile.a[first * tile.stride..], ..tile };
            let (rows, sums) = (VNNI_ROWS.min(rows - first), &mut sums[first..]);
            with_rows!(rows, product_vnni(tile, sums), 1 2 3);
        }
    }
}

impl Avx2<false> {
    /// [`Simd::add_tile`](crate::simd::Simd::add_tile).
    #[inline(always)]
    pub(crate) fn add_product(self, rows: usize, tile: Tile<'_>, scales: Scales<'_>, acc: &mut [[f32; COLUMNS]; ROWS]) {
        tile.check(rows);
        assert!(tile.b.len() <= CHUNK, "bug: sums of several chunks have no place");
        with_rows!(rows, product_add(tile, (scales, acc)), 1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// `corrections`, and for each column what [`products`] leave out: 128 times its weights, and once the size of the negative ones.
#[target_feature(enable = "avx2")]
fn with_left_out(b: &[Step], corrections: [i32; COLUMNS]) -> [i32; COLUMNS] {
    let mut starts = corrections;
    let (one, zero) = (_mm256_set1_epi8(1), _mm256_setzero_si256());
    // 128 steps of pairs between -256 and 254 are what 16 bits hold.
    for b in b.chunks(128) {
        for (part, starts) in starts.as_chunks_mut::<EIGHT>().0.iter_mut().enumerate() {
            // 128 w for a positive weight, 127 w for a negative one: 127 times all and once the positive.
            let (mut all, mut positive) = (zero, zero);
            for step in b {
                // SAFETY: a quarter of a step has 32 bytes.
                let b = unsafe { _mm256_loadu_si256(step[4 * EIGHT * part..][..4 * EIGHT].as_ptr().cast()) };
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
unsafe fn product<const R: usize>(tile: Tile<'_>, sums: &mut [[i32; COLUMNS]]) {
    let sums: &mut [[i32; COLUMNS]; R] = (&mut sums[..R]).try_into().expect("bug: a slice of its length");
    let mut near = Near::<R>([const { [MaybeUninit::uninit(); 4 * CHUNK] }; R]);
    for (number, b) in tile.b.chunks(CHUNK).enumerate() {
        near.copy(&tile.a[number * 4 * CHUNK..], tile.stride, b.len());
        let next = tile.next.chunks(CHUNK).nth(number).unwrap_or(&[]);
        for part in 0..COLUMNS / EIGHT {
            let at = EIGHT * part;
            let mut acc = [_mm256_setzero_si256(); R];
            for (acc, sums) in acc.iter_mut().zip(&*sums) {
                let from = if number == 0 { tile.init } else { sums };
                // SAFETY: eight i32.
                *acc = unsafe { _mm256_loadu_si256(from[at..][..EIGHT].as_ptr().cast()) };
            }
            // SAFETY: as many steps as were copied.
            acc = unsafe { products(acc, &near, part, b, next) };
            for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                // SAFETY: eight i32.
                unsafe { _mm256_storeu_si256(sums[at..][..EIGHT].as_mut_ptr().cast(), *acc) };
            }
        }
    }
}

/// As [`product`], of one chunk, scaled and added to floats without a way through memory.
///
/// # Safety
/// `tile.check(R)` holds.
#[target_feature(enable = "avx2,fma")]
unsafe fn product_add<const R: usize>(tile: Tile<'_>, (scales, to): (Scales<'_>, &mut [[f32; COLUMNS]; ROWS])) {
    let mut near = Near::<R>([const { [MaybeUninit::uninit(); 4 * CHUNK] }; R]);
    near.copy(tile.a, tile.stride, tile.b.len());
    let of_columns = match scales {
        Scales::Rows(_) => &[1.0; COLUMNS],
        Scales::Columns(columns) | Scales::Both(_, columns) => columns,
    };
    for part in 0..COLUMNS / EIGHT {
        let at = EIGHT * part;
        // SAFETY: eight i32.
        let acc = [unsafe { _mm256_loadu_si256(tile.init[at..][..EIGHT].as_ptr().cast()) }; R];
        // SAFETY: as many steps as were copied.
        let acc = unsafe { products(acc, &near, part, tile.b, tile.next) };
        // SAFETY: eight f32.
        let of_columns = unsafe { _mm256_loadu_ps(of_columns[at..][..EIGHT].as_ptr()) };
        for (r, (acc, to)) in acc.iter().zip(&mut *to).enumerate() {
            let scale = match scales {
                Scales::Rows(rows) => _mm256_set1_ps(rows[r]),
                Scales::Columns(_) => of_columns,
                Scales::Both(rows, _) => _mm256_mul_ps(_mm256_set1_ps(rows[r]), of_columns),
            };
            let to = to[at..][..EIGHT].as_mut_ptr();
            // SAFETY: eight f32.
            unsafe { _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*acc), scale, _mm256_loadu_ps(to))) };
        }
    }
}

/// Activations of a chunk's steps, side by side: where they lie they may be a power of two apart, which a cache does not like.
struct Near<const R: usize>([[MaybeUninit<u8>; 4 * CHUNK]; R]);

impl<const R: usize> Near<R> {
    /// Copies R rows of some steps.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn copy(&mut self, a: &[u8], stride: usize, steps: usize) {
        for (r, near) in self.0.iter_mut().enumerate() {
            copy(&a[r * stride..][..4 * steps], near);
        }
    }
}

/// Adds the products of eight columns by `vpmaddubsw`, the only one of bytes that AVX2 has: unsigned times signed bytes, summed
/// in pairs to 16 bits, which saturate. So that no pair can, the unsigned factor is the size of the weight, at most 128, and the
/// signed one the activation less 128, with its bits flipped where the weight is negative: 2 x 128 x -128 is the least that 16
/// bits hold. Flipped bits are the negative less 1, which [`with_left_out`] makes good for all rows at once.
///
/// # Safety
/// `near` has as many steps as `b`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn products<const R: usize>(
    mut acc: [__m256i; R],
    near: &Near<R>,
    part: usize,
    b: &[Step],
    next: &[Step],
) -> [__m256i; R] {
    let (ones, zero, top) = (_mm256_set1_epi16(1), _mm256_setzero_si256(), _mm256_set1_epi8(-128));
    let near: *const [u8; 4 * CHUNK] = near.0.as_ptr().cast();
    let next: *const i8 = next.as_ptr().cast();
    for (k, step) in b.iter().enumerate() {
        // A hint, which takes any address: behind `next` lies what comes after it.
        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(size_of::<Step>() * k + 4 * EIGHT * part));
        // SAFETY: a quarter of a step has 32 bytes.
        let b = unsafe { _mm256_loadu_si256(step[4 * EIGHT * part..][..4 * EIGHT].as_ptr().cast()) };
        let (size, flip) = (_mm256_abs_epi8(b), _mm256_xor_si256(_mm256_cmpgt_epi8(zero, b), top));
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: step k of what was copied.
            let four = unsafe { near.add(r).cast::<i32>().add(k).read_unaligned() };
            let pairs = _mm256_maddubs_epi16(size, _mm256_xor_si256(_mm256_set1_epi32(four), flip));
            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pairs, ones));
        }
    }
    acc
}

/// Copies `from` to the beginning of `to`, which is at least as long.
#[inline]
#[target_feature(enable = "avx2")]
fn copy(from: &[u8], to: &mut [MaybeUninit<u8>]) {
    // A block is 128 elements long: so many are copied without a call.
    if let (Ok(from), Some(to)) = (<&[u8; 128]>::try_from(from), to.first_chunk_mut::<128>()) {
        *to = from.map(MaybeUninit::new);
        return;
    }
    to.iter_mut().zip(from).for_each(|(to, &from)| {
        to.write(from);
    });
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
                let b: &Step = b;
                let b: *const __m256i = b.as_ptr().cast();
                let mut fours = [_mm256_setzero_si256(); R];
                for (r, four) in fours.iter_mut().enumerate() {
                    let a = tile.a.as_ptr();
                    // SAFETY: step k of row r, inside `tile.a` by `check`.
                    *four = _mm256_set1_epi32(unsafe { a.add(r * tile.stride + 4 * k).cast::<i32>().read_unaligned() });
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
        let a: Vec<u8> = (0..3 * 52).map(|i| (i * 89 % 256) as u8).collect();
        let b: Vec<Step> = (0..13).map(|k| std::array::from_fn(|i| (k * 31 + i * 57) as u8 as i8)).collect();
        let init = std::array::from_fn(|i| i as i32 - 9);
        let tile = Tile { a: &a, stride: 52, b: &b, init: &init, next: &[] };
        let (mut want, mut got) = ([[0; COLUMNS]; 12], [[0; COLUMNS]; 12]);
        Portable.tile(3, tile, &mut want);
        tile.check(3);
        // SAFETY: the features were detected and the tile checked.
        unsafe { product_evex::<3>(tile, &mut got) };
        assert_eq!(want, got);
    }
}
