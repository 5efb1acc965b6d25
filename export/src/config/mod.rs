//! `config.json` of a LLaVA checkpoint, with transformers' defaults, checked: what the exporter does not build is refused
//! here, by name, before anything is written. [`original`] reads that of the original layout.
//!
//! Both generations of transformers' file are read: 4.x (`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`).

mod dims;
mod original;

use std::path::Path;

pub use dims::{parse_dims, read_dims};
use serde::Deserialize;
use serde_json::Value;

use crate::activation::Activation;
use crate::checkpoint::{Checkpoint, Layout};
use crate::encoder::EncoderConfig;
use crate::error::{Error, Result};

/// No dimension of a real model comes near; a larger one is a damaged file.
pub(crate) const MAX_DIMENSION: usize = 1 << 24;
/// Most positions of a bundle: a prompt with its image and caption takes under a thousand, and the rotary tables of a
/// million positions would be half a gigabyte.
const MAX_POSITIONS: usize = 32_768;

/// A LLaVA checkpoint's dimensions and options.
#[derive(Clone, Debug)]
pub(crate) struct LlavaConfig {
    pub(crate) vision: VisionConfig,
    pub(crate) projector: ProjectorConfig,
    pub(crate) decoder: DecoderConfig,
    /// The id of `<image>` in prompts; the original layout has none.
    pub(crate) image_token_id: Option<u32>,
    /// Stop ids that config.json names; generation_config.json goes before them.
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) bos_token_id: Option<u32>,
}

/// The CLIP vision tower.
#[derive(Clone, Debug)]
pub(crate) struct VisionConfig {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_heads: usize,
    /// Encoder layers of the checkpoint, computed or not.
    pub(crate) num_stored_layers: usize,
    pub(crate) image_size: usize,
    pub(crate) patch_size: usize,
    pub(crate) activation: Activation,
    pub(crate) layer_norm_eps: f32,
    /// Indices into the hidden states (0 = after the embeddings' norm, n = after n layers), concatenated.
    pub(crate) feature_layers: Vec<usize>,
    /// Whether the class token is one of the image tokens (`vision_feature_select_strategy: full`).
    pub(crate) keep_class_token: bool,
}

impl VisionConfig {
    /// Dimensions of the tower's layers.
    pub(crate) fn encoder(&self) -> EncoderConfig {
        let Self { hidden_size, intermediate_size, num_heads, activation, layer_norm_eps, .. } = *self;
        EncoderConfig { hidden_size, intermediate_size, num_heads, activation, layer_norm_eps }
    }

    /// Patches of one image.
    pub(crate) fn num_patches(&self) -> usize {
        let side = self.image_size / self.patch_size;
        side * side
    }

    /// Tokens that one image takes in the prompt.
    pub(crate) fn num_image_tokens(&self) -> usize {
        self.num_patches() + usize::from(self.keep_class_token)
    }

    /// Encoder layers that are computed: those below the highest selected one.
    pub(crate) fn num_layers(&self) -> usize {
        self.feature_layers.iter().copied().max().unwrap_or(0)
    }

    /// Width of one image token before the projector.
    pub(crate) fn feature_size(&self) -> usize {
        self.hidden_size * self.feature_layers.len()
    }
}

/// The two-layer MLP between tower and decoder.
#[derive(Clone, Debug)]
pub(crate) struct ProjectorConfig {
    pub(crate) activation: Activation,
    pub(crate) bias: bool,
}

/// The LLaMA decoder.
#[derive(Clone, Debug)]
pub(crate) struct DecoderConfig {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_layers: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f32,
    pub(crate) activation: Activation,
    pub(crate) attention_bias: bool,
    pub(crate) mlp_bias: bool,
    pub(crate) rope: Rope,
    /// Whether a missing head is the embedding table; a head that is stored is used in any case.
    pub(crate) tie_word_embeddings: bool,
}

impl DecoderConfig {
    /// Positions that the bundle serves: rows of the rotary tables.
    pub(crate) fn num_positions(&self) -> usize {
        self.max_position_embeddings.min(MAX_POSITIONS)
    }
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    pub(crate) theta: f64,
    pub(crate) scaling: RopeScaling,
}

/// How the rotary frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RopeScaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    #[serde(default)]
    text_config: RawTextConfig,
    vision_config: Option<RawVisionConfig>,
    #[serde(default = "default_feature_layer")]
    vision_feature_layer: FeatureLayers,
    #[serde(default = "default_select_strategy")]
    vision_feature_select_strategy: String,
    #[serde(default = "default_projector_act")]
    projector_hidden_act: String,
    multimodal_projector_bias: Option<bool>,
    image_token_index: Option<u32>,
    image_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    bos_token_id: Option<u32>,
    tie_word_embeddings: Option<bool>,
    quantization_config: Option<Value>,
}

/// One token id or a list of them, as `eos_token_id` comes in both forms.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FeatureLayers {
    One(i64),
    Many(Vec<i64>),
}

fn default_feature_layer() -> FeatureLayers {
    FeatureLayers::One(-2)
}

fn default_select_strategy() -> String {
    "default".to_owned()
}

fn default_projector_act() -> String {
    "gelu".to_owned()
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawTextConfig {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<f64>,
    rms_norm_eps: Option<f32>,
    vocab_size: Option<usize>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    tie_word_embeddings: Option<bool>,
    eos_token_id: Option<TokenIds>,
    bos_token_id: Option<u32>,
    quantization_config: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// Name of `rope_type` in older files; some carry both.
    r#type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

impl RawRope {
    fn is_empty(&self) -> bool {
        self.rope_theta.is_none() && self.rope_type.is_none() && self.r#type.is_none() && self.factor.is_none()
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct RawVisionConfig {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_channels: Option<usize>,
    image_size: Option<usize>,
    patch_size: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f32>,
}

impl RawVisionConfig {
    /// What `LlavaConfig` assumes without a `vision_config`: CLIP ViT-L/14 at 336 px.
    fn clip_vit_l_336() -> Self {
        Self {
            hidden_size: Some(1024),
            intermediate_size: Some(4096),
            num_hidden_layers: Some(24),
            num_attention_heads: Some(16),
            image_size: Some(336),
            patch_size: Some(14),
            ..Self::default()
        }
    }
}

impl LlavaConfig {
    /// Reads and checks the configuration of `checkpoint`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for malformed fields, [`Error::Unsupported`] for what is not built.
    pub(crate) fn read(checkpoint: &Checkpoint) -> Result<Self> {
        match checkpoint.layout {
            Layout::Original => original::read(checkpoint),
            _ => Self::from_transformers(&checkpoint.config, &checkpoint.config_path),
        }
    }

    /// `config.json` as transformers writes it; `path` is only for messages.
    pub(crate) fn from_transformers(config: &Value, path: &Path) -> Result<Self> {
        let raw: RawConfig = parse(config, path)?;
        refuse_other_models(raw.model_type.as_deref(), &["llava"])?;
        refuse_quantised(&[&raw.quantization_config, &raw.text_config.quantization_config])?;
        let vision = raw.vision_config.unwrap_or_else(RawVisionConfig::clip_vit_l_336);
        let layers = match raw.vision_feature_layer {
            FeatureLayers::One(layer) => vec![layer],
            FeatureLayers::Many(layers) => layers,
        };
        let eos = raw.eos_token_id.or_else(|| raw.text_config.eos_token_id.clone());
        let bos_token_id = raw.bos_token_id.or(raw.text_config.bos_token_id);
        let decoder = raw.text_config.validate("text_config.", raw.tie_word_embeddings, path)?;
        Ok(Self {
            vision: vision.validate(&layers, &raw.vision_feature_select_strategy, path)?,
            projector: ProjectorConfig {
                activation: Activation::parse("projector_hidden_act", &raw.projector_hidden_act)?,
                bias: raw.multimodal_projector_bias.unwrap_or(true),
            },
            decoder,
            image_token_id: Some(raw.image_token_index.or(raw.image_token_id).unwrap_or(32000)),
            eos_token_ids: eos.map(TokenIds::into_vec).unwrap_or_default(),
            bos_token_id,
        })
    }
}

impl RawVisionConfig {
    pub(crate) fn validate(self, layers: &[i64], strategy: &str, path: &Path) -> Result<VisionConfig> {
        if let Some(kind) = self.model_type.as_deref().filter(|kind| *kind != "clip_vision_model") {
            return Err(Error::unsupported(
                "vision_config.model_type",
                format!("`{kind}`"),
                "only CLIP vision towers (`clip_vision_model`) export",
            ));
        }
        if let Some(channels) = self.num_channels.filter(|&channels| channels != 3) {
            return Err(Error::unsupported("vision_config.num_channels", channels, "only RGB towers export"));
        }
        let keep_class_token = match strategy {
            "default" => false,
            "full" => true,
            other => {
                return Err(Error::unsupported(
                    "vision_feature_select_strategy",
                    format!("`{other}`"),
                    "expected `default` or `full`",
                ));
            }
        };
        let num_layers = self.num_hidden_layers.unwrap_or(12).min(MAX_DIMENSION) as i64;
        let num_states = num_layers + 1;
        let feature_layers = layers
            .iter()
            .map(|&layer| {
                let index = if layer < 0 { num_states + layer } else { layer };
                usize::try_from(index).ok().filter(|_| index < num_states).ok_or_else(|| Error::InvalidConfig {
                    path: path.to_owned(),
                    reason: format!("vision_feature_layer {layer} is outside of the tower's {num_layers} layers"),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        if feature_layers.is_empty() {
            return Err(Error::InvalidConfig {
                path: path.to_owned(),
                reason: "vision_feature_layer is empty".to_owned(),
            });
        }
        let vision = VisionConfig {
            hidden_size: self.hidden_size.unwrap_or(768),
            intermediate_size: self.intermediate_size.unwrap_or(3072),
            num_heads: self.num_attention_heads.unwrap_or(12),
            num_stored_layers: num_layers as usize,
            image_size: self.image_size.unwrap_or(224),
            patch_size: self.patch_size.unwrap_or(32),
            activation: Activation::parse(
                "vision_config.hidden_act",
                self.hidden_act.as_deref().unwrap_or("quick_gelu"),
            )?,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(1e-5),
            feature_layers,
            keep_class_token,
        };
        let positive = [
            ("hidden_size", vision.hidden_size),
            ("intermediate_size", vision.intermediate_size),
            ("patch_size", vision.patch_size),
            ("num_attention_heads", vision.num_heads),
            ("image_size", vision.image_size),
            ("image_size / patch_size", vision.image_size / vision.patch_size.max(1)),
        ];
        refuse_out_of_range("vision_config.", &positive, path)?;
        refuse_bad_epsilon("layer_norm_eps", vision.layer_norm_eps, path)?;
        refuse_uneven("vision_config", vision.hidden_size, vision.num_heads, path)?;
        Ok(vision)
    }
}

impl RawTextConfig {
    /// `section` goes before the names of fields in messages.
    fn validate(self, section: &str, top_level_tie: Option<bool>, path: &Path) -> Result<DecoderConfig> {
        if let Some(kind) = self.model_type.as_deref().filter(|kind| *kind != "llama") {
            return Err(Error::unsupported(
                &format!("{section}model_type"),
                format!("`{kind}`"),
                "only LLaMA decoders (`llama`) export",
            ));
        }
        let rope = self.rope(path)?;
        let hidden_size = self.hidden_size.unwrap_or(4096);
        let num_heads = self.num_attention_heads.unwrap_or(32);
        let num_kv_heads = self.num_key_value_heads.unwrap_or(num_heads);
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None => {
                refuse_uneven(&format!("{section}hidden_size"), hidden_size, num_heads, path)?;
                hidden_size / num_heads
            }
        };
        let decoder = DecoderConfig {
            hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or(11008),
            num_layers: self.num_hidden_layers.unwrap_or(32),
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: self.vocab_size.unwrap_or(32000),
            max_position_embeddings: self.max_position_embeddings.unwrap_or(2048),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            activation: Activation::parse(
                &format!("{section}hidden_act"),
                self.hidden_act.as_deref().unwrap_or("silu"),
            )?,
            attention_bias: self.attention_bias.unwrap_or(false),
            mlp_bias: self.mlp_bias.unwrap_or(false),
            rope,
            tie_word_embeddings: self.tie_word_embeddings == Some(true) || top_level_tie == Some(true),
        };
        let positive = [
            ("hidden_size", decoder.hidden_size),
            ("intermediate_size", decoder.intermediate_size),
            ("num_hidden_layers", decoder.num_layers),
            ("num_attention_heads", decoder.num_heads),
            ("num_key_value_heads", decoder.num_kv_heads),
            ("max_position_embeddings", decoder.num_positions()),
            ("head_dim", decoder.head_dim),
            ("vocab_size", decoder.vocab_size),
        ];
        refuse_bad_epsilon(&format!("{section}rms_norm_eps"), decoder.rms_norm_eps, path)?;
        refuse_out_of_range(section, &positive, path)?;
        refuse_uneven(&format!("{section}num_attention_heads"), decoder.num_heads, decoder.num_kv_heads, path)?;
        if !decoder.head_dim.is_multiple_of(2) {
            return Err(Error::unsupported(
                &format!("{section}head_dim"),
                decoder.head_dim,
                "rotary embedding needs an even one",
            ));
        }
        Ok(decoder)
    }

    fn rope(&self, path: &Path) -> Result<Rope> {
        // transformers' order; an empty object counts as none.
        let raw = [&self.rope_scaling, &self.rope_parameters].into_iter().flatten().find(|raw| !raw.is_empty());
        let theta = raw.and_then(|raw| raw.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let is_usable = |value: f64| value > 0.0 && (value as f32) > 0.0 && (value as f32).is_finite();
        if !is_usable(theta) {
            return Err(Error::unsupported("rope_theta", theta, "expected a positive number"));
        }
        let Some(raw) = raw else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
        if let Some(factor) = raw.partial_rotary_factor.filter(|&factor| factor != 1.0) {
            return Err(Error::unsupported("partial_rotary_factor", factor, ""));
        }
        let need = |name: &str, value: Option<f64>| {
            value.filter(|value| is_usable(*value)).ok_or_else(|| Error::InvalidConfig {
                path: path.to_owned(),
                reason: format!("rope scaling needs a positive `{name}`"),
            })
        };
        let scaling = match raw.rope_type.as_deref().or(raw.r#type.as_deref()).unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor", raw.factor)? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor", raw.factor)?,
                low_freq_factor: need("low_freq_factor", raw.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", raw.high_freq_factor)?,
                original_max_position_embeddings: need(
                    "original_max_position_embeddings",
                    self.original_max_position_embeddings
                        .or(raw.original_max_position_embeddings)
                        .or_else(|| Some(self.max_position_embeddings.unwrap_or(2048) as f64)),
                )?,
            },
            other => {
                return Err(Error::unsupported(
                    "rope scaling type",
                    format!("`{other}`"),
                    "supported are `default`, `linear` and `llama3`",
                ));
            }
        };
        Ok(Rope { theta, scaling })
    }
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(config: &Value, path: &Path) -> Result<T> {
    serde_path_to_error::deserialize(config)
        .map_err(|reason| Error::InvalidConfig { path: path.to_owned(), reason: reason.to_string() })
}

fn refuse_other_models(model_type: Option<&str>, known: &[&str]) -> Result<()> {
    match model_type {
        Some(model_type) if known.contains(&model_type) => Ok(()),
        Some("llava_next") => Err(Error::llava_next("model_type", "`llava_next`")),
        found => Err(Error::unsupported(
            "model_type",
            format!("`{}`", found.unwrap_or("none")),
            "export takes LLaVA-1.5 with a LLaMA decoder (`model_type: llava` or `llava_llama`) and CLIP (`clip`)",
        )),
    }
}

pub(crate) fn refuse_quantised(configs: &[&Option<Value>]) -> Result<()> {
    if configs.iter().all(|config| config.is_none()) {
        return Ok(());
    }
    Err(Error::unsupported("quantization_config", "a quantised checkpoint", "export the unquantised checkpoint"))
}

pub(crate) fn refuse_out_of_range(section: &str, fields: &[(&str, usize)], path: &Path) -> Result<()> {
    match fields.iter().find(|(_, value)| !(1..=MAX_DIMENSION).contains(value)) {
        Some((name, value)) => {
            let reason = format!("`{section}{name}`: expected 1 to {MAX_DIMENSION}, got {value}");
            Err(Error::InvalidConfig { path: path.to_owned(), reason })
        }
        None => Ok(()),
    }
}

pub(crate) fn refuse_bad_epsilon(name: &str, value: f32, path: &Path) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    let reason = format!("`{name}`: expected a number of at least 0, got {value}");
    Err(Error::InvalidConfig { path: path.to_owned(), reason })
}

pub(crate) fn refuse_uneven(what: &str, size: usize, heads: usize, path: &Path) -> Result<()> {
    if heads == 0 || !size.is_multiple_of(heads) {
        let reason = format!("{what}: {size} does not divide into {heads} heads");
        return Err(Error::InvalidConfig { path: path.to_owned(), reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(config: serde_json::Value) -> Result<LlavaConfig> {
        LlavaConfig::from_transformers(&config, Path::new("config.json"))
    }

    #[test]
    fn a_bare_config_is_llava_1_5_7b() {
        let config = parse(serde_json::json!({"model_type": "llava"})).expect("valid");
        assert_eq!(config.vision.num_image_tokens(), 576);
        assert_eq!(config.vision.num_layers(), 23);
        assert_eq!((config.decoder.hidden_size, config.decoder.head_dim), (4096, 128));
    }

    #[test]
    fn both_generations_of_rope_settings_are_read() {
        let old = parse(serde_json::json!({"model_type": "llava", "text_config": {
            "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}}));
        let new = parse(serde_json::json!({"model_type": "llava", "text_config": {
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}}}));
        let expected = Rope { theta: 500_000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
        assert_eq!(old.expect("valid").decoder.rope, expected);
        assert_eq!(new.expect("valid").decoder.rope, expected);
    }

    /// transformers' `convert_rope_params_to_dict` and `standardize_rope_params` (5.23).
    #[test]
    fn rope_settings_have_the_precedence_of_transformers() {
        let text = |config: serde_json::Value| {
            parse(serde_json::json!({"model_type": "llava", "text_config": config}))
                .map(|config| config.decoder.rope.scaling)
        };
        let linear = |factor| serde_json::json!({"rope_type": "linear", "factor": factor});
        let both = text(serde_json::json!({"rope_scaling": linear(2.0), "rope_parameters": linear(4.0)}));
        assert_eq!(both.expect("valid"), RopeScaling::Linear { factor: 2.0 });
        let empty = text(serde_json::json!({"rope_scaling": {}, "rope_parameters": linear(4.0)}));
        assert_eq!(empty.expect("valid"), RopeScaling::Linear { factor: 4.0 });

        let llama3 = |original: Option<u32>| {
            let mut rope = serde_json::json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0});
            if let Some(original) = original {
                rope["original_max_position_embeddings"] = original.into();
            }
            rope
        };
        let original = |config: serde_json::Value| match text(config).expect("valid") {
            RopeScaling::Llama3 { original_max_position_embeddings, .. } => original_max_position_embeddings,
            other => panic!("{other:?}"),
        };
        let above = serde_json::json!({"rope_scaling": llama3(Some(64)), "original_max_position_embeddings": 32});
        assert_eq!(original(above), 32.0);
        assert_eq!(original(serde_json::json!({"rope_scaling": llama3(Some(64))})), 64.0);
        let neither = serde_json::json!({"rope_scaling": llama3(None), "max_position_embeddings": 4096});
        assert_eq!(original(neither), 4096.0);
    }

    #[test]
    fn numbers_that_no_model_has_are_refused_by_the_name_of_their_field() {
        let cases = [
            (serde_json::json!({"head_dim": 1u64 << 40}), "text_config.head_dim"),
            (serde_json::json!({"num_key_value_heads": 0}), "num_key_value_heads"),
            (serde_json::json!({"hidden_size": "48"}), "text_config.hidden_size"),
            (serde_json::json!({"rope_theta": -5.0}), "rope_theta"),
            (serde_json::json!({"rms_norm_eps": 1e300}), "rms_norm_eps"),
            (serde_json::json!({"rope_scaling": {"type": "linear", "factor": 1e-320}}), "factor"),
        ];
        for (config, name) in cases {
            let error = parse(serde_json::json!({"model_type": "llava", "text_config": config})).expect_err(name);
            assert!(error.to_string().contains(name), "{name}: {error}");
        }
    }

    #[test]
    fn a_million_positions_make_no_larger_tables_than_captions_need() {
        let config = serde_json::json!({"model_type": "llava", "text_config": {"max_position_embeddings": 1u64 << 60}});
        assert_eq!(parse(config).expect("valid").decoder.num_positions(), MAX_POSITIONS);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let cases = [
            (serde_json::json!({"model_type": "llava_next"}), "llava_next"),
            (serde_json::json!({"model_type": "llava", "text_config": {"model_type": "qwen2"}}), "qwen2"),
            (
                serde_json::json!({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}),
                "siglip",
            ),
            (serde_json::json!({"model_type": "llava", "text_config": {"rope_scaling": {"type": "yarn"}}}), "yarn"),
            (serde_json::json!({"model_type": "llava", "projector_hidden_act": "mish"}), "mish"),
            (serde_json::json!({"model_type": "llava", "vision_feature_select_strategy": "cls"}), "cls"),
            (serde_json::json!({"model_type": "llava", "quantization_config": {"bits": 4}}), "quantization_config"),
        ];
        for (config, name) in cases {
            let error = parse(config).expect_err(name);
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(name), "{error}");
        }
    }
}
