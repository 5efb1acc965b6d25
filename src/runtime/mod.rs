//! How graphs run: the only place that knows `ort`. Sessions, the buffers they read and write, and the bindings
//! between the two. No threads, no model.

pub(crate) mod block;
pub(crate) mod buffer;
pub(crate) mod cuda;
pub(crate) mod library;
pub mod provider;
pub(crate) mod session;
pub(crate) mod shape_profile;
pub(crate) mod stream;
mod tensorrt;

pub use library::{Library, load_library};
pub use provider::{Device, ProviderChoice};
pub use stream::CopyCounts;

use crate::error::Result;

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
