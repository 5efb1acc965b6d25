//! The version of the TensorRT library: engines that another version built do not load.

use libloading::Library;

use crate::error::{Error, Result};

/// What ONNX Runtime's provider links to.
const NAME: &str = "libnvinfer.so.10";

/// `10.14.1`
pub(super) fn version() -> Result<String> {
    let missing = |reason: libloading::Error| Error::Provider {
        provider: "tensorrt",
        reason: reason.to_string(),
        hint: "install TensorRT 10, or use --provider cuda or cpu".to_owned(),
    };
    // SAFETY: loading runs the library's initialisers; it is the one that the provider loads itself.
    let library = unsafe { Library::new(NAME) }.map_err(missing)?;
    // SAFETY: NvInferRuntime.h declares it so: the version as one number, 10000 x major + 100 x minor + patch since 10.0.
    let version = unsafe { library.get::<unsafe extern "C" fn() -> i32>(b"getInferLibVersion").map(|get| get()) };
    let version = version.map_err(missing)?;
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}
