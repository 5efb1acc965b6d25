//! A question from a profile: its model and machine, and the practice that its batches show.

use recaption_export::{DataType, Target};

use crate::error::{Error, Result};
use crate::plan::device::Device;
use crate::plan::measured::{Sample, fit};
use crate::plan::model::{Form, Model};
use crate::plan::roofline::{Costs, EnginePractice, Ideal};
use crate::profile::{BatchGroup, Profile, TrackProfile, is_engine};
use crate::stage::Stage;

/// What a profile says about the question.
pub struct Scaled {
    /// What was profiled.
    pub model: Model,
    /// What it was profiled on, as measured there.
    pub device: Device,
    /// How far its stages are from the device's peaks.
    pub practice: EnginePractice,
    /// Engines on the device.
    pub num_engines: usize,
    /// Slots of each.
    pub num_slots: usize,
    /// Images encoded and prefilled at once.
    pub vision_batch: usize,
    /// Tokens of text around the image.
    pub prompt_tokens: usize,
    /// Those that are read once for all captions.
    pub shared_prompt_tokens: usize,
    /// Mean new tokens of a caption.
    pub new_tokens: f64,
    /// New tokens of captions in the order they began; empty where the profile does not say.
    pub lengths: Vec<usize>,
    /// Seconds of an engine's thread for each caption beside its batches.
    pub seconds_per_caption: f64,
    /// Seconds of the run before engines began and after they ended.
    pub seconds_per_run: f64,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// Seconds of one core to load and preprocess an image.
    pub seconds_per_image: f64,
    /// Cores that the profile's threads for that are worth.
    pub num_cores: f64,
}

/// Reads `profile`, with peaks as measured in it, or as in the datasheet of the profiled GPU where the plan is for another.
///
/// # Errors
/// [`Error::Setting`] when the profile has no captions or no peaks, or the GPU's datasheet is not known.
pub fn scale(profile: &Profile, against_datasheet: bool) -> Result<Scaled> {
    let refused =
        |reason: &str, hint: &str| Error::Setting { reason: format!("the profile {reason}"), hint: hint.to_owned() };
    let settings = &profile.settings;
    let Some(engine) = settings.engines.first().filter(|_| profile.run.ok > 0) else {
        return Err(refused("has no captions", "profile a run that captions some images"));
    };
    let model = model(profile);
    let measured = device(profile).ok_or_else(|| refused("has no peaks", "make it again without --no-peaks"))?;
    let device = match against_datasheet {
        false => measured,
        true if !measured.is_gpu => {
            return Err(refused(
                "is of a processor",
                "what a processor reaches says nothing of a GPU: profile on a GPU",
            ));
        }
        true => Device::of_name(&measured.kind).ok_or_else(|| {
            refused("is of a GPU that is not in the table", "plan for the profiled GPU, without --device-kind")
        })?,
    };
    let num_engines = settings.engines.iter().filter(|other| other.device == engine.device).count();
    let (prompt, shared) = (settings.prompt_tokens, settings.shared_prompt_tokens);
    let share = device.share(num_engines);
    let costs = Costs::new(&model, &share, (prompt, shared))?;
    let practice = |stage: Stage, ideal: &dyn Fn(&BatchGroup) -> Ideal| {
        let groups = profile.batches.iter().filter(|group| group.stage == stage.name());
        let samples: Vec<Sample> = groups
            .map(|group| Sample {
                ideal: ideal(group),
                count: group.count as f64,
                seconds: group.seconds / group.count.max(1) as f64,
            })
            .collect();
        fit(&samples).ok_or_else(|| refused(&format!("has no batch of {stage}"), "profile a run of longer captions"))
    };
    let mean_context = |group: &BatchGroup| group.context_tokens as f64 / group.count.max(1) as f64;
    let practice = EnginePractice {
        vision: practice(Stage::Vision, &|group| costs.vision(group.batch.into()))?,
        prefill: practice(Stage::Prefill, &|group| costs.prefill(group.batch.into()))?,
        decode: practice(Stage::Decode, &|group| costs.decode(group.batch.into(), mean_context(group)))?,
    };
    let [load, preprocess] = [Stage::Load, Stage::Preprocess].map(|stage| {
        let stage = profile.stage(stage);
        stage.map_or(0.0, |stage| stage.service_seconds / stage.num_images.max(1) as f64)
    });
    // Each of the two has as many threads, and the slower one sets the pace.
    let num_cores = settings.num_load_threads as f64 * (load + preprocess) / load.max(preprocess).max(1e-9);
    let engines: Vec<&TrackProfile> = profile.tracks.iter().filter(|track| is_engine(track)).collect();
    let beside =
        |track: &&TrackProfile| track.blocked_seconds + track.scheduling_seconds + track.other_seconds.max(0.0);
    let longest = engines.iter().map(|track| track.wall_seconds).fold(0.0, f64::max);
    Ok(Scaled {
        practice,
        num_engines,
        num_slots: engine.num_slots,
        vision_batch: engine.vision_batch,
        prompt_tokens: prompt.saturating_sub(model.vision.num_image_tokens),
        shared_prompt_tokens: shared,
        new_tokens: profile.run.new_tokens as f64 / profile.run.ok as f64,
        lengths: profile.caption_lengths.iter().map(|&length| length as usize).collect(),
        seconds_per_caption: engines.iter().map(beside).sum::<f64>() / profile.run.ok as f64,
        seconds_per_run: (profile.run.wall_seconds - longest).max(0.0),
        max_new_tokens: settings.max_new_tokens,
        seconds_per_image: load + preprocess,
        num_cores: num_cores.max(1e-3),
        model,
        device,
    })
}

fn model(profile: &Profile) -> Model {
    let facts = &profile.bundle;
    let form = Form { precision: facts.precision, target: facts.target };
    let mut model = Model::of_dims(facts.name.clone(), facts.vision.clone(), facts.decoder.clone(), form);
    let embedding = model.decoder_bytes - model.step_bytes;
    let bytes = |graph: &str| facts.weight_bytes.get(graph).copied();
    if let (Some(tower), Some(projector), Some(decoder)) = (bytes("vision_tower"), bytes("projector"), bytes("decoder"))
    {
        model.vision_bytes = tower + projector;
        model.step_bytes = decoder;
        model.decoder_bytes = decoder + embedding;
    }
    model.vision_precision = facts.vision_precision;
    // Blocks of integers go with activations of either width, and the cache tells which.
    let num_values = 2 * model.cache.num_layers * model.cache.num_kv_heads * model.cache.head_dim;
    if facts.target != Target::Cpu && facts.kv_bytes_per_token == (num_values * DataType::F32.size()) as u64 {
        model.activations = DataType::F32;
        model.cache.dtype = DataType::F32;
    }
    model
}

/// The device of the first engine, as far as it was measured.
fn device(profile: &Profile) -> Option<Device> {
    let peaks = profile.peaks.as_ref()?;
    let is_gpu = profile.settings.provider != "cpu";
    let (machine, float) = (&profile.machine, peaks.float.rate);
    let kind = if is_gpu { machine.gpus.first().cloned() } else { machine.processor.clone() };
    Some(Device {
        kind: kind.unwrap_or_else(|| "this machine".to_owned()),
        fp16_flops: if is_gpu { float } else { 0.0 },
        // What was not measured stands in for itself: a stage's practice is relative to it.
        fp8_flops: is_gpu.then_some(float),
        int8_flops: peaks.int8.as_ref().map(|peak| peak.rate).or(Some(float)).filter(|_| !is_gpu),
        fp32_flops: (!is_gpu).then_some(float),
        bytes_per_second: peaks.memory_read.rate,
        memory_bytes: machine.memory_bytes,
        source: "measured with the profile".to_owned(),
        is_gpu,
    })
}
