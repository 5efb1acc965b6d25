//! Finds and loads the ONNX Runtime library, once per process.
//!
//! `ORT_DYLIB_PATH` goes first; then, where there is an NVIDIA driver, `.onnxruntime-gpu/` in a folder above the
//! executable or in this checkout; then `.onnxruntime/` there; then beside the executable; then the system's loader.
//! The version is read before `ort` touches the library, since a library older than the bindings can abort the process.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;

use crate::error::{Error, Result};
use crate::runtime::gpu::libraries::driver_cuda_version;

/// Folder that `scripts/fetch_onnxruntime.sh` fills.
const FOLDER: &str = ".onnxruntime";
/// Folder that `scripts/fetch_onnxruntime.sh --gpu` fills; it goes first where there is an NVIDIA driver.
const GPU_FOLDER: &str = ".onnxruntime-gpu";
/// Oldest minor version of ONNX Runtime 1.x that is let in; 1.31 is what the tests run on.
const MIN_MINOR_VERSION: u32 = 24;
const HINT: &str =
    "run scripts/fetch_onnxruntime.sh, or point ORT_DYLIB_PATH at libonnxruntime of version 1.24 or later";

/// The loaded library.
pub struct Library {
    /// Where it was found.
    pub path: PathBuf,
    /// Its own version, such as `1.31.1`.
    pub version: String,
    pub(super) environment: Environment,
}

impl Library {
    /// Whether decode steps may be captured as CUDA graphs. Before 1.31.1 kernels that ours use (`GatherND`, `Concat`) could
    /// record copies from host memory that is freed by the time a graph is replayed (onnxruntime pull requests 32120, 32121).
    pub(crate) fn captures_graphs_safely(&self) -> bool {
        is_at_least(&self.version, [1, 31, 1])
    }

    /// Names of the execution providers that were compiled into it, without `ExecutionProvider`.
    pub(crate) fn providers(&self) -> Vec<String> {
        let (mut names, mut count) = (std::ptr::null_mut(), 0);
        // SAFETY: the array and its length are written on success, and given back by the function made for that.
        unsafe {
            let status = (ort::api().GetAvailableProviders)(&raw mut names, &raw mut count);
            if ort::Error::<()>::result_from_status(status).is_err() {
                return vec![];
            }
            let found = std::slice::from_raw_parts(names, count as usize)
                .iter()
                .map(|&name| CStr::from_ptr(name).to_string_lossy().replace("ExecutionProvider", ""))
                .collect();
            let _ = ort::Error::<()>::result_from_status((ort::api().ReleaseAvailableProviders)(names, count));
            found
        }
    }
}

/// Loads the library, or returns what an earlier call loaded.
///
/// # Errors
/// [`Error::OnnxRuntimeLibrary`] when none is found, it is too old, or it is not ONNX Runtime.
pub fn load_library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    if let Some(library) = LIBRARY.get() {
        return Ok(library);
    }
    let path = find(std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from))?;
    let version = read_version(&path)?;
    let environment = ort::init_from(&path)
        .map_err(|reason| refusal(reason.to_string()))?
        .with_name("recaption")
        .with_telemetry(false)
        .build()
        .map_err(Error::ort("start ONNX Runtime"))?;
    Ok(LIBRARY.get_or_init(|| Library { path, version, environment }))
}

fn refusal(reason: String) -> Error {
    Error::OnnxRuntimeLibrary { reason, hint: HINT.to_owned() }
}

/// The library's path; a bare file name, for the system's loader, when nothing nearer is there.
fn find(requested: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = requested.filter(|path| !path.as_os_str().is_empty()) {
        if path.is_file() {
            return Ok(path);
        }
        return Err(refusal(format!("ORT_DYLIB_PATH names `{}`, which is not a file", path.display())));
    }
    let executable = std::env::current_exe().ok();
    let in_folders = |name: &str| {
        let above_executable = executable.iter().flat_map(|path| path.ancestors().skip(1));
        let in_checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
        above_executable.chain([in_checkout]).find_map(|folder| library_in(&folder.join(name)))
    };
    let for_gpu = driver_cuda_version().and_then(|_| in_folders(GPU_FOLDER));
    let beside_executable = || library_in(executable.as_deref()?.parent()?);
    let found = for_gpu.or_else(|| in_folders(FOLDER)).or_else(beside_executable).or_else(|| in_folders(GPU_FOLDER));
    Ok(found.unwrap_or_else(|| system_name().into()))
}

/// A file named like the library; the last by name where there are several versions.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("libonnxruntime.") || name == "onnxruntime.dll"
        })
        .max()
}

fn system_name() -> String {
    format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

fn read_version(path: &Path) -> Result<String> {
    // SAFETY: loading runs the library's initialisers; it is the one the user or the set-up script put there to be run.
    let library = unsafe { libloading::Library::new(path) }.map_err(|reason| {
        if path.is_absolute() || path.is_file() {
            refusal(format!("`{}` does not load: {reason}", path.display()))
        } else {
            let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join(FOLDER);
            refusal(format!(
                "the ONNX Runtime library is not in `{FOLDER}` above the executable, in `{}`, or on the system's library path",
                checkout.display()
            ))
        }
    })?;
    // SAFETY: the symbol has this signature in every version of onnxruntime_c_api.h.
    let get_base = unsafe { library.get::<unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase") }
        .map_err(|_| refusal(format!("`{}` is not ONNX Runtime: it has no OrtGetApiBase", path.display())))?;
    // SAFETY: as documented, the function takes nothing and returns a pointer to a static structure, whose
    // GetVersionString returns a static, zero-terminated text.
    let version = unsafe {
        let base = get_base();
        if base.is_null() {
            return Err(refusal(format!("`{}` gives no API", path.display())));
        }
        CStr::from_ptr(((*base).GetVersionString)()).to_string_lossy().into_owned()
    };
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let (major, minor) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if major != 1 || minor < MIN_MINOR_VERSION {
        let reason = format!(
            "ONNX Runtime at `{}`: expected version 1.{MIN_MINOR_VERSION} or later, got {version}",
            path.display()
        );
        return Err(refusal(reason));
    }
    Ok(version)
}

fn is_at_least(version: &str, wanted: [u32; 3]) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0)) >= wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_part_by_part() {
        for (version, expected) in
            [("1.31.1", true), ("1.31.0", false), ("1.32", true), ("1.9.9", false), ("2.0.0", true)]
        {
            assert_eq!(is_at_least(version, [1, 31, 1]), expected, "{version}");
        }
    }
}
