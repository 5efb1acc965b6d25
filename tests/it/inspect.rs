//! `recaption inspect`: its numbers against the manifest and the demo's known dimensions, and what it refuses.

use std::path::{Path, PathBuf};

use recaption::export::proto::{Message, ModelProto, NodeProto};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{copy_folder, demo_bundle, read_json, recaption, stderr};

/// A copy of the demo bundle to damage.
fn copy() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    copy_folder(&demo_bundle(), &bundle);
    (folder, bundle)
}

/// Edits the manifest's JSON.
fn edit_manifest(bundle: &Path, edit: impl FnOnce(&mut Value)) {
    let path = bundle.join("manifest.json");
    let mut manifest = read_json(&path);
    edit(&mut manifest);
    std::fs::write(path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
}

/// Writes a file of the bundle and its size to the manifest, so that the size does not give it away.
fn replace(bundle: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(bundle.join(name), bytes).unwrap();
    edit_manifest(bundle, |manifest| {
        let files = manifest["files"].as_array_mut().unwrap();
        files.iter_mut().find(|file| file["path"] == name).unwrap()["size"] = bytes.len().into();
    });
}

/// Standard error of an inspection that must end with 2.
fn refusal(bundle: &Path, flags: &[&str]) -> String {
    let output = recaption(&[&["inspect", bundle.to_str().unwrap()], flags].concat());
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty());
    assert!(message.starts_with("error: ") && message.contains("\nhint: "), "{message}");
    message
}

#[test]
fn json_has_the_manifests_and_the_demos_numbers() {
    let bundle = demo_bundle();
    let output = recaption(&["inspect", bundle.to_str().unwrap(), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let manifest = read_json(&bundle.join("manifest.json"));

    let same =
        ["kind", "format_version", "producer", "source", "precision", "vision_precision", "activations", "target"];
    for field in same.into_iter().chain(["reduce_range", "fingerprint", "vision", "decoder", "files"]) {
        assert!(!report[field].is_null(), "{field}");
        assert_eq!(report[field], manifest[field], "{field}");
    }
    assert_eq!(report["is_verified"], false);
    let (mut num_parameters, mut names) = (0, Vec::new());
    for graph in report["graphs"].as_array().unwrap() {
        let name = graph["name"].as_str().unwrap();
        let expected = &manifest["graphs"][name];
        for field in ["file", "inputs", "outputs", "profile", "num_parameters"] {
            assert_eq!(graph[field], expected[field], "{name} {field}");
        }
        let file = graph["file"].as_str().unwrap();
        let size = |file: &str| std::fs::metadata(bundle.join(file)).unwrap().len();
        assert_eq!(graph["onnx_bytes"], size(file));
        assert_eq!(graph["data_bytes"], size(&format!("{file}.data")));
        let sum = |field: &str| graph[field].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>();
        assert_eq!(graph["num_nodes"], sum("ops"));
        let parameters = graph["num_parameters"].as_u64().unwrap();
        assert!(sum("weight_bytes") >= 4 * parameters && sum("weight_bytes") < 5 * parameters, "{name}");
        num_parameters += parameters;
        names.push(name);
    }
    assert_eq!(names, ["vision_tower", "projector", "decoder"]);
    assert_eq!(report["num_parameters"], num_parameters);
    let decoder = &report["graphs"][2];
    assert_eq!(decoder["ops"]["com.microsoft.GroupQueryAttention"], 4);
    assert_eq!(decoder["opsets"], json!({"ai.onnx": 23, "com.microsoft": 1}));

    // Four layers of two heads of 32 floats, keys and values; 64 image tokens, 60 of prompt, 128 new.
    let cache = json!({
        "dtype": "f32", "num_kv_heads": 2, "head_dim": 32, "num_copies": 1, "bytes_per_token": 2 * 4 * 2 * 32 * 4,
        "caption_tokens": 252, "new_tokens": 128, "bytes_per_caption": 252 * 2048,
    });
    assert_eq!(report["kv_cache"], cache);
    // 64 patches, 65 tokens, width 192, MLP 768, 5 layers.
    let vision: u64 = 2 * 64 * 588 * 192 + 5 * (8 * 65 * 192 * 192 + 4 * 65 * 65 * 192 + 4 * 65 * 192 * 768);
    let flops = &report["flops_per_image"];
    assert_eq!(flops["vision"], vision);
    assert_eq!(flops["projector"], 2 * 64 * 192 * 192 * 2);
    let stages = ["vision", "projector", "prefill", "decode"].map(|stage| flops[stage].as_u64().unwrap());
    assert_eq!(flops["total"], stages.iter().sum::<u64>());
    assert_eq!((&flops["prompt_tokens"], &flops["new_tokens"]), (&60.into(), &64.into()));
}

#[test]
fn the_table_shows_every_graph_and_the_lengths_asked_for() {
    let bundle = demo_bundle();
    let flags = ["--verify", "--prompt-tokens", "36", "--new-tokens", "1"];
    let output = recaption(&[&["inspect", bundle.to_str().unwrap()], &flags[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for expected in [
        "kind         llava, format ",
        "\nvision       112 x 112 pixels, patches of 14, width 192, MLP 768, 5 layers, features of state 5, 64 image tokens\n",
        "\nvision_tower.onnx      2.35 M  ",
        "\n  inputs   pixel_values     f32  [batch, 3, 112, 112]\n",
        "\n           past_key_values.{0..3}.key|value  f32  [batch, 2, max_length, 32]\n",
        "\n  a token    2.05 kB  2 key/value heads of 32, f32, updated in place\n",
        "\n  a caption   467 kB  64 image + 36 prompt + 128 new tokens\n",
        "\n  decode         0 FLOP    0.0 %  1 new tokens, the first of them from prefill\n",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    assert!(text.ends_with("\nall 7 files match\n"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() < 120 && line.trim_end() == line), "{text}");
}

#[test]
fn what_keeps_a_gpu_from_running_a_bundle_is_told() {
    use recaption::export::{ExportOptions, Precision, Target, export};
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = crate::support::root("tests/data/checkpoints/published-f16");
    let gpu = |bundle: &Path| {
        let output = recaption(&["inspect", bundle.to_str().unwrap(), "--json"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["gpu"].clone()
    };
    let exported = |precision, target| {
        let bundle = folder.path().join(format!("{precision:?}-{target:?}"));
        export(&checkpoint, &bundle, &ExportOptions { precision, target, ..ExportOptions::default() }).unwrap();
        bundle
    };
    let fp32 = gpu(&demo_bundle());
    assert!(fp32["exception"].as_str().unwrap().contains("f16 and bf16 only"), "{fp32}");
    assert_eq!(fp32["findings"], json!([]));
    let fp16 = exported(Precision::Fp16, Target::Ort);
    assert_eq!((&gpu(&fp16)["exception"], &gpu(&fp16)["findings"]), (&Value::Null, &json!([])));
    let tensorrt = gpu(&exported(Precision::Fp16, Target::TensorRt));
    assert!(tensorrt["provider"].as_str().unwrap().starts_with("TensorRT"), "{tensorrt}");
    assert_eq!(tensorrt["findings"], json!([]));
    assert!(gpu(&exported(Precision::Int8, Target::Ort)).is_null());
}

#[test]
fn padded_heads_and_second_copies_count_as_memory() {
    use recaption::export::{ExportOptions, Precision, Target, export};
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = crate::support::root("tests/data/checkpoints/head24-llama3-rope-bf16");
    let bytes_per_token = |name: &str, precision, target| {
        let bundle = folder.path().join(name);
        export(&checkpoint, &bundle, &ExportOptions { precision, target, ..ExportOptions::default() }).unwrap();
        let output = recaption(&["inspect", bundle.to_str().unwrap(), "--json"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let decoder = &report["decoder"];
        assert_eq!(decoder["head_dim"], 24);
        let values = 2 * decoder["num_layers"].as_u64().unwrap() * decoder["num_kv_heads"].as_u64().unwrap();
        report["kv_cache"]["bytes_per_token"].as_u64().unwrap() / values
    };
    assert_eq!(bytes_per_token("ort", Precision::Fp32, Target::Ort), 32 * 4);
    assert_eq!(bytes_per_token("tensorrt", Precision::Fp16, Target::TensorRt), 2 * 24 * 2);
}

#[test]
fn verify_names_every_file_that_is_not_as_exported() {
    let (_folder, bundle) = copy();
    let data = bundle.join("decoder.onnx.data");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[4_000_000] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    // Sizes alone do not show it.
    let output = recaption(&["inspect", bundle.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let message = refusal(&bundle, &["--verify"]);
    assert!(message.contains("`decoder.onnx.data` has other contents\nhint: export the checkpoint again"), "{message}");

    std::fs::remove_file(bundle.join("tokenizer.json")).unwrap();
    std::fs::write(bundle.join("notes.txt"), "mine").unwrap();
    let message = refusal(&bundle, &["--verify", "--json"]);
    let expected = "`tokenizer.json` is missing; `decoder.onnx.data` has other contents; `notes.txt` is extra";
    assert!(message.contains(expected), "{message}");
    assert!(message.contains("hint: move what does not belong to the bundle elsewhere, then export"), "{message}");
    assert!(refusal(&bundle, &[]).contains("tokenizer.json`: expected"));
}

#[test]
fn an_operator_that_the_target_does_not_have_is_named_with_its_node() {
    let (_folder, bundle) = copy();
    let original = std::fs::read(bundle.join("projector.onnx")).unwrap();
    let mut model = ModelProto::decode(original.as_slice()).unwrap();
    let node = NodeProto {
        name: Some("/layers.0/Strange".to_owned()),
        op_type: Some("Strange".to_owned()),
        domain: Some("org.example".to_owned()),
        ..Default::default()
    };
    model.graph.as_mut().unwrap().node.push(node);
    replace(&bundle, "projector.onnx", &model.encode_to_vec());
    let message = refusal(&bundle, &[]);
    let expected = "`projector.onnx` node `/layers.0/Strange`: operator `org.example.Strange` is not one of target ort";
    assert!(message.contains(expected), "{message}");

    // A graph that the manifest describes otherwise.
    replace(&bundle, "projector.onnx", &original);
    edit_manifest(&bundle, |manifest| manifest["graphs"]["projector"]["outputs"][0]["dtype"] = "f16".into());
    let message = refusal(&bundle, &[]);
    assert!(message.contains("output `image_features`: expected f16 [rows, 192], got f32"), "{message}");
}

#[test]
fn damaged_and_hostile_bundles_are_refused() {
    let (_folder, bundle) = copy();
    let original = std::fs::read(bundle.join("decoder.onnx")).unwrap();
    let half = &original[..original.len() / 2];
    std::fs::write(bundle.join("decoder.onnx"), half).unwrap();
    assert!(refusal(&bundle, &[]).contains("decoder.onnx`: expected"));
    for bytes in [half, b"", &[0xff; 1000], &[0x3a; 100_000], &original[1..]] {
        replace(&bundle, "decoder.onnx", bytes);
        let message = refusal(&bundle, &[]);
        assert!(message.contains("graph `") && message.contains("decoder.onnx`: it "), "{message}");
    }
    // 40 MB on the disk, none of them read whole.
    replace(&bundle, "decoder.onnx", &vec![0; 40 << 20]);
    assert!(refusal(&bundle, &[]).contains("is larger than"));

    replace(&bundle, "decoder.onnx", &original);
    for name in ["../tokenizer.json", "/etc/passwd", "a/b", "a\\b", ".."] {
        edit_manifest(&bundle, |manifest| manifest["files"][0]["path"] = name.into());
        let output = recaption(&["inspect", bundle.to_str().unwrap(), "--verify"]);
        assert_eq!(output.status.code(), Some(2));
        let message = stderr(&output);
        assert!(message.contains(&format!("file name {name:?}: expected the plain name")), "{message}");
    }
}
