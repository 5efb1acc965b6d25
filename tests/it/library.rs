//! Finding the ONNX Runtime library: what is missing, too old or something else is told, with the way out.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::{demo_bundle, root, stderr};

fn run_with_library(library: &Path) -> Output {
    let (bundle, image) = (demo_bundle(), root("tests/data/images/28/a.png"));
    Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", image.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"])
        .env("ORT_DYLIB_PATH", library)
        .output()
        .unwrap()
}

/// A shared library made of `source`, by the compiler that made this test.
fn shared_library(folder: &Path, source: &str) -> std::path::PathBuf {
    let (source_path, library) = (folder.join("fake.rs"), folder.join("libfake.so"));
    std::fs::write(&source_path, source).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let compiled = Command::new(rustc)
        .args(["--edition", "2024", "--crate-type", "cdylib", "-o"])
        .args([&library, &source_path])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    library
}

fn assert_refused(output: &Output, expected: &str) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(expected), "{message}");
    assert!(message.contains("hint: run scripts/fetch_onnxruntime.sh"), "{message}");
}

#[test]
fn a_missing_library_is_named() {
    let output = run_with_library(Path::new("nowhere/libonnxruntime.so"));
    assert_refused(&output, "ORT_DYLIB_PATH names `nowhere/libonnxruntime.so`, which is not a file");
}

#[test]
fn a_file_that_is_no_library_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libonnxruntime.so");
    std::fs::write(&path, "not a library").unwrap();
    assert_refused(&run_with_library(&path), "does not load");
}

#[test]
fn another_library_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = shared_library(folder.path(), "#[unsafe(no_mangle)] pub extern \"C\" fn other() {}");
    assert_refused(&run_with_library(&path), "is not ONNX Runtime: it has no OrtGetApiBase");
}

#[test]
fn a_library_that_is_too_old_is_refused_before_it_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let source = r#"
        #[repr(C)] pub struct Base { get_api: extern "C" fn(u32) -> usize, get_version: extern "C" fn() -> *const u8 }
        extern "C" fn get_api(_: u32) -> usize { std::process::abort() }
        extern "C" fn get_version() -> *const u8 { c"1.22.1".as_ptr().cast() }
        static BASE: Base = Base { get_api, get_version };
        #[unsafe(no_mangle)] pub extern "C" fn OrtGetApiBase() -> *const Base { &BASE }
    "#;
    let path = shared_library(folder.path(), source);
    assert_refused(&run_with_library(&path), "expected version 1.24 or later, got 1.22.1");
}
