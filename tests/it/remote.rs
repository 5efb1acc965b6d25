//! Output to an object store: an S3 server on loopback. Journals stay on this machine; claims are objects that only one
//! process can create.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::Value;

use crate::resume::{Case, case, journal_rows};
use crate::servers::{Fault, S3, proxy, s3_environment};
use crate::support::{demo_bundle, stderr};

fn run(inputs: &[&Path], port: u16, work: &Path, extra: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_recaption"))
        .arg("run")
        .args(inputs)
        .args(["--model", demo_bundle().to_str().unwrap(), "--out", "s3://bucket/out", "--provider", "cpu"])
        .args(["--work-dir", work.to_str().unwrap(), "--max-new-tokens", "3", "--slots", "2", "--vision-batch", "1"])
        .args(["--storage-retries", "1"])
        .args(extra)
        .envs(s3_environment(port))
        .output()
        .unwrap()
}

fn get(server: &S3, key: &str) -> Option<Vec<u8>> {
    let (status, body) = server.request("GET", &format!("/bucket/out/{key}"), b"");
    (status == 200).then_some(body)
}

fn rows(server: &S3, key: &str) -> Vec<Value> {
    let text = String::from_utf8(get(server, key).unwrap()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The journal of shard `0` in a work folder.
fn journal(work: &Path) -> std::path::PathBuf {
    let mut outputs = std::fs::read_dir(work).unwrap().map(|entry| entry.unwrap().path());
    outputs.next().unwrap().join("journal/0.journal")
}

#[test]
fn an_object_store_takes_the_output_and_a_cut_off_run_goes_on() {
    let server = Arc::new(S3::start());
    let Case { folder, tar, .. } = case(12);
    let work = folder.path().join("work");
    let jsonl = ["--format", "jsonl"];

    let cut =
        run(&[&tar], server.port, &work, &[&jsonl[..], &["--inject-io-error", "journal-write:6:enospc"]].concat());
    assert_eq!(cut.status.code(), Some(2), "{}", stderr(&cut));
    assert_eq!(journal_rows(&journal(&work)).len(), 5);
    assert!(get(&server, "captions-0.jsonl").is_none());
    assert!(get(&server, "claims/0.json").is_some(), "the claim of a process that died stays");

    // On another machine the shard is the first one's, for now.
    let quick = [&jsonl[..], &["--claim-timeout", "1"]].concat();
    let alive = keep_alive(Arc::clone(&server));
    let elsewhere = run(&[&tar], server.port, &folder.path().join("elsewhere"), &quick);
    drop(alive);
    assert_eq!(elsewhere.status.code(), Some(0), "{}", stderr(&elsewhere));
    assert!(stderr(&elsewhere).contains("1 shards are in work in other processes"), "{}", stderr(&elsewhere));
    assert!(get(&server, "captions-0.jsonl").is_none());

    let rest = run(&[&tar], server.port, &work, &jsonl);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    let rows = rows(&server, "captions-0.jsonl");
    assert_eq!(rows.len(), 12);
    assert!(rows.iter().enumerate().all(|(index, row)| row["key"] == format!("{index:04}") && row["status"] == "ok"));
    assert!(get(&server, "claims/0.json").is_none() && !journal(&work).exists());
    let summary: Value = serde_json::from_slice(&get(&server, "summary.json").unwrap()).unwrap();
    assert_eq!((&summary["rows"], &summary["ok"]), (&12.into(), &12.into()));

    // Everything is there: nothing is done again, from whatever machine.
    let again = run(&[&tar], server.port, &folder.path().join("elsewhere"), &jsonl);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert!(stderr(&again).contains("12 of the rows are of earlier runs"), "{}", stderr(&again));
    let other = run(&[&tar], server.port, &work, &[&jsonl[..], &["--prompt", "Another."]].concat());
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("other settings: prompt was"), "{}", stderr(&other));
}

/// Changes the claim of shard `0` again and again, as its owner would, until this is dropped.
fn keep_alive(server: Arc<S3>) -> std::sync::mpsc::Sender<()> {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let claim = get(&server, "claims/0.json").unwrap();
        let mut beat = 0;
        while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) =
            stopped.recv_timeout(std::time::Duration::from_millis(100))
        {
            beat += 1;
            let mut claim: Value = serde_json::from_slice(&claim).unwrap();
            claim["beat"] = beat.into();
            server.put("out/claims/0.json", claim.to_string().as_bytes());
        }
    });
    stop
}

#[test]
fn a_shard_of_a_machine_that_is_gone_is_taken_over() {
    let server = S3::start();
    let Case { folder, tar, .. } = case(6);
    let (work, elsewhere) = (folder.path().join("work"), folder.path().join("elsewhere"));
    let cut = run(&[&tar], server.port, &work, &["--inject-io-error", "journal-write:4:enospc"]);
    assert_eq!(cut.status.code(), Some(2), "{}", stderr(&cut));
    let taken = run(&[&tar], server.port, &elsewhere, &["--claim-timeout", "0.5"]);
    assert_eq!(taken.status.code(), Some(0), "{}", stderr(&taken));
    assert!(get(&server, "captions-0.parquet").is_some());
    // The machine comes back: its journal is of no use any more.
    let back = run(&[&tar], server.port, &work, &[]);
    assert_eq!(back.status.code(), Some(0), "{}", stderr(&back));
    assert!(stderr(&back).contains("6 of the rows are of earlier runs"), "{}", stderr(&back));
}

#[test]
fn parquet_and_tars_go_to_the_store_as_they_are_on_a_disk() {
    let server = S3::start();
    let Case { folder, tar, out } = case(6);
    for (format, extension) in [("parquet", "parquet"), ("webdataset", "tar")] {
        let work = folder.path().join(format);
        let remote = run(&[&tar], server.port, &work, &["--format", format, "--overwrite"]);
        assert_eq!(remote.status.code(), Some(0), "{}", stderr(&remote));
        let local = out.join(format);
        std::fs::create_dir_all(&local).unwrap();
        let here = crate::resume::run(&[&tar], &local, &["--format", format]);
        assert_eq!(here.status.code(), Some(0), "{}", stderr(&here));
        let key = format!("captions-0.{extension}");
        assert_eq!(get(&server, &key).unwrap(), std::fs::read(local.join(&key)).unwrap(), "{format}");
    }
}

#[test]
fn a_store_that_fails_ends_the_run_and_what_is_done_stays() {
    let server = S3::start();
    let Case { folder, tar, .. } = case(6);
    let work = folder.path().join("work");
    // It answers for a while, then fails for good: every request of the commit.
    let failing = proxy(server.port, |number| if number < 6 { Fault::None } else { Fault::ServerError });
    let failed = run(&[&tar], failing, &work, &[]);
    let message = stderr(&failed);
    assert_eq!(failed.status.code(), Some(2), "{message}");
    assert!(message.contains("error: ") && message.contains("hint: the store is in trouble"), "{message}");
    assert!(!message.contains("not-to-be-seen"), "{message}");
    assert!(get(&server, "captions-0.parquet").is_none());
    let rest = run(&[&tar], server.port, &work, &[]);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    assert!(get(&server, "captions-0.parquet").is_some());
}

#[test]
fn an_output_without_a_place_for_its_journals_is_refused() {
    let Case { tar, .. } = case(1);
    let output = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", tar.to_str().unwrap(), "--model", demo_bundle().to_str().unwrap(), "--out", "s3://bucket/out"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--work-dir"), "{}", stderr(&output));
}
