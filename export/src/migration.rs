//! Factors that move the range of activations into weights (SmoothQuant, arXiv 2211.10438): channels with large activations
//! are divided where they are made (a norm's weight, or the rows of the layer before) and multiplied where they are used, so
//! that one scale per row serves all channels. Nothing is left to do at run time.

use std::rc::Rc;

use crate::calibrate::{InputStats, LayerStats};

/// Channels and columns smaller than this share of the largest count as so large: their factors would be without meaning.
const LEAST_SHARE: f32 = 1e-5;

/// Factors of every decoder layer.
#[derive(Default)]
pub(crate) struct Migration {
    layers: Vec<Factors>,
}

/// One factor per channel of the activations that linear layers take. That into o has none: its loss is nothing to begin with
/// (SmolLM2-135M: all layers in int8 cost 4.7 % of perplexity, o alone 0.0 %).
#[derive(Default)]
pub(crate) struct Factors {
    /// Into q, k and v; divides the norm's weight.
    pub(crate) attention_input: Option<Rc<[f32]>>,
    /// Into gate and up; divides the norm's weight.
    pub(crate) mlp_input: Option<Rc<[f32]>>,
    /// Into down; divides the rows of up.
    pub(crate) mlp_hidden: Option<Rc<[f32]>>,
}

impl Factors {
    fn of_stats(stats: &LayerStats) -> Self {
        Self {
            attention_input: Some(factors(&stats.attention_input).into()),
            mlp_input: Some(factors(&stats.mlp_input).into()),
            mlp_hidden: Some(factors(&stats.mlp_hidden).into()),
        }
    }
}

/// One factor per channel; their geometric mean is 1.
fn factors(stats: &InputStats) -> Vec<f32> {
    let lifted = |values: &[f32]| {
        let least = LEAST_SHARE * values.iter().copied().fold(0.0, f32::max);
        values.iter().map(|value| value.max(least).max(f32::MIN_POSITIVE)).collect::<Vec<_>>()
    };
    let raw: Vec<f32> =
        lifted(&stats.max).iter().zip(lifted(&stats.weight_rms)).map(|(max, weight)| (max / weight).sqrt()).collect();
    let middle = (raw.iter().map(|factor| factor.ln()).sum::<f32>() / raw.len().max(1) as f32).exp();
    raw.into_iter().map(|factor| factor / middle).collect()
}

/// The factors of one layer, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct LayerFactors<'a> {
    pub(crate) attention_input: &'a Option<Rc<[f32]>>,
    pub(crate) mlp_input: &'a Option<Rc<[f32]>>,
    pub(crate) mlp_hidden: &'a Option<Rc<[f32]>>,
}

impl Migration {
    /// `factor = sqrt(max|x| / rms(w))` for every channel, with the statistics of each layer's inputs.
    pub(crate) fn of_stats(stats: &[LayerStats]) -> Self {
        Self { layers: stats.iter().map(Factors::of_stats).collect() }
    }

    pub(crate) fn layer(&self, layer: usize) -> LayerFactors<'_> {
        const NONE: &Option<Rc<[f32]>> = &None;
        match self.layers.get(layer) {
            None => LayerFactors { attention_input: NONE, mlp_input: NONE, mlp_hidden: NONE },
            Some(factors) => LayerFactors {
                attention_input: &factors.attention_input,
                mlp_input: &factors.mlp_input,
                mlp_hidden: &factors.mlp_hidden,
            },
        }
    }
}
