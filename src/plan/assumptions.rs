//! What is assumed where no run was measured: shares of a GPU's datasheet peaks, or of a CPU's measured ones, that captioning
//! reaches, as ranges, each with its reason. docs/planning.md compares them with published speeds.

use serde::Serialize;

use crate::plan::roofline::{EnginePractice, Practice};

/// A number that is not known: from a slow captioner to a fast one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// Of a slow one.
    pub low: f64,
    /// Of most.
    pub likely: f64,
    /// Of a fast one.
    pub high: f64,
}

impl Range {
    /// The three in order.
    #[must_use]
    pub fn values(self) -> [f64; 3] {
        [self.low, self.likely, self.high]
    }

    /// Of three values in order.
    #[must_use]
    pub fn of([low, likely, high]: [f64; 3]) -> Self {
        Self { low, likely, high }
    }

    /// Applies `change` to each.
    #[must_use]
    pub fn map(self, change: impl Fn(f64) -> f64) -> Self {
        Self::of(self.values().map(change))
    }
}

/// An assumption with its reason.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Assumption {
    /// What it is of.
    pub name: &'static str,
    /// What it is.
    pub range: Range,
    /// `share` or `seconds`.
    pub unit: &'static str,
    /// Why.
    pub reason: &'static str,
}

const fn range(low: f64, likely: f64, high: f64) -> Range {
    Range { low, likely, high }
}

/// Share of the arithmetic peak in vision.
pub const VISION: Assumption = Assumption {
    name: "vision, share of peak arithmetic",
    range: range(0.25, 0.40, 0.55),
    unit: "share",
    reason: "matrices of 577 rows an image and 1024 columns fill a GPU only in batches; softmax and norms between them are not counted",
};
/// Share of the arithmetic peak in prefill.
pub const PREFILL: Assumption = Assumption {
    name: "prefill, share of peak arithmetic",
    range: range(0.35, 0.50, 0.65),
    unit: "share",
    reason: "large products run at 60 to 75 % of a datasheet's rate at the clocks that a GPU holds; attention and norms take the rest",
};
/// Share of the arithmetic peak in decode.
pub const DECODE_PRODUCTS: Assumption = Assumption {
    name: "decode, share of peak arithmetic",
    range: range(0.20, 0.35, 0.50),
    unit: "share",
    reason: "products of a few hundred rows; it matters where many captions are in flight",
};
/// Share of the memory's peak in decode.
pub const DECODE_MEMORY: Assumption = Assumption {
    name: "decode, share of peak bandwidth",
    range: range(0.45, 0.65, 0.80),
    unit: "share",
    reason: "streaming weights reaches 80 to 90 % of a datasheet's rate, attention over caches of many lengths less",
};
/// Seconds of a batch that are neither.
pub const OVERHEAD: Assumption = Assumption {
    name: "each batch beside its kernels",
    range: range(1e-3, 3e-4, 1e-4),
    unit: "seconds",
    reason: "launches (a CUDA graph where it is captured), ids to the device and back, one wait",
};
/// Seconds of one core for an image's bytes to become `pixel_values`.
pub const PREPROCESSING: Assumption = Assumption {
    name: "decoding and resizing an image, on one core",
    range: range(0.020, 0.008, 0.004),
    unit: "seconds",
    reason: "web JPEGs of 512 to 1024 pixels; measure yours with `recaption profile`",
};

/// The reason of all shares of a CPU's peaks.
const CPU_REASON: &str = "of peaks measured here, by bundles of target cpu on two processors; other bundles are slower";

/// The assumptions for a GPU, or for a CPU: vision, prefill, products and memory of decode, overhead, preprocessing.
#[must_use]
pub fn all(is_gpu: bool) -> [Assumption; 6] {
    if is_gpu {
        return [VISION, PREFILL, DECODE_PRODUCTS, DECODE_MEMORY, OVERHEAD, PREPROCESSING];
    }
    let of_cpu = |assumption: Assumption, range| Assumption { range, reason: CPU_REASON, ..assumption };
    [
        of_cpu(VISION, range(0.35, 0.55, 0.70)),
        of_cpu(PREFILL, range(0.40, 0.60, 0.75)),
        of_cpu(DECODE_PRODUCTS, range(0.20, 0.30, 0.45)),
        of_cpu(DECODE_MEMORY, range(0.40, 0.60, 0.85)),
        of_cpu(OVERHEAD, range(1e-3, 3e-4, 1e-4)),
        PREPROCESSING,
    ]
}

/// The practice of a slow captioner, of most, and of a fast one.
#[must_use]
pub fn practices(is_gpu: bool) -> [EnginePractice; 3] {
    let [vision, prefill, decode, memory, overhead, _] = all(is_gpu).map(|assumption| assumption.range.values());
    [0, 1, 2].map(|i| {
        let of =
            |products: [f64; 3]| Practice::Assumed { products: products[i], memory: memory[i], overhead: overhead[i] };
        EnginePractice { vision: of(vision), prefill: of(prefill), decode: of(decode) }
    })
}

#[cfg(test)]
mod tests {
    use recaption_export::{DataType, Precision, Target, VisionDims};

    use super::*;
    use crate::plan::device::Device;
    use crate::plan::model::{Form, Model};
    use crate::plan::roofline::Costs;

    /// Images per second of a device that is always full: `slots` captions in flight, `new` tokens each.
    fn rates(model: &Model, kind: &str, slots: f64, prompt: usize, new: usize) -> Range {
        let device = Device::of_kind(kind).unwrap();
        let costs = Costs::new(model, &device, (prompt, 0)).unwrap();
        Range::of(practices(true).map(|practice| {
            let steps = (new - 1) as f64;
            let context = slots * (prompt as f64 + steps / 2.0 + 1.0);
            let vision =
                if model.vision.num_layers == 0 { 0.0 } else { practice.vision.seconds(costs.vision(8.0)) / 8.0 };
            let prefill = practice.prefill.seconds(costs.prefill(8.0)) / 8.0;
            let decode = practice.decode.seconds(costs.decode(slots, context)) * steps / slots;
            1.0 / (vision + prefill + decode)
        }))
    }

    fn model(name: &str, precision: Precision) -> Model {
        Model::find(name, Form { precision, target: Target::Ort }).unwrap()
    }

    /// Llama-3.1-8B in fp8 on an H100 through TensorRT-LLM, from its own published table: output tokens a second with as many
    /// requests in flight as fit, 128 and 2048 tokens in, 128 out. An engine tuned by the GPU's maker, so a fast one.
    #[test]
    fn published_token_rates_of_an_8b_in_fp8_lie_in_the_range() {
        let mut model = model("llava-llama-3-8b", Precision::Fp8);
        // Text only: no tower.
        model.vision = VisionDims { num_layers: 0, patch_size: 1, image_size: 0, ..model.vision };
        // Its cache has a byte for each value.
        model.cache.dtype = DataType::U8;
        for (prompt, published) in [(128, 28_312.0), (2048, 3_450.0)] {
            let slots = ((0.9 * 80e9 - 9e9) / ((prompt + 128) as f64 * model.cache_bytes_per_token())).min(2048.0);
            let Range { low, likely, high } = rates(&model, "h100-sxm", slots, prompt, 128).map(|rate| rate * 128.0);
            assert!((low..high).contains(&published), "{prompt}: {low} {likely} {high}, published {published}");
            println!("{prompt}/128: {low:.0} {likely:.0} {high:.0}, published {published}");
        }
    }

    /// LLaVA-1.5 through vLLM and SGLang as published: 9.33 images a second of the 7B on an A100, 18.6 of the 13B on an H100. The
    /// lengths of their answers are not; LLaVA's own benchmark questions get 60 to 130 tokens.
    #[test]
    fn published_image_rates_of_llava_lie_in_the_range() {
        for (name, kind, slots, published) in
            [("llava-1.5-7b", "a100-80", 128.0, 9.33), ("llava-1.5-13b", "h100-sxm", 64.0, 18.6)]
        {
            let model = model(name, Precision::Fp16);
            let slow = rates(&model, kind, slots, 576 + 60, 130);
            let fast = rates(&model, kind, slots, 576 + 60, 60);
            println!(
                "{name} on {kind}: {:.1} ({:.1}) to {:.1} ({:.1}), published {published}",
                slow.low, slow.likely, fast.high, fast.likely
            );
            assert!((slow.low..fast.high).contains(&published), "{name}: {slow:?} to {fast:?}, published {published}");
        }
    }
}
