//! A panic in any stage ends the run with its message, whatever the other stages are doing: no hang, no half file.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use recaption::Stage;

use crate::support::{demo_bundle, demo_shard};

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
                .args(["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"])
                .args(["--slots", "4", "--vision-batch", "2", "--out", out.path().to_str().unwrap()])
                .args(["--inject-panic", &format!("{stage}:{at}"), "--provider", "cpu"])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let started = Instant::now();
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                if started.elapsed() > HANG {
                    child.kill().unwrap();
                    panic!("{stage}:{at} hangs");
                }
                std::thread::sleep(Duration::from_millis(20));
            };
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
