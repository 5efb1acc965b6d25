//! An adapter folder of peft: its settings, and what each of its tensors does to which weight. LLaVA's LoRA training puts
//! the weights that it trained whole, the projector's, beside it in `non_lora_trainables.bin`.
//!
//! What changes the model in another way than `W + scale * B A` or whole tensors is refused, by name.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::read_json;
use crate::error::{Error, Result};

/// What peft puts before the names of the model's own modules.
const PREFIX: &str = "base_model.model.";

/// Settings of peft (0.21) that make something else of the adapter than an update of rank `r`.
const UNSUPPORTED: [&str; 11] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
];

/// `adapter_config.json`. `fan_in_fan_out` is left out: peft ignores it for the linear layers that a LLaVA is made of.
#[derive(Deserialize)]
pub(super) struct AdapterConfig {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: Option<bool>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
}

impl AdapterConfig {
    /// Reads `adapter_config.json` in `folder`.
    pub(super) fn read(folder: &Path) -> Result<(Self, Value)> {
        let path = folder.join("adapter_config.json");
        let Some(json) = read_json(&path)? else {
            return Err(Error::MissingFile {
                checkpoint: folder.to_owned(),
                what: "adapter_config.json",
                hint: "--lora takes the folder of a peft adapter: adapter_config.json, adapter_model.safetensors",
            });
        };
        let invalid = |reason: String| Error::InvalidConfig { path: path.clone(), reason };
        let config: Self = serde_path_to_error::deserialize(&json).map_err(|reason| invalid(reason.to_string()))?;
        if let Some(kind) = config.peft_type.as_deref().filter(|kind| *kind != "LORA") {
            return Err(Error::unsupported("peft_type", format!("`{kind}`"), "only LoRA adapters are merged"));
        }
        let is_set = |name: &str| !matches!(json.get(name), None | Some(Value::Null | Value::Bool(false)));
        if let Some(name) = UNSUPPORTED.into_iter().find(|name| is_set(name)) {
            let hint = "merge the adapter with peft's `merge_and_unload` and export the result";
            return Err(Error::unsupported(name, format!("an adapter with `{name}`"), hint));
        }
        match json.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(name)) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => {}
            // PiSSA and its like also change the weights that the adapter stands on.
            Some(other) => {
                let hint = "convert the adapter with peft's `path_initial_model_for_weight_conversion`";
                return Err(Error::unsupported("init_lora_weights", format!("`{other}`"), hint));
            }
        }
        if config.r == 0 || !config.lora_alpha.is_finite() {
            return Err(invalid("expected `r` of at least 1 and a finite `lora_alpha`".to_owned()));
        }
        Ok((config, json))
    }

    /// Rank and scale of the update of `module`.
    pub(super) fn rank_and_scale(&self, module: &str) -> Result<(usize, f32)> {
        let rank = match setting_of(self.rank_pattern.as_ref(), "rank_pattern", module)? {
            None => self.r,
            Some(rank) => rank.as_u64().and_then(|rank| usize::try_from(rank).ok()).unwrap_or(0),
        };
        let alpha = match setting_of(self.alpha_pattern.as_ref(), "alpha_pattern", module)? {
            None => self.lora_alpha,
            Some(alpha) => alpha.as_f64().unwrap_or(f64::NAN),
        };
        if rank == 0 || !alpha.is_finite() {
            return Err(Error::unsupported("rank_pattern or alpha_pattern", format!("the setting for `{module}`"), ""));
        }
        let divisor = if self.use_rslora == Some(true) { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, (alpha / divisor) as f32))
    }
}

/// The entry of a pattern table for `module`: the first key that is the module's name or the end of it, at a dot.
fn setting_of<'v>(pattern: Option<&'v Map<String, Value>>, table: &str, module: &str) -> Result<Option<&'v Value>> {
    for (key, value) in pattern.into_iter().flatten() {
        // peft takes keys as regular expressions; `^` and dots are all that its documentation uses.
        let (is_whole, name) = key.strip_prefix('^').map_or((false, key.as_str()), |name| (true, name));
        let name = name.replace("\\.", ".");
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.') {
            let hint = "name the modules in full, or merge the adapter with peft's `merge_and_unload`";
            return Err(Error::unsupported(table, format!("the regular expression `{key}`"), hint));
        }
        let rest = module.strip_suffix(&name);
        if rest.is_some_and(|rest| rest.is_empty() || (!is_whole && rest.ends_with('.'))) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// What a tensor of an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// `lora_A` `[rank, in]`.
    A,
    /// `lora_B` `[out, rank]`.
    B,
    /// `lora_embedding_A` `[rank, rows]`.
    EmbeddingA,
    /// `lora_embedding_B` `[width, rank]`.
    EmbeddingB,
    /// Takes the place of a tensor of the model.
    Whole,
}

/// Splits a stored name into its module, or its tensor where it is [`Role::Whole`], and its role.
pub(super) fn parse(stored: &str) -> Result<(String, Role)> {
    let name = stored.strip_prefix(PREFIX).unwrap_or(stored);
    if name.contains(".lora_magnitude_vector") {
        return Err(Error::unsupported("DoRA", format!("tensor `{stored}`"), "merge the adapter with peft"));
    }
    let roles = [
        (".lora_A", ".weight", Role::A),
        (".lora_B", ".weight", Role::B),
        (".lora_embedding_A", "", Role::EmbeddingA),
        (".lora_embedding_B", "", Role::EmbeddingB),
    ];
    for (marker, ending, role) in roles {
        let Some((module, rest)) = name.split_once(marker) else { continue };
        // Older files have the adapter's name in between.
        if rest == ending || rest.strip_prefix(".default") == Some(ending) {
            return Ok((module.to_owned(), role));
        }
    }
    if name.contains(".lora_") {
        return Err(Error::unsupported("adapter tensor", format!("`{stored}`"), "merge the adapter with peft"));
    }
    let name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".");
    Ok((name.replace(".base_layer.", "."), Role::Whole))
}

/// The files of an adapter: peft's, and LLaVA's beside it.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let adapter = ["adapter_model.safetensors", "adapter_model.bin"].map(|name| folder.join(name));
    let Some(adapter) = adapter.into_iter().find(|path| path.is_file()) else {
        return Err(Error::MissingFile {
            checkpoint: folder.to_owned(),
            what: "adapter_model.safetensors or adapter_model.bin",
            hint: "--lora takes the folder of a peft adapter: adapter_config.json, adapter_model.safetensors",
        });
    };
    let trained_whole = folder.join("non_lora_trainables.bin");
    Ok([adapter, trained_whole].into_iter().filter(|path| path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_versions_of_peft_are_understood() {
        let cases = [
            ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.up_proj", Role::A),
            (
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight",
                "model.layers.0.mlp.up_proj",
                Role::B,
            ),
            ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens", Role::EmbeddingA),
            ("base_model.model.lm_head.weight", "lm_head.weight", Role::Whole),
            ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight", Role::Whole),
            ("base_model.model.model.mm_projector.0.bias", "model.mm_projector.0.bias", Role::Whole),
            ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens.weight", Role::Whole),
        ];
        for (stored, name, role) in cases {
            assert_eq!(parse(stored).expect(stored), (name.to_owned(), role));
        }
        for stored in ["base_model.model.x.lora_magnitude_vector", "base_model.model.x.lora_B.bias"] {
            assert!(parse(stored).expect_err(stored).to_string().contains(stored));
        }
    }

    #[test]
    fn ranks_and_scales_follow_the_patterns_of_peft() {
        let config: AdapterConfig = serde_json::from_value(serde_json::json!({
            "r": 4, "lora_alpha": 8, "use_rslora": true,
            "rank_pattern": {"mlp.down_proj": 16}, "alpha_pattern": {"^model.layers.0.mlp.down_proj": 2, "proj": 99},
        }))
        .expect("valid");
        assert_eq!(config.rank_and_scale("model.layers.0.mlp.down_proj").expect("valid"), (16, 0.5));
        assert_eq!(config.rank_and_scale("model.layers.1.mlp.down_proj").expect("valid"), (16, 2.0));
        assert_eq!(config.rank_and_scale("model.layers.1.mlp.up_proj").expect("valid"), (4, 4.0));
        let config: AdapterConfig =
            serde_json::from_value(serde_json::json!({"r": 4, "lora_alpha": 8, "rank_pattern": {".*": 2}}))
                .expect("valid");
        assert!(config.rank_and_scale("x").expect_err("a pattern").to_string().contains("rank_pattern"));
    }
}
