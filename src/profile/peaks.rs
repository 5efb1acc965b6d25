//! What the machine can do, measured in the process that ran: products of matrices through the provider of the run, and reading
//! memory. Each figure is the best of many short tries, of several ways where there are several.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use recaption_export::{Precision, Target};
use recaption_kernels::{
    Activation, Epilogue, Level, Norm, PackSpec, Quantized, Residual, Serial, linear, pack, quantize_rows,
};

use crate::error::{Error, Result};
use crate::profile::{BundleFacts, Peak, Peaks};
use crate::runtime::Device;
use crate::runtime::matmul::{self, Operands, Product};

/// Rows, inner width and columns of products as they are in prefill and vision: those of the peers' benchmark.
const SHAPES: [[usize; 3]; 3] = [[912, 2048, 2048], [1024, 1024, 4096], [1824, 576, 3072]];
/// The same for a GPU, which wants larger ones.
const GPU_SHAPES: [[usize; 3]; 2] = [[4096, 4096, 4096], [8192, 8192, 8192]];
/// A product of one row, whose weights are more than any cache holds.
const GPU_READ_SHAPE: [usize; 3] = [1, 8192, 32_768];
/// Values per scale of the decoder's weights and activations with target cpu.
const BLOCK: usize = 128;
/// How long each way is tried.
const DURATION: Duration = Duration::from_millis(300);
/// Memory that is read: more than any cache holds.
const READ_BYTES: usize = 256 << 20;

/// Measures what `bundle` needs on `device`, with all threads that its engines have together.
///
/// # Errors
/// ONNX Runtime's.
pub(crate) fn measure(device: Device, bundle: &BundleFacts, num_threads: usize) -> Result<Peaks> {
    measure_for(device, [bundle.precision, bundle.vision_precision], bundle.target, num_threads)
}

/// The same, of what weights of `precisions` need in graphs for `target`.
///
/// # Errors
/// ONNX Runtime's.
pub(crate) fn measure_for(
    device: Device,
    precisions: [Precision; 2],
    target: Target,
    num_threads: usize,
) -> Result<Peaks> {
    let float = if device == Device::Cpu { Operands::F32 } else { Operands::F16 };
    let has_int8 = precisions.contains(&Precision::Int8);
    let mut int8 = BTreeMap::new();
    if has_int8 && device == Device::Cpu {
        int8.insert("MatMulInteger".to_owned(), best_product(device, num_threads, Operands::Int8)?);
    }
    if target == Target::Cpu {
        int8.insert("QuantizedLinear".to_owned(), best_own_product(num_threads)?);
    }
    let float = BTreeMap::from([(name(float).to_owned(), best_product(device, num_threads, float)?)]);
    let read = match device {
        Device::Cpu => BTreeMap::from([("sum of 256 MiB".to_owned(), memory_read(num_threads))]),
        Device::Cuda(_) | Device::TensorRt(_) => {
            let [rows, inner, columns] = GPU_READ_SHAPE;
            let product = Product { operands: Operands::F16, rows, inner, columns };
            let rate = matmul::rate(device, num_threads, product)?.weight_bytes_per_second;
            BTreeMap::from([("MatMul of one row, f16".to_owned(), rate)])
        }
    };
    let peak = |tried: BTreeMap<String, f64>| {
        let best = tried.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(name, rate)| (name.clone(), *rate));
        best.map(|(by, rate)| Peak { rate, by, tried })
    };
    let [float, memory_read] = [float, read].map(|tried| peak(tried).unwrap_or_default());
    Ok(Peaks { float, int8: peak(int8), memory_read, num_threads })
}

fn name(operands: Operands) -> &'static str {
    match operands {
        Operands::F32 => "MatMul, f32",
        Operands::F16 => "MatMul, f16",
        Operands::Int8 => "MatMulInteger",
    }
}

/// Operations a second of ONNX Runtime's products.
fn best_product(device: Device, num_threads: usize, operands: Operands) -> Result<f64> {
    let shapes = if device == Device::Cpu { &SHAPES[..] } else { &GPU_SHAPES };
    let mut best = 0.0_f64;
    for &[rows, inner, columns] in shapes {
        let rate = matmul::rate(device, num_threads, Product { operands, rows, inner, columns })?;
        best = best.max(rate.flops_per_second);
    }
    Ok(best)
}

/// Operations a second of this project's own kernel, on one thread for each engine's as the engines run it.
fn best_own_product(num_threads: usize) -> Result<f64> {
    let refused = |error: recaption_kernels::Error| Error::Setting {
        reason: error.to_string(),
        hint: "leave RECAPTION_CPU unset: the best instruction set of this processor is taken".to_owned(),
    };
    let level = Level::current().map_err(refused)?;
    let mut best = 0.0_f64;
    // Scales by block as in the decoder, by row as in the vision tower.
    for (&[rows, k, columns], block) in SHAPES.iter().flat_map(|shape| [(shape, BLOCK), (shape, 0)]) {
        let spec = PackSpec { columns, k, block, gated: false, bounded: true };
        let weights = vec![3; spec.rows() * k];
        let scales = vec![0.01; spec.rows() * spec.num_blocks()];
        let packed = pack(&spec, &weights, &scales).map_err(refused)?;
        let mut x = Quantized::default();
        quantize_rows(level, &Serial, (&vec![0.5; rows * k], k), Norm::None, block, &mut x).map_err(refused)?;
        let outputs: Vec<_> = (0..num_threads).map(|_| Mutex::new(vec![0.0; rows * columns])).collect();
        let work = |thread: usize| {
            let mut out = outputs[thread].lock().expect("bug: each thread has its own");
            let epilogue = Epilogue { bias: None, activation: Activation::Identity, residual: Residual::None };
            linear(level, &Serial, &x, &packed.view(), &epilogue, &mut out).expect("bug: the shapes are right");
        };
        let operations = 2.0 * (rows * columns * k * num_threads) as f64;
        best = best.max(best_rate(operations, || drop(on_threads(num_threads, work))));
    }
    Ok(best)
}

/// Bytes a second that all threads read together.
fn memory_read(num_threads: usize) -> f64 {
    let memory = vec![1_u64; READ_BYTES / size_of::<u64>()];
    let part = memory.len() / num_threads.max(1);
    let read = |thread: usize| {
        let mut sums = [0_u64; 32];
        for values in memory[thread * part..(thread + 1) * part].as_chunks::<32>().0 {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
        }
        black_box(sums);
    };
    best_rate((part * num_threads * size_of::<u64>()) as f64, || drop(on_threads(num_threads, read)))
}

/// `amount` a second, the best of many.
fn best_rate(amount: f64, work: impl Fn()) -> f64 {
    work();
    let (started, mut best) = (Instant::now(), 0.0_f64);
    while best == 0.0 || started.elapsed() < DURATION {
        let begin = Instant::now();
        work();
        best = best.max(amount / begin.elapsed().as_secs_f64());
    }
    best
}

/// What `work` gives on each of `num_threads` threads at once.
fn on_threads<T: Send>(num_threads: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|thread| scope.spawn(move || work(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("bug: measuring does not panic")).collect()
    })
}
