//! `recaption doctor`, and the providers that do not work on a machine without a GPU: named, with what to do, never a crash.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use crate::support::{demo_bundle, demo_shard, recaption_with, stderr};

/// ONNX Runtime with its CUDA and TensorRT providers, which `scripts/fetch_test_data.sh` fetches where there is a wheel.
fn gpu_library() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".onnxruntime-gpu");
    let library = folder.join("libonnxruntime.so.1.31.1");
    let has_wheel = cfg!(all(target_os = "linux", target_arch = "x86_64"));
    assert!(library.is_file() || !has_wheel, "`{}` is not there: run scripts/fetch_test_data.sh", library.display());
    library.is_file().then_some(library)
}

fn with_gpu_library(args: &[&str]) -> Option<Output> {
    let library = gpu_library()?;
    Some(recaption_with(args, &[("ORT_DYLIB_PATH", library.to_str().unwrap())]))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", stderr(output)))
}

fn provider<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["providers"].as_array().unwrap().iter().find(|provider| provider["name"] == name).unwrap()
}

#[test]
fn doctor_multiplies_on_the_cpu_and_says_what_the_machine_is() {
    let output = recaption_with(&["doctor", "--json"], &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["can_caption"], true);
    assert!(report["onnxruntime"]["version"].as_str().unwrap().starts_with("1."));
    assert!(report["onnxruntime"]["providers"].as_array().unwrap().iter().any(|name| name == "CPU"));
    let cpu = provider(&report, "cpu");
    assert_eq!(cpu["works"], true);
    assert!(cpu["matmul_flops_per_second"].as_f64().unwrap() > 1e8);
    assert!(report["processor"]["cores"].as_u64().unwrap() >= 1);
    let table = recaption_with(&["doctor"], &[]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("ok  provider cpu") && text.ends_with("images can be captioned on this machine\n"), "{text}");
}

#[test]
fn without_a_library_nothing_works_and_the_exit_code_says_so() {
    let output = recaption_with(&["doctor", "--json"], &[("ORT_DYLIB_PATH", "nowhere.so")]);
    assert_eq!(output.status.code(), Some(2));
    let report = json(&output);
    assert_eq!(report["can_caption"], false);
    assert!(report["onnxruntime"]["hint"].as_str().unwrap().contains("fetch_onnxruntime.sh"));
}

#[test]
fn doctor_says_which_provider_runs_a_bundle() {
    let bundle = demo_bundle();
    let output = recaption_with(&["doctor", "--json", "--model", bundle.to_str().unwrap()], &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["bundle"]["providers"]["cpu"], "runs");
    assert!(report["bundle"]["auto"].as_str().unwrap().starts_with("provider: "));
    let no_bundle = recaption_with(&["doctor", "--model", "models/demo"], &[]);
    assert_eq!(no_bundle.status.code(), Some(2));
    assert!(stderr(&no_bundle).contains("models/demo"));
}

#[test]
fn doctor_names_each_library_that_the_gpu_providers_lack() {
    let Some(output) = with_gpu_library(&["doctor", "--json"]) else { return };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    let names = report["onnxruntime"]["providers"].as_array().unwrap();
    assert!(names.iter().any(|name| name == "CUDA") && names.iter().any(|name| name == "Tensorrt"));
    let libraries = report["libraries"].as_array().unwrap();
    for (name, what) in [
        ("libcuda.so.1", "NVIDIA driver"),
        ("libcublas.so.13", "CUDA"),
        ("libcudart.so.13", "CUDA"),
        ("libcudnn.so.9", "cuDNN"),
        ("libnvinfer.so.10", "TensorRT"),
    ] {
        let library = libraries.iter().find(|library| library["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(library["what"], what);
        assert_eq!(library["found"] == false, library["fix"].is_string(), "{library}");
    }
}

#[test]
fn a_provider_that_is_asked_for_and_not_there_is_an_error_with_the_way_out() {
    let Some(library) = gpu_library() else { return };
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let run = |provider: &str, library: Option<&Path>| {
        let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--limit", "1"];
        let args = [&args[..], &["--provider", provider]].concat();
        match library {
            Some(library) => recaption_with(&args, &[("ORT_DYLIB_PATH", library.to_str().unwrap())]),
            None => recaption_with(&args, &[]),
        }
    };
    if Path::new("/dev/nvidia0").exists() {
        return;
    }
    for (provider, missing) in [("cuda", "libcuda.so.1 (NVIDIA driver)"), ("tensorrt", "libnvinfer.so.10 (TensorRT)")] {
        let refused = run(provider, Some(&library));
        let message = stderr(&refused);
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(message.contains(&format!("provider `{provider}` does not work here: missing ")), "{message}");
        assert!(message.contains(missing) && message.contains("hint: "), "{message}");
        let without = run(provider, None);
        assert_eq!(without.status.code(), Some(2));
        assert!(stderr(&without).contains("fetch_onnxruntime.sh --gpu"), "{}", stderr(&without));
    }
    let auto = run("auto", Some(&library));
    let message = stderr(&auto);
    assert_eq!(auto.status.code(), Some(0), "{message}");
    assert!(message.contains("provider: cpu ("), "{message}");
}

#[test]
fn providers_of_another_build_are_refused_before_they_load() {
    let Some(library) = gpu_library() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mixed = path("libonnxruntime.so.1.31.1");
    std::fs::copy(&library, &mixed).unwrap();
    // A library that does not name this version in its read-only data.
    let other = library.with_file_name("libonnxruntime_providers_tensorrt.so");
    std::fs::copy(other, path("libonnxruntime_providers_cuda.so")).unwrap();
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--provider", "cuda"];
    let output = recaption_with(&args, &[("ORT_DYLIB_PATH", mixed.to_str().unwrap())]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("is not of ONNX Runtime 1.31.1"), "{}", stderr(&output));
}
