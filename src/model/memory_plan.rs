//! How many captions in flight, and how many images at once, fit into a device's memory. The sizes are those that the graphs
//! declare; what operators need beside them is estimated, and a share of the memory is left free for the error.

use std::fmt;

use recaption_export::{DataType, DecoderDims, Manifest, Target, VisionDims};

use crate::error::{Error, Result};
use crate::model::kv_cache::CacheShape;

/// What contexts, libraries and captured graphs take on a GPU, whatever the model.
const GPU_FIXED_BYTES: u64 = 1 << 30;
/// Workspace over what the largest tensors add up to.
const WORKSPACE_MARGIN: f64 = 1.25;

/// Memory of a device, and how much of it may be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DeviceMemory {
    pub(crate) free_bytes: u64,
    /// Share of the free memory that engines may take.
    pub(crate) utilization: f64,
    /// Engines that share it.
    pub(crate) num_engines: usize,
    pub(crate) is_gpu: bool,
    /// Whether decoder weights are there twice: TensorRT builds an engine for prefill and one for decode.
    pub(crate) has_two_decoders: bool,
}

/// What the user asked for, and how far to go without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) num_slots: Option<usize>,
    pub(crate) vision_batch: Option<usize>,
    pub(crate) max_slots: usize,
    pub(crate) max_vision_batch: usize,
}

/// Most captions in flight when the user does not say: on a CPU more bring little.
const DEFAULT_SLOTS: usize = 16;
/// The same of one engine with a bundle of target cpu, whose products gain up to twice as many.
const OWN_OPERATORS_SLOTS: usize = 32;
const DEFAULT_VISION_BATCH: usize = 4;
/// Most captions in flight on a GPU when the user does not say: beyond, a step takes longer by as much as it does more
/// (roofline of an H100: 989 TFLOP/s over 3.35 TB/s is 295 tokens a weight read).
const MAX_GPU_SLOTS: usize = 256;
/// Most images encoded and prefilled at once there: 16 x 640 tokens fill a GPU, more only make decode steps wait.
const MAX_GPU_VISION_BATCH: usize = 16;

impl Wanted {
    /// What an engine gets where the user says nothing.
    pub(crate) fn by_default(is_gpu: bool, target: Target) -> Self {
        let (max_slots, max_vision_batch) = match (is_gpu, target) {
            (true, _) => (MAX_GPU_SLOTS, MAX_GPU_VISION_BATCH),
            (false, Target::Cpu) => (OWN_OPERATORS_SLOTS, 1),
            (false, Target::Ort | Target::TensorRt) => (DEFAULT_SLOTS, DEFAULT_VISION_BATCH),
        };
        Self { num_slots: None, vision_batch: None, max_slots, max_vision_batch }
    }
}

/// The choice, with its reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    pub(crate) num_slots: usize,
    pub(crate) vision_batch: usize,
    /// What one engine may use.
    pub(crate) budget_bytes: u64,
    pub(crate) weight_bytes: u64,
    pub(crate) bytes_per_slot: u64,
    pub(crate) workspace_bytes: u64,
}

/// What a plan needs to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelSizes {
    pub(crate) vision: VisionDims,
    pub(crate) decoder: DecoderDims,
    /// Of a value between the decoder's layers.
    pub(crate) activation_bytes: usize,
    /// Of the weights of vision tower and projector.
    pub(crate) vision_bytes: u64,
    /// Of the decoder's weights.
    pub(crate) decoder_bytes: u64,
    pub(crate) cache: CacheShape,
}

impl ModelSizes {
    /// # Errors
    /// [`Error::Setting`] without a KV cache of the expected form.
    pub(crate) fn of(manifest: &Manifest) -> Result<Self> {
        let graph_bytes = |file: &str| {
            let data = format!("{file}.data");
            let files = manifest.header.files.iter().filter(|entry| entry.path == file || entry.path == data);
            files.map(|entry| entry.size).sum::<u64>()
        };
        let graphs = &manifest.graphs;
        Ok(Self {
            vision: manifest.vision.clone(),
            decoder: manifest.decoder.clone(),
            activation_bytes: manifest.header.activations.size(),
            vision_bytes: graph_bytes(&graphs.vision_tower.file) + graph_bytes(&graphs.projector.file),
            decoder_bytes: graph_bytes(&graphs.decoder.file),
            cache: CacheShape::of(manifest)?,
        })
    }
}

/// Bytes that a bundle needs.
#[derive(Clone, Copy, Debug)]
struct Demand {
    weight_bytes: u64,
    bytes_per_slot: u64,
    /// Of vision or prefill, whichever takes more, for each image of a batch.
    workspace_per_image: u64,
    /// Of a decode step, for each slot.
    workspace_per_slot: u64,
}

impl Demand {
    fn of(model: &ModelSizes, memory: DeviceMemory, prompt: usize, max_length: usize) -> Self {
        let ModelSizes { vision, decoder, activation_bytes: float, .. } = model;
        let float = *float;
        let weight_bytes = model.vision_bytes + model.decoder_bytes * (1 + u64::from(memory.has_two_decoders));
        let vision_tokens = (vision.image_size / vision.patch_size.max(1)).pow(2) + 1;
        // Hidden states, an MLP's inner ones, and the scores of heads of usual width.
        let vision_workspace = vision_tokens
            * (6 * vision.hidden_size + 2 * vision.intermediate_size + 2 * vision.hidden_size / 64 * vision_tokens)
            * float;
        let qkv = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim;
        // The CPU's attention keeps its scores, in fp32; the GPU's does not.
        let scores = if memory.is_gpu { 0 } else { decoder.num_heads * max_length * DataType::F32.size() };
        let per_token = (4 * decoder.hidden_size + 2 * decoder.intermediate_size + qkv) * float + scores;
        let logits = decoder.vocab_size * (DataType::F32.size() + float);
        let with_margin = |bytes: usize| (bytes as f64 * WORKSPACE_MARGIN) as u64;
        Self {
            weight_bytes,
            bytes_per_slot: model.cache.bytes_per_slot(max_length) as u64,
            workspace_per_image: with_margin(vision_workspace.max(prompt * per_token)),
            workspace_per_slot: with_margin(per_token + logits),
        }
    }

    fn workspace(&self, num_slots: usize, vision_batch: usize) -> u64 {
        self.workspace_per_image * vision_batch as u64 + self.workspace_per_slot * num_slots as u64
    }
}

impl MemoryPlan {
    /// Plans captions of up to `max_length` tokens, `prompt` of them read at once.
    ///
    /// # Errors
    /// [`Error::Setting`] when a GPU has not even room for one caption, or not for what the user asked. On a CPU weights are
    /// mapped and memory is shared with all else, so that there a plan is only advice.
    pub(crate) fn new(
        model: &ModelSizes,
        memory: DeviceMemory,
        wanted: Wanted,
        (prompt, max_length): (usize, usize),
    ) -> Result<Self> {
        Self::fit(Demand::of(model, memory, prompt, max_length), memory, wanted)
    }

    fn fit(demand: Demand, memory: DeviceMemory, wanted: Wanted) -> Result<Self> {
        let fixed = if memory.is_gpu { GPU_FIXED_BYTES } else { 0 };
        let share = memory.free_bytes as f64 * memory.utilization / memory.num_engines.max(1) as f64;
        let budget_bytes = (share as u64).saturating_sub(fixed);
        let left = budget_bytes.saturating_sub(demand.weight_bytes);
        // Half of what is left for images at once, at most: captions in flight are what keeps a device busy.
        let images_that_fit = (left / 2 / demand.workspace_per_image.max(1)).max(1) as usize;
        let mut vision_batch = wanted.vision_batch.unwrap_or(images_that_fit.min(wanted.max_vision_batch));
        let for_slots = left.saturating_sub(demand.workspace(0, vision_batch));
        let slots_that_fit = (for_slots / (demand.bytes_per_slot + demand.workspace_per_slot).max(1)) as usize;
        let num_slots = wanted.num_slots.unwrap_or(slots_that_fit.clamp(1, wanted.max_slots));
        vision_batch = vision_batch.min(num_slots);
        let plan = Self {
            num_slots,
            vision_batch,
            budget_bytes,
            weight_bytes: demand.weight_bytes,
            bytes_per_slot: demand.bytes_per_slot,
            workspace_bytes: demand.workspace(num_slots, vision_batch),
        };
        if !memory.is_gpu || plan.total_bytes() <= budget_bytes {
            return Ok(plan);
        }
        let hint = match (wanted.num_slots, wanted.vision_batch) {
            (None, None) => "use a GPU with more memory, or export with --precision int4".to_owned(),
            _ if slots_that_fit == 0 => {
                "use fewer --slots and a smaller --vision-batch, or --precision int4".to_owned()
            }
            _ => format!("use --slots {slots_that_fit} or fewer"),
        };
        Err(Error::Setting { reason: format!("the model does not fit into the GPU's memory: {plan}"), hint })
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.num_slots as u64 * self.bytes_per_slot + self.workspace_bytes
    }
}

impl fmt::Display for MemoryPlan {
    /// `weights 15.0 GiB + 256 slots x 98.0 MiB + workspace of 16 images 2.1 GiB = 41.6 GiB of 70.2 GiB`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { num_slots, vision_batch, .. } = self;
        let images = if *vision_batch == 1 { "image" } else { "images" };
        let slots = if *num_slots == 1 { "slot" } else { "slots" };
        write!(
            f,
            "weights {} + {num_slots} {slots} x {} + workspace of {vision_batch} {images} {} = {} of {}",
            Bytes(self.weight_bytes),
            Bytes(self.bytes_per_slot),
            Bytes(self.workspace_bytes),
            Bytes(self.total_bytes()),
            Bytes(self.budget_bytes)
        )
    }
}

/// `98.0 MiB`
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / f64::from(1 << 20);
        if mib < 1024.0 { write!(f, "{mib:.1} MiB") } else { write!(f, "{:.1} GiB", mib / 1024.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// An 8B in fp16: 16 GiB of weights, 98 MiB a slot.
    const DEMAND: Demand = Demand {
        weight_bytes: 16 * GIB,
        bytes_per_slot: 98 << 20,
        workspace_per_image: 90 << 20,
        workspace_per_slot: 1 << 20,
    };
    const WANTED: Wanted = Wanted { num_slots: None, vision_batch: None, max_slots: 256, max_vision_batch: 16 };

    fn gpu(free_gib: u64) -> DeviceMemory {
        let free_bytes = free_gib * GIB;
        DeviceMemory { free_bytes, utilization: 0.9, num_engines: 1, is_gpu: true, has_two_decoders: false }
    }

    #[test]
    fn a_large_gpu_gets_all_slots_and_a_small_one_what_fits() {
        let large = MemoryPlan::fit(DEMAND, gpu(79), WANTED).unwrap();
        assert_eq!((large.num_slots, large.vision_batch), (256, 16));
        let small = MemoryPlan::fit(DEMAND, gpu(24), WANTED).unwrap();
        assert!((10..60).contains(&small.num_slots) && small.vision_batch >= 4, "{small:?}");
        for memory in 20..120 {
            let plan = MemoryPlan::fit(DEMAND, gpu(memory), WANTED).unwrap();
            assert!(plan.total_bytes() <= plan.budget_bytes, "{memory} GiB: {plan}");
            assert!(plan.budget_bytes <= memory * GIB && plan.vision_batch <= plan.num_slots);
        }
        let shared = MemoryPlan::fit(DEMAND, DeviceMemory { num_engines: 2, ..gpu(48) }, WANTED).unwrap();
        assert!(2 * (shared.total_bytes() + GPU_FIXED_BYTES) <= 48 * GIB);
    }

    #[test]
    fn a_model_or_a_wish_that_does_not_fit_is_refused_with_the_sum() {
        let refused = |memory, wanted| MemoryPlan::fit(DEMAND, memory, wanted).unwrap_err();
        let model = refused(gpu(16), WANTED);
        assert!(model.to_string().contains("weights 16.0 GiB"), "{model}");
        assert!(model.hint().unwrap().contains("int4"));
        let wish = refused(gpu(24), Wanted { num_slots: Some(200), ..WANTED });
        let hint = wish.hint().unwrap();
        let fewer: usize = hint.split_whitespace().nth(2).unwrap().parse().unwrap();
        MemoryPlan::fit(DEMAND, gpu(24), Wanted { num_slots: Some(fewer), ..WANTED }).unwrap();
    }

    #[test]
    fn on_a_cpu_a_plan_is_advice() {
        let cpu = DeviceMemory { is_gpu: false, ..gpu(8) };
        let plan = MemoryPlan::fit(DEMAND, cpu, WANTED).unwrap();
        assert_eq!((plan.num_slots, plan.vision_batch), (1, 1));
        let plan =
            MemoryPlan::fit(DEMAND, cpu, Wanted { num_slots: Some(4), vision_batch: Some(2), ..WANTED }).unwrap();
        assert_eq!((plan.num_slots, plan.vision_batch), (4, 2));
    }
}
