//! Images per second of one core, from a file's bytes to the normalised tensor, stage by stage; and, for
//! `scripts/bench_preprocess.sh`, a worker that does the pictures of a folder when it is told to.
//!
//! `cargo bench --bench pixels -- [FOLDER] [pad|crop]` prints a table; `--serve` as the first argument makes it the worker.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use recaption::export::{PixelLayout, Preprocessing};
use recaption::pipeline::load::{LoadLimits, Loader};
use recaption::pipeline::preprocess::{PixelFormat, Preprocessor};
use serde_json::json;
use sha2::{Digest, Sha256};

const SIDE: u32 = 336;
const ROUNDS: usize = 7;

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench" && arg != "--test").collect();
    let is_worker = args.first().is_some_and(|arg| arg == "--serve");
    if is_worker {
        args.remove(0);
    }
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fetched/preprocess/web");
    let folder = args.first().map_or(default, PathBuf::from);
    let is_padded = args.get(1).is_none_or(|mode| mode == "pad");
    let Some(pictures) = Pictures::read(&folder) else {
        println!("no pictures in `{}`: scripts/bench_preprocess.sh makes them", folder.display());
        return;
    };
    let settings = settings(is_padded);
    if is_worker {
        serve(&pictures, &settings);
    } else {
        report(&pictures, &settings);
    }
}

fn settings(is_padded: bool) -> Preprocessing {
    let kind = if is_padded { "LlavaImageProcessor" } else { "CLIPImageProcessor" };
    let config = json!({"image_processor_type": kind, "do_pad": is_padded,
        "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}});
    Preprocessing::from_hf(&config, SIDE).expect("settings")
}

struct Pictures(Vec<(String, Vec<u8>)>);

impl Pictures {
    fn read(folder: &Path) -> Option<Self> {
        let mut files: Vec<_> = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let read = |path: PathBuf| {
            Some((path.file_name()?.to_string_lossy().into_owned(), std::fs::read(&path).expect("a readable file")))
        };
        let pictures: Vec<_> = files.into_iter().filter_map(read).collect();
        (!pictures.is_empty()).then_some(Self(pictures))
    }
}

/// What a load thread and a preprocess thread have, in one.
struct Worker {
    loader: Loader,
    preprocessor: Preprocessor,
    memory: Vec<u8>,
    values: Vec<f32>,
}

impl Worker {
    fn new(settings: &Preprocessing) -> Self {
        let preprocessor = Preprocessor::new(settings.clone());
        let values = vec![0.0; preprocessor.num_values()];
        let loader = Loader::new(LoadLimits::default(), Some(settings.clone()));
        Self { loader, preprocessor, memory: Vec::new(), values }
    }

    fn run(&mut self, bytes: &[u8]) {
        let image = self.loader.load(bytes, std::mem::take(&mut self.memory)).expect("a picture");
        self.preprocessor.run(&image, &mut self.values).expect("a tensor");
        self.memory = image.pixels;
    }
}

fn serve(pictures: &Pictures, settings: &Preprocessing) {
    let mut worker = Worker::new(settings);
    for command in std::io::stdin().lock().lines().map_while(Result::ok) {
        let mut seconds = 0.0;
        match command.split_once(' ') {
            None => {
                let start = Instant::now();
                for (_, bytes) in &pictures.0 {
                    worker.run(bytes);
                    black_box(&worker.values);
                }
                seconds = start.elapsed().as_secs_f64();
            }
            Some((_, folder)) => {
                for (name, bytes) in &pictures.0 {
                    worker.run(bytes);
                    let tensor: Vec<u8> = worker.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    std::fs::write(Path::new(folder).join(format!("{name}.f32")), tensor).expect("a file");
                }
            }
        }
        println!("{seconds}");
        let _ = std::io::stdout().flush();
    }
}

/// Median seconds of one pass over all pictures.
fn median(mut pass: impl FnMut()) -> f64 {
    pass();
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            pass();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[ROUNDS / 2]
}

fn report(pictures: &Pictures, settings: &Preprocessing) {
    let mut worker = Worker::new(settings);
    let images: Vec<_> =
        pictures.0.iter().map(|(_, bytes)| worker.loader.load(bytes, Vec::new()).expect("a picture")).collect();
    let num_pixels: u64 = images.iter().map(|image| u64::from(image.width) * u64::from(image.height)).sum();
    let num_bytes: usize = pictures.0.iter().map(|(_, bytes)| bytes.len()).sum();
    let show = |stage: &str, seconds: f64| {
        let count = images.len() as f64;
        println!(
            "{stage:24} {:8.3} ms  {:7.0} images/s  {:6.0} Mpx/s",
            1e3 * seconds / count,
            count / seconds,
            num_pixels as f64 / seconds / 1e6
        );
    };
    println!(
        "{} pictures, {:.1} Mpx, {:.1} MB; one core",
        images.len(),
        num_pixels as f64 / 1e6,
        num_bytes as f64 / 1e6
    );
    show(
        "sha-256",
        median(|| {
            pictures.0.iter().for_each(|(_, bytes)| {
                black_box(Sha256::digest(bytes));
            });
        }),
    );
    let load = |worker: &mut Worker| {
        for (_, bytes) in &pictures.0 {
            let image = worker.loader.load(bytes, std::mem::take(&mut worker.memory)).expect("a picture");
            worker.memory = image.pixels;
        }
    };
    show("load", median(|| load(&mut worker)));
    let preprocess = |worker: &mut Worker| {
        for image in &images {
            worker.preprocessor.run(image, &mut worker.values).expect("a tensor");
            black_box(&worker.values);
        }
    };
    show("preprocess", median(|| preprocess(&mut worker)));
    let format = PixelFormat::new(PixelLayout::Patches { zero_point: 128 }, settings, 14);
    let mut patches = format.allocate();
    let mut preprocess = |worker: &mut Worker| {
        for image in &images {
            worker.preprocessor.preprocess(image, format, &mut patches).expect("patches");
            black_box(&patches);
        }
    };
    show("preprocess to patches", median(|| preprocess(&mut worker)));
    show("bytes to tensor", median(|| pictures.0.iter().for_each(|(_, bytes)| worker.run(bytes))));
}
