//! What can be known of a graph on a GPU without one: that each node has a kernel of the provider that is to run it, for its
//! version and types; that nothing is copied between host and GPU within a run; that no shape depends on data.
//!
//! Takes a graph as `export` builds it or as it stands on the disk, and the facts of `data/*.json`, which name their source.
//! [`check_bundle`] is for whole bundles, [`check`] for one graph and one provider; export refuses a graph with a finding that
//! is no [`Finding::exception`].

mod cuda;
mod operators;
mod schema;
mod shapes;
mod tensorrt;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::bundle_manifest::BundleManifest;
use crate::error::Result;
use crate::graph::DataType;
use crate::inspect::read_model;
use crate::manifest::{BundleHeader, BundleKind, DimRange, Precision, Target};
use crate::proto::{GraphProto, ModelProto, NodeProto};

pub use self::cuda::{CudaPlacement, cuda_placement};
pub(crate) use self::operators::{check as check_operators, count_ops, op_name};

/// What runs graphs on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuProvider {
    /// ONNX Runtime's CUDA provider.
    Cuda,
    /// TensorRT, through its ONNX parser.
    TensorRt,
}

impl GpuProvider {
    /// The provider that graphs of `target` with weights of `precision` are made for, if any.
    #[must_use]
    pub fn of(target: Target, precision: Precision) -> Option<Self> {
        match (target, precision) {
            (Target::TensorRt, _) => Some(Self::TensorRt),
            (Target::Cpu, _) | (Target::Ort, Precision::Int8) => None,
            (Target::Ort, _) => Some(Self::Cuda),
        }
    }

    /// That of a bundle; all of its graphs must have one.
    #[must_use]
    pub fn of_bundle(header: &BundleHeader) -> Option<Self> {
        Self::of(header.target, header.vision_precision).and(Self::of(header.target, header.precision))
    }

    /// As messages spell it, with the version that the facts are of.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuda => cuda::version(),
            Self::TensorRt => tensorrt::version(),
        }
    }
}

/// Something in a graph that keeps a provider from running it whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Who could not run it.
    pub provider: GpuProvider,
    /// The graph's name or file.
    pub graph: String,
    /// The node, or the input or output of the graph.
    pub place: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong at one place of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// No kernel for the operator, its version or its types: the node would go to the CPU.
    NoKernel {
        /// With its domain where it is not the standard one.
        op: String,
        /// Of the operator's domain, as the graph imports it; 0 where it does not.
        opset: i64,
        /// Types of the inputs that are there, by ONNX's names; `?` where the graph does not tell.
        types: Vec<String>,
    },
    /// If, Loop or Scan: they rule out CUDA graphs.
    ControlFlow {
        /// The operator.
        op: String,
    },
    /// Inputs of one type variable have two types, or a value comes from nowhere.
    Types {
        /// Which.
        reason: String,
    },
    /// A value is made on one side and read on the other: ONNX Runtime inserts a copy, which rules out CUDA graphs.
    Copy {
        /// The value.
        value: String,
        /// From GPU to host, else the other way.
        to_host: bool,
    },
    /// The output's shape depends on data: TensorRT and CUDA graphs want to know it before they run.
    DataDependentShape {
        /// The operator.
        op: String,
        /// The input that decides and does not come from shapes alone; none where the operator itself is such.
        input: Option<String>,
    },
    /// A dimension that is neither a number nor a name.
    UnnamedDimension {
        /// Which.
        axis: usize,
    },
    /// A named dimension without a range in the graph's profile.
    NoRange {
        /// Its name.
        dim: String,
    },
    /// An input that must be an initialiser is none.
    NotConstant {
        /// The operator.
        op: String,
        /// The input.
        input: String,
    },
    /// An input that must be zero is not.
    NotZero {
        /// The operator.
        op: String,
        /// The input.
        input: String,
    },
    /// More outputs are asked for than are supported.
    ExtraOutput {
        /// The operator.
        op: String,
    },
}

/// Why a decoder with f32 attention is written although CUDA has no kernel for it.
const F32_ATTENTION: &str = "CUDA's attention is f16 and bf16 only: a decoder of f32 runs on the CPU";

/// Why the decoder of such a bundle cannot run on CUDA although the bundle is for it, without a look at its graphs: what
/// [`Finding::exception`] says of the findings that it would have.
#[must_use]
pub fn cuda_exception(header: &BundleHeader) -> Option<&'static str> {
    let is_for_cuda = GpuProvider::of_bundle(header) == Some(GpuProvider::Cuda);
    let has_f32_attention = header.kind == BundleKind::Llava && header.activations == DataType::F32;
    (is_for_cuda && has_f32_attention).then_some(F32_ATTENTION)
}

impl Finding {
    /// Why this finding is known and no fault of the graph. There is one exception: `GroupQueryAttention` of f32, which CUDA
    /// does not have and the CPU does. The runner puts such a decoder (fp32, and int8-block and int4 unless exported with
    /// `--activations fp16`) on the CPU as a whole.
    #[must_use]
    pub fn exception(&self) -> Option<&'static str> {
        let Problem::NoKernel { op, types, .. } = &self.problem else { return None };
        let is_f32_attention =
            op == "com.microsoft.GroupQueryAttention" && types.first().is_some_and(|first| first == "float");
        (is_f32_attention && self.provider == GpuProvider::Cuda).then_some(F32_ATTENTION)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { provider, graph, place, problem } = self;
        write!(formatter, "`{graph}` `{place}`: {problem} ({})", provider.name())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKernel { op, opset, types } => {
                write!(formatter, "no kernel for operator `{op}` of opset {opset} with {}", types.join(", "))
            }
            Self::ControlFlow { op } => write!(formatter, "`{op}` is control flow"),
            Self::Types { reason } => formatter.write_str(reason),
            Self::Copy { value, to_host } => {
                let (from, to) = if *to_host { ("GPU", "host") } else { ("host", "GPU") };
                write!(formatter, "`{value}` must be copied from {from} to {to}")
            }
            Self::DataDependentShape { op, input: None } => {
                write!(formatter, "the shape of what `{op}` gives depends on data")
            }
            Self::DataDependentShape { op, input: Some(input) } => {
                write!(formatter, "the shape of what `{op}` gives depends on the data in `{input}`")
            }
            Self::UnnamedDimension { axis } => write!(formatter, "dimension {axis} is neither a number nor a name"),
            Self::NoRange { dim } => write!(formatter, "dimension `{dim}` has no range in the profile"),
            Self::NotConstant { op, input } => write!(formatter, "input `{input}` of `{op}` must be an initialiser"),
            Self::NotZero { op, input } => write!(formatter, "input `{input}` of `{op}` must be zero"),
            Self::ExtraOutput { op } => write!(formatter, "an output of `{op}` that is not supported"),
        }
    }
}

/// Most that is noted of one graph by one check: a file that anybody may have written can be wrong in a million places.
const MAX_FINDINGS: usize = 1000;

/// What a check found so far, by place.
#[derive(Default)]
struct Notes(Vec<(String, Problem)>);

impl Notes {
    fn at_node(&mut self, node: &NodeProto, problem: Problem) {
        self.at(node.name.as_deref().unwrap_or_default(), problem);
    }

    fn at(&mut self, place: &str, problem: Problem) {
        if self.0.len() < MAX_FINDINGS {
            self.0.push((place.to_owned(), problem));
        }
    }
}

/// A graph that is looked at.
struct Graph<'a> {
    model: &'a ModelProto,
    proto: &'a GraphProto,
}

impl<'a> Graph<'a> {
    fn new(model: &'a ModelProto) -> Self {
        static EMPTY: GraphProto =
            GraphProto { node: vec![], name: None, initializer: vec![], input: vec![], output: vec![] };
        Self { model, proto: model.graph.as_ref().unwrap_or(&EMPTY) }
    }

    /// Version of the operator set that `op` is of; 0 where the graph does not import it.
    fn opset(&self, op: &str) -> i64 {
        let domain = op.rsplit_once('.').map_or("", |(domain, _)| domain);
        let is_same = |found: &str| found == domain || (domain.is_empty() && found == "ai.onnx");
        let import =
            self.model.opset_import.iter().find(|import| is_same(import.domain.as_deref().unwrap_or_default()));
        import.and_then(|import| import.version).unwrap_or(0)
    }
}

/// What keeps `provider` from running a whole graph. `name` is for messages; `profile` are the ranges of named dimensions.
#[must_use]
pub fn check(
    provider: GpuProvider,
    name: &str,
    model: &ModelProto,
    profile: &BTreeMap<String, DimRange>,
) -> Vec<Finding> {
    let graph = Graph::new(model);
    let of_provider = match provider {
        GpuProvider::Cuda => cuda::check(&graph),
        GpuProvider::TensorRt => tensorrt::check(&graph),
    };
    let found = shapes::check(&graph, profile).0.into_iter().chain(of_provider.0);
    found.map(|(place, problem)| Finding { provider, graph: name.to_owned(), place, problem }).collect()
}

/// What keeps the GPU provider that the bundle was exported for from running its graphs whole, and TensorRT from running those
/// of standard operators; nothing where it was exported for the CPU alone.
///
/// # Errors
/// When a graph cannot be read.
pub fn check_bundle(bundle: &Path, manifest: &BundleManifest) -> Result<Vec<Finding>> {
    let Some(provider) = GpuProvider::of_bundle(manifest.header()) else { return Ok(vec![]) };
    let mut findings = Vec::new();
    for (_, graph) in manifest.named_graphs() {
        let (model, _) = read_model(&bundle.join(&graph.file))?;
        findings.extend(check(provider, &graph.file, &model, &graph.profile));
        if provider == GpuProvider::Cuda && is_standard(&model) {
            findings.extend(check(GpuProvider::TensorRt, &graph.file, &model, &graph.profile));
        }
    }
    Ok(findings)
}

/// Whether a graph is made of standard operators: a vision tower of floats, for CUDA and TensorRT.
fn is_standard(model: &ModelProto) -> bool {
    model.opset_import.iter().all(|import| import.domain.as_deref().is_none_or(str::is_empty))
}

#[cfg(test)]
mod tests;
