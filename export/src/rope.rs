//! Tables of the rotary embedding, computed as transformers does (`modeling_rope_utils.py`): frequencies and angles
//! in f32, so that late positions carry the same rounding.

use std::f64::consts::PI;

use crate::config::{Rope, RopeScaling};

/// Cosines and sines, each `[max_positions, padded_head_dim / 2]`; the padding is not rotated.
pub(crate) fn cos_sin_tables(
    rope: &Rope,
    head_dim: usize,
    padded_head_dim: usize,
    max_positions: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut frequencies = inverse_frequencies(rope, head_dim);
    frequencies.resize(padded_head_dim / 2, 0.0);
    let angles = (0..max_positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
    angles.map(|angle| (f64::from(angle).cos() as f32, f64::from(angle).sin() as f32)).unzip()
}

fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            let frequency = 1.0 / rope.theta.powf(f64::from(exponent)) as f32;
            scale(frequency, &rope.scaling)
        })
        .collect()
}

/// Linear: position interpolation (arXiv 2306.15595). LLaMA-3: long wavelengths are divided by `factor`, short ones
/// kept, those between blended.
fn scale(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelength = 2.0 * PI / f64::from(frequency);
            let low_freq_wavelength = original_max_position_embeddings / low_freq_factor;
            let high_freq_wavelength = original_max_position_embeddings / high_freq_factor;
            if wavelength > low_freq_wavelength {
                (f64::from(frequency) / factor) as f32
            } else if wavelength < high_freq_wavelength {
                frequency
            } else {
                let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                ((1.0 - smooth) * f64::from(frequency) / factor + smooth * f64::from(frequency)) as f32
            }
        }
    }
}
