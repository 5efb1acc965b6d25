//! Writes LLaVA and CLIP checkpoints as ONNX bundles, straight from the weights.
//!
//! `export_llava` reads top to bottom as the steps: open the checkpoint, check its configuration, describe three graphs
//! (vision tower, projector, decoder), stream their weights to disk, write the manifest. Nothing is traced and no
//! tensor is held whole, so memory does not grow with the model. A CLIP, for scores, takes the same steps in `clip`.

mod activation;
mod attention;
mod blocks;
mod bundle_manifest;
mod calibrate;
mod channels;
mod checkpoint;
mod clip;
mod config;
mod data_file;
mod decoder;
mod encoder;
mod error;
mod float8;
pub mod flops;
#[doc(hidden)]
pub mod fuzzing;
mod graph;
pub mod inspect;
mod linear;
pub mod lint;
mod manifest;
mod norm;
mod output;
mod precision;
mod processor_config;
mod projector;
pub mod proto;
mod quantize;
mod rope;
mod tensor;
mod tokenizer_files;
mod torch_file;
pub mod verify;
mod vision_tower;
mod weight;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use crate::bundle_manifest::BundleManifest;
pub use crate::clip::{ClipGraphs, ClipManifest, EosRule, ImageDims, TextDims};
pub use crate::decoder::{IMAGE_INDEX_PADDING, IMAGE_INDEX_TEXT};
pub use crate::error::{Error, Result};
pub use crate::graph::{DataType, Dim, hex};
pub use crate::manifest::{
    BundleFile, BundleHeader, BundleKind, DecoderDims, DimRange, FILE_NAME as MANIFEST_FILE, FORMAT_VERSION, GraphFile,
    Graphs, Manifest, PixelLayout, PixelValues, Precision, PromptSettings, Saturation, Source, Target, TensorSpec,
    VisionDims,
};
pub use crate::output::check_folder;
pub use crate::processor_config::{Filter, Geometry, Preprocessing, ProcessorConfigError, Resize};
pub use crate::quantize::Rounding;
pub use crate::tokenizer_files::tokenizer_path;
pub use crate::vision_tower::PATCH_ZERO_POINT;

pub use crate::calibrate::Calibration;
use crate::calibrate::Windows;
use crate::channels::DecoderChannels;
use crate::checkpoint::Checkpoint;
use crate::clip::ClipCheckpoint;
use crate::config::{DecoderConfig, LlavaConfig};
pub use crate::config::{parse_dims, read_dims};
use crate::output::OutputFolder;
use crate::precision::{GraphFormat, LinearFormat};
use crate::tokenizer_files::TokenizerFiles;

/// What to export and how.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Precision of the weights.
    pub precision: Precision,
    /// Precision of vision tower and projector, where it is to differ.
    pub vision_precision: Option<Precision>,
    /// Type of the activations around block-quantised weights: [`Precision::Fp32`] (the CPU's) or [`Precision::Fp16`].
    pub activations: Option<Precision>,
    /// How 4-bit weights are rounded.
    pub rounding: Rounding,
    /// What fp8, int8 and int4 export learn the activations' range from.
    pub calibration: Calibration,
    /// Keep int8 weights within what x86 processors without VNNI sum in 16 bits: 7 bits, or for target cpu, where it is only
    /// faster there, sums of neighbours.
    pub reduce_range: bool,
    /// Operators to build the graphs from.
    pub target: Target,
    /// Folder of the CLIP vision tower, for checkpoints of the original layout.
    pub vision_tower: Option<PathBuf>,
    /// Folder of a LoRA adapter to merge into the weights.
    pub lora: Option<PathBuf>,
    /// `tokenizer.json`, or a folder that has one, for checkpoints without.
    pub tokenizer: Option<PathBuf>,
    /// Replace a bundle that stands at the output folder.
    pub overwrite: bool,
    /// Raised from outside: stop, and leave nothing behind.
    pub cancel: Arc<AtomicBool>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Fp32,
            vision_precision: None,
            activations: None,
            rounding: Rounding::default(),
            calibration: Calibration::default(),
            reduce_range: false,
            target: Target::Ort,
            vision_tower: None,
            lora: None,
            tokenizer: None,
            overwrite: false,
            cancel: Arc::default(),
        }
    }
}

impl ExportOptions {
    /// Precision of vision tower and projector, or of a CLIP's image tower.
    fn vision_precision(&self) -> Precision {
        self.vision_precision.unwrap_or(self.precision.default_for_vision())
    }

    /// Whether precision, target and activations go together.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where they do not.
    pub fn check(&self) -> Result<()> {
        self.formats().map(|_| ())
    }

    /// Formats of what reads images and of what reads tokens.
    fn formats(&self) -> Result<(GraphFormat, GraphFormat)> {
        if self.vision_precision() == Precision::Fp8 {
            let hint = "fp8 is for the decoder: its scales come from text; leave --vision-precision out for fp16";
            return Err(Error::unsupported("--vision-precision fp8", "for a vision tower", hint));
        }
        if (self.precision, &self.calibration) == (Precision::Fp8, &Calibration::None) {
            let hint = "the scales of fp8 activations are learned: leave --calibration out, or give a text file";
            return Err(Error::unsupported("--calibration none", "with --precision fp8", hint));
        }
        if self.reduce_range && ![self.precision, self.vision_precision()].contains(&Precision::Int8) {
            let hint = "leave it out: it is for int8, whose sums some processors cannot hold";
            let found = format!("with --precision {}", self.precision.name());
            return Err(Error::unsupported("--reduce-range", found, hint));
        }
        let text = GraphFormat::of(self)?;
        Ok((GraphFormat::of_vision(self, self.vision_precision())?, text))
    }

    /// What the manifest says of these options; files and fingerprint come when the bundle is finished.
    fn header(
        &self,
        kind: BundleKind,
        source: Source,
        preprocessing: Preprocessing,
        (vision, text): (GraphFormat, GraphFormat),
    ) -> BundleHeader {
        BundleHeader {
            format_version: manifest::FORMAT_VERSION,
            kind,
            producer: concat!("recaption ", env!("CARGO_PKG_VERSION")).to_owned(),
            source,
            precision: self.precision,
            vision_precision: self.vision_precision(),
            activations: text.float,
            reduce_range: self.reduce_range,
            target: self.target,
            preprocessing,
            pixel_values: PixelValues::of_format(vision),
            files: vec![],
            saturated_weights: vec![],
            fingerprint: String::new(),
        }
    }
}

/// Exports the LLaVA or CLIP at `checkpoint` to a bundle at `bundle_folder`. A checkpoint is a folder, or the file of a
/// CLIP's weights under OpenAI's names.
///
/// The bundle is written under a temporary name beside `bundle_folder` and renamed when it is whole.
///
/// # Errors
/// Everything unsupported or missing is reported before the first file is written; see [`Error`].
pub fn export(checkpoint: &Path, bundle_folder: &Path, options: &ExportOptions) -> Result<BundleManifest> {
    match ClipCheckpoint::find(checkpoint)? {
        Some(clip) => clip::export(&clip, bundle_folder, options),
        None => export_llava(checkpoint, bundle_folder, options),
    }
}

fn export_llava(checkpoint_folder: &Path, bundle_folder: &Path, options: &ExportOptions) -> Result<BundleManifest> {
    let (vision_format, decoder_format) = options.formats()?;
    let output = OutputFolder::check(bundle_folder, options.overwrite)?;
    let checkpoint = Checkpoint::open(checkpoint_folder, options.vision_tower.as_deref(), options.lora.as_deref())?;
    let config = LlavaConfig::read(&checkpoint)?;
    let text = TokenizerFiles::read(&checkpoint, &config, options.tokenizer.as_deref())?;
    let preprocessing = processor_config::read(&checkpoint, config.vision.image_size)?;
    let vision_tower = vision_tower::build(&checkpoint, &config.vision, &preprocessing, vision_format)?;
    let projector = projector::build(&checkpoint, &config, vision_format, decoder_format.float)?;
    let channels = decoder_channels(&checkpoint, &config.decoder, options, decoder_format)?;
    let decoder = decoder::build(&checkpoint, &config.decoder, decoder_format, &channels)?;
    checkpoint.refuse_unused(config.vision.num_layers()..config.vision.num_stored_layers)?;

    let mut staged = output.stage()?;
    staged.write_file("tokenizer.json", &text.tokenizer)?;
    let graphs = Graphs {
        vision_tower: staged.write_graph(vision_tower, &options.cancel)?,
        projector: staged.write_graph(projector, &options.cancel)?,
        decoder: staged.write_graph(decoder, &options.cancel)?,
    };
    let source = Source {
        name: folder_name(checkpoint_folder),
        layout: checkpoint.layout.name().to_owned(),
        fingerprint: checkpoint.fingerprint(),
    };
    let header = options.header(BundleKind::Llava, source, preprocessing, (vision_format, decoder_format));
    let (vision, decoder) = (VisionDims::of(&config.vision), DecoderDims::of(&config.decoder));
    let TokenizerFiles { prompt, stop_token_ids, .. } = text;
    staged.finish(header, |header| {
        BundleManifest::Llava(Box::new(Manifest { header, vision, decoder, prompt, stop_token_ids, graphs }))
    })
}

/// What the decoder's activations are like, where the format has a use for it.
fn decoder_channels(
    checkpoint: &Checkpoint,
    config: &DecoderConfig,
    options: &ExportOptions,
    format: GraphFormat,
) -> Result<DecoderChannels> {
    let has_use = match format.linear {
        LinearFormat::Float => false,
        LinearFormat::Int8 { .. } | LinearFormat::Packed { .. } | LinearFormat::Float8 => true,
        LinearFormat::Blocks(blocks) => blocks.rounding == Rounding::Search,
    };
    let windows = match &options.calibration {
        _ if !has_use => return Ok(DecoderChannels::default()),
        Calibration::None => return Ok(DecoderChannels::default()),
        Calibration::Random if format.linear.has_4_bits() => return Ok(DecoderChannels::default()),
        Calibration::Random => Windows::random(config),
        Calibration::Tokens(token_ids) => Windows::of_tokens(token_ids, config)?,
    };
    let check = || match options.cancel.load(Ordering::Relaxed) {
        true => Err(Error::Cancelled),
        false => Ok(()),
    };
    let stats = calibrate::run(checkpoint, config, &windows, &check)?;
    DecoderChannels::of_stats(&stats, format)
}

/// The last part of a path, links followed.
fn folder_name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    folder.file_name().map_or_else(|| "checkpoint".to_owned(), |name| name.to_string_lossy().into_owned())
}
