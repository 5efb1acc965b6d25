//! YCbCr to RGB: ITU-R BT.601 as JFIF has it, 16 fractional bits, rounded; the samples are libjpeg's.

use crate::Level;

/// One row: `out` is `[width, 3]`.
pub fn ycc_to_rgb(level: Level, y: &[u8], cb: &[u8], cr: &[u8], out: &mut [u8]) {
    let width = y.len();
    assert!(cb.len() == width && cr.len() == width && out.len() == 3 * width, "equal widths");
    let done = match level.has_avx2() {
        // SAFETY: the level is at least AVX2, which is only made where it was detected.
        #[cfg(target_arch = "x86_64")]
        true => unsafe { avx2::ycc_to_rgb(y, cb, cr, out) },
        _ => 0,
    };
    let chroma = cb[done..].iter().zip(&cr[done..]);
    for ((&y, (&cb, &cr)), rgb) in y[done..].iter().zip(chroma).zip(out[3 * done..].as_chunks_mut::<3>().0) {
        *rgb = pixel(y, cb, cr);
    }
}

/// One row: `out` is `[width, 3]`, each sample three times.
pub fn grey_to_rgb(y: &[u8], out: &mut [u8]) {
    for (&y, rgb) in y.iter().zip(out.as_chunks_mut::<3>().0) {
        *rgb = [y; 3];
    }
}

#[inline(always)]
fn pixel(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let [y, cb, cr] = [i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128];
    let red = y + ((91_881 * cr + HALF) >> 16);
    let green = y + ((-22_554 * cb - 46_802 * cr + HALF) >> 16);
    let blue = y + ((116_130 * cb + HALF) >> 16);
    [red, green, blue].map(|sample| sample.clamp(0, 255) as u8)
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    /// Bytes of `[r0..r7, g0..g7]` and `[b0..b7, ..]` that make pixels 0 to 7; -1 gives zero.
    const RED_GREEN: [[i8; 16]; 2] = [
        [0, 8, -1, 1, 9, -1, 2, 10, -1, 3, 11, -1, 4, 12, -1, 5],
        [13, -1, 6, 14, -1, 7, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1],
    ];
    const BLUE: [[i8; 16]; 2] = [
        [-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1],
        [-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, -1, -1, -1, -1, -1, -1],
    ];

    /// Does whole groups of sixteen pixels; how many pixels those were.
    ///
    /// The products are split so that 16 bits hold them: 91881 = 65536 + 26345, 116130 = 2 * 65536 - 14942 and
    /// -46802 = -65536 + 18734.
    #[target_feature(enable = "avx2")]
    pub(super) fn ycc_to_rgb(y: &[u8], cb: &[u8], cr: &[u8], out: &mut [u8]) -> usize {
        let sixteen = |from: &[u8; 16]| -> __m256i {
            // SAFETY: sixteen bytes.
            unsafe { _mm256_cvtepu8_epi16(_mm_loadu_si128(from.as_ptr().cast())) }
        };
        let mask = |bytes: &[i8; 16]| -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) }
        };
        let (red_green, blue) = (RED_GREEN.each_ref().map(mask), BLUE.each_ref().map(mask));
        let (center, one) = (_mm256_set1_epi16(128), _mm256_set1_epi16(1));
        let half = _mm256_set1_epi32(1 << 15);
        // Pairs of factors of Cb (low half) and Cr.
        let green_factors = _mm256_set1_epi32((18_734 << 16) | (-22_554_i32 & 0xffff));
        let groups = y.as_chunks::<16>().0.iter().zip(cb.as_chunks::<16>().0).zip(cr.as_chunks::<16>().0);
        let mut done = 0;
        for (((y, cb), cr), out) in groups.zip(out.as_chunks_mut::<48>().0) {
            let y = sixteen(y);
            let (cb, cr) = (_mm256_sub_epi16(sixteen(cb), center), _mm256_sub_epi16(sixteen(cr), center));
            let (cb2, cr2) = (_mm256_add_epi16(cb, cb), _mm256_add_epi16(cr, cr));
            let r = _mm256_add_epi16(_mm256_mulhi_epi16(cr2, _mm256_set1_epi16(26_345)), one);
            let r = _mm256_add_epi16(_mm256_add_epi16(y, cr), _mm256_srai_epi16::<1>(r));
            let b = _mm256_add_epi16(_mm256_mulhi_epi16(cb2, _mm256_set1_epi16(-14_942)), one);
            let b = _mm256_add_epi16(_mm256_add_epi16(y, cb2), _mm256_srai_epi16::<1>(b));
            let low = _mm256_madd_epi16(_mm256_unpacklo_epi16(cb, cr), green_factors);
            let high = _mm256_madd_epi16(_mm256_unpackhi_epi16(cb, cr), green_factors);
            let low = _mm256_srai_epi32::<16>(_mm256_add_epi32(low, half));
            let high = _mm256_srai_epi32::<16>(_mm256_add_epi32(high, half));
            let g = _mm256_add_epi16(_mm256_sub_epi16(y, cr), _mm256_packs_epi32(low, high));
            // Pixels 0 to 7 in the low lane, 8 to 15 in the high lane.
            let (rg, b) = (_mm256_packus_epi16(r, g), _mm256_packus_epi16(b, b));
            let join =
                |i: usize| _mm256_or_si256(_mm256_shuffle_epi8(rg, red_green[i]), _mm256_shuffle_epi8(b, blue[i]));
            let (start, end) = (join(0), join(1));
            let to = out.as_mut_ptr();
            // SAFETY: 16 + 8 + 16 + 8 bytes fill the 48 of `out`.
            unsafe {
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(start));
                _mm_storel_epi64(to.add(16).cast(), _mm256_castsi256_si128(end));
                _mm_storeu_si128(to.add(24).cast(), _mm256_extracti128_si256::<1>(start));
                _mm_storel_epi64(to.add(40).cast(), _mm256_extracti128_si256::<1>(end));
            }
            done += 16;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "takes too long; the next one runs the same code")]
    fn every_colour_is_the_same_at_every_level() {
        let levels = Level::available();
        let all: Vec<u8> = (0..=255).collect();
        for cb in 0..=255 {
            for cr in (0..=255).step_by(3) {
                let expected: Vec<u8> = all.iter().flat_map(|&y| pixel(y, cb, cr)).collect();
                for &level in &levels {
                    let mut found = vec![0; 3 * 256];
                    ycc_to_rgb(level, &all, &[cb; 256], &[cr; 256], &mut found);
                    assert_eq!(found, expected, "{}: {cb} {cr}", level.name());
                }
            }
        }
    }

    #[test]
    fn a_rest_of_any_length_is_done() {
        for width in 0..50 {
            let row: Vec<u8> = (0..width).map(|i| (5 * i) as u8).collect();
            let expected: Vec<u8> = row.iter().flat_map(|&y| pixel(y, 200 - y / 2, y / 3)).collect();
            let (cb, cr): (Vec<u8>, Vec<u8>) = row.iter().map(|&y| (200 - y / 2, y / 3)).unzip();
            for level in Level::available() {
                let mut found = vec![0; 3 * width];
                ycc_to_rgb(level, &row, &cb, &cr, &mut found);
                assert_eq!(found, expected);
            }
        }
    }
}
