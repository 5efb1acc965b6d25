//! Which execution provider runs the graphs. Providers register with `error_on_failure`, so that ONNX Runtime never
//! falls back to the CPU silently; `auto` falls back here, and says so.

use std::fmt;
use std::path::Path;

use ort::ep::cuda::ConvAlgorithmSearch;
use ort::ep::{self, ArenaExtendStrategy, ExecutionProviderDispatch};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};

use crate::error::{Error, Result};
use crate::runtime::shape_profile::ShapeProfile;

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProviderChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA for vision tower and projector, and for the decoder where CUDA has attention in its precision.
    Cuda,
    /// TensorRT for vision tower and projector; the decoder too where it has standard operators, else as with `Cuda`.
    TensorRt,
}

/// What a session runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// CUDA on the GPU of this index.
    Cuda(i32),
    /// TensorRT, with CUDA for what it does not take, on the GPU of this index.
    TensorRt(i32),
}

impl fmt::Display for Device {
    /// `cpu`, `cuda 1`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gpu_index() {
            None => f.write_str(self.name()),
            Some(index) => write!(f, "{} {index}", self.name()),
        }
    }
}

impl Device {
    /// Name as `--provider` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "cuda",
            Self::TensorRt(_) => "tensorrt",
        }
    }

    /// Index of the GPU.
    #[must_use]
    pub fn gpu_index(self) -> Option<i32> {
        match self {
            Self::Cpu => None,
            Self::Cuda(index) | Self::TensorRt(index) => Some(index),
        }
    }

    pub(super) fn execution_providers(self, settings: &ProviderSettings<'_>) -> Vec<ExecutionProviderDispatch> {
        match self {
            Self::Cpu => vec![],
            Self::Cuda(device) => vec![cuda(device, settings).build().error_on_failure()],
            Self::TensorRt(device) => vec![
                tensorrt(device, settings).build().error_on_failure(),
                cuda(device, settings).build().error_on_failure(),
            ],
        }
    }

    /// The allocator of this device's own memory, through the session that will use it.
    pub(super) fn allocator(self, session: &ort::session::Session) -> Result<Allocator> {
        let (device, index) = match self.gpu_index() {
            None => (AllocationDevice::CPU, 0),
            Some(index) => (AllocationDevice::CUDA, index),
        };
        allocator(session, device, index, MemoryType::Default)
    }

    /// The allocator of host memory that this device copies from and to without a detour.
    pub(super) fn staging_allocator(self, session: &ort::session::Session) -> Result<Allocator> {
        match self.gpu_index() {
            None => allocator(session, AllocationDevice::CPU, 0, MemoryType::Default),
            Some(index) => allocator(session, AllocationDevice::CUDA_PINNED, index, MemoryType::CPUOutput),
        }
    }

    pub(super) fn refusal(self, source: &ort::Error) -> Error {
        let hint = match self {
            Self::Cpu => "",
            Self::Cuda(_) => "`recaption doctor` shows what is missing; or use --provider cpu",
            Self::TensorRt(_) => {
                "needs TensorRT 10 beside CUDA 13, cuDNN 9 and the library of the onnxruntime-gpu wheel in \
                 ORT_DYLIB_PATH; or use --provider cuda or cpu"
            }
        };
        Error::Provider { provider: self.name(), reason: source.to_string(), hint: hint.to_owned() }
    }
}

/// What the providers of one session are told.
#[derive(Debug, Default)]
pub(super) struct ProviderSettings<'a> {
    /// The stream of the engine.
    pub(super) stream: Option<*mut ()>,
    pub(super) memory_limit: Option<usize>,
    pub(super) captures_graphs: bool,
    /// Where TensorRT keeps its engines.
    pub(super) engine_cache: Option<&'a Path>,
    /// Name of the engine's files.
    pub(super) engine_name: &'a str,
    pub(super) shapes: Option<ShapeProfile>,
}

fn cuda(device: i32, settings: &ProviderSettings<'_>) -> ep::CUDA {
    let mut provider = ep::CUDA::default()
        .with_device_id(device)
        // Without it the fused norm accumulates in fp16 and may return zeros.
        .with_skip_layer_norm_strict_mode(true)
        // The arena takes what is asked for, so that the memory plan holds.
        .with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested)
        .with_conv_algorithm_search(ConvAlgorithmSearch::Heuristic)
        // fp32 means fp32.
        .with_tf32(false)
        .with_cuda_graph(settings.captures_graphs);
    if let Some(limit) = settings.memory_limit {
        provider = provider.with_memory_limit(limit);
    }
    if let Some(stream) = settings.stream {
        // SAFETY: the session that gets this provider keeps its stream alive (`Session::stream`).
        provider = unsafe { provider.with_compute_stream(stream) };
    }
    provider
}

fn tensorrt(device: i32, settings: &ProviderSettings<'_>) -> ep::TensorRT {
    // The graphs say their precision; none of the provider's precision switches is on, so that it builds strongly typed.
    let mut provider = ep::TensorRT::default()
        .with_device_id(device)
        .with_context_memory_sharing(true)
        .with_force_sequential_engine_build(true);
    if let Some(folder) = settings.engine_cache {
        let folder = folder.to_string_lossy();
        // An engine is good for its profile: of one graph there are several, for prefill and decode and for other settings.
        let shapes = settings.shapes.as_ref().map(ShapeProfile::short_hash).unwrap_or_default();
        provider = provider
            .with_engine_cache(true)
            .with_engine_cache_path(&folder)
            .with_engine_cache_prefix(format!("{}-{shapes}", settings.engine_name))
            .with_timing_cache(true)
            .with_timing_cache_path(&folder);
    }
    if let Some(ShapeProfile { min, opt, max }) = &settings.shapes {
        provider = provider.with_profile_min_shapes(min).with_profile_opt_shapes(opt).with_profile_max_shapes(max);
    }
    if let Some(stream) = settings.stream {
        // SAFETY: as for CUDA.
        provider = unsafe { provider.with_compute_stream(stream) };
    }
    provider
}

fn allocator(
    session: &ort::session::Session,
    device: AllocationDevice<'static>,
    index: i32,
    memory_type: MemoryType,
) -> Result<Allocator> {
    let doing = format!("allocate in {} memory", device.as_str());
    MemoryInfo::new(device, index, AllocatorType::Device, memory_type)
        .and_then(|info| Allocator::new(session, info))
        .map_err(Error::ort(doing))
}

/// Whether the library has the providers of `device`, and what they link to is there.
///
/// # Errors
/// [`Error::Provider`] with ONNX Runtime's reason.
pub fn probe(device: Device) -> Result<()> {
    let library = super::load_library()?;
    let builder = ort::session::Session::builder(&library.environment).map_err(Error::ort("start a session"))?;
    let providers = device.execution_providers(&ProviderSettings::default());
    let registered = builder.with_execution_providers(providers).map_err(ort::Error::<()>::from);
    registered.map(drop).map_err(|error| device.refusal(&error))
}
