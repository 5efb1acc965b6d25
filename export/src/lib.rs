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
pub mod flops;
mod graph;
pub mod inspect;
mod linear;
mod lint;
mod manifest;
mod norm;
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

pub use crate::bundle_manifest::{BundleHeader, BundleManifest};
pub use crate::clip::{ClipGraphs, ClipManifest, EosRule, ImageDims, TextDims};
pub use crate::decoder::{IMAGE_INDEX_PADDING, IMAGE_INDEX_TEXT};
pub use crate::error::{Error, Result};
pub use crate::graph::{DataType, Dim, hex};
pub use crate::manifest::{
    BundleFile, BundleKind, DecoderDims, DimRange, FILE_NAME as MANIFEST_FILE, FORMAT_VERSION, GraphFile, Graphs,
    Manifest, PixelLayout, PixelValues, Precision, PromptSettings, Saturation, Source, Target, TensorSpec, VisionDims,
};
pub use crate::processor_config::{Filter, Geometry, Preprocessing, ProcessorConfigError, Resize};
pub use crate::quantize::Rounding;
pub use crate::vision_tower::PATCH_ZERO_POINT;

pub use crate::calibrate::Calibration;
use crate::calibrate::Windows;
use crate::channels::DecoderChannels;
use crate::checkpoint::Checkpoint;
use crate::clip::ClipCheckpoint;
use crate::config::{DecoderConfig, LlavaConfig};
use crate::graph::write_hashed;
use crate::precision::{GraphFormat, LinearFormat, PrecisionOptions};
use crate::tokenizer_files::TokenizerFiles;

/// Name of the bundle within the staging folder.
const BUNDLE: &str = "bundle";

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
    /// What int8 and int4 export learn the activations' channels from.
    pub calibration: Calibration,
    /// Keep int8 weights within 7 bits, for x86 processors without VNNI.
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

    /// Formats of what reads images and of what reads tokens.
    fn formats(&self) -> Result<(GraphFormat, GraphFormat)> {
        PrecisionOptions {
            target: self.target,
            decoder: self.precision,
            vision: self.vision_precision(),
            activations: self.activations,
            rounding: self.rounding,
            reduce_range: self.reduce_range,
        }
        .resolve()
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

    let (staging, staged) = output.stage()?;
    let mut files = vec![write_hashed(&staged, "tokenizer.json", &text.tokenizer)?];
    let mut saturated_weights = Vec::new();
    let mut write = |graph: graph::GraphBuilder<'_>| {
        let written = graph.write(&staged, &options.cancel)?;
        files.extend(written.files);
        saturated_weights.extend(written.saturated);
        Ok(written.graph)
    };
    let graphs = Graphs { vision_tower: write(vision_tower)?, projector: write(projector)?, decoder: write(decoder)? };
    let manifest = Manifest {
        format_version: manifest::FORMAT_VERSION,
        kind: BundleKind::Llava,
        producer: concat!("recaption ", env!("CARGO_PKG_VERSION")).to_owned(),
        source: Source {
            name: folder_name(checkpoint_folder),
            layout: checkpoint.layout.name().to_owned(),
            fingerprint: checkpoint.fingerprint(),
        },
        precision: options.precision,
        vision_precision: options.vision_precision(),
        activations: decoder_format.float,
        reduce_range: options.reduce_range,
        target: options.target,
        vision: VisionDims {
            image_size: config.vision.image_size,
            patch_size: config.vision.patch_size,
            hidden_size: config.vision.hidden_size,
            intermediate_size: config.vision.intermediate_size,
            num_layers: config.vision.num_layers(),
            feature_layers: config.vision.feature_layers.clone(),
            num_image_tokens: config.vision.num_image_tokens(),
        },
        decoder: DecoderDims {
            num_layers: config.decoder.num_layers,
            hidden_size: config.decoder.hidden_size,
            intermediate_size: config.decoder.intermediate_size,
            num_heads: config.decoder.num_heads,
            num_kv_heads: config.decoder.num_kv_heads,
            head_dim: config.decoder.head_dim,
            vocab_size: config.decoder.vocab_size,
            max_position_embeddings: config.decoder.num_positions(),
        },
        preprocessing,
        pixel_values: PixelValues::of_format(vision_format),
        prompt: text.prompt,
        stop_token_ids: text.stop_token_ids,
        graphs,
        files,
        saturated_weights,
        fingerprint: String::new(),
    };
    let manifest = BundleManifest::Llava(Box::new(manifest)).write(&staged)?;
    output.commit(staging)?;
    Ok(manifest)
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
        LinearFormat::Int8 { .. } => true,
        LinearFormat::Blocks(blocks) => blocks.rounding == Rounding::Search,
    };
    let windows = match &options.calibration {
        _ if !has_use => return Ok(DecoderChannels::default()),
        Calibration::None => return Ok(DecoderChannels::default()),
        Calibration::Random if format.linear.has_4_bits() => return Ok(DecoderChannels::default()),
        Calibration::Random => Windows::random(config),
        Calibration::Tokens(token_ids) => Windows::of_tokens(token_ids, config),
    };
    let check = || match options.cancel.load(Ordering::Relaxed) {
        true => Err(Error::Cancelled),
        false => Ok(()),
    };
    let stats = calibrate::run(checkpoint, config, &windows, &check)?;
    Ok(DecoderChannels::of_stats(&stats, format))
}

/// The last part of a path, links followed.
fn folder_name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    folder.file_name().map_or_else(|| "checkpoint".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Where the bundle goes: written beside its final place, then renamed.
struct OutputFolder {
    folder: PathBuf,
    /// A bundle or an empty folder stands there, which makes way.
    replaces: bool,
}

impl OutputFolder {
    fn check(folder: &Path, overwrite: bool) -> Result<Self> {
        let refuse = |hint| Err(Error::OutputExists { path: folder.to_owned(), hint });
        if folder.file_name().is_none() {
            return refuse("it cannot be replaced; name a folder inside of it");
        }
        if folder.symlink_metadata().is_err() {
            return Ok(Self { folder: folder.to_owned(), replaces: false });
        }
        let Ok(entries) = std::fs::read_dir(folder) else {
            return refuse("it is not a folder; choose a name that does not exist");
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        let names = names.collect::<std::io::Result<Vec<_>>>().map_err(Error::io("read", folder))?;
        if is_mount_point(folder) {
            return refuse("it is a mount point, which cannot be replaced; name a folder inside of it");
        }
        // Only what export has written is ever deleted: the manifest and the files that it names.
        let is_bundle = BundleManifest::read(folder).is_ok_and(|manifest| {
            let files = manifest.files().iter().map(|file| file.path.as_str());
            names.iter().all(|name| name == manifest::FILE_NAME || files.clone().any(|file| file == name))
        });
        match (names.is_empty(), is_bundle, overwrite) {
            (true, ..) | (_, true, true) => Ok(Self { folder: folder.to_owned(), replaces: true }),
            (_, true, false) => refuse("it holds a bundle; replace it with --overwrite"),
            (_, false, _) => refuse("it holds other files; choose a folder that does not exist"),
        }
    }

    fn parent(&self) -> &Path {
        self.folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// A temporary folder beside the final one, removed again unless committed, and in it the folder of the bundle.
    fn stage(&self) -> Result<(tempfile::TempDir, PathBuf)> {
        let parent = self.parent();
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let staging = tempfile::Builder::new()
            .prefix(".recaption-export-")
            .tempdir_in(parent)
            .map_err(Error::io("create a folder in", parent))?;
        let bundle = staging.path().join(BUNDLE);
        std::fs::create_dir(&bundle).map_err(Error::io("create", &bundle))?;
        Ok((staging, bundle))
    }

    /// Puts the staged bundle into its place. The old one is moved aside first and deleted last, so that at every moment
    /// one of the two is whole.
    fn commit(self, staging: tempfile::TempDir) -> Result<()> {
        let bundle = staging.path().join(BUNDLE);
        make_readable(&bundle)?;
        let old = staging.path().join("old");
        if self.replaces {
            std::fs::rename(&self.folder, &old).map_err(Error::io("move aside", &self.folder))?;
        }
        if let Err(error) = std::fs::rename(&bundle, &self.folder) {
            if self.replaces {
                std::fs::rename(&old, &self.folder).map_err(Error::io("move back", &self.folder))?;
            }
            return Err(Error::io("rename to", &self.folder)(error));
        }
        staging.close().map_err(Error::io("delete what was replaced at", &self.folder))
    }
}

/// Whether another file system is mounted at `folder`.
fn is_mount_point(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
        device(folder) != device(&folder.join(".."))
    }
    #[cfg(not(unix))]
    false
}

/// Temporary folders are private to the user; a bundle is an ordinary folder.
fn make_readable(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let permissions = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder, permissions).map_err(Error::io("set the permissions of", folder))?;
    }
    Ok(())
}
