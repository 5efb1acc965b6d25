//! The command line: help, resuming, settings that differ, inputs that are not there.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::support::{
    copy_folder, demo_bundle, demo_shard, parquet_rows, printed_rows, read_json, recaption, root, stderr,
};

#[test]
fn help_teaches() {
    for (name, args) in [
        ("main", &["--help"][..]),
        ("export", &["export", "--help"]),
        ("run", &["run", "--help"]),
        ("run-short", &["run", "-h"]),
        ("profile", &["profile", "--help"]),
        ("inspect", &["inspect", "--help"]),
        ("doctor", &["doctor", "--help"]),
        ("plan", &["plan", "--help"]),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_recaption")).args(args).env("COLUMNS", "100").output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        insta::assert_snapshot!(format!("help-{name}"), String::from_utf8(output.stdout).unwrap());
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_to_do() {
    let bundle = demo_bundle();
    let bundle = bundle.to_str().unwrap();
    let image = root("tests/data/images/28/a.png");
    let image = image.to_str().unwrap();
    let cases: [(&[&str], &str); 10] = [
        (&["run", "no-such-file.jpg", "--model", bundle], "no such file or folder"),
        (&["run", "Cargo.toml", "--model", bundle], "not an image, a folder, a tar or a parquet file"),
        (&["run", "x/{3..1}.tar", "--model", bundle], "runs backwards"),
        (&["run", image, "--model", "tests"], "hint: make one with `recaption export"),
        (&["run", image, "--model", bundle, "--max-new-tokens", "100000"], "hint: use --max-new-tokens"),
        (&["run", image, "--model", bundle, "--template", "no-such"], "llava-pp-llama3"),
        (&["run", image, "--model", bundle, "--provider", "cuda"], "provider `cuda` does not work here"),
        (&["export", "tests", "--out", "x"], "has no config.json"),
        (&["inspect", "tests"], "hint: make one with `recaption export"),
        (&["inspect", bundle, "--new-tokens", "0"], "0 is not in 1..=1000000"),
    ];
    for (args, expected) in cases {
        let output = Command::new(env!("CARGO_BIN_EXE_recaption")).args(args).current_dir(root("")).output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.contains(expected), "{args:?}: {message}");
    }
}

#[test]
fn the_same_command_again_does_nothing_twice() {
    let (bundle, shard, out) = (demo_bundle(), demo_shard(), tempfile::tempdir().unwrap());
    let images = root("tests/data/images/42");
    let out_text = out.path().to_str().unwrap();
    let args = |tail: &[&'static str]| {
        let fixed = ["run", shard.to_str().unwrap(), images.to_str().unwrap(), "--model", bundle.to_str().unwrap()];
        recaption(&[&fixed[..], &["--out", out_text, "--quiet", "--provider", "cpu"], tail].concat())
    };
    assert_eq!(args(&[]).status.code(), Some(0));
    let first = parquet_rows(out.path());
    assert_eq!(first.len(), 67);
    let summary = read_json(&out.path().join("summary.json"));

    // One shard is gone, as after a kill: only that one is made again.
    let (kept, lost) = (out.path().join("captions-00000.parquet"), out.path().join("captions-42-00000.parquet"));
    let written = std::fs::metadata(&kept).unwrap().modified().unwrap();
    std::fs::remove_file(&lost).unwrap();
    let again = args(&["--json"]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert_eq!(std::fs::metadata(&kept).unwrap().modified().unwrap(), written);
    assert_eq!(parquet_rows(out.path()), first);
    let resumed: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    for count in ["rows", "ok", "failed", "prompt_tokens", "new_tokens"] {
        assert_eq!(resumed[count], summary[count], "{count}");
    }

    let changed = args(&["--max-new-tokens", "7"]);
    let message = stderr(&changed);
    assert_eq!(changed.status.code(), Some(2));
    assert!(message.contains("max_new_tokens was 128, now 7") && message.contains("--overwrite"), "{message}");
    assert_eq!(parquet_rows(out.path()), first, "a refused run changes nothing");
    assert_eq!(args(&["--max-new-tokens", "7", "--overwrite"]).status.code(), Some(0));
    assert!(parquet_rows(out.path()).iter().all(|row| row["num_tokens"].as_i64().unwrap() <= 7));
}

#[test]
fn images_that_join_a_finished_shard_are_not_passed_over_silently() {
    let (bundle, folder) = (demo_bundle(), tempfile::tempdir().unwrap());
    let (images, out) = (folder.path().join("images"), folder.path().join("out"));
    copy_folder(&root("tests/data/images/42"), &images);
    let run = || {
        let fixed = ["run", images.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"];
        recaption(&[&fixed[..], &["--max-new-tokens", "3", "--out", out.to_str().unwrap(), "--limit", "4"]].concat())
    };
    assert_eq!(run().status.code(), Some(0));
    assert_eq!(run().status.code(), Some(0));
    std::fs::copy(images.join("a.png"), images.join("d.png")).unwrap();
    let changed = run();
    assert_eq!(changed.status.code(), Some(2));
    assert!(stderr(&changed).contains("the output has shard `images-00000` of other images"), "{}", stderr(&changed));
    // Beyond the limit nothing was promised.
    let anew = ["--overwrite"];
    let fixed = ["run", images.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet", "--limit", "4"];
    let output = recaption(&[&fixed[..], &["--max-new-tokens", "3", "--out", out.to_str().unwrap()], &anew].concat());
    assert_eq!(output.status.code(), Some(0));
    std::fs::copy(images.join("a.png"), images.join("e.png")).unwrap();
    assert_eq!(run().status.code(), Some(0));
    assert_eq!(parquet_rows(&out).len(), 4);
}

#[test]
fn a_bundle_with_other_preprocessing_is_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let source = root("tests/data/checkpoints/published-f16");
    let fingerprint = |name: &str, edit: &dyn Fn(&mut serde_json::Value)| {
        let checkpoint = folder.path().join(name);
        copy_folder(&source, &checkpoint);
        let path = checkpoint.join("preprocessor_config.json");
        let mut config = read_json(&path);
        edit(&mut config);
        std::fs::write(&path, config.to_string()).unwrap();
        let out = folder.path().join(format!("{name}-bundle"));
        let manifest = recaption::export::export(&checkpoint, &out, &recaption::export::ExportOptions::default());
        manifest.unwrap().header().fingerprint.clone()
    };
    let first = fingerprint("first", &|_| ());
    assert_eq!(first, fingerprint("first-again", &|_| ()).clone());
    assert_ne!(first, fingerprint("second", &|config| config["image_mean"] = serde_json::json!([0.1, 0.2, 0.3])));
}

#[test]
fn json_lines_hold_the_same_rows_as_parquet() {
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let run = |format: &str| {
        let out = tempfile::tempdir().unwrap();
        let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--limit", "9", "--quiet"];
        let output = recaption(&[&args[..], &["--out", out.path().to_str().unwrap(), "--format", format]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        out
    };
    let (parquet, jsonl) = (run("parquet"), run("jsonl"));
    let lines = std::fs::read_to_string(jsonl.path().join("captions-00000.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 9);
    assert_eq!(lines, parquet_rows(parquet.path()));
}

#[test]
fn paths_on_standard_input_are_captioned_in_their_order() {
    let bundle = demo_bundle();
    let mut child = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", "-", "--model", bundle.to_str().unwrap(), "--quiet", "--max-new-tokens", "3"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let paths: Vec<String> = ["c", "a", "no-such", "b"]
        .iter()
        .map(|name| root(&format!("tests/data/images/42/{name}.png")).display().to_string())
        .collect();
    child.stdin.take().unwrap().write_all((paths.join("\n") + "\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let rows = printed_rows(&output);
    assert_eq!(rows.iter().map(|row| row["key"].as_str().unwrap()).collect::<Vec<_>>(), paths);
    assert!(rows[2]["error"].as_str().unwrap().starts_with("source: "));
}

#[test]
fn an_existing_folder_is_replaced_only_if_it_is_a_bundle_and_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = root("tests/data/checkpoints/published-f16");
    let export = |out: &str, extra: &[&str]| {
        recaption(&[&["export", checkpoint.to_str().unwrap(), "--out", out], extra].concat())
    };
    let bundle = folder.path().join("bundle");
    let bundle = bundle.to_str().unwrap();
    assert_eq!(export(bundle, &[]).status.code(), Some(0));
    let refused = export(bundle, &[]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("replace it with --overwrite"));
    assert_eq!(export(bundle, &["--overwrite"]).status.code(), Some(0));
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.txt"), "ten years").unwrap();
    assert_eq!(export(other.to_str().unwrap(), &["--overwrite"]).status.code(), Some(2));
    assert!(other.join("thesis.txt").exists());

    // A manifest.json of another kind, or files of the user's beside a bundle: neither is deleted.
    std::fs::write(other.join("manifest.json"), r#"{"name": "a web extension"}"#).unwrap();
    assert_eq!(export(other.to_str().unwrap(), &["--overwrite"]).status.code(), Some(2));
    assert!(other.join("thesis.txt").exists());
    std::fs::write(folder.path().join("bundle/notes.txt"), "mine").unwrap();
    assert_eq!(export(bundle, &["--overwrite"]).status.code(), Some(2));
    assert!(folder.path().join("bundle/notes.txt").exists());
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 2, "a staging folder was left behind");
}
