//! The fuzz targets on their seeds and on random damage of those: what `scripts/fuzz.sh` does for hours, without cargo-fuzz.

use std::path::{Path, PathBuf};

use crate::support::root;

#[path = "../../fuzz/src/export.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate's own file")]
mod export;
#[path = "../../fuzz/src/kernels.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate's own file")]
mod kernels;
#[path = "../../fuzz/src/run.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate's own file")]
mod run;

/// Damaged copies of each seed; more with the environment's `RECAPTION_FUZZ_COPIES`.
const NUM_COPIES: u64 = 20;

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// A small generator (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed >> 32) as usize * end.max(1)) >> 32
    }

    /// Some bytes changed, or a stretch of them cut out or doubled.
    fn damage(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(4) {
            let (from, length) = (self.below(bytes.len()), 1 + self.below(16));
            let to = bytes.len().min(from + length);
            match self.below(5) {
                0 => drop(bytes.drain(from..to)),
                1 => {
                    let copy = bytes[from..to].to_vec();
                    drop(bytes.splice(from..from, copy));
                }
                2 => bytes.truncate(from.max(bytes.len() / 2)),
                3 => bytes[from..to].fill(if self.below(2) == 0 { 0xff } else { 0 }),
                _ if !bytes.is_empty() => bytes[from] = self.below(256) as u8,
                _ => {}
            }
        }
        bytes
    }
}

fn try_all(target: &str, parse: fn(&[u8])) {
    let num_copies = std::env::var("RECAPTION_FUZZ_COPIES").map_or(NUM_COPIES, |count| count.parse().unwrap());
    let mut random = Random(1);
    let seeds = files(&root("fuzz/seeds").join(target));
    assert!(!seeds.is_empty());
    for path in seeds {
        let seed = std::fs::read(&path).unwrap();
        parse(&seed);
        for _ in 0..num_copies {
            parse(&random.damage(&seed));
        }
    }
    parse(&[]);
}

/// A fuzz target's function.
type Target = fn(&[u8]);

#[test]
fn every_target_takes_its_seeds_and_damaged_copies() {
    let targets: [(&str, Target); 11] = [
        ("image", run::image),
        ("tar", run::tar),
        ("parquet", run::parquet),
        ("journal", run::journal),
        ("sidecar", run::sidecar),
        ("text", run::text),
        ("tokenizer", run::tokenizer),
        ("weights", export::weights),
        ("checkpoint", export::checkpoint),
        ("bundle", export::bundle),
        ("kernels", kernels::kernels),
    ];
    for (target, parse) in targets {
        try_all(target, parse);
    }
}

#[test]
fn seeds_are_whole() {
    for path in files(&root("fuzz/seeds/image")) {
        let bytes = std::fs::read(&path).unwrap();
        let limits = recaption::pipeline::load::LoadLimits::default();
        recaption::pipeline::load::load(&bytes, &limits).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let count = |name: &str| {
        let input = recaption::pipeline::input::Input::Tar(root("fuzz/seeds/tar").join(name).into());
        recaption::fuzzing::source(input, &Default::default())
    };
    assert_eq!(count("plain.tar"), (1, 1));
    assert_eq!(count("pax.tar"), (1, 1));
    let input = recaption::pipeline::input::Input::Parquet(root("fuzz/seeds/parquet/small.parquet").into());
    assert_eq!(recaption::fuzzing::source(input, &Default::default()), (2, 1));
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal");
    std::fs::copy(root("fuzz/seeds/journal/two-rows"), &journal).unwrap();
    assert_eq!(recaption::fuzzing::replay_journal(&journal).unwrap(), 2);
    for (name, is_torch) in [("zip.bin", true), ("one.safetensors", false)] {
        let bytes = std::fs::read(root("fuzz/seeds/weights").join(name)).unwrap();
        assert_eq!(recaption::export::fuzzing::weights(&bytes[1..], is_torch).unwrap(), 1, "{name}");
    }
}
