//! What a CLIP looks like: from `config.json` with transformers' defaults, or from the shapes of weights under OpenAI's
//! names, which come without one.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::checkpoint::ClipCheckpoint;
use super::manifest::EosRule;
use super::names::{ClipLayout, POSITIONS_RES};
use crate::activation::Activation;
use crate::config::{
    RawVisionConfig, TokenIds, VisionConfig, parse, refuse_bad_epsilon, refuse_out_of_range, refuse_quantised,
    refuse_uneven,
};
use crate::encoder::EncoderConfig;
use crate::error::{Error, Result};

/// Width of a head in all of OpenAI's towers.
const OPENAI_HEAD_DIM: usize = 64;
/// OpenAI's `LayerNorm`, which is torch's.
const OPENAI_EPS: f32 = 1e-5;
/// Positions that Long-CLIP takes from the first of its two tables, as CLIP trained them (Long-CLIP's `mask1`).
const LONG_CLIP_KEPT_POSITIONS: usize = 20;
/// `eos_token_id` of the first configurations, which is wrong; transformers then takes the largest id for the end.
const LEGACY_EOS: u32 = 2;

/// Both towers.
#[derive(Clone, Debug)]
pub(crate) struct ClipConfig {
    pub(crate) vision: VisionConfig,
    pub(crate) text: TextConfig,
    /// Width of the embeddings.
    pub(crate) projection_dim: usize,
}

/// The text tower.
#[derive(Clone, Debug)]
pub(crate) struct TextConfig {
    pub(crate) encoder: EncoderConfig,
    pub(crate) num_layers: usize,
    pub(crate) vocab_size: usize,
    /// Rows of the table of positions.
    pub(crate) context_length: usize,
    /// With a second table of positions: rows that come from the first one.
    pub(crate) kept_positions: Option<usize>,
    pub(crate) eos: EosRule,
    pub(crate) pad_token_id: Option<u32>,
}

impl ClipConfig {
    /// # Errors
    /// [`Error::InvalidConfig`] for malformed fields or shapes, [`Error::Unsupported`] for what is not built.
    pub(crate) fn read(checkpoint: &ClipCheckpoint) -> Result<Self> {
        match checkpoint.layout {
            ClipLayout::Transformers => from_json(&checkpoint.config, &checkpoint.path.join("config.json")),
            ClipLayout::OpenAi => from_shapes(checkpoint),
        }
    }
}

#[derive(Deserialize)]
struct RawClipConfig {
    text_config: Option<RawTextConfig>,
    vision_config: Option<RawVisionConfig>,
    /// Old files carry these too; where they do, transformers takes them instead.
    text_config_dict: Option<RawTextConfig>,
    vision_config_dict: Option<RawVisionConfig>,
    projection_dim: Option<usize>,
    quantization_config: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawTextConfig {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    max_position_embeddings: Option<usize>,
    vocab_size: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f32>,
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
}

fn from_json(config: &Value, path: &Path) -> Result<ClipConfig> {
    let raw: RawClipConfig = parse(config, path)?;
    refuse_quantised(&[&raw.quantization_config])?;
    let vision = raw.vision_config_dict.or(raw.vision_config).unwrap_or_default();
    let text = raw.text_config_dict.or(raw.text_config).unwrap_or_default();
    let projection_dim = raw.projection_dim.unwrap_or(512);
    refuse_out_of_range("", &[("projection_dim", projection_dim)], path)?;
    Ok(ClipConfig { vision: vision.validate(&[-1], "full", path)?, text: text.validate(path)?, projection_dim })
}

impl RawTextConfig {
    fn validate(self, path: &Path) -> Result<TextConfig> {
        if let Some(kind) = self.model_type.as_deref().filter(|kind| *kind != "clip_text_model") {
            let hint = "only CLIP text towers (`clip_text_model`) export";
            return Err(Error::unsupported("text_config.model_type", format!("`{kind}`"), hint));
        }
        let activation = self.hidden_act.as_deref().unwrap_or("quick_gelu");
        let encoder = EncoderConfig {
            hidden_size: self.hidden_size.unwrap_or(512),
            intermediate_size: self.intermediate_size.unwrap_or(2048),
            num_heads: self.num_attention_heads.unwrap_or(8),
            activation: Activation::parse("text_config.hidden_act", activation)?,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(1e-5),
        };
        let vocab_size = self.vocab_size.unwrap_or(49_408);
        let context_length = self.max_position_embeddings.unwrap_or(77);
        let num_layers = self.num_hidden_layers.unwrap_or(12);
        let positive = [
            ("hidden_size", encoder.hidden_size),
            ("intermediate_size", encoder.intermediate_size),
            ("num_attention_heads", encoder.num_heads),
            ("num_hidden_layers", num_layers),
            ("vocab_size", vocab_size),
            ("max_position_embeddings", context_length),
        ];
        refuse_out_of_range("text_config.", &positive, path)?;
        refuse_bad_epsilon("text_config.layer_norm_eps", encoder.layer_norm_eps, path)?;
        refuse_uneven("text_config", encoder.hidden_size, encoder.num_heads, path)?;
        let invalid = |reason: String| Error::InvalidConfig { path: path.to_owned(), reason };
        let eos = match self.eos_token_id.map_or(vec![49_407], TokenIds::into_vec)[..] {
            [LEGACY_EOS] => EosRule::LargestId,
            [token_id] if (token_id as usize) < vocab_size => EosRule::First { token_id },
            [token_id] => {
                let reason = format!("`text_config.eos_token_id` {token_id} is outside of the {vocab_size} ids");
                return Err(invalid(reason));
            }
            _ => return Err(invalid("`text_config.eos_token_id`: expected one token id, got a list".to_owned())),
        };
        let pad_token_id = self.pad_token_id.filter(|&id| (id as usize) < vocab_size);
        Ok(TextConfig { encoder, num_layers, vocab_size, context_length, kept_positions: None, eos, pad_token_id })
    }
}

/// As OpenAI's `build_model` does it.
fn from_shapes(checkpoint: &ClipCheckpoint) -> Result<ClipConfig> {
    if !checkpoint.has("visual_projection.weight") {
        return Err(Error::unsupported("the vision tower", "a ResNet", "only CLIPs with a vision transformer export"));
    }
    let [hidden_size, _, patch_size, _] = checkpoint.shape("vision_model.embeddings.patch_embedding.weight")?;
    let [num_tokens, _] = checkpoint.shape("vision_model.embeddings.position_embedding.weight")?;
    let grid = num_tokens.saturating_sub(1).isqrt();
    let invalid = |reason: String| Error::InvalidConfig { path: checkpoint.path.clone(), reason };
    if grid * grid + 1 != num_tokens {
        return Err(invalid(format!("{num_tokens} positions of the vision tower are no square and a class token")));
    }
    let encoder = openai_encoder(checkpoint, "vision_model", hidden_size)?;
    let num_layers = num_layers(checkpoint, "vision_model");
    let vision = VisionConfig {
        hidden_size,
        intermediate_size: encoder.intermediate_size,
        num_heads: encoder.num_heads,
        num_stored_layers: num_layers,
        image_size: grid * patch_size,
        patch_size,
        activation: encoder.activation,
        layer_norm_eps: encoder.layer_norm_eps,
        feature_layers: vec![num_layers],
        keep_class_token: true,
    };
    let [vocab_size, hidden_size] = checkpoint.shape("text_model.embeddings.token_embedding.weight")?;
    let [context_length, _] = checkpoint.shape("text_model.embeddings.position_embedding.weight")?;
    let [_, projection_dim] = checkpoint.shape("text_projection.weight")?;
    let sizes = [
        ("image size", vision.image_size),
        ("vocabulary", vocab_size),
        ("context length", context_length),
        ("width of the embeddings", projection_dim),
    ];
    refuse_out_of_range("", &sizes, &checkpoint.path)?;
    let text = TextConfig {
        encoder: openai_encoder(checkpoint, "text_model", hidden_size)?,
        num_layers: self::num_layers(checkpoint, "text_model"),
        vocab_size,
        context_length,
        kept_positions: checkpoint.has(POSITIONS_RES).then_some(LONG_CLIP_KEPT_POSITIONS.min(context_length)),
        eos: EosRule::LargestId,
        pad_token_id: Some(0),
    };
    Ok(ClipConfig { vision, text, projection_dim })
}

fn openai_encoder(checkpoint: &ClipCheckpoint, tower: &str, hidden_size: usize) -> Result<EncoderConfig> {
    if hidden_size == 0 || !hidden_size.is_multiple_of(OPENAI_HEAD_DIM) {
        let found = format!("{hidden_size} in `{}`", checkpoint.path.display());
        return Err(Error::unsupported("a CLIP tower's width", found, "OpenAI's are made of heads of width 64"));
    }
    let [intermediate_size, _] = checkpoint.shape(&format!("{tower}.encoder.layers.0.mlp.fc1.weight"))?;
    Ok(EncoderConfig {
        hidden_size,
        intermediate_size,
        num_heads: hidden_size / OPENAI_HEAD_DIM,
        activation: Activation::QuickGelu,
        layer_norm_eps: OPENAI_EPS,
    })
}

fn num_layers(checkpoint: &ClipCheckpoint, tower: &str) -> usize {
    let is_stored = |layer: &usize| checkpoint.has(&format!("{tower}.encoder.layers.{layer}.layer_norm1.weight"));
    (0..).take_while(is_stored).count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: &Value) -> Result<ClipConfig> {
        from_json(config, Path::new("config.json"))
    }

    #[test]
    fn a_bare_config_is_clip_vit_b_32() {
        let config = read(&json!({"model_type": "clip"})).expect("valid");
        assert_eq!((config.vision.hidden_size, config.vision.num_patches(), config.vision.num_layers()), (768, 49, 12));
        assert_eq!((config.text.encoder.hidden_size, config.text.context_length), (512, 77));
        assert_eq!((config.text.eos, config.projection_dim), (EosRule::First { token_id: 49_407 }, 512));
        assert_eq!(config.text.encoder.activation, Activation::QuickGelu);
    }

    #[test]
    fn the_end_of_a_text_is_where_transformers_finds_it() {
        let eos = |ids: Value| read(&json!({"text_config": {"eos_token_id": ids}})).map(|config| config.text.eos);
        assert_eq!(eos(json!(2)).expect("valid"), EosRule::LargestId);
        assert_eq!(eos(json!([7])).expect("valid"), EosRule::First { token_id: 7 });
        assert!(eos(json!([7, 8])).expect_err("two ids").to_string().contains("eos_token_id"));
        assert!(eos(json!(49_408)).expect_err("outside").to_string().contains("49408"));
    }

    #[test]
    fn the_dict_of_old_files_goes_before_the_config() {
        let config = json!({"text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 128}});
        assert_eq!(read(&config).expect("valid").text.encoder.hidden_size, 128);
        let config = json!({"text_config": {"hidden_size": 64}, "text_config_dict": null});
        assert_eq!(read(&config).expect("valid").text.encoder.hidden_size, 64);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let cases = [
            (json!({"text_config": {"model_type": "chinese_clip_text_model"}}), "chinese_clip_text_model"),
            (json!({"text_config": {"hidden_act": "mish"}}), "mish"),
            (json!({"text_config": {"hidden_size": 63}}), "63"),
            (json!({"vision_config": {"num_channels": 1}}), "num_channels"),
            (json!({"quantization_config": {}}), "quantization_config"),
            (json!({"projection_dim": 0}), "projection_dim"),
        ];
        for (config, name) in cases {
            let error = read(&config).expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
