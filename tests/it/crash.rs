//! SIGKILL at random moments, over and over: every row is there once, in order, with the caption of a run that nobody
//! disturbed, and nothing that was finished is done again.
//!
//! Small here; longer by hand: `CRASH_IMAGES=2000 CRASH_SHARDS=8 CRASH_KILLS=200 CRASH_TOKENS=128 cargo test --release
//! --test it crash:: -- --nocapture`. `CRASH_SEED` gives other moments.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::resume::journal_rows;
use crate::support::{demo_bundle, demo_samples, parquet_rows, write_tar};

/// A parameter of the test, from the environment.
fn parameter(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}: no number")))
}

/// Random numbers that are the same each time (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn millis(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.next() % below.max(1))
    }
}

/// Shards of the demo's images under keys of their own.
fn make_shards(folder: &Path, num_images: u64, num_shards: u64) -> Vec<PathBuf> {
    let samples = demo_samples();
    let mut key = 0..num_images;
    let shards = (0..num_shards).map(|shard| {
        let path = folder.join(format!("{shard:05}.tar"));
        let size = num_images / num_shards + u64::from(shard < num_images % num_shards);
        let members: Vec<_> = key
            .by_ref()
            .take(size as usize)
            .flat_map(|key| {
                let (image, text) = &samples[key as usize % samples.len()];
                [(format!("{key:08}.jpg"), image.clone()), (format!("{key:08}.txt"), text.clone())]
            })
            .collect();
        write_tar(&path, &members);
        path
    });
    shards.collect()
}

struct Trial {
    shards: Vec<PathBuf>,
    bundle: PathBuf,
    format: &'static str,
    max_new_tokens: u64,
}

impl Trial {
    fn start(&self, out: &Path) -> Child {
        Command::new(env!("CARGO_BIN_EXE_recaption"))
            .arg("run")
            .args(&self.shards)
            .args(["--model", self.bundle.to_str().unwrap(), "--out", out.to_str().unwrap(), "--format", self.format])
            .args(["--max-new-tokens", &self.max_new_tokens.to_string(), "--provider", "cpu", "--threads", "1"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// How long a run takes that nobody disturbs, and its rows.
    fn reference(&self, out: &Path) -> (Duration, Vec<Value>) {
        let started = Instant::now();
        finish(self.start(out));
        (started.elapsed(), rows(out, self.format))
    }
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

fn rows(out: &Path, format: &str) -> Vec<Value> {
    match format {
        "parquet" => parquet_rows(out),
        _ => crate::support::jsonl_rows(out),
    }
}

/// Rows of the output by shard: committed, or in the journal. A shard has one or the other.
fn finished_rows(out: &Path) -> BTreeMap<String, BTreeSet<usize>> {
    let mut finished: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    for path in files(&out.join("journal"), "journal") {
        let indices = journal_rows(&path);
        let distinct: BTreeSet<usize> = indices.iter().copied().collect();
        assert_eq!(distinct.len(), indices.len(), "{} holds a row twice", path.display());
        finished.insert(path.file_stem().unwrap().to_string_lossy().into_owned(), distinct);
    }
    for path in files(out, "parquet") {
        let reader = parquet::file::reader::SerializedFileReader::new(std::fs::File::open(&path).unwrap()).unwrap();
        let num_rows = parquet::file::reader::FileReader::metadata(&reader).file_metadata().num_rows() as usize;
        let shard = path.file_stem().unwrap().to_string_lossy().strip_prefix("captions-").unwrap().to_owned();
        finished.insert(shard, (0..num_rows).collect());
    }
    finished
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths
}

/// The rows but for what tells how they came about.
fn comparable(rows: &[Value]) -> Vec<(&Value, &Value, &Value, &Value)> {
    rows.iter().map(|row| (&row["key"], &row["re_caption"], &row["num_tokens"], &row["image_sha256"])).collect()
}

fn check(out: &Path, trial: &Trial, reference: &[Value]) {
    let rows = rows(out, trial.format);
    assert_eq!(comparable(&rows), comparable(reference), "the rows of a run that nobody disturbed");
    let keys: Vec<&str> = rows.iter().map(|row| row["key"].as_str().unwrap()).collect();
    assert!(keys.is_sorted_by(|a, b| a < b), "keys are unique and in order");
    assert!(rows.iter().all(|row| row["status"] == "ok"));
    let mut left: Vec<_> = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.retain(|name| !name.to_string_lossy().starts_with("captions-"));
    left.sort();
    assert_eq!(left, ["run.json", "run.lock", "summary.json"], "nothing is left over");
    let summary = crate::support::read_json(&out.join("summary.json"));
    assert_eq!((&summary["rows"], &summary["failed"]), (&rows.len().into(), &0.into()));
}

fn setup(folder: &Path, default_tokens: u64) -> Trial {
    let (images, shards) = (parameter("CRASH_IMAGES", 80), parameter("CRASH_SHARDS", 4));
    Trial {
        shards: make_shards(folder, images, shards),
        bundle: demo_bundle(),
        format: "parquet",
        max_new_tokens: parameter("CRASH_TOKENS", default_tokens),
    }
}

#[test]
fn kills_at_any_moment_cost_nothing_that_was_finished() {
    let folder = tempfile::tempdir().unwrap();
    let trial = setup(folder.path(), 6);
    let (duration, reference) = trial.reference(&folder.path().join("reference"));
    let num_kills = parameter("CRASH_KILLS", 15);
    let mut random = Random(parameter("CRASH_SEED", 1));
    // A few are killed while they start, the others some way into the work, which goes on from kill to kill.
    let longest = parameter("CRASH_MILLIS", (duration.as_millis() as u64 / 6).clamp(100, 2000));
    let (mut kills, mut rounds, mut most_rows, mut torn) = (0, 0, 0, 0);
    while kills < num_kills {
        let out = folder.path().join(format!("out-{rounds}"));
        rounds += 1;
        let mut before: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
        loop {
            let mut child = trial.start(&out);
            if kills < num_kills {
                if !random.next().is_multiple_of(5) {
                    wait_for_progress(&out, &mut child);
                }
                std::thread::sleep(random.millis(longest));
                if child.try_wait().unwrap().is_none() {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    kills += 1;
                    torn += files(&out.join("journal"), "journal").iter().filter(|path| is_torn(path)).count();
                    let after = finished_rows(&out);
                    for (shard, rows) in &before {
                        let kept = after.get(shard).is_some_and(|after| rows.is_subset(after));
                        assert!(kept, "kill {kills}: rows of shard {shard} are lost");
                    }
                    most_rows = most_rows.max(after.values().map(BTreeSet::len).sum());
                    before = after;
                    continue;
                }
            }
            finish(child);
            break;
        }
        check(&out, &trial, &reference);
    }
    println!(
        "{kills} kills within {longest} ms of a start or a first row, {rounds} runs of {} images in {} shards, {torn} torn journals; \
         at most {most_rows} rows were finished at a kill; undisturbed {:.1} s",
        reference.len(),
        trial.shards.len(),
        duration.as_secs_f64()
    );
    assert!(most_rows > 0, "no kill came after the first row: CRASH_MILLIS is too short");
}

/// Waits until the run has written something since it was started, or is over.
fn wait_for_progress(out: &Path, child: &mut Child) {
    let written = || -> (u64, usize) {
        let journals = files(&out.join("journal"), "journal");
        // A journal may be deleted while it is looked at.
        let bytes = journals.iter().filter_map(|path| Some(std::fs::metadata(path).ok()?.len())).sum();
        (bytes, files(out, "parquet").len())
    };
    let before = written();
    while written() == before && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_torn(path: &Path) -> bool {
    let (_, whole) = crate::resume::parse_journal(&std::fs::read(path).unwrap());
    whole < std::fs::metadata(path).unwrap().len() as usize
}

#[test]
fn processes_that_share_an_output_and_are_killed_do_no_row_twice() {
    let folder = tempfile::tempdir().unwrap();
    let trial = setup(folder.path(), 6);
    let (duration, reference) = trial.reference(&folder.path().join("reference"));
    let num_kills = parameter("CRASH_KILLS", 8);
    let num_processes = parameter("CRASH_PROCESSES", 3) as usize;
    let mut random = Random(parameter("CRASH_SEED", 2));
    let longest = parameter("CRASH_MILLIS", (duration.as_millis() as u64).clamp(600, 3000));
    let (mut kills, mut rounds) = (0, 0);
    while kills < num_kills {
        let out = folder.path().join(format!("out-{rounds}"));
        rounds += 1;
        let mut children: Vec<Child> = (0..num_processes).map(|_| trial.start(&out)).collect();
        while !children.is_empty() && kills < num_kills {
            std::thread::sleep(random.millis(longest / num_processes as u64));
            let victim = random.next() as usize % children.len();
            let mut child = children.swap_remove(victim);
            if child.try_wait().unwrap().is_none() {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                children.push(trial.start(&out));
            } else {
                finish(child);
            }
        }
        children.into_iter().for_each(finish);
        // Whoever was killed last may have held shards that the others had left to it.
        finish(trial.start(&out));
        check(&out, &trial, &reference);
    }
    println!("{kills} kills of {num_processes} processes at once, {rounds} runs of {} images", reference.len());
}
