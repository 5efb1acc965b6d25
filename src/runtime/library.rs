//! Finds and loads the ONNX Runtime library, once per process.
//!
//! `ORT_DYLIB_PATH` goes first; then `.onnxruntime/` in a folder above the executable, in this checkout, or beside the
//! executable; then the system's loader. The version is read before `ort` touches the library, since a library older
//! than the bindings can abort the process.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;

use crate::error::{Error, Result};

/// Folder that `scripts/fetch_onnxruntime.sh` fills.
const FOLDER: &str = ".onnxruntime";
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
    let above_executable =
        executable.iter().flat_map(|path| path.ancestors().skip(1)).map(|folder| folder.join(FOLDER));
    let in_checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join(FOLDER);
    let beside_executable = executable.iter().filter_map(|path| path.parent()).map(Path::to_owned);
    let found = above_executable.chain([in_checkout]).chain(beside_executable).find_map(|folder| library_in(&folder));
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
