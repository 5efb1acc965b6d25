//! Writes CLIP checkpoints as bundles of two graphs, one that embeds images and one that embeds texts: what scores are made
//! of. Takes transformers' `CLIPModel`, and OpenAI's and Long-CLIP's weights.

mod checkpoint;
mod config;
mod image_tower;
mod manifest;
mod names;
mod text_tower;

use std::path::Path;

use serde_json::json;

pub(crate) use self::checkpoint::ClipCheckpoint;
pub use self::manifest::{ClipGraphs, ClipManifest, EosRule, ImageDims, TextDims};

use self::config::ClipConfig;
use crate::bundle_manifest::BundleManifest;
use crate::error::{Error, Result};
use crate::graph::{Attribute, DataType, GraphBuilder, Value};
use crate::manifest::{BundleKind, Precision, Source, Target};
use crate::output::OutputFolder;
use crate::processor_config::{Preprocessing, processor_of};
use crate::tokenizer_files::read_tokenizer;
use crate::{ExportOptions, folder_name};

/// Exports `checkpoint` to a bundle at `bundle_folder`: see [`crate::export`].
pub(crate) fn export(
    checkpoint: &ClipCheckpoint,
    bundle_folder: &Path,
    options: &ExportOptions,
) -> Result<BundleManifest> {
    for (flag, is_given) in [("--vision-tower", options.vision_tower.is_some()), ("--lora", options.lora.is_some())] {
        if is_given {
            return Err(Error::unsupported(flag, "with a CLIP checkpoint", "it goes with LLaVA checkpoints"));
        }
    }
    if options.target == Target::Cpu {
        let hint = "leave it out: scores take a small share of a run's time";
        return Err(Error::unsupported("--target cpu", "with a CLIP checkpoint", hint));
    }
    if options.precision == Precision::Fp8 {
        let hint = "fp8 is for LLaVA decoders; a CLIP takes --precision fp16";
        return Err(Error::unsupported("--precision fp8", "with a CLIP checkpoint", hint));
    }
    let (vision_format, text_format) = options.formats()?;
    let output = OutputFolder::check(bundle_folder, options.overwrite)?;
    let config = ClipConfig::read(checkpoint)?;
    let (tokenizer, _) = read_tokenizer(&checkpoint.path, options.tokenizer.as_deref())?;
    let preprocessing = preprocessing(checkpoint, config.vision.image_size)?;
    let image_tower = image_tower::build(checkpoint, &config, &preprocessing, vision_format)?;
    let text_tower = text_tower::build(checkpoint, &config, text_format)?;
    let logit_scale = checkpoint.scalar("logit_scale")?.exp();
    checkpoint.refuse_unused()?;

    let mut staged = output.stage()?;
    staged.write_file("tokenizer.json", &tokenizer)?;
    let graphs = ClipGraphs {
        image_tower: staged.write_graph(image_tower, &options.cancel)?,
        text_tower: staged.write_graph(text_tower, &options.cancel)?,
    };
    let source = Source {
        name: folder_name(&checkpoint.path),
        layout: checkpoint.layout.name().to_owned(),
        fingerprint: checkpoint.fingerprint(),
    };
    let header = options.header(BundleKind::Clip, source, preprocessing, (vision_format, text_format));
    let ClipConfig { vision, text, projection_dim } = config;
    let image = ImageDims {
        image_size: vision.image_size,
        patch_size: vision.patch_size,
        hidden_size: vision.hidden_size,
        num_layers: vision.num_layers(),
    };
    let text = TextDims {
        context_length: text.context_length,
        vocab_size: text.vocab_size,
        hidden_size: text.encoder.hidden_size,
        num_layers: text.num_layers,
        eos: text.eos,
        pad_token_id: text.pad_token_id,
    };
    staged.finish(header, |header| {
        BundleManifest::Clip(Box::new(ClipManifest { header, image, text, projection_dim, logit_scale, graphs }))
    })
}

/// The image processor of the checkpoint's folder, else CLIP's with the tower's size, which is OpenAI's as well.
fn preprocessing(checkpoint: &ClipCheckpoint, image_size: usize) -> Result<Preprocessing> {
    let image_size = u32::try_from(image_size).unwrap_or(u32::MAX);
    let (path, settings) = match processor_of(&checkpoint.path)? {
        Some(stored) => stored,
        None => (checkpoint.path.clone(), json!({"image_processor_type": "CLIPImageProcessor"})),
    };
    let invalid = |reason: String| Error::InvalidConfig { path: path.clone(), reason };
    let preprocessing = Preprocessing::from_hf(&settings, image_size).map_err(|reason| invalid(reason.to_string()))?;
    let Preprocessing { height, width, .. } = preprocessing;
    if (height, width) != (image_size, image_size) {
        let reason = format!("images become {width}x{height}, but the image tower takes {image_size}x{image_size}");
        return Err(invalid(reason));
    }
    Ok(preprocessing)
}

/// Declares `name` `[batch, size]` as an f32 output that holds `x`.
fn float_output(graph: &mut GraphBuilder<'_>, name: &str, x: &Value, size: usize) {
    let output = graph.output(name, DataType::F32, vec!["batch".into(), size.into()]);
    let to_f32 = vec![("to", Attribute::Int(DataType::F32 as i64))];
    let is_f32 = graph.format().float == DataType::F32;
    let (op, attributes) = if is_f32 { ("Identity", vec![]) } else { ("Cast", to_f32) };
    graph.node_named("", op, &format!("/{name}"), &[x], &[output], attributes);
}
