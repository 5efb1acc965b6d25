//! What a GPU run needs of the machine, checked before ONNX Runtime tries: its providers load libraries whose absence it
//! reports late and whose wrong versions can end the process.

pub(crate) mod libraries;
pub(crate) mod nvml;

use std::path::Path;

use crate::error::{Error, Result};
use crate::runtime::gpu::libraries::{DRIVER, Location, NeededLibrary, Origin};
use crate::runtime::provider::Device;
use crate::runtime::{self, load_library};

/// CUDA releases of each major version need a driver of at least this one (CUDA release notes, table "CUDA Toolkit and
/// Corresponding Driver Versions").
const DRIVERS: [(u32, &str); 2] = [(13, "580"), (12, "525")];

/// Provider libraries of ONNX Runtime that `device` takes, by the name of the provider.
fn providers(device: Device) -> &'static [(&'static str, &'static str)] {
    const CUDA: (&str, &str) = ("CUDA", "libonnxruntime_providers_cuda.so");
    const TENSORRT: (&str, &str) = ("TensorRT", "libonnxruntime_providers_tensorrt.so");
    match device {
        Device::Cpu => &[],
        Device::Cuda(_) => &[CUDA],
        Device::TensorRt(_) => &[CUDA, TENSORRT],
    }
}

/// Libraries that `device` needs beside ONNX Runtime's own, each once; those in Python wheels are loaded.
///
/// # Errors
/// [`Error::Provider`] when ONNX Runtime itself comes without the provider.
pub(crate) fn needed_libraries(device: Device) -> Result<Vec<NeededLibrary>> {
    let runtime = load_library()?;
    let folder = runtime.path.parent().unwrap_or(Path::new(""));
    let mut needed: Vec<NeededLibrary> = Vec::new();
    for (provider, file) in providers(device) {
        let path = folder.join(file);
        if !path.is_file() {
            let (reason, hint) = match runtime::has_nvidia_driver() {
                true => (
                    format!(
                        "ONNX Runtime at `{}` comes without {provider}: `{file}` is not beside it",
                        runtime.path.display()
                    ),
                    "run scripts/fetch_onnxruntime.sh --gpu, or point ORT_DYLIB_PATH at the library of the \
                     onnxruntime-gpu wheel; or use --provider cpu"
                        .to_owned(),
                ),
                // First things first: a library alone would help nobody.
                false => (
                    format!("there is no NVIDIA driver, and this ONNX Runtime comes without {provider}"),
                    format!(
                        "{}; then run scripts/fetch_onnxruntime.sh --gpu --cuda; or use --provider cpu",
                        DRIVER.fix
                    ),
                ),
            };
            return Err(Error::Provider { provider: device.name(), reason, hint });
        }
        for library in libraries::needed_by(&path)? {
            if !needed.iter().any(|known| known.name == library) {
                needed.push(NeededLibrary::locate(library, folder));
            }
        }
    }
    libraries::preload(&mut needed);
    Ok(needed)
}

/// Whether the CUDA provider beside ONNX Runtime is of the same build: another may crash.
fn check_build(device: Device) -> Result<()> {
    let runtime = load_library()?;
    let path = runtime.path.with_file_name("libonnxruntime_providers_cuda.so");
    if libraries::is_of_version(&path, &runtime.version)? {
        return Ok(());
    }
    Err(Error::Provider {
        provider: device.name(),
        reason: format!("`{}` is not of ONNX Runtime {}, which is beside it", path.display(), runtime.version),
        hint: "take both from one onnxruntime-gpu wheel: scripts/fetch_onnxruntime.sh --gpu".to_owned(),
    })
}

/// Whether the libraries that `device` needs are there in versions that go together. Nothing of CUDA runs yet.
///
/// # Errors
/// [`Error::Provider`] that names what is missing or too old, with the commands that install it.
pub(crate) fn check_libraries(device: Device) -> Result<()> {
    let needed = needed_libraries(device)?;
    check_build(device)?;
    let mut missing: Vec<&NeededLibrary> =
        needed.iter().filter(|library| matches!(library.location, Location::Missing(_))).collect();
    // Without a driver the rest helps nobody.
    missing.sort_by_key(|library| library.origin() != DRIVER);
    if !missing.is_empty() {
        let names = missing.iter().map(|library| match &library.location {
            // It is there, and does not load: for want of another, or built for another system.
            Location::Missing(reason) if !reason.starts_with(&library.name) => reason.clone(),
            _ => format!("{} ({})", library.name, library.origin().what),
        });
        let mut fixes: Vec<&str> = Vec::new();
        for library in &missing {
            let fix = library.origin().fix;
            if !fixes.contains(&fix) {
                fixes.push(fix);
            }
        }
        return Err(Error::Provider {
            provider: device.name(),
            reason: format!("missing {}", names.collect::<Vec<_>>().join(", ")),
            hint: format!("{}; or use --provider cpu. `recaption doctor` shows what is there", fixes.join("; ")),
        });
    }
    check_driver(device, &needed)?;
    check_versions(device, &needed)
}

/// The major version of CUDA that `needed` were built for: that of the runtime library among them.
pub(crate) fn cuda_major(needed: &[NeededLibrary]) -> Option<u32> {
    needed.iter().find_map(|library| library.name.strip_prefix("libcudart.so.")?.parse().ok())
}

fn check_driver(device: Device, needed: &[NeededLibrary]) -> Result<()> {
    let (Some(wanted), Some(found)) = (cuda_major(needed), libraries::driver_cuda_version()) else { return Ok(()) };
    if found.0 >= wanted {
        return Ok(());
    }
    let driver = DRIVERS.iter().find(|(major, _)| *major == wanted).map_or("a newer", |(_, driver)| driver);
    Err(Error::Provider {
        provider: device.name(),
        reason: format!(
            "the NVIDIA driver supports CUDA up to {}.{}, this ONNX Runtime needs CUDA {wanted}",
            found.0, found.1
        ),
        hint: format!("install driver {driver} or later, or an ONNX Runtime built for CUDA {}", found.0),
    })
}

fn check_versions(device: Device, needed: &[NeededLibrary]) -> Result<()> {
    for library in needed {
        let Some(major) = library.wanted_major() else { continue };
        match library.version() {
            Some(version) if version.major != major => {
                let Origin { what, fix } = library.origin();
                return Err(Error::Provider {
                    provider: device.name(),
                    reason: format!("{}: expected {what} {major}, got {version}", library.name),
                    hint: fix.to_owned(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}
