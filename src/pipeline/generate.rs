//! Generate: `image_features` to token ids. Owns the decoder session and its KV cache: prefill puts a batch of new
//! captions behind the active ones, decode moves all active captions one token on.
//!
//! Slot `i` of the cache belongs to `active[i]`, always: when a caption ends, the last one takes its slot, so that
//! decode runs over `0..n` without gaps. A caption does not depend on its slot or its neighbours.

use std::collections::HashMap;

use recaption_export::{DataType, DecoderDims, IMAGE_INDEX_TEXT};

use crate::error::Result;
use crate::model::kv_cache::{CacheShape, CacheUse, KvCache};
use crate::model::sequence::{Sequence, StopRule};
use crate::model::{Bundle, Prompt};
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::session::{Binding, Session, SessionOptions};

/// Limits of one generator.
#[derive(Clone, Debug)]
pub(crate) struct GeneratorOptions {
    pub(crate) num_slots: usize,
    /// Most captions prefilled at once.
    pub(crate) max_prefill_batch: usize,
    pub(crate) stop_rule: StopRule,
}

/// The decoder of one engine, with the captions in flight; `T` is what a caption is about.
pub(crate) struct Generator<T> {
    decoder: Session,
    dims: DecoderDims,
    cache: KvCache,
    prompt: PromptPositions,
    stop_rule: StopRule,
    num_slots: usize,
    prefill: StepBuffers,
    decode: StepBuffers,
    /// By batch and by the cache's parity.
    decode_bindings: HashMap<(usize, usize), Binding>,
    /// One row that decode steps bind as `image_features`, and never read.
    no_features: Buffer,
    active: Vec<Sequence<T>>,
}

/// The prompt with the image in it, position by position.
struct PromptPositions {
    /// Id to look up; 0 where the image is, since the id is not used there.
    input_ids: Vec<i64>,
    /// Row of the image's features, or [`IMAGE_INDEX_TEXT`].
    image_index: Vec<i64>,
    num_image_tokens: usize,
}

impl PromptPositions {
    fn new(prompt: &Prompt, num_image_tokens: usize) -> Self {
        let ids = |ids: &[u32]| ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
        let (before, after) = (ids(&prompt.before), ids(&prompt.after));
        let text = |count| std::iter::repeat_n(IMAGE_INDEX_TEXT, count);
        let image_index =
            text(before.len()).chain(0..num_image_tokens as i64).chain(text(after.len())).collect::<Vec<_>>();
        let input_ids = [before, vec![0; num_image_tokens], after].concat();
        Self { input_ids, image_index, num_image_tokens }
    }

    fn len(&self) -> usize {
        self.input_ids.len()
    }
}

/// Host memory of one kind of decoder run.
struct StepBuffers {
    /// `[batch, sequence]`
    input_ids: Buffer,
    /// `[batch, sequence]`
    image_index: Buffer,
    /// `[batch]`: tokens of each sequence after this run, less one.
    seqlens_k: Buffer,
    /// `[]`: the longest of them, not less one; bound where the decoder has that input.
    total_sequence_length: Buffer,
    has_total: bool,
    /// `[batch]`
    next_ids: Buffer,
    sequence: usize,
}

impl StepBuffers {
    fn new(max_batch: usize, sequence: usize, has_total: bool) -> Result<Self> {
        Ok(Self {
            input_ids: Buffer::host(DataType::I64, max_batch * sequence)?,
            image_index: Buffer::host(DataType::I64, max_batch * sequence)?,
            seqlens_k: Buffer::host(DataType::I32, max_batch)?,
            total_sequence_length: Buffer::host(DataType::I32, 1)?,
            has_total,
            next_ids: Buffer::host(DataType::I64, max_batch)?,
            sequence,
        })
    }

    fn bind(&self, binding: &mut Binding, batch: usize) -> Result<()> {
        let tokens = [batch, self.sequence];
        binding.bind_host_input("input_ids", self.input_ids.view(0, &tokens)?)?;
        binding.bind_host_input("image_index", self.image_index.view(0, &tokens)?)?;
        binding.bind_host_input("seqlens_k", self.seqlens_k.view(0, &[batch])?)?;
        if self.has_total {
            binding.bind_host_input("total_sequence_length", self.total_sequence_length.view(0, &[])?)?;
        }
        binding.bind_output("next_ids", self.next_ids.view(0, &[batch])?)
    }

    fn set_lengths(&mut self, lengths: impl Iterator<Item = usize>) {
        let mut longest = 0;
        for (seqlen, length) in self.seqlens_k.as_mut_slice::<i32>().iter_mut().zip(lengths) {
            longest = longest.max(length);
            *seqlen = length as i32 - 1;
        }
        self.total_sequence_length.as_mut_slice::<i32>()[0] = longest as i32;
    }
}

impl<T> Generator<T> {
    /// Loads the decoder and allocates its cache.
    pub(crate) fn open(
        bundle: &Bundle,
        session: SessionOptions,
        prompt: &Prompt,
        options: GeneratorOptions,
    ) -> Result<Self> {
        let manifest = &bundle.manifest;
        let dims = manifest.decoder.clone();
        let decoder = Session::open(&bundle.graph_path(&manifest.graphs.decoder), session)?;
        let prompt = PromptPositions::new(prompt, manifest.vision.num_image_tokens);
        let max_length = prompt.len() + options.stop_rule.max_new_tokens;
        let GeneratorOptions { num_slots, max_prefill_batch, stop_rule } = options;
        let inputs = &manifest.graphs.decoder.inputs;
        let has_total = inputs.iter().any(|input| input.name == "total_sequence_length");
        let prefill = StepBuffers::new(max_prefill_batch, prompt.len(), has_total)?;
        let mut decode = StepBuffers::new(num_slots, 1, has_total)?;
        decode.image_index.as_mut_slice::<i64>().fill(IMAGE_INDEX_TEXT);
        Ok(Self {
            cache: KvCache::new(&decoder, CacheShape::of(manifest)?, num_slots, max_length)?,
            no_features: decoder.device_buffer(manifest.header.activations, dims.hidden_size)?,
            decoder,
            dims,
            prompt,
            stop_rule,
            num_slots,
            prefill,
            decode,
            decode_bindings: HashMap::new(),
            active: Vec::with_capacity(num_slots),
        })
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
    /// its first token.
    pub(crate) fn prefill(&mut self, subjects: Vec<T>, image_features: &TensorView) -> Result<()> {
        let batch = self.run_prefill(subjects.len(), image_features, None)?;
        let length = self.prompt.len();
        let next_ids = self.prefill.next_ids.as_slice::<i64>();
        for (subject, &next_id) in subjects.into_iter().zip(&next_ids[..batch]) {
            let mut sequence = Sequence::new(subject, length);
            sequence.push(next_id, &self.stop_rule);
            self.active.push(sequence);
        }
        Ok(())
    }

    /// Logits of each image's first caption token, `[batch, vocab]`, without starting a caption.
    pub(crate) fn prefill_logits(&mut self, batch: usize, image_features: &TensorView) -> Result<Vec<f32>> {
        let logits = Buffer::host(DataType::F32, batch * self.dims.vocab_size)?;
        self.run_prefill(batch, image_features, Some(logits.view(0, &[batch, self.dims.vocab_size])?))?;
        Ok(logits.as_slice::<f32>().to_vec())
    }

    /// Runs the decoder over the prompt in the slots behind the active ones. All prompts have one length: no padding.
    fn run_prefill(&mut self, batch: usize, image_features: &TensorView, logits: Option<TensorView>) -> Result<usize> {
        assert!(batch <= self.num_free_slots(), "bug: prefill of {batch} into {} slots", self.num_free_slots());
        let PromptPositions { input_ids, image_index, num_image_tokens } = &self.prompt;
        let length = input_ids.len();
        let ids = self.prefill.input_ids.as_mut_slice::<i64>();
        ids.chunks_exact_mut(length).take(batch).for_each(|ids| ids.copy_from_slice(input_ids));
        let indices = self.prefill.image_index.as_mut_slice::<i64>();
        for (image, indices) in indices.chunks_exact_mut(length).take(batch).enumerate() {
            let first_row = (image * num_image_tokens) as i64;
            for (target, &index) in indices.iter_mut().zip(image_index) {
                *target = if index >= 0 { first_row + index } else { index };
            }
        }
        self.prefill.set_lengths(std::iter::repeat_n(length, batch));

        let mut binding = self.decoder.binding()?;
        self.prefill.bind(&mut binding, batch)?;
        binding.bind_input("image_features", image_features)?;
        self.cache.bind(&mut binding, self.active.len(), batch, CacheUse::Prefill)?;
        if let Some(logits) = logits {
            binding.bind_output("logits", logits)?;
        }
        self.decoder.run(&mut binding)?;
        Ok(batch)
    }

    /// Moves every active caption one token on. Call [`Self::take_finished`] before: an ended caption has no next token.
    pub(crate) fn decode(&mut self) -> Result<()> {
        let batch = self.active.len();
        let ids = self.decode.input_ids.as_mut_slice::<i64>();
        for (id, sequence) in ids.iter_mut().zip(&self.active) {
            *id = i64::from(*sequence.token_ids.last().expect("bug: an active caption has its first token"));
        }
        self.decode.set_lengths(self.active.iter().map(|sequence| sequence.cached_length + 1));
        let binding = match self.decode_bindings.entry((batch, self.cache.parity())) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let mut binding = self.decoder.binding()?;
                self.decode.bind(&mut binding, batch)?;
                binding.bind_input("image_features", &self.no_features.view(0, &[1, self.dims.hidden_size])?)?;
                self.cache.bind(&mut binding, 0, batch, CacheUse::Decode)?;
                entry.insert(binding)
            }
        };
        self.decoder.run(binding)?;
        self.cache.advance();
        let next_ids = self.decode.next_ids.as_slice::<i64>();
        for (sequence, &next_id) in self.active.iter_mut().zip(&next_ids[..batch]) {
            sequence.cached_length += 1;
            sequence.push(next_id, &self.stop_rule);
        }
        Ok(())
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
                self.cache.move_slot(last, slot, length)?;
            }
            finished.push(self.active.swap_remove(slot));
        }
        Ok(finished)
    }
}
