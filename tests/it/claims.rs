//! Many processes, one output: each shard is done by one of them, whatever else happens.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::resume::{Case, case, run, spawn};
use crate::support::{demo_samples, parquet_rows, read_json, stderr, write_tar};

/// Tars of one image each, whose shards go by their number.
fn tars(folder: &Path, count: usize) -> Vec<PathBuf> {
    let image = &demo_samples()[0].0;
    let tar = |index: usize| {
        let path = folder.join(format!("{index}.tar"));
        write_tar(&path, &[(format!("{index:04}.jpg"), image.clone())]);
        path
    };
    (0..count).map(tar).collect()
}

fn paths(paths: &[PathBuf]) -> Vec<&Path> {
    paths.iter().map(PathBuf::as_path).collect()
}

/// Holds a lock as another process would.
fn lock(path: &Path) -> File {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = File::create(path).unwrap();
    file.lock().unwrap();
    file
}

fn keys(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["key"].as_str().unwrap()).collect()
}

#[test]
fn a_shard_that_another_process_has_is_left_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (tars(folder.path(), 3), folder.path().join("out"));
    let other = lock(&out.join("claims/1.lock"));
    let output = run(&paths(&inputs), &out, &[]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(message.contains("shard `1` is in work in another process"), "{message}");
    assert_eq!(read_json(&out.join("summary.json"))["busy_shards"], serde_json::json!(["1"]));
    assert_eq!(keys(&parquet_rows(&out)), ["0000", "0002"]);
    drop(other);
    let output = run(&paths(&inputs), &out, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(keys(&parquet_rows(&out)), ["0000", "0001", "0002"]);
    assert!(!out.join("claims").exists() && !out.join("journal").exists(), "nothing is left over");
}

#[test]
fn a_shard_that_another_process_finished_meanwhile_is_not_left_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut inputs, [out, elsewhere]) =
        (tars(folder.path(), 2), ["out", "elsewhere"].map(|name| folder.path().join(name)));
    let many = folder.path().join("2.tar");
    let member = |(index, (image, _)): (usize, _)| (format!("{index:04}.jpg"), image);
    let images = std::iter::repeat_n(demo_samples(), 4).flatten().cloned();
    write_tar(&many, &images.enumerate().map(member).collect::<Vec<_>>());
    assert_eq!(run(&paths(&inputs), &elsewhere, &[]).status.code(), Some(0));
    inputs.push(many);
    let _other = lock(&out.join("claims/1.lock"));
    let mut child = spawn(&paths(&inputs), &out, &[]);
    while !out.join("captions-0.parquet").exists() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    std::fs::copy(elsewhere.join("captions-1.parquet"), out.join("captions-1.parquet")).unwrap();
    assert!(child.try_wait().unwrap().is_none(), "the last shard was too small to see anything");
    let output = child.wait_with_output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(!message.contains("in work"), "{message}");
    assert!(message.contains("1 of the rows is of an earlier run or another process"), "{message}");
    assert_eq!(read_json(&out.join("summary.json")).get("busy_shards"), None);
}

#[test]
fn a_lock_file_that_a_killed_run_left_of_a_finished_shard_goes_away() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (tars(folder.path(), 2), folder.path().join("out"));
    assert_eq!(run(&paths(&inputs), &out, &[]).status.code(), Some(0));
    drop(lock(&out.join("claims/1.lock")));
    let output = run(&paths(&inputs), &out, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!out.join("claims").exists(), "nothing is left over");
    // One that is held stays.
    let other = lock(&out.join("claims/1.lock"));
    assert_eq!(run(&paths(&inputs), &out, &[]).status.code(), Some(0));
    assert!(out.join("claims/1.lock").exists());
    drop(other);
}

#[test]
fn starting_anew_waits_for_nobody_and_disturbs_nobody() {
    let Case { folder: _folder, tar, out } = case(2);
    assert_eq!(run(&[&tar], &out, &[]).status.code(), Some(0));
    let other = File::open(out.join("run.lock")).unwrap();
    other.lock_shared().unwrap();
    let output = run(&[&tar], &out, &["--overwrite"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("another process is captioning into it"), "{}", stderr(&output));
    assert_eq!(parquet_rows(&out).len(), 2);
    // One that only goes on shares the folder.
    assert_eq!(run(&[&tar], &out, &[]).status.code(), Some(0));
    drop(other);
    assert_eq!(run(&[&tar], &out, &["--overwrite"]).status.code(), Some(0));
}

#[test]
fn parts_are_distinct_and_make_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let inputs = tars(folder.path(), 5);
    let mut seen = Vec::new();
    for part in 1..=2 {
        let out = folder.path().join(format!("out-{part}"));
        let output = run(&paths(&inputs), &out, &["--part", &format!("{part}/2"), "--no-claims"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(!out.join("claims").exists() && !out.join("run.lock").exists(), "--no-claims takes none");
        let rows = parquet_rows(&out);
        assert!([2, 3].contains(&rows.len()));
        seen.extend(keys(&rows).into_iter().map(str::to_owned));
    }
    seen.sort();
    assert_eq!(seen, ["0000", "0001", "0002", "0003", "0004"]);
    for bad in ["0/2", "3/2", "1", "a/b"] {
        let output = run(&paths(&inputs), &folder.path().join("bad"), &["--part", bad]);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(stderr(&output).contains("expected I/N"), "{}", stderr(&output));
    }
}

#[test]
fn journals_may_lie_elsewhere_and_outputs_do_not_mix_there() {
    let (one, two) = (case(6), case(6));
    let work = one.folder.path().join("work");
    let work_args = ["--work-dir", work.to_str().unwrap()];
    for case in [&one, &two] {
        let cut =
            run(&[&case.tar], &case.out, &[&work_args[..], &["--inject-io-error", "journal-write:4:enospc"]].concat());
        assert_eq!(cut.status.code(), Some(2), "{}", stderr(&cut));
        assert!(!case.out.join("journal").exists());
    }
    assert_eq!(std::fs::read_dir(&work).unwrap().count(), 2, "a folder for each output");
    for case in [&one, &two] {
        let output = run(&[&case.tar], &case.out, &work_args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(parquet_rows(&case.out).len(), 6);
    }
}
