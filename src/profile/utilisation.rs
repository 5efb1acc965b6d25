//! How much of what a machine can do a stage used: the one definition, for `profile`, `plan` and the benches.
//!
//! ```text
//! MFU        = FLOP / (seconds x GEMM peak)
//! bandwidth  = bytes / (seconds x memory-read peak)
//! roofline   = max(FLOP / GEMM peak, bytes / memory-read peak) / seconds
//! ```
//!
//! - **FLOP** are the model's, by `recaption_export::flops`: what the graphs have to compute for the images and tokens that went
//!   through them. Padding is not counted, nor is a prompt's beginning that was read once for all captions.
//! - **Bytes** are those that had to be read from memory: in each batch the weights of the stage's graphs, less tables of which
//!   single rows are looked up; in a decode step also the keys and values of all tokens that its captions see. Activations are
//!   not counted.
//! - **Seconds** are the device's: the time that engines spent in the stage, their own batches or others', divided by the number of engines that share the
//!   device. Time without work, or in other stages, is not in a stage's seconds. On a GPU the time is that of its own clock.
//! - **Peaks** are of one whole device, measured in the same process through the same provider (`peaks.rs`). The GEMM peak is
//!   that of 8-bit integers where the stage's weights are `int8`, else that of floats.

use recaption_export::{Precision, flops};

use crate::profile::{BundleFacts, Peaks, Settings, StageProfile, StageUtilisation, Utilisation};

/// Bytes that `num_batches` runs of a stage read, `weight_bytes` each, and `context_tokens` of the KV cache.
fn bytes(num_batches: u64, weight_bytes: u64, context_tokens: u64, kv_bytes_per_token: u64) -> f64 {
    num_batches as f64 * weight_bytes as f64 + context_tokens as f64 * kv_bytes_per_token as f64
}

/// One stage, from what it did and the device's seconds it took.
fn of_stage(flops: f64, bytes: f64, seconds: f64, gemm: f64, read: f64) -> StageUtilisation {
    let (of_flops, of_bytes) = (flops / gemm, bytes / read);
    let share = |least: f64| if seconds > 0.0 { least / seconds } else { 0.0 };
    StageUtilisation {
        flops,
        bytes,
        seconds,
        mfu: share(of_flops),
        bandwidth: share(of_bytes),
        roofline: share(of_flops.max(of_bytes)),
    }
}

/// What vision, prefill and decode made of the machine in a run of `wall_seconds`.
#[must_use]
pub fn utilisation(
    bundle: &BundleFacts,
    settings: &Settings,
    [vision, prefill, decode]: [&StageProfile; 3],
    wall_seconds: f64,
    peaks: &Peaks,
) -> Utilisation {
    let (num_devices, per_device) = devices(settings);
    let seconds = |stage: &StageProfile| {
        let of_engines = stage.service_seconds + stage.helped_seconds;
        let engines = if stage.device_seconds > 0.0 { stage.device_seconds } else { of_engines };
        engines / per_device
    };
    let weights = |graph: &str| bundle.weight_bytes.get(graph).copied().unwrap_or(0);
    let gemm = |precision| match (precision, &peaks.int8) {
        (Precision::Int8, Some(int8)) => int8.rate,
        _ => peaks.float.rate,
    };
    let (of_vision, of_decoder) = (gemm(bundle.vision_precision), gemm(bundle.precision));
    let read = peaks.memory_read.rate;
    let vision_flops =
        flops::vision_tower(&bundle.vision) as f64 + flops::projector(&bundle.vision, &bundle.decoder) as f64;
    let num_read = settings.prompt_tokens - settings.shared_prompt_tokens;
    let prefill_flops = flops::prefill_behind(&bundle.decoder, settings.shared_prompt_tokens, num_read) as f64;
    let decode_flops = flops::decode_steps(&bundle.decoder, decode.num_tokens, decode.context_tokens) as f64;
    let vision = of_stage(
        vision.num_images as f64 * vision_flops,
        bytes(vision.num_batches, weights("vision_tower") + weights("projector"), 0, 0),
        seconds(vision),
        of_vision,
        read,
    );
    let prefill = of_stage(
        prefill.num_images as f64 * prefill_flops,
        bytes(prefill.num_batches, weights("decoder"), 0, 0),
        seconds(prefill),
        of_decoder,
        read,
    );
    let decode = of_stage(
        decode_flops,
        bytes(decode.num_batches, weights("decoder"), decode.context_tokens, bundle.kv_bytes_per_token),
        seconds(decode),
        of_decoder,
        read,
    );
    let stages = [&vision, &prefill, &decode];
    let seconds = wall_seconds * num_devices;
    let least = |share: fn(&StageUtilisation) -> f64| {
        stages.iter().map(|stage| share(stage) * stage.seconds).sum::<f64>() / seconds.max(1e-9)
    };
    let run = StageUtilisation {
        flops: stages.iter().map(|stage| stage.flops).sum(),
        bytes: stages.iter().map(|stage| stage.bytes).sum(),
        seconds,
        mfu: least(|stage| stage.mfu),
        bandwidth: least(|stage| stage.bandwidth),
        roofline: least(|stage| stage.roofline),
    };
    Utilisation { vision, prefill, decode, run }
}

/// Devices, and engines on each.
fn devices(settings: &Settings) -> (f64, f64) {
    let mut names: Vec<&str> = settings.engines.iter().map(|engine| engine.device.as_str()).collect();
    let num_engines = names.len().max(1);
    names.sort_unstable();
    names.dedup();
    let num_devices = names.len().max(1);
    (num_devices as f64, num_engines as f64 / num_devices as f64)
}
