//! Standard error: log events with fields as text and JSON, lines for people, and inputs that try to steer the terminal.

use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{demo_bundle, demo_shard, recaption_with, root, stderr};

/// What a terminal would obey, in the name of a file: clears the screen, sets the title, forges a line.
const HOSTILE: &str = "a\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\nerror: forged\u{202e}.jpg";

/// A folder with an image, and one that is none and has a hostile name.
fn hostile_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(root("tests/data/images/42/a.png"), folder.path().join("good.png")).unwrap();
    std::fs::write(folder.path().join(HOSTILE), "no image").unwrap();
    folder
}

fn run(input: &str, tail: &[&str], environment: &[(&str, &str)]) -> Output {
    let bundle = demo_bundle();
    let fixed = ["run", input, "--model", bundle.to_str().unwrap(), "--provider", "cpu", "--max-new-tokens", "4"];
    recaption_with(&[&fixed[..], tail].concat(), environment)
}

/// Every line of standard error, each of which must be an object.
fn events(output: &Output) -> Vec<Value> {
    let text = stderr(output);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"))).collect()
}

#[test]
fn json_logs_are_all_there_is_on_standard_error_and_never_on_standard_output() {
    let folder = hostile_folder();
    let output = run(folder.path().to_str().unwrap(), &["--log-format", "json", "--log-level", "info"], &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for line in String::from_utf8(output.stdout.clone()).unwrap().lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert!(row["key"].is_string() && row["level"].is_null(), "a log event among the rows: {row}");
    }
    let events = events(&output);
    for event in &events {
        assert!(event["timestamp"].is_string() && event["level"].is_string() && event["target"].is_string(), "{event}");
    }
    let failed = events.iter().find(|event| event["message"] == "image failed").unwrap();
    assert_eq!((&failed["stage"], &failed["level"]), (&"load".into(), &"INFO".into()));
    assert_eq!(failed["key"], HOSTILE, "the name is whole, once it is decoded");
    assert!(failed["shard"].is_string() && failed["source"].is_string() && failed["reason"].is_string());
    assert!(events.iter().any(|event| event["message"] == "shard begun"));
    let lines = events.iter().filter(|event| event["target"] == "recaption::console");
    assert!(lines.clone().any(|event| event["message"].as_str().unwrap().starts_with("captioned 1")), "{events:?}");
    assert!(lines.clone().any(|event| event["message"].as_str().unwrap().contains("1 ok, 1 failed")));
}

#[test]
fn shards_are_told_with_their_counts() {
    let out = tempfile::tempdir().unwrap();
    let (shard, out_text) = (demo_shard(), out.path().to_str().unwrap());
    let tail = ["--limit", "3", "--out", out_text, "--quiet", "--log-level", "info", "--log-format", "json"];
    let events = events(&run(shard.to_str().unwrap(), &tail, &[]));
    let written = events.iter().find(|event| event["message"] == "shard written").unwrap();
    assert_eq!((&written["shard"], &written["rows"]), (&"00000".into(), &3.into()));
    assert_eq!((&written["ok"], &written["failed"]), (&3.into(), &0.into()));
    assert!(written["path"].as_str().unwrap().ends_with("captions-00000.parquet"));
}

#[test]
fn nothing_that_an_input_says_reaches_the_terminal_raw() {
    let folder = hostile_folder();
    let input = folder.path().to_str().unwrap();
    for format in ["text", "json"] {
        let output = run(input, &["--log-format", format, "--log-level", "debug"], &[]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains(r"\u001b[2J") || text.contains(r"\u{1b}[2J"),
            "{format}: the name is shown, spelled out: {text}"
        );
        for character in text.chars().filter(|&character| character != '\n') {
            assert!(!character.is_control() && character != '\u{202e}', "{format}: {character:?} in {text}");
        }
        assert!(!text.lines().any(|line| line.starts_with("error: forged")), "{format}: a forged line: {text}");
    }
    // An error that ends the run.
    let missing = run(&format!("no-such-{HOSTILE}"), &[], &[]);
    assert_eq!(missing.status.code(), Some(2));
    let text = stderr(&missing);
    assert!(text.starts_with("error: input `no-such-a\\u001b[2J"), "{text}");
    assert!(!text.lines().any(|line| line.starts_with("error: forged")), "a forged line: {text}");
    assert!(!text.contains('\u{1b}') && !text.contains('\u{9b}'), "{text}");
}

#[test]
fn the_level_comes_from_the_flag_or_the_environment() {
    let folder = hostile_folder();
    let input = folder.path().to_str().unwrap();
    let tells_of_failures = |tail: &[&str], environment: &[(&str, &str)]| {
        let output = run(input, tail, environment);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        stderr(&output).contains("image failed")
    };
    assert!(!tells_of_failures(&[], &[]), "warnings only, where nobody asks");
    assert!(tells_of_failures(&["--log-level", "info"], &[]));
    assert!(tells_of_failures(&[], &[("RECAPTION_LOG", "recaption=info")]));
    assert!(!tells_of_failures(&["--log-level", "error"], &[("RECAPTION_LOG", "info")]), "the flag goes first");

    let wrong = run(input, &["--log-level", "recaption=loud"], &[]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("--log-level") && stderr(&wrong).contains("hint: "), "{}", stderr(&wrong));
}

/// `script` gives the run a terminal: the bar is redrawn below each event, which stays whole.
#[cfg(target_os = "linux")]
#[test]
fn the_progress_bar_and_the_log_do_not_tear_each_other() {
    let (bundle, folder) = (demo_bundle(), tempfile::tempdir().unwrap());
    for i in 0..24 {
        std::fs::copy(root("tests/data/images/42/a.png"), folder.path().join(format!("{i:02}-good.png"))).unwrap();
        std::fs::write(folder.path().join(format!("{i:02}-bad.png")), "no image").unwrap();
    }
    let command = format!(
        "{} run {} --model {} --provider cpu --slots 2 --log-level info >/dev/null",
        env!("CARGO_BIN_EXE_recaption"),
        folder.path().display(),
        bundle.display()
    );
    let output = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => panic!("{error}"),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("img/s"), "{text}");
    // What the bar draws begins at the start of a line that it has cleared.
    let events: Vec<&str> = text.split(['\r', '\n']).filter(|line| line.contains("INFO")).collect();
    assert!(events.len() >= 24, "{text}");
    for event in events {
        let event = event.trim_start_matches("\u{1b}[2K").trim_start_matches("\u{1b}[1A");
        assert!(event.contains("INFO recaption"), "torn: {event:?} in {text}");
        assert!(!event.contains("img/s"), "torn: {event:?}");
    }
}
