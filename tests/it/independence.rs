//! A caption does not depend on its slot, its neighbours, the batch or the engine: fp32 ids are the same.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use recaption::export::{ExportOptions, Precision, Target, export};
use serde_json::Value;

use crate::support::{demo_bundle, demo_shard, parquet_rows, printed_rows, recaption, root, stderr};

/// Ids of each key under the given settings.
fn ids(inputs: &[&str], extra: &[&str]) -> BTreeMap<String, Value> {
    let bundle = demo_bundle();
    let mut args = vec!["run"];
    args.extend(inputs);
    args.extend(["--model", bundle.to_str().unwrap(), "--with-token-ids", "--quiet", "--provider", "cpu"]);
    args.extend(extra);
    let output = recaption(&args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let rows = printed_rows(&output);
    rows.into_iter().map(|row| (row["key"].as_str().unwrap().to_owned(), row["token_ids"].clone())).collect()
}

#[test]
fn batched_captions_equal_those_made_one_at_a_time() {
    let shard = demo_shard();
    let inputs = [shard.to_str().unwrap()];
    let alone = ids(&inputs, &["--slots", "1"]);
    assert_eq!(alone.len(), 64);
    let lengths: std::collections::BTreeSet<usize> = alone.values().map(|ids| ids.as_array().unwrap().len()).collect();
    assert!(lengths.len() > 1, "captions of one length never move between slots: the test shows nothing");
    for settings in [
        &["--slots", "8", "--vision-batch", "1"][..],
        &["--slots", "8", "--vision-batch", "4"],
        &["--slots", "32", "--vision-batch", "32"],
        &["--slots", "5", "--vision-batch", "3", "--threads", "1"],
        &["--slots", "4", "--engines", "2"],
    ] {
        assert_eq!(ids(&inputs, settings), alone, "{settings:?}");
    }
}

/// The bundle of target cpu: its captions, by key, with `cpu` as `RECAPTION_CPU`.
fn cpu_ids(bundle: &Path, extra: &[&str], cpu: Option<&str>) -> BTreeMap<String, Value> {
    let shard = demo_shard();
    let mut command = Command::new(env!("CARGO_BIN_EXE_recaption"));
    command.args(["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--with-token-ids", "--quiet"]);
    command.args(extra);
    match cpu {
        Some(level) => command.env("RECAPTION_CPU", level),
        None => command.env_remove("RECAPTION_CPU"),
    };
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let rows = printed_rows(&output);
    rows.into_iter().map(|row| (row["key"].as_str().unwrap().to_owned(), row["token_ids"].clone())).collect()
}

#[test]
fn captions_of_target_cpu_do_not_depend_on_company_threads_or_instruction_set() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    let options = ExportOptions { precision: Precision::Int8, target: Target::Cpu, ..ExportOptions::default() };
    export(&root("models/demo"), &bundle, &options).unwrap();
    let alone = cpu_ids(&bundle, &["--slots", "1", "--engines", "1"], None);
    assert_eq!(alone.len(), 64);
    for settings in [
        &["--slots", "8", "--vision-batch", "3"][..],
        &["--slots", "32", "--vision-batch", "32", "--engines", "1", "--threads", "3"],
        &["--slots", "5", "--engines", "2"],
        // Those that have nothing to do help the others, which then cut their work for more threads.
        &["--slots", "1", "--engines", "6", "--threads", "6"],
    ] {
        assert_eq!(cpu_ids(&bundle, settings, None), alone, "{settings:?}");
    }
    for level in ["portable", "avx2", "avxvnni", "avx512"] {
        assert_eq!(cpu_ids(&bundle, &["--slots", "16"], Some(level)), alone, "{level}");
    }
    let args = ["run", "-", "--model", bundle.to_str().unwrap()];
    let output =
        Command::new(env!("CARGO_BIN_EXE_recaption")).args(args).env("RECAPTION_CPU", "sse9").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: leave RECAPTION_CPU unset"), "{}", stderr(&output));
}

#[test]
fn captions_of_target_cpu_do_not_depend_on_where_a_run_was_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let bundle = path("bundle");
    let options = ExportOptions { precision: Precision::Int8, target: Target::Cpu, ..ExportOptions::default() };
    export(&root("models/demo"), &bundle, &options).unwrap();
    for shard in ["a.tar", "b.tar", "c.tar"] {
        std::fs::copy(demo_shard(), path(shard)).unwrap();
    }
    let run = |shards: &[&str], settings: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recaption"));
        command.arg("run").args(shards.iter().map(|shard| path(shard)));
        command.arg("--model").arg(&bundle).arg("--out").arg(path("out")).args(["--with-token-ids", "--quiet"]);
        let output = command.args(settings).env_remove("RECAPTION_CPU").output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    };
    run(&["a.tar"], &["--slots", "1", "--engines", "1"]);
    run(&["a.tar", "b.tar"], &["--slots", "32", "--engines", "1", "--threads", "2"]);
    run(&["a.tar", "b.tar", "c.tar"], &["--slots", "7", "--vision-batch", "3", "--engines", "2"]);
    let rows = parquet_rows(&path("out"));
    assert_eq!(rows.len(), 3 * 64);
    for (index, row) in rows.iter().enumerate() {
        let first = &rows[index % 64];
        for column in ["key", "re_caption", "token_ids", "finish_reason"] {
            assert_eq!(row[column], first[column], "{column} of row {index}");
        }
    }
}

#[test]
fn rows_come_in_input_order_whatever_finishes_first() {
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let out = tempfile::tempdir().unwrap();
    let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--engines", "2", "--slots", "7"];
    let output = recaption(&[&args[..], &["--out", out.path().to_str().unwrap(), "--quiet"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let keys: Vec<String> =
        parquet_rows(out.path()).iter().map(|row| row["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(keys, (0..64).map(|i| format!("{i:09}")).collect::<Vec<_>>());
}
