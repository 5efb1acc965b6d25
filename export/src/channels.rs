//! What is known of the channels of each activation that a linear layer takes, and what follows for the layer's weights.
//!
//! *Factors* move range from activations into weights (SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978): a channel is
//! divided where it is made (a norm's weight, or the rows of up) and multiplied where it is used. Nothing is left to do at
//! run time. *Importance* is the mean square of each channel: the weight of a column's rounding errors in the output's.

use std::rc::Rc;

use half::f16;

use crate::calibrate::{InputStats, LayerStats};
use crate::error::{Error, Result};
use crate::float8;
use crate::precision::{GraphFormat, LinearFormat};

/// Channels and columns smaller than this share of the largest count as so large: their factors would be without meaning.
const LEAST_SHARE: f32 = 1e-5;

/// One activation.
#[derive(Clone, Default)]
pub(crate) struct Channels {
    /// What each channel is divided by.
    pub(crate) factors: Option<Rc<[f32]>>,
    /// How much a rounding error of each weight column weighs.
    pub(crate) importance: Option<Rc<[f32]>>,
    /// What brings the largest value seen to the end of fp8, in that format.
    pub(crate) float8_scale: Option<f16>,
}

/// The activations of one decoder layer.
#[derive(Clone, Default)]
pub(crate) struct LayerChannels {
    /// Into q, k and v.
    pub(crate) attention_input: Channels,
    /// Into o. It has no factors: its loss is nothing to begin with (SmolLM2-135M: all layers in int8 cost 4.7 % of
    /// perplexity, o alone 0.0 %).
    pub(crate) attention_output: Channels,
    /// Into gate and up.
    pub(crate) mlp_input: Channels,
    /// Into down.
    pub(crate) mlp_hidden: Channels,
}

/// Every decoder layer's channels; nothing is known of layers that are not there.
#[derive(Default)]
pub(crate) struct DecoderChannels {
    layers: Vec<LayerChannels>,
}

impl DecoderChannels {
    /// What `format` makes of the statistics.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for activations that are NaN or leave fp16's range, where they are to become fp8.
    pub(crate) fn of_stats(stats: &[LayerStats], format: GraphFormat) -> Result<Self> {
        let layer = |layer: &LayerStats| {
            Ok(LayerChannels {
                attention_input: Channels::of_stats(&layer.attention_input, format.attention_input)?,
                attention_output: Channels::undivided(&layer.attention_output, format.linear)?,
                mlp_input: Channels::of_stats(&layer.mlp_input, format.linear)?,
                mlp_hidden: Channels::of_stats(&layer.mlp_hidden, format.linear)?,
            })
        };
        Ok(Self { layers: stats.iter().map(layer).collect::<Result<_>>()? })
    }

    pub(crate) fn layer(&self, layer: usize) -> LayerChannels {
        self.layers.get(layer).cloned().unwrap_or_default()
    }
}

impl Channels {
    /// `factor = rms(x)^a / rms(w)^(1 - a)`, with exponents that were found on SmolLM2-135M (see `scripts/quality`).
    fn of_stats(stats: &InputStats, format: LinearFormat) -> Result<Self> {
        let (exponent, is_searched) = match format {
            LinearFormat::Float => return Ok(Self::default()),
            LinearFormat::Float8 => return Self::of_float8(stats),
            LinearFormat::Int8 { .. } | LinearFormat::Packed { .. } => (0.5, false),
            LinearFormat::Blocks(blocks) if blocks.bits == 8 => (0.5, false),
            LinearFormat::Blocks(_) => (0.375, true),
        };
        let rms = lifted(&stats.mean_square.iter().map(|square| square.sqrt()).collect::<Vec<_>>());
        let factors = factors(&rms, &stats.weight_rms, exponent);
        let importance = rms.iter().zip(&factors).map(|(rms, factor)| (rms / factor).powi(2)).collect();
        let importance = is_searched.then_some(importance);
        Ok(Self { factors: Some(factors.into()), importance, float8_scale: None })
    }

    /// The whole range that was seen, and no factors: these floats have the same digits for large and small channels.
    fn of_float8(stats: &InputStats) -> Result<Self> {
        let scale = float8::scale(stats.largest).ok_or_else(|| {
            let found = format!("activations up to {:e}, which fp16 does not have", stats.largest);
            Error::unsupported("--precision fp8", found, "export with --precision bf16")
        })?;
        Ok(Self { float8_scale: Some(scale), ..Self::default() })
    }

    /// Without factors, for an activation that nothing can divide before it is made.
    fn undivided(stats: &InputStats, format: LinearFormat) -> Result<Self> {
        let Self { importance, float8_scale, .. } = Self::of_stats(stats, format)?;
        let squares = || stats.mean_square.iter().map(|square| square.max(1e-30)).collect();
        Ok(Self { factors: None, importance: importance.map(|_| squares()), float8_scale })
    }
}

/// One factor per channel; their geometric mean is 1.
fn factors(rms: &[f32], weight_rms: &[f32], exponent: f32) -> Vec<f32> {
    let weight_rms = lifted(weight_rms);
    let raw = rms.iter().zip(&weight_rms).map(|(x, w)| x.powf(exponent) / w.powf(1.0 - exponent));
    let raw: Vec<f32> = raw.collect();
    let middle = (raw.iter().map(|factor| factor.ln()).sum::<f32>() / raw.len().max(1) as f32).exp();
    raw.into_iter().map(|factor| factor / middle).collect()
}

/// Values of at least [`LEAST_SHARE`] of the largest; all alike where all are zero.
fn lifted(values: &[f32]) -> Vec<f32> {
    let least = LEAST_SHARE * values.iter().copied().fold(0.0, f32::max);
    values.iter().map(|value| value.max(least).max(1e-30)).collect()
}
