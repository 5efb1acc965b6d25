//! An engine: vision, projector, prefill and decode on one thread, taking preprocessed images and giving rows.
//!
//! Slots are refilled as soon as they are free: new images are encoded and prefilled between two decode steps. Several
//! engines may take from one channel.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::{Receiver, Sender, TryRecvError};

use crate::error::{Error, Result};
use crate::model::sequence::{Sequence, StopRule};
use crate::model::{Bundle, Prompt};
use crate::pipeline::generate::{Generator, GeneratorOptions};
use crate::pipeline::preprocess::{PixelValues, PreprocessedImage};
use crate::pipeline::progress::Progress;
use crate::pipeline::row::{Generated, Message, Row, RowDraft};
use crate::pipeline::vision::{VisionEncoder, decoder_device};
use crate::runtime::provider::Device;
use crate::runtime::session::SessionOptions;
use crate::stage::Stage;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// What it runs on.
    pub device: Device,
    /// Threads within an operator.
    pub num_threads: usize,
    /// Captions in flight.
    pub num_slots: usize,
    /// Most images encoded and prefilled at once.
    pub vision_batch: usize,
    /// When captions end.
    pub stop_rule: StopRule,
}

/// A captioner on one thread.
pub struct Engine<T> {
    vision: VisionEncoder,
    generator: Generator<T>,
}

impl<T> Engine<T> {
    /// Loads the bundle's graphs and allocates the KV cache.
    ///
    /// # Errors
    /// When the device does not work, a graph does not load, or memory is short.
    pub fn open(bundle: &Bundle, prompt: &Prompt, options: &EngineOptions) -> Result<Self> {
        // Of an engine's sessions only the decoder's threads spin: the token loop is what they must not be late for.
        let session = |device, spin| SessionOptions { device, num_threads: options.num_threads, spin };
        let vision_batch = options.vision_batch.min(options.num_slots);
        let decoder = decoder_device(options.device, &bundle.manifest);
        let vision = VisionEncoder::open(bundle, session(options.device, false), decoder, vision_batch)?;
        let generator_options = GeneratorOptions {
            num_slots: options.num_slots,
            max_prefill_batch: vision_batch,
            stop_rule: options.stop_rule.clone(),
        };
        let generator = Generator::open(bundle, session(decoder, true), prompt, generator_options)?;
        Ok(Self { vision, generator })
    }

    /// Logits of the first caption token of each image, `[images, vocab]` row by row; `pixel_values` is
    /// in the bundle's format. Starts no caption.
    ///
    /// # Errors
    /// ONNX Runtime's.
    ///
    /// # Panics
    /// With more images than free slots or than the vision batch.
    pub fn prefill_logits(&mut self, pixel_values: &[&PixelValues]) -> Result<Vec<f32>> {
        let features = self.vision.encode(pixel_values.iter().copied())?;
        self.generator.prefill_logits(pixel_values.len(), &features)
    }
}

/// Where an engine's rows go, and when it should stop.
pub(crate) struct EngineChannels<'a> {
    pub(crate) images: Receiver<PreprocessedImage>,
    pub(crate) rows: Sender<Message>,
    /// Another stage failed: what is in flight is lost anyway.
    pub(crate) abort: &'a AtomicBool,
    pub(crate) progress: &'a Progress,
    /// The stage at work, for the message should it panic.
    pub(crate) stage: &'a Cell<Stage>,
}

/// Captions images until the channel is closed and empty.
///
/// # Errors
/// ONNX Runtime's: the engine is unusable then.
pub(crate) fn run(mut engine: Engine<RowDraft>, channels: &EngineChannels<'_>) -> Result<()> {
    let enter = |stage: Stage| {
        channels.stage.set(stage);
        stage.enter();
    };
    let mut is_open = true;
    while is_open || engine.generator.num_active() > 0 {
        if channels.abort.load(Ordering::Relaxed) {
            return Ok(());
        }
        let images;
        (images, is_open) = next_batch(&engine, &channels.images, is_open);
        if !images.is_empty() {
            enter(Stage::Vision);
            let failed = |stage| move |source: Error| Error::Stage { stage, source: Box::new(source) };
            let pixels = images.iter().map(|image| image.pixel_values.values());
            let features = engine.vision.encode(pixels).map_err(failed(Stage::Vision))?;
            enter(Stage::Prefill);
            let drafts = images.into_iter().map(|image| image.draft).collect();
            engine.generator.prefill(drafts, &features).map_err(failed(Stage::Prefill))?;
            send_finished(&mut engine.generator, Stage::Prefill, channels)?;
        }
        if engine.generator.num_active() > 0 {
            enter(Stage::Decode);
            let failed = |source| Error::Stage { stage: Stage::Decode, source: Box::new(source) };
            engine.generator.decode().map_err(failed)?;
            channels.progress.add_tokens(engine.generator.num_active());
            send_finished(&mut engine.generator, Stage::Decode, channels)?;
        }
    }
    Ok(())
}

/// Images for the free slots, as many as are ready; waits only when there is nothing to decode. The flag says whether
/// more may come.
fn next_batch(
    engine: &Engine<RowDraft>,
    images: &Receiver<PreprocessedImage>,
    is_open: bool,
) -> (Vec<PreprocessedImage>, bool) {
    let wanted = engine.generator.num_free_slots().min(engine.vision.max_batch());
    let mut batch = Vec::with_capacity(wanted);
    if !is_open || wanted == 0 {
        return (batch, is_open);
    }
    if engine.generator.num_active() == 0 {
        match images.recv() {
            Ok(image) => batch.push(image),
            Err(_) => return (batch, false),
        }
    }
    while batch.len() < wanted {
        match images.try_recv() {
            Ok(image) => batch.push(image),
            Err(TryRecvError::Empty) => break,
            Err(TryRecvError::Disconnected) => return (batch, false),
        }
    }
    (batch, true)
}

fn send_finished(generator: &mut Generator<RowDraft>, stage: Stage, channels: &EngineChannels<'_>) -> Result<()> {
    let finished = generator.take_finished().map_err(|source| Error::Stage { stage, source: Box::new(source) })?;
    for sequence in finished {
        // A closed channel means that the write stage failed; the abort flag ends this stage.
        let _ = channels.rows.send(row(sequence, stage).into());
    }
    Ok(())
}

fn row(sequence: Sequence<RowDraft>, stage: Stage) -> Row {
    let Sequence { subject: draft, token_ids, finish_reason, .. } = sequence;
    match finish_reason {
        Some(finish_reason) => Row { draft, outcome: Ok(Generated { token_ids, finish_reason }) },
        None => draft.fail(stage, format!("the logits of token {} are NaN or infinite", token_ids.len() + 1)),
    }
}
