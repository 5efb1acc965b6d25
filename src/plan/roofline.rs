//! How long an engine takes for a batch of each stage: the arithmetic and the bytes that it needs (`export/src/flops.rs` and the
//! model's sizes) over what the device can do, and how much of that is reached in practice: assumed, or measured.

use recaption_export::{Precision, flops};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::plan::device::Device;
use crate::plan::model::Model;

/// Work of one batch of one stage, as the seconds that its parts would take on the device alone, at its peaks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ideal {
    /// Reading the weights.
    pub weights: f64,
    /// Matrix products.
    pub products: f64,
    /// Reading the KV cache.
    pub cache: f64,
}

impl Ideal {
    /// The classic roofline: whatever takes longer, memory or arithmetic.
    #[must_use]
    pub fn roofline(self) -> f64 {
        self.products.max(self.weights + self.cache)
    }

    pub(crate) fn parts(self) -> [f64; 3] {
        [self.weights, self.products, self.cache]
    }
}

/// What batches of a model cost on a device at its peaks.
#[derive(Clone, Copy, Debug)]
pub struct Costs<'a> {
    model: &'a Model,
    bytes_per_second: f64,
    vision_flops: f64,
    decoder_flops: f64,
    /// Tokens of prompt and image, and those of them that are read once for all captions.
    prompt: usize,
    shared: usize,
}

/// What a device multiplies with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// 32-bit floats.
    Fp32,
    /// 16-bit floats of either kind.
    Fp16,
    /// 8-bit floats.
    Fp8,
    /// 8-bit integers.
    Int8,
}

impl Arithmetic {
    /// What weights of `precision` are multiplied in: on GPUs, blocks of integers become fp16 first.
    #[must_use]
    pub fn of(precision: Precision, is_gpu: bool) -> Self {
        match (precision, is_gpu) {
            (Precision::Fp8, _) => Self::Fp8,
            (Precision::Int8, _) | (Precision::Int8Block | Precision::Int4, false) => Self::Int8,
            // A CPU's provider turns 16-bit floats into 32-bit ones.
            (Precision::Fp32, _) | (Precision::Fp16 | Precision::Bf16, false) => Self::Fp32,
            (Precision::Fp16 | Precision::Bf16 | Precision::Int8Block | Precision::Int4, true) => Self::Fp16,
        }
    }

    /// Lower-case name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }

    /// Operations per second of `device`, if it has them.
    #[must_use]
    pub fn rate(self, device: &Device) -> Option<f64> {
        match self {
            Self::Fp32 => device.fp32_flops,
            Self::Fp16 => Some(device.fp16_flops).filter(|&rate| rate > 0.0),
            Self::Fp8 => device.fp8_flops,
            Self::Int8 => device.int8_flops,
        }
    }
}

impl<'a> Costs<'a> {
    /// Of prompts of `prompt` tokens, the image's among them, of which `shared` are read once for all captions.
    ///
    /// # Errors
    /// [`Error::Setting`] when the device does not multiply in the model's precision.
    pub fn new(model: &'a Model, device: &Device, (prompt, shared): (usize, usize)) -> Result<Self> {
        let rate = |precision: Precision| {
            let arithmetic = Arithmetic::of(precision, device.is_gpu);
            arithmetic.rate(device).ok_or_else(|| Error::Setting {
                reason: match (device.is_gpu, precision) {
                    (true, Precision::Int8) => format!("int8 bundles run on processors alone, not on {}", device.kind),
                    _ => format!(
                        "{} has no {} arithmetic for {} weights",
                        device.kind,
                        arithmetic.name(),
                        precision.name()
                    ),
                },
                hint: match device.is_gpu {
                    true => "use --precision fp16, int8-block or int4; for a bundle, which has its own, name its checkpoint or a \
                             config.json instead"
                        .to_owned(),
                    false => "measure this machine with --measure, or plan from a profile with --from".to_owned(),
                },
            })
        };
        Ok(Self {
            model,
            bytes_per_second: device.bytes_per_second,
            vision_flops: rate(model.vision_precision)?,
            decoder_flops: rate(model.precision)?,
            prompt,
            shared,
        })
    }

    /// Vision tower and projector over `batch` images.
    #[must_use]
    pub fn vision(&self, batch: f64) -> Ideal {
        let Model { vision, decoder, vision_bytes, .. } = self.model;
        let flops = flops::vision_tower(vision) as f64 + flops::projector(vision, decoder) as f64;
        Ideal {
            weights: *vision_bytes as f64 / self.bytes_per_second,
            products: batch * flops / self.vision_flops,
            cache: 0.0,
        }
    }

    /// The projector's share of that arithmetic.
    #[must_use]
    pub fn projector_share(&self) -> f64 {
        let projector = flops::projector(&self.model.vision, &self.model.decoder) as f64;
        projector / (projector + flops::vision_tower(&self.model.vision) as f64)
    }

    /// The prompts of `batch` images.
    #[must_use]
    pub fn prefill(&self, batch: f64) -> Ideal {
        let dims = &self.model.decoder;
        let flops = flops::prefill_behind(dims, self.shared, self.prompt.saturating_sub(self.shared)) as f64;
        Ideal {
            weights: self.model.step_bytes as f64 / self.bytes_per_second,
            products: batch * flops / self.decoder_flops,
            cache: batch * self.shared as f64 * self.model.cache_bytes_per_token() / self.bytes_per_second,
        }
    }

    /// One token for each of `batch` captions that see `context` tokens in all, their own among them.
    #[must_use]
    pub fn decode(&self, batch: f64, context: f64) -> Ideal {
        let dims = &self.model.decoder;
        // Linear in both.
        let at = |steps: u64, seen: u64| flops::decode_steps(dims, steps, seen) as f64;
        Ideal {
            weights: self.model.step_bytes as f64 / self.bytes_per_second,
            products: (batch * at(1, 0) + context * at(0, 1)) / self.decoder_flops,
            cache: context * self.model.cache_bytes_per_token() / self.bytes_per_second,
        }
    }
}

/// How far practice falls behind the peaks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub enum Practice {
    /// Shares of the peaks that are reached, and what each batch costs beside: whatever takes longer, memory or arithmetic.
    Assumed {
        /// Of the arithmetic peak.
        products: f64,
        /// Of the memory's.
        memory: f64,
        /// Seconds: launches, copies of ids, the host's part.
        overhead: f64,
    },
    /// How many times longer than ideal each part takes, the parts one after the other.
    Measured {
        /// Reading the weights.
        weights: f64,
        /// Matrix products.
        products: f64,
        /// Reading the cache.
        cache: f64,
    },
}

impl Practice {
    /// Seconds of a batch.
    #[must_use]
    pub fn seconds(self, ideal: Ideal) -> f64 {
        match self {
            Self::Assumed { products, memory, overhead } => {
                (ideal.products / products).max((ideal.weights + ideal.cache) / memory) + overhead
            }
            Self::Measured { weights, products, cache } => {
                let factors = [weights, products, cache];
                ideal.parts().into_iter().zip(factors).map(|(part, factor)| part * factor).sum()
            }
        }
    }
}

impl EnginePractice {
    /// One that is `speed` times as fast.
    #[must_use]
    pub fn faster(self, speed: f64) -> Self {
        let faster = |practice| match practice {
            Practice::Assumed { products, memory, overhead } => {
                Practice::Assumed { products: products * speed, memory: memory * speed, overhead: overhead / speed }
            }
            Practice::Measured { weights, products, cache } => {
                Practice::Measured { weights: weights / speed, products: products / speed, cache: cache / speed }
            }
        };
        Self { vision: faster(self.vision), prefill: faster(self.prefill), decode: faster(self.decode) }
    }
}

/// The practice of each stage of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EnginePractice {
    /// Vision tower and projector.
    pub vision: Practice,
    /// Prompts.
    pub prefill: Practice,
    /// Steps.
    pub decode: Practice,
}
