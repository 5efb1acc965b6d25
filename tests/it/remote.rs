//! Output to an object store: an S3 server on loopback. Journals stay on this machine; claims are objects that only one
//! process can create.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::resume::{Case, case, journal_rows};
use crate::servers::{S3, s3_environment};
use crate::support::{demo_bundle, demo_samples, fetched, parquet_rows, root, stderr, write_tar};

pub(crate) fn command(inputs: &[&Path], port: u16, work: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_recaption"));
    command
        .arg("run")
        .args(inputs)
        .args(["--model", demo_bundle().to_str().unwrap(), "--out", "s3://bucket/out", "--provider", "cpu"])
        .args(["--work-dir", work.to_str().unwrap(), "--max-new-tokens", "3", "--slots", "2", "--vision-batch", "1"])
        .args(extra)
        .args(if extra.contains(&"--storage-retries") { &[][..] } else { &["--storage-retries", "1"] })
        .envs(s3_environment(port))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

pub(crate) fn run(inputs: &[&Path], port: u16, work: &Path, extra: &[&str]) -> Output {
    command(inputs, port, work, extra).output().unwrap()
}

pub(crate) fn get(server: &S3, key: &str) -> Option<Vec<u8>> {
    let (status, body) = server.request("GET", &format!("/bucket/out/{key}"), b"");
    (status == 200).then_some(body)
}

pub(crate) fn rows(server: &S3, key: &str) -> Vec<Value> {
    let text = String::from_utf8(get(server, key).unwrap()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The journal of shard `0` in a work folder.
pub(crate) fn journal(work: &Path) -> std::path::PathBuf {
    let outputs = std::fs::read_dir(work).into_iter().flatten().map(|entry| entry.unwrap().path());
    outputs.last().unwrap_or_default().join("journal/0.journal")
}

/// Waits until `count` rows are in the journal of shard `0`; says whether the run goes on.
pub(crate) fn wait_for_rows(work: &Path, count: usize, child: &mut Child) -> bool {
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        let journal = journal(work);
        if std::fs::metadata(&journal).is_ok() && journal_rows(&journal).len() >= count {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
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
    assert!(stderr(&elsewhere).contains("shard `0` is in work in another process"), "{}", stderr(&elsewhere));
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
        while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(Duration::from_millis(100)) {
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
fn outputs_that_cannot_be_written_are_refused_with_a_hint() {
    let Case { folder, tar, .. } = case(1);
    let refusal = |out: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_recaption"))
            .args(["run", tar.to_str().unwrap(), "--model", demo_bundle().to_str().unwrap(), "--out", out])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{out}: {}", stderr(&output));
        stderr(&output)
    };
    for store in ["s3://bucket/out", "gs://bucket/out", "az://bucket/out"] {
        let message = refusal(store);
        assert!(message.contains(store) && message.contains("hint: add --work-dir"), "{message}");
    }
    let message = refusal("https://me:not-to-be-seen@host/out");
    assert!(message.contains("web servers are only read from") && message.contains("hint: "), "{message}");
    assert!(!message.contains("not-to-be-seen"), "{message}");
    let message = refusal("ftp://host/out");
    assert!(message.contains("--out: ") && message.contains("hint: use a folder, s3://"), "{message}");
    // The URL of a local folder is that folder.
    let out = format!("file://{}", folder.path().join("a folder").display()).replace(' ', "%20");
    let output = crate::resume::run(&[&tar], Path::new(&out), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(parquet_rows(&folder.path().join("a folder")).len(), 1);
}

/// Tars of a few images each.
pub(crate) fn tars(folder: &Path, count: usize, num_images: usize) -> Vec<std::path::PathBuf> {
    let samples = demo_samples();
    let tar = |shard: usize| {
        let path = folder.join(format!("{shard}.tar"));
        let member = |at: usize| (format!("{:04}.jpg", shard * num_images + at), samples[at % samples.len()].0.clone());
        write_tar(&path, &(0..num_images).map(member).collect::<Vec<_>>());
        path
    };
    (0..count).map(tar).collect()
}

pub(crate) fn paths(paths: &[std::path::PathBuf]) -> Vec<&Path> {
    paths.iter().map(std::path::PathBuf::as_path).collect()
}

/// Brings the objects of the output to a local folder.
pub(crate) fn download(server: &S3, folder: &Path, count: usize) {
    std::fs::create_dir_all(folder).unwrap();
    for shard in 0..count {
        let name = format!("captions-{shard}.parquet");
        std::fs::write(folder.join(&name), get(server, &name).unwrap_or_else(|| panic!("no {name}"))).unwrap();
    }
}

#[test]
fn machines_that_share_a_store_do_each_shard_once_and_pyarrow_reads_a_local_runs_rows() {
    let server = S3::start();
    let folder = tempfile::tempdir().unwrap();
    let inputs = tars(folder.path(), 6, 3);
    let inputs = paths(&inputs);
    let start = |name: &str| {
        let metrics = folder.path().join(format!("{name}.log"));
        let mut command = command(&inputs, server.port, &folder.path().join(name), &["--log-format", "json"]);
        command.env("RECAPTION_LOG", "info").stderr(std::fs::File::create(&metrics).unwrap());
        (command.spawn().unwrap(), metrics)
    };
    let mut written = Vec::new();
    for (mut child, log) in [start("a"), start("b")] {
        let status = child.wait().unwrap();
        let log = std::fs::read_to_string(log).unwrap();
        assert!(status.success(), "{log}");
        written.extend(log.lines().filter(|line| line.contains("shard written")).map(str::to_owned));
    }
    assert_eq!(written.len(), 6, "each shard is written once: {written:?}");

    let local = folder.path().join("local");
    let here = crate::resume::run(&inputs, &local, &[]);
    assert_eq!(here.status.code(), Some(0), "{}", stderr(&here));
    let output = Command::new(fetched("venv/bin/python"))
        .arg(root("scripts/golden/check_remote.py"))
        .args([&format!("127.0.0.1:{}", server.port), "bucket/out"])
        .arg(&local)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["rows"], 18);

    // Two parts, dealt out without claims, make the same files.
    for part in ["1/2", "2/2"] {
        let extra = ["--no-claims", "--part", part, "--overwrite"];
        let extra = if part == "1/2" { &extra[..] } else { &extra[..3] };
        let output = run(&inputs, server.port, &folder.path().join("parts"), extra);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let count = (0..6).filter(|shard| get(&server, &format!("captions-{shard}.parquet")).is_some()).count();
        assert_eq!(count, if part == "1/2" { 3 } else { 6 });
    }
    download(&server, &folder.path().join("downloaded"), 6);
    assert_eq!(parquet_rows(&folder.path().join("downloaded")), parquet_rows(&local));
}

#[test]
fn failed_rows_in_a_store_are_done_again_and_the_others_stay() {
    let server = S3::start();
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    for (index, (image, _)) in demo_samples().iter().take(4).enumerate() {
        let cut = if index == 1 { 20 } else { image.len() };
        std::fs::write(images.join(format!("{index}.jpg")), &image[..cut]).unwrap();
    }
    let work = folder.path().join("work");
    let args = ["--format", "jsonl"];
    let first = run(&[&images], server.port, &work, &args);
    assert_eq!(first.status.code(), Some(1), "{}", stderr(&first));
    let before = rows(&server, "captions-images-00000.jsonl");
    std::fs::write(images.join("1.jpg"), &demo_samples()[1].0).unwrap();
    let retry = [&args[..], &["--retry-failed"]].concat();
    // Cut off before the object is replaced: its counts are still known.
    let cut = run(&[&images], server.port, &work, &[&retry[..], &["--inject-io-error", "commit-sync:0:eio"]].concat());
    assert_eq!(cut.status.code(), Some(2), "{}", stderr(&cut));
    assert_eq!(rows(&server, "captions-images-00000.jsonl"), before);
    let again = run(&[&images], server.port, &work, &retry);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    let after = rows(&server, "captions-images-00000.jsonl");
    assert!(before.iter().zip(&after).enumerate().all(|(index, (before, after))| (index == 1) != (before == after)));
    assert!(after.iter().all(|row| row["status"] == "ok"));
    let summary: Value = serde_json::from_slice(&get(&server, "summary.json").unwrap()).unwrap();
    assert_eq!((&summary["rows"], &summary["failed"]), (&4.into(), &0.into()));
    let left: Vec<_> = std::fs::read_dir(work.join(std::fs::read_dir(&work).unwrap().next().unwrap().unwrap().path()))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(left.iter().all(|name| ["owner", "run.lock"].contains(&name.as_str())), "{left:?}");
}
