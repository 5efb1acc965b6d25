//! What a quantiser wants to know of activations: the decoder run in f32 over a few hundred tokens, straight from the
//! checkpoint, one layer at a time. A weight is read in blocks of rows, so that memory does not grow with the model.
//!
//! Every linear layer's input is looked at channel by channel, and the weights that meet it column by column.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis, s};

use crate::checkpoint::{Checkpoint, Part};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::rope::cos_sin_tables;

const PART: Part = Part::Decoder;

/// Tokens of one window, and how many windows there are at most.
const WINDOW: usize = 128;
const MAX_WINDOWS: usize = 4;
const NUM_RANDOM_WINDOWS: usize = 4;

/// What a quantising export learns the range of activations from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Calibration {
    /// Nothing; not for fp8.
    None,
    /// Random token ids, the same ones each time. For int8 and fp8; for int4 they are no better than nothing (SmolLM2-135M: 23.7 % of
    /// perplexity, where text leaves 10.7 %), and count as nothing.
    #[default]
    Random,
    /// Token ids of a text like the captions to come.
    Tokens(Vec<u32>),
}

/// Token ids that a calibration runs over: windows of one length, each from position 0 on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Windows {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) length: usize,
}

impl Windows {
    /// Ids from a linear congruential generator (Knuth's MMIX).
    pub(crate) fn random(config: &DecoderConfig) -> Self {
        let length = WINDOW.min(config.num_positions());
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % config.vocab_size as u64) as u32
        };
        Self { token_ids: (0..NUM_RANDOM_WINDOWS * length).map(|_| next()).collect(), length }
    }

    /// The first windows of `token_ids`; what is left over after the last whole one is dropped, and ids without an embedding
    /// before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when nothing is left.
    pub(crate) fn of_tokens(token_ids: &[u32], config: &DecoderConfig) -> Result<Self> {
        let known = |id: &u32| (*id as usize) < config.vocab_size;
        let mut token_ids: Vec<u32> = token_ids.iter().copied().filter(known).collect();
        if token_ids.is_empty() {
            let hint = "give a text of a few hundred words";
            return Err(Error::unsupported("calibration", "a text without tokens of the model", hint));
        }
        let length = WINDOW.min(config.num_positions()).min(token_ids.len());
        token_ids.truncate((token_ids.len() / length).min(MAX_WINDOWS) * length);
        Ok(Self { token_ids, length })
    }
}

/// One activation, channel by channel.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct InputStats {
    /// Mean square of each channel.
    pub(crate) mean_square: Vec<f32>,
    /// The largest magnitude of all, NaN where there is one.
    pub(crate) largest: f32,
    /// Root of the mean square of each column of the weights that take it.
    pub(crate) weight_rms: Vec<f32>,
}

/// The activations of one decoder layer that linear layers take.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LayerStats {
    /// Into q, k and v.
    pub(crate) attention_input: InputStats,
    /// Into o.
    pub(crate) attention_output: InputStats,
    /// Into gate and up.
    pub(crate) mlp_input: InputStats,
    /// Into down.
    pub(crate) mlp_hidden: InputStats,
}

/// Runs the decoder; each layer's statistics, first layer first. `check` is called between weights and may end the run.
///
/// # Errors
/// Those of reading the weights, and what `check` returns.
pub(crate) fn run(
    checkpoint: &Checkpoint,
    config: &DecoderConfig,
    windows: &Windows,
    check: &dyn Fn() -> Result<()>,
) -> Result<Vec<LayerStats>> {
    let forward = Forward { checkpoint, config, window: windows.length, check };
    let mut hidden = forward.embed(&windows.token_ids)?;
    let (cos, sin) = cos_sin_tables(&config.rope, config.head_dim, config.head_dim, windows.length);
    let angles = Angles { cos, sin };
    (0..config.num_layers).map(|layer| forward.layer(layer, &mut hidden, &angles)).collect()
}

struct Forward<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a DecoderConfig,
    /// Tokens of a window.
    window: usize,
    check: &'a dyn Fn() -> Result<()>,
}

/// `[positions, head_dim / 2]` each.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Forward<'_> {
    /// `[T, H]`
    fn embed(&self, token_ids: &[u32]) -> Result<Array2<f32>> {
        let DecoderConfig { vocab_size, hidden_size, .. } = *self.config;
        let table = self.checkpoint.tensor(PART, "embed_tokens.weight", &[vocab_size, hidden_size])?;
        let mut hidden = Array2::zeros((token_ids.len(), hidden_size));
        for (mut row, &id) in hidden.rows_mut().into_iter().zip(token_ids) {
            let values = table.rows(id as usize, 1).read_f32()?;
            row.iter_mut().zip(values).for_each(|(target, value)| *target = value);
        }
        Ok(hidden)
    }

    fn layer(&self, layer: usize, hidden: &mut Array2<f32>, angles: &Angles) -> Result<LayerStats> {
        let DecoderConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = *self.config;
        let (attention_bias, mlp_bias) = (self.config.attention_bias, self.config.mlp_bias);
        let (q_size, kv_size) = (num_heads * head_dim, num_kv_heads * head_dim);
        let prefix = format!("layers.{layer}");

        let normed = self.norm(&format!("{prefix}.input_layernorm"), hidden)?;
        let mut attention_input = InputStats::of(&normed);
        let mut project = |name: &str, features: usize| {
            let name = format!("{prefix}.self_attn.{name}");
            self.linear(&name, &normed, features, attention_bias, &mut attention_input)
        };
        let mut query = project("q_proj", q_size)?;
        let mut key = project("k_proj", kv_size)?;
        let value = project("v_proj", kv_size)?;
        self.rotate(&mut query, angles);
        self.rotate(&mut key, angles);
        let attended = self.attend(&query, &key, &value);
        let mut attention_output = InputStats::of(&attended);
        let name = format!("{prefix}.self_attn.o_proj");
        *hidden += &self.linear(&name, &attended, hidden_size, attention_bias, &mut attention_output)?;

        let normed = self.norm(&format!("{prefix}.post_attention_layernorm"), hidden)?;
        let mut mlp_input = InputStats::of(&normed);
        let mut widen = |name: &str| {
            self.linear(&format!("{prefix}.mlp.{name}"), &normed, intermediate_size, mlp_bias, &mut mlp_input)
        };
        let mut gated = widen("gate_proj")?;
        let up = widen("up_proj")?;
        gated.zip_mut_with(&up, |gate, up| *gate = self.config.activation.apply(*gate) * up);
        let mut mlp_hidden = InputStats::of(&gated);
        let name = format!("{prefix}.mlp.down_proj");
        *hidden += &self.linear(&name, &gated, hidden_size, mlp_bias, &mut mlp_hidden)?;
        let mut stats = LayerStats { attention_input, attention_output, mlp_input, mlp_hidden };
        for (input, num_rows) in [
            (&mut stats.attention_input, q_size + 2 * kv_size),
            (&mut stats.attention_output, hidden_size),
            (&mut stats.mlp_input, 2 * intermediate_size),
            (&mut stats.mlp_hidden, hidden_size),
        ] {
            input.weight_rms.iter_mut().for_each(|sum| *sum = (*sum / num_rows as f32).sqrt());
        }
        Ok(stats)
    }

    fn norm(&self, name: &str, x: &Array2<f32>) -> Result<Array2<f32>> {
        let weight = self.checkpoint.tensor(PART, &format!("{name}.weight"), &[self.config.hidden_size])?.read_f32()?;
        let mut normed = x.clone();
        for mut row in normed.rows_mut() {
            let mean_square = row.iter().map(|value| value * value).sum::<f32>() / row.len() as f32;
            let factor = (mean_square + self.config.rms_norm_eps).sqrt().recip();
            row.iter_mut().zip(&weight).for_each(|(value, weight)| *value *= factor * weight);
        }
        Ok(normed)
    }

    /// `x W^T + b`; adds the squares of the weight's columns to `stats`.
    fn linear(
        &self,
        name: &str,
        x: &Array2<f32>,
        out_features: usize,
        has_bias: bool,
        stats: &mut InputStats,
    ) -> Result<Array2<f32>> {
        (self.check)()?;
        let in_features = x.ncols();
        let weight = self.checkpoint.tensor(PART, &format!("{name}.weight"), &[out_features, in_features])?;
        let mut y = Array2::zeros((x.nrows(), out_features));
        stats.weight_rms.resize(in_features, 0.0);
        let mut first = 0;
        weight.stream(&mut |block| {
            let num_rows = block.len() / in_features;
            for row in block.chunks_exact(in_features) {
                stats.weight_rms.iter_mut().zip(row).for_each(|(sum, value)| *sum += value * value);
            }
            let rows = ArrayView2::from_shape((num_rows, in_features), &*block).expect("bug: blocks are whole rows");
            general_mat_mul(1.0, x, &rows.t(), 0.0, &mut y.slice_mut(s![.., first..first + num_rows]));
            first += num_rows;
            Ok(())
        })?;
        if has_bias {
            let bias = self.checkpoint.tensor(PART, &format!("{name}.bias"), &[out_features])?.read_f32()?;
            y += &ndarray::Array1::from(bias);
        }
        Ok(y)
    }

    /// Rotary embedding of every head, in place.
    fn rotate(&self, x: &mut Array2<f32>, angles: &Angles) {
        let half = self.config.head_dim / 2;
        for (token, mut row) in x.rows_mut().into_iter().enumerate() {
            let position = token % self.window;
            let row = row.as_slice_mut().expect("bug: rows are contiguous");
            let (cos, sin) = (&angles.cos[position * half..], &angles.sin[position * half..]);
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for i in 0..half {
                    (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
                }
            }
        }
    }

    /// Causal attention within each window: `[T, heads * d]`.
    fn attend(&self, query: &Array2<f32>, key: &Array2<f32>, value: &Array2<f32>) -> Array2<f32> {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = *self.config;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut attended = Array2::zeros(query.dim());
        for start in (0..query.nrows()).step_by(self.window) {
            let tokens = start..(start + self.window).min(query.nrows());
            for head in 0..num_heads {
                let columns = head * head_dim..(head + 1) * head_dim;
                let kv_head = head / (num_heads / num_kv_heads);
                let kv_columns = kv_head * head_dim..(kv_head + 1) * head_dim;
                let query = query.slice(s![tokens.clone(), columns.clone()]);
                let key = key.slice(s![tokens.clone(), kv_columns.clone()]);
                let value = value.slice(s![tokens.clone(), kv_columns]);
                let mut weights = query.dot(&key.t());
                for (token, mut row) in weights.rows_mut().into_iter().enumerate() {
                    softmax(row.as_slice_mut().expect("bug: rows are contiguous"), token + 1, scale);
                }
                attended.slice_mut(s![tokens.clone(), columns]).assign(&weights.dot(&value));
            }
        }
        attended
    }
}

/// Softmax of the first `num_visible` scores times `scale`; the others become 0.
fn softmax(scores: &mut [f32], num_visible: usize, scale: f32) {
    let (visible, hidden) = scores.split_at_mut(num_visible);
    hidden.fill(0.0);
    let largest = visible.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    visible.iter_mut().for_each(|score| *score = ((*score - largest) * scale).exp());
    let sum: f32 = visible.iter().sum();
    visible.iter_mut().for_each(|weight| *weight /= sum);
}

impl InputStats {
    fn of(x: &Array2<f32>) -> Self {
        let sum = x.fold_axis(Axis(0), 0.0_f32, |sum, value| sum + value * value);
        let mean_square = sum.iter().map(|sum| sum / x.nrows() as f32).collect();
        let largest = x.iter().fold(0.0_f32, |largest, value| match value.is_nan() || value.abs() > largest {
            true => value.abs(),
            false => largest,
        });
        Self { mean_square, largest, weight_rms: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::config::LlavaConfig;

    /// Largest difference from transformers, relative to the largest value of the same list.
    const TOLERANCE: f32 = 1e-5;

    fn assert_close(found: &[f32], expected: &Value, what: &str) {
        let expected: Vec<f32> = serde_json::from_value(expected.clone()).unwrap();
        assert_eq!(found.len(), expected.len(), "{what}");
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= TOLERANCE * largest, "{what}: {found}, expected {expected}");
        }
    }

    #[test]
    fn a_text_gives_whole_windows_of_known_tokens_or_an_error() {
        let config = serde_json::json!({"model_type": "llava", "text_config": {"vocab_size": 100}});
        let config = LlavaConfig::from_transformers(&config, Path::new("config.json")).unwrap().decoder;
        let windows = |ids: &[u32]| Windows::of_tokens(ids, &config);
        let short = windows(&[5, 100, 6]).unwrap();
        assert_eq!((short.token_ids, short.length), (vec![5, 6], 2));
        let long = windows(&vec![7; 3 * WINDOW + 1]).unwrap();
        assert_eq!((long.token_ids.len(), long.length), (3 * WINDOW, WINDOW));
        assert_eq!(windows(&vec![7; 100 * WINDOW]).unwrap().token_ids.len(), MAX_WINDOWS * WINDOW);
        for nothing in [&[][..], &[100, 200]] {
            assert!(windows(nothing).unwrap_err().to_string().contains("calibration"));
        }
    }

    #[test]
    fn the_largest_magnitude_is_of_either_sign_and_a_nan_stays() {
        let largest =
            |values: [f32; 4]| InputStats::of(&Array2::from_shape_vec((2, 2), values.to_vec()).unwrap()).largest;
        assert_eq!(largest([1.0, -3.0, 2.0, 0.0]), 3.0);
        assert_eq!(largest([0.0; 4]), 0.0);
        assert_eq!(largest([1.0, 2.0, f32::NEG_INFINITY, 4.0]), f32::INFINITY);
        assert!(largest([f32::INFINITY, f32::NAN, 2.0, f32::INFINITY]).is_nan());
    }

    /// `scripts/golden/make_calibration.py` makes the goldens.
    #[test]
    fn activations_are_those_of_transformers() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/calibration");
        let paths: Vec<_> = std::fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(paths.len() >= 4, "{paths:?}");
        for path in paths {
            let golden: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let name = path.file_stem().unwrap().to_str().unwrap();
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/checkpoints").join(name);
            let lora = Some(folder.join("lora")).filter(|folder| folder.is_dir());
            let checkpoint = Checkpoint::open(&folder, None, lora.as_deref()).unwrap();
            let config = LlavaConfig::read(&checkpoint).unwrap();
            let token_ids: Vec<u32> = serde_json::from_value(golden["token_ids"].clone()).unwrap();
            let windows = Windows { token_ids, length: golden["length"].as_u64().unwrap() as usize };
            let layers = run(&checkpoint, &config.decoder, &windows, &|| Ok(())).unwrap();
            assert_eq!(layers.len(), golden["layers"].as_array().unwrap().len());
            for (index, (found, expected)) in layers.iter().zip(golden["layers"].as_array().unwrap()).enumerate() {
                let LayerStats { attention_input, attention_output, mlp_input, mlp_hidden } = found;
                for (site, found) in [
                    ("attention_input", attention_input),
                    ("attention_output", attention_output),
                    ("mlp_input", mlp_input),
                    ("mlp_hidden", mlp_hidden),
                ] {
                    let what = format!("{name} layer {index} {site}");
                    assert_close(&found.mean_square, &expected[site]["mean_square"], &what);
                    assert_close(&found.weight_rms, &expected[site]["weight_rms"], &what);
                }
            }
        }
    }
}
