//! Generate: `image_features` to token ids. Owns the decoder session and its KV cache: prefill puts a batch of new
//! captions behind the active ones, decode moves all active captions one token on.
//!
//! Slot `i` of the cache belongs to `active[i]`, always: when a caption ends, the last one takes its slot, so that
//! decode runs over `0..n` without gaps. A caption does not depend on its slot or its neighbours.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use recaption_export::{DataType, DecoderDims, DimRange, IMAGE_INDEX_TEXT, Target};

use crate::error::Result;
use crate::model::batch_steps::BatchSteps;
use crate::model::kv_cache::{CacheShape, CacheUse, KvCache};
use crate::model::sequence::{Sequence, StopRule};
use crate::model::{Bundle, Prompt};
use crate::profile::recorder::{self, Work};
use crate::runtime::block::Block;
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::session::{Binding, Session, SessionOptions};
use crate::runtime::stream::DeviceTimer;
use crate::runtime::{CopyCounts, Device};
use crate::stage::Stage;

/// Limits of one generator.
#[derive(Clone, Debug)]
pub(crate) struct GeneratorOptions {
    pub(crate) num_slots: usize,
    /// Most captions prefilled at once.
    pub(crate) max_prefill_batch: usize,
    pub(crate) stop_rule: StopRule,
    /// Decode steps have few shapes, and say the longest length there can be: what a captured graph must have.
    pub(crate) has_fixed_shapes: bool,
    pub(crate) times_device: bool,
}

/// The decoder of one engine, with the captions in flight; `T` is what a caption is about.
pub(crate) struct Generator<T> {
    decoder: Decoder,
    dims: DecoderDims,
    cache: KvCache,
    prompt: PromptPositions,
    stop_rule: StopRule,
    num_slots: usize,
    decode_steps: BatchSteps,
    prefill: StepBuffers,
    decode: StepBuffers,
    /// By batch and by the cache's parity.
    decode_bindings: HashMap<(usize, usize), Binding>,
    /// One row that decode steps bind as `image_features`, and never read.
    no_features: Buffer,
    active: Vec<Sequence<T>>,
    /// Tokens of the prompt that the slot behind the others holds: the text before the image, read once for all captions.
    shared_length: usize,
    timer: Option<DeviceTimer>,
}

/// The decoder's graph: once, or on TensorRT twice, since an engine is built for one range of shapes.
struct Decoder {
    prefill: Session,
    decode: Option<Session>,
}

impl Decoder {
    fn open(bundle: &Bundle, session: &SessionOptions, sizes: DecoderSizes) -> Result<Self> {
        let graph = &bundle.manifest.graphs.decoder;
        let open = |dims| {
            let options = SessionOptions { dims, ..session.clone() };
            Session::open(&bundle.graph_path(graph), graph, &options)
        };
        let DecoderSizes { num_slots, max_prefill_batch, prompt, max_length, num_image_tokens } = sizes;
        let dims = |batch, sequence, rows: DimRange| {
            let range = |min, max| DimRange { min, opt: max, max };
            let (batch, sequence, max_length) =
                (range(1, batch), range(sequence, sequence), range(max_length, max_length));
            let names = ["batch", "sequence", "max_length", "rows"].map(str::to_owned);
            names.into_iter().zip([batch, sequence, max_length, rows]).collect()
        };
        let rows = DimRange {
            min: num_image_tokens,
            opt: max_prefill_batch * num_image_tokens,
            max: max_prefill_batch * num_image_tokens,
        };
        let prefill = open(dims(max_prefill_batch, prompt, rows))?;
        let decode = match session.device {
            Device::TensorRt(_) => Some(open(dims(num_slots, 1, DimRange { min: 1, opt: 1, max: 1 }))?),
            Device::Cpu | Device::Cuda(_) => None,
        };
        Ok(Self { prefill, decode })
    }

    fn decode(&self) -> &Session {
        self.decode.as_ref().unwrap_or(&self.prefill)
    }

    fn decode_mut(&mut self) -> &mut Session {
        self.decode.as_mut().unwrap_or(&mut self.prefill)
    }
}

/// Sizes that a decoder is opened for, in captions and tokens.
#[derive(Clone, Copy)]
struct DecoderSizes {
    num_slots: usize,
    max_prefill_batch: usize,
    prompt: usize,
    max_length: usize,
    num_image_tokens: usize,
}

/// The prompt with the image in it, position by position.
struct PromptPositions {
    /// Id to look up; 0 where the image is, since the id is not used there.
    input_ids: Vec<i64>,
    /// Row of the image's features, or [`IMAGE_INDEX_TEXT`].
    image_index: Vec<i64>,
    num_image_tokens: usize,
    num_tokens_before: usize,
}

impl PromptPositions {
    fn new(prompt: &Prompt, num_image_tokens: usize) -> Self {
        let ids = |ids: &[u32]| ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
        let (before, after) = (ids(&prompt.before), ids(&prompt.after));
        let num_tokens_before = before.len();
        let text = |count| std::iter::repeat_n(IMAGE_INDEX_TEXT, count);
        let image_index =
            text(before.len()).chain(0..num_image_tokens as i64).chain(text(after.len())).collect::<Vec<_>>();
        let input_ids = [before, vec![0; num_image_tokens], after].concat();
        Self { input_ids, image_index, num_image_tokens, num_tokens_before }
    }

    fn len(&self) -> usize {
        self.input_ids.len()
    }
}

/// What one kind of decoder run takes from the host, and gives it.
struct StepBuffers {
    /// The tensors at [`SEQLENS_K`], [`INPUT_IDS`] and [`IMAGE_INDEX`].
    inputs: Block,
    /// `[]`: the longest of the sequences after this run; on the host, where the attention reads it. Bound where the decoder
    /// has that input.
    total_sequence_length: Buffer,
    totals: Totals,
    /// `next_ids`, `[batch]`.
    next_ids: Block,
    sequence: usize,
}

/// `[batch]`: tokens of each sequence after this run, less one.
const SEQLENS_K: usize = 0;
/// `[batch, sequence]`
const INPUT_IDS: usize = 1;
/// `[batch, sequence]`
const IMAGE_INDEX: usize = 2;

/// How runs say the length of the longest sequence.
#[derive(Clone, Copy)]
struct Totals {
    /// Whether the decoder has that input.
    is_input: bool,
    /// The same for all runs; the truth where there is none.
    fixed: Option<usize>,
}

impl StepBuffers {
    /// Buffers of runs over up to `max_batch` sequences. Until they are told otherwise they hold text of length 1.
    fn new(decoder: &Session, (max_batch, sequence): (usize, usize), totals: Totals) -> Result<Self> {
        let num_tokens = max_batch * sequence;
        let inputs = [(DataType::I32, max_batch), (DataType::I64, num_tokens), (DataType::I64, num_tokens)];
        let mut buffers = Self {
            inputs: Block::new(decoder, &inputs)?,
            total_sequence_length: Buffer::host(DataType::I32, 1)?,
            totals,
            next_ids: Block::new(decoder, &[(DataType::I64, max_batch)])?,
            sequence,
        };
        buffers.inputs.tensor_mut::<i64>(IMAGE_INDEX).fill(IMAGE_INDEX_TEXT);
        buffers.set_lengths(std::iter::repeat_n(1, max_batch));
        Ok(buffers)
    }

    fn bind(&self, binding: &mut Binding, batch: usize) -> Result<()> {
        let tokens = [batch, self.sequence];
        binding.bind_input("input_ids", &self.inputs.view(INPUT_IDS, &tokens)?)?;
        binding.bind_input("image_index", &self.inputs.view(IMAGE_INDEX, &tokens)?)?;
        binding.bind_input("seqlens_k", &self.inputs.view(SEQLENS_K, &[batch])?)?;
        if self.totals.is_input {
            binding.bind_input("total_sequence_length", &self.total_sequence_length.view(0, &[])?)?;
        }
        binding.bind_output("next_ids", self.next_ids.view(0, &[batch])?)
    }

    /// Says how long each sequence is after the run, and the longest of them.
    fn set_lengths(&mut self, lengths: impl Iterator<Item = usize>) {
        let mut longest = 0;
        for (seqlen, length) in self.inputs.tensor_mut::<i32>(SEQLENS_K).iter_mut().zip(lengths) {
            longest = longest.max(length);
            *seqlen = length as i32 - 1;
        }
        self.total_sequence_length.part_mut::<i32>(0, 1)[0] = self.totals.fixed.unwrap_or(longest) as i32;
    }
}

impl<T> Generator<T> {
    /// Loads the decoder, allocates its cache, and captures its decode steps where the session does that.
    pub(crate) fn open(
        bundle: &Bundle,
        session: &SessionOptions,
        prompt: &Prompt,
        options: GeneratorOptions,
    ) -> Result<Self> {
        let manifest = &bundle.manifest;
        let dims = manifest.decoder.clone();
        let prompt = PromptPositions::new(prompt, manifest.vision.num_image_tokens);
        let max_length = prompt.len() + options.stop_rule.max_new_tokens;
        let GeneratorOptions { num_slots, max_prefill_batch, stop_rule, has_fixed_shapes, times_device } = options;
        let num_image_tokens = manifest.vision.num_image_tokens;
        let sizes = DecoderSizes { num_slots, max_prefill_batch, prompt: prompt.len(), max_length, num_image_tokens };
        let decoder = Decoder::open(bundle, session, sizes)?;
        let inputs = &manifest.graphs.decoder.inputs;
        let is_input = inputs.iter().any(|input| input.name == "total_sequence_length");
        let of_prefill = Totals { is_input, fixed: None };
        let of_decode = Totals { is_input, fixed: has_fixed_shapes.then_some(max_length) };
        // Of the attentions only our own reads several prompts behind what the cache holds already.
        let shared_length = if manifest.header.target == Target::Cpu { prompt.num_tokens_before } else { 0 };
        let num_stored = num_slots + usize::from(shared_length > 0);
        let num_read = prompt.len() - shared_length;
        let mut generator = Self {
            cache: KvCache::new(decoder.decode(), CacheShape::of(manifest)?, num_stored, max_length)?,
            no_features: decoder.decode().device_buffer(manifest.header.activations, dims.hidden_size)?,
            prefill: StepBuffers::new(&decoder.prefill, (max_prefill_batch, num_read), of_prefill)?,
            decode: StepBuffers::new(decoder.decode(), (num_slots, 1), of_decode)?,
            timer: if times_device { decoder.decode().stream().timer()? } else { None },
            decoder,
            dims,
            prompt,
            stop_rule,
            num_slots,
            decode_steps: if has_fixed_shapes {
                BatchSteps::for_capture(num_slots)
            } else {
                BatchSteps::exact(num_slots)
            },
            decode_bindings: HashMap::new(),
            active: Vec::with_capacity(num_slots),
            shared_length,
        };
        generator.read_shared_tokens()?;
        generator.capture()?;
        Ok(generator)
    }

    /// Runs each decode step once, so that it is captured now: while a graph is captured no other thread of the process may
    /// allocate on a GPU. The largest first, so that the smaller ones find the memory they need. All slots are free, so that
    /// what the steps write into the cache does no harm.
    fn capture(&mut self) -> Result<()> {
        if !self.decoder.decode().captures_graphs() {
            return Ok(());
        }
        for batch in self.decode_steps.clone().iter().rev() {
            for _ in 0..self.cache.num_parities() {
                self.run_decode(batch)?;
                self.cache.advance();
            }
        }
        Ok(())
    }

    /// Fills the slot behind the others.
    fn read_shared_tokens(&mut self) -> Result<()> {
        let length = self.shared_length;
        if length == 0 {
            return Ok(());
        }
        let session = &mut self.decoder.prefill;
        let mut buffers = StepBuffers::new(session, (1, length), self.prefill.totals)?;
        buffers.inputs.tensor_mut::<i64>(INPUT_IDS).copy_from_slice(&self.prompt.input_ids[..length]);
        buffers.set_lengths(std::iter::once(length));
        let mut binding = session.binding()?;
        buffers.bind(&mut binding, 1)?;
        binding.bind_input("image_features", &self.no_features.view(0, &[1, self.dims.hidden_size])?)?;
        self.cache.bind(&mut binding, self.num_slots, 1, CacheUse::Prefill)?;
        buffers.inputs.send(session)?;
        session.run(&binding)?;
        buffers.next_ids.receive_first(session, 1)
    }

    /// Slots that no caption is in.
    pub(crate) fn num_free_slots(&self) -> usize {
        self.num_slots - self.active.len()
    }

    /// Captions in flight.
    pub(crate) fn num_active(&self) -> usize {
        self.active.len()
    }

    /// Starts a caption for each of `subjects`, whose features are in `image_features` one after the other, and takes
    /// its first token. They are taken out only when that worked.
    pub(crate) fn prefill(&mut self, subjects: &mut Vec<T>, image_features: &TensorView) -> Result<()> {
        let begun = recorder::begin();
        let batch = self.run_prefill(subjects.len(), image_features, None)?;
        let length = self.prompt.len();
        recorder::add_device_time(Stage::Prefill, &mut self.timer)?;
        let first_token_ns = recorder::now();
        let next_ids = &self.prefill.next_ids.tensor::<i64>(0)[..batch];
        for (subject, &next_id) in subjects.drain(..).zip(next_ids) {
            let mut sequence = Sequence::new(subject, length);
            sequence.first_token_ns = first_token_ns;
            sequence.push(next_id, &self.stop_rule);
            self.active.push(sequence);
        }
        let num_tokens = batch * (length - self.shared_length);
        let work = Work {
            num_images: batch as u32,
            num_tokens: num_tokens as u32,
            padded_batch: batch as u32,
            context_tokens: 0,
        };
        begun.end(Stage::Prefill, work);
        Ok(())
    }

    /// Logits of each image's first caption token, `[batch, vocab]`, without starting a caption.
    pub(crate) fn prefill_logits(&mut self, batch: usize, image_features: &TensorView) -> Result<Vec<f32>> {
        let num_logits = batch * self.dims.vocab_size;
        let mut logits = Block::new(&self.decoder.prefill, &[(DataType::F32, num_logits)])?;
        self.run_prefill(batch, image_features, Some(logits.view(0, &[batch, self.dims.vocab_size])?))?;
        logits.receive_first(&self.decoder.prefill, num_logits)?;
        Ok(logits.tensor::<f32>(0).to_vec())
    }

    /// Runs the decoder over the prompt in the slots behind the active ones. All prompts have one length: no padding.
    fn run_prefill(&mut self, batch: usize, image_features: &TensorView, logits: Option<TensorView>) -> Result<usize> {
        assert!(batch <= self.num_free_slots(), "bug: prefill of {batch} into {} slots", self.num_free_slots());
        let stream = self.decoder.prefill.stream();
        let free_slots = self.active.len()..self.active.len() + batch;
        for slot in free_slots.filter(|_| self.shared_length > 0) {
            self.cache.move_slot(stream, self.num_slots, slot, self.shared_length)?;
        }
        let PromptPositions { input_ids, image_index, num_image_tokens, .. } = &self.prompt;
        let length = self.prompt.len();
        let (input_ids, image_index) = (&input_ids[self.shared_length..], &image_index[self.shared_length..]);
        let ids = self.prefill.inputs.tensor_mut::<i64>(INPUT_IDS);
        ids.chunks_exact_mut(input_ids.len()).take(batch).for_each(|ids| ids.copy_from_slice(input_ids));
        let indices = self.prefill.inputs.tensor_mut::<i64>(IMAGE_INDEX);
        for (image, indices) in indices.chunks_exact_mut(image_index.len()).take(batch).enumerate() {
            let first_row = (image * num_image_tokens) as i64;
            for (target, &index) in indices.iter_mut().zip(image_index) {
                *target = if index >= 0 { first_row + index } else { index };
            }
        }
        self.prefill.set_lengths(std::iter::repeat_n(length, batch));

        let session = &mut self.decoder.prefill;
        let mut binding = session.binding()?;
        self.prefill.bind(&mut binding, batch)?;
        binding.bind_input("image_features", image_features)?;
        self.cache.bind(&mut binding, self.active.len(), batch, CacheUse::Prefill)?;
        if let Some(logits) = logits {
            binding.bind_output("logits", logits)?;
        }
        self.timer.as_mut().map(DeviceTimer::begin).transpose()?;
        self.prefill.inputs.send(session)?;
        session.run(&binding)?;
        self.timer.as_mut().map(DeviceTimer::end).transpose()?;
        self.prefill.next_ids.receive_first(session, batch)?;
        Ok(batch)
    }

    /// Moves every active caption one token on. Call [`Self::take_finished`] before: an ended caption has no next token.
    pub(crate) fn decode(&mut self) -> Result<()> {
        let begun = recorder::begin();
        let num_active = self.active.len();
        let ids = self.decode.inputs.tensor_mut::<i64>(INPUT_IDS);
        for (id, sequence) in ids.iter_mut().zip(&self.active) {
            *id = i64::from(*sequence.token_ids.last().expect("bug: an active caption has its first token"));
        }
        let batch = self.decode_steps.at_least(num_active);
        // The free slots among them write their first position, where nothing of worth lies.
        let lengths = self.active.iter().map(|sequence| sequence.cached_length + 1);
        let parked = std::iter::repeat_n(1, batch - num_active);
        self.decode.set_lengths(lengths.chain(parked));
        self.timer.as_mut().map(DeviceTimer::begin).transpose()?;
        self.run_decode(batch)?;
        self.timer.as_mut().map(DeviceTimer::end).transpose()?;
        self.cache.advance();
        let session = self.decoder.decode();
        self.decode.next_ids.receive_first(session, num_active)?;
        recorder::add_device_time(Stage::Decode, &mut self.timer)?;
        let mut context_tokens = 0;
        for (sequence, &next_id) in self.active.iter_mut().zip(self.decode.next_ids.tensor::<i64>(0)) {
            sequence.cached_length += 1;
            context_tokens += sequence.cached_length as u64;
            sequence.push(next_id, &self.stop_rule);
        }
        let work = Work {
            num_images: num_active as u32,
            num_tokens: num_active as u32,
            padded_batch: batch as u32,
            context_tokens,
        };
        begun.end(Stage::Decode, work);
        Ok(())
    }

    /// Runs the decoder over slots `0..batch`, on what the host has put into `self.decode`.
    fn run_decode(&mut self, batch: usize) -> Result<()> {
        let parity = self.cache.parity();
        let binding = match self.decode_bindings.entry((batch, parity)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut binding = self.decoder.decode().binding()?;
                self.decode.bind(&mut binding, batch)?;
                binding.bind_input("image_features", &self.no_features.view(0, &[1, self.dims.hidden_size])?)?;
                self.cache.bind(&mut binding, 0, batch, CacheUse::Decode)?;
                entry.insert(binding)
            }
        };
        let session = self.decoder.decode_mut();
        self.decode.inputs.send(session)?;
        session.run_captured(binding, 2 * batch + parity)
    }

    /// What has gone between host and device for the decoder.
    pub(crate) fn copy_counts(&self) -> CopyCounts {
        self.decoder.decode().stream().counts()
    }

    /// Gives up all captions in flight.
    pub(crate) fn abandon(&mut self) -> Vec<T> {
        self.active.drain(..).map(|sequence| sequence.subject).collect()
    }

    /// Takes the captions that have ended out of their slots and closes the gaps.
    pub(crate) fn take_finished(&mut self) -> Result<Vec<Sequence<T>>> {
        let mut finished = Vec::new();
        let mut slot = 0;
        while slot < self.active.len() {
            if !self.active[slot].is_finished() {
                slot += 1;
                continue;
            }
            let last = self.active.len() - 1;
            // The last one may have ended too: then there is nothing worth moving.
            if slot != last && !self.active[last].is_finished() {
                let length = self.active[last].cached_length;
                self.cache.move_slot(self.decoder.decode().stream(), last, slot, length)?;
            }
            finished.push(self.active.swap_remove(slot));
        }
        Ok(finished)
    }
}
