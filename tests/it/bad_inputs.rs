//! Bad images are rows, bad models fail: each with its reason, and everything good is still captioned.

use recaption::export::{ExportOptions, export};
use serde_json::Value;

use crate::support::{
    bundle, copy_folder, demo_bundle, parquet_rows, printed_rows, read_json, recaption, root, stderr,
};

#[test]
fn every_bad_image_is_a_failed_row_and_every_good_one_is_captioned() {
    let folder = root("tests/data/images/edge");
    let expected = read_json(&folder.join("expected.json"));
    let is_bad = |key: &str| {
        expected.as_array().unwrap().iter().find(|case| case["file"] == key).unwrap().get("error").is_some()
    };
    let out = tempfile::tempdir().unwrap();
    let bundle = demo_bundle();
    let args = ["run", folder.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--max-new-tokens", "4"];
    let output =
        recaption(&[&args[..], &["--out", out.path().to_str().unwrap(), "--quiet", "--provider", "cpu"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));

    let rows = parquet_rows(out.path());
    let keys: Vec<&str> = rows.iter().map(|row| row["key"].as_str().unwrap()).collect();
    let mut files: Vec<&str> = expected.as_array().unwrap().iter().map(|case| case["file"].as_str().unwrap()).collect();
    files.sort_unstable();
    assert_eq!(keys, files, "one row for each file, in order");
    for row in &rows {
        let key = row["key"].as_str().unwrap();
        if is_bad(key) {
            assert_eq!((&row["status"], &row["re_caption"]), (&"failed".into(), &Value::Null), "{key}");
            assert!(row["error"].as_str().unwrap().starts_with("load: "), "{key}: {}", row["error"]);
        } else {
            assert_eq!((&row["status"], &row["error"]), (&"ok".into(), &Value::Null), "{key}");
            assert!(row["width"].as_i64().unwrap() > 0, "{key}");
        }
        assert_eq!(row["image_sha256"].as_str().unwrap().len(), 64, "{key}");
    }
    let summary = read_json(&out.path().join("summary.json"));
    let num_bad = files.iter().filter(|file| is_bad(file)).count();
    assert_eq!(summary["rows"], files.len());
    assert_eq!(summary["failed"], num_bad);
}

#[test]
fn a_file_over_the_size_limit_is_a_failed_row() {
    let bundle = demo_bundle();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(root("tests/data/images/42/a.png"), folder.path().join("small.png")).unwrap();
    std::fs::write(folder.path().join("large.png"), vec![0; 100_000]).unwrap();
    let args = ["run", folder.path().to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"];
    let output = recaption(&[&args[..], &["--max-image-bytes", "50000", "--max-new-tokens", "2"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let rows = printed_rows(&output);
    assert_eq!(rows[0]["error"], "source: 100000 bytes is over the limit of 50000 (--max-image-bytes)");
    assert_eq!(rows[1]["status"], "ok");
}

/// A checkpoint whose final norm overflows: all of its weights are finite, none of its logits.
#[test]
fn logits_that_are_not_finite_fail_the_row() {
    let source = root("tests/data/checkpoints/minimal-config-f32");
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    copy_folder(&source, &checkpoint);
    let weights = checkpoint.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = metadata.tensors();
    let (_, norm) = tensors.iter().find(|(name, _)| name.ends_with("model.norm.weight")).unwrap();
    let start = 8 + header;
    let range = start + norm.data_offsets.0..start + norm.data_offsets.1;
    bytes[range].as_chunks_mut::<4>().0.iter_mut().for_each(|value| *value = f32::MAX.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();

    let bundle = folder.path().join("bundle");
    export(&checkpoint, &bundle, &ExportOptions::default()).unwrap();
    let image = root("tests/data/images/28/a.png");
    let output = recaption(&["run", image.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let rows = printed_rows(&output);
    assert_eq!(rows[0]["status"], "failed");
    assert_eq!(rows[0]["error"], "prefill: the logits of token 1 are NaN or infinite");
    assert_eq!(rows[0]["re_caption"], Value::Null);
}

#[test]
fn what_the_exporter_cannot_build_is_refused_before_anything_is_written() {
    let source = root("tests/data/checkpoints/saved-v5-bf16");
    let config = read_json(&source.join("config.json"));
    let cases: [(&[&str], Value, &str); 7] = [
        (&["model_type"], "llava_next".into(), "model_type is not supported: `llava_next`"),
        (&["text_config", "model_type"], "qwen2".into(), "`qwen2`"),
        (&["text_config", "rope_parameters", "rope_type"], "yarn".into(), "`yarn`"),
        (&["vision_config", "model_type"], "siglip_vision_model".into(), "`siglip_vision_model`"),
        (&["projector_hidden_act"], "mish".into(), "`mish`"),
        (&["text_config", "hidden_size"], 60.into(), "shape"),
        (&["vision_feature_layer"], 99.into(), "99"),
    ];
    for (path, value, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("checkpoint");
        copy_folder(&source, &checkpoint);
        let mut config = config.clone();
        *path.iter().fold(&mut config, |node, name| &mut node[*name]) = value;
        std::fs::write(checkpoint.join("config.json"), config.to_string()).unwrap();
        let out = folder.path().join("bundle");
        let output = recaption(&["export", checkpoint.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{path:?}: {message}");
        assert!(message.starts_with("error: ") && message.contains(expected), "{path:?}: {message}");
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["checkpoint"], "{path:?}");
    }
}

#[test]
fn a_damaged_checkpoint_is_refused_by_the_name_of_the_tensor_or_file() {
    let source = root("tests/data/checkpoints/minimal-config-f32");
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let checkpoint = folder.path().join(name);
        copy_folder(&source, &checkpoint);
        checkpoint
    };
    let refusal = |checkpoint: &std::path::Path| {
        let out = folder.path().join("bundle");
        let error = export(checkpoint, &out, &ExportOptions::default()).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    let weights = std::fs::read(source.join("model.safetensors")).unwrap();

    let cut = copy("cut");
    std::fs::write(cut.join("model.safetensors"), &weights[..weights.len() - 100]).unwrap();
    assert!(refusal(&cut).contains("model.safetensors` is not a whole safetensors file"));

    let nan = copy("nan");
    let mut damaged = weights.clone();
    let end = damaged.len();
    damaged[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(nan.join("model.safetensors"), damaged).unwrap();
    assert!(refusal(&nan).contains("holds 1 NaN or infinite value(s)"));

    let renamed = copy("renamed");
    let text = String::from_utf8_lossy(&weights[8..8 + 40_000.min(weights.len() - 8)]).into_owned();
    let at = text.find("mlp.up_proj.weight").unwrap() + 8;
    let mut damaged = weights.clone();
    damaged[at..at + 7].copy_from_slice(b"mlp.xx_");
    std::fs::write(renamed.join("model.safetensors"), damaged).unwrap();
    let message = refusal(&renamed);
    assert!(message.contains("has no tensor") && message.contains("mlp.up_proj.weight"), "{message}");

    let without_tokenizer = copy("without-tokenizer");
    std::fs::remove_file(without_tokenizer.join("tokenizer.json")).unwrap();
    assert!(refusal(&without_tokenizer).contains("has no tokenizer.json"));
    let options = ExportOptions { tokenizer: Some(source.join("tokenizer.json")), ..ExportOptions::default() };
    export(&without_tokenizer, &folder.path().join("given"), &options).unwrap();
}

#[test]
fn tensors_of_another_architecture_are_refused_even_inside_a_computed_layer() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    copy_folder(&root("tests/data/checkpoints/saved-v5-bf16"), &checkpoint);
    let weights = checkpoint.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(String, safetensors::tensor::TensorView<'_>)> = tensors.tensors();
    let (name, view) = all.iter().find(|(name, _)| name.contains("layers.0.self_attn.q_proj.weight")).unwrap();
    let extra = (name.replace("q_proj.weight", "q_proj.lora_A.weight"), view.clone());
    all.push(extra);
    std::fs::write(&weights, safetensors::serialize(all, None).unwrap()).unwrap();
    let error = export(&checkpoint, &folder.path().join("bundle"), &ExportOptions::default()).unwrap_err();
    assert!(error.to_string().contains("lora_A"), "{error}");
}

#[test]
fn a_bundle_with_a_file_cut_off_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("bundle");
    copy_folder(&bundle("tests/data/checkpoints/published-f16"), &copy);
    let data = copy.join("decoder.onnx.data");
    let length = std::fs::metadata(&data).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&data).unwrap().set_len(length - 1).unwrap();
    let image = root("tests/data/images/28/a.png");
    let output = recaption(&["run", image.to_str().unwrap(), "--model", copy.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    let message = stderr(&output);
    assert!(
        message.contains("decoder.onnx.data") && message.contains("hint: export the checkpoint again"),
        "{message}"
    );
}
