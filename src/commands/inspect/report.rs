//! What `recaption inspect` says about a bundle, in exact numbers: the fields of `--json`.

use std::collections::BTreeMap;
use std::path::Path;

use recaption_export::flops::{self, Flops};
use recaption_export::inspect::GraphContents;
use recaption_export::lint::{self, GpuProvider};
use recaption_export::{
    BundleHeader, BundleManifest, ClipManifest, DataType, DecoderDims, DimRange, GraphFile, ImageDims, Manifest,
    TensorSpec, TextDims, VisionDims,
};
use serde::Serialize;

use crate::error::Result;
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
    #[serde(flatten)]
    pub(super) header: BundleHeader,
    pub(super) num_parameters: u64,
    /// Of all files but the manifest.
    pub(super) num_bytes: u64,
    pub(super) graphs: Vec<GraphReport>,
    #[serde(flatten)]
    pub(super) captioner: Option<Captioner>,
    #[serde(flatten)]
    pub(super) scorer: Option<Scorer>,
    /// The GPU provider that the bundle is made for, if any.
    pub(super) gpu: Option<GpuReport>,
    /// Whether the files were compared by their hashes.
    pub(super) is_verified: bool,
}

/// What a GPU provider would make of the graphs, by its tables.
#[derive(Debug, Serialize)]
pub(super) struct GpuReport {
    /// With the version that the tables are of.
    pub(super) provider: &'static str,
    /// What is known not to run there, and does on the CPU.
    pub(super) exception: Option<&'static str>,
    /// What else keeps graphs from running whole; none in a bundle that this program's export wrote.
    pub(super) findings: Vec<String>,
}

impl GpuReport {
    fn of(folder: &Path, manifest: &BundleManifest) -> Result<Option<Self>> {
        let Some(provider) = GpuProvider::of_bundle(manifest.header()) else { return Ok(None) };
        let findings = lint::check_bundle(folder, manifest)?;
        let exception = findings.iter().find_map(lint::Finding::exception);
        let unknown = findings.iter().filter(|finding| finding.exception().is_none());
        Ok(Some(Self { provider: provider.name(), exception, findings: unknown.map(ToString::to_string).collect() }))
    }
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
    /// Bytes of the initialisers that a run reads whole: all but tables of which it looks up single rows.
    pub(super) read_bytes: u64,
}

/// What only a captioner has.
#[derive(Debug, Serialize)]
pub(super) struct Captioner {
    pub(super) vision: VisionDims,
    pub(super) decoder: DecoderDims,
    pub(super) kv_cache: CacheReport,
    pub(super) flops_per_image: FlopsReport,
}

/// What only a CLIP has.
#[derive(Debug, Serialize)]
pub(super) struct Scorer {
    pub(super) image: ImageDims,
    pub(super) text: TextDims,
    pub(super) projection_dim: usize,
    pub(super) logit_scale: f32,
}

impl Scorer {
    fn of(manifest: &ClipManifest) -> Self {
        let ClipManifest { image, text, projection_dim, logit_scale, .. } = manifest;
        let (image, text) = (image.clone(), text.clone());
        Self { image, text, projection_dim: *projection_dim, logit_scale: *logit_scale }
    }
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
    pub(super) fn of(
        folder: &Path,
        manifest: &BundleManifest,
        length: CaptionLength,
        is_verified: bool,
    ) -> Result<Self> {
        let read = |(name, graph)| GraphReport::read(folder, manifest, name, graph);
        let graphs = manifest.named_graphs().into_iter().map(read).collect::<Result<Vec<_>>>()?;
        let (mut captioner, mut scorer) = (None, None);
        match manifest {
            BundleManifest::Llava(manifest) => captioner = Some(Captioner::of(manifest, length)?),
            BundleManifest::Clip(manifest) => scorer = Some(Scorer::of(manifest)),
        }
        Ok(Self {
            header: manifest.header().clone(),
            num_parameters: graphs.iter().map(|graph| graph.num_parameters).fold(0, u64::saturating_add),
            num_bytes: manifest.files().iter().map(|file| file.size).fold(0, u64::saturating_add),
            graphs,
            captioner,
            scorer,
            gpu: GpuReport::of(folder, manifest)?,
            is_verified,
        })
    }
}

impl GraphReport {
    fn read(folder: &Path, manifest: &BundleManifest, name: &'static str, graph: &GraphFile) -> Result<Self> {
        let contents = GraphContents::read(folder, manifest, graph)?;
        let GraphContents { opsets, num_nodes, ops, weight_bytes, read_bytes, onnx_bytes, data_bytes } = contents;
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
            read_bytes,
        })
    }
}

impl Captioner {
    fn of(manifest: &Manifest, length: CaptionLength) -> Result<Self> {
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
                bytes_per_token: cache.bytes_per_token() * cache.num_copies(),
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
