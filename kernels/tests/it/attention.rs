//! Attention against a plain reference in f64, and against itself in other pieces, at other levels and on other threads.

use std::num::NonZeroUsize;

use half::f16;
use proptest::prelude::*;
use recaption_kernels::*;

use crate::random::{Random, bits};

#[derive(Clone, Copy, Debug)]
struct Case {
    dims: HeadDims,
    rotary_dim: usize,
    /// Tokens of each sequence.
    lengths: [usize; 3],
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let widths = [1usize, 2, 6, 16, 24, 33, 64, 80, 128, 160];
    // Miri takes ten thousand times as long.
    let num_widths = if cfg!(miri) { 4 } else { widths.len() };
    let width = prop::sample::select(widths[..num_widths].to_vec());
    let lengths = if cfg!(miri) { [0..2, 1..4, 1..8] } else { [0..40usize, 1..200usize, 1..300usize] };
    let (groups, kv_heads) = if cfg!(miri) { (1..3, 1..2) } else { (1..6usize, 1..4usize) };
    (groups, kv_heads, width, 0..3u8, lengths, any::<u64>()).prop_map(
        |(group, kv_heads, head_dim, rotary, lengths, seed)| Case {
            dims: HeadDims { heads: group * kv_heads, kv_heads, head_dim },
            rotary_dim: [0, head_dim / 2 * 2, head_dim / 4 * 2][usize::from(rotary)],
            lengths,
            seed,
        },
    )
}

struct Data {
    /// `[tokens, packed]` of each sequence.
    packed: Vec<Vec<f32>>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    max_len: usize,
}

impl Case {
    fn packed_width(&self) -> usize {
        (self.dims.heads + 2 * self.dims.kv_heads) * self.dims.head_dim
    }

    fn width(&self) -> usize {
        self.dims.heads * self.dims.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dims.head_dim as f32).sqrt()
    }

    fn data(&self) -> Data {
        let mut random = Random(self.seed);
        let max_len = self.lengths.iter().max().map_or(0, |n| n.next_multiple_of(KEY_PANEL)).max(KEY_PANEL);
        let angles = random.f32s(max_len * self.rotary_dim / 2);
        Data {
            packed: self.lengths.map(|n| random.f32s(n * self.packed_width())).to_vec(),
            cos: angles.iter().map(|x| x.cos()).collect(),
            sin: angles.iter().map(|x| x.sin()).collect(),
            max_len,
        }
    }

    fn attention<'a>(&self, data: &'a Data) -> CausalAttention<'a> {
        let rotary = Rotary { cos: &data.cos, sin: &data.sin, rotary_dim: self.rotary_dim };
        CausalAttention { dims: self.dims, rotary: (self.rotary_dim > 0).then_some(rotary), scale: self.scale() }
    }

    /// All sequences through a cache of NaN, `step` tokens of each at a time, sequence `i` in slot `2 - i`.
    fn run(&self, data: &Data, level: Level, workers: &dyn Workers, step: usize) -> Vec<Vec<f32>> {
        let cache_len = 3 * self.dims.kv_heads * data.max_len * self.dims.head_dim;
        let (mut keys, mut values) = (vec![f16::NAN; cache_len], vec![f16::NAN; cache_len]);
        let mut out: Vec<Vec<f32>> = self.lengths.map(|n| vec![0.0; n * self.width()]).to_vec();
        let longest = *self.lengths.iter().max().expect("three");
        for past in (0..longest).step_by(step) {
            let mut packed = Vec::new();
            let mut sequences = Vec::new();
            for (i, &length) in self.lengths.iter().enumerate() {
                let new = step.min(length.saturating_sub(past));
                let first_row = packed.len() / self.packed_width();
                sequences.push(Sequence { slot: 2 - i, past: past.min(length), new, first_row });
                let from = past.min(length) * self.packed_width();
                packed.extend_from_slice(&data.packed[i][from..from + new * self.packed_width()]);
            }
            let mut rows = vec![7.0; packed.len() / self.packed_width() * self.width()];
            let cache = SlotCache { keys: &mut keys, values: &mut values, max_len: data.max_len };
            self.attention(data).run(level, workers, &packed, &sequences, cache, &mut rows).expect("runs");
            for (i, sequence) in sequences.iter().enumerate() {
                let rows = &rows[sequence.first_row * self.width()..][..sequence.new * self.width()];
                out[i][sequence.past * self.width()..][..rows.len()].copy_from_slice(rows);
            }
        }
        out
    }

    /// One head of one token, rotated.
    fn head(&self, data: &Data, sequence: usize, token: usize, head: usize, is_rotated: bool) -> Vec<f64> {
        let at = token * self.packed_width() + head * self.dims.head_dim;
        let x = &data.packed[sequence][at..at + self.dims.head_dim];
        let mut y: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let half = self.rotary_dim / 2;
        for i in (0..half).filter(|_| is_rotated) {
            let (cos, sin) = (f64::from(data.cos[token * half + i]), f64::from(data.sin[token * half + i]));
            let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
            (y[i], y[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
        y
    }

    fn reference(&self, data: &Data, sequence: usize, token: usize) -> Vec<f64> {
        let HeadDims { heads, kv_heads, .. } = self.dims;
        let group = heads / kv_heads;
        let through_f16 = |x: Vec<f64>| -> Vec<f64> { x.iter().map(|&x| f16::from_f32(x as f32).to_f64()).collect() };
        (0..heads)
            .flat_map(|head| {
                let query = self.head(data, sequence, token, head, true);
                let key = |j| through_f16(self.head(data, sequence, j, heads + head / group, true));
                let value = |j| through_f16(self.head(data, sequence, j, heads + kv_heads + head / group, false));
                mix(&query, f64::from(self.scale()), (0..=token).map(|j| (key(j), value(j))))
            })
            .collect()
    }
}

fn mix(query: &[f64], scale: f64, seen: impl Iterator<Item = (Vec<f64>, Vec<f64>)>) -> Vec<f64> {
    let seen: Vec<_> =
        seen.map(|(key, value)| (scale * query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>(), value)).collect();
    let most = seen.iter().map(|(score, _)| *score).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = seen.iter().map(|(score, _)| (score - most).exp()).sum();
    let column = |d: usize| seen.iter().map(|(score, value)| (score - most).exp() / total * value[d]).sum();
    (0..query.len()).map(column).collect()
}

fn near(got: &[f32], wanted: &[f64]) -> Result<(), TestCaseError> {
    let largest = wanted.iter().fold(1e-3, |largest: f64, x| largest.max(x.abs()));
    for (i, (&got, &wanted)) in got.iter().zip(wanted).enumerate() {
        prop_assert!((f64::from(got) - wanted).abs() < 1e-3 * largest, "{i}: {got} for {wanted}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 48 }, failure_persistence: None, ..Default::default() })]

    // Keys near the middle between two f16 may be rounded to either: hence a tolerance of one part in a thousand.
    #[test]
    fn matches_the_reference(case in cases()) {
        let data = case.data();
        let out = case.run(&data, Level::current().expect("a level"), &Serial, 512);
        for (sequence, rows) in out.iter().enumerate() {
            for token in (0..case.lengths[sequence]).step_by(37).chain(case.lengths[sequence].checked_sub(1)) {
                near(&rows[token * case.width()..][..case.width()], &case.reference(&data, sequence, token))?;
            }
        }
    }

    #[test]
    fn gives_the_same_bits_in_any_pieces_at_every_level_and_split(case in cases(), step in 1..70usize, threads in 1..5usize) {
        let data = case.data();
        let whole = case.run(&data, Level::PORTABLE, &Serial, 512);
        let workers = Scoped(NonZeroUsize::new(threads).expect("one or more"));
        for level in Level::available() {
            for step in [step, 512] {
                let out = case.run(&data, level, &workers, step);
                for (a, b) in whole.iter().zip(&out) {
                    prop_assert_eq!(bits(a), bits(b), "{} in steps of {}", level.name(), step);
                }
            }
        }
    }

    #[test]
    fn a_sequence_depends_on_no_other(case in cases()) {
        let mut data = case.data();
        let level = Level::current().expect("a level");
        let clean = case.run(&data, level, &Serial, 512);
        data.packed[1].fill(f32::NAN);
        let spoilt = case.run(&data, level, &Serial, 512);
        prop_assert_eq!(bits(&clean[0]), bits(&spoilt[0]));
        prop_assert!(spoilt[1].iter().all(|x| x.is_nan()));
        prop_assert_eq!(bits(&clean[2]), bits(&spoilt[2]));
    }

    // Tokens pass f16's range or are NaN: those before them, computed in the same call, may not notice.
    #[test]
    fn a_token_depends_on_no_later_one(case in cases(), from in any::<prop::sample::Index>(), step in 1..70usize) {
        let mut data = case.data();
        let from = from.index(case.lengths[1]);
        let clean = case.run(&data, Level::PORTABLE, &Serial, 512);
        for spoilt in [1e6, f32::NAN] {
            data.packed[1][from * case.packed_width()..].fill(spoilt);
            for level in Level::available() {
                for step in [step, 512] {
                    let out = case.run(&data, level, &Serial, step);
                    let before = from * case.width();
                    prop_assert_eq!(bits(&clean[1][..before]), bits(&out[1][..before]), "{} before {}", level.name(), from);
                }
            }
        }
    }

    #[test]
    fn every_row_to_every_row(case in cases(), batch in 1..3usize) {
        let tokens = case.lengths[1];
        let width = case.packed_width();
        let packed = Random(case.seed).f32s(batch * tokens * width);
        let run = |level: Level, workers: &dyn Workers| {
            let mut out = vec![7.0; batch * tokens * case.width()];
            attend_all(level, workers, case.dims, case.scale(), &packed, batch, tokens, &mut out).expect("runs");
            out
        };
        let out = run(Level::PORTABLE, &Serial);
        for level in Level::available() {
            prop_assert_eq!(bits(&out), bits(&run(level, &Scoped(NonZeroUsize::new(3).expect("three")))));
        }
        let HeadDims { heads, kv_heads, head_dim } = case.dims;
        let part = |row: usize, head: usize| -> Vec<f64> {
            packed[row * width + head * head_dim..][..head_dim].iter().map(|&x| f64::from(x)).collect()
        };
        for row in (0..batch * tokens).step_by(41) {
            let first = row / tokens * tokens;
            for head in 0..heads {
                let kv_head = head * kv_heads / heads;
                let seen = (first..first + tokens).map(|j| (part(j, heads + kv_head), part(j, heads + kv_heads + kv_head)));
                let wanted = mix(&part(row, head), f64::from(case.scale()), seen);
                near(&out[row * case.width() + head * head_dim..][..head_dim], &wanted)?;
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let dims = HeadDims { heads: 2, kv_heads: 1, head_dim: 8 };
    let attention = CausalAttention { dims, rotary: None, scale: 1.0 };
    let sequence = Sequence { slot: 0, past: 0, new: 2, first_row: 0 };
    let run = |attention: CausalAttention<'_>, rows: usize, sequences: &[Sequence], max_len: usize| {
        let (mut keys, mut values) = (vec![f16::ZERO; 2 * 16 * 8], vec![f16::ZERO; 2 * 16 * 8]);
        let cache = SlotCache { keys: &mut keys, values: &mut values, max_len };
        let mut out = vec![0.0; rows * 16];
        attention.run(Level::PORTABLE, &Serial, &vec![0.0; rows * 32], sequences, cache, &mut out)
    };
    assert!(run(attention, 2, &[sequence], 16).is_ok());
    assert!(run(attention, 2, &[], 16).is_ok());
    assert!(run(attention, 1, &[sequence], 16).is_err(), "more tokens than rows");
    assert!(run(attention, 2, &[sequence], 12).is_err(), "half a panel");
    assert!(run(attention, 2, &[sequence], 0).is_err(), "no cache");
    assert!(run(attention, 2, &[Sequence { slot: 2, ..sequence }], 16).is_err(), "no such slot");
    assert!(run(attention, 2, &[Sequence { past: 15, ..sequence }], 16).is_err(), "a full slot");
    assert!(run(attention, 2, &[Sequence { past: usize::MAX, ..sequence }], 16).is_err());
    assert!(run(attention, 4, &[sequence, Sequence { first_row: 2, ..sequence }], 16).is_err(), "one slot twice");
    assert!(run(attention, 4, &[sequence, Sequence { slot: 1, first_row: 1, ..sequence }], 16).is_err(), "shared rows");
    let odd = HeadDims { heads: 3, kv_heads: 2, head_dim: 8 };
    assert!(run(CausalAttention { dims: odd, ..attention }, 2, &[sequence], 16).is_err());
    for rotary_dim in [0, 3, 10] {
        let rotary = Rotary { cos: &[1.0; 160], sin: &[0.0; 160], rotary_dim };
        assert!(run(CausalAttention { rotary: Some(rotary), ..attention }, 2, &[sequence], 16).is_err());
    }
    let short = Rotary { cos: &[1.0; 4], sin: &[0.0; 4], rotary_dim: 8 };
    assert!(run(CausalAttention { rotary: Some(short), ..attention }, 2, &[sequence], 16).is_err(), "one position");
    assert!(attend_all(Level::PORTABLE, &Serial, dims, 1.0, &[0.0; 64], 1, 3, &mut [0.0; 48]).is_err());
}
