//! Factors that move the range of activations into weights (SmoothQuant, arXiv 2211.10438): channels with large activations
//! are divided where they are made (a norm's weight, or the rows of the layer before) and multiplied where they are used, so
//! that one scale per row serves all channels. Nothing is left to do at run time.

use std::rc::Rc;

use crate::calibrate::{InputStats, LayerStats};
use crate::config::DecoderConfig;

/// Share of an activation's range that goes into the weights (SmoothQuant's alpha).
const ALPHA: f32 = 0.5;
/// No factor is further from the middle of its layer's than this.
const MAX_FACTOR: f32 = 1e4;

/// Factors of every decoder layer.
#[derive(Default)]
pub(crate) struct Migration {
    layers: Vec<Factors>,
}

/// One factor per channel of each activation that a linear layer takes.
#[derive(Default)]
pub(crate) struct Factors {
    /// Into q, k and v; divides the norm's weight.
    pub(crate) attention_input: Option<Rc<[f32]>>,
    /// Out of v, one per channel of each key/value head.
    pub(crate) value_output: Option<Rc<[f32]>>,
    /// Into o: those of `value_output`, repeated for the query heads that share a key/value head.
    pub(crate) attention_output: Option<Rc<[f32]>>,
    /// Into gate and up; divides the norm's weight.
    pub(crate) mlp_input: Option<Rc<[f32]>>,
    /// Into down; divides the rows of up.
    pub(crate) mlp_hidden: Option<Rc<[f32]>>,
}

impl Factors {
    fn of_stats(stats: &LayerStats, config: &DecoderConfig) -> Self {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = *config;
        // A channel of a key/value head is one channel for all the query heads that share it.
        let shared = share_among_heads(&stats.attention_output, num_heads, num_kv_heads, head_dim);
        let value_output = factors(&shared);
        let group = num_heads / num_kv_heads;
        let repeated: Vec<f32> =
            (0..num_heads).flat_map(|head| &value_output[head / group * head_dim..][..head_dim]).copied().collect();
        Self {
            attention_input: Some(factors(&stats.attention_input).into()),
            value_output: Some(value_output.into()),
            attention_output: Some(repeated.into()),
            mlp_input: Some(factors(&stats.mlp_input).into()),
            mlp_hidden: Some(factors(&stats.mlp_hidden).into()),
        }
    }
}

/// The statistics of `[heads * d]` channels as those of `[kv_heads * d]`.
fn share_among_heads(stats: &InputStats, num_heads: usize, num_kv_heads: usize, head_dim: usize) -> InputStats {
    let group = num_heads / num_kv_heads;
    let channels = |kv_channel: usize| {
        let (kv_head, channel) = (kv_channel / head_dim, kv_channel % head_dim);
        (kv_head * group..(kv_head + 1) * group).map(move |head| head * head_dim + channel)
    };
    let all = || 0..num_kv_heads * head_dim;
    let mean = |values: &[f32], kv_channel| channels(kv_channel).map(|i| values[i]).sum::<f32>() / group as f32;
    InputStats {
        max: all().map(|kv_channel| channels(kv_channel).map(|i| stats.max[i]).fold(0.0, f32::max)).collect(),
        mean_square: all().map(|kv_channel| mean(&stats.mean_square, kv_channel)).collect(),
        weight_rms: all()
            .map(|kv_channel| channels(kv_channel).map(|i| stats.weight_rms[i]).fold(0.0, f32::max))
            .collect(),
    }
}

/// One factor per channel, around 1; 1 where a channel or its weights are all zero.
fn factors(stats: &InputStats) -> Vec<f32> {
    let raw = stats.max.iter().zip(&stats.weight_rms).map(|(max, weight)| max.powf(ALPHA) / weight.powf(1.0 - ALPHA));
    let raw: Vec<f32> = raw.collect();
    let is_usable = |factor: &f32| factor.is_finite() && *factor > 0.0;
    let usable: Vec<f32> = raw.iter().copied().filter(is_usable).collect();
    let middle = (usable.iter().map(|factor| factor.ln()).sum::<f32>() / usable.len().max(1) as f32).exp();
    let normalized = |factor: f32| match is_usable(&factor) {
        true => (factor / middle).clamp(MAX_FACTOR.recip(), MAX_FACTOR),
        false => 1.0,
    };
    raw.into_iter().map(normalized).collect()
}

/// The factors of one layer, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct LayerFactors<'a> {
    pub(crate) attention_input: &'a Option<Rc<[f32]>>,
    pub(crate) value_output: &'a Option<Rc<[f32]>>,
    pub(crate) attention_output: &'a Option<Rc<[f32]>>,
    pub(crate) mlp_input: &'a Option<Rc<[f32]>>,
    pub(crate) mlp_hidden: &'a Option<Rc<[f32]>>,
}

impl Migration {
    /// `factor = max|x|^alpha / rms(w)^(1 - alpha)` for every channel, with the statistics of each layer's inputs.
    pub(crate) fn of_stats(stats: &[LayerStats], config: &DecoderConfig) -> Self {
        Self { layers: stats.iter().map(|layer| Factors::of_stats(layer, config)).collect() }
    }

    pub(crate) fn layer(&self, layer: usize) -> LayerFactors<'_> {
        const NONE: &Option<Rc<[f32]>> = &None;
        match self.layers.get(layer) {
            None => LayerFactors {
                attention_input: NONE,
                value_output: NONE,
                attention_output: NONE,
                mlp_input: NONE,
                mlp_hidden: NONE,
            },
            Some(factors) => LayerFactors {
                attention_input: &factors.attention_input,
                value_output: &factors.value_output,
                attention_output: &factors.attention_output,
                mlp_input: &factors.mlp_input,
                mlp_hidden: &factors.mlp_hidden,
            },
        }
    }
}
