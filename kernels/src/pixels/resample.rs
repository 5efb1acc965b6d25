//! Resampling of 8-bit RGB, an axis at a time: each output sample is a weighted sum of samples in a row or a column, with
//! weights of 22 fractional bits, rounded and clamped. That is Pillow's `ImagingResample` for 8-bit images.

use crate::Level;
use crate::pixels::upsample::on_level;

/// Fractional bits of a weight: 32 less those of a sample and two for sums above 1.
pub const WEIGHT_BITS: u32 = 22;
/// Bits of a weight's low part, so that either part has 16 bits.
const LOW_BITS: u32 = 11;
/// Samples that are multiplied at once.
const GROUP: usize = 4;

/// What an axis' output pixels are made of.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    outputs: Vec<Output>,
    groups: Vec<Group>,
    /// The same, whole, for columns.
    weights: Vec<i32>,
    /// Source pixels that are reached.
    end: usize,
}

#[derive(Clone, Copy, Debug)]
struct Output {
    /// First source pixel.
    start: u32,
    num_taps: u32,
    /// First of its groups; its weights start at `GROUP` times that.
    first_group: u32,
    /// Rounding, and what the surroundings of the picture give; red, green, blue, unused.
    base: [i32; 4],
}

/// Weights of four pixels, `(high << LOW_BITS) + low`; zero where there are fewer.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "read by the AVX2 form"))]
struct Group {
    high: [i16; GROUP],
    low: [i16; GROUP],
}

impl Weights {
    /// Without output pixels.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all output pixels and keeps the memory.
    pub fn clear(&mut self) {
        self.outputs.clear();
        self.groups.clear();
        self.weights.clear();
        self.end = 0;
    }

    /// Adds an output pixel: `weights` of the source pixels from `start` on, and `surroundings`, the sum of what other pixels
    /// give (weight times sample).
    pub fn push(&mut self, start: u32, weights: &[i32], surroundings: [i32; 3]) {
        let round = 1 << (WEIGHT_BITS - 1);
        let [red, green, blue] = surroundings.map(|sum| sum.wrapping_add(round));
        let (num_taps, first_group) = (weights.len() as u32, self.groups.len() as u32);
        self.outputs.push(Output { start, num_taps, first_group, base: [red, green, blue, round] });
        for weights in weights.chunks(GROUP) {
            let mut four = [0; GROUP];
            four[..weights.len()].copy_from_slice(weights);
            self.weights.extend(four);
            let low = four.map(|weight| (weight & ((1 << LOW_BITS) - 1)) as i16);
            self.groups.push(Group { high: four.map(|weight| (weight >> LOW_BITS) as i16), low });
        }
        self.end = self.end.max(start as usize + weights.len());
    }

    /// Output pixels.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outputs.len()
    }

    /// Whether there is no output pixel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    /// Source pixels that are reached, counted from the first.
    #[must_use]
    pub fn source_len(&self) -> usize {
        self.end
    }

    /// Bytes held.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        size_of::<Output>() * self.outputs.capacity()
            + size_of::<Group>() * self.groups.capacity()
            + size_of::<i32>() * self.weights.capacity()
    }
}

/// Rows of RGB pixels: `[height, width, 3]`, the rows `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// From the first pixel on.
    pub samples: &'a [u8],
    /// Bytes from row to row.
    pub stride: usize,
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// Where the samples end before the last row does.
    fn check(&self) {
        let Self { samples, stride, width, height } = *self;
        assert!(stride >= 3 * width, "rows do not overlap");
        assert!(height == 0 || samples.len() >= (height - 1) * stride + 3 * width, "room for all rows");
    }

    fn row(&self, y: usize) -> &'a [u8] {
        &self.samples[y * self.stride..][..3 * self.width]
    }
}

/// Resamples each row into `out` `[height, weights.len(), 3]`.
///
/// # Panics
/// Where the weights reach beyond a row, or `out` has another length.
pub fn horizontal(level: Level, weights: &Weights, source: Rows<'_>, out: &mut [u8]) {
    source.check();
    assert!(weights.end <= source.width, "{} pixels of {}", weights.end, source.width);
    let out_stride = 3 * weights.len();
    assert_eq!(out.len(), out_stride * source.height, "[height, outputs, 3]");
    if out.is_empty() {
        return;
    }
    match level.has_avx2() {
        // SAFETY: the level is at least AVX2, which is only made where it was detected.
        #[cfg(target_arch = "x86_64")]
        true => unsafe { avx2::horizontal(weights, source, out) },
        _ => {
            for (y, out) in out.chunks_exact_mut(out_stride).enumerate() {
                for (output, out) in weights.outputs.iter().zip(out.as_chunks_mut::<3>().0) {
                    *out = pixel(weights, output, source.row(y));
                }
            }
        }
    }
}

/// Resamples each column into `out` `[weights.len(), width, 3]`.
///
/// # Panics
/// Where the weights reach beyond the last row, or `out` has another length.
pub fn vertical(level: Level, weights: &Weights, source: Rows<'_>, out: &mut [u8]) {
    source.check();
    assert!(weights.end <= source.height, "{} rows of {}", weights.end, source.height);
    assert_eq!(out.len(), 3 * source.width * weights.len(), "[outputs, width, 3]");
    if out.is_empty() {
        return;
    }
    on_level!(level, vertical_avx2, columns(weights, source, out));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn vertical_avx2(weights: &Weights, source: Rows<'_>, out: &mut [u8]) {
    columns(weights, source, out);
}

/// One output pixel of a row.
#[inline]
fn pixel(weights: &Weights, output: &Output, row: &[u8]) -> [u8; 3] {
    let taps = &weights.weights[GROUP * output.first_group as usize..][..output.num_taps as usize];
    let [mut red, mut green, mut blue, _] = output.base;
    for (weight, rgb) in taps.iter().zip(row[3 * output.start as usize..].as_chunks::<3>().0) {
        red = red.wrapping_add(weight.wrapping_mul(i32::from(rgb[0])));
        green = green.wrapping_add(weight.wrapping_mul(i32::from(rgb[1])));
        blue = blue.wrapping_add(weight.wrapping_mul(i32::from(rgb[2])));
    }
    [red, green, blue].map(rounded)
}

#[inline(always)]
fn rounded(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// Sums that stay in registers: a multiple of three, so that each starts with a red sample.
const COLUMNS: usize = 48;

#[inline(always)]
fn columns(weights: &Weights, source: Rows<'_>, out: &mut [u8]) {
    let row_bytes = 3 * source.width;
    for (output, out) in weights.outputs.iter().zip(out.chunks_exact_mut(row_bytes)) {
        let taps = &weights.weights[GROUP * output.first_group as usize..][..output.num_taps as usize];
        let rows = &source.samples[output.start as usize * source.stride..];
        let [red, green, blue, _] = output.base;
        let base: [i32; COLUMNS] = std::array::from_fn(|i| [red, green, blue][i % 3]);
        let whole = row_bytes / COLUMNS * COLUMNS;
        for (start, out) in (0..whole).step_by(COLUMNS).zip(out.as_chunks_mut::<COLUMNS>().0) {
            let mut sums = base;
            for (t, &weight) in taps.iter().enumerate() {
                let Some(samples) = rows[t * source.stride + start..].first_chunk::<COLUMNS>() else { continue };
                for (sum, &sample) in sums.iter_mut().zip(samples) {
                    *sum = sum.wrapping_add(weight.wrapping_mul(i32::from(sample)));
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = rounded(sum);
            }
        }
        for (i, out) in out.iter_mut().enumerate().skip(whole) {
            let mut sum = base[i % 3];
            for (t, &weight) in taps.iter().enumerate() {
                sum = sum.wrapping_add(weight.wrapping_mul(i32::from(rows[t * source.stride + i])));
            }
            *out = rounded(sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{GROUP, Group, LOW_BITS, Output, Rows, WEIGHT_BITS, Weights, pixel};

    /// Rows that are done at once, so that weights are read once for all of them.
    const ROWS: usize = 4;
    /// Bytes that are read for a group, of which 12 count.
    const READ: usize = 16;

    /// Samples of four pixels as pairs of 16 bits, pixels 0 and 1 and pixels 2 and 3: red, green; in the high lane blue.
    const PAIRS: [i8; 32] = [
        0, -1, 3, -1, 6, -1, 9, -1, 1, -1, 4, -1, 7, -1, 10, -1, //
        2, -1, 5, -1, 8, -1, 11, -1, -1, -1, -1, -1, -1, -1, -1, -1,
    ];

    #[target_feature(enable = "avx2")]
    pub(super) fn horizontal(weights: &Weights, source: Rows<'_>, out: &mut [u8]) {
        let out_stride = 3 * weights.len();
        let mut y = 0;
        for out in out.chunks_mut(ROWS * out_stride) {
            match out.len() / out_stride {
                ROWS => rows::<ROWS>(weights, source, y, out),
                num_rows => {
                    for (i, out) in out.chunks_mut(out_stride).enumerate().take(num_rows) {
                        rows::<1>(weights, source, y + i, out);
                    }
                }
            }
            y += ROWS;
        }
    }

    #[target_feature(enable = "avx2")]
    fn rows<const N: usize>(weights: &Weights, source: Rows<'_>, y: usize, out: &mut [u8]) {
        let out_stride = 3 * weights.len();
        // Each row with all that lies behind it. (Loops, not closures: those would not be compiled for AVX2.)
        let mut from = [source.samples; N];
        for (i, from) in from.iter_mut().enumerate() {
            *from = &source.samples[(y + i) * source.stride..];
        }
        let shortest = from[N - 1].len();
        for (x, output) in weights.outputs.iter().enumerate() {
            let num_groups = (output.num_taps as usize).div_ceil(GROUP);
            let groups = &weights.groups[output.first_group as usize..][..num_groups];
            let start = 3 * output.start as usize;
            let num_bytes = 3 * GROUP * num_groups + READ - 3 * GROUP;
            let pixels: [[u8; 3]; N] = match start + num_bytes <= shortest {
                // SAFETY: all rows have as many bytes from `start` on as the groups read.
                true => unsafe { sums(&from, start, groups, output) },
                // The last pixels of a picture: reading whole groups would leave it.
                false => {
                    let mut pixels = [[0; 3]; N];
                    for (i, found) in pixels.iter_mut().enumerate() {
                        *found = pixel(weights, output, source.row(y + i));
                    }
                    pixels
                }
            };
            for (i, pixel) in pixels.iter().enumerate() {
                out[i * out_stride + 3 * x..][..3].copy_from_slice(pixel);
            }
        }
    }

    /// One output pixel of each row, from byte `start` on.
    ///
    /// # Safety
    /// Behind `start` each of `from` has 12 bytes for each group and four more.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sums<const N: usize>(from: &[&[u8]; N], start: usize, groups: &[Group], output: &Output) -> [[u8; 3]; N] {
        // SAFETY: 32 bytes.
        let pairs = unsafe { _mm256_loadu_si256(PAIRS.as_ptr().cast()) };
        let (mut high, mut low) = ([_mm256_setzero_si256(); N], [_mm256_setzero_si256(); N]);
        for (g, group) in groups.iter().enumerate() {
            let (group_high, group_low) = (group.high.as_ptr().cast::<i64>(), group.low.as_ptr().cast::<i64>());
            // SAFETY: four values of 16 bits are 8 bytes.
            let (group_high, group_low) = unsafe { (group_high.read_unaligned(), group_low.read_unaligned()) };
            let (group_high, group_low) = (_mm256_set1_epi64x(group_high), _mm256_set1_epi64x(group_low));
            for i in 0..N {
                // SAFETY: from `start` on there are 12 bytes for each group and four behind the last.
                let samples = unsafe { _mm_loadu_si128(from[i].as_ptr().add(start + 3 * GROUP * g).cast()) };
                let samples = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(samples), pairs);
                high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(samples, group_high));
                low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(samples, group_low));
            }
        }
        // SAFETY: four values of 32 bits are 16 bytes.
        let base = unsafe { _mm_loadu_si128(output.base.as_ptr().cast()) };
        let mut pixels = [[0; 3]; N];
        for i in 0..N {
            let sums = _mm256_add_epi32(_mm256_slli_epi32::<{ LOW_BITS as i32 }>(high[i]), low[i]);
            let rgb = _mm_hadd_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            let rgb = _mm_srai_epi32::<{ WEIGHT_BITS as i32 }>(_mm_add_epi32(rgb, base));
            let rgb = _mm_packus_epi16(_mm_packs_epi32(rgb, rgb), rgb);
            let [red, green, blue, _] = _mm_cvtsi128_si32(rgb).to_le_bytes();
            pixels[i] = [red, green, blue];
        }
        pixels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u32) -> impl FnMut(u32) -> u32 {
        let mut state = seed;
        move |range| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % range
        }
    }

    /// Weights that sum to about one, some of them negative.
    fn weights(next: &mut impl FnMut(u32) -> u32, source: usize, num_outputs: usize) -> Weights {
        let mut weights = Weights::new();
        for _ in 0..num_outputs {
            let num_taps = 1 + next(11.min(source as u32)) as usize;
            let start = next((source - num_taps + 1) as u32);
            let one = 1 << WEIGHT_BITS;
            let taps: Vec<i32> = (0..num_taps).map(|_| next(one / 8) as i32 - (one / 32) as i32).collect();
            weights.push(start, &taps, [next(one) as i32, 0, -(next(one) as i32)]);
        }
        weights
    }

    #[test]
    fn both_axes_give_the_sums_of_the_definition_at_every_level() {
        let mut next = random(1);
        for (width, height) in [(1, 1), (5, 3), (40, 9), (17, 33), (64, 4), (3, 21)] {
            let stride = 3 * width + 3 * (width % 4);
            let samples: Vec<u8> = (0..(height - 1) * stride + 3 * width).map(|_| next(256) as u8).collect();
            let source = Rows { samples: &samples, stride, width, height };
            let along = weights(&mut next, width, 13);
            let down = weights(&mut next, height, 7);
            let sum = |output: &Output, weights: &Weights, c: usize, at: &dyn Fn(usize) -> u8| {
                let taps = &weights.weights[GROUP * output.first_group as usize..][..output.num_taps as usize];
                let sum: i64 = taps.iter().enumerate().map(|(t, &w)| i64::from(w) * i64::from(at(t))).sum();
                ((sum + i64::from(output.base[c])) >> WEIGHT_BITS).clamp(0, 255) as u8
            };
            for level in Level::available() {
                let mut out = vec![0; 3 * 13 * height];
                horizontal(level, &along, source, &mut out);
                for (i, &found) in out.iter().enumerate() {
                    let (y, x, c) = (i / 39, i / 3 % 13, i % 3);
                    let output = &along.outputs[x];
                    let expected =
                        sum(output, &along, c, &|t| samples[y * stride + 3 * (output.start as usize + t) + c]);
                    assert_eq!(found, expected, "{} {width}x{height} at {i}", level.name());
                }
                let mut out = vec![0; 3 * 7 * width];
                vertical(level, &down, source, &mut out);
                for (i, &found) in out.iter().enumerate() {
                    let (y, x) = (i / (3 * width), i % (3 * width));
                    let output = &down.outputs[y];
                    let expected = sum(output, &down, x % 3, &|t| samples[(output.start as usize + t) * stride + x]);
                    assert_eq!(found, expected, "{} {width}x{height} at {i}", level.name());
                }
            }
        }
    }
}
