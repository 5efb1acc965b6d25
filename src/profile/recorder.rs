//! Recorder: what the stages did, and when. Each thread of the pipeline fills a track of its own and hands it in when it
//! ends, so that nothing is locked or shared while a stage works.
//!
//! A thread is in a batch, at a queue (waiting for input or for room, from asking to having), or between the two: scheduling.
//! An engine that waits for images may be helping others: that is not waiting. Within a batch nothing else is counted, so that no
//! moment counts twice.
//!
//! The functions here do nothing on a thread without a track, at the price of a look at one thread-local flag. With one they
//! cost two readings of the monotonic clock for each batch and each turn at a queue. Sums and histograms are exact whatever the
//! length of the run; of single spans a track keeps `MAX_SPANS` and counts the others.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, SendError, Sender};
use hdrhistogram::Histogram;

use crate::error::Result;
use crate::runtime::stream::DeviceTimer;
use crate::runtime::{helping, host};
use crate::stage::Stage;

/// Spans and captions that a track keeps: some 30 MB.
const MAX_SPANS: usize = 1 << 18;
/// Longest duration that histograms tell apart: an hour, in nanoseconds.
const MAX_DURATION_NS: u64 = 3_600_000_000_000;
/// Histograms are exact to three decimal digits.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Nanoseconds since the recorder was made; 0 is none.
pub(crate) type Moment = u64;

/// One batch in one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The stage.
    pub stage: Stage,
    /// Nanoseconds since the recorder was made.
    pub start_ns: u64,
    /// Nanoseconds since the recorder was made.
    pub end_ns: u64,
    /// How long the thread had waited for its input before.
    pub waited_ns: u64,
    /// How long it waited for room in the next queue afterwards.
    pub blocked_ns: u64,
    /// How long other threads worked for it, in nanoseconds of their time.
    pub helped_ns: u64,
    /// What was done.
    pub work: Work,
    /// What was left in the stage's queue when the batch had been taken.
    pub queue_depth: u32,
}

impl Span {
    /// Nanoseconds of service.
    #[must_use]
    pub fn service_ns(&self) -> u64 {
        self.end_ns - self.start_ns
    }
}

/// What a batch consisted of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Images; captions in flight where it is a decode step.
    pub num_images: u32,
    /// Image tokens of vision, prompt tokens that prefill computed (image tokens among them), new tokens of decode.
    pub num_tokens: u32,
    /// Sequences that were computed: images and what pads them.
    pub padded_batch: u32,
    /// Tokens that this batch's tokens saw in the KV cache, themselves included, summed over its sequences (decode).
    pub context_tokens: u64,
}

impl Work {
    /// One image, nothing padded.
    pub(crate) const IMAGE: Self = Self { num_images: 1, num_tokens: 0, padded_batch: 1, context_tokens: 0 };
}

/// A caption's moments, in nanoseconds since the recorder was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptionTimes {
    /// The image's bytes were in memory.
    pub read_ns: u64,
    /// An engine took the image.
    pub taken_ns: u64,
    /// The first new token was on the host.
    pub first_token_ns: u64,
    /// The last new token was on the host.
    pub last_token_ns: u64,
    /// New tokens, the stop token counted.
    pub num_tokens: u32,
}

impl CaptionTimes {
    /// Time to first token: from the image's bytes being in memory, so that it includes all queues.
    #[must_use]
    pub fn ttft_ns(&self) -> u64 {
        self.first_token_ns.saturating_sub(self.read_ns)
    }

    /// The same from when an engine took the image: vision and prefill of its batch.
    #[must_use]
    pub fn ttft_in_engine_ns(&self) -> u64 {
        self.first_token_ns.saturating_sub(self.taken_ns)
    }

    /// Time per output token after the first; none for captions of one token.
    #[must_use]
    pub fn tpot_ns(&self) -> Option<u64> {
        let num_steps = u64::from(self.num_tokens.checked_sub(1).filter(|&steps| steps > 0)?);
        Some(self.last_token_ns.saturating_sub(self.first_token_ns) / num_steps)
    }
}

/// When an image passed from stage to stage.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImageTimes {
    read: Moment,
    queued: Moment,
    taken: Moment,
}

impl ImageTimes {
    /// The image's bytes are in memory.
    pub(crate) fn is_read(&mut self) {
        self.read = now();
    }

    /// The image is about to be put into the next stage's queue.
    pub(crate) fn is_queued(&mut self) {
        self.queued = now();
    }

    /// `stage` has taken the image out of its queue.
    pub(crate) fn is_taken(&mut self, stage: Stage) {
        with_track(|track| {
            self.taken = track.now();
            if self.queued > 0 {
                track.totals(stage).record_queued(self.taken.saturating_sub(self.queued));
            }
        });
    }
}

/// What is told about a run while it goes on; called on the stages' threads, so it must be quick.
pub trait Observer: Send + Sync {
    /// A batch is done. Its `blocked_ns` is not known yet, and 0.
    fn span(&self, span: &Span);
    /// The queue in front of a stage holds so much.
    fn queue(&self, stage: Stage, capacity: usize);
    /// A stage waited for room in the next queue.
    fn blocked(&self, stage: Stage, nanoseconds: u64);
    /// A caption has ended.
    fn caption(&self, times: &CaptionTimes);
}

/// Takes the tracks of one run.
pub struct Recorder {
    started: Instant,
    keeps_spans: bool,
    observer: Option<Arc<dyn Observer>>,
    records: Mutex<Records>,
}

/// What a recorder has been given.
#[derive(Default)]
pub struct Records {
    /// One for each thread, in the order of the stages and of the threads' numbers.
    pub tracks: Vec<Track>,
    /// How much each stage's queue holds.
    pub queue_capacities: Vec<(Stage, usize)>,
}

impl Records {
    /// When the first thread began.
    #[must_use]
    pub fn start_ns(&self) -> u64 {
        self.tracks.iter().map(|track| track.started_ns).min().unwrap_or(0)
    }
}

impl Recorder {
    /// Keeps single spans, for a timeline, or sums and histograms alone. Time begins now.
    #[must_use]
    pub fn new(keeps_spans: bool, observer: Option<Arc<dyn Observer>>) -> Arc<Self> {
        Arc::new(Self { started: Instant::now(), keeps_spans, observer, records: Mutex::default() })
    }

    /// Makes a track for the calling thread, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>, name: &str) -> TrackGuard {
        let track = Track::new(Arc::clone(self), name.to_owned());
        TRACK.with_borrow_mut(|slot| *slot = Some(track));
        TrackGuard
    }

    /// Notes how much the queue in front of `stage` holds.
    pub(crate) fn queue(&self, stage: Stage, capacity: usize) {
        self.records().queue_capacities.push((stage, capacity));
        if let Some(observer) = &self.observer {
            observer.queue(stage, capacity);
        }
    }

    /// Nanoseconds since the recorder was made.
    pub(crate) fn now(&self) -> Moment {
        self.started.elapsed().as_nanos() as u64
    }

    /// Takes what has been handed in; call it when the run is over.
    #[must_use]
    pub fn take(&self) -> Records {
        let mut records = std::mem::take(&mut *self.records());
        // Until here they are in the order they ended.
        records.tracks.sort_by_key(|track| place(&track.name));
        records
    }

    fn records(&self) -> std::sync::MutexGuard<'_, Records> {
        self.records.lock().expect("bug: nobody panics with the lock held")
    }
}

/// Where a thread stands among the others, by its name: `load-0` to `load-11`, then `preprocess-0`.
fn place(name: &str) -> (usize, usize) {
    let (kind, number) = name.rsplit_once('-').unwrap_or((name, ""));
    let stage = Stage::ALL.into_iter().position(|stage| stage.name() == kind);
    // Engines have three stages, and these are in the middle.
    (stage.unwrap_or(Stage::Vision as usize), number.parse().unwrap_or(0))
}

thread_local! {
    static TRACK: RefCell<Option<Track>> = const { RefCell::new(None) };
}

/// Ends the thread's track when dropped, also when the thread panics.
pub(crate) struct TrackGuard;

impl Drop for TrackGuard {
    fn drop(&mut self) {
        if let Some(mut track) = TRACK.with_borrow_mut(Option::take) {
            track.end();
            let recorder = Arc::clone(&track.recorder);
            recorder.records().tracks.push(track);
        }
    }
}

fn with_track<T>(use_track: impl FnOnce(&mut Track) -> T) -> Option<T> {
    TRACK.with_borrow_mut(|track| track.as_mut().map(use_track))
}

/// What one thread did.
pub struct Track {
    /// The thread's name.
    pub name: String,
    /// When the thread began.
    pub started_ns: u64,
    /// When it ended.
    pub ended_ns: u64,
    /// Time in which it worked for other threads' batches.
    pub helping_ns: u64,
    /// Time that the thread itself was running, without threads that worked for it.
    pub cpu_ns: Option<u64>,
    /// Single batches in the order they ended, if the recorder keeps them.
    pub spans: Vec<Span>,
    /// Captions that ended here, if the recorder keeps spans.
    pub captions: Vec<CaptionTimes>,
    /// Spans and captions that were not kept, since there were too many.
    pub num_dropped: u64,
    /// Time the thread waited for input after its last batch.
    pub waited_at_end_ns: u64,
    /// Time between batches and queues that was the thread's own, and of a batch that had begun when it ended.
    pub scheduling_ns: u64,
    /// Time to first token of all captions.
    pub ttft: Histogram<u64>,
    /// The same from when an engine took the image.
    pub ttft_in_engine: Histogram<u64>,
    /// Time per output token of all captions.
    pub tpot: Histogram<u64>,
    totals: [Option<Box<StageTotals>>; Stage::ALL.len()],
    recorder: Arc<Recorder>,
    /// Waited for input since the last span.
    pending_wait_ns: u64,
    /// Left in the input queue when it was last looked at.
    pending_depth: u32,
    last_stage: Option<Stage>,
    /// When the batch that it is in began.
    in_batch_since: Option<Moment>,
    cpu_at_start: Option<u64>,
}

/// Sums over the batches of one stage on one thread.
pub struct StageTotals {
    /// Batches.
    pub num_spans: u64,
    /// Work of all of them; batch sizes are summed.
    pub num_images: u64,
    /// Sum over the batches.
    pub num_tokens: u64,
    /// Sum over the batches.
    pub padded_batches: u64,
    /// Sum over the batches.
    pub context_tokens: u64,
    /// Time in the stage.
    pub service_ns: u64,
    /// Time waiting for input.
    pub waited_ns: u64,
    /// Time waiting for room in the next queue.
    pub blocked_ns: u64,
    /// Time on the device, between CUDA events.
    pub device_ns: u64,
    /// Time that other threads worked for its batches.
    pub helped_ns: u64,
    /// Time that the stage's images spent in its queue.
    pub queued_ns: u64,
    /// Sum of the sequences of a batch, each times the time of the batch: what slots were occupied.
    pub occupied_ns: u64,
    /// Sum of the depths of its queue, over the batches.
    pub depth_sum: u64,
    /// Largest depth of its queue.
    pub depth_max: u32,
    /// Service times.
    pub service: Histogram<u64>,
    /// Times that images spent in the stage's queue.
    pub queued: Histogram<u64>,
}

impl Default for StageTotals {
    fn default() -> Self {
        Self {
            num_spans: 0,
            num_images: 0,
            num_tokens: 0,
            padded_batches: 0,
            context_tokens: 0,
            service_ns: 0,
            waited_ns: 0,
            blocked_ns: 0,
            device_ns: 0,
            helped_ns: 0,
            queued_ns: 0,
            occupied_ns: 0,
            depth_sum: 0,
            depth_max: 0,
            service: new_histogram(),
            queued: new_histogram(),
        }
    }
}

impl StageTotals {
    fn record(&mut self, span: &Span) {
        let (work, service_ns) = (span.work, span.service_ns());
        self.num_spans += 1;
        self.num_images += u64::from(work.num_images);
        self.num_tokens += u64::from(work.num_tokens);
        self.padded_batches += u64::from(work.padded_batch);
        self.context_tokens += work.context_tokens;
        self.service_ns += service_ns;
        self.waited_ns += span.waited_ns;
        self.helped_ns += span.helped_ns;
        self.occupied_ns += service_ns * u64::from(work.num_images);
        self.depth_sum += u64::from(span.queue_depth);
        self.depth_max = self.depth_max.max(span.queue_depth);
        self.service.saturating_record(service_ns);
    }

    fn record_queued(&mut self, nanoseconds: u64) {
        self.queued_ns += nanoseconds;
        self.queued.saturating_record(nanoseconds);
    }

    /// Adds another thread's sums.
    pub fn add(&mut self, other: &Self) {
        self.num_spans += other.num_spans;
        self.num_images += other.num_images;
        self.num_tokens += other.num_tokens;
        self.padded_batches += other.padded_batches;
        self.context_tokens += other.context_tokens;
        self.service_ns += other.service_ns;
        self.waited_ns += other.waited_ns;
        self.blocked_ns += other.blocked_ns;
        self.device_ns += other.device_ns;
        self.helped_ns += other.helped_ns;
        self.queued_ns += other.queued_ns;
        self.occupied_ns += other.occupied_ns;
        self.depth_sum += other.depth_sum;
        self.depth_max = self.depth_max.max(other.depth_max);
        add_histogram(&mut self.service, &other.service);
        add_histogram(&mut self.queued, &other.queued);
    }
}

/// Durations in nanoseconds.
pub(crate) fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_DURATION_NS, SIGNIFICANT_DIGITS).expect("bug: the bounds are valid")
}

/// Adds `other`, which has the same bounds.
pub(crate) fn add_histogram(histogram: &mut Histogram<u64>, other: &Histogram<u64>) {
    histogram.add(other).expect("bug: all histograms have the same bounds");
}

impl Track {
    fn new(recorder: Arc<Recorder>, name: String) -> Self {
        let mut track = Self {
            name,
            started_ns: 0,
            ended_ns: 0,
            cpu_ns: None,
            spans: Vec::new(),
            captions: Vec::new(),
            num_dropped: 0,
            waited_at_end_ns: 0,
            scheduling_ns: 0,
            helping_ns: 0,
            ttft: new_histogram(),
            ttft_in_engine: new_histogram(),
            tpot: new_histogram(),
            totals: Default::default(),
            recorder,
            pending_wait_ns: 0,
            pending_depth: 0,
            last_stage: None,
            in_batch_since: None,
            cpu_at_start: host::thread_cpu_ns(),
        };
        // Histograms take a millisecond, which is none of the thread's.
        for stage in stages_of(&track.name) {
            track.totals(stage);
        }
        track.started_ns = track.now();
        track
    }

    fn end(&mut self) {
        self.ended_ns = self.now();
        self.waited_at_end_ns = std::mem::take(&mut self.pending_wait_ns);
        // The source goes on to the end of its input in a batch that no image ends.
        self.scheduling_ns += self.in_batch_since.take().map_or(0, |begin_ns| self.ended_ns - begin_ns);
        self.cpu_ns = host::thread_cpu_ns().zip(self.cpu_at_start).map(|(end, start)| end.saturating_sub(start));
    }

    fn now(&self) -> Moment {
        self.recorder.now()
    }

    /// The stage's sums, if the thread worked for it.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> Option<&StageTotals> {
        self.totals[stage as usize].as_deref()
    }

    fn totals(&mut self, stage: Stage) -> &mut StageTotals {
        self.totals[stage as usize].get_or_insert_default()
    }

    fn record(&mut self, stage: Stage, start_ns: Moment, work: Work) {
        let (waited_ns, queue_depth) = (std::mem::take(&mut self.pending_wait_ns), self.pending_depth);
        let (end_ns, helped_ns) = (self.now(), helping::take_helped_ns());
        let span = Span { stage, start_ns, end_ns, waited_ns, blocked_ns: 0, helped_ns, work, queue_depth };
        self.totals(stage).record(&span);
        self.last_stage = Some(stage);
        self.in_batch_since = None;
        if let Some(observer) = &self.recorder.observer {
            observer.span(&span);
        }
        if self.recorder.keeps_spans {
            keep(&mut self.spans, span, &mut self.num_dropped);
        }
    }

    /// What has gone by since `begin_ns`, unless a batch has it.
    fn since(&self, begin_ns: Moment) -> u64 {
        if self.in_batch_since.is_some() { 0 } else { self.now().saturating_sub(begin_ns) }
    }

    fn record_blocked(&mut self, nanoseconds: u64) {
        let Some(stage) = self.last_stage else {
            self.scheduling_ns += nanoseconds;
            return;
        };
        self.totals(stage).blocked_ns += nanoseconds;
        // With the buffer full the last span in it is an old one.
        if let Some(span) = self.spans.last_mut().filter(|span| span.stage == stage && self.num_dropped == 0) {
            span.blocked_ns += nanoseconds;
        }
        if let Some(observer) = &self.recorder.observer {
            observer.blocked(stage, nanoseconds);
        }
    }

    fn record_caption(&mut self, times: CaptionTimes) {
        self.ttft.saturating_record(times.ttft_ns());
        self.ttft_in_engine.saturating_record(times.ttft_in_engine_ns());
        if let Some(tpot_ns) = times.tpot_ns() {
            self.tpot.saturating_record(tpot_ns);
        }
        if let Some(observer) = &self.recorder.observer {
            observer.caption(&times);
        }
        if self.recorder.keeps_spans {
            keep(&mut self.captions, times, &mut self.num_dropped);
        }
    }
}

/// What a thread of this name does.
fn stages_of(name: &str) -> Vec<Stage> {
    let kind = name.split('-').next().unwrap_or(name);
    let is_its = move |stage: &Stage| match stage {
        Stage::Vision | Stage::Prefill | Stage::Decode => kind == "engine",
        other => kind == other.name(),
    };
    Stage::ALL.into_iter().filter(is_its).collect()
}

fn keep<T>(records: &mut Vec<T>, record: T, num_dropped: &mut u64) {
    if records.len() < MAX_SPANS {
        records.push(record);
    } else {
        *num_dropped += 1;
    }
}

/// The present moment; 0 on a thread without a track.
pub(crate) fn now() -> Moment {
    with_track(|track| track.now()).unwrap_or(0)
}

/// A batch that has begun.
#[derive(Clone, Copy)]
#[must_use]
pub(crate) struct Begun(Moment);

/// Begins a batch.
pub(crate) fn begin() -> Begun {
    let begin_ns = with_track(|track| *track.in_batch_since.insert(track.recorder.now()));
    Begun(begin_ns.unwrap_or(0))
}

impl Begun {
    /// The batch is done.
    pub(crate) fn end(self, stage: Stage, work: Work) {
        with_track(|track| track.record(stage, self.0, work));
    }
}

/// Takes the next item, as [`Receiver::recv`]: waiting for input.
pub(crate) fn receive<T>(receiver: &Receiver<T>) -> Option<T> {
    let item = waiting(|| receiver.recv().ok());
    look_at(receiver);
    item
}

/// As [`receive`], but waits no longer than `timeout`.
pub(crate) fn receive_timeout<T>(receiver: &Receiver<T>, timeout: Duration) -> Result<T, RecvTimeoutError> {
    let item = waiting(|| receiver.recv_timeout(timeout));
    look_at(receiver);
    item
}

/// Notes how much is left in the thread's input queue.
pub(crate) fn look_at<T>(receiver: &Receiver<T>) {
    with_track(|track| track.pending_depth = receiver.len() as u32);
}

/// Does what takes from a queue: waiting for input.
pub(crate) fn waiting<T>(wait: impl FnOnce() -> T) -> T {
    let (begin, helping) = with_track(|track| (track.now(), track.helping_ns)).unwrap_or_default();
    let item = wait();
    with_track(|track| {
        let helping_ns = track.helping_ns - helping;
        track.pending_wait_ns += track.since(begin).saturating_sub(helping_ns);
    });
    item
}

/// Works for another thread's batch, in the time of [`waiting`].
pub(crate) fn helping(help: impl FnOnce()) {
    let begin = now();
    help();
    with_track(|track| track.helping_ns += track.since(begin));
}

/// Does what is neither a batch nor a queue's: scheduling.
pub(crate) fn scheduling<T>(schedule: impl FnOnce() -> T) -> T {
    let begin = now();
    let result = schedule();
    with_track(|track| track.scheduling_ns += track.since(begin));
    result
}

/// Sends an item, as [`Sender::send`]: waiting for room behind the thread's last batch. Waking the thread that waits for the
/// item is part of it.
pub(crate) fn send<T>(sender: &Sender<T>, item: T) -> Result<(), SendError<T>> {
    let begin = now();
    let sent = sender.send(item);
    with_track(|track| track.record_blocked(track.since(begin)));
    sent
}

/// A caption has ended: its last token has just come.
pub(crate) fn end_caption(image: ImageTimes, first_token_ns: Moment, num_tokens: usize) {
    with_track(|track| {
        track.record_caption(CaptionTimes {
            read_ns: image.read,
            taken_ns: image.taken,
            first_token_ns,
            last_token_ns: track.now(),
            num_tokens: num_tokens as u32,
        });
    });
}

/// `count` batches of nothing, with their queue, as a stage's thread records them or, without a recorder, does not: what recording
/// costs (`benches/stages.rs`).
#[doc(hidden)]
pub fn record_batches(recorder: Option<&Arc<Recorder>>, count: usize) {
    let _track = recorder.map(|recorder| recorder.enter("engine-0"));
    let (sender, receiver) = crossbeam::channel::bounded(1);
    for _ in 0..count {
        send(&sender, ()).expect("bug: the receiver lives");
        receive(&receiver).expect("bug: an item was sent");
        begin().end(Stage::Decode, Work::IMAGE);
    }
}

/// Adds what a device took for a stage, if it keeps the time; the host must have waited for it.
///
/// # Errors
/// [`crate::Error::Cuda`]
pub(crate) fn add_device_time(stage: Stage, timer: &mut Option<DeviceTimer>) -> Result<()> {
    let Some(timer) = timer else { return Ok(()) };
    if let Some(nanoseconds) = timer.take_ns()? {
        with_track(|track| track.totals(stage).device_ns += nanoseconds);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::bounded;

    use super::*;

    #[test]
    fn without_a_track_nothing_is_recorded() {
        assert_eq!(now(), 0);
        begin().end(Stage::Load, Work::IMAGE);
        let (sender, receiver) = bounded(1);
        send(&sender, 7).unwrap();
        assert_eq!(receive(&receiver), Some(7));
        drop(sender);
        assert_eq!(receive(&receiver), None);
    }

    #[test]
    fn a_track_adds_up_and_tells_waiting_from_work() {
        let recorder = Recorder::new(true, None);
        let (sender, receiver) = bounded(1);
        let guard = recorder.enter("load-0");
        let consumer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            receiver.into_iter().count()
        });
        for _ in 0..2 {
            let begun = begin();
            std::thread::sleep(std::time::Duration::from_millis(2));
            begun.end(Stage::Load, Work::IMAGE);
            send(&sender, ()).unwrap();
        }
        drop((sender, guard));
        assert_eq!(consumer.join().unwrap(), 2);
        let track = recorder.take().tracks.pop().unwrap();
        let totals = track.stage(Stage::Load).unwrap();
        assert_eq!((totals.num_spans, totals.num_images, track.spans.len()), (2, 2, 2));
        assert_eq!(totals.service_ns, track.spans.iter().map(Span::service_ns).sum::<u64>());
        assert!(totals.service_ns >= 4_000_000 && totals.service.len() == 2);
        // The first item found room, the second did not.
        let blocked: Vec<u64> = track.spans.iter().map(|span| span.blocked_ns).collect();
        assert_eq!(blocked.iter().sum::<u64>(), totals.blocked_ns);
        assert!(blocked[1] > 1_000_000 && blocked[1] > blocked[0], "{blocked:?}");
        assert!(track.ended_ns - track.started_ns >= totals.service_ns + totals.blocked_ns);
        assert!(track.stage(Stage::Vision).is_none());
    }

    #[test]
    fn between_batches_is_scheduling_and_within_them_nothing_else_counts() {
        let recorder = Recorder::new(true, None);
        let guard = recorder.enter("source");
        let (sender, receiver) = bounded(4);
        let pause = || std::thread::sleep(std::time::Duration::from_millis(3));
        scheduling(pause);
        let begun = begin();
        send(&sender, ()).unwrap();
        waiting(pause);
        scheduling(pause);
        begun.end(Stage::Source, Work::IMAGE);
        waiting(pause);
        let _never_ends = begin();
        assert_eq!(receive(&receiver), Some(()));
        pause();
        drop(guard);
        let track = recorder.take().tracks.pop().unwrap();
        let totals = track.stage(Stage::Source).unwrap();
        assert_eq!((totals.waited_ns, totals.blocked_ns), (0, 0));
        assert!(totals.service_ns >= 6_000_000 && track.waited_at_end_ns >= 3_000_000);
        assert!(track.scheduling_ns >= 6_000_000, "before, and the batch that did not end: {}", track.scheduling_ns);
        let sum = totals.service_ns + track.waited_at_end_ns + track.scheduling_ns;
        assert!(sum <= track.ended_ns - track.started_ns);
    }

    #[test]
    fn a_track_is_handed_in_when_its_thread_panics() {
        let recorder = Recorder::new(true, None);
        let shared = Arc::clone(&recorder);
        let thread = std::thread::spawn(move || {
            let _guard = shared.enter("engine-0");
            begin().end(Stage::Decode, Work::IMAGE);
            panic!("as a device may");
        });
        assert!(thread.join().is_err());
        assert_eq!(recorder.take().tracks[0].stage(Stage::Decode).unwrap().num_spans, 1);
    }

    #[test]
    fn threads_are_in_the_order_of_their_stages_and_numbers() {
        let mut names = ["write", "engine-10", "preprocess-0", "load-2", "engine-9", "load-11", "source"];
        names.sort_by_key(|name| place(name));
        assert_eq!(names, ["source", "load-2", "load-11", "preprocess-0", "engine-9", "engine-10", "write"]);
    }

    #[test]
    fn time_per_token_is_that_of_the_tokens_after_the_first() {
        let times = |num_tokens| CaptionTimes {
            read_ns: 10,
            taken_ns: 30,
            first_token_ns: 100,
            last_token_ns: 400,
            num_tokens,
        };
        assert_eq!((times(4).ttft_ns(), times(4).ttft_in_engine_ns(), times(4).tpot_ns()), (90, 70, Some(100)));
        assert_eq!((times(1).tpot_ns(), times(0).tpot_ns()), (None, None));
    }
}
