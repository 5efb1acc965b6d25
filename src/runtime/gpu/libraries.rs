//! NVIDIA's libraries: which ones a provider of ONNX Runtime links to, where they are, what versions, and what brings them.
//!
//! They may come from the system or from Python wheels: below `.onnxruntime-gpu/`, where `scripts/fetch_onnxruntime.sh`
//! puts them, or in the active virtual or conda environment. Those of wheels are loaded by their path, since the system's
//! loader does not look there; once a library is loaded, whoever links to its name gets it.

use std::fmt;
use std::path::{Path, PathBuf};

use libloading::Library;
use libloading::os::unix::{Library as UnixLibrary, RTLD_GLOBAL, RTLD_LAZY};

use crate::error::{Error, Result};

/// Loaded at run time by the CUDA provider, which does not link to it.
const CUDNN: &str = "libcudnn.so.9";

/// A library that a provider needs.
#[derive(Debug)]
pub(crate) struct NeededLibrary {
    /// `libcublas.so.13`
    pub(crate) name: String,
    pub(crate) location: Location,
}

/// Where a library is.
#[derive(Debug)]
pub(crate) enum Location {
    /// Where the system's loader finds it.
    System,
    /// In a Python wheel.
    Wheel(PathBuf),
    /// Nowhere; or the loader refuses it, in these words.
    Missing(String),
}

/// What a library belongs to, and the command that installs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) what: &'static str,
    pub(crate) fix: &'static str,
}

pub(super) const DRIVER: Origin = Origin {
    what: "NVIDIA driver",
    fix: "install the NVIDIA driver; in a container, start it with the GPUs (`docker run --gpus all`)",
};
const CUDA: Origin = Origin { what: "CUDA", fix: "run scripts/fetch_onnxruntime.sh --gpu --cuda" };
const CUDNN_ORIGIN: Origin = Origin { what: "cuDNN", fix: "run scripts/fetch_onnxruntime.sh --gpu --cuda" };
const TENSORRT: Origin =
    Origin { what: "TensorRT", fix: "install TensorRT 10 (`pip install 'tensorrt-cu13<11'`), or use --provider cuda" };

/// Libraries that are NVIDIA's, by the start of their names.
const ORIGINS: [(&str, Origin); 6] = [
    ("libcuda.so", DRIVER),
    ("libnvidia-", DRIVER),
    ("libcudnn", CUDNN_ORIGIN),
    ("libnvinfer", TENSORRT),
    ("libnvonnxparser", TENSORRT),
    ("libcu", CUDA),
];

fn origin_of(name: &str) -> Option<Origin> {
    ORIGINS.iter().find(|(start, _)| name.starts_with(start)).map(|(_, origin)| *origin)
}

/// NVIDIA's libraries that the ELF file at `path` links to, and cuDNN beside CUDA.
///
/// # Errors
/// [`Error::Io`] when the file is no library.
pub(crate) fn needed_by(path: &Path) -> Result<Vec<String>> {
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the library is mapped to be read, as the loader will map it; nobody writes to installed libraries.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("read", path))?;
    let invalid = |reason: goblin::error::Error| std::io::Error::new(std::io::ErrorKind::InvalidData, reason);
    let elf = goblin::elf::Elf::parse(&bytes).map_err(|reason| Error::io("read", path)(invalid(reason)))?;
    let mut names: Vec<String> =
        elf.libraries.iter().filter(|name| origin_of(name).is_some()).map(|name| (*name).to_owned()).collect();
    if names.iter().any(|name| name.starts_with("libcudart")) && !names.iter().any(|name| name == CUDNN) {
        names.push(CUDNN.to_owned());
    }
    Ok(names)
}

/// Whether the provider library at `path` was built with ONNX Runtime `version`, by the version in its read-only data; a
/// library without that section cannot tell.
///
/// # Errors
/// [`Error::Io`] when the file is no library.
pub(super) fn is_of_version(path: &Path, version: &str) -> Result<bool> {
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: as in `needed_by`.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("read", path))?;
    let Ok(elf) = goblin::elf::Elf::parse(&bytes) else { return Ok(true) };
    let mut sections = elf.section_headers.iter();
    let section = sections.find(|section| elf.shdr_strtab.get_at(section.sh_name) == Some(".rodata"));
    let Some(data) = section.and_then(|section| bytes.get(section.file_range()?)) else { return Ok(true) };
    let wanted = format!("\0{version}\0").into_bytes();
    Ok(memchr::memmem::find(data, &wanted).is_some())
}

impl NeededLibrary {
    /// Looks for `name` where the system's loader does, and in Python wheels; `folder` is that of ONNX Runtime.
    pub(super) fn locate(name: String, folder: &Path) -> Self {
        // SAFETY: loading runs the library's initialisers; the provider would load the same library a moment later.
        let location = match unsafe { Library::new(&name) } {
            Ok(_) => Location::System,
            Err(error) => match find_in_wheels(&name, folder) {
                Some(path) => Location::Wheel(path),
                None => Location::Missing(crate::runtime::cuda::reason(&error)),
            },
        };
        Self { name, location }
    }

    pub(crate) fn origin(&self) -> Origin {
        origin_of(&self.name).expect("bug: only NVIDIA's libraries are looked for")
    }

    /// The major version that the name asks for, where the library can tell its own.
    pub(super) fn wanted_major(&self) -> Option<u32> {
        version_function(&self.name)?;
        self.name.rsplit('.').next()?.parse().ok()
    }

    /// The library's own word on its version, if it has one.
    pub(crate) fn version(&self) -> Option<Version> {
        let (function, decode) = version_function(&self.name)?;
        let path = match &self.location {
            Location::System => Path::new(&self.name),
            Location::Wheel(path) => path,
            Location::Missing(_) => return None,
        };
        // SAFETY: as when it was located; the functions take nothing and return a number, or write one to an int.
        unsafe {
            let library = Library::new(path).ok()?;
            let number = match function {
                VersionFunction::Returns(symbol) => library.get::<unsafe extern "C" fn() -> usize>(symbol).ok()?(),
                VersionFunction::Writes(symbol) => {
                    let mut number: i32 = 0;
                    let get = library.get::<unsafe extern "C" fn(*mut i32) -> i32>(symbol).ok()?;
                    (get(&raw mut number) == 0).then_some(number as usize)?
                }
            };
            // Some return an int: the upper half of the register is then undefined.
            Some(decode(number as u32))
        }
    }
}

/// What a version's number means.
type Decode = fn(u32) -> Version;

enum VersionFunction {
    Returns(&'static [u8]),
    Writes(&'static [u8]),
}

fn version_function(name: &str) -> Option<(VersionFunction, Decode)> {
    // 9 and later, cudnn_version.h: 90100 is 9.1.0.
    let ten_thousands = |n: u32| Version { major: n / 10_000, minor: n / 100 % 100, patch: n % 100 };
    // cuda_runtime_api.h: 13020 is 13.2.
    let thousands = |n: u32| Version { major: n / 1000, minor: n / 10 % 100, patch: n % 10 };
    let stem = name.split(".so").next()?;
    Some(match stem {
        "libcudart" => (VersionFunction::Writes(b"cudaRuntimeGetVersion"), thousands),
        "libcudnn" => (VersionFunction::Returns(b"cudnnGetVersion"), ten_thousands),
        "libnvinfer" => (VersionFunction::Returns(b"getInferLibVersion"), ten_thousands),
        _ => return None,
    })
}

/// `13.2.0`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) major: u32,
    minor: u32,
    patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// CUDA version that the driver supports, major and minor, if there is a driver.
pub(crate) fn driver_cuda_version() -> Option<(u32, u32)> {
    // SAFETY: the driver's own library; cuda.h declares the function so, and it needs no initialisation.
    unsafe {
        let library = Library::new("libcuda.so.1").ok()?;
        let get = library.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"cuDriverGetVersion").ok()?;
        let mut version = 0;
        (get(&raw mut version) == 0).then_some((version as u32 / 1000, version as u32 / 10 % 100))
    }
}

/// Folders of libraries in Python wheels: `nvidia/*/lib` and `tensorrt_libs` below each root.
fn wheel_folders(folder: &Path) -> Vec<PathBuf> {
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let site_packages = environments.flat_map(|environment| {
        let versions = subfolders(&environment.join("lib"));
        versions.into_iter().map(|version| version.join("site-packages"))
    });
    let roots = std::iter::once(folder.to_owned()).chain(site_packages);
    roots
        .flat_map(|root| {
            let nvidia = subfolders(&root.join("nvidia")).into_iter().map(|package| package.join("lib"));
            nvidia.chain([root.join("tensorrt_libs")]).collect::<Vec<_>>()
        })
        .collect()
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

fn find_in_wheels(name: &str, folder: &Path) -> Option<PathBuf> {
    wheel_folders(folder).into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Loads the libraries that lie in wheels for good. They depend on one another in no order that their names tell: what does
/// not load is tried again after the others, and counts as missing in the end.
pub(super) fn preload(needed: &mut [NeededLibrary]) {
    let mut waiting = usize::MAX;
    loop {
        let mut refused = Vec::new();
        for (index, library) in needed.iter().enumerate() {
            let Location::Wheel(path) = &library.location else { continue };
            // SAFETY: as when libraries are located. Loading one again only counts its users.
            match unsafe { UnixLibrary::open(Some(path.as_path()), RTLD_LAZY | RTLD_GLOBAL) } {
                Ok(library) => std::mem::forget(library),
                Err(error) => refused.push((index, crate::runtime::cuda::reason(&error))),
            }
        }
        if refused.len() == waiting || refused.is_empty() {
            refused.into_iter().for_each(|(index, reason)| needed[index].location = Location::Missing(reason));
            return;
        }
        waiting = refused.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_says_what_it_links_to_and_what_brings_that() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a.c"), "int cudnnGetVersion(void) { return 92801; }").unwrap();
        let compile = |args: &[&str]| {
            let output = std::process::Command::new("cc")
                .args(["-shared", "-fPIC", "-Wl,--no-as-needed", "-L."])
                .args(args)
                .current_dir(folder.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        std::fs::create_dir_all(path("nvidia/cudnn/lib")).unwrap();
        compile(&["a.c", "-Wl,-soname,libcudart.so.99", "-o", "libcudart.so"]);
        compile(&["a.c", "-o", "nvidia/cudnn/lib/libcudnn.so.9"]);
        compile(&["a.c", "-lcudart", "-lm", "-o", "provider.so"]);
        assert_eq!(needed_by(&path("provider.so")).unwrap(), ["libcudart.so.99", CUDNN]);
        std::fs::write(path("v.c"), "const char *version(void) { return \"x\\0001.31.1\"; }").unwrap();
        compile(&["v.c", "-O0", "-o", "versioned.so"]);
        assert!(is_of_version(&path("versioned.so"), "1.31.1").unwrap());
        assert!(!is_of_version(&path("versioned.so"), "1.31").unwrap());
        assert!(needed_by(&path("a.c")).unwrap_err().to_string().contains("a.c"));

        let found = NeededLibrary::locate(CUDNN.to_owned(), folder.path());
        assert!(matches!(found.location, Location::Wheel(_) | Location::System), "{found:?}");
        if matches!(found.location, Location::Wheel(_)) {
            assert_eq!(found.version().unwrap().to_string(), "9.28.1");
        }
        std::fs::write(path("nvidia/cudnn/lib/libcublas.so.99"), "no library").unwrap();
        let mut broken = [NeededLibrary::locate("libcublas.so.99".to_owned(), folder.path())];
        assert!(matches!(broken[0].location, Location::Wheel(_)));
        preload(&mut broken);
        let Location::Missing(reason) = &broken[0].location else { panic!("{broken:?}") };
        assert!(reason.contains("libcublas.so.99"), "{reason}");
        let missing = NeededLibrary::locate("libcudart.so.99".to_owned(), folder.path());
        let Location::Missing(reason) = &missing.location else { panic!("{missing:?}") };
        assert!(reason.contains("libcudart.so.99"), "{reason}");
        assert_eq!((missing.origin(), missing.wanted_major()), (CUDA, Some(99)));
        assert_eq!(origin_of("libnvinfer.so.10"), Some(TENSORRT));
        assert_eq!(origin_of("libcuda.so.1"), Some(DRIVER));
        assert_eq!(origin_of("libm.so.6"), None);
    }
}
