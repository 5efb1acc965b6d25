//! Which execution provider runs the graphs. Providers register with `error_on_failure`, so that ONNX Runtime never
//! falls back to the CPU silently; `auto` falls back here, and says so.

use ort::ep::{self, ExecutionProviderDispatch};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};

use crate::error::{Error, Result};

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
    /// TensorRT for vision tower and projector; the decoder as with `Cuda`, since TensorRT does not take its operators.
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

    pub(super) fn execution_providers(self) -> Vec<ExecutionProviderDispatch> {
        // Without strict mode the fused norm accumulates in fp16 on CUDA and may return zeros.
        let cuda = |device| {
            ep::CUDA::default().with_device_id(device).with_skip_layer_norm_strict_mode(true).build().error_on_failure()
        };
        match self {
            Self::Cpu => vec![],
            Self::Cuda(device) => vec![cuda(device)],
            Self::TensorRt(device) => {
                vec![ep::TensorRT::default().with_device_id(device).build().error_on_failure(), cuda(device)]
            }
        }
    }

    /// The allocator of this device's own memory, through the session that will use it.
    pub(super) fn allocator(self, session: &ort::session::Session) -> Result<Allocator> {
        let (Self::Cuda(index) | Self::TensorRt(index)) = self else { return Ok(Allocator::default()) };
        MemoryInfo::new(AllocationDevice::CUDA, index, AllocatorType::Device, MemoryType::Default)
            .and_then(|info| Allocator::new(session, info))
            .map_err(Error::ort(format!("allocate on GPU {index}")))
    }

    pub(super) fn refusal(self, source: &ort::Error) -> Error {
        let hint = match self {
            Self::Cpu => "",
            Self::Cuda(_) => {
                "needs an NVIDIA driver, CUDA 13, cuDNN 9 and the library of the onnxruntime-gpu wheel in ORT_DYLIB_PATH; \
                 or use --provider cpu"
            }
            Self::TensorRt(_) => {
                "needs TensorRT 10 beside CUDA 13, cuDNN 9 and the library of the onnxruntime-gpu wheel in \
                 ORT_DYLIB_PATH; or use --provider cuda or cpu"
            }
        };
        Error::Provider { provider: self.name(), reason: source.to_string(), hint }
    }
}

/// Whether the CUDA provider can be used: the library has it and what it links to is there.
///
/// # Errors
/// ONNX Runtime's reason, in one line.
pub fn probe_cuda() -> std::result::Result<(), String> {
    let library = super::load_library().map_err(|error| error.to_string())?;
    let registered = ort::session::Session::builder(&library.environment)
        .and_then(|builder| {
            let providers = Device::Cuda(0).execution_providers();
            builder.with_execution_providers(providers).map_err(ort::Error::<()>::from)
        })
        .map(|_| ());
    registered.map_err(|error| format!("no CUDA: {}", error.to_string().lines().next().unwrap_or_default()))
}
