//! Greedy decoding: the index of each row's largest logit.

use crate::error::check_len;
use crate::level::Work;
use crate::math::{Times, sum_of};
use crate::simd::{LANES, Simd};
use crate::workers::{Shared, Workers};
use crate::{Error, Level};

/// What stands for a row that has a NaN or an infinity.
pub const NO_ID: i64 = -1;

/// For each row of `logits` `[rows, columns]` the index of its largest value, the first of equal ones, or [`NO_ID`].
pub fn greedy_ids(
    level: Level,
    workers: &dyn Workers,
    logits: &[f32],
    columns: usize,
    ids: &mut [i64],
) -> Result<(), Error> {
    if columns == 0 {
        return Err(Error::Shape("greedy ids: rows without logits".to_owned()));
    }
    check_len("logits", ids.len().saturating_mul(columns), logits.len())?;
    let num_rows = ids.len();
    let ids = Shared::new(ids);
    workers.for_each(num_rows, &|row| {
        let id = level.dispatch(Row(&logits[row * columns..][..columns]));
        // SAFETY: a task has one row, which no other has.
        let place = unsafe { ids.part(row, 1) };
        place[0] = id;
    });
    Ok(())
}

struct Row<'a>(&'a [f32]);

impl Work for Row<'_> {
    type Output = i64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> i64 {
        let zero = s.splat(0.0);
        let zeros = sum_of(s, self.0, Times(zero));
        if zeros.is_nan() {
            return NO_ID;
        }
        let (vectors, tail) = self.0.as_chunks::<LANES>();
        let least = s.splat(f32::NEG_INFINITY);
        let largest = vectors.iter().fold(least, |largest, x| s.max(s.load(x), largest));
        let largest = tail.iter().fold(s.largest(largest), |largest, &x| largest.max(x));
        // Without leaving a vector early, so that it is one comparison.
        let has = |x: &[f32; LANES]| x.iter().fold(false, |found, &x| found | (x == largest));
        let start = LANES * vectors.iter().position(has).unwrap_or(vectors.len());
        self.0[start..].iter().position(|&x| x == largest).map_or(NO_ID, |index| (start + index) as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Serial;

    fn ids(logits: &[f32], columns: usize) -> Vec<i64> {
        let all = Level::available().into_iter().map(|level| {
            let mut ids = vec![7; logits.len() / columns];
            greedy_ids(level, &Serial, logits, columns, &mut ids).expect("lengths fit");
            ids
        });
        let all: Vec<_> = all.collect();
        assert!(all.iter().all(|ids| *ids == all[0]), "{all:?}");
        all[0].clone()
    }

    #[test]
    fn the_first_of_the_largest_wins_wherever_it_is() {
        for columns in [1, 15, 16, 17, 100] {
            for at in 0..columns {
                let mut row = vec![-3.0; columns];
                row[at..].fill(-2.5);
                assert_eq!(ids(&row, columns), [at as i64], "{columns}");
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_has_no_id_and_spoils_no_other() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in 0..40 {
                let mut rows = vec![0.5; 120];
                rows[3] = 1.0;
                rows[40 + at] = bad;
                rows[119] = 1.0;
                assert_eq!(ids(&rows, 40), [3, NO_ID, 39]);
            }
        }
    }

    #[test]
    fn lengths_are_checked() {
        assert!(greedy_ids(Level::PORTABLE, &Serial, &[0.0; 3], 2, &mut [0, 0]).is_err());
        assert!(greedy_ids(Level::PORTABLE, &Serial, &[], 0, &mut []).is_err());
        // Two rows of half of all addresses are not none.
        assert!(greedy_ids(Level::PORTABLE, &Serial, &[], usize::MAX / 2 + 1, &mut [0, 0]).is_err());
    }
}
