//! `manifest.json`: what is in a bundle, and everything the runner needs to know about it. The runner reads names,
//! shapes and types from here and never looks at the checkpoint.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bundle_manifest::BundleManifest;
use crate::config::{DecoderConfig, MAX_DIMENSION, VisionConfig};
use crate::error::{Error, Result};
use crate::graph::{DataType, Dim, hex};
use crate::precision::{GraphFormat, LinearFormat};
use crate::processor_config::Preprocessing;
use crate::vision_tower::PATCH_ZERO_POINT;
use crate::weight::Weight;

/// Version of the manifest's layout; raised when a reader of the old one would go wrong.
pub const FORMAT_VERSION: u32 = 3;
/// The manifest's file name.
pub const FILE_NAME: &str = "manifest.json";
/// Most bytes of a manifest; that of an 80-layer decoder has 0.1 MB.
pub(crate) const MAX_BYTES: u64 = 16 << 20;

/// What the manifests of all kinds of bundles have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BundleHeader {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// What the bundle does.
    pub kind: BundleKind,
    /// Name and version of the program that wrote it.
    pub producer: String,
    /// The checkpoint it was made from.
    pub source: Source,
    /// Precision of the weights of what reads tokens: the decoder, or a CLIP's text tower.
    pub precision: Precision,
    /// Precision of the weights of what reads images: vision tower and projector, or a CLIP's image tower.
    pub vision_precision: Precision,
    /// Type of the activations of what reads tokens, and of a decoder's KV cache. A CLIP's embeddings are f32 in any case.
    pub activations: DataType,
    /// Whether int8 weights are those for x86 processors without VNNI.
    #[serde(default)]
    pub reduce_range: bool,
    /// Operators the graphs are made of.
    pub target: Target,
    /// How an image becomes `pixel_values`.
    pub preprocessing: Preprocessing,
    /// Type and layout of `pixel_values`.
    pub pixel_values: PixelValues,
    /// Every file of the bundle but the manifest.
    pub files: Vec<BundleFile>,
    /// Weights outside of fp16's range, where the bundle has fp16 weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saturated_weights: Vec<Saturation>,
    /// SHA-256 over all of the manifest but the checkpoint's name: the bundle's identity in `run.json`.
    pub fingerprint: String,
}

/// The contents of `manifest.json` in a captioner's bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What every bundle has.
    #[serde(flatten)]
    pub header: BundleHeader,
    /// Dimensions of the vision tower.
    pub vision: VisionDims,
    /// Dimensions of the decoder.
    pub decoder: DecoderDims,
    /// How a prompt becomes token ids.
    pub prompt: PromptSettings,
    /// Ids that end a caption.
    pub stop_token_ids: Vec<u32>,
    /// The graphs, in the order they run.
    pub graphs: Graphs,
}

/// What a bundle does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BundleKind {
    /// Captions images: vision tower, projector, decoder.
    Llava,
    /// Scores images against texts: image tower, text tower.
    Clip,
}

impl BundleKind {
    /// As the manifest spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Llava => "llava",
            Self::Clip => "clip",
        }
    }
}

/// Precision of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit floats.
    Fp32,
    /// IEEE 16-bit floats.
    Fp16,
    /// 16-bit floats with the exponent of a 32-bit one; needs a GPU.
    Bf16,
    /// 8-bit floats in the decoder's linear layers, each with one scale for its weights and one for its activations; needs
    /// TensorRT and a GPU of compute capability 8.9.
    Fp8,
    /// 8-bit integers: a scale per row of activations and per column of weights.
    Int8,
    /// 8-bit weights in blocks of 128 (`MatMulNBits`).
    Int8Block,
    /// 4-bit weights in blocks of 32 (`MatMulNBits`).
    Int4,
}

impl Precision {
    /// As `--precision` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int8Block => "int8-block",
            Self::Int4 => "int4",
        }
    }
}

/// Which operators the graphs are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// ONNX Runtime's fused operators, for its CPU and CUDA providers; what reads images is of standard operators all the same
    /// where its weights are floats.
    Ort,
    /// Standard operators only, as TensorRT's ONNX parser takes them.
    TensorRt,
    /// This project's own operators, for its CPU kernels.
    Cpu,
}

impl Target {
    /// As `--target` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ort => "ort",
            Self::TensorRt => "tensorrt",
            Self::Cpu => "cpu",
        }
    }

    /// Version of the standard operators. 23 is the first with `RMSNormalization`, and the last at which ONNX Runtime's CUDA
    /// provider has `Cast`, `Reshape`, `Shape` and `Transpose` everywhere (kernel registrations of 1.25; 1.31.1 has them at 25 too). 20 is what TensorRT
    /// 10.0's parser takes (onnx-tensorrt 10.0-GA, docs/operators.md), and the first with `Gelu`.
    pub(crate) fn opset(self) -> i64 {
        match self {
            Self::Ort | Self::Cpu => 23,
            Self::TensorRt => 20,
        }
    }

    /// ONNX IR version that goes with the operators' version.
    pub(crate) fn ir_version(self) -> i64 {
        match self {
            Self::Ort | Self::Cpu => 11,
            Self::TensorRt => 9,
        }
    }

    /// Whether the decoder updates its KV cache in place when past and present are one buffer. TensorRT promises nothing
    /// for an output that is also an input, so there they must be two.
    #[must_use]
    pub fn updates_cache_in_place(self) -> bool {
        self != Self::TensorRt
    }
}

/// Where a bundle comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Name of the checkpoint folder.
    pub name: String,
    /// Layout of the checkpoint.
    pub layout: String,
    /// SHA-256 over its configuration and its shards' headers, which do not tell two sets of weights of one shape apart: the
    /// files' hashes do.
    pub fingerprint: String,
}

/// Dimensions of the vision tower.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VisionDims {
    /// Side of the square `pixel_values`, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Width of the tower.
    pub hidden_size: usize,
    /// Width of its MLP.
    pub intermediate_size: usize,
    /// Encoder layers computed.
    pub num_layers: usize,
    /// Hidden states taken, counted from the embeddings (0).
    pub feature_layers: Vec<usize>,
    /// Tokens one image takes in the prompt.
    pub num_image_tokens: usize,
}

impl VisionDims {
    pub(crate) fn of(config: &VisionConfig) -> Self {
        Self {
            image_size: config.image_size,
            patch_size: config.patch_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_layers: config.num_layers(),
            feature_layers: config.feature_layers.clone(),
            num_image_tokens: config.num_image_tokens(),
        }
    }
}

/// Dimensions of the decoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecoderDims {
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the residual stream and of `image_features`.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Longest sequence: prompt, image and caption together.
    pub max_position_embeddings: usize,
}

impl DecoderDims {
    pub(crate) fn of(config: &DecoderConfig) -> Self {
        Self {
            num_layers: config.num_layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_position_embeddings: config.num_positions(),
        }
    }
}

/// Type and layout of `pixel_values`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PixelValues {
    /// Element type.
    pub dtype: DataType,
    /// Order of the axes.
    pub layout: PixelLayout,
}

impl PixelValues {
    /// What a vision tower of `format` takes.
    pub(crate) fn of_format(format: GraphFormat) -> Self {
        match format.linear {
            LinearFormat::Int8 { .. } | LinearFormat::Packed { .. } => {
                Self { dtype: DataType::U8, layout: PixelLayout::Patches { zero_point: PATCH_ZERO_POINT } }
            }
            LinearFormat::Float | LinearFormat::Float8 | LinearFormat::Blocks(_) => {
                Self { dtype: DataType::F32, layout: PixelLayout::Nchw }
            }
        }
    }
}

/// Order of the axes of `pixel_values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PixelLayout {
    /// `[batch, channels, height, width]`, normalised.
    Nchw,
    /// `[batch, 1 + patches, channels * patch * patch]`: samples as they are, patches from left to right and top to bottom;
    /// row 0 is filled with `zero_point`.
    Patches {
        /// The sample that counts as zero.
        zero_point: u8,
    },
}

/// How a prompt becomes token ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// The checkpoint's chat template (Jinja), if it has one.
    pub chat_template: Option<String>,
    /// The placeholder of an image in a rendered prompt.
    pub image_token: String,
    /// The token every prompt begins with, once.
    pub bos_token: Option<String>,
    /// The end-of-sequence token's text, which some templates use.
    pub eos_token: Option<String>,
}

/// The graphs of a captioner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graphs {
    /// `pixel_values` to `vision_features`.
    pub vision_tower: GraphFile,
    /// `vision_features` to `image_features`.
    pub projector: GraphFile,
    /// Token ids and image features to the next ids.
    pub decoder: GraphFile,
}

/// One ONNX graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphFile {
    /// File name within the bundle.
    pub file: String,
    /// Inputs in order.
    pub inputs: Vec<TensorSpec>,
    /// Outputs in order.
    pub outputs: Vec<TensorSpec>,
    /// Sizes of the free dimensions, for engines that are built for a range of shapes.
    pub profile: BTreeMap<String, DimRange>,
    /// Weights of the checkpoint in it.
    pub num_parameters: usize,
}

/// Sizes that a free dimension takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DimRange {
    /// Smallest.
    pub min: usize,
    /// The one to optimise for.
    pub opt: usize,
    /// Largest.
    pub max: usize,
}

/// Weights that lie outside of fp16's range and were set to its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saturation {
    /// The checkpoint's tensors.
    pub tensors: Vec<String>,
    /// How many values.
    pub count: usize,
    /// The largest magnitude among them.
    pub largest: f32,
}

impl Saturation {
    pub(crate) fn new(weight: &Weight<'_>) -> Self {
        let tensors = weight.tensor_names().into_iter().map(str::to_owned).collect();
        Self { tensors, count: 0, largest: 0.0 }
    }

    /// Brings `values` into fp16's range and counts those that were outside.
    pub(crate) fn saturate(&mut self, values: &mut [f32]) {
        let max = half::f16::MAX.to_f32();
        // Without leaving early, so that it is a vector instruction a value.
        if values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs())) <= max {
            return;
        }
        for value in values.iter_mut().filter(|value| value.abs() > max) {
            self.count += 1;
            self.largest = self.largest.max(value.abs());
            *value = value.clamp(-max, max);
        }
    }
}

/// A graph input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DataType,
    /// Its shape; free dimensions are named.
    pub shape: Vec<Dim>,
}

impl TensorSpec {
    /// `[batch, 3, 336, 336]`
    #[must_use]
    pub fn shape_text(&self) -> String {
        format!("[{}]", self.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
    }
}

/// A file of the bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleFile {
    /// Name within the bundle.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Reads `BUNDLE/manifest.json`.
    ///
    /// # Errors
    /// When it is not there, does not parse, is of another format version, or that of another kind of bundle.
    pub fn read(bundle: &Path) -> Result<Self> {
        match BundleManifest::read(bundle)? {
            BundleManifest::Llava(manifest) => Ok(*manifest),
            BundleManifest::Clip(_) => Err(Error::OtherBundleKind {
                path: bundle.to_owned(),
                found: BundleKind::Clip.name(),
                reader: "`recaption run`",
                wanted: BundleKind::Llava.name(),
            }),
        }
    }

    /// The graphs with their names, in the order they run.
    #[must_use]
    pub fn named_graphs(&self) -> Vec<(&'static str, &GraphFile)> {
        let Graphs { vision_tower, projector, decoder } = &self.graphs;
        vec![("vision_tower", vision_tower), ("projector", projector), ("decoder", decoder)]
    }

    /// Refuses numbers that no model has, so that sizes made from them need no further care.
    pub(crate) fn check_dims(&self) -> Result<(), String> {
        let (vision, decoder) = (&self.vision, &self.decoder);
        let dims = [
            ("vision.image_size", vision.image_size),
            ("vision.patch_size", vision.patch_size),
            ("vision.hidden_size", vision.hidden_size),
            ("vision.intermediate_size", vision.intermediate_size),
            ("vision.num_layers", vision.num_layers.max(1)),
            ("vision.num_image_tokens", vision.num_image_tokens),
            ("decoder.num_layers", decoder.num_layers),
            ("decoder.hidden_size", decoder.hidden_size),
            ("decoder.intermediate_size", decoder.intermediate_size),
            ("decoder.num_heads", decoder.num_heads),
            ("decoder.num_kv_heads", decoder.num_kv_heads),
            ("decoder.head_dim", decoder.head_dim),
            ("decoder.vocab_size", decoder.vocab_size),
            ("decoder.max_position_embeddings", decoder.max_position_embeddings),
        ];
        match dims.iter().find(|(_, value)| !(1..=MAX_DIMENSION).contains(value)) {
            Some((name, value)) => Err(format!("`{name}`: expected 1 to {MAX_DIMENSION}, got {value}")),
            None => Ok(()),
        }
    }
}

/// The fingerprint that the contents of `BUNDLE/manifest.json` have, whichever they say they have. Goes by the JSON, not by
/// [`Manifest`], so that a field that a later version adds does not change it.
pub(crate) fn read_fingerprint(bundle: &Path) -> Result<String> {
    let path = bundle.join(FILE_NAME);
    let invalid = |reason: serde_json::Error| Error::InvalidConfig { path: path.clone(), reason: reason.to_string() };
    let mut json: serde_json::Value = serde_json::from_slice(&read_at_most(&path, MAX_BYTES)?).map_err(invalid)?;
    for changeable in ["/source/name", "/fingerprint"] {
        if let Some(value) = json.pointer_mut(changeable) {
            *value = "".into();
        }
    }
    Ok(hex(&Sha256::digest(serde_json::to_vec(&json).map_err(invalid)?)))
}

/// The whole file, unless it is larger than any of its kind.
pub(crate) fn read_at_most(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    match bytes.len() as u64 > max_bytes {
        true => Err(Error::TooLarge { path: path.to_owned(), max_bytes }),
        false => Ok(bytes),
    }
}
