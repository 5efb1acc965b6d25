//! `recaption run`: what the user typed becomes validated options, then rows.

mod output;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use recaption_export::Target;
use serde_json::{Value, json};

use crate::cli::{LimitArgs, RunArgs};
use crate::commands::{Outcome, provider};
use crate::error::{Error, Result};
use crate::model::memory_plan::{DeviceMemory, MemoryPlan, Wanted};
use crate::model::sequence::StopRule;
use crate::model::{Bundle, Prompt, Tokenizer};
use crate::pipeline::engine::EngineOptions;
use crate::pipeline::input::Input;
use crate::pipeline::source;
use crate::pipeline::vision::decoder_device;
use crate::pipeline::write::{Format, Sink, failures, fault, write_shared};
use crate::pipeline::{RunOptions, Summary};
use crate::runtime::{self, Device, host, load_library};
use crate::storage::{self, Policy};
use crate::terminal;

const SUMMARY_FILE: &str = "summary.json";
/// Most captions in flight when the user does not say: on a CPU more bring little.
const DEFAULT_SLOTS: usize = 16;
/// The same of one engine with a bundle of target cpu, whose products gain up to twice as many.
const OWN_OPERATORS_SLOTS: usize = 32;
/// Reasons of failed rows that the last lines of a run show.
const SHOWN_REASONS: usize = 3;
const DEFAULT_VISION_BATCH: usize = 4;
/// Engines made for a bundle of target cpu where nobody says how many.
const MAX_CPU_ENGINES: usize = 16;
/// Share of the free memory that a run on the CPU plans for: other programs want some, and page caches.
const CPU_UTILIZATION: f64 = 0.5;
/// Most captions in flight on a GPU when the user does not say: beyond, a step takes longer by as much as it does more
/// (roofline of an H100: 989 TFLOP/s over 3.35 TB/s is 295 tokens a weight read).
const MAX_GPU_SLOTS: usize = 256;
/// Most images encoded and prefilled at once there: 16 x 640 tokens fill a GPU, more only make decode steps wait.
const MAX_GPU_VISION_BATCH: usize = 16;

pub(super) fn execute(args: RunArgs) -> anyhow::Result<Outcome> {
    let (is_quiet, is_json, out, overwrite) = (args.quiet, args.json, args.out.clone(), args.overwrite);
    let (options, settings) = prepare(args)?;
    let sink = options.sink.clone();
    if let Some(folder) = &out {
        output::check(folder, &settings, overwrite)?;
    }
    let run = crate::pipeline::load_model(options)?;
    // Not before the model works: a failed start leaves the earlier captions as they are.
    let _lock = match &sink {
        Sink::Folder(options) => output::prepare(options, &settings, overwrite)?,
        Sink::StandardOutput => None,
    };
    let summary = run.run()?;
    let mut stderr = std::io::stderr();
    for damage in &summary.damaged_inputs {
        let _ = writeln!(stderr, "error: {}", terminal::escape(damage));
    }
    if !is_quiet {
        let _ = writeln!(stderr, "{}", terminal::escape(&describe(&summary, out.as_deref())));
    }
    if let Some(out) = &out {
        let path = out.join(SUMMARY_FILE);
        let text = serde_json::to_vec_pretty(&summary)?;
        write_shared(&path, |file| file.write_all(&text).map_err(Error::io("write", &path)))?;
        if is_json {
            writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&summary)?)
                .map_err(Error::io("write", Path::new("standard output")))?;
        }
    }
    Ok(match &summary {
        Summary { is_interrupted: true, .. } => Outcome::Interrupted,
        Summary { counts, damaged_inputs, .. } if counts.failed > 0 || !damaged_inputs.is_empty() => {
            Outcome::SomeFailed
        }
        _ => Outcome::Success,
    })
}

/// Checks everything that can be checked before the first image.
fn prepare(args: RunArgs) -> Result<(RunOptions, Value)> {
    if let Some((stage, count)) = args.inject_panic {
        crate::stage::inject_panic(stage, count);
    }
    if let Some(fault) = args.inject_io_error {
        fault::inject(fault);
    }
    storage::configure(Policy {
        max_retries: args.storage_retries,
        timeout: Duration::from_secs(args.storage_timeout),
    });
    let inputs: Vec<Input> =
        args.inputs.iter().map(|text| Input::parse(text)).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    source::check(&inputs, args.image_column.as_deref())?;
    let bundle = Bundle::open(&args.model)?;
    let tokenizer = Tokenizer::open(&bundle.tokenizer_path())?;
    let prompt = Prompt::build(&args.prompt, args.template.as_ref(), &bundle.manifest.prompt, &tokenizer)?;
    let stop_rule = StopRule {
        stop_token_ids: bundle.manifest.stop_token_ids.clone(),
        max_new_tokens: args.max_new_tokens as usize,
        ignore_eos: args.ignore_eos,
    };
    check_prompt(&bundle, &prompt, &stop_rule)?;
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let num_threads = args.threads.map_or(num_cores, usize::from);
    let cpu_engines = match (args.engines, bundle.manifest.header.target) {
        (Some(count), _) => count.into(),
        // Their kernels lose nothing on one thread, and nobody waits for anybody.
        (None, Target::Cpu) => num_threads.min(MAX_CPU_ENGINES),
        (None, Target::Ort | Target::TensorRt) => 1,
    };
    let choice = provider::choose(args.provider.into(), &args.device, cpu_engines, &bundle.manifest)?;
    if !args.quiet {
        let _ = writeln!(std::io::stderr(), "{}", choice.line());
    }
    let engines = engine_options(&args, &bundle, &prompt, &stop_rule, (&choice.devices, num_threads))?;
    let settings = settings(&args, &bundle, &prompt, args.format.into())?;
    let sink = match &args.out {
        Some(folder) => Sink::Folder(output::options(folder, &args, &settings)?),
        None => Sink::StandardOutput,
    };
    let options = RunOptions {
        bundle,
        inputs,
        sink,
        prompt,
        engines,
        num_load_threads: args.load_threads.map_or(num_cores.div_ceil(4), usize::from),
        load_limits: args.limits.load(),
        source_limits: args.limits.source(),
        image_column: args.image_column,
        limit: args.limit,
        with_token_ids: args.with_token_ids,
        quiet: args.quiet,
        injection: args.inject_failure,
        max_failures: args.max_failures,
        part: args.part,
        interrupt: super::interrupt_flag(),
    };
    Ok((options, settings))
}

fn check_prompt(bundle: &Bundle, prompt: &Prompt, stop_rule: &StopRule) -> Result<()> {
    let dims = &bundle.manifest.decoder;
    let length = prompt.len(bundle.manifest.vision.num_image_tokens);
    let max_positions = dims.max_position_embeddings;
    if length + stop_rule.max_new_tokens > max_positions {
        return Err(Error::Setting {
            reason: format!(
                "prompt and image take {length} tokens, --max-new-tokens {} more; the model has {max_positions} positions",
                stop_rule.max_new_tokens
            ),
            hint: match max_positions.saturating_sub(length) {
                0 => "shorten --prompt".to_owned(),
                left => format!("use --max-new-tokens {left} or fewer"),
            },
        });
    }
    if let Some(id) = prompt.before.iter().chain(&prompt.after).find(|&&id| id as usize >= dims.vocab_size) {
        return Err(Error::Setting {
            reason: format!(
                "the prompt has token id {id}, but the model's embedding table ends at {}",
                dims.vocab_size
            ),
            hint: "the tokenizer does not belong to this model; export again with the right --tokenizer".to_owned(),
        });
    }
    Ok(())
}

fn engine_options(
    args: &RunArgs,
    bundle: &Bundle,
    prompt: &Prompt,
    stop_rule: &StopRule,
    (devices, num_threads): (&[Device], usize),
) -> Result<Vec<EngineOptions>> {
    let prompt_length = prompt.len(bundle.manifest.vision.num_image_tokens);
    let lengths = (prompt_length, prompt_length + stop_rule.max_new_tokens);
    let options = |&device: &Device| -> Result<EngineOptions> {
        let num_engines = devices.iter().filter(|other| other.gpu_index() == device.gpu_index()).count();
        let plan = MemoryPlan::new(
            &bundle.manifest,
            device_memory(args, bundle, device, num_engines)?,
            wanted(args, device, bundle.manifest.header.target),
            lengths,
        )?;
        if !args.quiet {
            let MemoryPlan { num_slots, vision_batch, .. } = plan;
            let line =
                format!("{device}: {num_slots} captions in flight, {vision_batch} images at once; memory: {plan}");
            let _ = writeln!(std::io::stderr(), "{line}");
        }
        let is_gpu = device != Device::Cpu;
        Ok(EngineOptions {
            num_threads: (num_threads / devices.len()).max(1),
            num_slots: plan.num_slots,
            vision_batch: plan.vision_batch,
            has_fixed_shapes: is_gpu || args.fixed_shapes,
            captures_graphs: is_gpu && !args.no_cuda_graphs && load_library()?.captures_graphs_safely(),
            memory_limit: is_gpu.then_some(plan.budget_bytes as usize),
            engine_cache: match device {
                Device::TensorRt(index) => Some(engine_cache(args, bundle, index)?),
                Device::Cpu | Device::Cuda(_) => None,
            },
            shows_builds: !args.quiet,
            ..EngineOptions::new(device, stop_rule.clone())
        })
    };
    // Engines on one CPU are alike: one line says it.
    let mut engines: Vec<EngineOptions> = Vec::new();
    for device in devices {
        let like_the_last = engines.last().filter(|engine| engine.device == *device).cloned();
        engines.push(like_the_last.map_or_else(|| options(device), Ok)?);
    }
    Ok(engines)
}

/// The memory of `device`, which `num_engines` engines share.
fn device_memory(args: &RunArgs, bundle: &Bundle, device: Device, num_engines: usize) -> Result<DeviceMemory> {
    let is_two = matches!(decoder_device(device, &bundle.manifest), Device::TensorRt(_));
    let (free_bytes, utilization) = match device.gpu_index() {
        Some(index) => (runtime::free_gpu_memory(index)?, args.gpu_memory_utilization),
        None => (host::available_memory().unwrap_or(u64::MAX), CPU_UTILIZATION),
    };
    let is_gpu = device != Device::Cpu;
    Ok(DeviceMemory { free_bytes, utilization, num_engines, is_gpu, has_two_decoders: is_two })
}

fn wanted(args: &RunArgs, device: Device, target: Target) -> Wanted {
    let (max_slots, max_vision_batch) = match device {
        Device::Cpu if target == Target::Cpu => (OWN_OPERATORS_SLOTS, 1),
        Device::Cpu => (DEFAULT_SLOTS, DEFAULT_VISION_BATCH),
        Device::Cuda(_) | Device::TensorRt(_) => (MAX_GPU_SLOTS, MAX_GPU_VISION_BATCH),
    };
    Wanted {
        num_slots: args.slots.map(usize::from),
        vision_batch: args.vision_batch.map(usize::from),
        max_slots,
        max_vision_batch,
    }
}

/// The folder of TensorRT's engines: beside the bundle, one for each model, GPU and pair of libraries that they are good for.
fn engine_cache(args: &RunArgs, bundle: &Bundle, gpu: i32) -> Result<PathBuf> {
    let root = args.engine_cache.clone().unwrap_or_else(|| {
        let mut name = bundle.folder.canonicalize().unwrap_or_else(|_| bundle.folder.clone()).into_os_string();
        name.push(".tensorrt");
        name.into()
    });
    let folder = root.join(runtime::engine_key(&bundle.manifest.header.fingerprint, gpu)?);
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    Ok(folder)
}

/// `run.json`: what decides the captions. A run into the same folder must agree with it.
fn settings(args: &RunArgs, bundle: &Bundle, prompt: &Prompt, format: Format) -> Result<Value> {
    let manifest = &bundle.manifest;
    Ok(json!({
        "recaption": env!("CARGO_PKG_VERSION"),
        "onnxruntime": load_library()?.version,
        "settings": {
            "model": manifest.header.source.name,
            "model_fingerprint": manifest.header.fingerprint,
            "prompt": prompt.rendered,
            "template": prompt.template,
            "max_new_tokens": args.max_new_tokens,
            "ignore_eos": args.ignore_eos,
            "with_token_ids": args.with_token_ids,
            "limit": args.limit,
            "image_column": args.image_column,
            "limits": settings_of(&args.limits),
            "format": format,
        },
    }))
}

/// Limits decide which images fail.
fn settings_of(limits: &LimitArgs) -> Value {
    json!({
        "max_pixels": limits.max_pixels,
        "max_decoded_bytes": limits.max_decoded_bytes,
        "max_image_bytes": limits.max_image_bytes,
        "max_sidecar_bytes": limits.max_sidecar_bytes,
        "max_json_depth": limits.max_json_depth,
    })
}

fn describe(summary: &Summary, out: Option<&Path>) -> String {
    let counts = &summary.counts;
    let mut lines = vec![format!(
        "{} rows: {} ok, {} failed; {:.1} s to load, {:.1} s to run, {:.2} images/s, {} new tokens",
        counts.rows,
        counts.ok,
        counts.failed,
        summary.load_seconds,
        summary.run_seconds,
        summary.images_per_second,
        counts.new_tokens
    )];
    for failure in &summary.failed_engines {
        lines.push(format!("{failure}; its images went to the other engines"));
    }
    let reasons = failures::most_frequent(&counts.failures, SHOWN_REASONS);
    lines.extend(reasons.into_iter().map(|reason| format!("failed: {reason}")));
    match counts.failures.len().saturating_sub(SHOWN_REASONS) {
        0 => {}
        more => lines.push(format!("failed: {more} more reasons, see summary.json")),
    }
    if let [first, ..] = &summary.busy_shards[..] {
        let count = summary.busy_shards.len();
        lines.push(format!(
            "{count} shards are in work in other processes, `{first}` among them, and were left to those"
        ));
    }
    if summary.num_earlier_rows > 0 {
        lines.push(format!("{} of the rows are of earlier runs, and were not done again", summary.num_earlier_rows));
    }
    if let Some(out) = out {
        lines.push(format!("captions in `{}`", out.display()));
    }
    if summary.is_interrupted && out.is_none() {
        lines.push("interrupted".to_owned());
    } else if summary.is_interrupted {
        lines.push(format!(
            "interrupted: {} finished rows of shards in progress are kept in the journal; the same command goes on after them",
            summary.num_journaled
        ));
    }
    lines.join("\n")
}
