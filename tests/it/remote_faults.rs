//! Output to an object store that fails, and processes that are killed or stopped while they write to it.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use crate::remote::{command, download, get, journal, paths, run, tars, wait_for_rows};
use crate::resume::{Case, case, journal_rows};
use crate::servers::{Fault, S3, proxy_by_request};
use crate::support::{demo_samples, parquet_rows, stderr, write_tar};

#[test]
fn a_store_that_fails_ends_the_run_and_what_is_done_stays() {
    let server = S3::start();
    let Case { folder, tar, .. } = case(6);
    let work = folder.path().join("work");
    // All requests are answered but those that would write the shard.
    let failing = |fault: Fault| {
        proxy_by_request(server.port, move |_, request| {
            if request.starts_with("PUT ") && request.contains("/captions-") { fault } else { Fault::None }
        })
    };
    let told = "hint: the store is in trouble; the same command goes on later";
    for fault in [Fault::ServerError, Fault::Silence, Fault::Closed] {
        let failed = run(&[&tar], failing(fault), &work, &["--storage-timeout", "1"]);
        let message = stderr(&failed);
        assert_eq!(failed.status.code(), Some(2), "{fault:?}: {message}");
        assert!(message.contains("error: ") && message.contains(told), "{fault:?}: {message}");
        assert!(message.contains("`s3://bucket/out/captions-0.parquet`"), "{fault:?}: {message}");
        assert!(!message.contains("not-to-be-seen"), "{fault:?}: {message}");
        assert!(get(&server, "captions-0.parquet").is_none());
        assert_eq!(journal_rows(&journal(&work)).len(), 6, "{fault:?}: everything done is kept");
    }
    let rest = run(&[&tar], server.port, &work, &[]);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    assert!(get(&server, "captions-0.parquet").is_some());
    assert!(!journal(&work).exists());
}

#[test]
fn a_store_that_fails_now_and_then_costs_nothing() {
    let server = S3::start();
    let folder = tempfile::tempdir().unwrap();
    let inputs = tars(folder.path(), 2, 3);
    // Every request fails at first, in one of three ways; its next two tries do not.
    let tries = Mutex::new(HashMap::<String, usize>::new());
    let shaky = proxy_by_request(server.port, move |number, request| {
        let mut tries = tries.lock().unwrap();
        let tries = tries.entry(request.to_owned()).or_default();
        *tries += 1;
        match (*tries % 3, number % 3) {
            (1, 0) => Fault::ServerError,
            (1, 1) => Fault::Closed,
            (1, _) => Fault::Unheard,
            _ => Fault::None,
        }
    });
    let work = folder.path().join("work");
    let output = run(&paths(&inputs), shaky, &work, &["--storage-retries", "5", "--claim-timeout", "0.5"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let local = folder.path().join("local");
    assert_eq!(crate::resume::run(&paths(&inputs), &local, &[]).status.code(), Some(0));
    download(&server, &folder.path().join("downloaded"), 2);
    assert_eq!(parquet_rows(&folder.path().join("downloaded")), parquet_rows(&local));
}

/// Images that make a tar of more than one part of an upload: what follows a picture's end is no part of it.
fn large(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("0.tar");
    let samples = demo_samples();
    let member = |at: usize| {
        let mut image = samples[at % samples.len()].0.clone();
        image.resize(1 << 20, at as u8);
        (format!("{at:04}.jpg"), image)
    };
    write_tar(&path, &(0..18).map(member).collect::<Vec<_>>());
    path
}

#[test]
fn a_shard_in_parts_is_whole_or_not_there() {
    let server = S3::start();
    let folder = tempfile::tempdir().unwrap();
    let (tar, work) = (large(folder.path()), folder.path().join("work"));
    let format = ["--format", "webdataset"];
    for broken in ["partNumber=2", "POST "] {
        let failing = proxy_by_request(server.port, move |_, request| {
            // Of the POSTs only the one that makes an object of the parts names an upload.
            let is_hit = request.contains(broken) && request.contains("uploadId=");
            if is_hit { Fault::ServerError } else { Fault::None }
        });
        let failed = run(&[&tar], failing, &work, &format);
        assert_eq!(failed.status.code(), Some(2), "{broken}: {}", stderr(&failed));
        assert!(stderr(&failed).contains("the store is in trouble"), "{broken}: {}", stderr(&failed));
        assert!(get(&server, "captions-0.tar").is_none(), "{broken}");
        assert_eq!(journal_rows(&journal(&work)).len(), 18, "{broken}");
        let (_, uploads) = server.request("GET", "/bucket?uploads", b"");
        assert!(!String::from_utf8_lossy(&uploads).contains("<UploadId>"), "{broken}: parts were left");
    }
    let rest = run(&[&tar], server.port, &work, &format);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    let local = folder.path().join("local");
    assert_eq!(crate::resume::run(&[&tar], &local, &format).status.code(), Some(0));
    let (here, there) = (std::fs::read(local.join("captions-0.tar")).unwrap(), get(&server, "captions-0.tar").unwrap());
    assert!(here.len() > 17 << 20 && here == there);
}

#[test]
fn kills_of_a_run_into_a_store_cost_nothing_that_was_finished() {
    let server = S3::start();
    let folder = tempfile::tempdir().unwrap();
    let (inputs, work) = (tars(folder.path(), 2, 12), folder.path().join("work"));
    let inputs = paths(&inputs);
    let (mut kills, mut kept) = (0, 0);
    for round in 0..5 {
        let mut child = command(&inputs, server.port, &work, &["--quiet"]).spawn().unwrap();
        // Shard 0 is done in steps; then its commit, and shard 1, are hit after some time.
        if !wait_for_rows(&work, kept + 3, &mut child) {
            break;
        }
        std::thread::sleep(Duration::from_millis(37 * round));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        }
        if get(&server, "captions-0.parquet").is_some() {
            break;
        }
        let rows = journal_rows(&journal(&work)).len();
        assert!(rows >= kept + 3, "rows were lost: {rows} after {kept}");
        kept = rows.min(9);
    }
    assert!(kills > 0);
    let rest = run(&inputs, server.port, &work, &[]);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    let local = folder.path().join("local");
    assert_eq!(crate::resume::run(&inputs, &local, &[]).status.code(), Some(0));
    download(&server, &folder.path().join("downloaded"), 2);
    assert_eq!(parquet_rows(&folder.path().join("downloaded")), parquet_rows(&local));
    let (_, claims) = server.request("GET", "/bucket?list-type=2&prefix=out/claims", b"");
    assert!(!String::from_utf8_lossy(&claims).contains("<Key>"), "no claim is left");
}

#[cfg(unix)]
#[test]
fn a_process_whose_shard_was_taken_over_while_it_slept_leaves_it() {
    let server = S3::start();
    let Case { folder, tar, .. } = case(40);
    let work = folder.path().join("work");
    let mut sleeper = command(&[&tar], server.port, &work, &["--claim-timeout", "0.5"]).spawn().unwrap();
    assert!(wait_for_rows(&work, 2, &mut sleeper), "the run ended before it was stopped: too few images");
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &sleeper.id().to_string()]).status().unwrap().success());
    };
    signal("-STOP");
    let other = run(&[&tar], server.port, &folder.path().join("other"), &["--claim-timeout", "0.5"]);
    signal("-CONT");
    assert_eq!(other.status.code(), Some(0), "{}", stderr(&other));
    let first = get(&server, "captions-0.parquet").unwrap();
    let slept = sleeper.wait_with_output().unwrap();
    assert_eq!(slept.status.code(), Some(0), "{}", stderr(&slept));
    assert!(stderr(&slept).contains("shard `0` is in work in another process"), "{}", stderr(&slept));
    assert!(get(&server, "captions-0.parquet").unwrap() == first, "the shard is the other's");
    // Had it been past its last look, it would have written the same: as a run that takes no claims does here.
    assert_eq!(server.request("DELETE", "/bucket/out/captions-0.parquet", b"").0, 204);
    let late = run(&[&tar], server.port, &work, &["--no-claims"]);
    assert_eq!(late.status.code(), Some(0), "{}", stderr(&late));
    assert!(get(&server, "captions-0.parquet").unwrap() == first);
}
