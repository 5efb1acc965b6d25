//! SIGINT and SIGTERM: what is in flight is finished, the rest is for the next run. A second one ends the process at once,
//! and costs no more.

#![cfg(unix)]

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::resume::{Case, case, journal_rows, run};
use crate::support::{demo_bundle, parquet_rows, read_json, stderr};

fn start(case: &Case, extra: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", case.tar.to_str().unwrap(), "--model", demo_bundle().to_str().unwrap()])
        .args(["--out", case.out.to_str().unwrap(), "--max-new-tokens", "3", "--provider", "cpu"])
        .args(["--slots", "2", "--vision-batch", "1"])
        .args(extra)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap().success());
}

/// Waits until some rows are in the journal.
fn wait_for_rows(journal: &Path, child: &mut Child) -> usize {
    loop {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was interrupted: too few images");
        if journal.exists() {
            let num_rows = journal_rows(journal).len();
            if num_rows >= 3 {
                return num_rows;
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn check_rest(case: &Case, at_least: usize) {
    assert!(journal_rows(&case.out.join("journal/0.journal")).len() >= at_least);
    let rest = run(&[&case.tar], &case.out, &[]);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    let rows = parquet_rows(&case.out);
    assert_eq!(rows.len(), 120);
    assert!(rows.iter().enumerate().all(|(index, row)| row["key"] == format!("{index:04}")));
}

#[test]
fn an_interrupt_keeps_what_is_finished_and_says_so() {
    for name in ["INT", "TERM"] {
        let case = case(120);
        let mut child = start(&case, &[]);
        let num_rows = wait_for_rows(&case.out.join("journal/0.journal"), &mut child);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(130), "SIG{name}: {message}");
        let kept = journal_rows(&case.out.join("journal/0.journal")).len();
        let told = match kept {
            1 => "interrupted: 1 finished row of shards in progress is kept in the journal".to_owned(),
            _ => format!("interrupted: {kept} finished rows of shards in progress are kept in the journal"),
        };
        assert!(message.contains(&told), "SIG{name}: {message}");
        assert_eq!(read_json(&case.out.join("summary.json"))["rows"], 0, "no shard is whole");
        check_rest(&case, num_rows);
    }
}

#[test]
fn a_second_interrupt_ends_the_run_at_once() {
    let case = case(120);
    let mut child = start(&case, &[]);
    let num_rows = wait_for_rows(&case.out.join("journal/0.journal"), &mut child);
    signal(&child, "INT");
    // The flag of the first one is raised in its handler: a second that comes before is the first again.
    std::thread::sleep(Duration::from_millis(2));
    signal(&child, "INT");
    let status: ExitStatus = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    check_rest(&case, num_rows);
}
