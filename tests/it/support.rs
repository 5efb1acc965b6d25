//! What the tests share: the binary, exported bundles, comparisons.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex};

use recaption::export::{ExportOptions, export};
use serde_json::Value;
use tempfile::TempDir;

/// Largest difference of logits between transformers' fp32 and ours.
pub(crate) const FP32_LOGITS: f32 = 1e-4;

/// A path below the checkout.
pub(crate) fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The `recaption` binary.
pub(crate) fn recaption(args: &[&str]) -> Output {
    recaption_with(args, &[])
}

/// The `recaption` binary, with environment variables.
pub(crate) fn recaption_with(args: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_recaption")).args(args).envs(environment.iter().copied()).output().unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Rows that a run printed.
pub(crate) fn printed_rows(output: &Output) -> Vec<Value> {
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The bundle of a committed checkpoint, exported once per test process.
pub(crate) fn bundle(checkpoint: &str) -> PathBuf {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
    static BUNDLES: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);
    let mut bundles = BUNDLES.lock().unwrap();
    bundles
        .entry(checkpoint.to_owned())
        .or_insert_with_key(|checkpoint| {
            let target = FOLDER.path().join(checkpoint.replace('/', "-"));
            let folder = root(checkpoint);
            export(&folder, &target, &export_options(&folder)).unwrap();
            target
        })
        .clone()
}

/// What `export.json` in a committed checkpoint says that it is exported with; paths are relative to its folder.
pub(crate) fn export_options(checkpoint: &Path) -> ExportOptions {
    let path = checkpoint.join("export.json");
    let json = if path.is_file() { read_json(&path) } else { Value::Null };
    let path = |name: &str| json[name].as_str().map(|path| checkpoint.join(path));
    ExportOptions {
        vision_tower: path("vision_tower"),
        lora: path("lora"),
        tokenizer: path("tokenizer"),
        ..ExportOptions::default()
    }
}

pub(crate) fn demo_bundle() -> PathBuf {
    bundle("models/demo")
}

pub(crate) fn demo_shard() -> PathBuf {
    root("models/demo/shard/00000.tar")
}

/// Names of the committed checkpoints that transformers has given goldens for.
pub(crate) fn checkpoints() -> Vec<String> {
    let entries = std::fs::read_dir(root("tests/data/checkpoints")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).unwrap()
}

/// Changes a JSON file.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = read_json(path);
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// What `scripts/fetch_test_data.sh` fetches.
pub(crate) fn fetched(path: &str) -> PathBuf {
    let path = root("tests/data/fetched").join(path);
    assert!(path.exists(), "{} is not there: run scripts/fetch_test_data.sh", path.display());
    path
}

pub(crate) fn floats(values: &Value) -> Vec<f32> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
}

pub(crate) fn integers(values: &Value) -> Vec<i64> {
    values.as_array().unwrap().iter().map(|value| value.as_i64().unwrap()).collect()
}

/// Fails unless all values are within `tolerance`; returns the largest difference.
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let largest = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // A NaN compares with nothing: count it as different.
    assert!(found.iter().all(|value| value.is_finite()), "{what}: not finite");
    assert!(largest <= tolerance, "{what}: differs by {largest}, tolerance {tolerance}");
    largest
}

/// Copies a folder, for a test to damage.
pub(crate) fn copy_folder(source: &Path, target: &Path) {
    std::fs::create_dir(target).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let copy = target.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &copy);
        } else {
            std::fs::copy(&path, copy).unwrap();
        }
    }
}

/// Columns of all `captions-*.parquet` of a run, as JSON rows in order.
pub(crate) fn parquet_rows(folder: &Path) -> Vec<Value> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "parquet"));
    paths.sort();
    let mut rows = Vec::new();
    for path in paths {
        let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
        rows.extend(reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_json_value()));
    }
    rows
}

/// Rows of all `captions-*.jsonl` of a run, in order.
pub(crate) fn jsonl_rows(folder: &Path) -> Vec<Value> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    paths.sort();
    let texts = paths.iter().map(|path| std::fs::read_to_string(path).unwrap());
    texts.flat_map(|text| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>()).collect()
}

/// Images of the demo shard and their texts.
pub(crate) fn demo_samples() -> &'static [(Vec<u8>, Vec<u8>)] {
    static SAMPLES: LazyLock<Vec<(Vec<u8>, Vec<u8>)>> = LazyLock::new(|| {
        let mut archive = tar::Archive::new(std::fs::File::open(demo_shard()).unwrap());
        let mut members = std::collections::BTreeMap::<String, (Vec<u8>, Vec<u8>)>::new();
        for member in archive.entries().unwrap() {
            let mut member = member.unwrap();
            let name = member.path().unwrap().to_string_lossy().into_owned();
            let (key, extension) = name.split_once('.').unwrap();
            let sample = members.entry(key.to_owned()).or_default();
            let target = match extension {
                "txt" => &mut sample.1,
                "json" => continue,
                _ => &mut sample.0,
            };
            std::io::Read::read_to_end(&mut member, target).unwrap();
        }
        members.into_values().collect()
    });
    &SAMPLES
}

/// Writes a tar of `(name, contents)`.
pub(crate) fn write_tar(path: &Path, members: &[(String, Vec<u8>)]) {
    let mut builder = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, contents) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &contents[..]).unwrap();
    }
    builder.finish().unwrap();
}
