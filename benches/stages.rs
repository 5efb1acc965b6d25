//! Criterion: the CPU stages around the engine, one picture or row at a time.
//!
//! `cargo bench --bench stages`; a name filters, `-- --save-baseline NAME` and `-- --baseline NAME` compare. Kernels are in
//! `kernels/benches/`, the stages of the engine in `recaption profile`.

use std::hint::black_box;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder};
use recaption::export::{PixelLayout, Preprocessing};
use recaption::model::Tokenizer;
use recaption::pipeline::load::{LoadLimits, Loader, load};
use recaption::pipeline::preprocess::{PixelFormat, Preprocessor};
use recaption::pipeline::write::{Status, WrittenRow, row_to_json};
use recaption::profile::recorder::{Recorder, record_batches};
use serde_json::json;

const CAPTION: &str = "The image shows two objects on a black background. There is a small guitar in the top right, and a \
    medium-sized pretzel in the centre.";

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A picture of `width` x `height` with gradients, edges and noise, and its name.
fn picture(width: u32, height: u32) -> Vec<u8> {
    let mut noise = 1_u32;
    let mut pixels = Vec::new();
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let edge = if (x / 37 + y / 53) % 2 == 0 { 60 } else { 0 };
        let grain = noise >> 28;
        pixels
            .extend([x * 120 / width + edge, y * 120 / height + edge, 90 + edge].map(|sample| (sample + grain) as u8));
    }
    pixels
}

/// The files that are decoded: made here, or fetched photographs where they are.
fn files() -> Vec<(String, Vec<u8>)> {
    let (width, height) = (500, 375);
    let pixels = picture(width, height);
    let color = ExtendedColorType::Rgb8;
    let (mut jpeg, mut png, mut webp) = (Vec::new(), Vec::new(), Vec::new());
    JpegEncoder::new_with_quality(&mut jpeg, 90).write_image(&pixels, width, height, color).expect("a JPEG");
    PngEncoder::new(Cursor::new(&mut png)).write_image(&pixels, width, height, color).expect("a PNG");
    WebPEncoder::new_lossless(&mut webp).write_image(&pixels, width, height, color).expect("a WebP");
    let made = [("made-500x375.jpg", jpeg), ("made-500x375.png", png), ("made-500x375.webp", webp)];
    let mut files: Vec<_> = made.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
    for name in ["astronaut-337x501-q85-420.jpg", "hubble-1000x335-progressive.jpg", "retina-4234x2996-q80.jpg"] {
        if let Ok(bytes) = std::fs::read(file("tests/data/fetched/photos").join(name)) {
            files.push((name.to_owned(), bytes));
        }
    }
    files
}

fn settings(is_padded: bool) -> Preprocessing {
    let kind = if is_padded { "LlavaImageProcessor" } else { "CLIPImageProcessor" };
    let config = json!({"image_processor_type": kind, "do_pad": is_padded,
        "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}});
    Preprocessing::from_hf(&config, 336).expect("settings")
}

fn loading(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("load");
    for (name, bytes) in files() {
        let mut loader = Loader::new(LoadLimits::default(), Some(settings(true)));
        let image = loader.load(&bytes, Vec::new()).expect("a picture");
        group.throughput(Throughput::Elements(u64::from(image.width) * u64::from(image.height)));
        let mut memory = image.pixels;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                memory = loader.load(&bytes, std::mem::take(&mut memory)).expect("a picture").pixels;
            });
        });
    }
    group.finish();
}

fn preprocessing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("preprocess");
    let (_, bytes) = files().swap_remove(0);
    let image = load(&bytes, &LoadLimits::default()).expect("a picture");
    for (mode, is_padded) in [("pad", true), ("crop", false)] {
        let settings = settings(is_padded);
        for (form, layout) in [("f32", PixelLayout::Nchw), ("patches", PixelLayout::Patches { zero_point: 128 })] {
            let mut preprocessor = Preprocessor::new(settings.clone());
            let format = PixelFormat::new(layout, &settings, 14);
            let mut values = format.allocate();
            group.bench_function(format!("{mode}-{form}"), |bencher| {
                bencher.iter(|| {
                    preprocessor.preprocess(&image, format, &mut values).expect("a tensor");
                    black_box(&values);
                });
            });
        }
    }
    group.finish();
}

fn text(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tokenizer");
    let tokenizer = Tokenizer::open(&file("models/demo/tokenizer.json")).expect("a tokenizer");
    let ids = tokenizer.encode(CAPTION).expect("ids");
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("encode", |bencher| bencher.iter(|| tokenizer.encode(black_box(CAPTION)).expect("ids")));
    group.bench_function("detokenize", |bencher| bencher.iter(|| tokenizer.decode(black_box(&ids)).expect("text")));
    group.finish();
}

fn writing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write");
    let row = WrittenRow {
        key: "000000001".to_owned(),
        url: Some("https://example.org/pictures/1.jpg".to_owned()),
        org_caption: Some("best price pretzel online shop".to_owned()),
        re_caption: Some(CAPTION.to_owned()),
        status: Status::Ok,
        source: "00000.tar".to_owned(),
        ..WrittenRow::default()
    };
    group.bench_function("row to JSON", |bencher| {
        bencher.iter_batched(|| row.clone(), |row| row_to_json(&row, false), BatchSize::SmallInput);
    });
    group.finish();
}

/// What `recaption profile` and `run --metrics` add to a batch: the difference of the two.
fn recording(criterion: &mut Criterion) {
    const COUNT: usize = 50_000;
    let mut group = criterion.benchmark_group("record");
    group.throughput(Throughput::Elements(COUNT as u64));
    group.bench_function("batches", |bencher| {
        bencher.iter(|| record_batches(Some(&Recorder::new(true, None)), black_box(COUNT)));
    });
    group.bench_function("batches not recorded", |bencher| bencher.iter(|| record_batches(None, black_box(COUNT))));
    group.finish();
}

/// A minute for all: a change of some percent shows, one below does not.
fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(30)
        .without_plots()
}

criterion_group! {
    name = stages;
    config = short();
    targets = loading, preprocessing, text, writing, recording
}
criterion_main!(stages);
