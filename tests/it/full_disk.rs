//! A disk that is really full: a small tmpfs, mounted in a namespace of its own. Skipped, and said so, where mounting is not
//! allowed.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Output};

use crate::resume::{Case, journal_rows, run};
use crate::support::{demo_bundle, demo_samples, stderr, write_tar};

const NUM_IMAGES: usize = 40;

/// Runs `script` where it may mount; `None` where nobody may.
fn in_namespace(script: &str, arguments: &[&str]) -> Option<Output> {
    let unshare = |script: &str, arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]).args(arguments).output()
    };
    let probe = unshare("mount -t tmpfs -o size=1m tmpfs /mnt", &[]);
    if !probe.as_ref().is_ok_and(|probe| probe.status.success()) {
        println!("SKIPPED: no tmpfs can be mounted here ({probe:?})");
        return None;
    }
    Some(unshare(script, arguments).unwrap())
}

/// A tar of images of 64 KiB each, with what follows a picture's end as ballast.
fn case() -> Case {
    let folder = tempfile::tempdir().unwrap();
    let (tar, out) = (folder.path().join("0.tar"), folder.path().join("out"));
    let samples = demo_samples();
    let member = |index: usize| {
        let mut image = samples[index % samples.len()].0.clone();
        image.resize(1 << 16, index as u8);
        (format!("{index:04}.jpg"), image)
    };
    write_tar(&tar, &(0..NUM_IMAGES).map(member).collect::<Vec<_>>());
    Case { folder, tar, out }
}

/// Runs with `--out` on a tmpfs of `size`; afterwards the same path is on the large disk below.
fn run_on_small_disk(case: &Case, size: &str, extra: &[&str]) -> Option<Output> {
    let copy = case.folder.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    // The copy comes from behind the run, whose exit code is what counts.
    let script = "mount -t tmpfs -o size=$1 tmpfs $2 || exit 99; small=$2; copy=$3; shift 3; \"$@\"; code=$?; \
                  cp -a $small/. $copy && exit $code";
    std::fs::create_dir(&case.out).unwrap();
    let bundle = demo_bundle();
    let small = case.out.to_str().unwrap();
    let recaption = [env!("CARGO_BIN_EXE_recaption"), "run", case.tar.to_str().unwrap(), "--out", small];
    let rest = ["--model", bundle.to_str().unwrap(), "--max-new-tokens", "3", "--provider", "cpu"];
    let sizes = [size, small, copy.to_str().unwrap()];
    let format = ["--format", "webdataset"];
    let output = in_namespace(script, &[&sizes[..], &recaption, &rest, &format, extra].concat())?;
    std::fs::remove_dir(&case.out).unwrap();
    std::fs::rename(copy, &case.out).unwrap();
    Some(output)
}

fn check_refusal(output: &Output) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("error: ") && message.contains("No space left on device"), "{message}");
    assert!(message.contains("hint: free some space; with --out the same command goes on"), "{message}");
}

/// Goes on, on the large disk, and compares with a run that nobody disturbed.
fn check_the_rest(case: &Case, num_kept: usize, extra: &[&str]) {
    let format = [&["--format", "webdataset"][..], extra].concat();
    let rest = run(&[&case.tar], &case.out, &format);
    assert_eq!(rest.status.code(), Some(0), "{}", stderr(&rest));
    let told = match num_kept {
        1 => "1 of the rows is of an earlier run or another process, and was not done again".to_owned(),
        _ => format!("{num_kept} of the rows are of earlier runs or other processes, and were not done again"),
    };
    assert!(stderr(&rest).contains(&told), "{}", stderr(&rest));
    let undisturbed = case.folder.path().join("undisturbed");
    assert_eq!(run(&[&case.tar], &undisturbed, &format[..2]).status.code(), Some(0));
    let name = "captions-0.tar";
    assert!(std::fs::read(case.out.join(name)).unwrap() == std::fs::read(undisturbed.join(name)).unwrap());
    let names = |folder: &Path| -> Vec<_> {
        let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&case.out), names(&undisturbed), "nothing is left over");
}

#[test]
fn a_disk_that_the_journal_fills_costs_the_images_in_flight() {
    let case = case();
    let Some(output) = run_on_small_disk(&case, "1m", &[]) else { return };
    check_refusal(&output);
    let kept = journal_rows(&case.out.join("journal/0.journal")).len();
    assert!((8..NUM_IMAGES).contains(&kept), "{kept} rows are in a journal of up to 1 MiB");
    println!("disk full after {kept} of {NUM_IMAGES} rows: {}", stderr(&output).lines().last().unwrap_or_default());
    check_the_rest(&case, kept, &[]);
}

#[test]
fn a_disk_that_a_shards_file_fills_costs_nothing_and_is_not_left_full() {
    let case = case();
    let work = case.folder.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let work_dir = ["--work-dir", work.to_str().unwrap()];
    let Some(output) = run_on_small_disk(&case, "2m", &work_dir) else { return };
    check_refusal(&output);
    let journal = std::fs::read_dir(&work).unwrap().next().unwrap().unwrap().path().join("journal/0.journal");
    assert_eq!(journal_rows(&journal).len(), NUM_IMAGES, "every row is kept");
    let names: Vec<_> = std::fs::read_dir(&case.out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with("captions-")), "{names:?}");
    check_the_rest(&case, NUM_IMAGES, &work_dir);
}
