//! What is planned for: a captioner's dimensions, and what its weights and its cache take. From a bundle, from the config.json of
//! a checkpoint, or by the name of a well-known one.

use std::path::Path;

use recaption_export::{BundleManifest, DataType, DecoderDims, MANIFEST_FILE, Manifest, Precision, Target, VisionDims};
use recaption_kernels::KEY_PANEL;
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::model::kv_cache::CacheShape;
use crate::model::memory_plan::ModelSizes;

/// A captioner, without its weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// Of the checkpoint.
    pub name: String,
    /// Of the decoder's weights.
    pub precision: Precision,
    /// Of the weights of vision tower and projector.
    pub vision_precision: Precision,
    /// Whose operators the graphs are made of.
    pub target: Target,
    /// Type of the decoder's activations.
    pub activations: DataType,
    /// Of the vision tower.
    pub vision: VisionDims,
    /// Of the decoder.
    pub decoder: DecoderDims,
    /// Bytes of the weights of vision tower and projector.
    pub vision_bytes: u64,
    /// Bytes of the decoder's weights.
    pub decoder_bytes: u64,
    /// Those of them that each step reads: all but the embedding table.
    pub step_bytes: u64,
    /// The cache of one caption.
    #[serde(skip)]
    pub(crate) cache: CacheShape,
}

/// How a captioner that is not exported yet would be.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Of the decoder's weights.
    pub precision: Precision,
    /// Whose operators the graphs would be made of.
    pub target: Target,
}

/// Names that stand for a well-known checkpoint's config.json.
pub const PRESETS: [&str; 3] = ["llava-llama-3-8b", "llava-1.5-7b", "llava-1.5-13b"];

impl Model {
    /// A bundle's folder, a checkpoint's folder, a config.json, or one of [`PRESETS`]. `form` is for what is no bundle.
    ///
    /// # Errors
    /// [`Error::Bundle`] when what is there does not read, [`Error::Setting`] when there is nothing.
    pub fn find(text: &str, form: Form) -> Result<Self> {
        let path = Path::new(text);
        if path.join(MANIFEST_FILE).is_file() {
            return match BundleManifest::read(path)? {
                BundleManifest::Llava(manifest) => Self::of_bundle(&manifest),
                BundleManifest::Clip(_) => Err(Error::Setting {
                    reason: format!("`{text}` is a CLIP, which captions nothing"),
                    hint: "give the bundle of a captioner".to_owned(),
                }),
            };
        }
        let config = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        if config.is_file() {
            let folder = config.canonicalize().unwrap_or_else(|_| config.clone());
            let name = folder.parent().and_then(Path::file_name);
            let name = name.map_or_else(|| text.to_owned(), |name| name.to_string_lossy().into_owned());
            let (vision, decoder) = recaption_export::read_dims(&config)?;
            return Ok(Self::of_dims(name, vision, decoder, form));
        }
        if let Some(config) = preset(text) {
            let (vision, decoder) = recaption_export::parse_dims(&config, path)?;
            return Ok(Self::of_dims(text.to_owned(), vision, decoder, form));
        }
        Err(Error::Setting {
            reason: format!("--model `{text}`: no bundle, no checkpoint with a config.json, and no name that is known"),
            hint: format!(
                "known names: {}; or name a bundle's folder, a checkpoint's, or a config.json",
                PRESETS.join(", ")
            ),
        })
    }

    fn of_bundle(manifest: &Manifest) -> Result<Self> {
        let header = &manifest.header;
        let ModelSizes { vision_bytes, decoder_bytes, cache, .. } = ModelSizes::of(manifest)?;
        Ok(Self {
            name: header.source.name.clone(),
            precision: header.precision,
            vision_precision: header.vision_precision,
            target: header.target,
            activations: header.activations,
            vision: manifest.vision.clone(),
            decoder: manifest.decoder.clone(),
            vision_bytes,
            decoder_bytes,
            step_bytes: WeightBytes::of(header.precision, header.target, header.activations)
                .step(&manifest.decoder)
                .min(decoder_bytes),
            cache,
        })
    }

    /// What export would make of a checkpoint of these dimensions.
    #[must_use]
    pub fn of_dims(name: String, vision: VisionDims, decoder: DecoderDims, Form { precision, target }: Form) -> Self {
        let vision_precision = match precision {
            Precision::Int4 => Precision::Int8Block,
            Precision::Fp8 => Precision::Fp16,
            other => other,
        };
        let activations = match precision {
            Precision::Fp32 | Precision::Int8 => DataType::F32,
            Precision::Bf16 => DataType::BF16,
            // A GPU's attention wants it.
            Precision::Fp16 | Precision::Fp8 | Precision::Int8Block | Precision::Int4 => DataType::F16,
        };
        let bytes = WeightBytes::of(precision, target, activations);
        let step_bytes = bytes.step(&decoder);
        let embedding = (decoder.vocab_size * decoder.hidden_size) as f64 * bytes.embedding;
        let vision_bytes = num_vision_weights(&vision, &decoder) as f64
            * WeightBytes::of(vision_precision, target, activations).layers;
        let cache = CacheShape {
            num_layers: decoder.num_layers,
            num_kv_heads: decoder.num_kv_heads,
            // ONNX Runtime's attention takes multiples of 16.
            head_dim: decoder.head_dim.next_multiple_of(16),
            dtype: if target == Target::Cpu { DataType::F16 } else { activations },
            is_in_place: target.updates_cache_in_place(),
            length_multiple: if target == Target::Cpu { KEY_PANEL } else { 1 },
        };
        Self {
            name,
            precision,
            vision_precision,
            target,
            activations,
            vision,
            vision_bytes: vision_bytes as u64,
            decoder_bytes: step_bytes + embedding as u64,
            step_bytes,
            cache,
            decoder,
        }
    }

    pub(crate) fn sizes(&self) -> ModelSizes {
        ModelSizes {
            vision: self.vision.clone(),
            decoder: self.decoder.clone(),
            activation_bytes: self.activations.size(),
            vision_bytes: self.vision_bytes,
            decoder_bytes: self.decoder_bytes,
            cache: self.cache,
        }
    }

    /// Bytes of the cache that attention reads for each token of it.
    #[must_use]
    pub fn cache_bytes_per_token(&self) -> f64 {
        (self.cache.bytes_per_slot(self.cache.length_multiple) / self.cache.num_copies()) as f64
            / self.cache.length_multiple as f64
    }
}

/// Bytes that a weight takes, its share of scales and zero points included.
struct WeightBytes {
    layers: f64,
    /// Queries, keys and values.
    attention_input: f64,
    head: f64,
    embedding: f64,
}

impl WeightBytes {
    fn of(precision: Precision, target: Target, activations: DataType) -> Self {
        let scale = activations.size() as f64;
        let int8_block = 1.0 + scale / 128.0;
        let (layers, attention_input, head, embedding) = match precision {
            Precision::Fp32 => (4.0, 4.0, 4.0, 4.0),
            Precision::Fp16 | Precision::Bf16 => (2.0, 2.0, 2.0, 2.0),
            Precision::Fp8 => (1.0, 1.0, 2.0, 2.0),
            // A scale and a correction of four bytes each for 128 weights.
            Precision::Int8 if target == Target::Cpu => (1.0625, 1.0625, 1.0625, 2.0),
            Precision::Int8 => (1.0, 1.0, int8_block, 2.0),
            Precision::Int8Block => (int8_block, int8_block, int8_block, 2.0),
            Precision::Int4 => (0.5 + (scale + 0.5) / 32.0, int8_block, int8_block, 2.0),
        };
        Self { layers, attention_input, head, embedding }
    }

    /// Of the decoder's weights but the embedding table.
    fn step(&self, dims: &DecoderDims) -> u64 {
        let DecoderDims { num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = *dims;
        let size = |rows: usize, columns: usize| rows as f64 * columns as f64;
        let qkv = size((num_heads + 2 * num_kv_heads) * head_dim, hidden_size);
        let rest = size(num_heads * head_dim, hidden_size) + 3.0 * size(hidden_size, intermediate_size);
        let head = size(dims.vocab_size, hidden_size);
        (num_layers as f64 * (qkv * self.attention_input + rest * self.layers) + head * self.head) as u64
    }
}

/// Weights of vision tower and projector.
fn num_vision_weights(vision: &VisionDims, decoder: &DecoderDims) -> usize {
    let VisionDims { image_size, patch_size, hidden_size: width, intermediate_size, num_layers, .. } = *vision;
    let num_positions = (image_size / patch_size.max(1)).pow(2) + 1;
    let layer = 4 * width * width + 2 * width * intermediate_size;
    let projector = width * vision.feature_layers.len() * decoder.hidden_size + decoder.hidden_size.pow(2);
    3 * patch_size * patch_size * width + num_positions * width + num_layers * layer + projector
}

/// The part of a well-known checkpoint's config.json that its dimensions stand in.
fn preset(name: &str) -> Option<Value> {
    let text = match name {
        "llava-llama-3-8b" => json!({
            "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192,
        }),
        "llava-1.5-7b" => json!({
            "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 32_064, "max_position_embeddings": 4096,
        }),
        "llava-1.5-13b" => json!({
            "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "vocab_size": 32_064, "max_position_embeddings": 4096,
        }),
        _ => return None,
    };
    Some(json!({"model_type": "llava", "text_config": text}))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FP16: Form = Form { precision: Precision::Fp16, target: Target::Ort };

    #[test]
    fn presets_have_the_published_numbers_of_weights() {
        // As transformers counts them, the vision tower's last layer (12.6 M) and its norms left out.
        for (name, billions) in [("llava-llama-3-8b", 8.34), ("llava-1.5-7b", 7.05), ("llava-1.5-13b", 13.34)] {
            let model = Model::find(name, FP16).unwrap();
            let found = (model.vision_bytes + model.decoder_bytes) as f64 / 2e9;
            assert!((found / billions - 1.0).abs() < 0.005, "{name}: {found}");
        }
    }

    #[test]
    fn an_8b_takes_what_export_wrote_for_it() {
        // benches/runs/2026-11-22-2core/export-8b.json: the int4 bundle with its fp32 activations is somewhat larger.
        let size =
            |precision| Model::find("llava-llama-3-8b", Form { precision, ..FP16 }).unwrap().decoder_bytes as f64;
        assert!((5.4e9..6.3e9).contains(&size(Precision::Int4)), "{}", size(Precision::Int4));
        assert!(size(Precision::Fp16) / size(Precision::Fp8) > 1.7);
        // 32 layers of 8 heads of 128, keys and values of two bytes.
        assert_eq!(Model::find("llava-llama-3-8b", FP16).unwrap().cache_bytes_per_token(), 131_072.0);
    }

    #[test]
    fn what_is_no_model_is_refused_with_the_known_names() {
        let error = Model::find("no-such-model", FP16).unwrap_err();
        assert!(error.hint().unwrap().contains("llava-llama-3-8b"), "{error}");
    }
}
