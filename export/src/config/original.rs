//! `config.json` of the original layout: LLaMA's settings with LLaVA's `mm_` ones beside them. It says nothing of the
//! vision tower but a name: the tower's own config.json does, or the shapes of its weights.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{LlavaConfig, ProjectorConfig, RawTextConfig, RawVisionConfig, TokenIds};
use super::{parse, refuse_other_models, refuse_quantised};
use crate::activation::Activation;
use crate::checkpoint::{Checkpoint, Part};
use crate::error::{Error, Result};

/// Width of a head in every CLIP tower that LLaVA was trained with.
const CLIP_HEAD_DIM: usize = 64;

/// LLaVA's own settings, with its defaults.
#[derive(Deserialize)]
struct RawOriginalConfig {
    model_type: Option<String>,
    mm_vision_select_layer: Option<i64>,
    mm_vision_select_feature: Option<String>,
    mm_projector_type: Option<String>,
    mm_patch_merge_type: Option<String>,
    image_aspect_ratio: Option<String>,
    mm_use_im_start_end: Option<bool>,
    mm_use_im_patch_token: Option<bool>,
    s2: Option<bool>,
    eos_token_id: Option<TokenIds>,
    bos_token_id: Option<u32>,
    quantization_config: Option<Value>,
}

pub(super) fn read(checkpoint: &Checkpoint) -> Result<LlavaConfig> {
    let path = &checkpoint.config_path;
    let (layer, strategy) = image_features(&checkpoint.config, path)?;
    let raw: RawOriginalConfig = parse(&checkpoint.config, path)?;
    let text = RawTextConfig { model_type: None, ..parse(&checkpoint.config, path)? };
    Ok(LlavaConfig {
        vision: vision(checkpoint)?.validate(&[layer], strategy, path)?,
        projector: ProjectorConfig { activation: Activation::parse("mm_projector_type", "gelu")?, bias: true },
        decoder: text.validate("", None, path)?,
        image_token_id: None,
        eos_token_ids: raw.eos_token_id.map(TokenIds::into_vec).unwrap_or_default(),
        bos_token_id: raw.bos_token_id,
    })
}

/// Which hidden state an image's features are, and which of its tokens in transformers' word.
///
/// # Errors
/// Where the captioner is of a kind that does not export.
pub(super) fn image_features(config: &Value, path: &Path) -> Result<(i64, &'static str)> {
    let raw: RawOriginalConfig = parse(config, path)?;
    raw.refuse_unsupported()?;
    let strategy = match raw.mm_vision_select_feature.as_deref().unwrap_or("patch") {
        "patch" => "default",
        "cls_patch" => "full",
        other => {
            let found = format!("`{other}`");
            return Err(Error::unsupported("mm_vision_select_feature", found, "expected `patch` or `cls_patch`"));
        }
    };
    Ok((raw.mm_vision_select_layer.unwrap_or(-2), strategy))
}

impl RawOriginalConfig {
    fn refuse_unsupported(&self) -> Result<()> {
        refuse_other_models(self.model_type.as_deref(), &["llava", "llava_llama"])?;
        refuse_quantised(&[&self.quantization_config])?;
        match self.mm_patch_merge_type.as_deref() {
            None | Some("flat") => {}
            Some(other) => return Err(Error::llava_next("mm_patch_merge_type", format!("`{other}`"))),
        }
        match self.image_aspect_ratio.as_deref() {
            None | Some("pad" | "square") => {}
            Some(other) if other.starts_with("anyres") => {
                return Err(Error::llava_next("image_aspect_ratio", format!("`{other}`")));
            }
            Some(other) => {
                let found = format!("`{other}`");
                return Err(Error::unsupported("image_aspect_ratio", found, "expected `pad` or `square`"));
            }
        }
        match self.mm_projector_type.as_deref().unwrap_or("linear") {
            "mlp2x_gelu" => {}
            other => {
                let hint = "only the two-layer projector of LLaVA-1.5, `mlp2x_gelu`, exports";
                return Err(Error::unsupported("mm_projector_type", format!("`{other}`"), hint));
            }
        }
        let flags = [
            ("mm_use_im_start_end", self.mm_use_im_start_end),
            ("mm_use_im_patch_token", self.mm_use_im_patch_token),
            ("s2", self.s2),
        ];
        match flags.into_iter().find(|(_, flag)| *flag == Some(true)) {
            Some((name, _)) => Err(Error::unsupported(name, "true", "only LLaVA-1.5 checkpoints export")),
            None => Ok(()),
        }
    }
}

/// The tower's settings: those of the folder that `--vision-tower` names, else what the embedded tower's shapes tell.
fn vision(checkpoint: &Checkpoint) -> Result<RawVisionConfig> {
    match &checkpoint.tower {
        // A CLIPModel has them in a section, a CLIPVisionModel as its whole config.json.
        Some(tower) => {
            let config = tower.config.get("vision_config").unwrap_or(&tower.config);
            parse(config, &tower.folder.join("config.json"))
        }
        None => vision_from_shapes(checkpoint),
    }
}

/// CLIP ViT-L's settings where shapes do not tell: heads of 64, `quick_gelu`, an epsilon of 1e-5.
fn vision_from_shapes(checkpoint: &Checkpoint) -> Result<RawVisionConfig> {
    let refuse = |reason: String| Err(Error::InvalidConfig { path: checkpoint.config_path.clone(), reason });
    let shape = |name: &str| checkpoint.shape(Part::VisionTower, name);
    let (&[hidden_size, _, patch_size, _], &[num_positions, _], &[intermediate_size, _]) = (
        shape("embeddings.patch_embedding.weight")?,
        shape("embeddings.position_embedding.weight")?,
        shape("encoder.layers.0.mlp.fc1.weight")?,
    ) else {
        return refuse("the embedded vision tower is not CLIP's: its tensors have other shapes".to_owned());
    };
    let side = num_positions.saturating_sub(1).isqrt();
    if side * side + 1 != num_positions {
        return refuse(format!(
            "the embedded vision tower has {num_positions} positions: not a square and a class token"
        ));
    }
    if hidden_size == 0 || !hidden_size.is_multiple_of(CLIP_HEAD_DIM) {
        return refuse(format!(
            "the embedded vision tower is {hidden_size} wide, so its number of heads is unknown; give the folder of the \
             model it was trained from with --vision-tower"
        ));
    }
    let layer = |name: &str| name.strip_prefix("encoder.layers.")?.split('.').next()?.parse::<usize>().ok();
    let last_layer = checkpoint.names(Part::VisionTower).filter_map(layer).max();
    Ok(RawVisionConfig {
        hidden_size: Some(hidden_size),
        intermediate_size: Some(intermediate_size),
        num_hidden_layers: Some(last_layer.map_or(0, |layer| layer.saturating_add(1))),
        num_attention_heads: Some(hidden_size / CLIP_HEAD_DIM),
        image_size: Some(side.saturating_mul(patch_size)),
        patch_size: Some(patch_size),
        ..RawVisionConfig::default()
    })
}
