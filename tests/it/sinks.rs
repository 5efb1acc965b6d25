//! What a run writes, read by the libraries that people read it with: pyarrow, Hugging Face `datasets`, `webdataset`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::resume::run;
use crate::support::{demo_samples, demo_shard, fetched, parquet_rows, root, stderr, write_tar};

fn check_outputs(format: &str, out: &Path, inputs: &[&Path]) -> Value {
    let output = Command::new(fetched("venv/bin/python"))
        .arg(root("scripts/golden/check_outputs.py"))
        .arg(format)
        .arg(out)
        .args(inputs)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn parquet_loads_with_pyarrow_and_in_datasets_beside_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = run(&[&demo_shard()], &out, &["--limit", "8", "--with-token-ids"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found = check_outputs("parquet", &out, &[]);
    let rows = parquet_rows(&out);
    let column = |name: &str| rows.iter().map(|row| row[name].clone()).collect::<Value>();
    assert_eq!((&found["keys"], &found["captions"]), (&column("key"), &column("re_caption")));
}

/// A tar with what img2dataset writes: sidecars with fields of our columns' names, one image cut off.
fn input(folder: &Path) -> PathBuf {
    let path = folder.join("00007.tar");
    let samples = demo_samples();
    let mut members = Vec::new();
    for (index, (image, text)) in samples.iter().take(5).enumerate() {
        let key = format!("{index:09}");
        let length = if index == 2 { 30 } else { image.len() };
        let sidecar =
            json!({"key": key, "status": "success", "url": "https://example.org/a", "width": 1, "exif": "{}"});
        members.push((format!("{key}.jpg"), image[..length].to_vec()));
        members.push((format!("{key}.txt"), text.clone()));
        members.push((format!("{key}.json"), sidecar.to_string().into_bytes()));
    }
    write_tar(&path, &members);
    path
}

#[test]
fn webdataset_tars_hold_the_images_as_they_were_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let (tar, out) = (input(folder.path()), folder.path().join("out"));
    let output = run(&[&tar], &out, &["--format", "webdataset"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let found = check_outputs("webdataset", &out, &[&tar]);
    let samples = found["samples"].as_array().unwrap();
    let keys: Vec<&str> = samples.iter().map(|sample| sample["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["000000000", "000000001", "000000002", "000000003", "000000004"]);
    let failed = &samples[2];
    assert_eq!(failed["status"], "failed");
    assert!(failed["error"].as_str().unwrap().starts_with("load: "), "{failed}");
    assert_eq!(failed["re_caption"], Value::Null);
    let good = &samples[0];
    assert_eq!((&good["exif"], &good["url"]), (&"{}".into(), &"https://example.org/a".into()));
    assert_eq!(good["sidecar"], json!({"status": "success", "width": 1}), "what has a column's name is kept apart");

    // What we wrote is an input as well: its captions become the original ones.
    let again = folder.path().join("again");
    let output = run(&[&out.join("captions-00007.tar")], &again, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let rows = parquet_rows(&again);
    assert_eq!(rows.len(), 4, "a failed row is no image");
    assert_eq!(rows[0]["key"], "000000000");
}

#[test]
fn keys_of_files_become_keys_of_members() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir_all(images.join("v1.0")).unwrap();
    for name in ["a.jpg", "a.b.jpg", "a_b.jpg", "v1.0/c.jpg", "d.e.JPEG"] {
        std::fs::write(images.join(name), &demo_samples()[0].0).unwrap();
    }
    let out = folder.path().join("out");
    let output = run(&[&images], &out, &["--format", "webdataset"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found = check_outputs("webdataset", &out, &[]);
    let members: Vec<(&str, &str)> = found["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|sample| (sample["key"].as_str().unwrap(), sample["member"].as_str().unwrap()))
        .collect();
    let expected =
        [("a.b.jpg", "a_b"), ("a.jpg", "a"), ("a_b.jpg", "a_b_2"), ("d.e.JPEG", "d_e"), ("v1.0/c.jpg", "v1.0/c")];
    assert_eq!(members, expected);
}
