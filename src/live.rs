//! A run as Prometheus sees it: `run --metrics ADDR`. docs/metrics.md lists the metrics.
//!
//! What happens per row and per shard is counted where it happens, through the `metrics` facade, which does nothing
//! where nobody listens. What happens per batch comes from the recorder, as its [`Observer`], which a run without
//! metrics does not have.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use metrics::{
    Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

use crate::error::{Error, Result};
use crate::profile::recorder::{CaptionTimes, Observer, Span};
use crate::runtime::host;
use crate::stage::Stage;

const ROWS: &str = "recaption_rows_total";
const ROW_FAILURES: &str = "recaption_row_failures_total";
const PROMPT_TOKENS: &str = "recaption_prompt_tokens_total";
const NEW_TOKENS: &str = "recaption_new_tokens_total";
const IMAGES_PER_SECOND: &str = "recaption_images_per_second";
const READ_BYTES: &str = "recaption_read_bytes_total";
const SHARDS: &str = "recaption_shards_total";
const ENGINES_ALIVE: &str = "recaption_engines_alive";
const SLOTS: &str = "recaption_slots";
const SLOTS_IN_USE: &str = "recaption_slots_in_use";
const KV_CACHE_USAGE: &str = "recaption_kv_cache_usage_ratio";
const QUEUE_DEPTH: &str = "recaption_queue_depth";
const QUEUE_CAPACITY: &str = "recaption_queue_capacity";
const STAGE_SECONDS: &str = "recaption_stage_seconds";
const TTFT: &str = "recaption_time_to_first_token_seconds";
const TPOT: &str = "recaption_time_per_output_token_seconds";
const BUILD_INFO: &str = "recaption_build_info";
const RESIDENT_MEMORY: &str = "process_resident_memory_bytes";
const START_TIME: &str = "process_start_time_seconds";

/// From half a millisecond, a CPU's smallest step, to half a minute, a large prefill there.
const STAGE_BUCKETS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Queues included: as long as an image waits for a slot.
const TTFT_BUCKETS: [f64; 13] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const TPOT_BUCKETS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
/// How often rates and memory are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Ticks that a rate is taken over.
const RATE_TICKS: usize = 10;

/// Rows written so far, for their rate.
static NUM_ROWS: AtomicU64 = AtomicU64::new(0);

/// What `--metrics` means: a port, on loopback, or an address with one.
///
/// # Errors
/// What is wrong with it.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse()
        .map_err(|_| format!("expected a port or an address with one, such as 9090 or 0.0.0.0:9090, got `{text}`"))
}

/// What is served of a run from its start.
pub(crate) struct Facts {
    /// Labels of the build's metric: versions, model, precision, provider.
    pub(crate) build: Vec<(&'static str, String)>,
    /// Slots of each engine, and the tokens that each slot has room for.
    pub(crate) engines: Vec<(usize, usize)>,
}

/// The metrics of the stages.
pub(crate) struct Live {
    stage_seconds: [Histogram; Stage::ALL.len()],
    /// Of stages that have a queue.
    queue_depth: [Option<Gauge>; Stage::ALL.len()],
    engines: Vec<EngineGauges>,
    ttft: Histogram,
    tpot: Histogram,
}

/// What is shown of one engine.
struct EngineGauges {
    slots_in_use: Gauge,
    num_in_use: AtomicU64,
    kv_cache_usage: Gauge,
    /// Tokens that the cache has room for.
    capacity: f64,
}

/// Listens at `address` from here on, and says where: port 0 is any that is free.
///
/// # Errors
/// [`Error::Setting`] when somebody else listens there, or it is no address of this machine.
pub(crate) fn listen(address: SocketAddr) -> Result<SocketAddr> {
    let refused = |reason: String| Error::Setting {
        reason: format!("--metrics {address}: {reason}"),
        hint: "choose another port, or 0 for any that is free; `ss -ltnp` shows who listens".to_owned(),
    };
    // The exporter does not tell which port it got.
    let address = match address.port() {
        0 => {
            TcpListener::bind(address).and_then(|free| free.local_addr()).map_err(|error| refused(error.to_string()))?
        }
        _ => address,
    };
    let failed = |error: BuildError| match error {
        BuildError::FailedToCreateHTTPListener(reason) => refused(reason),
        other => refused(other.to_string()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| refused(error.to_string()))?;
    let mut builder = PrometheusBuilder::new().with_http_listener(address);
    for (name, buckets) in [(STAGE_SECONDS, &STAGE_BUCKETS[..]), (TTFT, &TTFT_BUCKETS), (TPOT, &TPOT_BUCKETS)] {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets).map_err(failed)?;
    }
    let (recorder, exporter) = {
        let _context = runtime.enter();
        builder.build().map_err(failed)?
    };
    metrics::set_global_recorder(recorder).map_err(|error| refused(error.to_string()))?;
    describe();
    let serve = move || {
        runtime.spawn(tick());
        let _ = runtime.block_on(exporter);
    };
    std::thread::Builder::new().name("metrics".to_owned()).spawn(serve).map_err(|error| refused(error.to_string()))?;
    Ok(address)
}

/// Looks at what nobody reports.
async fn tick() {
    let (rate, memory) = (gauge!(IMAGES_PER_SECOND), gauge!(RESIDENT_MEMORY));
    let mut seen = std::collections::VecDeque::from([(Instant::now(), 0)]);
    loop {
        tokio::time::sleep(TICK).await;
        let now = (Instant::now(), NUM_ROWS.load(Ordering::Relaxed));
        if let Some(&(then, num_rows)) = seen.front() {
            rate.set((now.1 - num_rows) as f64 / (now.0 - then).as_secs_f64().max(1e-9));
        }
        seen.push_back(now);
        if seen.len() > RATE_TICKS {
            seen.pop_front();
        }
        if let Some(bytes) = host::resident_memory() {
            memory.set(bytes as f64);
        }
    }
}

/// Whether the stage takes its images from a queue: those of prefill and decode an engine has already.
fn has_queue(stage: Stage) -> bool {
    match stage {
        Stage::Load | Stage::Preprocess | Stage::Vision | Stage::Write => true,
        Stage::Source | Stage::Prefill | Stage::Decode => false,
    }
}

impl Live {
    /// Shows what is known before the first image, and everything that will be counted as 0.
    pub(crate) fn new(facts: Facts) -> Arc<Self> {
        if let Ok(time) = SystemTime::now().duration_since(UNIX_EPOCH) {
            gauge!(START_TIME).set(time.as_secs_f64());
        }
        for status in ["ok", "failed"] {
            counter!(ROWS, "status" => status).absolute(0);
        }
        for stage in Stage::ALL {
            counter!(ROW_FAILURES, "stage" => stage.name()).absolute(0);
        }
        for name in [PROMPT_TOKENS, NEW_TOKENS, READ_BYTES] {
            counter!(name).absolute(0);
        }
        for state in ["claimed", "written", "skipped"] {
            counter!(SHARDS, "state" => state).absolute(0);
        }
        let queue_depth = Stage::ALL.map(|stage| {
            has_queue(stage).then(|| {
                gauge!(QUEUE_CAPACITY, "queue" => stage.name()).set(0.0);
                gauge!(QUEUE_DEPTH, "queue" => stage.name())
            })
        });
        gauge!(ENGINES_ALIVE).set(facts.engines.len() as f64);
        let engine = |(i, (num_slots, max_length)): (usize, (usize, usize))| {
            let name = i.to_string();
            gauge!(SLOTS, "engine" => name.clone()).set(num_slots as f64);
            let gauges = EngineGauges {
                slots_in_use: gauge!(SLOTS_IN_USE, "engine" => name.clone()),
                num_in_use: AtomicU64::new(0),
                kv_cache_usage: gauge!(KV_CACHE_USAGE, "engine" => name),
                capacity: (num_slots * max_length).max(1) as f64,
            };
            gauges.slots_in_use.set(0.0);
            gauges.kv_cache_usage.set(0.0);
            gauges
        };
        let live = Arc::new(Self {
            stage_seconds: Stage::ALL.map(|stage| histogram!(STAGE_SECONDS, "stage" => stage.name())),
            queue_depth,
            engines: facts.engines.into_iter().enumerate().map(engine).collect(),
            ttft: histogram!(TTFT),
            tpot: histogram!(TPOT),
        });
        // Last: who sees it sees all the others.
        gauge!(BUILD_INFO, &facts.build).set(1.0);
        live
    }

    /// The engine whose thread this is.
    fn engine(&self) -> Option<&EngineGauges> {
        let thread = std::thread::current();
        let index = thread.name()?.strip_prefix("engine-")?.parse::<usize>().ok()?;
        self.engines.get(index)
    }
}

impl EngineGauges {
    fn set_in_use(&self, num_slots: u64) {
        self.num_in_use.store(num_slots, Ordering::Relaxed);
        self.slots_in_use.set(num_slots as f64);
        if num_slots == 0 {
            self.kv_cache_usage.set(0.0);
        }
    }
}

impl Observer for Live {
    fn span(&self, span: &Span) {
        let stage = span.stage;
        self.stage_seconds[stage as usize].record(span.service_ns() as f64 / 1e9);
        if let Some(depth) = &self.queue_depth[stage as usize] {
            depth.set(f64::from(span.queue_depth));
        }
        let Some(engine) = self.engine() else { return };
        match stage {
            Stage::Prefill => {
                engine.set_in_use(engine.num_in_use.load(Ordering::Relaxed) + u64::from(span.work.num_images));
            }
            Stage::Decode => {
                engine.kv_cache_usage.set(span.work.context_tokens as f64 / engine.capacity);
                engine.set_in_use(span.work.num_images.into());
            }
            _ => {}
        }
    }

    fn queue(&self, stage: Stage, capacity: usize) {
        gauge!(QUEUE_CAPACITY, "queue" => stage.name()).set(capacity as f64);
    }

    fn blocked(&self, _stage: Stage, _nanoseconds: u64) {}

    fn caption(&self, times: &CaptionTimes) {
        self.ttft.record(times.ttft_ns() as f64 / 1e9);
        if let Some(tpot_ns) = times.tpot_ns() {
            self.tpot.record(tpot_ns as f64 / 1e9);
        }
        if let Some(engine) = self.engine() {
            engine.set_in_use(engine.num_in_use.load(Ordering::Relaxed).saturating_sub(1));
        }
    }
}

/// A row is on its way out: where it failed, or the tokens of its prompt and caption.
pub(crate) fn count_row(outcome: std::result::Result<(u64, u64), Stage>) {
    NUM_ROWS.fetch_add(1, Ordering::Relaxed);
    match outcome {
        Ok((prompt_tokens, new_tokens)) => {
            counter!(ROWS, "status" => "ok").increment(1);
            counter!(PROMPT_TOKENS).increment(prompt_tokens);
            counter!(NEW_TOKENS).increment(new_tokens);
        }
        Err(stage) => {
            counter!(ROWS, "status" => "failed").increment(1);
            counter!(ROW_FAILURES, "stage" => stage.name()).increment(1);
        }
    }
}

/// What can become of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShardState {
    /// This run does it.
    Claimed,
    /// Its file is there.
    Written,
    /// An earlier run did it.
    Skipped,
}

/// Counts a shard.
pub(crate) fn count_shard(state: ShardState) {
    let state = match state {
        ShardState::Claimed => "claimed",
        ShardState::Written => "written",
        ShardState::Skipped => "skipped",
    };
    counter!(SHARDS, "state" => state).increment(1);
}

/// Counts the bytes of an image.
pub(crate) fn count_read(num_bytes: usize) {
    counter!(READ_BYTES).increment(num_bytes as u64);
}

/// One engine has failed.
pub(crate) fn lose_engine() {
    gauge!(ENGINES_ALIVE).decrement(1.0);
}

fn describe() {
    describe_counter!(ROWS, "Rows of this process, by status: ok or failed.");
    describe_counter!(ROW_FAILURES, "Failed rows, by the stage they failed at.");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens of captioned images, image tokens included.");
    describe_counter!(NEW_TOKENS, "New tokens of captions, stop tokens not counted.");
    describe_gauge!(IMAGES_PER_SECOND, "Rows a second, over the last ten seconds.");
    describe_counter!(READ_BYTES, Unit::Bytes, "Bytes of images read from the inputs.");
    describe_counter!(
        SHARDS,
        "Shards, by what became of them: claimed by this process, written by it, skipped as done before."
    );
    describe_gauge!(ENGINES_ALIVE, "Engines that have not failed.");
    describe_gauge!(SLOTS, "Captions that an engine can have in flight.");
    describe_gauge!(SLOTS_IN_USE, "Captions that an engine has in flight.");
    describe_gauge!(KV_CACHE_USAGE, "Share of the KV cache that holds tokens.");
    describe_gauge!(QUEUE_DEPTH, "Images left in a stage's queue when it last took one.");
    describe_gauge!(QUEUE_CAPACITY, "Images that a stage's queue holds at most.");
    describe_histogram!(STAGE_SECONDS, Unit::Seconds, "Time of a batch in a stage, waiting not included.");
    describe_histogram!(TTFT, Unit::Seconds, "From an image's bytes being read to its first token, queues included.");
    describe_histogram!(TPOT, Unit::Seconds, "Mean time of a caption's tokens after the first.");
    describe_gauge!(BUILD_INFO, "1, with versions, model and provider as labels.");
    describe_gauge!(RESIDENT_MEMORY, Unit::Bytes, "Resident memory of the process.");
    describe_gauge!(START_TIME, Unit::Seconds, "When the process started, since the Unix epoch.");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_on_loopback() {
        assert_eq!(parse_address("9090").unwrap().to_string(), "127.0.0.1:9090");
        assert_eq!(parse_address("0.0.0.0:80").unwrap().to_string(), "0.0.0.0:80");
        assert_eq!(parse_address("[::1]:9090").unwrap().to_string(), "[::1]:9090");
        for wrong in ["", "70000", "localhost", "127.0.0.1", "a:b"] {
            assert!(parse_address(wrong).is_err(), "{wrong}");
        }
    }
}
