//! The contents of `profile.json`.
//!
//! Times are seconds, sizes bytes, rates per second, shares between 0 and 1. Later versions add fields; one that changes the
//! meaning of a field has another [`PROFILE_VERSION`].

use std::collections::BTreeMap;
use std::path::Path;

use hdrhistogram::Histogram;
use recaption_export::{DecoderDims, Precision, Target, VisionDims};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::stage::Stage;

/// Version of the layout of `profile.json`.
pub const PROFILE_VERSION: u32 = 1;

/// Where the time of a run went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// [`PROFILE_VERSION`] of the writer.
    pub version: u32,
    /// Version of this program.
    pub recaption: String,
    /// Version of ONNX Runtime.
    pub onnxruntime: String,
    /// What it ran on.
    pub machine: Machine,
    /// What ran.
    pub bundle: BundleFacts,
    /// How it ran.
    pub settings: Settings,
    /// What came of it.
    pub run: RunTotals,
    /// The seven stages, in order.
    pub stages: Vec<StageProfile>,
    /// The batches of vision, prefill and decode, by their size and by what they saw: what a plan scales from.
    #[serde(default)]
    pub batches: Vec<BatchGroup>,
    /// The threads of the pipeline.
    pub tracks: Vec<TrackProfile>,
    /// The queues between the stages.
    pub queues: Vec<QueueProfile>,
    /// How long captions took.
    pub captions: CaptionProfile,
    /// New tokens of captions, the stop token counted, in the order that engines took their images; of many captions some,
    /// evenly picked.
    #[serde(default)]
    pub caption_lengths: Vec<u32>,
    /// How full slots and batches were.
    pub occupancy: Occupancy,
    /// What limited the run.
    pub bottleneck: Bottleneck,
    /// What the machine can do, measured in the same process; none with `--no-peaks`.
    pub peaks: Option<Peaks>,
    /// How much of the peaks was used; none without them.
    pub utilisation: Option<Utilisation>,
    /// ONNX Runtime's own times, with `--ort-profile`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operators: Option<OperatorProfile>,
    /// What NVIDIA's management library said of each GPU during the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuProfile>,
}

impl Profile {
    /// Reads a `profile.json`.
    ///
    /// # Errors
    /// [`Error::Setting`] when the file cannot be read, or is not a profile of this version.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Setting {
            reason: format!("`{}`: {reason}", path.display()),
            hint: "make one with `recaption profile INPUT --model BUNDLE_DIR --out DIR`".to_owned(),
        };
        let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let value: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| wrong(format!("not a profile: {error}")))?;
        match value["version"].as_u64() {
            Some(version) if version == u64::from(PROFILE_VERSION) => {}
            Some(version) => return Err(wrong(format!("expected version {PROFILE_VERSION}, got {version}"))),
            None => return Err(wrong("not a profile: it has no `version`".to_owned())),
        }
        serde_json::from_value(value).map_err(|error| wrong(format!("not a profile: {error}")))
    }

    /// What is said about `stage`.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> Option<&StageProfile> {
        self.stages.iter().find(|profile| profile.stage == stage.name())
    }
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's own name.
    pub processor: Option<String>,
    /// Hardware threads that this process may use.
    pub num_cores: usize,
    /// Instruction set that the operators of target cpu use.
    pub kernel_level: Option<String>,
    /// GPUs by their names.
    pub gpus: Vec<String>,
    /// Memory of the device that ran, free before the run on GPUs and now on a processor; 0 where nothing says.
    #[serde(default)]
    pub memory_bytes: u64,
}

/// The bundle, as far as a plan needs it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BundleFacts {
    /// Name of the checkpoint.
    pub name: String,
    /// The bundle's identity.
    pub fingerprint: String,
    /// Precision of the decoder's weights.
    pub precision: Precision,
    /// Precision of the vision tower's weights.
    pub vision_precision: Precision,
    /// Operators of the graphs.
    pub target: Target,
    /// Dimensions of the vision tower.
    pub vision: VisionDims,
    /// Dimensions of the decoder.
    pub decoder: DecoderDims,
    /// Bytes of weights that one run of each graph reads, by graph: all but tables of which single rows are looked up.
    pub weight_bytes: BTreeMap<String, u64>,
    /// Bytes that one token takes in the KV cache.
    pub kv_bytes_per_token: u64,
}

/// How the run was set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `cpu`, `cuda` or `tensorrt`.
    pub provider: String,
    /// The engines.
    pub engines: Vec<EngineFacts>,
    /// Threads that load, and as many that preprocess.
    pub num_load_threads: usize,
    /// Tokens of the prompt around the image, and of the image.
    pub prompt_tokens: usize,
    /// Those of them that are read once for all captions.
    pub shared_prompt_tokens: usize,
    /// Most new tokens of a caption.
    pub max_new_tokens: usize,
    /// Whether captions go on after a stop token.
    pub ignore_eos: bool,
    /// Images that were asked for, if not all.
    pub limit: Option<usize>,
}

/// One engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineFacts {
    /// `cpu`, `cuda 0`, …
    pub device: String,
    /// Threads within an operator.
    pub num_threads: usize,
    /// Captions in flight, at most.
    pub num_slots: usize,
    /// Images encoded and prefilled at once, at most.
    pub vision_batch: usize,
}

/// What the run did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunTotals {
    /// Rows, failed ones too.
    pub images: u64,
    /// Rows with a caption.
    pub ok: u64,
    /// Rows without.
    pub failed: u64,
    /// Time to load the model.
    pub load_seconds: f64,
    /// Time from the first image being read to the last row: summary.json's `run_seconds`.
    pub wall_seconds: f64,
    /// Processor time of the whole process in that time.
    pub cpu_seconds: Option<f64>,
    /// `ok / wall_seconds`
    pub images_per_second: f64,
    /// Tokens of the prompts of captions, image tokens included, whether shared or not.
    pub prompt_tokens: u64,
    /// New tokens that were computed, stop tokens counted.
    pub new_tokens: u64,
    /// Per second of wall time.
    pub prompt_tokens_per_second: f64,
    /// Per second of wall time.
    pub new_tokens_per_second: f64,
}

/// One stage, over all its threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageProfile {
    /// Its name.
    pub stage: String,
    /// Threads that do it; engines for vision, prefill and decode.
    pub num_threads: usize,
    /// Batches.
    pub num_batches: u64,
    /// Images; for decode the sum over its steps of the captions in flight.
    pub num_images: u64,
    /// Image tokens of vision, prompt tokens that prefill computed, new tokens of decode.
    pub num_tokens: u64,
    /// Sequences computed, padding included.
    pub padded_images: u64,
    /// Decode: tokens seen in the KV cache, summed over steps and captions.
    pub context_tokens: u64,
    /// Time in the stage, over all threads.
    pub service_seconds: f64,
    /// Time that its threads waited for input.
    pub waited_seconds: f64,
    /// Time that its threads waited for room in the next queue.
    pub blocked_seconds: f64,
    /// Time on the device between CUDA events, on GPUs.
    pub device_seconds: f64,
    /// Time that engines without images worked for its batches.
    #[serde(default)]
    pub helped_seconds: f64,
    /// `service_seconds` over the wall time of its threads: how busy they were with it.
    pub busy_share: f64,
    /// Service times of batches.
    pub service: Distribution,
    /// Times of images in the stage's queue.
    pub queued: Distribution,
}

/// Batches that are alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchGroup {
    /// `vision`, `prefill` or `decode`.
    pub stage: String,
    /// Sequences of each, padding included.
    pub batch: u32,
    /// How many.
    pub count: u64,
    /// Time in them, all together, with that of engines that helped.
    pub seconds: f64,
    /// Decode: tokens seen in the KV cache, of all of them together.
    pub context_tokens: u64,
}

/// One thread of the pipeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrackProfile {
    /// `engine-0`
    pub name: String,
    /// From its start to its end.
    pub wall_seconds: f64,
    /// Time in each stage.
    pub stages: BTreeMap<String, f64>,
    /// Time waiting for input: from asking its queue until it has something, or knows that there is nothing.
    pub waited_seconds: f64,
    /// Time waiting for room in the next queue: from giving something to its being there.
    pub blocked_seconds: f64,
    /// Time for what is neither: taking captions out of their slots, making rows, beginning and ending.
    #[serde(default)]
    pub scheduling_seconds: f64,
    /// Time that an engine without images worked for other engines' batches.
    #[serde(default)]
    pub helping_seconds: f64,
    /// What nothing accounts for: wall time less all of the above.
    pub other_seconds: f64,
    /// Time that this thread itself was running.
    pub cpu_seconds: Option<f64>,
}

/// One queue between two stages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueueProfile {
    /// The stage that takes from it.
    pub stage: String,
    /// What it holds at most.
    pub capacity: usize,
    /// Mean of what was left when its stage had taken something.
    pub mean_depth: f64,
    /// Most that was left.
    pub max_depth: u32,
}

/// How long captions took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaptionProfile {
    /// From an image's bytes being in memory to its first token on the host, all queues included.
    pub ttft: Distribution,
    /// From an engine taking the image to its first token: vision and prefill of its batch.
    pub ttft_in_engine: Distribution,
    /// Time per output token after the first, over each caption.
    pub tpot: Distribution,
}

/// How full slots and batches were.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Occupancy {
    /// Mean share of the slots in use during decode steps, weighted by their time.
    pub slots: f64,
    /// Mean captions of a decode step.
    pub decode_batch: f64,
    /// Mean images of a vision batch.
    pub vision_batch: f64,
    /// Share of vision's sequences that were padding.
    pub vision_padding: f64,
    /// Share of decode's sequences that were padding.
    pub decode_padding: f64,
}

/// What limited the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bottleneck {
    /// The stage.
    pub stage: String,
    /// Why it is taken for that.
    pub reason: String,
}

/// What the machine can do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Peaks {
    /// Products of floats, in floating-point operations a second, and what they were measured with.
    pub float: Peak,
    /// Products of 8-bit integers, where the bundle has such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub int8: Option<Peak>,
    /// Reading memory, in bytes a second.
    pub memory_read: Peak,
    /// Threads that were used for all of them.
    pub num_threads: usize,
}

/// The best of several ways to measure one thing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Operations or bytes a second.
    pub rate: f64,
    /// Which way gave it.
    pub by: String,
    /// All ways that were tried.
    pub tried: BTreeMap<String, f64>,
}

/// Shares of the machine's peaks: see docs/profiling.md for the definition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Utilisation {
    /// Vision tower and projector.
    pub vision: StageUtilisation,
    /// Prefill.
    pub prefill: StageUtilisation,
    /// Decode.
    pub decode: StageUtilisation,
    /// All three over the wall time of the run.
    pub run: StageUtilisation,
}

/// One stage against the peaks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageUtilisation {
    /// Floating-point operations of the model.
    pub flops: f64,
    /// Bytes of weights and KV cache that had to be read.
    pub bytes: f64,
    /// Seconds of the device's time: the engines' seconds over the number of engines that share the device, summed over
    /// devices.
    pub seconds: f64,
    /// Model-FLOP utilisation.
    pub mfu: f64,
    /// Share of the memory-read peak.
    pub bandwidth: f64,
    /// Least seconds that the peaks allow, over `seconds`: 1 is on the roofline.
    pub roofline: f64,
}

/// ONNX Runtime's times by region of the graph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OperatorProfile {
    /// Regions, the most expensive first.
    pub regions: Vec<RegionProfile>,
    /// Time in operators, over all sessions.
    pub seconds: f64,
    /// Time in ONNX Runtime's runs, over all sessions.
    pub run_seconds: f64,
}

/// One region of one graph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RegionProfile {
    /// `decoder`, `vision_tower`, `projector`
    pub graph: String,
    /// `attention`, `mlp`, …
    pub region: String,
    /// Operators that were run.
    pub num_calls: u64,
    /// Time in them.
    pub seconds: f64,
    /// Share of the time in operators.
    pub share: f64,
    /// Time by kind of operator.
    pub operators: BTreeMap<String, f64>,
}

/// One GPU during the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuProfile {
    /// As CUDA counts.
    pub index: u32,
    /// The driver's name for it.
    pub name: String,
    /// Samples taken.
    pub num_samples: u64,
    /// Mean share of the time in which a kernel ran.
    pub utilisation: f64,
    /// Mean share of the time in which memory was read or written.
    pub memory_utilisation: f64,
    /// Mean power in watts.
    pub mean_watts: f64,
    /// Largest power in watts.
    pub max_watts: f64,
    /// Mean power times the wall time, in joules.
    pub joules: f64,
    /// Most memory in use, in bytes.
    pub max_memory_bytes: u64,
}

/// Durations, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95 % are at most this.
    pub p95: f64,
    /// 99 % are at most this.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Distribution {
    /// Of a histogram of nanoseconds; exact to its three digits.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e9;
        Self {
            count: histogram.len(),
            mean: histogram.mean() / 1e9,
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            max: histogram.max() as f64 / 1e9,
        }
    }
}
