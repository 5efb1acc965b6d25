//! A weight with a LoRA update: `W + scale * B A`, computed in f32 as `W` streams by, some rows at a time.

use crate::error::Result;
use crate::tensor::StoredTensor;

/// Columns computed at a time: with the rank of 128 that LLaVA trains, 256 KiB of `right`.
const TILE_COLUMNS: usize = 512;

/// The update of one weight `[rows, columns]`.
#[derive(Clone)]
pub(crate) struct LowRank<'a> {
    /// `lora_A` `[rank, columns]`, or `lora_embedding_B` `[columns, rank]`.
    pub(super) right: StoredTensor<'a>,
    /// `lora_B` `[rows, rank]`, or `lora_embedding_A` `[rank, rows]`.
    pub(super) left: StoredTensor<'a>,
    /// Whether both lie transposed, as embeddings' do.
    pub(super) is_transposed: bool,
    pub(super) scale: f32,
    /// Row of the update that goes with the first row of the weight.
    pub(super) first_row: usize,
}

impl LowRank<'_> {
    /// For the rows of the weight from `first` on.
    pub(crate) fn rows(&self, first: usize) -> Self {
        Self { first_row: self.first_row + first, ..self.clone() }
    }

    /// Reads the factors of `num_rows` rows.
    pub(crate) fn factors(&self, num_rows: usize) -> Result<Factors> {
        let scale = self.scale;
        if !self.is_transposed {
            let left = self.left.rows(self.first_row, num_rows).read_f32()?;
            return Ok(Factors { left, right: self.right.read_f32()?, scale });
        }
        let rank = self.left.shape()[0];
        let mut left = transposed(&self.left.read_f32()?, self.left.shape()[1]);
        left.drain(..self.first_row * rank);
        Ok(Factors { left, right: transposed(&self.right.read_f32()?, rank), scale })
    }
}

/// The factors of some rows of an update, in memory.
pub(crate) struct Factors {
    /// `[rows, rank]`
    left: Vec<f32>,
    /// `[rank, columns]`
    right: Vec<f32>,
    scale: f32,
}

impl Factors {
    /// Adds the update to the rows `values`, of which the first is row `first_row` of these factors.
    pub(crate) fn add_to(&self, values: &mut [f32], first_row: usize, num_columns: usize) {
        let rank = self.right.len() / num_columns;
        let left = &self.left[first_row * rank..][..values.len() / num_columns * rank];
        add_product(values, left, &self.right, num_columns, self.scale);
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(values: &[f32], num_columns: usize) -> Vec<f32> {
    (0..num_columns).flat_map(|column| values.iter().skip(column).step_by(num_columns).copied()).collect()
}

/// `values [rows, columns] += scale * left [rows, rank] right [rank, columns]`, over all cores.
fn add_product(values: &mut [f32], left: &[f32], right: &[f32], num_columns: usize, scale: f32) {
    let rank = right.len() / num_columns;
    let num_rows = values.len() / num_columns;
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = num_rows.div_ceil(num_threads);
    std::thread::scope(|scope| {
        for (values, left) in values.chunks_mut(share * num_columns).zip(left.chunks(share * rank)) {
            scope.spawn(move || add_product_on_one_core(values, left, right, num_columns, scale));
        }
    });
}

/// Goes by tiles of columns, so that `right`'s part of a tile stays in the cache while all rows use it, and takes four rows
/// of `right` at a time, so that a sum is loaded and stored a quarter as often.
fn add_product_on_one_core(values: &mut [f32], left: &[f32], right: &[f32], num_columns: usize, scale: f32) {
    let rank = right.len() / num_columns;
    let mut sums = [0.0; TILE_COLUMNS];
    for start in (0..num_columns).step_by(TILE_COLUMNS) {
        let width = TILE_COLUMNS.min(num_columns - start);
        let sums = &mut sums[..width];
        let tile = |index: usize| &right[index * num_columns + start..][..width];
        for (row, factors) in values.chunks_mut(num_columns).zip(left.chunks(rank)) {
            sums.fill(0.0);
            let (fours, rest) = factors.as_chunks::<4>();
            for (index, [a, b, c, d]) in fours.iter().enumerate() {
                let [p, q, r, s] = [0, 1, 2, 3].map(|offset| tile(index * 4 + offset));
                for ((((sum, p), q), r), s) in sums.iter_mut().zip(p).zip(q).zip(r).zip(s) {
                    *sum += (a * p + b * q) + (c * r + d * s);
                }
            }
            for (index, factor) in rest.iter().enumerate() {
                sums.iter_mut().zip(tile(fours.len() * 4 + index)).for_each(|(sum, value)| *sum += factor * value);
            }
            row[start..].iter_mut().zip(sums.iter()).for_each(|(value, sum)| *value += scale * sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_added_row_by_row() {
        let (left, right) = ([1.0, 2.0, -1.0, 0.5, 0.0, 3.0], [1.0, 10.0, 100.0, 2.0, 20.0, 200.0]);
        let mut values = [1.0; 9];
        add_product(&mut values, &left, &right, 3, 2.0);
        let expected = [11.0, 101.0, 1001.0, 1.0, 1.0, 1.0, 13.0, 121.0, 1201.0];
        assert_eq!(values, expected);
        assert_eq!(transposed(&right, 3), [1.0, 2.0, 10.0, 20.0, 100.0, 200.0]);
    }

    #[test]
    fn tiles_and_fours_leave_nothing_out() {
        let (rows, rank, columns) = (7, 6, TILE_COLUMNS + 3);
        let matrix = |size: usize| (0..size).map(|i| ((i * 7919) % 13) as f32 - 6.0).collect::<Vec<_>>();
        let (left, right) = (matrix(rows * rank), matrix(rank * columns));
        let mut values = vec![1.0; rows * columns];
        add_product(&mut values, &left, &right, columns, 2.0);
        for (index, value) in values.iter().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let product: f32 = (0..rank).map(|k| left[row * rank + k] * right[k * columns + column]).sum();
            assert_eq!(*value, 1.0 + 2.0 * product, "{row}, {column}");
        }
    }
}
