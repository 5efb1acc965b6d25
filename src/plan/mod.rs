//! How long captioning takes on machines that are not at hand: `recaption plan`.
//!
//! [`device`] is what a machine can do at most, [`model`] what a captioner needs, [`roofline`] puts the one over the
//! other for a batch of each stage, [`assumptions`] and [`measured`] ([`profiled`]) say how much of that is reached,
//! and [`schedule`] makes a run of batches. [`Plan`] is what comes of it.

pub mod assumptions;
pub mod device;
pub mod measured;
pub mod model;
pub mod profiled;
pub mod roofline;
pub mod schedule;

use recaption_export::flops::{self, Flops};
use serde::Serialize;

use crate::error::Result;
use crate::model::memory_plan::{DeviceMemory, MemoryPlan, Wanted};
use crate::plan::assumptions::{Assumption, Range};
use crate::plan::device::Device;
use crate::plan::model::Model;
use crate::plan::roofline::{Arithmetic, Costs, EnginePractice};
use crate::plan::schedule::Workload;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The captioner.
    pub model: Model,
    /// What each device can do.
    pub device: Device,
    /// How far practice is from that: a slow captioner, a likely one, a fast one.
    pub practices: [EnginePractice; 3],
    /// Where the practices come from.
    pub basis: Basis,
    /// How many devices there are.
    pub num_devices: u64,
    /// Engines on each.
    pub num_engines: usize,
    /// Captions in flight in each engine, where the user says.
    pub num_slots: Option<usize>,
    /// Images encoded and prefilled at once, where the user says.
    pub vision_batch: Option<usize>,
    /// Share of the device's memory that may be used.
    pub memory_utilization: f64,
    /// Tokens of text around the image.
    pub prompt_tokens: usize,
    /// Those before it that are read once for all captions.
    pub shared_prompt_tokens: usize,
    /// New tokens of captions, one after the other and over again.
    pub new_tokens: Vec<usize>,
    /// Most new tokens: what slots have room for.
    pub max_new_tokens: usize,
    /// Images to caption.
    pub num_images: Option<f64>,
    /// Price of one device for an hour.
    pub price_per_hour: Option<f64>,
    /// Seconds of one core to read and preprocess an image: of a slow one, a likely one, a fast one.
    pub preprocessing: Range,
    /// Cores that each device has for that; enough where nobody says.
    pub num_cores: Option<f64>,
    /// Seconds of an engine's thread for each caption beside its batches, where it was measured.
    pub seconds_per_caption: f64,
    /// Seconds of a run before engines begin and after they end, where it was measured.
    pub seconds_per_run: f64,
}

/// What a plan is built on.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Basis {
    /// Peaks from datasheets or measured, shares of them assumed.
    Assumed {
        /// All of them.
        assumptions: Vec<Assumption>,
    },
    /// A run that was measured.
    Profile {
        /// The machine's name.
        machine: String,
        /// The model's name.
        model: String,
        /// How far off such plans may be, as a share of the speed.
        spread: f64,
        /// Times that parts of each stage take longer than at the peaks.
        practice: EnginePractice,
    },
}

/// How long captioning takes: what `--json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The captioner.
    pub model: Model,
    /// One device.
    pub device: Device,
    /// How many there are.
    pub num_devices: u64,
    /// What vision is multiplied in.
    pub vision_arithmetic: Arithmetic,
    /// What the decoder is multiplied in.
    pub decoder_arithmetic: Arithmetic,
    /// Engines on each device.
    pub num_engines: usize,
    /// What fits.
    pub memory: Memory,
    /// What an image takes.
    pub image: Image,
    /// Speeds of one device, once its slots are full.
    pub steady: Speeds,
    /// The images asked for, from the first to the last; none where nobody asks.
    pub job: Option<Job>,
    /// Cores for reading and preprocessing.
    pub preprocessing: Preprocessing,
    /// What it is built on.
    pub basis: Basis,
}

/// Memory of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Captions in flight.
    pub num_slots: usize,
    /// Images encoded and prefilled at once.
    pub vision_batch: usize,
    /// Weights.
    pub weight_bytes: u64,
    /// The cache of one caption.
    pub bytes_per_slot: u64,
    /// What operators need beside them.
    pub workspace_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
    /// What may be used.
    pub budget_bytes: u64,
}

/// One image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Image {
    /// Tokens of the image.
    pub image_tokens: usize,
    /// Tokens of text around it.
    pub prompt_tokens: usize,
    /// Mean new tokens.
    pub new_tokens: f64,
    /// Its arithmetic.
    pub flops: Flops,
}

/// Speeds of one device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speeds {
    /// Images a second.
    pub images_per_second: Range,
    /// Where the device's time goes, likely: shares that add up to 1.
    pub split: Split,
    /// Likely seconds of a decode step with all slots in use.
    pub step_seconds: f64,
    /// Likely new tokens a second.
    pub new_tokens_per_second: f64,
    /// Likely share of the arithmetic peak, over all stages.
    pub utilisation: f64,
}

/// Shares of the time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Split {
    /// Vision tower.
    pub vision: f64,
    /// Projector.
    pub projector: f64,
    /// Prompts.
    pub prefill: f64,
    /// Steps.
    pub decode: f64,
    /// Waiting for images.
    pub idle: f64,
}

/// All images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Job {
    /// How many.
    pub num_images: f64,
    /// Images a second of all devices, from the first to the last.
    pub images_per_second: Range,
    /// Hours: of a slow captioner, a likely one, a fast one.
    pub hours: Range,
    /// Of all devices.
    pub device_hours: Range,
    /// At the price given.
    pub cost: Option<Range>,
}

/// Cores for reading and preprocessing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Preprocessing {
    /// Seconds of one core for an image.
    pub seconds_per_image: Range,
    /// Cores that a device keeps busy, at each of the three speeds.
    pub cores_per_device: Range,
    /// Cores that it has, where the user says.
    pub num_cores: Option<f64>,
}

impl Question {
    /// Answers it.
    ///
    /// # Errors
    /// [`crate::Error::Setting`] when the model does not fit, or the device does not multiply in its precision.
    pub fn answer(&self) -> Result<Plan> {
        let Self { model, device, .. } = self;
        let image_tokens = model.vision.num_image_tokens;
        let prompt = image_tokens + self.prompt_tokens;
        let plan = self.memory(prompt)?;
        // Engines of one device share it.
        let share = device.share(self.num_engines);
        let costs = Costs::new(model, &share, (prompt, self.shared_prompt_tokens))?;
        let workloads: Vec<Workload<'_>> = (0..3)
            .map(|i| Workload {
                costs,
                practice: self.practices[i],
                num_engines: self.num_engines,
                num_slots: plan.num_slots,
                vision_batch: plan.vision_batch,
                prompt,
                new_tokens: self.new_tokens.clone(),
                seconds_per_ready_image: self
                    .num_cores
                    .map_or(0.0, |cores| self.preprocessing.values()[i] / cores.max(1e-9)),
                seconds_per_caption: self.seconds_per_caption,
                seconds_per_run: self.seconds_per_run,
            })
            .collect();
        let steady: Vec<_> = workloads.iter().map(Workload::steady).collect();
        let images_per_second =
            Range::of([0, 1, 2].map(|i| steady[i].0 as f64 / steady[i].1.seconds.max(f64::MIN_POSITIVE)));
        let new_tokens = self.new_tokens.iter().sum::<usize>() as f64 / self.new_tokens.len().max(1) as f64;
        let flops = flops::per_image(&model.vision, &model.decoder, self.prompt_tokens, new_tokens.round() as usize);
        let arithmetic = |precision| Arithmetic::of(precision, device.is_gpu);
        let (vision_arithmetic, decoder_arithmetic) = (arithmetic(model.vision_precision), arithmetic(model.precision));
        let seconds_at_peak =
            |flops: u64, arithmetic: Arithmetic| flops as f64 / arithmetic.rate(device).unwrap_or(f64::INFINITY);
        let at_peak = seconds_at_peak(flops.vision + flops.projector, vision_arithmetic)
            + seconds_at_peak(flops.prefill + flops.decode, decoder_arithmetic);
        let likely = &steady[1].1;
        let engine_seconds = likely.vision + likely.prefill + likely.decode + likely.idle;
        let projector = likely.vision * costs.projector_share();
        Ok(Plan {
            memory: Memory {
                num_slots: plan.num_slots,
                vision_batch: plan.vision_batch,
                weight_bytes: plan.weight_bytes,
                bytes_per_slot: plan.bytes_per_slot,
                workspace_bytes: plan.workspace_bytes,
                total_bytes: plan.total_bytes(),
                budget_bytes: plan.budget_bytes,
            },
            image: Image { image_tokens, prompt_tokens: self.prompt_tokens, new_tokens, flops },
            steady: Speeds {
                images_per_second,
                split: Split {
                    vision: (likely.vision - projector) / engine_seconds,
                    projector: projector / engine_seconds,
                    prefill: likely.prefill / engine_seconds,
                    decode: likely.decode / engine_seconds,
                    idle: likely.idle / engine_seconds,
                },
                step_seconds: likely.decode / likely.num_steps.max(1) as f64,
                new_tokens_per_second: images_per_second.likely * new_tokens,
                utilisation: images_per_second.likely * at_peak,
            },
            job: self.num_images.map(|num_images| self.job(num_images, &workloads)),
            preprocessing: Preprocessing {
                seconds_per_image: self.preprocessing,
                cores_per_device: Range::of(
                    [0, 1, 2].map(|i| images_per_second.values()[i] * self.preprocessing.values()[i]),
                ),
                num_cores: self.num_cores,
            },
            model: model.clone(),
            device: device.clone(),
            num_devices: self.num_devices,
            vision_arithmetic,
            decoder_arithmetic,
            num_engines: self.num_engines,
            basis: self.basis.clone(),
        })
    }

    fn memory(&self, prompt: usize) -> Result<MemoryPlan> {
        let Self { model, device, .. } = self;
        let memory = DeviceMemory {
            free_bytes: device.memory_bytes,
            utilization: self.memory_utilization,
            num_engines: self.num_engines,
            is_gpu: device.is_gpu,
            has_two_decoders: device.is_gpu && !model.target.updates_cache_in_place(),
        };
        let wanted = Wanted {
            num_slots: self.num_slots,
            vision_batch: self.vision_batch,
            ..Wanted::by_default(device.is_gpu, model.target)
        };
        MemoryPlan::new(&model.sizes(), memory, wanted, (prompt, prompt + self.max_new_tokens))
    }

    fn job(&self, num_images: f64, workloads: &[Workload<'_>]) -> Job {
        let of_device = (num_images / self.num_devices as f64).ceil();
        let seconds = Range::of([0, 1, 2].map(|i| workloads[i].seconds(of_device)));
        let device_hours = seconds.map(|seconds| seconds / 3600.0 * self.num_devices as f64);
        Job {
            num_images,
            images_per_second: seconds.map(|seconds| num_images / seconds),
            hours: seconds.map(|seconds| seconds / 3600.0),
            device_hours,
            cost: self.price_per_hour.map(|price| device_hours.map(|hours| hours * price)),
        }
    }
}
