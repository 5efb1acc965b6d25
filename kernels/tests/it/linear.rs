//! Quantisation and the int8 linear layer against plain references, and against themselves at other levels and splits.

use std::num::NonZeroUsize;

use crate::random::{Random, bits};
use proptest::prelude::*;
use recaption_kernels::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    k: usize,
    columns: usize,
    block: usize,
    row_blocks: bool,
    block_scales: bool,
    activation: Activation,
    norm: u8,
    residual: u8,
    bias: bool,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let activation = prop::sample::select(vec![
        Activation::Identity,
        Activation::QuickGelu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::SwiGlu,
    ]);
    // Some k beyond what a kernel takes at a time, in one block and in blocks that are as long.
    let k = prop_oneof![3 => 1..300usize, 1 => 500..1300usize];
    let sizes = (0..30usize, k, 0..100usize, prop::sample::select(vec![0usize, 4, 32, 128, 640]));
    let flags = (any::<bool>(), any::<bool>(), 0..3u8, 0..3u8, any::<bool>());
    (sizes, flags, activation, any::<u64>()).prop_map(|((rows, k, columns, block), f, activation, seed)| Case {
        rows,
        k,
        columns,
        block,
        row_blocks: f.0 && block > 0,
        block_scales: f.1 && block > 0,
        norm: f.2,
        residual: f.3,
        bias: f.4,
        activation,
        seed,
    })
}

struct Data {
    x: Vec<f32>,
    norm: [Vec<f32>; 2],
    weights: Vec<i8>,
    scales: Vec<f32>,
    packed: Packed,
    bias: Vec<f32>,
    residual: Vec<f32>,
}

impl Case {
    fn spec(&self) -> PackSpec {
        PackSpec {
            columns: self.columns,
            k: self.k,
            block: self.block,
            block_scales: self.block_scales,
            gated: self.activation == Activation::SwiGlu,
        }
    }

    fn data(&self) -> Data {
        let mut random = Random(self.seed);
        let spec = self.spec();
        let weights = random.i8s(spec.rows() * self.k);
        let scales: Vec<f32> =
            random.f32s(spec.rows() * spec.scales_per_row()).iter().map(|x| x.abs() / 100.0).collect();
        Data {
            x: random.f32s(self.rows * self.k),
            norm: [random.f32s(self.k), random.f32s(self.k)],
            packed: pack(&spec, &weights, &scales).expect("packs"),
            weights,
            scales,
            bias: random.f32s(spec.rows()),
            residual: random.f32s(self.rows * self.columns),
        }
    }

    fn norm<'a>(&self, data: &'a Data) -> Norm<'a> {
        let [weight, bias] = &data.norm;
        match self.norm {
            0 => Norm::None,
            1 => Norm::Rms { weight, epsilon: 1e-5 },
            _ => Norm::Layer { weight, bias, epsilon: 1e-5 },
        }
    }

    /// Both kernels in a row: values, scales, out.
    fn run(&self, data: &Data, level: Level, workers: &dyn Workers) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let block = if self.row_blocks { self.block } else { 0 };
        let mut values = vec![0; self.rows * stride(self.k)];
        let mut scales = vec![0.0; self.rows * num_scales(self.k, block)];
        let into = QuantizedMut { k: self.k, block, values: &mut values, scales: &mut scales };
        quantize_rows(level, workers, &data.x, self.norm(data), into).expect("quantises");
        let mut out = data.residual.clone();
        let epilogue = Epilogue {
            bias: self.bias.then_some(&data.bias),
            activation: self.activation,
            residual: [Residual::None, Residual::Add(&data.residual), Residual::InPlace][usize::from(self.residual)],
        };
        let weights = data.packed.view();
        let x = Quantized { k: self.k, block, values: &values, scales: &scales };
        linear(level, workers, x, &weights, &epilogue, &mut out).expect("multiplies");
        (values, scales, out)
    }
}

fn activated(activation: Activation, x: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Identity => x,
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Gelu => x * 0.5 * erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
        Activation::GeluTanh => x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)),
        Activation::SwiGlu => x * sigmoid(x) * up,
    }
}

/// erfc by integrating its derivative: slow and plain.
fn erfc(x: f64) -> f64 {
    let (steps, end) = (2000, x.clamp(-6.0, 6.0));
    let h = end / f64::from(steps);
    let f = |t: f64| (-t * t).exp();
    let inner: f64 = (1..steps).map(|i| f(f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    1.0 - 2.0 / std::f64::consts::PI.sqrt() * h / 3.0 * (f(0.0) + inner + f(end))
}

fn reference_norm(norm: Norm<'_>, row: &[f32]) -> Vec<f64> {
    let n = row.len() as f64;
    let x: Vec<f64> = row.iter().copied().map(f64::from).collect();
    match norm {
        Norm::None => x,
        Norm::Rms { weight, epsilon } => {
            let f = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n + f64::from(epsilon)).sqrt();
            x.iter().zip(weight).map(|(x, &w)| x * f * f64::from(w)).collect()
        }
        Norm::Layer { weight, bias, epsilon } => {
            let mean = x.iter().sum::<f64>() / n;
            let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
            let f = 1.0 / (variance + f64::from(epsilon)).sqrt();
            let affine = weight.iter().zip(bias);
            x.iter().zip(affine).map(|(x, (&w, &b))| (x - mean) * f * f64::from(w) + f64::from(b)).collect()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 200 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn matches_the_reference(case in cases()) {
        let data = case.data();
        let (values, scales, out) = case.run(&data, *Level::available().last().expect("one"), &Serial);
        let block = if case.row_blocks { case.block } else { case.k };
        let each = case.k.div_ceil(block);
        let back = |m: usize, k: usize| f64::from(values[m * stride(case.k) + k]) - 128.0;
        for m in 0..case.rows {
            let want = reference_norm(case.norm(&data), &data.x[m * case.k..][..case.k]);
            for (k, want) in want.iter().enumerate() {
                let scale = f64::from(scales[m * each + k / block]);
                let tolerance = scale * 0.501 + want.abs() * 1e-5 + 1e-5 * scale * 127.0;
                prop_assert!((back(m, k) * scale - want).abs() <= tolerance, "row {m}, k {k}");
            }
        }
        let spec = case.spec();
        let weight_block = if case.block_scales { case.block } else { case.k };
        let product = |m: usize, row: usize| {
            let (mut sum, mut size) = (0.0, 0.0);
            for k in 0..case.k {
                let weight = f64::from(data.weights[row * case.k + k])
                    * f64::from(data.scales[row * spec.scales_per_row() + k / weight_block]);
                let term = back(m, k) * f64::from(scales[m * each + k / block]) * weight;
                sum += term;
                size += term.abs();
            }
            let bias = if case.bias { f64::from(data.bias[row]) } else { 0.0 };
            (sum + bias, size + bias.abs())
        };
        for m in 0..case.rows {
            for n in 0..case.columns {
                let (x, size) = product(m, n);
                let (up, up_size) = if spec.gated { product(m, n + case.columns) } else { (1.0, 1.0) };
                let residual = if case.residual > 0 { f64::from(data.residual[m * case.columns + n]) } else { 0.0 };
                let want = activated(case.activation, x, up) + residual;
                let got = f64::from(out[m * case.columns + n]);
                let scale = (1.0 + size) * (1.0 + if spec.gated { up_size } else { 0.0 });
                prop_assert!((got - want).abs() <= 3e-6 * scale + 1e-6 * residual.abs(), "({m}, {n}): {got} for {want}");
            }
        }
    }

    #[test]
    fn gives_the_same_bits_at_every_level_and_split(case in cases()) {
        let data = case.data();
        let (values, scales, out) = case.run(&data, Level::PORTABLE, &Serial);
        for level in Level::available() {
            for threads in [1, 3, 16] {
                let got = case.run(&data, level, &Scoped(NonZeroUsize::new(threads).expect("not 0")));
                prop_assert_eq!(&values, &got.0, "{}", level.name());
                prop_assert_eq!(bits(&scales), bits(&got.1), "{}", level.name());
                prop_assert_eq!(bits(&out), bits(&got.2), "{}", level.name());
            }
        }
    }

    #[test]
    fn a_row_depends_on_no_other_even_if_those_are_nan(case in cases(), bad in any::<prop::sample::Index>(), infinite in any::<bool>()) {
        prop_assume!(case.rows > 0);
        let mut data = case.data();
        let level = *Level::available().last().expect("one");
        let (_, _, clean) = case.run(&data, level, &Serial);
        let bad = bad.index(case.rows);
        data.x[bad * case.k + case.k / 2] = if infinite { f32::NEG_INFINITY } else { f32::NAN };
        let (_, _, out) = case.run(&data, level, &Serial);
        for m in 0..case.rows {
            let row = m * case.columns..(m + 1) * case.columns;
            if m == bad {
                prop_assert!(out[row].iter().all(|x| x.is_nan()));
            } else {
                prop_assert_eq!(bits(&out[row.clone()]), bits(&clean[row]));
            }
        }
        // Alone, a row is what it was in company.
        let m = (bad + 1) % case.rows;
        let alone = Case { rows: 1, ..case };
        let (_, x, r) = ((), data.x[m * case.k..][..case.k].to_vec(), data.residual[m * case.columns..][..case.columns].to_vec());
        let (_, _, got) = alone.run(&Data { x, residual: r, ..data }, level, &Serial);
        prop_assert_eq!(bits(&got), bits(&out[m * case.columns..][..case.columns]));
    }
}

#[test]
fn extreme_sums_are_exact() {
    let (k, columns) = (4096, 33);
    let spec = PackSpec { columns, k, block: 0, block_scales: false, gated: false };
    for weight in [-128, -127, 127] {
        let packed = pack(&spec, &vec![weight; columns * k], &vec![1.0; columns]).expect("packs");
        for (level, value) in Level::available().into_iter().flat_map(|level| [0u8, 1, 255].map(|value| (level, value)))
        {
            let mut out = vec![0.0; 2 * columns];
            let x = Quantized { k, block: 0, values: &vec![value; 2 * k], scales: &[1.0, 1.0] };
            let weights = packed.view();
            let epilogue = Epilogue { bias: None, activation: Activation::Identity, residual: Residual::None };
            linear(level, &Serial, x, &weights, &epilogue, &mut out).expect("multiplies");
            let want = f32::from(weight) * (f32::from(value) - 128.0) * k as f32;
            assert!(out.iter().all(|&y| y == want), "{} {weight} {value}: {}", level.name(), out[0]);
        }
    }
}

#[test]
fn broken_packs_are_refused() {
    let spec = PackSpec { columns: 5, k: 7, block: 4, block_scales: true, gated: false };
    let (weights, corrections, scales) = (vec![0; 256], vec![0; 64], vec![0.0; 64]);
    assert_eq!(PackedWeights::new(spec, &weights, &corrections, &scales).expect("whole").spec(), spec);
    assert!(PackedWeights::new(spec, &weights[1..], &corrections, &scales).is_err());
    assert!(PackedWeights::new(spec, &weights, &corrections[1..], &scales).is_err());
    assert!(PackedWeights::new(spec, &weights, &corrections, &scales[1..]).is_err());
    assert!(PackedWeights::new(PackSpec { k: 0, ..spec }, &[], &[], &[]).is_err());
    assert!(pack(&PackSpec { k: 0, ..spec }, &[], &[]).is_err());
    assert!(pack(&PackSpec { block: 3, ..spec }, &[1; 35], &[1.0; 15]).is_err());
}
