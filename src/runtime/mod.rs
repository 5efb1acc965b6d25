//! How graphs run: with `recaption-operators` the only place that knows `ort`. Sessions, the buffers they read and
//! write, and the bindings between the two. No threads, no model.

pub(crate) mod block;
pub(crate) mod buffer;
pub(crate) mod cuda;
pub(crate) mod gpu;
pub(crate) mod host;
pub(crate) mod library;
pub(crate) mod matmul;
pub mod provider;
pub(crate) mod session;
pub(crate) mod shape_profile;
pub(crate) mod stream;
mod tensorrt;

pub use host::sums_8_bit_products_exactly;
pub use library::{Library, load_library};
pub use provider::{Device, ProviderChoice};
pub(crate) use recaption_operators::helping;
pub use stream::CopyCounts;

use crate::error::Result;
pub(crate) use crate::runtime::gpu::check_libraries;
use crate::runtime::gpu::nvml;

/// Bytes free on a GPU.
pub(crate) fn free_gpu_memory(index: i32) -> Result<u64> {
    cuda::memory(index).map(|(free, _)| free as u64)
}

/// What an engine of TensorRT's depends on, as a folder's name.
pub(crate) fn engine_key(fingerprint: &str, gpu: i32) -> Result<String> {
    let version = &load_library()?.version;
    let model = fingerprint.get(..16).unwrap_or(fingerprint);
    Ok(format!("{model}-ort{version}-trt{}-{}", tensorrt::version()?, cuda::kind(gpu)?))
}

/// Compute capability of a GPU: `(9, 0)`.
pub(crate) fn compute_capability(gpu: i32) -> Result<(i32, i32)> {
    cuda::capability(gpu)
}

/// GPUs that CUDA sees.
pub(crate) fn num_gpus() -> Result<i32> {
    cuda::num_devices()
}

/// Whether NVIDIA's driver is installed.
pub(crate) fn has_nvidia_driver() -> bool {
    gpu::libraries::driver_cuda_version().is_some()
}

/// The machine's GPUs by their names, as far as the driver tells.
pub(crate) fn gpu_names() -> Option<Vec<String>> {
    let driver = nvml::driver().ok()?;
    Some(driver.gpus.iter().map(|gpu| format!("{} {}", gpu.index, gpu.name)).collect())
}
