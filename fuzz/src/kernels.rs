//! Kernels of any shape on any values: every instruction set gives the portable form's bits, or all of them refuse.

use half::f16;
use recaption_kernels::*;

/// Reads choices off the front of the input; behind its end come pseudo-random bytes.
struct Input<'a> {
    rest: &'a [u8],
    state: u64,
}

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        if let Some((first, rest)) = self.rest.split_first() {
            self.rest = rest;
            self.state = (self.state ^ u64::from(*first)).wrapping_mul(0x100_0000_01b3);
            return *first;
        }
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 56) as u8
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()])) % end.max(1)
    }

    fn is(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// Mostly plain values, now and then any bits at all.
    fn float(&mut self) -> f32 {
        match self.byte() {
            0..=3 => f32::from_bits(u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])),
            4 => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, -0.0, 1e-40, 1e30]
                [self.below(8)],
            byte => (f32::from(byte) - 128.0) / 32.0,
        }
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    /// A length that is right, or wrong.
    fn length(&mut self, right: usize) -> usize {
        match self.byte() {
            0 => right + 1,
            1 => right.saturating_sub(1),
            2 => 0,
            3 => right * 2,
            _ => right,
        }
    }

    /// A number that is right, or one that no shape has.
    fn odd(&mut self, right: usize) -> usize {
        match self.byte() {
            0 => usize::MAX,
            1 => usize::MAX / 2 + 1,
            2 => 0,
            3 => 1 << 32,
            4 => right + 1,
            _ => right,
        }
    }
}

/// Bits, with all NaN as one.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

fn half_bits(values: &[f16]) -> Vec<u16> {
    values.iter().map(|x| if x.is_nan() { f16::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// What all levels agree on.
fn at_every_level<T: PartialEq + std::fmt::Debug>(run: impl Fn(Level) -> T) -> T {
    let portable = run(Level::PORTABLE);
    for level in Level::available() {
        let found = run(level);
        assert!(found == portable, "{} differs: {found:?} for {portable:?}", level.name());
    }
    portable
}

/// One kernel, chosen by the first byte.
pub fn kernels(data: &[u8]) {
    let mut input = Input { rest: data, state: 0xcbf2_9ce4_8422_2325 };
    match input.byte() % 6 {
        0 | 1 => linear_layer(&mut input),
        2 => causal_attention(&mut input),
        3 => full_attention(&mut input),
        4 => greedy(&mut input),
        _ => packed_weights(&mut input),
    }
}

fn linear_layer(input: &mut Input<'_>) {
    let (rows, k, columns) = (input.below(20), 1 + input.below(160), input.below(80));
    let block = [0, 8, 32, 128, 24, 4][input.below(6)];
    let activations =
        [Activation::Identity, Activation::QuickGelu, Activation::Gelu, Activation::GeluTanh, Activation::SwiGlu];
    let activation = activations[input.below(5)];
    let spec = PackSpec {
        columns,
        k,
        block,
        bounded: input.is(),
        gated: (activation == Activation::SwiGlu) != (input.byte() == 0),
    };
    let weight_count = input.length(spec.rows() * k);
    let mut weights: Vec<i8> = (0..weight_count).map(|_| input.byte() as i8).collect();
    if spec.bounded && spec.check().is_ok() {
        let mut scales = vec![0.0; spec.num_blocks()];
        for weights in weights.chunks_exact_mut(k) {
            let row: Vec<f32> = weights.iter().map(|&weight| f32::from(weight)).collect();
            quantize_weights(&spec, &row, weights, &mut scales).expect("lengths fit");
        }
    }
    let scale_count = input.length(spec.rows() * spec.num_blocks());
    let scales = input.floats(scale_count);
    let Ok(packed) = pack(&spec, &weights, &scales) else { return };
    let row_block = if input.is() { block } else { input.odd(block) };
    let (x_count, norm) = (input.length(rows * k), input.below(3));
    let (x, weight, bias) = (input.floats(x_count), input.floats(k), input.floats(k));
    let norm_length = input.length(k).min(k);
    let epsilon = input.float();
    let bias_count = input.length(spec.rows());
    let linear_bias = input.is().then(|| input.floats(bias_count));
    let out_count = input.length(rows * columns);
    let residual = input.floats(out_count);
    let residual_kind = input.below(3);
    at_every_level(|level| {
        let norm = match norm {
            0 => Norm::None,
            1 => Norm::Rms { weight: &weight[..norm_length], epsilon },
            _ => Norm::Layer { weight: &weight, bias: &bias[..norm_length], epsilon },
        };
        let mut activations = Quantized::default();
        let quantized = quantize_rows(level, &Serial, (&x, k), norm, row_block, &mut activations).is_ok();
        let mut out = residual.clone();
        let epilogue = Epilogue {
            bias: linear_bias.as_deref(),
            activation,
            residual: [Residual::None, Residual::Add(&residual), Residual::InPlace][residual_kind],
        };
        let multiplied = linear(level, &Serial, &activations, &packed.view(), &epilogue, &mut out).is_ok();
        let (rows, k) = (activations.rows(), activations.k());
        let values: Vec<u8> = (0..rows * k).map(|element| activations.value(element / k, element % k)).collect();
        (quantized, multiplied, values, bits(activations.scales()), bits(&out))
    });
}

fn causal_attention(input: &mut Input<'_>) {
    let kv_heads = 1 + input.below(3);
    let heads = match input.byte() {
        0 => kv_heads + 1,
        1 => 0,
        _ => kv_heads * (1 + input.below(4)),
    };
    let head_dim = [1, 2, 6, 16, 24, 33, 64, 80][input.below(8)];
    let dims = HeadDims { heads, kv_heads, head_dim };
    let width = (heads + 2 * kv_heads) * head_dim;
    let max_len = [16, 32, 144, 20][input.below(4)];
    let num_slots = 1 + input.below(3);
    let mut sequences = Vec::new();
    let mut rows = 0;
    for index in 0..input.below(4) {
        let past = input.below(max_len);
        let new = input.below(max_len + 1 - past).min(20);
        let slot = if input.byte() == 0 { input.odd(index) } else { index % num_slots };
        let (past, first_row) = (input.odd(past), input.odd(rows));
        sequences.push(Sequence { slot, past, new: if input.byte() == 0 { input.odd(new) } else { new }, first_row });
        rows += new;
    }
    let rotary_dim = [0, head_dim / 2 * 2, head_dim / 4 * 2, head_dim + 2, 1][input.below(5)];
    let table = input.length(max_len * rotary_dim / 2);
    let cos = input.floats(table);
    let sine_count = input.length(table);
    let sin = input.floats(sine_count);
    let packed_count = input.length(rows * width);
    let packed = input.floats(packed_count);
    let out_count = input.length(rows * heads * head_dim);
    let cache_count = input.length(num_slots * kv_heads * max_len * head_dim);
    let keys: Vec<f16> = input.floats(cache_count).into_iter().map(f16::from_f32).collect();
    let value_count = input.length(cache_count);
    let values: Vec<f16> = input.floats(value_count).into_iter().map(f16::from_f32).collect();
    let rotary = (rotary_dim > 0).then_some(Rotary { cos: &cos, sin: &sin, rotary_dim });
    let attention = CausalAttention { dims, rotary, scale: input.float() };
    let max_len = input.odd(max_len);
    at_every_level(|level| {
        let (mut keys, mut values, mut out) = (keys.clone(), values.clone(), vec![7.0; out_count]);
        let cache = SlotCache { keys: &mut keys, values: &mut values, max_len };
        let is_run = attention.run(level, &Serial, &packed, &sequences, cache, &mut out).is_ok();
        (is_run, half_bits(&keys), half_bits(&values), bits(&out))
    });
}

fn full_attention(input: &mut Input<'_>) {
    let kv_heads = 1 + input.below(3);
    let heads = kv_heads * (1 + input.below(3));
    let head_dim = [1, 2, 6, 16, 24, 33, 64, 80][input.below(8)];
    let (batch, tokens) = (input.below(3), input.below(40));
    let packed_count = input.length(batch * tokens * (heads + 2 * kv_heads) * head_dim);
    let packed = input.floats(packed_count);
    let out_count = input.length(batch * tokens * heads * head_dim);
    let dims = HeadDims { heads: input.odd(heads), kv_heads: input.odd(kv_heads), head_dim: input.odd(head_dim) };
    let (batch, tokens, scale) = (input.odd(batch), input.odd(tokens), input.float());
    at_every_level(|level| {
        let mut out = vec![7.0; out_count];
        let is_run = attend_all(level, &Serial, dims, scale, &packed, batch, tokens, &mut out).is_ok();
        (is_run, bits(&out))
    });
}

fn greedy(input: &mut Input<'_>) {
    let (rows, columns) = (input.below(5), input.below(200));
    let count = input.length(rows * columns);
    let logits = input.floats(count);
    let columns = input.odd(columns);
    at_every_level(|level| {
        let mut ids = vec![7; rows];
        let is_run = greedy_ids(level, &Serial, &logits, columns, &mut ids).is_ok();
        (is_run, ids)
    });
}

/// Tensors as a bundle's file has them: of any length, for any claim about them.
fn packed_weights(input: &mut Input<'_>) {
    let (k, columns, block) = (input.below(70), input.below(70), [0, 8, 32, 4][input.below(4)]);
    let right = PackSpec { columns, k, block, bounded: input.is(), gated: input.is() };
    let spec = PackSpec { columns: input.odd(columns), k: input.odd(k), block: input.odd(block), ..right };
    let count = |dims: &[usize]| dims.iter().product::<usize>();
    let lengths = if right.check().is_ok() {
        [count(&right.weight_dims()), count(&right.correction_dims()), count(&right.scale_dims())]
    } else {
        [0; 3]
    };
    let weights: Vec<i8> = (0..input.length(lengths[0])).map(|_| input.byte() as i8).collect();
    let corrections: Vec<i32> = (0..input.length(lengths[1])).map(|_| i32::from(input.byte()) << 20).collect();
    let scale_count = input.length(lengths[2]);
    let scales = input.floats(scale_count);
    let Ok(packed) = PackedWeights::new(spec, &weights, &corrections, &scales) else { return };
    let rows = input.below(6);
    let samples: Vec<u8> = (0..rows * spec.k).map(|_| input.byte()).collect();
    let x = input.floats(rows * spec.k);
    let activation = if spec.gated { Activation::SwiGlu } else { Activation::Identity };
    let run = |level| {
        let mut out = vec![0.0; rows * spec.columns];
        let mut activations = Quantized::default();
        match spec.block {
            0 => activations.set_samples(&samples, spec.k).expect("whole rows"),
            block => {
                quantize_rows(level, &Serial, (&x, spec.k), Norm::None, block, &mut activations).expect("lengths fit");
            }
        }
        let epilogue = Epilogue { bias: None, activation, residual: Residual::None };
        linear(level, &Serial, &activations, &packed, &epilogue, &mut out).expect("lengths fit");
        bits(&out)
    };
    // Weights that are said to be bounded and are not may give anything, but nothing else.
    match spec.bounded {
        true => Level::available().into_iter().for_each(|level| drop(run(level))),
        false => drop(at_every_level(run)),
    }
}
