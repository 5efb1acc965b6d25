//! Memory does not grow with the number of images: rows wait in the journal, not in memory, and everything between the
//! stages is bounded.
//!
//! Images that fail at once are passed through in great numbers here; `MEMORY_IMAGES=50000` is what is published.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{demo_bundle, demo_samples, read_json, write_tar};

/// Tars of up to 10,000 members: one good image in 500, the others cut off after their header.
fn tars(folder: &Path, num_images: usize) -> Vec<std::path::PathBuf> {
    let image = &demo_samples()[0].0;
    let member = |index: usize| {
        let length = if index.is_multiple_of(500) { image.len() } else { 200 };
        (format!("{index:08}.jpg"), image[..length].to_vec())
    };
    let shard = |start: usize| {
        let path = folder.join(format!("{start:08}.tar"));
        write_tar(&path, &(start..num_images.min(start + 10_000)).map(member).collect::<Vec<_>>());
        path
    };
    (0..num_images).step_by(10_000).map(shard).collect()
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
            assert_eq!(status.code(), Some(1), "some images fail");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn memory_is_flat_in_the_number_of_images() {
    let most: usize = std::env::var("MEMORY_IMAGES").map_or(20_000, |count| count.parse().unwrap());
    let peak = |num_images: usize| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let child = Command::new(env!("CARGO_BIN_EXE_recaption"))
            .arg("run")
            .args(tars(folder.path(), num_images))
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
    assert!(many as f64 <= few as f64 * 1.05, "{few} KiB with 2000 images, {many} KiB with {most}");
}
