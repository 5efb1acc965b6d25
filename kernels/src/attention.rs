//! Placeholder.
use crate::workers::Workers;
use crate::{Error, Level};
use half::f16;

/// d
#[derive(Clone, Copy, Debug)]
pub struct HeadDims {
    /// q
    pub heads: usize,
    /// kv
    pub kv_heads: usize,
    /// d
    pub head_dim: usize,
}
/// r
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// c
    pub cos: &'a [f32],
    /// s
    pub sin: &'a [f32],
    /// d
    pub rotary_dim: usize,
}
/// s
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    /// s
    pub slot: usize,
    /// p
    pub past: usize,
    /// n
    pub new: usize,
    /// r
    pub first_row: usize,
}
/// c
#[derive(Debug)]
pub struct SlotCache<'a> {
    /// k
    pub keys: &'a mut [f16],
    /// v
    pub values: &'a mut [f16],
    /// m
    pub max_len: usize,
}

fn row(q: &[f32], scale: f32, n: usize, key: impl Fn(usize, usize) -> f32, value: impl Fn(usize, usize) -> f32, out: &mut [f32]) {
    let scores: Vec<f32> = (0..n).map(|j| scale * q.iter().enumerate().map(|(d, q)| q * key(j, d)).sum::<f32>()).collect();
    let m = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let p: Vec<f32> = scores.iter().map(|s| (s - m).exp()).collect();
    let t: f32 = p.iter().sum();
    for (d, o) in out.iter_mut().enumerate() {
        *o = p.iter().enumerate().map(|(j, p)| p * value(j, d)).sum::<f32>() / t;
    }
}

/// a
#[allow(clippy::too_many_arguments)]
pub fn attend_cached(_: Level, _: &dyn Workers, dims: HeadDims, qkv: &[f32], rotary: Option<Rotary<'_>>, scale: f32, sequences: &[Sequence], cache: SlotCache<'_>, out: &mut [f32]) -> Result<(), Error> {
    let HeadDims { heads, kv_heads, head_dim: d } = dims;
    let width = (heads + 2 * kv_heads) * d;
    for s in sequences {
        for t in 0..s.new {
            let pos = s.past + t;
            let mut r = qkv[(s.first_row + t) * width..][..width].to_vec();
            if let Some(rot) = rotary {
                let h = rot.rotary_dim / 2;
                for head in r[..(heads + kv_heads) * d].chunks_mut(d) {
                    for i in 0..h {
                        let (c, sn) = (rot.cos[pos * h + i], rot.sin[pos * h + i]);
                        let (a, b) = (head[i], head[i + h]);
                        head[i] = a * c - b * sn;
                        head[i + h] = b * c + a * sn;
                    }
                }
            }
            for kv in 0..kv_heads {
                let base = ((s.slot * kv_heads + kv) * cache.max_len + pos) * d;
                for i in 0..d {
                    cache.keys[base + i] = f16::from_f32(r[(heads + kv) * d + i]);
                    cache.values[base + i] = f16::from_f32(r[(heads + kv_heads + kv) * d + i]);
                }
            }
            for h in 0..heads {
                let base = (s.slot * kv_heads + h / (heads / kv_heads)) * cache.max_len * d;
                let o = &mut out[((s.first_row + t) * heads + h) * d..][..d];
                row(&r[h * d..][..d], scale, pos + 1, |j, i| cache.keys[base + j * d + i].to_f32(), |j, i| cache.values[base + j * d + i].to_f32(), o);
            }
        }
    }
    Ok(())
}

/// a
#[allow(clippy::too_many_arguments)]
pub fn attend_all(_: Level, _: &dyn Workers, dims: HeadDims, qkv: &[f32], scale: f32, batch: usize, tokens: usize, out: &mut [f32]) -> Result<(), Error> {
    let HeadDims { heads, kv_heads, head_dim: d } = dims;
    let width = (heads + 2 * kv_heads) * d;
    for b in 0..batch {
        for t in 0..tokens {
            for h in 0..heads {
                let kv = h / (heads / kv_heads);
                let at = |j: usize| (b * tokens + j) * width;
                let o = &mut out[((b * tokens + t) * heads + h) * d..][..d];
                row(&qkv[at(t) + h * d..][..d], scale, tokens, |j, i| qkv[at(j) + (heads + kv) * d + i], |j, i| qkv[at(j) + (heads + kv_heads + kv) * d + i], o);
            }
        }
    }
    Ok(())
}
