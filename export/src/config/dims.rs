//! A captioner's dimensions from its config.json alone, without weights: enough to count its arithmetic and memory.

use std::path::Path;

use serde_json::Value;

use super::{LlavaConfig, RawTextConfig, RawVisionConfig, original, parse};
use crate::error::{Error, Result};
use crate::manifest::{DecoderDims, VisionDims, read_at_most};

/// Most bytes of a config.json; those of published captioners have a few kB.
const MAX_BYTES: u64 = 1 << 20;
/// The only tower that configurations of the original layout name without saying more of it.
const KNOWN_TOWER: &str = "clip-vit-large-patch14-336";

/// Dimensions of the captioner that the config.json at `path` describes, in either layout. That of the LLaVA repository says
/// nothing of its vision tower but the name, so that only `clip-vit-large-patch14-336` is known.
///
/// # Errors
/// [`Error::InvalidConfig`] for malformed fields, [`Error::Unsupported`] for what export does not build.
pub fn read_dims(path: &Path) -> Result<(VisionDims, DecoderDims)> {
    let text = read_at_most(path, MAX_BYTES)?;
    let invalid =
        |reason: serde_json::Error| Error::InvalidConfig { path: path.to_owned(), reason: reason.to_string() };
    parse_dims(&serde_json::from_slice(&text).map_err(invalid)?, path)
}

/// As [`read_dims`], of a file that was read already; `path` is only for messages.
///
/// # Errors
/// Those of [`read_dims`].
pub fn parse_dims(config: &Value, path: &Path) -> Result<(VisionDims, DecoderDims)> {
    if config.get("mm_vision_tower").is_none() && config.get("mm_projector_type").is_none() {
        let config = LlavaConfig::from_transformers(config, path)?;
        return Ok((VisionDims::of(&config.vision), DecoderDims::of(&config.decoder)));
    }
    let tower = config.get("mm_vision_tower").and_then(Value::as_str).unwrap_or_default();
    if !tower.contains(KNOWN_TOWER) {
        let hint =
            "only openai/clip-vit-large-patch14-336 is known by name; export the checkpoint, and take the bundle";
        return Err(Error::unsupported("mm_vision_tower", format!("`{tower}`"), hint));
    }
    let (layer, strategy) = original::image_features(config, path)?;
    let vision = RawVisionConfig::clip_vit_l_336().validate(&[layer], strategy, path)?;
    let text = RawTextConfig { model_type: None, ..parse(config, path)? };
    Ok((VisionDims::of(&vision), DecoderDims::of(&text.validate("", None, path)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two layouts' files for the paper's captioner, as published.
    #[test]
    fn both_layouts_have_the_papers_captioner() {
        let text = serde_json::json!({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5});
        let mut original = text.clone();
        for (name, value) in [
            ("model_type", "llava_llama"),
            ("mm_vision_tower", "openai/clip-vit-large-patch14-336"),
            ("mm_projector_type", "mlp2x_gelu"),
            ("mm_vision_select_feature", "patch"),
            ("image_aspect_ratio", "pad"),
        ] {
            original[name] = value.into();
        }
        original["mm_vision_select_layer"] = (-2).into();
        let transformers = serde_json::json!({"model_type": "llava", "text_config": text});
        let parse = |config| parse_dims(config, Path::new("config.json"));
        let (vision, decoder) = parse(&original).expect("valid");
        assert_eq!((vision.num_layers, vision.num_image_tokens, decoder.head_dim), (23, 576, 128));
        assert_eq!((vision, decoder), parse(&transformers).expect("valid"));

        let mut original = original.clone();
        original["mm_vision_tower"] = "google/siglip".into();
        assert!(parse(&original).expect_err("unknown").to_string().contains("mm_vision_tower"));
    }
}
