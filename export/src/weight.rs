//! A weight on its way into a graph: rows of the checkpoint's tensors, one after the other, with factors folded in.

use std::rc::Rc;

use recaption_kernels::PANEL_COLUMNS;

use crate::error::Result;
use crate::quantize::GROUP_ROWS;
use crate::tensor::StoredTensor;

/// A piece of a weight.
#[derive(Clone)]
pub(crate) enum WeightPart<'a> {
    /// A tensor of the checkpoint, or some of its rows.
    Stored(StoredTensor<'a>),
    /// So many rows of zeros.
    ZeroRows(usize),
}

impl WeightPart<'_> {
    fn num_rows(&self) -> usize {
        match self {
            Self::Stored(tensor) => tensor.shape()[0],
            Self::ZeroRows(count) => *count,
        }
    }
}

/// Parts with rows of one shape, concatenated along the first axis.
#[derive(Clone)]
pub(crate) struct Weight<'a> {
    parts: Vec<WeightPart<'a>>,
    row_shape: Vec<usize>,
    /// One factor per row, multiplied into it.
    row_factors: Option<Vec<f32>>,
    /// One factor per element of a row.
    column_factors: Option<Rc<[f32]>>,
    /// How much a rounding error of each element of a row weighs.
    importance: Option<Rc<[f32]>>,
}

impl<'a> Weight<'a> {
    pub(crate) fn stored(tensor: StoredTensor<'a>) -> Self {
        let row_shape = tensor.shape()[1..].to_vec();
        Self::of_parts(vec![WeightPart::Stored(tensor)], &row_shape)
    }

    pub(crate) fn of_parts(parts: Vec<WeightPart<'a>>, row_shape: &[usize]) -> Self {
        Self { parts, row_shape: row_shape.to_vec(), row_factors: None, column_factors: None, importance: None }
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.parts.iter().map(WeightPart::num_rows).sum()
    }

    /// Elements of one row.
    pub(crate) fn row_size(&self) -> usize {
        self.row_shape.iter().product()
    }

    pub(crate) fn dims(&self) -> Vec<usize> {
        [&[self.num_rows()], self.row_shape.as_slice()].concat()
    }

    /// Flattens rows to one axis.
    pub(crate) fn flat(mut self) -> Self {
        self.row_shape = vec![self.row_size()];
        self
    }

    /// Appends the rows of `other`; column factors must be the same.
    pub(crate) fn then(mut self, other: Self) -> Self {
        let (rows, other_rows) = (self.num_rows(), other.num_rows());
        if self.row_factors.is_some() || other.row_factors.is_some() {
            let mut factors = self.row_factors.unwrap_or_else(|| vec![1.0; rows]);
            factors.extend(other.row_factors.unwrap_or_else(|| vec![1.0; other_rows]));
            self.row_factors = Some(factors);
        }
        self.parts.extend(other.parts);
        self
    }

    /// Rows `first..first + count`, those behind the end being zeros.
    fn rows(&self, first: usize, count: usize) -> Vec<WeightPart<'a>> {
        let (mut taken, mut parts, mut start) = (0, Vec::new(), 0);
        for part in &self.parts {
            let (from, end) = ((first + taken).max(start), start + part.num_rows());
            let wanted = (count - taken).min(end.saturating_sub(from));
            if wanted > 0 {
                parts.push(match part {
                    WeightPart::Stored(tensor) => WeightPart::Stored(tensor.rows(from - start, wanted)),
                    WeightPart::ZeroRows(_) => WeightPart::ZeroRows(wanted),
                });
                taken += wanted;
            }
            start = end;
        }
        if taken < count {
            parts.push(WeightPart::ZeroRows(count - taken));
        }
        parts
    }

    /// Filled up with rows of zeros to whole panels.
    pub(crate) fn in_panels(self) -> Self {
        let num_rows = self.num_rows().next_multiple_of(PANEL_COLUMNS);
        self.with_rows_of(&[(0, num_rows)])
    }

    /// The first half of the rows and the second in turns, as [`GROUP_ROWS`] has it, each filled up with rows of zeros.
    pub(crate) fn in_gated_panels(self) -> Self {
        let (each, turn) = (self.num_rows() / 2, GROUP_ROWS / 2);
        let mut ranges = Vec::new();
        for first in (0..each).step_by(turn) {
            let count = turn.min(each - first);
            for start in [first, each + first] {
                ranges.push((start, count));
                // The up rows may not follow at once where gate rows are missing.
                ranges.push((2 * each, count.next_multiple_of(PANEL_COLUMNS / 2) - count));
            }
        }
        self.with_rows_of(&ranges)
    }

    /// Rows `first..first + count` for each `(first, count)`, one after the other.
    fn with_rows_of(self, ranges: &[(usize, usize)]) -> Self {
        let parts =
            ranges.iter().filter(|range| range.1 > 0).flat_map(|&(first, count)| self.rows(first, count)).collect();
        let row_factors = self.row_factors.as_ref().map(|factors| {
            let factor = |row: usize| factors.get(row).copied().unwrap_or(1.0);
            ranges.iter().flat_map(|&(first, count)| (first..first + count).map(factor)).collect()
        });
        Self { parts, row_factors, ..self }
    }

    /// Multiplies row `i` by `factors[i]`.
    pub(crate) fn scale_rows(mut self, factors: &[f32]) -> Self {
        assert_eq!(factors.len(), self.num_rows(), "bug: row factors");
        self.row_factors = Some(match self.row_factors {
            Some(known) => known.iter().zip(factors).map(|(a, b)| a * b).collect(),
            None => factors.to_vec(),
        });
        self
    }

    /// Multiplies element `j` of every row by `factors[j]`.
    pub(crate) fn scale_columns(mut self, factors: &Rc<[f32]>) -> Self {
        assert_eq!(factors.len(), self.row_size(), "bug: column factors");
        debug_assert!(self.column_factors.is_none(), "bug: column factors twice");
        self.column_factors = Some(Rc::clone(factors));
        self
    }

    pub(crate) fn with_importance(mut self, importance: Option<Rc<[f32]>>) -> Self {
        assert!(importance.as_ref().is_none_or(|importance| importance.len() == self.row_size()), "bug: importance");
        self.importance = importance;
        self
    }

    pub(crate) fn importance(&self) -> Option<&[f32]> {
        self.importance.as_deref()
    }

    /// Weights of the checkpoint in it.
    pub(crate) fn num_parameters(&self) -> usize {
        let stored = self.parts.iter().map(|part| match part {
            WeightPart::Stored(tensor) => tensor.num_elements(),
            WeightPart::ZeroRows(_) => 0,
        });
        stored.sum()
    }

    /// Names of the checkpoint's tensors in it.
    pub(crate) fn tensor_names(&self) -> Vec<&str> {
        let names = self.parts.iter().filter_map(|part| match part {
            WeightPart::Stored(tensor) => Some(tensor.name()),
            WeightPart::ZeroRows(_) => None,
        });
        let mut unique = Vec::new();
        for name in names {
            if !unique.contains(&name) {
                unique.push(name);
            }
        }
        unique
    }

    /// Hands blocks of whole rows to `sink`, which may change them.
    pub(crate) fn stream(&self, sink: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        let row_size = self.row_size();
        let mut row = 0;
        let mut scaled = |block: &mut [f32]| {
            if let Some(factors) = &self.column_factors {
                for values in block.chunks_exact_mut(row_size) {
                    values.iter_mut().zip(&**factors).for_each(|(value, factor)| *value *= factor);
                }
            }
            let num_rows = block.len() / row_size;
            if let Some(factors) = &self.row_factors {
                for (values, factor) in block.chunks_exact_mut(row_size).zip(&factors[row..]) {
                    values.iter_mut().for_each(|value| *value *= factor);
                }
            }
            row += num_rows;
            sink(block)
        };
        self.parts.iter().try_for_each(|part| match part {
            WeightPart::Stored(tensor) => tensor.stream(&mut scaled),
            WeightPart::ZeroRows(count) => scaled(&mut vec![0.0; count * row_size]),
        })
    }

    /// As [`Self::stream`], `count` rows at a time; the last block may have fewer.
    pub(crate) fn stream_groups(&self, count: usize, sink: &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        let group = count * self.row_size();
        let mut pending = Vec::new();
        self.stream(&mut |rows| {
            pending.extend_from_slice(rows);
            let whole = pending.len() / group * group;
            pending[..whole].chunks_exact_mut(group).try_for_each(&mut *sink)?;
            pending.drain(..whole);
            Ok(())
        })?;
        if pending.is_empty() { Ok(()) } else { sink(&mut pending) }
    }

    /// All values, for weights small enough to hold.
    pub(crate) fn read_f32(&self) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.num_rows() * self.row_size());
        self.stream(&mut |block| {
            values.extend_from_slice(block);
            Ok(())
        })?;
        Ok(values)
    }
}
