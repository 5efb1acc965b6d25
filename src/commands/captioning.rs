//! What `run` and `profile` have in common: what the user typed about captions becomes validated options.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use recaption_export::Target;

use crate::cli::{CaptioningArgs, ProviderArg};
use crate::commands::inspect::numbers::counted;
use crate::commands::provider;
use crate::console::{print_line, print_warning};
use crate::error::{Error, Result};
use crate::model::memory_plan::{DeviceMemory, MemoryPlan, ModelSizes, Wanted};
use crate::model::sequence::StopRule;
use crate::model::{Bundle, Prompt, Tokenizer};
use crate::pipeline::engine::EngineOptions;
use crate::pipeline::input::Input;
use crate::pipeline::source;
use crate::pipeline::vision::decoder_device;
use crate::pipeline::write::Sink;
use crate::pipeline::{RunOptions, joined};
use crate::runtime::{self, Device, host, load_library};
use crate::storage::{self, Policy};

/// Engines made for a bundle of target cpu where nobody says how many.
const MAX_CPU_ENGINES: usize = 16;
/// Share of the free memory that a run on the CPU plans for: other programs want some, and page caches.
const CPU_UTILIZATION: f64 = 0.5;
/// Share of a GPU's, where nobody says.
const GPU_UTILIZATION: f64 = 0.9;

/// What is to be captioned, and with what: checked as far as that goes without a provider.
pub(super) struct Checked<'a> {
    args: &'a CaptioningArgs,
    inputs: Vec<Input>,
    pub(super) bundle: Bundle,
    tokenizer: Tokenizer,
    pub(super) prompt: Prompt,
    stop_rule: StopRule,
}

/// Checks everything that can be checked before a provider is looked for.
///
/// # Errors
/// When bundle, prompt or an input cannot be as asked, or a flag would be ignored.
pub(super) fn check<'a>(inputs: &[String], model: &Path, args: &'a CaptioningArgs) -> Result<Checked<'a>> {
    refuse_gpu_flags_on_cpu(args)?;
    if let Some((stage, count)) = args.inject_panic {
        crate::stage::inject_panic(stage, count);
    }
    storage::configure(Policy {
        max_retries: args.storage_retries,
        timeout: Duration::from_secs(args.storage_timeout),
    });
    let inputs: Vec<Input> =
        inputs.iter().map(|text| Input::parse(text)).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    source::check(&inputs, args.image_column.as_deref())?;
    let bundle = Bundle::open(model)?;
    let tokenizer = thread::scope(|scope| {
        let tokenizer = scope.spawn(|| Tokenizer::open(&bundle.tokenizer_path()));
        // Meanwhile, what will be needed next. What is wrong with it comes up then.
        let _ = load_library();
        joined(tokenizer)
    })?;
    let prompt = Prompt::build(&args.prompt, args.template.as_ref(), &bundle.manifest.prompt, &tokenizer)?;
    let stop_rule = StopRule {
        stop_token_ids: bundle.manifest.stop_token_ids.clone(),
        max_new_tokens: args.max_new_tokens as usize,
        ignore_eos: args.ignore_eos,
    };
    check_prompt(&bundle, &prompt, &stop_rule)?;
    Ok(Checked { args, inputs, bundle, tokenizer, prompt, stop_rule })
}

impl Checked<'_> {
    /// Chooses the provider and plans the engines' memory: all that is left before the first image.
    ///
    /// # Errors
    /// When the provider does not work here, does not go with the bundle, or the model does not fit.
    pub(super) fn options(self, sink: Sink, with_token_ids: bool) -> Result<RunOptions> {
        let Self { args, inputs, bundle, tokenizer, prompt, stop_rule } = self;
        let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let num_threads = args.threads.map_or(num_cores, usize::from);
        let cpu_engines = match (args.engines, bundle.manifest.header.target) {
            (Some(count), _) => count.into(),
            // Their kernels lose nothing on one thread, and nobody waits for anybody.
            (None, Target::Cpu) => num_threads.min(MAX_CPU_ENGINES),
            (None, Target::Ort | Target::TensorRt) => 1,
        };
        let gpus = args.device.as_deref().unwrap_or(&[0]);
        let choice = provider::choose(args.provider.into(), gpus, cpu_engines, &bundle.manifest)?;
        if !args.quiet {
            print_line(&choice.line());
            if choice.devices.iter().any(|&device| provider::is_for_others(device, &bundle.manifest)) {
                let reduced = "--precision int8 --target cpu --reduce-range";
                print_line(&format!(
                    "hint: this processor has no VNNI: it captions faster with an export by {reduced}"
                ));
            }
        }
        if num_threads > num_cores && choice.devices.contains(&Device::Cpu) {
            print_warning(&format!(
                "--threads {num_threads} on {}: they take turns, which is slower than one each",
                counted(num_cores as u64, "core")
            ));
        }
        let ignored = gpu_flags(args);
        if !ignored.is_empty() && choice.devices.iter().all(|&device| device == Device::Cpu) {
            print_warning(&format!("without effect on the CPU: {}", ignored.join(", ")));
        }
        let engines = engine_options(args, &bundle, &prompt, &stop_rule, (&choice.devices, num_threads))?;
        Ok(RunOptions {
            bundle,
            inputs,
            sink,
            tokenizer,
            prompt,
            engines,
            num_load_threads: args.load_threads.map_or(num_cores.div_ceil(4), usize::from),
            load_limits: args.limits.load(),
            source_limits: args.limits.source(),
            image_column: args.image_column.clone(),
            limit: args.limit,
            with_token_ids,
            quiet: args.quiet,
            injection: args.inject_failure,
            max_failures: None,
            part: None,
            interrupt: super::interrupt_flag(),
            recorder: None,
        })
    }
}

/// The flags among `args` that only engines on a GPU look at.
fn gpu_flags(args: &CaptioningArgs) -> Vec<&'static str> {
    let flags = [
        ("--device", args.device.is_some()),
        ("--gpu-memory-utilization", args.gpu_memory_utilization.is_some()),
        ("--no-cuda-graphs", args.no_cuda_graphs),
        ("--engine-cache", args.engine_cache.is_some()),
    ];
    flags.into_iter().filter_map(|(flag, is_given)| is_given.then_some(flag)).collect()
}

/// With `--provider auto` they are a wish for where there is a GPU, and get a warning elsewhere.
///
/// # Errors
/// [`Error::Setting`] when the CPU is asked for by name, and one of them as well.
fn refuse_gpu_flags_on_cpu(args: &CaptioningArgs) -> Result<()> {
    match (args.provider, gpu_flags(args).first()) {
        (ProviderArg::Cpu, Some(flag)) => Err(Error::Setting {
            reason: format!("{flag} is not supported: with --provider cpu"),
            hint: "leave it out: it is for GPUs, with --provider cuda or tensorrt".to_owned(),
        }),
        _ => Ok(()),
    }
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
    args: &CaptioningArgs,
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
            &ModelSizes::of(&bundle.manifest)?,
            device_memory(args, bundle, device, num_engines)?,
            wanted(args, device, bundle.manifest.header.target),
            lengths,
        )?;
        if !args.quiet {
            let MemoryPlan { num_slots, vision_batch, .. } = plan;
            let engines = if num_engines > 1 { format!("{num_engines} engines, each: ") } else { String::new() };
            print_line(&format!(
                "{device}: {engines}{} in flight, {} at once; memory: {plan}",
                counted(num_slots as u64, "caption"),
                counted(vision_batch as u64, "image"),
            ));
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
fn device_memory(args: &CaptioningArgs, bundle: &Bundle, device: Device, num_engines: usize) -> Result<DeviceMemory> {
    let is_two = matches!(decoder_device(device, &bundle.manifest), Device::TensorRt(_));
    let (free_bytes, utilization) = match device.gpu_index() {
        Some(index) => (runtime::free_gpu_memory(index)?, args.gpu_memory_utilization.unwrap_or(GPU_UTILIZATION)),
        None => (host::available_memory().unwrap_or(u64::MAX), CPU_UTILIZATION),
    };
    let is_gpu = device != Device::Cpu;
    Ok(DeviceMemory { free_bytes, utilization, num_engines, is_gpu, has_two_decoders: is_two })
}

fn wanted(args: &CaptioningArgs, device: Device, target: Target) -> Wanted {
    Wanted {
        num_slots: args.slots.map(usize::from),
        vision_batch: args.vision_batch.map(usize::from),
        ..Wanted::by_default(device != Device::Cpu, target)
    }
}

/// The folder of TensorRT's engines: beside the bundle, one for each model, GPU and pair of libraries that they are good for.
fn engine_cache(args: &CaptioningArgs, bundle: &Bundle, gpu: i32) -> Result<PathBuf> {
    let root = args.engine_cache.clone().unwrap_or_else(|| {
        let mut name = bundle.folder.canonicalize().unwrap_or_else(|_| bundle.folder.clone()).into_os_string();
        name.push(".tensorrt");
        name.into()
    });
    let folder = root.join(runtime::engine_key(&bundle.manifest.header.fingerprint, gpu)?);
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    Ok(folder)
}
