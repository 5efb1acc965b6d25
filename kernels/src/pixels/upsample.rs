//! Chroma upsampling by two with a triangle filter, three parts of the nearest sample to one of the next: libjpeg's "fancy
//! upsampling", its roundings included (they alternate, so that no brightness drifts).

use crate::Level;

/// Compiled with AVX2 where it is there: the loops inside are the compiler's to vectorise.
macro_rules! on_level {
    ($level:expr, $avx2:ident, $body:ident ( $($arg:expr),* )) => {
        match $level.has_avx2() {
            // SAFETY: the level is at least AVX2, which is only made where it was detected.
            #[cfg(target_arch = "x86_64")]
            true => unsafe { $avx2($($arg),*) },
            _ => $body($($arg),*),
        }
    };
}
pub(super) use on_level;

/// One row, twice as wide: for 4:2:2. `out` is twice as long as `row`, which has at least three samples.
pub fn upsample_columns(level: Level, row: &[u8], out: &mut [u8]) {
    assert!(row.len() > 2 && out.len() == 2 * row.len(), "{} samples into {}", row.len(), out.len());
    on_level!(level, columns_avx2, columns(row, out));
}

/// One of the two rows between `near` and its neighbour `far`, twice as wide: for 4:2:0. `sums` is scratch as long as `near`.
pub fn upsample_columns_and_rows(level: Level, near: &[u8], far: &[u8], sums: &mut [u16], out: &mut [u8]) {
    let length = near.len();
    assert!(length > 2 && far.len() == length && sums.len() == length && out.len() == 2 * length, "equal lengths");
    on_level!(level, both_avx2, both(near, far, sums, out));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn columns_avx2(row: &[u8], out: &mut [u8]) {
    columns(row, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn both_avx2(near: &[u8], far: &[u8], sums: &mut [u16], out: &mut [u8]) {
    both(near, far, sums, out);
}

#[inline(always)]
fn columns(row: &[u8], out: &mut [u8]) {
    let n = row.len();
    let wide = |i: usize| u16::from(row[i]);
    out[0] = row[0];
    out[1] = ((3 * wide(0) + wide(1) + 2) >> 2) as u8;
    out[2 * n - 2] = ((3 * wide(n - 1) + wide(n - 2) + 1) >> 2) as u8;
    out[2 * n - 1] = row[n - 1];
    let inner = row[..n - 2].iter().zip(&row[1..n - 1]).zip(&row[2..]);
    for (((&before, &here), &after), out) in inner.zip(out[2..2 * n - 2].as_chunks_mut::<2>().0) {
        let here = 3 * u16::from(here);
        *out = [((here + u16::from(before) + 1) >> 2) as u8, ((here + u16::from(after) + 2) >> 2) as u8];
    }
}

#[inline(always)]
fn both(near: &[u8], far: &[u8], sums: &mut [u16], out: &mut [u8]) {
    let n = near.len();
    for ((&near, &far), sum) in near.iter().zip(far).zip(&mut *sums) {
        *sum = 3 * u16::from(near) + u16::from(far);
    }
    let sums = &*sums;
    out[0] = ((4 * sums[0] + 8) >> 4) as u8;
    out[1] = ((3 * sums[0] + sums[1] + 7) >> 4) as u8;
    out[2 * n - 2] = ((3 * sums[n - 1] + sums[n - 2] + 8) >> 4) as u8;
    out[2 * n - 1] = ((4 * sums[n - 1] + 7) >> 4) as u8;
    let inner = sums[..n - 2].iter().zip(&sums[1..n - 1]).zip(&sums[2..]);
    for (((&before, &here), &after), out) in inner.zip(out[2..2 * n - 2].as_chunks_mut::<2>().0) {
        *out = [((3 * here + before + 8) >> 4) as u8, ((3 * here + after + 7) >> 4) as u8];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ramp_stays_a_ramp_at_every_level() {
        for length in [3, 4, 17, 33, 100] {
            let near: Vec<u8> = (0..length).map(|i| 2 * i as u8).collect();
            let far: Vec<u8> = near.iter().map(|&sample| sample + 4).collect();
            let end = near[length - 1];
            for level in Level::available() {
                let (mut wide, mut sums) = (vec![0; 2 * length], vec![0; length]);
                upsample_columns(level, &near, &mut wide);
                // A quarter of the way to either neighbour, rounded down and up in turn; the ends are kept.
                for (i, &sample) in wide.iter().enumerate().take(2 * length - 2).skip(2) {
                    let here = near[i / 2];
                    // 4 * here - 2 + 1 and 4 * here + 2 + 2 quarters.
                    assert_eq!(sample, if i % 2 == 0 { here - 1 } else { here + 1 }, "{i} of {length}");
                }
                assert_eq!((wide[0], wide[2 * length - 1]), (0, end));
                // One more everywhere: a quarter of the way to the row that has four more.
                upsample_columns_and_rows(level, &near, &far, &mut sums, &mut wide);
                assert_eq!((wide[0], wide[1], wide[2 * length - 1]), (1, 1, end + 1));
            }
        }
    }
}
