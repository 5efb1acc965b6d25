//! From what the recorder took to a [`Profile`].

use std::collections::BTreeMap;
use std::path::Path;

use recaption_export::inspect::GraphContents;
use recaption_export::{BundleManifest, Target};

use crate::error::Result;
use crate::model::Bundle;
use crate::model::kv_cache::CacheShape;
use crate::pipeline::{RunOptions, Summary};
use crate::profile::recorder::{Records, StageTotals, Track, add_histogram, new_histogram};
use crate::profile::utilisation::utilisation;
use crate::profile::{
    BatchGroup, Bottleneck, BundleFacts, CaptionProfile, Distribution, EngineFacts, Machine, Occupancy,
    PROFILE_VERSION, Peaks, Profile, QueueProfile, RunTotals, Settings, StageProfile, TrackProfile,
};
use crate::runtime::{self, Device, host, load_library};
use crate::stage::Stage;

/// A queue that is left with this share of its capacity on average is full enough to keep its stage busy.
const FULL_SHARE: f64 = 0.25;

/// What is known before the run.
pub struct Setup {
    /// The bundle.
    pub bundle: BundleFacts,
    /// How it will run.
    pub settings: Settings,
}

impl Setup {
    /// Reads the bundle's graphs.
    ///
    /// # Errors
    /// [`crate::Error::Bundle`] when a graph is damaged.
    pub fn of(options: &RunOptions) -> Result<Self> {
        Ok(Self { bundle: bundle_facts(&options.bundle)?, settings: settings(options) })
    }
}

fn bundle_facts(bundle: &Bundle) -> Result<BundleFacts> {
    let manifest = &bundle.manifest;
    let (header, of_any) = (&manifest.header, BundleManifest::Llava(Box::new(manifest.clone())));
    let graphs = [&manifest.graphs.vision_tower, &manifest.graphs.projector, &manifest.graphs.decoder];
    let mut weight_bytes = BTreeMap::new();
    for graph in graphs {
        let contents = GraphContents::read(&bundle.folder, &of_any, graph)?;
        let name = Path::new(&graph.file).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        weight_bytes.insert(name, contents.read_bytes);
    }
    Ok(BundleFacts {
        name: header.source.name.clone(),
        fingerprint: header.fingerprint.clone(),
        precision: header.precision,
        vision_precision: header.vision_precision,
        target: header.target,
        vision: manifest.vision.clone(),
        decoder: manifest.decoder.clone(),
        weight_bytes,
        kv_bytes_per_token: CacheShape::of(manifest)?.bytes_per_token() as u64,
    })
}

fn settings(options: &RunOptions) -> Settings {
    let device = options.engines.first().map_or(Device::Cpu, |engine| engine.device);
    let stop_rule = options.engines.first().map(|engine| &engine.stop_rule);
    let is_shared = options.bundle.manifest.header.target == Target::Cpu;
    Settings {
        provider: device.name().to_owned(),
        engines: options
            .engines
            .iter()
            .map(|engine| EngineFacts {
                device: engine.device.to_string(),
                num_threads: engine.num_threads,
                num_slots: engine.num_slots,
                vision_batch: engine.vision_batch.min(engine.num_slots),
            })
            .collect(),
        num_load_threads: options.num_load_threads,
        prompt_tokens: options.prompt.len(options.bundle.manifest.vision.num_image_tokens),
        shared_prompt_tokens: if is_shared { options.prompt.before.len() } else { 0 },
        max_new_tokens: stop_rule.map_or(0, |rule| rule.max_new_tokens),
        ignore_eos: stop_rule.is_some_and(|rule| rule.ignore_eos),
        limit: options.limit,
    }
}

/// The machine as it is.
pub(crate) fn machine(target: Target, provider: &str) -> Machine {
    let memory = match provider {
        "cpu" => host::available_memory(),
        _ => runtime::free_gpu_memory(0).ok(),
    };
    Machine {
        processor: host::processor_name(),
        num_cores: std::thread::available_parallelism().map_or(1, usize::from),
        kernel_level: (target == Target::Cpu)
            .then(|| recaption_kernels::Level::current().ok().map(|level| level.name().to_owned()))
            .flatten(),
        gpus: runtime::gpu_names().unwrap_or_default(),
        memory_bytes: memory.unwrap_or(0),
    }
}

/// Puts everything together; what needs peaks is left out without them.
///
/// # Errors
/// [`crate::Error::OnnxRuntimeLibrary`]
pub fn assemble(
    setup: Setup,
    summary: &Summary,
    cpu_seconds: Option<f64>,
    records: &Records,
    peaks: Option<Peaks>,
) -> Result<Profile> {
    let Setup { bundle, settings } = setup;
    let stages: Vec<StageProfile> = Stage::ALL.into_iter().map(|stage| stage_profile(stage, &records.tracks)).collect();
    let tracks: Vec<TrackProfile> = records.tracks.iter().map(track_profile).collect();
    let queues = queues(records);
    let captions = captions(&records.tracks);
    let of = |stage: Stage| &stages[stage as usize];
    let (vision, prefill, decode) = (of(Stage::Vision), of(Stage::Prefill), of(Stage::Decode));
    let wall_seconds = summary.run_seconds;
    let run = run_totals(summary, cpu_seconds, &settings, [prefill, decode]);
    let utilisation =
        peaks.as_ref().map(|peaks| utilisation(&bundle, &settings, [vision, prefill, decode], wall_seconds, peaks));
    Ok(Profile {
        version: PROFILE_VERSION,
        recaption: env!("CARGO_PKG_VERSION").to_owned(),
        onnxruntime: load_library()?.version.clone(),
        machine: machine(bundle.target, &settings.provider),
        occupancy: occupancy(&settings, &records.tracks, [vision, decode]),
        bottleneck: bottleneck(&stages, &tracks, &queues),
        bundle,
        settings,
        run,
        stages,
        batches: batches(&records.tracks),
        tracks,
        queues,
        captions,
        caption_lengths: caption_lengths(&records.tracks),
        peaks,
        utilisation,
        operators: None,
        gpus: Vec::new(),
    })
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

fn totals(stage: Stage, tracks: &[Track]) -> StageTotals {
    let mut totals = StageTotals::default();
    tracks.iter().filter_map(|track| track.stage(stage)).for_each(|of_track| totals.add(of_track));
    totals
}

fn stage_profile(stage: Stage, tracks: &[Track]) -> StageProfile {
    let totals = totals(stage, tracks);
    let threads = tracks.iter().filter(|track| track.stage(stage).is_some());
    let wall_ns: u64 = threads.clone().map(|track| track.ended_ns - track.started_ns).sum();
    StageProfile {
        stage: stage.name().to_owned(),
        num_threads: threads.count(),
        num_batches: totals.num_spans,
        num_images: totals.num_images,
        num_tokens: totals.num_tokens,
        padded_images: totals.padded_batches,
        context_tokens: totals.context_tokens,
        service_seconds: seconds(totals.service_ns),
        waited_seconds: seconds(totals.waited_ns),
        blocked_seconds: seconds(totals.blocked_ns),
        device_seconds: seconds(totals.device_ns),
        helped_seconds: seconds(totals.helped_ns),
        busy_share: totals.service_ns as f64 / wall_ns.max(1) as f64,
        service: Distribution::of(&totals.service),
        queued: Distribution::of(&totals.queued),
    }
}

/// Tokens a caption sees that are not told apart: what a step takes changes slowly with them.
const CONTEXT_STEP: u64 = 32;

/// The batches of the engines, those that are alike together.
fn batches(tracks: &[Track]) -> Vec<BatchGroup> {
    let mut groups: BTreeMap<(Stage, u32, u64), BatchGroup> = BTreeMap::new();
    for span in tracks.iter().flat_map(|track| &track.spans) {
        if !matches!(span.stage, Stage::Vision | Stage::Prefill | Stage::Decode) {
            continue;
        }
        let (batch, context) = (span.work.padded_batch, span.work.context_tokens);
        let key = (span.stage, batch, context / u64::from(batch.max(1)) / CONTEXT_STEP);
        let stage = span.stage.name().to_owned();
        let empty = BatchGroup { stage, batch, count: 0, seconds: 0.0, context_tokens: 0 };
        let group = groups.entry(key).or_insert(empty);
        group.count += 1;
        group.seconds += seconds(span.service_ns() + span.helped_ns);
        group.context_tokens += context;
    }
    groups.into_values().collect()
}

fn track_profile(track: &Track) -> TrackProfile {
    let of_stages = || Stage::ALL.into_iter().filter_map(|stage| Some((stage, track.stage(stage)?)));
    let sum = |what: fn(&StageTotals) -> u64| of_stages().map(|(_, totals)| what(totals)).sum::<u64>();
    let wall_ns = track.ended_ns - track.started_ns;
    let waited_ns = sum(|totals| totals.waited_ns) + track.waited_at_end_ns;
    let blocked_ns = sum(|totals| totals.blocked_ns);
    let accounted_ns =
        sum(|totals| totals.service_ns) + waited_ns + blocked_ns + track.scheduling_ns + track.helping_ns;
    TrackProfile {
        name: track.name.clone(),
        wall_seconds: seconds(wall_ns),
        stages: of_stages().map(|(stage, totals)| (stage.name().to_owned(), seconds(totals.service_ns))).collect(),
        waited_seconds: seconds(waited_ns),
        blocked_seconds: seconds(blocked_ns),
        scheduling_seconds: seconds(track.scheduling_ns),
        helping_seconds: seconds(track.helping_ns),
        other_seconds: (wall_ns as f64 - accounted_ns as f64) / 1e9,
        cpu_seconds: track.cpu_ns.map(seconds),
    }
}

fn queues(records: &Records) -> Vec<QueueProfile> {
    let queue = |&(stage, capacity): &(Stage, usize)| {
        let totals = totals(stage, &records.tracks);
        QueueProfile {
            stage: stage.name().to_owned(),
            capacity,
            mean_depth: totals.depth_sum as f64 / totals.num_spans.max(1) as f64,
            max_depth: totals.depth_max,
        }
    };
    records.queue_capacities.iter().map(queue).collect()
}

fn captions(tracks: &[Track]) -> CaptionProfile {
    let [mut ttft, mut ttft_in_engine, mut tpot] = [(); 3].map(|()| new_histogram());
    for track in tracks {
        add_histogram(&mut ttft, &track.ttft);
        add_histogram(&mut ttft_in_engine, &track.ttft_in_engine);
        add_histogram(&mut tpot, &track.tpot);
    }
    CaptionProfile {
        ttft: Distribution::of(&ttft),
        ttft_in_engine: Distribution::of(&ttft_in_engine),
        tpot: Distribution::of(&tpot),
    }
}

/// Captions whose lengths a profile keeps.
const MAX_LENGTHS: usize = 256;

fn caption_lengths(tracks: &[Track]) -> Vec<u32> {
    let mut captions: Vec<_> = tracks.iter().flat_map(|track| &track.captions).collect();
    captions.sort_by_key(|times| times.taken_ns);
    let num_kept = captions.len().min(MAX_LENGTHS);
    (0..num_kept).map(|i| captions[i * captions.len() / num_kept].num_tokens).collect()
}

fn run_totals(
    summary: &Summary,
    cpu_seconds: Option<f64>,
    settings: &Settings,
    [prefill, decode]: [&StageProfile; 2],
) -> RunTotals {
    let wall_seconds = summary.run_seconds;
    let rate = |count: u64| count as f64 / wall_seconds.max(1e-9);
    let prompt_tokens = prefill.num_images * settings.prompt_tokens as u64;
    // Prefill gives the first.
    let new_tokens = prefill.num_images + decode.num_tokens;
    RunTotals {
        images: summary.counts.rows,
        ok: summary.counts.ok,
        failed: summary.counts.failed,
        load_seconds: summary.load_seconds,
        wall_seconds,
        cpu_seconds,
        images_per_second: summary.images_per_second,
        prompt_tokens,
        new_tokens,
        prompt_tokens_per_second: rate(prompt_tokens),
        new_tokens_per_second: rate(new_tokens),
    }
}

fn occupancy(settings: &Settings, tracks: &[Track], [vision, decode]: [&StageProfile; 2]) -> Occupancy {
    let of_decode = totals(Stage::Decode, tracks);
    // Engines are alike, or as good as: those of one run have one plan for each device.
    let num_slots = settings.engines.iter().map(|engine| engine.num_slots).sum::<usize>() as f64
        / settings.engines.len().max(1) as f64;
    let padding = |stage: &StageProfile| match stage.padded_images {
        0 => 0.0,
        padded => 1.0 - stage.num_images as f64 / padded as f64,
    };
    let per_batch = |stage: &StageProfile| stage.num_images as f64 / stage.num_batches.max(1) as f64;
    Occupancy {
        slots: of_decode.occupied_ns as f64 / (of_decode.service_ns as f64 * num_slots).max(1.0),
        decode_batch: per_batch(decode),
        vision_batch: per_batch(vision),
        vision_padding: padding(vision),
        decode_padding: padding(decode),
    }
}

/// The thread, or kind of thread, that was busy for the largest part of the run limits it: everybody else waits for it,
/// in front of a full queue or behind an empty one.
fn bottleneck(stages: &[StageProfile], tracks: &[TrackProfile], queues: &[QueueProfile]) -> Bottleneck {
    let engines = [Stage::Vision, Stage::Prefill, Stage::Decode];
    let of = |stage: Stage| &stages[stage as usize];
    // Of the run, not of the threads' own time: one that reads a single small shard is over at once.
    let run = tracks.iter().map(|track| track.wall_seconds).fold(1e-9, f64::max);
    let busy = |stage: Stage| of(stage).service_seconds / (of(stage).num_threads.max(1) as f64 * run);
    let engine_tracks = || tracks.iter().filter(|track| is_engine(track));
    let helping: f64 = engine_tracks().map(|track| track.helping_seconds).sum();
    let num_engines = engine_tracks().count().max(1) as f64;
    let busy_engine: f64 = engines.iter().map(|&stage| busy(stage)).sum::<f64>() + helping / (num_engines * run);
    let others = [Stage::Source, Stage::Load, Stage::Preprocess, Stage::Write];
    let busiest = others.into_iter().max_by(|&a, &b| busy(a).total_cmp(&busy(b)));
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let queue_of = |stage: Stage| queues.iter().find(|queue| queue.stage == stage.name());
    let fill = |stage: Stage| match queue_of(stage) {
        Some(QueueProfile { capacity, mean_depth, .. }) => {
            let word = if *mean_depth >= FULL_SHARE * *capacity as f64 { "kept filled" } else { "mostly empty" };
            format!("; its queue was {word} ({mean_depth:.1} of {capacity} on average)")
        }
        None => String::new(),
    };
    match busiest {
        Some(stage) if busy(stage) > busy_engine => Bottleneck {
            stage: stage.name().to_owned(),
            reason: format!(
                "its threads were busy for {} of the run, the engines for {}{}",
                percent(busy(stage)),
                percent(busy_engine),
                fill(stage),
            ),
        },
        _ => {
            let largest = engines.into_iter().max_by(|&a, &b| busy(a).total_cmp(&busy(b)));
            let stage = largest.expect("bug: there are three");
            let waited: f64 = engine_tracks().map(|track| track.waited_seconds).sum();
            let wall: f64 = engine_tracks().map(|track| track.wall_seconds).sum();
            Bottleneck {
                stage: stage.name().to_owned(),
                reason: format!(
                    "engines were busy for {} of the run, {} of it in {stage}, and waited for images for {}{}",
                    percent(busy_engine),
                    percent(busy(stage) / busy_engine.max(1e-9)),
                    percent(waited / wall.max(1e-9)),
                    fill(Stage::Vision),
                ),
            }
        }
    }
}

/// Whether a track is one of an engine.
pub(crate) fn is_engine(track: &TrackProfile) -> bool {
    [Stage::Vision, Stage::Prefill, Stage::Decode].iter().any(|stage| track.stages.contains_key(stage.name()))
}
