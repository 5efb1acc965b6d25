//! What `recaption inspect` says about a bundle, in exact numbers: the fields of `--json`.

use std::collections::BTreeMap;

use recaption_export::flops::{self, Flops};
use recaption_export::inspect::GraphContents;
use recaption_export::{
    BundleFile, BundleKind, DataType, DecoderDims, DimRange, GraphFile, Precision, Source, Target, TensorSpec,
    VisionDims,
};
use serde::Serialize;

use crate::error::Result;
use crate::model::Bundle;
use crate::model::kv_cache::CacheShape;

/// New tokens of the caption that the cache is sized for: what `recaption run` makes room for by default.
const CACHED_NEW_TOKENS: usize = 128;

/// How long prompt and caption are.
#[derive(Clone, Copy, Debug)]
pub(super) struct CaptionLength {
    pub(super) prompt_tokens: usize,
    pub(super) new_tokens: usize,
}

/// A bundle.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) kind: BundleKind,
    pub(super) format_version: u32,
    pub(super) producer: String,
    pub(super) source: Source,
    pub(super) precision: Precision,
    pub(super) vision_precision: Precision,
    pub(super) activations: DataType,
    pub(super) reduce_range: bool,
    pub(super) target: Target,
    pub(super) fingerprint: String,
    pub(super) num_parameters: u64,
    /// Of all files but the manifest.
    pub(super) num_bytes: u64,
    pub(super) graphs: Vec<GraphReport>,
    #[serde(flatten)]
    pub(super) captioner: Option<Captioner>,
    pub(super) files: Vec<BundleFile>,
    /// Whether the files were compared by their hashes.
    pub(super) is_verified: bool,
}

/// One graph.
#[derive(Debug, Serialize)]
pub(super) struct GraphReport {
    pub(super) name: &'static str,
    pub(super) file: String,
    /// Weights of the checkpoint in it.
    pub(super) num_parameters: u64,
    pub(super) onnx_bytes: u64,
    pub(super) data_bytes: u64,
    pub(super) inputs: Vec<TensorSpec>,
    pub(super) outputs: Vec<TensorSpec>,
    /// Sizes of the free dimensions.
    pub(super) profile: BTreeMap<String, DimRange>,
    /// Operator sets by domain.
    pub(super) opsets: BTreeMap<String, i64>,
    pub(super) num_nodes: usize,
    /// Nodes by operator.
    pub(super) ops: BTreeMap<String, usize>,
    /// Bytes of the initialisers by element type.
    pub(super) weight_bytes: BTreeMap<&'static str, u64>,
}

/// What only a captioner has.
#[derive(Debug, Serialize)]
pub(super) struct Captioner {
    pub(super) vision: VisionDims,
    pub(super) decoder: DecoderDims,
    pub(super) kv_cache: CacheReport,
    pub(super) flops_per_image: FlopsReport,
}

/// Memory that one caption in flight takes.
#[derive(Debug, Serialize)]
pub(super) struct CacheReport {
    pub(super) dtype: DataType,
    pub(super) num_kv_heads: usize,
    /// As wide as the cache has it, which may be more than the model.
    pub(super) head_dim: usize,
    /// 2 where the decoder cannot update it in place.
    pub(super) num_copies: usize,
    pub(super) bytes_per_token: usize,
    /// Tokens of image, prompt and a caption of `new_tokens`.
    pub(super) caption_tokens: usize,
    pub(super) new_tokens: usize,
    pub(super) bytes_per_caption: usize,
}

/// Floating-point operations of one image.
#[derive(Debug, Serialize)]
pub(super) struct FlopsReport {
    pub(super) prompt_tokens: usize,
    pub(super) new_tokens: usize,
    #[serde(flatten)]
    pub(super) flops: Flops,
}

impl Report {
    /// Reads the graphs of a bundle.
    ///
    /// # Errors
    /// [`crate::Error::Bundle`] when a graph is damaged, is not the manifest's, or uses an operator that its target does not
    /// have; [`crate::Error::Setting`] without a KV cache of the expected form.
    pub(super) fn of(bundle: &Bundle, length: CaptionLength, is_verified: bool) -> Result<Self> {
        let manifest = &bundle.manifest;
        let read = |(name, graph)| GraphReport::read(bundle, name, graph);
        let graphs = manifest.named_graphs().into_iter().map(read).collect::<Result<Vec<_>>>()?;
        let captioner = match manifest.kind {
            BundleKind::Llava => Some(Captioner::of(bundle, length)?),
        };
        Ok(Self {
            kind: manifest.kind,
            format_version: manifest.format_version,
            producer: manifest.producer.clone(),
            source: manifest.source.clone(),
            precision: manifest.precision,
            vision_precision: manifest.vision_precision,
            activations: manifest.activations,
            reduce_range: manifest.reduce_range,
            target: manifest.target,
            fingerprint: manifest.fingerprint.clone(),
            num_parameters: graphs.iter().map(|graph| graph.num_parameters).fold(0, u64::saturating_add),
            num_bytes: manifest.files.iter().map(|file| file.size).fold(0, u64::saturating_add),
            graphs,
            captioner,
            files: manifest.files.clone(),
            is_verified,
        })
    }
}

impl GraphReport {
    fn read(bundle: &Bundle, name: &'static str, graph: &GraphFile) -> Result<Self> {
        let contents = GraphContents::read(&bundle.folder, &bundle.manifest, graph)?;
        let GraphContents { opsets, num_nodes, ops, weight_bytes, onnx_bytes, data_bytes } = contents;
        let GraphFile { file, inputs, outputs, profile, num_parameters } = graph.clone();
        Ok(Self {
            name,
            file,
            num_parameters: num_parameters as u64,
            onnx_bytes,
            data_bytes,
            inputs,
            outputs,
            profile,
            opsets,
            num_nodes,
            ops,
            weight_bytes,
        })
    }
}

impl Captioner {
    fn of(bundle: &Bundle, length: CaptionLength) -> Result<Self> {
        let manifest = &bundle.manifest;
        let CaptionLength { prompt_tokens, new_tokens } = length;
        let cache = CacheShape::of(manifest)?;
        let caption_tokens = manifest.vision.num_image_tokens + prompt_tokens + CACHED_NEW_TOKENS;
        Ok(Self {
            vision: manifest.vision.clone(),
            decoder: manifest.decoder.clone(),
            kv_cache: CacheReport {
                dtype: cache.dtype,
                num_kv_heads: cache.num_kv_heads,
                head_dim: cache.head_dim,
                num_copies: cache.num_copies(),
                bytes_per_token: cache.bytes_per_slot(1),
                caption_tokens,
                new_tokens: CACHED_NEW_TOKENS,
                bytes_per_caption: cache.bytes_per_slot(caption_tokens),
            },
            flops_per_image: FlopsReport {
                prompt_tokens,
                new_tokens,
                flops: flops::per_image(&manifest.vision, &manifest.decoder, prompt_tokens, new_tokens),
            },
        })
    }
}
