//! `trace.json`: the run in Chrome's trace event format, which <https://ui.perfetto.dev> and `chrome://tracing` open. One track
//! for each thread with a slice for each batch and each wait, and counters for queues and captions in flight.
//!
//! Format: "Trace Event Format" (Google, 2016). Slices are complete events (`X`), counters `C`, names metadata `M`; times are
//! microseconds.

use std::io::Write;

use serde_json::{Value, json};

use crate::profile::recorder::{Records, Span, Track};
use crate::stage::Stage;

const PROCESS: u32 = 1;
/// Shorter waits are not drawn: the queue's own call takes as long. The sums have them.
pub(super) const MIN_WAIT_NS: u64 = 10_000;

/// Writes the trace of a run.
///
/// # Errors
/// The writer's.
pub fn write_trace(records: &Records, title: &str, output: &mut dyn Write) -> std::io::Result<()> {
    let mut events = Events { output, is_first: true };
    events.output.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    events.write(&json!({"ph": "M", "pid": PROCESS, "name": "process_name", "args": {"name": title}}))?;
    let (mut num_dropped, origin_ns) = (0, records.start_ns());
    for (index, track) in records.tracks.iter().enumerate() {
        num_dropped += track.num_dropped;
        // The process's own thread is 0 in some viewers.
        write_track(&mut events, index as u32 + 1, track, origin_ns)?;
    }
    let other = json!({"num_dropped_slices": num_dropped});
    writeln!(events.output, "\n],\"otherData\":{other}}}")
}

struct Events<'a> {
    output: &'a mut dyn Write,
    is_first: bool,
}

impl Events<'_> {
    fn write(&mut self, event: &Value) -> std::io::Result<()> {
        if !std::mem::take(&mut self.is_first) {
            self.output.write_all(b",\n")?;
        }
        serde_json::to_writer(&mut *self.output, event).map_err(Into::into)
    }
}

fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

fn write_track(events: &mut Events<'_>, thread: u32, track: &Track, origin_ns: u64) -> std::io::Result<()> {
    let metadata =
        |name: &str, args: Value| json!({"ph": "M", "pid": PROCESS, "tid": thread, "name": name, "args": args});
    events.write(&metadata("thread_name", json!({"name": track.name})))?;
    events.write(&metadata("thread_sort_index", json!({"sort_index": thread})))?;
    for span in &track.spans {
        let slice = |name: &str, category: &str, start_ns: u64, duration_ns: u64, args: Value| {
            json!({
                "ph": "X", "pid": PROCESS, "tid": thread, "name": name, "cat": category,
                "ts": microseconds(start_ns - origin_ns), "dur": microseconds(duration_ns), "args": args,
            })
        };
        if span.waited_ns >= MIN_WAIT_NS {
            events.write(&slice(
                "wait for input",
                "wait",
                span.start_ns - span.waited_ns,
                span.waited_ns,
                json!({}),
            ))?;
        }
        let work = span.work;
        let args = json!({
            "images": work.num_images, "tokens": work.num_tokens, "padded batch": work.padded_batch,
            "left in queue": span.queue_depth, "helped by others, us": microseconds(span.helped_ns),
        });
        events.write(&slice(span.stage.name(), "stage", span.start_ns, span.service_ns(), args))?;
        if span.blocked_ns >= MIN_WAIT_NS {
            events.write(&slice("wait for room", "wait", span.end_ns, span.blocked_ns, json!({})))?;
        }
        for (name, unit, value) in counters(track, span) {
            events.write(&json!({
                "ph": "C", "pid": PROCESS, "name": name, "ts": microseconds(span.start_ns - origin_ns), "args": {unit: value},
            }))?;
        }
    }
    Ok(())
}

/// What is known at the start of a batch: the depth of its stage's queue, and the captions in flight.
fn counters(track: &Track, span: &Span) -> Vec<(String, &'static str, u32)> {
    let depth = |stage: Stage| (format!("queue before {stage}"), "images", span.queue_depth);
    match span.stage {
        Stage::Source => vec![],
        Stage::Load | Stage::Preprocess | Stage::Vision | Stage::Write => vec![depth(span.stage)],
        Stage::Prefill => vec![],
        Stage::Decode => {
            vec![depth(Stage::Vision), (format!("slots of {}", track.name), "captions", span.work.num_images)]
        }
    }
}
