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
    bounded: bool,
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
    // Miri takes ten thousand times as long.
    let (short, long, rows, columns) =
        if cfg!(miri) { (1..40, 40..80, 0..4, 0..40) } else { (1..300usize, 500..1300usize, 0..30usize, 0..100usize) };
    let k = prop_oneof![3 => short, 1 => long];
    let sizes = (rows, k, columns, prop::sample::select(vec![0usize, 8, 24, 32, 128, 640]));
    let flags = (any::<bool>(), 0..3u8, 0..3u8, any::<bool>());
    (sizes, flags, activation, any::<u64>()).prop_map(|((rows, k, columns, block), f, activation, seed)| Case {
        rows,
        k,
        columns,
        block,
        bounded: f.0,
        norm: f.1,
        residual: f.2,
        bias: f.3,
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
            gated: self.activation == Activation::SwiGlu,
            bounded: self.bounded,
        }
    }

    fn data(&self) -> Data {
        let mut random = Random(self.seed);
        let spec = self.spec();
        let mut weights = random.i8s(spec.rows() * self.k);
        let mut scales: Vec<f32> =
            random.f32s(spec.rows() * spec.num_blocks()).iter().map(|x| x.abs() / 100.0).collect();
        if self.bounded {
            let rows = weights.chunks_exact_mut(self.k).zip(scales.chunks_exact_mut(spec.num_blocks()));
            for (weights, scales) in rows {
                let row = random.f32s(self.k);
                quantize_weights(&spec, &row, weights, scales).expect("quantises");
            }
        }
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
        // What was there before does not count.
        let mut x = Quantized::default();
        x.set_samples(&[77; 3000], 300).expect("ten rows");
        quantize_rows(level, workers, (&data.x, self.k), self.norm(data), self.block, &mut x).expect("quantises");
        let mut out = data.residual.clone();
        let epilogue = Epilogue {
            bias: self.bias.then_some(&data.bias),
            activation: self.activation,
            residual: [Residual::None, Residual::Add(&data.residual), Residual::InPlace][usize::from(self.residual)],
        };
        linear(level, workers, &x, &data.packed.view(), &epilogue, &mut out).expect("multiplies");
        let values = (0..self.rows).flat_map(|row| (0..self.k).map(move |k| (row, k))).map(|(row, k)| x.value(row, k));
        let scales = (0..self.rows).flat_map(|row| (0..self.spec().num_blocks()).map(move |block| (row, block)));
        (values.collect(), scales.map(|(row, block)| x.scale(row, block)).collect(), out)
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
        let block = if case.block > 0 { case.block } else { case.k };
        let each = case.k.div_ceil(block);
        let back = |m: usize, k: usize| f64::from(values[m * case.k + k]) - 128.0;
        for m in 0..case.rows {
            let want = reference_norm(case.norm(&data), &data.x[m * case.k..][..case.k]);
            for (k, want) in want.iter().enumerate() {
                let scale = f64::from(scales[m * each + k / block]);
                let tolerance = scale * 0.501 + want.abs() * 1e-5 + 1e-5 * scale * 127.0;
                prop_assert!((back(m, k) * scale - want).abs() <= tolerance, "row {m}, k {k}");
            }
        }
        let spec = case.spec();
        let product = |m: usize, row: usize| {
            let (mut sum, mut size) = (0.0, 0.0);
            for k in 0..case.k {
                let weight = f64::from(data.weights[row * case.k + k])
                    * f64::from(data.scales[row * each + k / block]);
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
    let (k, columns) = (if cfg!(miri) { 16 } else { 4096 }, 33);
    // One value in all places of eight, and those that reach the bound in two ways.
    let even = |weight: i8| [weight; 8];
    let (pair, four) = ([64, 65, 0, 0, 0, 0, 0, 0], [64, -64, 0, 0, 64, -64, 0, 0]);
    let bounded = [even(63), even(-63), [127, -128, -128, 127, 0, 0, 0, 0], [64, 64, 0, 0, -64, -63, 0, 0]];
    let any = [even(-128), even(-127), even(127), pair, four];
    for (eight, bounded) in bounded.map(|eight| (eight, true)).into_iter().chain(any.map(|eight| (eight, false))) {
        let spec = PackSpec { columns, k, block: 0, gated: false, bounded };
        let packed = pack(&spec, &eight.repeat(columns * k / 8), &vec![1.0; columns]).expect("packs");
        let sum: i32 = eight.into_iter().map(i32::from).sum();
        assert_eq!(
            pack(&PackSpec { bounded: true, ..spec }, &eight.repeat(columns * k / 8), &[1.0; 33]).is_ok(),
            bounded
        );
        // Few rows have products of their own.
        let inputs = [2, 7].into_iter().flat_map(|rows| [0u8, 1, 255].map(|value| (rows, value)));
        for (level, (rows, value)) in
            Level::available().into_iter().flat_map(|level| inputs.clone().map(move |x| (level, x)))
        {
            let mut out = vec![0.0; rows * columns];
            let mut x = Quantized::default();
            x.set_samples(&vec![value; rows * k], k).expect("whole rows");
            let epilogue = Epilogue { bias: None, activation: Activation::Identity, residual: Residual::None };
            linear(level, &Serial, &x, &packed.view(), &epilogue, &mut out).expect("multiplies");
            let want = sum as f32 * (f32::from(value) - 128.0) * (k / 8) as f32;
            assert!(out.iter().all(|&y| y == want), "{} {eight:?} {value}: {} for {want}", level.name(), out[0]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 200 }, failure_persistence: None, ..Default::default() })]

    /// Values within their bound, no further from the weights than their scale allows, and that scale no coarser than the bound.
    #[test]
    fn quantised_weights_are_near_and_bounded(
        k in 1..400usize, block in prop::sample::select(vec![0usize, 8, 32, 128]), bounded in any::<bool>(),
        tails in any::<bool>(), seed in any::<u64>(),
    ) {
        let spec = PackSpec { columns: 1, k, block, gated: false, bounded };
        let mut row = Random(seed).f32s(k);
        if tails {
            row.iter_mut().for_each(|w| *w = w.powi(5));
        }
        let (mut values, mut scales) = (vec![0; k], vec![0.0; spec.num_blocks()]);
        quantize_weights(&spec, &row, &mut values, &mut scales).expect("quantises");
        pack(&spec, &values, &scales).expect("bounded, if they are to be");
        let block = if block == 0 { k } else { block };
        for (b, (row, values)) in row.chunks(block).zip(values.chunks(block)).enumerate() {
            let scale = f64::from(scales[b]);
            let largest = row.iter().fold(0.0, |m: f64, &w| m.max(f64::from(w.abs())));
            // At most four weights are summed to 255, or two of one sign to 128.
            let coarsest = largest / if bounded { 63.7 } else { 126.9 };
            prop_assert!(scale >= largest / 127.01 && scale <= coarsest, "{scale} for {largest}");
            let mut beyond = 0;
            for (&w, &value) in row.iter().zip(values) {
                let error = (f64::from(w) - scale * f64::from(value)).abs();
                prop_assert!(error <= scale * if bounded { 1.01 } else { 0.501 } + 1e-12, "{w}: {value} x {scale}");
                beyond += usize::from(error > scale * 0.501);
            }
            // What is more than half a step off was rounded down to keep a bound, once for each pair's signs and once or twice
            // for four.
            prop_assert!(beyond <= row.len().div_ceil(8) * 6);
        }
    }
}

#[test]
fn broken_packs_are_refused() {
    let spec = PackSpec { columns: 5, k: 12, block: 8, gated: false, bounded: false };
    let (weights, corrections, scales) = (vec![0; 384], vec![0; 64], vec![0.0; 64]);
    assert_eq!(PackedWeights::new(spec, &weights, &corrections, &scales).expect("whole").spec(), spec);
    assert!(PackedWeights::new(spec, &weights[1..], &corrections, &scales).is_err());
    assert!(PackedWeights::new(spec, &weights, &corrections[1..], &scales).is_err());
    assert!(PackedWeights::new(spec, &weights, &corrections, &scales[1..]).is_err());
    assert!(PackedWeights::new(PackSpec { k: 0, ..spec }, &[], &[], &[]).is_err());
    assert!(pack(&PackSpec { k: 0, ..spec }, &[], &[]).is_err());
    assert!(pack(&PackSpec { block: 4, ..spec }, &[1; 60], &[1.0; 15]).is_err());
}

#[test]
fn no_rows_take_no_memory_whatever_their_length() {
    let mut x = Quantized::default();
    quantize_rows(Level::PORTABLE, &Serial, (&[], usize::MAX / 2), Norm::None, 0, &mut x).expect("nothing to do");
    assert_eq!(x.rows(), 0);
}
