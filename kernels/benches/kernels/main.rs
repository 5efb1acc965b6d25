//! Speeds of the kernels beside the machine's limits, measured in the same run.
//!
//! `cargo bench -p recaption-kernels -- [threads] [level]`. Shapes are those of a 135M decoder with a ViT-B (`small`) and of a 1B
//! decoder with a ViT-L (`1b`). Each figure is the best of many, since the machine may be busy.

use std::hint::black_box;
use std::time::Instant;

use pool::Pool;
use recaption_kernels::*;

mod limits;
mod pool;

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let threads = args.next().and_then(|n| n.parse().ok()).unwrap_or(2);
    let level = match args.next() {
        Some(name) => Level::up_to(&name),
        None => Level::current(),
    };
    let level = level.expect("a level");
    let pool = Pool::new(threads);
    let limits = limits::measure(&pool);
    println!("level {}, {threads} threads", level.name());
    println!("limits: int8 {:.0} GFLOP/s, f32 {:.0} GFLOP/s, read {:.1} GB/s", limits.int8, limits.f32, limits.read);
    linears(level, &pool, &limits);
    quantizes(level, &pool);
    attentions(level, &pool, &limits);
}

/// Seconds of the best of many calls.
pub(crate) fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < 0.25 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

fn linears(level: Level, pool: &Pool, limits: &limits::Limits) {
    println!("\nlinear: name, k, columns, block scales");
    let shapes = [
        ("small qkv", 576, 960, false, 0),
        ("small gate+up", 576, 1536, true, 0),
        ("small gate+up", 576, 1536, true, 128),
        ("small down", 1536, 576, false, 0),
        ("small down", 1536, 576, false, 128),
        ("small head", 576, 49152, false, 0),
        ("vit-b fc1", 768, 3072, false, 0),
        ("vit-b fc2", 3072, 768, false, 0),
        ("1b qkv", 2048, 3072, false, 0),
        ("1b gate+up", 2048, 8192, true, 0),
        ("1b gate+up", 2048, 8192, true, 128),
        ("1b down", 8192, 2048, false, 0),
        ("1b down", 8192, 2048, false, 128),
        ("vit-l fc1", 1024, 4096, false, 0),
    ];
    for (name, k, columns, gated, block) in shapes {
        let spec = PackSpec { columns, k, block, gated, bounded: true };
        let (weights, scales) = normal_weights(&spec);
        // As many copies as it takes to leave the caches, as the layers of a model do.
        let copies = (96_usize << 20).div_ceil(spec.num_bytes());
        let packed = pack(&spec, &weights, &scales).expect("packs");
        let copies: Vec<Packed> = (0..copies).map(|_| packed.clone()).collect();
        print!("{name:14} {k:5} {:6} {block:4}:", spec.rows());
        for rows in [1, 8, 16, 32, 228, 577, 912] {
            if name.starts_with("vit") && rows < 228 || name.ends_with("head") && rows > 32 {
                continue;
            }
            let mut x = Quantized::default();
            quantize_rows(level, pool, (&vec![0.5; rows * k], k), Norm::None, block, &mut x).expect("quantises");
            let mut out = vec![0.0; rows * columns];
            let mut copy = 0;
            let seconds = best(|| {
                let weights = copies[copy].view();
                let activation = if gated { Activation::SwiGlu } else { Activation::Identity };
                let epilogue = Epilogue { bias: None, activation, residual: Residual::None };
                linear(level, pool, &x, &weights, &epilogue, &mut out).expect("runs");
                black_box(&mut out);
                copy = (copy + 1) % copies.len();
            });
            let gflops = 2.0 * (rows * spec.rows() * k) as f64 / seconds / 1e9;
            let bytes = spec.num_bytes() as f64 / seconds / 1e9;
            if rows <= 32 {
                print!("  M={rows} {bytes:.1} GB/s {:.0}% ({gflops:.0})", 100.0 * bytes / limits.read);
            } else {
                print!("  M={rows} {gflops:.0} {:.0}%", 100.0 * gflops / limits.int8);
            }
        }
        println!();
    }
}

/// Weights with a bell curve's shape, a sum of uniform numbers, quantised: values and scales.
fn normal_weights(spec: &PackSpec) -> (Vec<i8>, Vec<f32>) {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let (mut values, mut scales) = (vec![0; spec.rows() * spec.k], vec![0.0; spec.rows() * spec.num_blocks()]);
    for (values, scales) in values.chunks_exact_mut(spec.k).zip(scales.chunks_exact_mut(spec.num_blocks())) {
        let row: Vec<f32> = (0..spec.k).map(|_| (0..12).map(|_| uniform()).sum()).collect();
        quantize_weights(spec, &row, values, scales).expect("quantises");
    }
    (values, scales)
}

fn quantizes(level: Level, pool: &Pool) {
    println!("\nquantise, microseconds for 228 rows: plain, RMS, layer norm");
    for k in [576, 768, 1536, 2048] {
        let (x, weight) = (vec![0.7; 228 * k], vec![1.1; k]);
        let mut quantized = Quantized::default();
        print!("k={k}:");
        let norms = [
            Norm::None,
            Norm::Rms { weight: &weight, epsilon: 1e-5 },
            Norm::Layer { weight: &weight, bias: &weight, epsilon: 1e-5 },
        ];
        for norm in norms {
            let seconds = best(|| {
                quantize_rows(level, pool, (&x, k), norm, 0, &mut quantized).expect("runs");
            });
            print!(" {:.1}", seconds * 1e6);
        }
        println!();
    }
}

fn attentions(level: Level, pool: &Pool, limits: &limits::Limits) {
    println!("\nattention: GFLOP/s and share of the f32 limit; decoding also GB/s of the cache");
    let decoders = [("small", 9, 3, 64), ("1b", 32, 8, 64), ("8b", 32, 8, 128)];
    for (name, heads, kv_heads, head_dim) in decoders {
        let dims = HeadDims { heads, kv_heads, head_dim };
        let attention = CausalAttention { dims, rotary: None, scale: 0.1 };
        let width = (heads + 2 * kv_heads) * head_dim;
        for (what, batch, past, new) in
            [("prefill", 1, 0, 228), ("prefill", 4, 0, 640), ("decode", 8, 300, 1), ("decode", 32, 300, 1)]
        {
            let max_len = usize::next_multiple_of(past + new, KEY_PANEL);
            let slots: usize = batch * kv_heads * max_len * head_dim;
            // As many caches as it takes to leave the caches of the processor, as the layers of a model do.
            let copies = if new > 1 { 1 } else { (96_usize << 20).div_ceil(4 * slots) };
            let mut caches = vec![(vec![half::f16::ONE; slots], vec![half::f16::ONE; slots]); copies];
            let packed = vec![0.25; batch * new * width];
            let mut out = vec![0.0; batch * new * heads * head_dim];
            let sequences: Vec<_> =
                (0..batch).map(|slot| Sequence { slot, past, new, first_row: slot * new }).collect();
            let mut copy = 0;
            let seconds = best(|| {
                let (keys, values) = &mut caches[copy];
                let cache = SlotCache { keys, values, max_len };
                attention.run(level, pool, &packed, &sequences, cache, &mut out).expect("runs");
                copy = (copy + 1) % copies;
            });
            let seen: usize = (0..new).map(|token| past + token + 1).sum();
            let rate = (4 * batch * seen * heads * head_dim) as f64 / seconds / 1e9;
            let read = (4 * batch * (past + new) * kv_heads * head_dim) as f64 / seconds / 1e9;
            let read = if new > 1 { String::new() } else { format!(" {read:.1} GB/s") };
            println!(
                "{name:6} {what:8} {batch:2} x {:3}: {rate:.0} {:.0}%{read}",
                past + new,
                100.0 * rate / limits.f32
            );
        }
    }
    for (name, tokens, heads) in [("vit-b", 197, 12), ("vit-l", 577, 16)] {
        let dims = HeadDims { heads, kv_heads: heads, head_dim: 64 };
        let packed = vec![0.25; 4 * tokens * 3 * heads * 64];
        let mut out = vec![0.0; 4 * tokens * heads * 64];
        let seconds = best(|| attend_all(level, pool, dims, 0.1, &packed, 4, tokens, &mut out).expect("runs"));
        let rate = (4 * 4 * tokens * tokens * heads * 64) as f64 / seconds / 1e9;
        println!("{name:6} whole     4 x {tokens:3}: {rate:.0} {:.0}%", 100.0 * rate / limits.f32);
    }
}
