//! A panic in any stage ends the run with its message, whatever the other stages are doing: no hang, no half file.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use recaption::Stage;

use crate::support::{demo_bundle, demo_shard, root};

/// Far above what a run takes: a hang should fail the test, not the machine's patience.
const HANG: Duration = Duration::from_secs(120);

#[test]
fn a_panic_in_any_stage_ends_the_run_with_its_message() {
    let (bundle, shard) = (demo_bundle(), demo_shard());
    for stage in Stage::ALL {
        // At the first item, and in the middle, when the channels are full.
        for at in [0, 5] {
            let out = tempfile::tempdir().unwrap();
            let mut child = Command::new(env!("CARGO_BIN_EXE_recaption"))
                .args(["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap()])
                .args(["--slots", "4", "--vision-batch", "2", "--out", out.path().to_str().unwrap()])
                .args(["--inject-panic", &format!("{stage}:{at}"), "--provider", "cpu"])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let status = wait(&mut child, &format!("{stage}:{at}"));
            let mut message = String::new();
            child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
            assert_eq!(status.code(), Some(2), "{stage}:{at}: {message}");
            assert!(message.contains(&format!("error: {stage} stage panicked: injected")), "{stage}:{at}: {message}");
            let captions = std::fs::read_dir(out.path())
                .unwrap()
                .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("captions-"));
            assert_eq!(captions.count(), 0, "{stage}:{at} left a file of an unfinished shard");
        }
    }
}

/// Waits for the process, and fails the test when it hangs.
fn wait(child: &mut Child, what: &str) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > HANG {
            child.kill().unwrap();
            panic!("{what} hangs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A run that reads paths from a pipe which stays open and silent.
fn run_on_an_idle_pipe(extra: &[&str]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", "-", "--model", demo_bundle().to_str().unwrap(), "--max-new-tokens", "3", "--provider", "cpu"])
        .args(extra)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let image = root("tests/data/images/42/a.png");
    writeln!(child.stdin.as_mut().unwrap(), "{}", image.display()).unwrap();
    child
}

#[test]
fn a_silent_pipe_on_standard_input_does_not_hold_a_failed_run() {
    let mut child = run_on_an_idle_pipe(&["--inject-panic", "load"]);
    let pipe = child.stdin.take();
    assert_eq!(wait(&mut child, "a failed run on an idle pipe").code(), Some(2));
    drop(pipe);
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130_after_what_is_in_flight() {
    let mut child = run_on_an_idle_pipe(&[]);
    let pipe = child.stdin.take();
    let mut rows = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(rows.next().unwrap().unwrap().contains("\"status\":\"ok\""), "the first image is captioned");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(wait(&mut child, "an interrupted run").code(), Some(130));
    assert!(rows.next().is_none());
    drop(pipe);
}
