//! Criterion: each kernel on one thread at this processor's level, in the shapes of a 135M decoder with a ViT-B.
//!
//! `cargo bench -p recaption-kernels --bench criterion`; a name filters, `-- --save-baseline NAME` and `-- --baseline NAME`
//! compare. The other bench here, `kernels`, sets speeds beside the machine's limits, which criterion cannot.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use recaption_kernels::pixels::{self, Rows, WEIGHT_BITS, Weights};
use recaption_kernels::*;

fn level() -> Level {
    Level::current().expect("a level")
}

fn linears(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear");
    for (name, k, columns, gated, rows) in [
        ("decode qkv", 576, 960, false, 16),
        ("decode gate+up", 576, 1536, true, 16),
        ("decode down", 1536, 576, false, 16),
        ("prefill gate+up", 576, 1536, true, 228),
        ("vision fc1", 768, 3072, false, 197),
    ] {
        let spec = PackSpec { columns, k, block: 0, gated, bounded: true };
        let packed = pack(&spec, &vec![3; spec.rows() * k], &vec![0.01; spec.rows() * spec.num_blocks()]);
        let packed = packed.expect("packs");
        let mut x = Quantized::default();
        x.set_samples(&vec![130; rows * k], k).expect("whole rows");
        let mut out = vec![0.0; rows * columns];
        let activation = if gated { Activation::SwiGlu } else { Activation::Identity };
        let epilogue = Epilogue { bias: None, activation, residual: Residual::None };
        // Multiplications.
        group.throughput(Throughput::Elements((rows * spec.rows() * k) as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                linear(level(), &Serial, &x, &packed.view(), &epilogue, &mut out).expect("runs");
                black_box(&mut out);
            });
        });
    }
    group.finish();
}

fn quantizing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quantize");
    let k = 768;
    let (x, weight) = (vec![0.7; 228 * k], vec![1.1; k]);
    let mut quantized = Quantized::default();
    group.throughput(Throughput::Elements(x.len() as u64));
    for (name, norm) in [
        ("plain", Norm::None),
        ("rms norm", Norm::Rms { weight: &weight, epsilon: 1e-5 }),
        ("layer norm", Norm::Layer { weight: &weight, bias: &weight, epsilon: 1e-5 }),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                quantize_rows(level(), &Serial, (black_box(&x), k), norm, 0, &mut quantized).expect("runs");
            });
        });
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let dims = HeadDims { heads: 9, kv_heads: 3, head_dim: 64 };
    let attention = CausalAttention { dims, rotary: None, scale: 0.1 };
    for (name, batch, past, new) in [("prefill", 1, 0, 228), ("decode", 16, 300, 1)] {
        let max_len = usize::next_multiple_of(past + new, KEY_PANEL);
        let slots = batch * dims.kv_heads * max_len * dims.head_dim;
        let (mut keys, mut values) = (vec![half::f16::ONE; slots], vec![half::f16::ONE; slots]);
        let packed = vec![0.25; batch * new * (dims.heads + 2 * dims.kv_heads) * dims.head_dim];
        let mut out = vec![0.0; batch * new * dims.heads * dims.head_dim];
        let sequences: Vec<_> = (0..batch).map(|slot| Sequence { slot, past, new, first_row: slot * new }).collect();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let cache = SlotCache { keys: &mut keys, values: &mut values, max_len };
                attention.run(level(), &Serial, black_box(&packed), &sequences, cache, &mut out).expect("runs");
            });
        });
    }
    let dims = HeadDims { heads: 12, kv_heads: 12, head_dim: 64 };
    let (packed, mut out) = (vec![0.25; 197 * 3 * 12 * 64], vec![0.0; 197 * 12 * 64]);
    group.bench_function("whole image", |bencher| {
        bencher.iter(|| attend_all(level(), &Serial, dims, 0.1, black_box(&packed), 1, 197, &mut out).expect("runs"));
    });
    group.finish();
}

fn greedy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("greedy");
    let columns = 49_152;
    let logits: Vec<f32> = (0..16 * columns).map(|i| (i * 37 % 1009) as f32).collect();
    let mut ids = vec![0; 16];
    group.throughput(Throughput::Elements(logits.len() as u64));
    group.bench_function("16 x 49152", |bencher| {
        bencher.iter(|| greedy_ids(level(), &Serial, black_box(&logits), columns, &mut ids));
    });
    group.finish();
}

fn pictures(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pixels");
    // One row of blocks of a picture of 512 columns.
    let num_blocks = 64;
    let block: pixels::Block = std::array::from_fn(|i| if i % 8 + i / 8 < 5 { 40 - 9 * (i as i16 % 11) } else { 0 });
    let (last, mut samples) = (vec![30; num_blocks], vec![0; 8 * 8 * num_blocks]);
    let mut blocks = vec![block; num_blocks];
    group.throughput(Throughput::Elements(num_blocks as u64));
    group.bench_function("inverse DCT, 64 blocks", |bencher| {
        bencher.iter(|| {
            blocks.fill(block);
            pixels::inverse_dct(level(), &mut blocks, &last, &mut samples, 8 * num_blocks);
        });
    });
    group.bench_function("inverse DCT at a half, 64 blocks", |bencher| {
        bencher.iter(|| {
            blocks.fill(block);
            pixels::inverse_dct_means(level(), [2, 2], &mut blocks, &last, &mut samples, 4 * num_blocks);
        });
    });
    let width = 512;
    let (chroma, mut sums) = (vec![77; width / 2], vec![0; width / 2]);
    let (luma, mut wide, mut rgb) = (vec![99; width], vec![0; width], vec![0; 3 * width]);
    group.throughput(Throughput::Elements(width as u64));
    group.bench_function("upsampling, a row of 512", |bencher| {
        bencher.iter(|| {
            pixels::upsample_columns_and_rows(level(), black_box(&chroma), &chroma, &mut sums, &mut wide);
        });
    });
    group.bench_function("colours, a row of 512", |bencher| {
        bencher.iter(|| pixels::ycc_to_rgb(level(), black_box(&luma), &wide, &wide, &mut rgb));
    });
    // 500 x 375 to 336 x 252, seven weights each.
    let weights = |outputs: u32, source: u32| {
        let mut weights = Weights::new();
        for output in 0..outputs {
            let start = (output * source / outputs).min(source - 7);
            weights.push(start, &[(1 << WEIGHT_BITS) / 7; 7], [0; 3]);
        }
        weights
    };
    let picture: Vec<u8> = (0..3 * 500 * 375).map(|i| (i * 31 % 253) as u8).collect();
    let (along, down) = (weights(336, 500), weights(252, 375));
    let (mut first, mut second) = (vec![0; 3 * 336 * 375], vec![0; 3 * 336 * 252]);
    group.throughput(Throughput::Elements(500 * 375));
    group.bench_function("resampling along rows", |bencher| {
        let source = Rows { samples: &picture, stride: 1500, width: 500, height: 375 };
        bencher.iter(|| pixels::horizontal(level(), &along, black_box(source), &mut first));
    });
    group.bench_function("resampling along columns", |bencher| {
        let source = Rows { samples: &picture, stride: 1500, width: 336, height: 375 };
        bencher.iter(|| pixels::vertical(level(), &down, black_box(source), &mut second));
    });
    group.finish();
}

/// A minute for all.
fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(30)
        .without_plots()
}

criterion_group! {
    name = kernels;
    config = short();
    targets = linears, quantizing, attention, greedy, pictures
}
criterion_main!(kernels);
