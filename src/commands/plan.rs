//! `recaption plan`.

mod table;

use std::io::Write;
use std::path::Path;

use recaption_export::{ExportOptions, MANIFEST_FILE, Precision, Target};

use crate::cli::PlanArgs;
use crate::commands::Outcome;
use crate::commands::profile::PROFILE_FILE;
use crate::error::{Error, Result};
use crate::model::prompt::DEFAULT_PROMPT_TOKENS;
use crate::plan::assumptions::{self, Range};
use crate::plan::device::Device;
use crate::plan::model::{Form, Model};
use crate::plan::{Basis, Question, profiled};
use crate::profile::{Profile, peaks};
use crate::runtime::{self, host};

const DEFAULT_NEW_TOKENS: f64 = 64.0;
const DEFAULT_MAX_NEW_TOKENS: u32 = 128;
/// How far a plan from a profile may be off, as a share of the speed: for the same model and machine
/// (benches/runs/2026-11-28-2core/plan.md), and for another of either, which nobody has measured.
const SAME_SPREAD: f64 = 0.1;
const OTHER_SPREAD: f64 = 0.25;

pub(super) fn execute(args: &PlanArgs) -> anyhow::Result<Outcome> {
    let plan = question(args)?.answer()?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&plan)? + "\n",
        false => table::render(&plan, args.price_per_hour),
    };
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(Error::io("write", Path::new("standard output")))?;
    Ok(Outcome::Success)
}

fn question(args: &PlanArgs) -> Result<Question> {
    if let Some(path) = &args.from {
        return scaled(args, path);
    }
    let text = args.model.as_deref().unwrap_or_default();
    refuse_form_of_bundle(args, text)?;
    let model = Model::find(text, form(args)?)?;
    let device = if args.measure { this_machine(&model)? } else { device(args)? };
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    // As `recaption run` has it: one for each core with this project's own operators.
    let num_engines = if model.target == Target::Cpu { num_cores } else { 1 };
    Ok(Question {
        practices: assumptions::practices(device.is_gpu),
        basis: Basis::Assumed { assumptions: assumptions::all(device.is_gpu).to_vec() },
        num_devices: args.devices,
        num_engines: args.engines.map_or(num_engines, usize::from),
        num_slots: args.slots.map(usize::from),
        vision_batch: args.vision_batch.map(usize::from),
        memory_utilization: args.gpu_memory_utilization,
        prompt_tokens: args.prompt_tokens.unwrap_or(DEFAULT_PROMPT_TOKENS) as usize,
        shared_prompt_tokens: 0,
        new_tokens: lengths(args.new_tokens.unwrap_or(DEFAULT_NEW_TOKENS)),
        max_new_tokens: max_new_tokens(args, DEFAULT_MAX_NEW_TOKENS, DEFAULT_NEW_TOKENS),
        num_images: args.images,
        price_per_hour: args.price_per_hour,
        preprocessing: assumptions::PREPROCESSING.range,
        num_cores: args.cores.or(args.measure.then_some(num_cores as f64)),
        seconds_per_caption: 0.0,
        seconds_per_run: 0.0,
        model,
        device,
    })
}

/// A question about what was profiled, unless the user says otherwise.
fn scaled(args: &PlanArgs, path: &Path) -> Result<Question> {
    let profile = Profile::read(&if path.is_dir() { path.join(PROFILE_FILE) } else { path.to_owned() })?;
    let is_elsewhere = args.device_kind.is_some() || args.peak_tflops.is_some();
    let scaled = profiled::scale(&profile, is_elsewhere)?;
    let model = match &args.model {
        Some(text) => {
            let of_profile = Form { precision: scaled.model.precision, target: scaled.model.target };
            refuse_form_of_bundle(args, text)?;
            let is_given = args.precision.is_some() || args.target.is_some();
            Model::find(text, if is_given { form(args)? } else { of_profile })?
        }
        None => scaled.model.clone(),
    };
    let device = if is_elsewhere { device(args)? } else { scaled.device.clone() };
    let is_other_model = (&model.vision, &model.decoder, model.precision, model.target)
        != (&scaled.model.vision, &scaled.model.decoder, scaled.model.precision, scaled.model.target);
    let spread = match (is_elsewhere, is_other_model) {
        (false, false) => SAME_SPREAD,
        (true, false) | (false, true) => OTHER_SPREAD,
        (true, true) => 2.0 * OTHER_SPREAD,
    };
    let preprocessing = scaled.seconds_per_image;
    let new_tokens = scaled_lengths(&scaled.lengths, args.new_tokens.unwrap_or(scaled.new_tokens), args.max_new_tokens);
    let longest = new_tokens.iter().copied().max().unwrap_or(0);
    Ok(Question {
        practices: [1.0 - spread, 1.0, 1.0 + spread].map(|speed| scaled.practice.faster(speed)),
        basis: Basis::Profile {
            machine: scaled.device.kind.clone(),
            model: scaled.model.name.clone(),
            spread,
            practice: scaled.practice,
        },
        num_devices: args.devices,
        num_engines: args.engines.map_or(scaled.num_engines, usize::from),
        // Elsewhere and for another model as many as fit.
        num_slots: args.slots.map(usize::from).or((spread == SAME_SPREAD).then_some(scaled.num_slots)),
        vision_batch: args.vision_batch.map(usize::from).or((!is_elsewhere).then_some(scaled.vision_batch)),
        memory_utilization: args.gpu_memory_utilization,
        prompt_tokens: args.prompt_tokens.map_or(scaled.prompt_tokens, |tokens| tokens as usize),
        shared_prompt_tokens: if model.target == Target::Cpu { scaled.shared_prompt_tokens } else { 0 },
        new_tokens,
        max_new_tokens: max_new_tokens(args, scaled.max_new_tokens as u32, scaled.new_tokens).max(longest),
        num_images: args.images,
        price_per_hour: args.price_per_hour,
        preprocessing: Range { low: preprocessing, likely: preprocessing, high: preprocessing },
        // Elsewhere there are enough, unless the user says.
        num_cores: args.cores.or((!is_elsewhere).then_some(scaled.num_cores)),
        seconds_per_caption: scaled.seconds_per_caption,
        seconds_per_run: scaled.seconds_per_run,
        model,
        device,
    })
}

/// This machine's processor, measured.
///
/// # Errors
/// [`Error::Setting`] for a model that it does not multiply as it is.
fn this_machine(model: &Model) -> Result<Device> {
    refuse_gpu_floats(model)?;
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let peaks =
        peaks::measure_for(runtime::Device::Cpu, [model.precision, model.vision_precision], model.target, num_threads)?;
    Ok(Device {
        kind: host::processor_name().unwrap_or_else(|| "this machine".to_owned()),
        fp16_flops: 0.0,
        fp8_flops: None,
        int8_flops: peaks.int8.map(|peak| peak.rate).or(Some(peaks.float.rate)),
        fp32_flops: Some(peaks.float.rate),
        bytes_per_second: peaks.memory_read.rate,
        memory_bytes: host::available_memory().unwrap_or(u64::MAX),
        source: format!("measured now, {num_threads} threads"),
        is_gpu: false,
    })
}

/// A CPU's provider multiplies no short floats: it turns fp16 and fp8 into fp32 and back, at a cost that no peak tells, and bf16 it
/// does not run.
///
/// # Errors
/// [`Error::Setting`] for models of any of them.
fn refuse_gpu_floats(model: &Model) -> Result<()> {
    let is_short = |precision: &Precision| matches!(precision, Precision::Fp16 | Precision::Bf16 | Precision::Fp8);
    match [model.precision, model.vision_precision].into_iter().find(is_short) {
        Some(precision) => Err(Error::Setting {
            reason: format!("--measure says nothing of {0} weights: on a CPU ONNX Runtime has no {0} arithmetic", precision.name()),
            hint: "use --precision int8 --target cpu, the fastest there, or --precision fp32; for a bundle, which has its own, \
                   name its checkpoint or a config.json instead"
                .to_owned(),
        }),
        None => Ok(()),
    }
}

/// What the user asks for, the default, and at least the mean.
fn max_new_tokens(args: &PlanArgs, default: u32, mean: f64) -> usize {
    let mean = args.new_tokens.unwrap_or(mean).ceil() as usize;
    args.max_new_tokens.map_or((default as usize).max(mean), |max| max as usize)
}

/// # Errors
/// [`Error::Setting`] when `model` is a bundle, which is exported already, and the user says how it would be.
fn refuse_form_of_bundle(args: &PlanArgs, model: &str) -> Result<()> {
    let flag = match (args.precision, args.target) {
        (Some(_), _) => "--precision",
        (None, Some(_)) => "--target",
        (None, None) => return Ok(()),
    };
    if !Path::new(model).join(MANIFEST_FILE).is_file() {
        return Ok(());
    }
    Err(Error::Setting {
        reason: format!("{flag}: `{model}` is a bundle, which has a precision and a target already"),
        hint: format!("leave {flag} out, or name the checkpoint instead, its config.json, or a well-known captioner"),
    })
}

/// How a checkpoint would be exported: where nobody says, as the README does it for the device.
///
/// # Errors
/// What export refuses.
fn form(args: &PlanArgs) -> Result<Form> {
    let default = if args.measure { Precision::Int8 } else { Precision::Fp16 };
    let precision = args.precision.map_or(default, Precision::from);
    let target = match (args.target, precision) {
        (Some(target), _) => target.into(),
        (None, Precision::Fp8) => Target::TensorRt,
        (None, Precision::Int8) if args.measure => Target::Cpu,
        (None, _) => Target::Ort,
    };
    ExportOptions { precision, target, ..ExportOptions::default() }.check()?;
    Ok(Form { precision, target })
}

/// # Errors
/// [`Error::Setting`] where none is named, or none of that name is known.
fn device(args: &PlanArgs) -> Result<Device> {
    match (&args.device_kind, args.peak_tflops, args.bandwidth, args.memory) {
        (Some(kind), ..) => Device::of_kind(kind),
        (None, Some(tflops), Some(bandwidth), Some(memory)) => Ok(Device {
            kind: "a GPU".to_owned(),
            fp16_flops: tflops * 1e12,
            fp8_flops: args.peak_fp8_tflops.map(|rate| rate * 1e12),
            int8_flops: None,
            fp32_flops: None,
            bytes_per_second: bandwidth * 1e12,
            memory_bytes: (memory * 1e9) as u64,
            source: "as given".to_owned(),
            is_gpu: true,
        }),
        _ => Err(Error::Setting {
            reason: "no device to plan for".to_owned(),
            hint:
                "use --device-kind h100-sxm (any other name lists all), --peak-tflops with --bandwidth and --memory, \
                   --measure, or --from profile.json"
                    .to_owned(),
        }),
    }
}

/// Whole lengths whose mean is `mean`, to a tenth of a token.
fn lengths(mean: f64) -> Vec<usize> {
    let tenths = (mean * 10.0).round() as usize;
    match (tenths / 10, tenths % 10) {
        (length, 0) => vec![length],
        (length, longer) => (0..10).map(|i| length + usize::from(i < longer)).collect(),
    }
}

/// Lengths as they were measured, stretched to the mean that is asked for: captions that end at different times leave their slots
/// one by one. Without measured ones all are about alike.
fn scaled_lengths(measured: &[usize], mean: f64, max: Option<u32>) -> Vec<usize> {
    let sum: usize = measured.iter().sum();
    if sum == 0 {
        return lengths(mean);
    }
    let stretch = mean * measured.len() as f64 / sum as f64;
    let max = max.map_or(usize::MAX, |max| max as usize);
    let (mut exact, mut whole) = (0.0, 0);
    // What rounding takes from one length it gives to the next, so that the mean stays.
    let stretched = measured.iter().map(|&length| {
        exact += length as f64 * stretch;
        let rounded = ((exact - whole as f64).round().max(1.0) as usize).min(max);
        whole += rounded;
        rounded
    });
    stretched.collect()
}

/// As `range` goes from slow to fast, a text for each.
fn texts(range: Range, format: impl Fn(f64) -> String) -> [String; 3] {
    range.values().map(format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_the_mean() {
        assert_eq!(lengths(64.0), [64]);
        for mean in [1.0, 31.4, 64.5, 99.9] {
            let lengths = lengths(mean);
            let found = lengths.iter().sum::<usize>() as f64 / lengths.len() as f64;
            assert!((found - mean).abs() < 1e-9, "{mean}: {lengths:?}");
        }
    }

    #[test]
    fn measured_lengths_are_stretched_to_the_mean_and_keep_their_spread() {
        assert_eq!(scaled_lengths(&[10, 20, 30], 20.0, None), [10, 20, 30]);
        assert_eq!(scaled_lengths(&[10, 20, 30], 40.0, None), [20, 40, 60]);
        assert_eq!(scaled_lengths(&[10, 20, 30], 40.0, Some(50)), [20, 40, 50]);
        assert_eq!(scaled_lengths(&[], 7.0, None), [7]);
        let odd = scaled_lengths(&[5, 9, 7, 33, 1], 7.3, None);
        assert!((odd.iter().sum::<usize>() as f64 - 5.0 * 7.3).abs() <= 1.0 && odd[3] > odd[1], "{odd:?}");
    }
}
