//! `report.html`: one page with pictures, complete in itself. The numbers stand in it as JSON, and a script in the page draws
//! them; nothing is loaded from anywhere.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::profile::recorder::{CaptionTimes, Records, Span, StageTotals, Track, add_histogram, new_histogram};
use crate::profile::trace::MIN_WAIT_NS;
use crate::profile::{Distribution, Profile};
use crate::stage::Stage;

const PAGE: &str = include_str!("report.html");
/// Slices of a page: beyond, neighbours are put together.
const MAX_SLICES: usize = 20_000;
/// Pieces that a track is cut into where its slices are too many.
const NUM_PIECES: u64 = 4000;
/// Points of a curve.
const MAX_POINTS: usize = 2000;
/// Bars of a histogram for each power of ten.
const BINS_PER_DECADE: f64 = 12.0;
/// Kinds of a slice after those of the stages.
const WAITING_FOR_INPUT: usize = Stage::ALL.len();
const WAITING_FOR_ROOM: usize = Stage::ALL.len() + 1;

#[derive(Serialize)]
struct Page<'a> {
    profile: &'a Profile,
    timeline: Timeline,
    histograms: Vec<Bars>,
}

#[derive(Serialize)]
struct Timeline {
    duration_us: f64,
    tracks: Vec<Lane>,
    queues: Vec<Curve>,
    slots: Vec<Curve>,
}

#[derive(Serialize)]
struct Lane {
    name: String,
    slices: Vec<Slice>,
}

/// `[kind, start, duration, batches, images, tokens]`, in microseconds.
#[derive(Clone, Copy, Serialize)]
struct Slice(usize, f64, f64, u64, u64, u64);

#[derive(Serialize)]
struct Curve {
    name: String,
    /// The stage whose colour it has.
    kind: &'static str,
    capacity: Option<usize>,
    max: f64,
    /// Microseconds and value.
    points: Vec<(f64, f64)>,
}

#[derive(Serialize)]
struct Bars {
    name: String,
    kind: &'static str,
    #[serde(flatten)]
    distribution: Distribution,
    /// From, to, count.
    bins: Vec<(f64, f64, u64)>,
}

/// The page.
///
/// # Errors
/// When the profile holds a number that JSON does not have.
pub fn render_report(profile: &Profile, records: &Records) -> serde_json::Result<String> {
    let page = Page { profile, timeline: timeline(profile, records), histograms: histograms(records) };
    // Within a script element only `<` could end it.
    let data = serde_json::to_string(&page)?.replace('<', "\\u003c");
    let title = escape(&format!("{}: where the time went", profile.bundle.name));
    // The data last: it may hold anything, also a placeholder.
    Ok(PAGE.replace("{{title}}", &title).replacen("{{data}}", &data, 1))
}

fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut escaped, character| {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // So that a name cannot be taken for the placeholder of the data.
            '{' => escaped.push_str("&#123;"),
            character => escaped.push(character),
        }
        escaped
    })
}

fn microseconds(nanoseconds: u64) -> f64 {
    // To a tenth: fewer characters.
    (nanoseconds as f64 / 1e2).round() / 10.0
}

fn timeline(profile: &Profile, records: &Records) -> Timeline {
    let origin_ns = records.start_ns();
    let end_ns = records.tracks.iter().map(|track| track.ended_ns).max().unwrap_or(0);
    let tracks = &records.tracks;
    let num_slices: usize = tracks.iter().map(|track| slices(track, origin_ns).count()).sum();
    let lane = |track: &Track| {
        let all = slices(track, origin_ns);
        let slices =
            if num_slices > MAX_SLICES { pieces(all, microseconds(end_ns - origin_ns)) } else { all.collect() };
        Lane { name: track.name.clone(), slices }
    };
    let capacity =
        |stage: Stage| profile.queues.iter().find(|queue| queue.stage == stage.name()).map(|queue| queue.capacity);
    let queues = [Stage::Load, Stage::Preprocess, Stage::Vision, Stage::Write].map(|stage| {
        let looks = |span: &Span| match span.stage {
            // Engines look at their queue before each step.
            Stage::Decode => stage == Stage::Vision,
            other => other == stage,
        };
        let spans = tracks.iter().flat_map(|track| &track.spans).filter(|span| looks(span));
        let points = spans.map(|span| (span.start_ns, span.queue_depth)).collect();
        curve(format!("queue before {stage}"), stage.name(), capacity(stage), points, origin_ns)
    });
    let slots = tracks.iter().filter(|track| track.stage(Stage::Decode).is_some()).map(|track| {
        let points = captions_in_flight(track);
        let capacity = profile.settings.engines.first().map(|engine| engine.num_slots);
        curve(format!("captions in flight, {}", track.name), Stage::Decode.name(), capacity, points, origin_ns)
    });
    Timeline {
        duration_us: microseconds(end_ns.saturating_sub(origin_ns)),
        tracks: tracks.iter().map(lane).collect(),
        queues: queues.into(),
        slots: slots.collect(),
    }
}

/// A prefill adds captions, ended ones go, and a step says how many are there.
fn captions_in_flight(track: &Track) -> Vec<(u64, u32)> {
    enum Change {
        Begin(u32),
        End,
        Are(u32),
    }
    let of_span = |span: &Span| match span.stage {
        Stage::Prefill => Some((span.end_ns, Change::Begin(span.work.num_images))),
        Stage::Decode => Some((span.start_ns, Change::Are(span.work.num_images))),
        _ => None,
    };
    let of_caption = |times: &CaptionTimes| (times.last_token_ns, Change::End);
    let mut changes: Vec<_> = track.spans.iter().filter_map(of_span).collect();
    changes.extend(track.captions.iter().map(of_caption));
    changes.sort_by_key(|&(moment, _)| moment);
    let mut num_active: u32 = 0;
    let points = changes.into_iter().map(|(moment, change)| {
        num_active = match change {
            Change::Begin(count) => num_active + count,
            Change::End => num_active.saturating_sub(1),
            Change::Are(count) => count,
        };
        (moment, num_active)
    });
    points.collect()
}

fn slices(track: &Track, origin_ns: u64) -> impl Iterator<Item = Slice> {
    track.spans.iter().flat_map(move |span| {
        let start_ns = span.start_ns - origin_ns;
        let wait = |kind, start_ns, duration_ns| {
            (duration_ns >= MIN_WAIT_NS)
                .then(|| Slice(kind, microseconds(start_ns), microseconds(duration_ns), 1, 0, 0))
        };
        let work = span.work;
        let (images, tokens) = (work.num_images.into(), work.num_tokens.into());
        let served =
            Slice(span.stage as usize, microseconds(start_ns), microseconds(span.service_ns()), 1, images, tokens);
        let before = wait(WAITING_FOR_INPUT, start_ns - span.waited_ns.min(start_ns), span.waited_ns);
        let after = wait(WAITING_FOR_ROOM, span.end_ns - origin_ns, span.blocked_ns);
        before.into_iter().chain([served]).chain(after)
    })
}

/// Cuts a track into equal pieces, each of the kind that took most of it, and joins neighbours of one kind.
fn pieces(slices: impl Iterator<Item = Slice>, duration_us: f64) -> Vec<Slice> {
    let size = duration_us / NUM_PIECES as f64;
    let mut sums = vec![[0.0; WAITING_FOR_ROOM + 1]; NUM_PIECES as usize];
    let mut counts = vec![(0, 0, 0); NUM_PIECES as usize];
    for Slice(kind, start, duration, batches, images, tokens) in slices {
        let (mut from, end) = (start, start + duration);
        let first = ((start / size) as usize).min(sums.len() - 1);
        counts[first].0 += batches;
        counts[first].1 += images;
        counts[first].2 += tokens;
        for (index, sums) in sums.iter_mut().enumerate().skip(first) {
            let to = end.min((index + 1) as f64 * size);
            sums[kind] += (to - from).max(0.0);
            from = to;
            if from >= end {
                break;
            }
        }
    }
    let mut joined: Vec<Slice> = Vec::new();
    for (index, (sums, count)) in sums.iter().zip(counts).enumerate() {
        let idle = size - sums.iter().sum::<f64>();
        let largest = (0..sums.len()).max_by(|&a, &b| sums[a].total_cmp(&sums[b]));
        let Some(kind) = largest.filter(|&kind| sums[kind] > idle.max(0.0)) else { continue };
        let start = index as f64 * size;
        match joined.last_mut().filter(|last| last.0 == kind && (last.1 + last.2 - start).abs() < size / 2.0) {
            Some(last) => {
                *last = Slice(kind, last.1, last.2 + size, last.3 + count.0, last.4 + count.1, last.5 + count.2);
            }
            None => joined.push(Slice(kind, start, size, count.0, count.1, count.2)),
        }
    }
    joined
}

fn curve(
    name: String,
    kind: &'static str,
    capacity: Option<usize>,
    mut points: Vec<(u64, u32)>,
    origin_ns: u64,
) -> Curve {
    points.sort_unstable();
    let max = points.iter().map(|&(_, value)| value).max().unwrap_or(0);
    let step = points.len().div_ceil(MAX_POINTS).max(1);
    // A mean stands for as many as become one point.
    let mean = |chunk: &[(u64, u32)]| {
        let sum: f64 = chunk.iter().map(|&(_, value)| f64::from(value)).sum();
        let value = (10.0 * sum / chunk.len() as f64).round() / 10.0;
        (microseconds(chunk[0].0 - origin_ns), value)
    };
    Curve { name, kind, capacity, max: max.into(), points: points.chunks(step).map(mean).collect() }
}

fn histograms(records: &Records) -> Vec<Bars> {
    let [mut ttft, mut ttft_in_engine, mut tpot] = [(); 3].map(|()| new_histogram());
    for track in &records.tracks {
        add_histogram(&mut ttft, &track.ttft);
        add_histogram(&mut ttft_in_engine, &track.ttft_in_engine);
        add_histogram(&mut tpot, &track.tpot);
    }
    let mut bars = vec![
        bars("time to first token, from the bytes", Stage::Prefill, &ttft),
        bars("time to first token, in the engine", Stage::Prefill, &ttft_in_engine),
        bars("time per output token", Stage::Decode, &tpot),
    ];
    for stage in Stage::ALL {
        let mut totals = StageTotals::default();
        records.tracks.iter().filter_map(|track| track.stage(stage)).for_each(|of_track| totals.add(of_track));
        bars.push(self::bars(&format!("{stage}, a batch"), stage, &totals.service));
    }
    bars
}

fn bars(name: &str, stage: Stage, histogram: &Histogram<u64>) -> Bars {
    let edge = |bin: i64| 10_f64.powf(bin as f64 / BINS_PER_DECADE);
    let mut bins: Vec<(i64, u64)> = Vec::new();
    for step in histogram.iter_recorded() {
        let seconds = step.value_iterated_to().max(1) as f64 / 1e9;
        let bin = (seconds.log10() * BINS_PER_DECADE).floor() as i64;
        match bins.last_mut().filter(|last| last.0 == bin) {
            Some(last) => last.1 += step.count_since_last_iteration(),
            None => bins.push((bin, step.count_since_last_iteration())),
        }
    }
    Bars {
        name: name.to_owned(),
        kind: stage.name(),
        distribution: Distribution::of(histogram),
        bins: bins.into_iter().map(|(bin, count)| (edge(bin), edge(bin + 1), count)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_slices_become_few_that_cover_the_same_time() {
        // Decode and vision in turns of 3 and 1 microseconds, then nothing for as long.
        let slices = (0..20_000).map(|i| {
            let start = (i / 2 * 4 + i % 2 * 3) as f64;
            if i % 2 == 0 { Slice(5, start, 3.0, 1, 2, 2) } else { Slice(3, start, 1.0, 1, 1, 0) }
        });
        let joined = pieces(slices, 80_000.0);
        assert_eq!(joined.len(), 1);
        let Slice(kind, start, duration, batches, images, tokens) = joined[0];
        assert_eq!((kind, start, batches, images, tokens), (5, 0.0, 20_000, 30_000, 20_000));
        assert!((duration - 40_000.0).abs() < 1e-6, "{duration}");
    }

    #[test]
    fn bars_hold_every_value_once() {
        let mut histogram = new_histogram();
        (1..=1000_u64).for_each(|i| histogram.saturating_record(i * i * 1000));
        let bars = bars("x", Stage::Load, &histogram);
        assert_eq!(bars.bins.iter().map(|bin| bin.2).sum::<u64>(), 1000);
        assert!(bars.bins.windows(2).all(|pair| pair[0].1 <= pair[1].0 * (1.0 + 1e-12)));
        assert!(bars.bins[0].0 <= 1.001e-6 && bars.bins.last().unwrap().1 >= 1.0);
    }

    #[test]
    fn names_cannot_leave_their_place() {
        assert_eq!(escape("a<b>&\"'{{data}}"), "a&lt;b&gt;&amp;&quot;&#39;&#123;&#123;data}}");
    }
}
