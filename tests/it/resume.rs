//! A run that ended before its time goes on: after what the journal holds, and only with the same input and settings.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::support::{demo_bundle, demo_samples, jsonl_rows, parquet_rows, read_json, root, stderr, write_tar};

/// The records of a journal, and how many bytes they take: what follows is torn.
pub(crate) fn parse_journal(bytes: &[u8]) -> (Vec<&[u8]>, usize) {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some((prefix, rest)) = bytes[at..].split_first_chunk::<8>() {
        let length = u32::from_le_bytes(prefix[..4].try_into().unwrap()) as usize;
        let Some(payload) = rest.get(..length).filter(|payload| !payload.is_empty()) else { break };
        if crc32fast::hash(payload).to_le_bytes() != prefix[4..] {
            break;
        }
        records.push(payload);
        at += 8 + length;
    }
    (records, at)
}

/// Indices of the rows in a journal, in the order they were finished.
pub(crate) fn journal_rows(path: &Path) -> Vec<usize> {
    let bytes = std::fs::read(path).unwrap();
    let (records, _) = parse_journal(&bytes);
    let row = |payload: &&[u8]| -> Value {
        let length = u32::from_le_bytes(payload[..4].try_into().unwrap()) as usize;
        serde_json::from_slice(&payload[4..4 + length]).unwrap()
    };
    records.iter().skip(1).map(|payload| row(payload)["index"].as_u64().unwrap() as usize).collect()
}

pub(crate) struct Case {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) tar: PathBuf,
    pub(crate) out: PathBuf,
}

/// A tar of `num_images` of the demo's.
pub(crate) fn case(num_images: usize) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let tar = folder.path().join("0.tar");
    let samples = demo_samples();
    let member = |index: usize| (format!("{index:04}.jpg"), samples[index % samples.len()].0.clone());
    write_tar(&tar, &(0..num_images).map(member).collect::<Vec<_>>());
    let out = folder.path().join("out");
    Case { folder, tar, out }
}

pub(crate) fn run(inputs: &[&Path], out: &Path, extra: &[&str]) -> Output {
    spawn(inputs, out, extra).wait_with_output().unwrap()
}

/// As [`run`], which it starts.
pub(crate) fn spawn(inputs: &[&Path], out: &Path, extra: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_recaption"));
    command.arg("run").args(inputs).arg("--model").arg(demo_bundle()).arg("--out").arg(out);
    command.args(["--max-new-tokens", "3", "--provider", "cpu", "--slots", "2", "--vision-batch", "1"]).args(extra);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs until the journal refuses its record `count` (the header is record 0), as a full disk would.
fn run_to_record(case: &Case, count: usize, extra: &[&str]) -> Output {
    let fault = format!("journal-write:{count}:enospc");
    let output = run(&[&case.tar], &case.out, &[&["--inject-io-error", &fault], extra].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    output
}

fn journal(case: &Case) -> PathBuf {
    case.out.join("journal/0.journal")
}

fn captions(rows: &[Value]) -> Vec<(&Value, &Value)> {
    rows.iter().map(|row| (&row["key"], &row["re_caption"])).collect()
}

#[test]
fn a_full_or_broken_disk_ends_the_run_and_loses_nothing() {
    let whole = case(12);
    assert_eq!(run(&[&whole.tar], &whole.out, &[]).status.code(), Some(0));
    let expected = parquet_rows(&whole.out);
    let faults = [
        ("journal-write:0", 0),
        ("journal-write:7", 6),
        ("journal-sync:1", 1),
        ("commit-write:0", 0),
        ("commit-write:1", 12),
        ("commit-sync:1", 12),
        ("commit-rename:1", 12),
    ];
    for (fault, least_rows) in faults {
        for (kind, told) in [("enospc", "free some space"), ("eio", "see to the disk")] {
            let case = case(12);
            let output = run(
                &[&case.tar],
                &case.out,
                &["--inject-io-error", &format!("{fault}:{kind}"), "--sync-interval", "0"],
            );
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{fault}:{kind}: {message}");
            // `run.json` is the first file that is written whole: without it there is no run to go on with.
            if least_rows > 0 {
                assert!(journal_rows(&journal(&case)).len() >= least_rows, "{fault}:{kind}");
            }
            assert!(message.contains("error: ") && message.contains(told), "{fault}:{kind}: {message}");
            assert!(!case.out.join("captions-0.parquet").exists());
            assert!(!case.out.join("captions-0.parquet.tmp").exists());
            let again = run(&[&case.tar], &case.out, &[]);
            assert_eq!(again.status.code(), Some(0), "{fault}:{kind}: {}", stderr(&again));
            assert_eq!(captions(&parquet_rows(&case.out)), captions(&expected), "{fault}:{kind}");
            assert!(!journal(&case).exists());
        }
    }
}

/// Changes the bytes of a file.
type Damage = fn(&mut Vec<u8>);

#[test]
fn a_torn_or_damaged_journal_gives_back_what_is_whole() {
    let whole = case(12);
    assert_eq!(run(&[&whole.tar], &whole.out, &[]).status.code(), Some(0));
    let expected = parquet_rows(&whole.out);
    let damage: [(&str, Damage, usize); 6] = [
        ("cut within the last record", |bytes| bytes.truncate(bytes.len() - 3), 7),
        ("zeros behind it, as after a power loss", |bytes| bytes.extend([0; 4096]), 8),
        ("a length beyond the file", |bytes| bytes.extend([0xff; 9]), 8),
        ("a flipped bit in the last record", |bytes| *bytes.last_mut().unwrap() ^= 1, 7),
        ("only half a header", |bytes| bytes.truncate(20), 0),
        ("empty", Vec::clear, 0),
    ];
    for (what, damage, left) in damage {
        let case = case(12);
        run_to_record(&case, 9, &[]);
        let path = journal(&case);
        let mut bytes = std::fs::read(&path).unwrap();
        assert_eq!(journal_rows(&path).len(), 8, "{what}");
        damage(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let again = run(&[&case.tar], &case.out, &["--inject-io-error", "commit-rename:0:eio"]);
        assert_eq!(again.status.code(), Some(2), "{what}: {}", stderr(&again));
        let after = std::fs::read(&path).unwrap();
        let (_, whole_bytes) = parse_journal(&bytes);
        if left > 0 {
            assert_eq!(after[..whole_bytes], bytes[..whole_bytes], "{what}: what is whole stays as it is");
        }
        assert_eq!(journal_rows(&path).len(), 12, "{what}");
        assert_eq!(run(&[&case.tar], &case.out, &[]).status.code(), Some(0), "{what}");
        assert_eq!(captions(&parquet_rows(&case.out)), captions(&expected), "{what}");
    }
}

#[test]
fn a_changed_input_or_setting_is_refused_in_the_middle_of_a_shard() {
    let case = case(12);
    run_to_record(&case, 6, &[]);
    let output = run(&[&case.tar], &case.out, &["--prompt", "Another."]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("was written with other settings: prompt was"), "{}", stderr(&output));

    let other = case_of_keys(&case, 5..17);
    let output = run(&[&other], &case.out, &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("has shard `0` of other images"), "{}", stderr(&output));
    assert_eq!(journal_rows(&journal(&case)).len(), 5, "the journal is as it was");
}

fn case_of_keys(case: &Case, keys: std::ops::Range<usize>) -> PathBuf {
    let folder = case.folder.path().join("other");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("0.tar");
    let image = &demo_samples()[0].0;
    write_tar(&path, &keys.map(|key| (format!("{key:04}.jpg"), image.clone())).collect::<Vec<_>>());
    path
}

#[test]
fn files_that_come_in_another_order_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    for name in ["b", "c", "d", "e"] {
        std::fs::write(images.join(format!("{name}.jpg")), &demo_samples()[0].0).unwrap();
    }
    let out = folder.path().join("out");
    let cut = run(&[&images], &out, &["--inject-io-error", "journal-write:4:enospc"]);
    assert_eq!(cut.status.code(), Some(2));
    std::fs::write(images.join("a.jpg"), &demo_samples()[0].0).unwrap();
    let output = run(&[&images], &out, &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("of other images"), "{}", stderr(&output));
    std::fs::remove_file(images.join("a.jpg")).unwrap();
    assert_eq!(run(&[&images], &out, &[]).status.code(), Some(0));
    assert_eq!(parquet_rows(&out).len(), 4);
}

#[test]
fn a_run_that_has_gone_wrong_stops_and_keeps_its_rows() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    for index in 0..300 {
        std::fs::write(images.join(format!("{index:03}.jpg")), [&[0xff, 0xd8, 0xff][..], &vec![0; index]].concat())
            .unwrap();
    }
    let out = folder.path().join("out");
    let output = run(&[&images], &out, &["--max-failures", "20"]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("21 of 21 images failed, more than --max-failures allows: "), "{message}");
    assert!(message.contains("× load: ") && message.contains("--retry-failed"), "{message}");
    assert!(journal_rows(&out.join("journal/images-00000.journal")).len() >= 21);

    let share = run(&[&images], &out, &["--max-failures", "50%"]);
    assert_eq!(share.status.code(), Some(2), "{}", stderr(&share));
    assert!(stderr(&share).contains("100 of 100 images failed"), "{}", stderr(&share));
    let rest = run(&[&images], &out, &[]);
    assert_eq!(rest.status.code(), Some(1), "{}", stderr(&rest));
    let summary = read_json(&out.join("summary.json"));
    assert_eq!((&summary["rows"], &summary["failed"]), (&300.into(), &300.into()));
    let by_reason: u64 = summary["failures"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(by_reason, 300);
    assert!(summary["failures"].as_object().unwrap().len() < 10, "{}", summary["failures"]);
    assert!(stderr(&rest).contains("failed: "), "{}", stderr(&rest));
}

#[test]
fn only_failed_rows_are_done_again() {
    for format in ["parquet", "jsonl", "webdataset"] {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        std::fs::create_dir(&images).unwrap();
        for (index, (image, _)) in demo_samples().iter().take(6).enumerate() {
            let cut = if [1, 4].contains(&index) { 20 } else { image.len() };
            std::fs::write(images.join(format!("{index}.jpg")), &image[..cut]).unwrap();
        }
        let out = folder.path().join("out");
        let format_args = ["--format", format];
        let first = run(&[&images], &out, &format_args);
        assert_eq!(first.status.code(), Some(1), "{format}: {}", stderr(&first));
        let before = rows(&out, format);
        assert_eq!(before.iter().filter(|row| row["status"] == "failed").count(), 2, "{format}");

        std::fs::write(images.join("1.jpg"), &demo_samples()[1].0).unwrap();
        // Without the flag failed rows are done.
        assert_eq!(run(&[&images], &out, &format_args).status.code(), Some(1), "{format}");
        assert_eq!(rows(&out, format), before, "{format}");
        // A retry that is cut short leaves the file as it is, and goes on.
        let retry = [&format_args[..], &["--retry-failed"]].concat();
        let cut = run(&[&images], &out, &[&retry[..], &["--inject-io-error", "commit-rename:0:eio"]].concat());
        assert_eq!(cut.status.code(), Some(2), "{format}: {}", stderr(&cut));
        assert_eq!(rows(&out, format), before, "{format}");
        let again = run(&[&images], &out, &retry);
        assert_eq!(again.status.code(), Some(1), "{format}: {}", stderr(&again));
        let after = rows(&out, format);
        assert_eq!(after.len(), 6, "{format}");
        for (before, after) in before.iter().zip(&after) {
            match before["key"].as_str().unwrap() {
                "1.jpg" => assert_eq!(after["status"], "ok", "{format}"),
                _ => assert_eq!(after, before, "{format}"),
            }
        }
        let summary = read_json(&out.join("summary.json"));
        assert_eq!(
            (&summary["rows"], &summary["ok"], &summary["failed"]),
            (&6.into(), &5.into(), &1.into()),
            "{format}"
        );
    }
}

fn rows(out: &Path, format: &str) -> Vec<Value> {
    match format {
        "parquet" => parquet_rows(out),
        "jsonl" => jsonl_rows(out),
        _ => {
            let mut archive = tar::Archive::new(std::fs::File::open(out.join("captions-images-00000.tar")).unwrap());
            let mut rows = Vec::new();
            let mut bytes = Vec::new();
            for member in archive.entries().unwrap() {
                let mut member = member.unwrap();
                bytes.clear();
                std::io::Read::read_to_end(&mut member, &mut bytes).unwrap();
                if member.path_bytes().ends_with(b".json") {
                    rows.push(serde_json::from_slice(&bytes).unwrap());
                }
            }
            rows
        }
    }
}

#[test]
fn an_output_folder_that_is_gone_is_told() {
    let case = case(4);
    let image = root("tests/data/images/42/a.png");
    let file = case.folder.path().join("file");
    std::fs::copy(image, &file).unwrap();
    let output = run(&[&case.tar], &file.join("out"), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).starts_with("error: ") || stderr(&output).contains("\nerror: "), "{}", stderr(&output));
}
