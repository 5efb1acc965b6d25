//! One caption in the making: its ids so far, and when it ends.

use serde::{Deserialize, Serialize};

/// Why a caption ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// `max_new_tokens` were made.
    Length,
}

impl FinishReason {
    /// As the `finish_reason` column has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// When captions end.
#[derive(Clone, Debug)]
pub struct StopRule {
    /// Ids that end a caption.
    pub stop_token_ids: Vec<u32>,
    /// Most new tokens, the stop token counted, as transformers counts them.
    pub max_new_tokens: usize,
    /// A stop token is a token like any other.
    pub ignore_eos: bool,
}

/// A caption in the making, and what it is about (`T`).
#[derive(Clone, Debug)]
pub struct Sequence<T> {
    /// What is captioned.
    pub subject: T,
    /// Tokens whose keys and values are in the cache.
    pub cached_length: usize,
    /// New ids, the stop token not among them.
    pub token_ids: Vec<u32>,
    /// Set when the caption has ended.
    pub finish_reason: Option<FinishReason>,
    /// A logit was NaN or infinite: the caption is worthless.
    pub is_non_finite: bool,
    /// When the first new token came, where that is recorded.
    pub(crate) first_token_ns: u64,
}

impl<T> Sequence<T> {
    pub(crate) fn new(subject: T, prompt_length: usize) -> Self {
        Self {
            subject,
            cached_length: prompt_length,
            token_ids: Vec::new(),
            finish_reason: None,
            is_non_finite: false,
            first_token_ns: 0,
        }
    }

    /// Takes the next id from the decoder; -1 says that its logits were not finite.
    pub(crate) fn push(&mut self, next_id: i64, rule: &StopRule) {
        let Ok(id) = u32::try_from(next_id) else {
            self.is_non_finite = true;
            return;
        };
        if !rule.ignore_eos && rule.stop_token_ids.contains(&id) {
            self.finish_reason = Some(FinishReason::Stop);
            return;
        }
        self.token_ids.push(id);
        if self.token_ids.len() >= rule.max_new_tokens {
            self.finish_reason = Some(FinishReason::Length);
        }
    }

    /// Whether no further id is wanted.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finish_reason.is_some() || self.is_non_finite
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(ids: &[i64], ignore_eos: bool) -> Sequence<()> {
        let rule = StopRule { stop_token_ids: vec![9], max_new_tokens: 3, ignore_eos };
        let mut sequence = Sequence::new((), 5);
        ids.iter().take_while(|&&id| (!sequence.is_finished()).then(|| sequence.push(id, &rule)).is_some()).count();
        sequence
    }

    #[test]
    fn the_stop_token_counts_towards_the_limit_but_is_not_kept() {
        let stopped = run(&[1, 2, 9, 4], false);
        assert_eq!((stopped.token_ids.as_slice(), stopped.finish_reason), (&[1, 2][..], Some(FinishReason::Stop)));
        let full = run(&[1, 2, 3, 9], false);
        assert_eq!((full.token_ids.as_slice(), full.finish_reason), (&[1, 2, 3][..], Some(FinishReason::Length)));
    }

    #[test]
    fn ignoring_the_end_keeps_the_stop_token() {
        let sequence = run(&[9, 9, 9, 9], true);
        assert_eq!(
            (sequence.token_ids.as_slice(), sequence.finish_reason),
            (&[9, 9, 9][..], Some(FinishReason::Length))
        );
    }

    #[test]
    fn non_finite_logits_end_a_caption_without_a_reason() {
        let sequence = run(&[1, -1, 2], false);
        assert!(sequence.is_non_finite && sequence.finish_reason.is_none());
        assert_eq!(sequence.token_ids, [1]);
    }
}
