//! Memory does not grow with the number of images: rows wait in the journal, not in memory, and everything between the
//! stages is bounded.
//!
//! The journal's index and a row group in the making grow with the shard, so shards are of one size (`MEMORY_SHARD`).
//!
//! Most images fail at once here, so that many are passed through in little time. By hand, with good ones only and a release
//! build: `MEMORY_IMAGES=50000 MEMORY_GOOD_EVERY=1 MEMORY_BINARY=target/release/recaption cargo test --test it memory:: --
//! --nocapture`.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{demo_bundle, demo_samples, read_json, write_tar};

/// A parameter of the test, from the environment.
fn parameter(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}: no number")))
}

/// Tars of `shard_size` members: one good image in `good_every`, the others cut off after their header.
fn tars(folder: &Path, num_images: usize, shard_size: usize, good_every: usize) -> Vec<std::path::PathBuf> {
    let samples = demo_samples();
    let member = |index: usize| {
        let image = &samples[index % samples.len()].0;
        let length = if index.is_multiple_of(good_every) { image.len() } else { 200 };
        (format!("{index:08}.jpg"), image[..length].to_vec())
    };
    let shard = |start: usize| {
        let path = folder.join(format!("{start:08}.tar"));
        write_tar(&path, &(start..num_images.min(start + shard_size)).map(member).collect::<Vec<_>>());
        path
    };
    (0..num_images).step_by(shard_size).map(shard).collect()
}

/// Peak resident memory of a run, in KiB.
fn peak_memory(mut child: Child) -> u64 {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(peak);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(matches!(status.code(), Some(0 | 1)), "{status}: some images fail, the run does not");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn memory_is_flat_in_the_number_of_images() {
    let (most, good_every) = (parameter("MEMORY_IMAGES", 12_000), parameter("MEMORY_GOOD_EVERY", 500));
    let shard_size = parameter("MEMORY_SHARD", 1000);
    let binary = std::env::var("MEMORY_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_recaption").to_owned());
    let peak = |num_images: usize| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let child = Command::new(&binary)
            .arg("run")
            .args(tars(folder.path(), num_images, shard_size, good_every))
            .args(["--model", demo_bundle().to_str().unwrap(), "--out", out.to_str().unwrap(), "--provider", "cpu"])
            .args(["--max-new-tokens", "2", "--quiet", "--threads", "1"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let peak = peak_memory(child);
        assert_eq!(read_json(&out.join("summary.json"))["rows"], num_images);
        peak
    };
    let (few, many) = (peak(2_000), peak(most));
    println!("peak resident memory: {few} KiB with 2000 images, {many} KiB with {most}");
    // A few hundredths come and go with the moments at which threads allocate: a short run must not fail for those.
    let bound = if most >= 50_000 { 1.05 } else { 1.1 };
    assert!(many as f64 <= few as f64 * bound, "{few} KiB with 2000 images, {many} KiB with {most}");
}
