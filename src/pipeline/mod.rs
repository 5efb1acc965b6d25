//! The pipeline: builds the channels, spawns the stages, shuts down in order.
//!
//! ```text
//! source -> load -> preprocess -> engine (vision, prefill, decode) -> write
//!    \________\_________\________ failed rows ___________________________/
//! ```
//!
//! Stages are threads joined by bounded channels: memory does not grow with the data set. A stage ends when its input
//! is closed and empty. A panic or an error in any stage raises the abort flag and ends the run with its message; rows
//! that were committed stay.

pub mod engine;
pub(crate) mod generate;
pub mod input;
pub mod load;
pub(crate) mod pool;
pub mod preprocess;
pub(crate) mod progress;
pub mod row;
pub mod source;
pub(crate) mod vision;
pub mod write;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use crossbeam::channel::bounded;
use serde::Serialize;

use crate::error::{Error, Result, panic_message};
use crate::model::{Bundle, Prompt, Tokenizer};
use crate::pipeline::engine::{
    Captioner, Engine, EngineChannels, EngineOptions, Failing, ImageCaptioner, Injection, Returns,
};
use crate::pipeline::input::Input;
use crate::pipeline::load::{LoadLimits, Loader};
use crate::pipeline::pool::{BufferPool, SamplePool};
use crate::pipeline::preprocess::{PixelFormat, Preprocessor};
use crate::pipeline::progress::Progress;
use crate::pipeline::source::limits::SourceLimits;
use crate::pipeline::source::{Part, SourceChannels, SourceOptions, SourceReport};
use crate::pipeline::write::failures::MaxFailures;
use crate::pipeline::write::output::Output;
use crate::pipeline::write::{Counts, Sink, WriteOptions, WriteReport};
use crate::profile::recorder::Recorder;
use crate::runtime::Device;
use crate::stage::Stage;

/// Encoded images that wait for a load thread: enough to hide a slow read, little enough to be nothing.
const MAX_QUEUED_RECORDS: usize = 64;
/// Decoded images that wait, per preprocess thread: each may be hundreds of MB.
const MAX_QUEUED_LOADED_PER_THREAD: usize = 1;
/// Rows that wait for the write stage.
const MAX_QUEUED_ROWS: usize = 1024;
/// The same where they carry their images.
const MAX_QUEUED_ROWS_WITH_IMAGES: usize = 32;

/// A run, ready to start: everything in it is validated.
pub struct RunOptions {
    /// The model.
    pub bundle: Bundle,
    /// What to caption.
    pub inputs: Vec<Input>,
    /// Where the rows go.
    pub sink: Sink,
    /// The bundle's.
    pub tokenizer: Tokenizer,
    /// The prompt, encoded.
    pub prompt: Prompt,
    /// One engine per entry.
    pub engines: Vec<EngineOptions>,
    /// Threads that load, and as many that preprocess.
    pub num_load_threads: usize,
    /// What one image may cost.
    pub load_limits: LoadLimits,
    /// What the inputs may cost before that.
    pub source_limits: SourceLimits,
    /// The column of Parquet inputs that holds the images, where it cannot be told by itself.
    pub image_column: Option<String>,
    /// Most images to caption.
    pub limit: Option<usize>,
    /// Whether rows carry their token ids.
    pub with_token_ids: bool,
    /// Show no progress.
    pub quiet: bool,
    /// An engine that is to fail, for tests.
    pub injection: Option<Injection>,
    /// When the run is given up.
    pub max_failures: Option<MaxFailures>,
    /// The share of the shards to do.
    pub part: Option<Part>,
    /// Raised by the user: finish what is in flight, then end.
    pub interrupt: Arc<AtomicBool>,
    /// Where the stages' times go, if anywhere.
    pub recorder: Option<Arc<Recorder>>,
}

/// What a run did: `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Rows of the whole output, those of earlier runs too.
    #[serde(flatten)]
    pub counts: Counts,
    /// Time from the start to the first image being read.
    pub load_seconds: f64,
    /// Time from there to the last row.
    pub run_seconds: f64,
    /// Images that this run captioned per second of `run_seconds`; failed rows are none.
    pub images_per_second: f64,
    /// Rows of earlier runs among them.
    #[serde(skip)]
    pub num_earlier_rows: u64,
    /// Inputs that could not be read to their end, or hold no image, and why; their shards are not written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damaged_inputs: Vec<String>,
    /// Engines that failed, and why; their images went to the others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_engines: Vec<String>,
    /// The user ended the run before its input was read to the end.
    #[serde(skip)]
    pub is_interrupted: bool,
    /// Finished rows of shards that are not whole: they are in the journal, and the next run goes on after them.
    #[serde(skip)]
    pub num_journaled: u64,
    /// Finished rows of damaged inputs: they are not kept.
    #[serde(skip)]
    pub num_dropped: u64,
    /// Shards that other processes have in work.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub busy_shards: Vec<String>,
}

/// A run whose model is loaded.
pub struct LoadedRun {
    options: RunOptions,
    engines: Vec<Box<dyn Captioner>>,
    load_seconds: f64,
}

/// Loads the model; the output is not touched yet.
///
/// # Errors
/// When the device does not work, a graph does not load, or memory is short.
pub fn load_model(options: RunOptions) -> Result<LoadedRun> {
    let started = Instant::now();
    let keeps_pixels = options.engines.len() > 1;
    let open = |(i, engine): (usize, &EngineOptions)| -> Result<Box<dyn Captioner>> {
        let engine = EngineOptions { times_device: options.recorder.is_some(), ..engine.clone() };
        let engine = Engine::open(&options.bundle, &options.prompt, &engine)?;
        let captioner = Box::new(ImageCaptioner::new(engine, keeps_pixels));
        let injection = options.injection.filter(|injection| injection.engine == i);
        Ok(match injection {
            Some(injection) => Box::new(Failing::new(captioner, injection)),
            None => captioner,
        })
    };
    let open = &open;
    let engines = options.engines.iter().enumerate();
    // GPUs one after the other: while a CUDA graph is captured nobody else may allocate.
    let engines: Result<Vec<_>> = match options.engines.iter().all(|engine| engine.device == Device::Cpu) {
        true => thread::scope(|scope| {
            let opening: Vec<_> = engines.map(|engine| scope.spawn(move || open(engine))).collect();
            opening.into_iter().map(joined).collect()
        }),
        false => engines.map(open).collect(),
    };
    let engines = engines?;
    let load_seconds = started.elapsed().as_secs_f64();
    Ok(LoadedRun { options, engines, load_seconds })
}

/// What a thread of a scope gives; its panic goes on here.
pub(crate) fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

impl LoadedRun {
    /// Runs the pipeline to its end.
    ///
    /// # Errors
    /// When a stage cannot go on. Failed images and damaged inputs are not errors: they are in the summary.
    pub fn run(self) -> Result<Summary> {
        let Self { options, engines, load_seconds } = self;
        let prompt_tokens = options.prompt.len(options.bundle.manifest.vision.num_image_tokens);
        let output = match &options.sink {
            Sink::Folder(folder) => Some(Output::open(folder.clone(), prompt_tokens, options.with_token_ids)?),
            Sink::StandardOutput => None,
        };
        let earlier = output.as_ref().map(Output::count).transpose()?.unwrap_or_default();
        let progress = Arc::new(Progress::new());
        let stages = run_stages(&options, engines, (output.as_ref(), earlier.rows), &progress)?;
        let StagesReport { source: report, written, failed_engines } = stages;
        let run_seconds = progress.elapsed().as_secs_f64();
        let counts = match &output {
            Some(output) => {
                output.tidy();
                output.count()?
            }
            None => written.done.clone().with_prompt_tokens(prompt_tokens),
        };
        // Others' shards may have been finished while the last images here were captioned.
        let is_theirs = |shard: &String| output.as_ref().is_none_or(|output| !output.is_finished(shard));
        let busy_shards = report.busy.into_iter().filter(is_theirs).chain(written.lost_shards).collect();
        let num_earlier_rows = output.as_ref().map_or(0, |_| counts.rows.saturating_sub(written.num_committed));
        Ok(Summary {
            counts,
            load_seconds,
            run_seconds,
            images_per_second: written.done.ok as f64 / run_seconds.max(1e-9),
            num_earlier_rows,
            damaged_inputs: report.damaged.iter().map(describe_damage).collect(),
            failed_engines,
            is_interrupted: report.is_cut_short,
            num_journaled: written.num_journaled,
            num_dropped: written.num_dropped,
            busy_shards,
        })
    }
}

/// The error with its hint, in one line.
fn describe_damage(error: &Error) -> String {
    match error.hint() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

/// What the stages leave when all of them have ended well.
struct StagesReport {
    source: SourceReport,
    written: WriteReport,
    failed_engines: Vec<String>,
}

fn run_stages(
    options: &RunOptions,
    engines: Vec<Box<dyn Captioner>>,
    (output, num_earlier_rows): (Option<&Output>, u64),
    progress: &Arc<Progress>,
) -> Result<StagesReport> {
    let preprocessing = &options.bundle.manifest.header.preprocessing;
    let pixel_format = PixelFormat::of(&options.bundle.manifest);
    let max_preprocessed = options.engines.iter().map(|engine| 2 * engine.vision_batch).sum();
    let (records_in, records_out) = bounded(MAX_QUEUED_RECORDS);
    let (loaded_in, loaded_out) = bounded(MAX_QUEUED_LOADED_PER_THREAD * options.num_load_threads);
    let (preprocessed_in, preprocessed_out) = bounded(max_preprocessed);
    let has_images = output.is_some_and(|output| output.options.format.has_images());
    let max_rows = if has_images { MAX_QUEUED_ROWS_WITH_IMAGES } else { MAX_QUEUED_ROWS };
    let (rows_in, rows_out) = bounded(max_rows);
    let pool = BufferPool::new(max_preprocessed + options.num_load_threads, pixel_format);
    // One is being filled, some wait, one is being read.
    let samples = SamplePool::new((2 + MAX_QUEUED_LOADED_PER_THREAD) * options.num_load_threads);
    let source_options = SourceOptions {
        inputs: options.inputs.clone(),
        output,
        part: options.part,
        limit: options.limit,
        limits: options.source_limits.clone(),
        image_column: options.image_column.clone(),
    };
    let write_options = WriteOptions {
        output,
        tokenizer: &options.tokenizer,
        with_token_ids: options.with_token_ids,
        prompt_tokens: options.prompt.len(options.bundle.manifest.vision.num_image_tokens),
        max_failures: options.max_failures,
    };
    let recorder = options.recorder.as_ref();
    if let Some(recorder) = recorder {
        recorder.queue(Stage::Load, MAX_QUEUED_RECORDS);
        recorder.queue(Stage::Preprocess, MAX_QUEUED_LOADED_PER_THREAD * options.num_load_threads);
        recorder.queue(Stage::Vision, max_preprocessed);
        recorder.queue(Stage::Write, max_rows);
    }
    let supervisor = Supervisor::default();
    let failures = Mutex::new(Vec::new());
    if !options.quiet {
        count_in_background(options, num_earlier_rows, Arc::clone(progress));
    }

    let result = thread::scope(|scope| -> Result<_> {
        let supervisor = &supervisor;
        // Also when this returns early: the stages that run already must end, and the progress line with them.
        let _guard = EndGuard { supervisor, progress };
        if !options.quiet {
            spawn(scope, None, "progress".to_owned(), || progress.report())?;
        }
        let rows = rows_in.clone();
        let source = spawn(scope, recorder, Stage::Source.name().to_owned(), move || {
            supervisor.watch(Stage::Source, || {
                let stop = [&supervisor.abort, &*options.interrupt];
                source::run(source_options, SourceChannels { records: records_in, rows, stop })
            })
        })?;
        for i in 0..options.num_load_threads {
            let (records, loaded, rows) = (records_out.clone(), loaded_in.clone(), rows_in.clone());
            let (loader, memory) =
                (Loader::new(options.load_limits.clone(), Some(preprocessing.clone())), samples.clone());
            spawn(scope, recorder, format!("{}-{i}", Stage::Load), move || {
                supervisor.watch(Stage::Load, || {
                    load::run(&records, &loaded, &rows, loader, &memory);
                    Ok(())
                })
            })?;
            let (loaded, preprocessed, rows) = (loaded_out.clone(), preprocessed_in.clone(), rows_in.clone());
            let (preprocessor, pool, memory) =
                (Preprocessor::new(preprocessing.clone()), pool.clone(), samples.clone());
            spawn(scope, recorder, format!("{}-{i}", Stage::Preprocess), move || {
                supervisor.watch(Stage::Preprocess, || {
                    preprocess::run(&loaded, &preprocessed, &rows, preprocessor, (&pool, &memory));
                    Ok(())
                })
            })?;
        }
        let failures = &failures;
        let returns = Returns::for_engines(engines.len());
        for (i, (engine, returns)) in engines.into_iter().zip(returns).enumerate() {
            let (images, rows) = (preprocessed_out.clone(), rows_in.clone());
            let name = format!("engine {i} on {}", options.engines[i].device);
            spawn(scope, recorder, format!("engine-{i}"), move || {
                let stage = Cell::new(Stage::Vision);
                let abort = &supervisor.abort;
                let channels = EngineChannels { name, images, rows, abort, progress, stage: &stage, failures };
                supervisor.watch_at(&stage, || engine::run(engine, &channels, returns))
            })?;
        }
        // The stages hold the only ends from here on, so that each closes its output by ending.
        drop((records_out, loaded_in, loaded_out, preprocessed_in, preprocessed_out, rows_in));
        let writer = spawn(scope, recorder, Stage::Write.name().to_owned(), move || {
            supervisor.watch(Stage::Write, || write::run(&write_options, &rows_out, progress))
        })?;
        let written = writer.join().ok().flatten();
        Ok(source.join().ok().flatten().zip(written))
    })?;
    if let Some(failure) = supervisor.failure.into_inner().expect("bug: no stage panics with the lock held") {
        return Err(failure);
    }
    let (source, written) = result.expect("bug: a stage ended without a result or a failure");
    let failed_engines = failures.into_inner().expect("bug: no engine panics with the lock held");
    Ok(StagesReport { source, written, failed_engines })
}

/// Ends what goes on beside the stages when the scope is left, however it is left.
struct EndGuard<'a> {
    supervisor: &'a Supervisor,
    progress: &'a Progress,
}

impl Drop for EndGuard<'_> {
    fn drop(&mut self) {
        self.supervisor.abort.store(true, Ordering::Relaxed);
        self.progress.finish();
    }
}

/// Finds out how many images there are, for the progress line; nothing waits for it.
fn count_in_background(options: &RunOptions, num_finished: u64, progress: Arc<Progress>) {
    let (inputs, limit) = (options.inputs.clone(), options.limit.map_or(u64::MAX, |limit| limit as u64));
    let count = move || {
        if let Some(count) = source::count_images(&inputs) {
            progress.set_total(count.min(limit).saturating_sub(num_finished));
        }
    };
    // Without it there is no ETA; a run needs nothing else of it.
    let _ = thread::Builder::new().name("count".to_owned()).spawn(count);
}

/// Starts a thread; what it records, it records under its name.
fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    recorder: Option<&'scope Arc<Recorder>>,
    name: String,
    body: impl FnOnce() -> T + Send + 'scope,
) -> Result<thread::ScopedJoinHandle<'scope, T>> {
    let failed = Error::io("start thread", std::path::Path::new(&name));
    let (thread, track) = (name.clone(), name.clone());
    let recorded = move || {
        let _track = recorder.map(|recorder| recorder.enter(&track));
        body()
    };
    thread::Builder::new().name(thread).spawn_scoped(scope, recorded).map_err(failed)
}

/// Keeps the first failure of any stage and tells the others to stop.
#[derive(Default)]
struct Supervisor {
    failure: Mutex<Option<Error>>,
    abort: AtomicBool,
}

impl Supervisor {
    /// Runs a stage; an error or a panic in it ends the run.
    fn watch<T>(&self, stage: Stage, body: impl FnOnce() -> Result<T>) -> Option<T> {
        self.watch_at(&Cell::new(stage), body)
    }

    /// As [`Self::watch`], for a thread that does several stages' work in turn.
    fn watch_at<T>(&self, stage: &Cell<Stage>, body: impl FnOnce() -> Result<T>) -> Option<T> {
        // Whatever the stage left half done is dropped with it: the run ends.
        let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
            Err(Error::Panicked { stage: stage.get(), message: panic_message(panic.as_ref()) })
        });
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                self.abort.store(true, Ordering::Relaxed);
                let mut failure = self.failure.lock().expect("bug: no stage panics with the lock held");
                failure.get_or_insert(error);
                None
            }
        }
    }
}
