//! The demo model, end to end: the committed shard in, its rows out with the contract's columns, and captions that
//! name what is in the pictures.

use std::collections::HashMap;

use parquet::basic::{LogicalType, Repetition, Type};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use crate::support::{demo_bundle, demo_shard, parquet_rows, read_json, recaption, root, stderr};

fn run_shard() -> tempfile::TempDir {
    let (bundle, shard, out) = (demo_bundle(), demo_shard(), tempfile::tempdir().unwrap());
    let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--provider", "cpu"];
    let output = recaption(&[&args[..], &["--out", out.path().to_str().unwrap(), "--with-token-ids"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("captioned 64/64 (0 failed)"), "{}", stderr(&output));
    out
}

#[test]
fn captions_name_what_is_in_the_pictures() {
    let out = run_shard();
    let rows = parquet_rows(out.path());
    let truth = std::fs::read_to_string(root("models/demo/shard/truth.jsonl")).unwrap();
    let truth: HashMap<String, Vec<String>> = truth
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let kinds = line["kinds"].as_array().unwrap().iter().map(|kind| kind.as_str().unwrap().to_owned());
            (line["key"].as_str().unwrap().to_owned(), kinds.collect())
        })
        .collect();
    assert_eq!((rows.len(), truth.len()), (64, 64));
    let (mut named, mut total) = (0, 0);
    for row in &rows {
        let caption = row["re_caption"].as_str().unwrap();
        for kind in &truth[row["key"].as_str().unwrap()] {
            total += 1;
            named += usize::from(caption.contains(kind.as_str()));
        }
        assert_eq!(row["finish_reason"], "stop", "{caption}");
    }
    let recall = f64::from(named as u32) / f64::from(total as u32);
    println!("recall {recall:.3} over {total} objects");
    assert!(recall >= 0.95, "recall {recall:.3}");
}

#[test]
fn rows_carry_the_input_untouched_and_the_counts_add_up() {
    let out = run_shard();
    let rows = parquet_rows(out.path());
    let mut archive = tar::Archive::new(std::fs::File::open(demo_shard()).unwrap());
    let mut members = HashMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        members.insert(name, bytes);
    }
    for row in &rows {
        let key = row["key"].as_str().unwrap();
        let sidecar: Value = serde_json::from_slice(&members[&format!("{key}.json")]).unwrap();
        assert_eq!(row["org_caption"].as_str().unwrap().as_bytes(), members[&format!("{key}.txt")]);
        assert_eq!((&row["url"], &row["sha256"]), (&sidecar["url"], &sidecar["sha256"]));
        // The demo shard's images are as they were hashed.
        assert_eq!(row["image_sha256"], sidecar["sha256"]);
        assert_eq!((&row["width"], &row["height"]), (&sidecar["width"], &sidecar["height"]));
        let words = |text: &Value| text.as_str().unwrap().split_whitespace().count();
        assert_eq!(row["org_length"], words(&row["org_caption"]));
        assert_eq!(row["re_length"], words(&row["re_caption"]));
        assert_eq!(row["num_tokens"], row["token_ids"].as_array().unwrap().len());
        let metadata: Value = serde_json::from_str(row["metadata"].as_str().unwrap()).unwrap();
        assert_eq!(metadata["original_width"], sidecar["original_width"]);
    }
    let summary = read_json(&out.path().join("summary.json"));
    assert_eq!((&summary["rows"], &summary["ok"], &summary["failed"]), (&64.into(), &64.into(), &0.into()));
    let new_tokens: i64 = rows.iter().map(|row| row["num_tokens"].as_i64().unwrap()).sum();
    assert_eq!(summary["new_tokens"], new_tokens);
    assert!(summary["prompt_tokens"].as_u64().unwrap() > 64 * 64);
}

#[test]
fn columns_have_the_names_and_types_of_the_contract() {
    let out = run_shard();
    let file = std::fs::File::open(out.path().join("captions-00000.parquet")).unwrap();
    let reader = SerializedFileReader::new(file).unwrap();
    let schema = reader.metadata().file_metadata().schema_descr();
    let columns: Vec<(String, Type, bool, bool)> = schema
        .columns()
        .iter()
        .map(|column| {
            let is_text = column.logical_type_ref() == Some(&LogicalType::String);
            let is_required = column.self_type().get_basic_info().repetition() == Repetition::REQUIRED;
            (column.path().string(), column.physical_type(), is_text, is_required)
        })
        .collect();
    let text = |name: &str, is_required| (name.to_owned(), Type::BYTE_ARRAY, true, is_required);
    let number = |name: &str, kind| (name.to_owned(), kind, false, false);
    let expected = [
        text("key", true),
        text("url", false),
        text("org_caption", false),
        text("sha256", false),
        text("uid", false),
        text("re_caption", false),
        number("org_length", Type::INT64),
        number("re_length", Type::INT64),
        number("org_clip_score", Type::DOUBLE),
        number("re_clip_score", Type::DOUBLE),
        number("org_gpt4v_score", Type::INT64),
        number("re_gpt4v_score", Type::INT64),
        text("status", true),
        text("error", false),
        text("finish_reason", false),
        number("num_tokens", Type::INT64),
        number("width", Type::INT32),
        number("height", Type::INT32),
        text("image_sha256", false),
        text("source", true),
        text("metadata", false),
        number("token_ids.list.item", Type::INT64),
    ];
    assert_eq!(columns, expected);
}
