//! The batches that graphs run with. A GPU wants few different ones: each shape is captured, tuned or planned for once.

/// Batch sizes in ascending order; the last is the largest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BatchSteps(Vec<usize>);

impl BatchSteps {
    /// Every batch up to `max`: nothing is padded.
    pub(crate) fn exact(max: usize) -> Self {
        Self((1..=max).collect())
    }

    /// Powers of two, and `max`.
    pub(crate) fn doubling(max: usize) -> Self {
        let powers = std::iter::successors(Some(1), |step| Some(2 * step));
        Self(powers.take_while(|&step| step < max).chain([max]).collect())
    }

    /// 1, 2, 4, then multiples of 8, of 16 above 64 and of 32 above 256: few to capture, and a step computes at most 7
    /// captions in vain, above 64 less than a fourth.
    pub(crate) fn for_capture(max: usize) -> Self {
        let next = |step: &usize| match *step {
            0..4 => Some(2 * step),
            4 => Some(8),
            step @ 8..64 => Some(step + 8),
            step @ 64..256 => Some(step + 16),
            step => Some(step + 32),
        };
        Self(std::iter::successors(Some(1), next).take_while(|&step| step < max).chain([max]).collect())
    }

    /// The smallest step that takes `batch`.
    pub(crate) fn at_least(&self, batch: usize) -> usize {
        self.0[self.0.partition_point(|&step| step < batch)]
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_go_up_to_the_largest_batch() {
        assert_eq!(BatchSteps::doubling(6).0, [1, 2, 4, 6]);
        assert_eq!(BatchSteps::doubling(8).0, [1, 2, 4, 8]);
        assert_eq!(BatchSteps::for_capture(20).0, [1, 2, 4, 8, 16, 20]);
        assert_eq!(BatchSteps::for_capture(1).0, [1]);
        for max in 1..600 {
            let steps = BatchSteps::for_capture(max);
            assert!(steps.0.is_sorted_by(|a, b| a < b) && steps.0.last() == Some(&max));
            for batch in 1..=max {
                let step = steps.at_least(batch);
                let padding = step - batch;
                assert!((batch..=max).contains(&step) && (padding < 8 || (step > 64 && 4 * padding < step)));
            }
        }
    }
}
