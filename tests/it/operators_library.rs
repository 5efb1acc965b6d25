//! `librecaption_operators.so` in a program of somebody else's: Python's onnxruntime.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use recaption::export::{ExportOptions, Precision, Target, export};
use serde_json::Value;

use crate::support::{demo_bundle, fetched, root};

/// The library as cargo leaves it beside the program.
fn library() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_recaption")).parent().unwrap();
    let candidates = [folder, &folder.join("deps")].map(|folder| folder.join("librecaption_operators.so"));
    let found = candidates.iter().find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("none of {candidates:?} is there")).clone()
}

#[test]
fn another_program_runs_a_cpu_bundle_through_the_operators_library() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    let options = ExportOptions { precision: Precision::Int8, target: Target::Cpu, ..ExportOptions::default() };
    export(&root("models/demo"), &bundle, &options).unwrap();
    let output = Command::new(fetched("venv").join("bin/python"))
        .arg(root("scripts/golden/run_operators_library.py"))
        .args([&library(), &bundle, &demo_bundle()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (same, of) = (found["same"].as_u64().unwrap(), found["of"].as_u64().unwrap());
    // Random ids make flat distributions, where 8 bits may change the first; the distributions stay close.
    assert_eq!(of, 72);
    assert!(same * 10 >= of * 9, "{found}");
    assert!(found["difference"].as_f64().unwrap() < 0.1, "{found}");
}
