//! An engine: vision, projector, prefill and decode on one thread, taking preprocessed images and giving rows.
//!
//! Slots are refilled as soon as they are free: all images that are ready are encoded and prefilled between two decode
//! steps. Several engines may take from one channel; when one fails, its images go to the others, and one that has to wait for
//! images helps the others.

mod failing;
mod returns;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::{self, Receiver, Sender};
use crossbeam::select;

use crate::console::print_warning;
use crate::error::{Error, Result, panic_message};
use crate::live;
use crate::model::sequence::{FinishReason, Sequence, StopRule};
use crate::model::{Bundle, Prompt};
pub(crate) use crate::pipeline::engine::failing::Failing;
pub use crate::pipeline::engine::failing::Injection;
pub(crate) use crate::pipeline::engine::returns::Returns;
use crate::pipeline::generate::{Generator, GeneratorOptions};
use crate::pipeline::preprocess::{PixelValues, PreprocessedImage};
use crate::pipeline::progress::Progress;
use crate::pipeline::row::{Generated, Message, Row};
use crate::pipeline::vision::{VisionEncoder, VisionOptions, decoder_device};
use crate::profile::recorder;
use crate::runtime::helping::{Call, Helper};
use crate::runtime::session::SessionOptions;
use crate::runtime::stream::Stream;
use crate::runtime::{CopyCounts, Device};
use crate::stage::Stage;

/// Engines that may fail with an image in flight before the image is taken for the cause.
const MAX_FAILURES: u32 = 2;

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
    /// Batches are padded to few sizes, as GPUs want it.
    pub has_fixed_shapes: bool,
    /// Decode steps are captured as CUDA graphs, which takes fixed shapes.
    pub captures_graphs: bool,
    /// Most bytes that each session takes of a GPU's memory.
    pub memory_limit: Option<usize>,
    /// Folder for the engines that TensorRT builds.
    pub engine_cache: Option<PathBuf>,
    /// Say on standard error when one is being built.
    pub shows_builds: bool,
    /// Time the stages on the device's own clock, where it has one.
    pub times_device: bool,
    /// Where ONNX Runtime writes its own profiles: the beginning of their paths.
    pub ort_profile: Option<PathBuf>,
}

impl EngineOptions {
    /// One caption at a time on one thread of the CPU, or on a GPU with what it needs to be fast.
    #[must_use]
    pub fn new(device: Device, stop_rule: StopRule) -> Self {
        let is_gpu = device != Device::Cpu;
        Self {
            device,
            num_threads: 1,
            num_slots: 1,
            vision_batch: 1,
            stop_rule,
            has_fixed_shapes: is_gpu,
            captures_graphs: is_gpu,
            memory_limit: None,
            engine_cache: None,
            shows_builds: false,
            times_device: false,
            ort_profile: None,
        }
    }
}

/// The graphs of one captioner and the captions in flight; `T` is what a caption is about.
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
        let decoder = decoder_device(options.device, &bundle.manifest);
        let stream = Stream::open(options.device)?;
        // TensorRT's kernels and CUDA's go into one stream, so that nothing waits between vision and prefill.
        let is_one_device = decoder.gpu_index() == options.device.gpu_index();
        let decoder_stream = if is_one_device { stream.clone() } else { Stream::open(decoder)? };
        // Of an engine's sessions only the decoder's threads spin: the token loop is what they must not be late for.
        let session = |device: Device, stream, spin| SessionOptions {
            num_threads: options.num_threads,
            spin,
            stream,
            memory_limit: options.memory_limit,
            // TensorRT has its own; a CPU only goes through the motions, for the tests.
            captures_graphs: options.captures_graphs && is_one_device && !matches!(device, Device::TensorRt(_)),
            engine_cache: options.engine_cache.clone(),
            shows_builds: options.shows_builds,
            profile: options.ort_profile.clone(),
            device,
            dims: Default::default(),
        };
        let vision_batch = options.vision_batch.min(options.num_slots);
        let has_fixed_shapes = options.has_fixed_shapes || options.captures_graphs;
        let vision_options = VisionOptions {
            session: session(options.device, stream, false),
            decoder,
            max_batch: vision_batch,
            has_fixed_shapes,
            times_device: options.times_device,
        };
        let generator_options = GeneratorOptions {
            num_slots: options.num_slots,
            max_prefill_batch: vision_batch,
            stop_rule: options.stop_rule.clone(),
            // A decoder that stays on the CPU wants no padding.
            has_fixed_shapes: has_fixed_shapes && is_one_device,
            times_device: options.times_device,
        };
        let vision = VisionEncoder::open(bundle, vision_options)?;
        let generator = Generator::open(bundle, &session(decoder, decoder_stream, true), prompt, generator_options)?;
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

    /// Starts a caption for each image, `subjects` telling them apart, and takes its first token.
    ///
    /// # Errors
    /// ONNX Runtime's.
    ///
    /// # Panics
    /// With more images than free slots or than the vision batch.
    pub fn start(&mut self, mut subjects: Vec<T>, pixel_values: &[&PixelValues]) -> Result<()> {
        let features = self.vision.encode(pixel_values.iter().copied())?;
        self.generator.prefill(&mut subjects, &features)
    }

    /// Moves every caption in flight one token on, and takes out those that have ended.
    ///
    /// # Errors
    /// ONNX Runtime's.
    pub fn step(&mut self) -> Result<Vec<Sequence<T>>> {
        self.generator.decode()?;
        self.generator.take_finished()
    }

    /// What has gone between host and device.
    #[must_use]
    pub fn copy_counts(&self) -> CopyCounts {
        self.generator.copy_counts()
    }
}

/// What the engine's loop drives. Whatever fails, the images that were given to it come back through
/// [`Captioner::abandon`].
pub(crate) trait Captioner: Send {
    fn num_free_slots(&self) -> usize;
    /// Most images that [`Captioner::start`] takes at once.
    fn max_batch(&self) -> usize;
    fn num_active(&self) -> usize;
    /// Encodes and prefills; calls `enter` before each stage.
    fn start(&mut self, images: Vec<PreprocessedImage>, enter: &dyn Fn(Stage)) -> Result<()>;
    /// One token for every caption in flight.
    fn decode(&mut self) -> Result<()>;
    fn take_finished(&mut self) -> Result<Vec<Sequence<PreprocessedImage>>>;
    /// Gives back every image that has no row yet.
    fn abandon(&mut self) -> Vec<PreprocessedImage>;
}

/// The engine of a run.
pub(crate) struct ImageCaptioner {
    engine: Engine<PreprocessedImage>,
    /// Images that are being encoded or prefilled.
    starting: Vec<PreprocessedImage>,
    /// Whether another engine may have to caption them again.
    keeps_pixels: bool,
}

impl ImageCaptioner {
    pub(crate) fn new(engine: Engine<PreprocessedImage>, keeps_pixels: bool) -> Self {
        Self { engine, starting: Vec::new(), keeps_pixels }
    }
}

impl Captioner for ImageCaptioner {
    fn num_free_slots(&self) -> usize {
        self.engine.generator.num_free_slots()
    }

    fn max_batch(&self) -> usize {
        self.engine.vision.max_batch()
    }

    fn num_active(&self) -> usize {
        self.engine.generator.num_active()
    }

    fn start(&mut self, images: Vec<PreprocessedImage>, enter: &dyn Fn(Stage)) -> Result<()> {
        let failed = |stage| move |source: Error| Error::Stage { stage, source: Box::new(source) };
        self.starting = images;
        enter(Stage::Vision);
        let pixels = self.starting.iter().map(|image| image.pixel_values.values());
        let features = self.engine.vision.encode(pixels).map_err(failed(Stage::Vision))?;
        enter(Stage::Prefill);
        if !self.keeps_pixels {
            self.starting.iter_mut().for_each(|image| image.pixel_values.give_back());
        }
        let images = &mut self.starting;
        self.engine.generator.prefill(images, &features).map_err(failed(Stage::Prefill))?;
        // Prefill has waited for all that went before it.
        self.engine.vision.record_device_time().map_err(failed(Stage::Vision))
    }

    fn decode(&mut self) -> Result<()> {
        let failed = |source| Error::Stage { stage: Stage::Decode, source: Box::new(source) };
        self.engine.generator.decode().map_err(failed)
    }

    fn take_finished(&mut self) -> Result<Vec<Sequence<PreprocessedImage>>> {
        let failed = |source| Error::Stage { stage: Stage::Decode, source: Box::new(source) };
        self.engine.generator.take_finished().map_err(failed)
    }

    fn abandon(&mut self) -> Vec<PreprocessedImage> {
        let mut images = std::mem::take(&mut self.starting);
        images.extend(self.engine.generator.abandon());
        images
    }
}

/// Where an engine's images come from and its rows go, and when it should stop.
pub(crate) struct EngineChannels<'a> {
    /// `engine 1 on cuda 0`
    pub(crate) name: String,
    pub(crate) images: Receiver<PreprocessedImage>,
    pub(crate) rows: Sender<Message>,
    /// Another stage failed: what is in flight is lost anyway.
    pub(crate) abort: &'a AtomicBool,
    pub(crate) progress: &'a Progress,
    /// The stage at work, for the message should it panic.
    pub(crate) stage: &'a Cell<Stage>,
    /// Engines that failed, and why.
    pub(crate) failures: &'a Mutex<Vec<String>>,
}

impl EngineChannels<'_> {
    fn enter(&self, stage: Stage) {
        self.stage.set(stage);
        stage.enter();
    }
}

/// Captions images until the channel is closed and empty, and no other engine can send any more back. When the captioner
/// fails and others are left, they get its images.
///
/// # Errors
/// The captioner's, when it is the last.
pub(crate) fn run(
    mut captioner: Box<dyn Captioner>,
    channels: &EngineChannels<'_>,
    mut returns: Returns,
) -> Result<()> {
    let outcome = catch_unwind(AssertUnwindSafe(|| caption(&mut *captioner, channels, &mut returns)));
    if matches!(outcome, Ok(Ok(()))) {
        recorder::scheduling(|| drop(captioner));
        return Ok(());
    }
    let are_others_left = returns.leave();
    if !are_others_left || channels.abort.load(Ordering::Relaxed) {
        return outcome.unwrap_or_else(|panic| resume_unwind(panic));
    }
    let reason = match outcome {
        Ok(result) => result.err().map(|error| error.to_string()).unwrap_or_default(),
        Err(panic) => format!("{} stage panicked: {}", channels.stage.get(), panic_message(panic.as_ref())),
    };
    let images = captioner.abandon();
    let failure = format!("{} failed: {reason}", channels.name);
    print_warning(&format!("{failure}; the other engines go on with its {} images in flight", images.len()));
    live::lose_engine();
    channels.failures.lock().expect("bug: no engine panics with the lock held").push(failure);
    for mut image in images {
        image.num_failures += 1;
        if image.num_failures < MAX_FAILURES {
            returns.give(image);
        } else {
            let reason = format!("{MAX_FAILURES} engines failed with it: {reason}");
            // A closed channel means that the write stage failed.
            let _ = recorder::send(&channels.rows, image.draft.fail(channels.stage.get(), reason).into());
        }
    }
    // The device may be gone: freeing what is on it can end the process.
    std::mem::forget(captioner);
    Ok(())
}

fn caption(captioner: &mut dyn Captioner, channels: &EngineChannels<'_>, returns: &mut Returns) -> Result<()> {
    loop {
        if channels.abort.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut images = recorder::waiting(|| next_batch(captioner, &channels.images, returns));
        if images.is_empty() && captioner.num_active() == 0 {
            return Ok(());
        }
        // All free slots first: a decode step costs little more for many captions than for few.
        while !images.is_empty() {
            captioner.start(images, &|stage| channels.enter(stage))?;
            send_finished(captioner, Stage::Prefill, channels)?;
            if channels.abort.load(Ordering::Relaxed) {
                return Ok(());
            }
            images = recorder::waiting(|| next_batch(captioner, &channels.images, returns));
        }
        if captioner.num_active() > 0 {
            channels.enter(Stage::Decode);
            captioner.decode()?;
            channels.progress.add_tokens(captioner.num_active());
            send_finished(captioner, Stage::Decode, channels)?;
        }
    }
}

/// Images for the free slots, as many as are ready; waits only when there is nothing to decode. None at the end.
fn next_batch(
    captioner: &dyn Captioner,
    images: &Receiver<PreprocessedImage>,
    returns: &mut Returns,
) -> Vec<PreprocessedImage> {
    let wanted = captioner.num_free_slots().min(captioner.max_batch());
    let mut batch = Vec::with_capacity(wanted);
    while batch.len() < wanted {
        let must_wait = batch.is_empty() && captioner.num_active() == 0;
        let ready = returns.take().or_else(|| images.try_recv().ok());
        let image = if must_wait { ready.or_else(|| wait_for_image(images, returns)) } else { ready };
        let Some(image) = image else { break };
        batch.push(image);
    }
    recorder::look_at(images);
    batch.iter_mut().for_each(|image| image.draft.times.is_taken(Stage::Vision));
    batch
}

/// Waits for an image, and works for the other engines meanwhile; `None` when no more can come.
fn wait_for_image(images: &Receiver<PreprocessedImage>, returns: &mut Returns) -> Option<PreprocessedImage> {
    let (helper, never) = (Helper::enter(), channel::never());
    let mut images = images;
    loop {
        let is_over = || !images.is_empty() || !returns.receiver().is_empty();
        if let Some(call) = helper.call_soon(is_over) {
            recorder::helping(|| call.help());
            continue;
        }
        select! {
            recv(images) -> image => match image {
                Ok(image) => return Some(image),
                // Those that other engines have may come back.
                Err(_) => {
                    images = &never;
                    returns.hold_none();
                }
            },
            recv(returns.receiver()) -> returned => return returned.ok().map(|returned| returns.accept(returned)),
            recv(helper.calls()) -> call => recorder::helping(|| call.into_iter().for_each(Call::help)),
        }
    }
}

fn send_finished(captioner: &mut dyn Captioner, stage: Stage, channels: &EngineChannels<'_>) -> Result<()> {
    for sequence in recorder::scheduling(|| captioner.take_finished())? {
        let message = recorder::scheduling(|| row(sequence, stage).into());
        // A closed channel means that the write stage failed; the abort flag ends this stage.
        let _ = recorder::send(&channels.rows, message);
    }
    Ok(())
}

fn row(sequence: Sequence<PreprocessedImage>, stage: Stage) -> Row {
    let Sequence { subject: PreprocessedImage { mut draft, .. }, token_ids, finish_reason, first_token_ns, .. } =
        sequence;
    if let Some(reason) = finish_reason {
        recorder::end_caption(draft.times, first_token_ns, token_ids.len() + usize::from(reason == FinishReason::Stop));
    }
    draft.times.is_queued();
    match finish_reason {
        Some(finish_reason) => Row { draft, outcome: Ok(Generated { token_ids, finish_reason }) },
        None => draft.fail(stage, format!("the logits of token {} are NaN or infinite", token_ids.len() + 1)),
    }
}
