//! A weight on its way into a graph: rows of the checkpoint's tensors, one after the other, with factors folded in.

use std::rc::Rc;

use crate::error::Result;
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
        let mut names: Vec<&str> = names.collect();
        names.dedup();
        names
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
