//! The table of `recaption profile`.

use std::fmt::Write;

use crate::commands::inspect::numbers::{bytes, counted, duration, number};
use crate::profile::{Peak, Profile, RegionProfile, StageUtilisation};

/// The whole text.
pub(super) fn render(profile: &Profile) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = heading(profile, &mut text);
    let _ = stages(profile, &mut text);
    let _ = tracks(profile, &mut text);
    let _ = captions(profile, &mut text);
    let _ = utilisation(profile, &mut text);
    let _ = operators(profile, &mut text);
    let _ = gpus(profile, &mut text);
    text
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn heading(profile: &Profile, text: &mut String) -> std::fmt::Result {
    let Profile { bundle, settings, run, bottleneck, .. } = profile;
    writeln!(
        text,
        "{}: {}, target {}, on {} ({})",
        bundle.name,
        bundle.precision.name(),
        bundle.target.name(),
        settings.provider,
        counted(settings.engines.len() as u64, "engine")
    )?;
    writeln!(
        text,
        "{} ({} failed) in {} after {} to load: {} images/s, {} prompt and {} new tokens/s",
        counted(run.images, "image"),
        run.failed,
        duration(run.wall_seconds),
        duration(run.load_seconds),
        number(run.images_per_second),
        number(run.prompt_tokens_per_second),
        number(run.new_tokens_per_second),
    )?;
    writeln!(text, "bottleneck: {}; {}", bottleneck.stage, bottleneck.reason)
}

fn stages(profile: &Profile, text: &mut String) -> std::fmt::Result {
    writeln!(text)?;
    writeln!(
        text,
        "{:<11}{:>8}{:>9}{:>7}  {:>9}{:>9}{:>9}{:>9}  {:>10}{:>9}{:>9}",
        "stage", "batches", "time", "busy", "p50", "p95", "p99", "max", "queue p50", "p99", "depth"
    )?;
    for stage in &profile.stages {
        let queue = profile.queues.iter().find(|queue| queue.stage == stage.stage);
        let (p50, p99, depth) = match queue {
            Some(queue) => (
                duration(stage.queued.p50),
                duration(stage.queued.p99),
                format!("{:.1}/{}", queue.mean_depth, queue.capacity),
            ),
            None => Default::default(),
        };
        let service = &stage.service;
        let line = format!(
            "{:<11}{:>8}{:>9}{:>7}  {:>9}{:>9}{:>9}{:>9}  {:>10}{:>9}{:>9}",
            stage.stage,
            stage.num_batches,
            duration(stage.service_seconds),
            format!("{:.0} %", 100.0 * stage.busy_share),
            duration(service.p50),
            duration(service.p95),
            duration(service.p99),
            duration(service.max),
            p50,
            p99,
            depth,
        );
        writeln!(text, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Each thread's wall time, to the last per cent.
fn tracks(profile: &Profile, text: &mut String) -> std::fmt::Result {
    writeln!(text)?;
    for track in &profile.tracks {
        let share = |seconds: f64| percent(seconds / track.wall_seconds.max(1e-9));
        // In the order of the data, not of the alphabet.
        let order = profile.stages.iter().map(|stage| &stage.stage);
        let mut parts: Vec<String> =
            order.filter_map(|stage| Some(format!("{stage} {}", share(*track.stages.get(stage)?)))).collect();
        let rest = [
            ("waiting for input", track.waited_seconds),
            ("waiting for room", track.blocked_seconds),
            ("scheduling", track.scheduling_seconds),
            ("helping others", track.helping_seconds),
            ("other", track.other_seconds),
        ];
        // Below a tenth of a per cent nothing is worth a word.
        let is_shown = |seconds: f64| seconds.abs() >= 0.0005 * track.wall_seconds;
        parts.extend(rest.iter().filter(|(_, s)| is_shown(*s)).map(|(name, s)| format!("{name} {}", share(*s))));
        writeln!(text, "{:<13}{:>8}: {}", track.name, duration(track.wall_seconds), parts.join(", "))?;
    }
    Ok(())
}

fn captions(profile: &Profile, text: &mut String) -> std::fmt::Result {
    let Profile { captions, occupancy, .. } = profile;
    writeln!(text)?;
    writeln!(text, "{:<38}{:>9}{:>9}{:>9}{:>9}", "", "p50", "p95", "p99", "max")?;
    for (name, times) in [
        ("time to first token, from the bytes", captions.ttft),
        ("time to first token, in the engine", captions.ttft_in_engine),
        ("time per output token", captions.tpot),
    ] {
        let [p50, p95, p99, max] = [times.p50, times.p95, times.p99, times.max].map(duration);
        writeln!(text, "{name:<38}{p50:>9}{p95:>9}{p99:>9}{max:>9}")?;
    }
    writeln!(
        text,
        "slots in use {}, {} captions a step; {} images a vision batch; padding: vision {}, decode {}",
        percent(occupancy.slots),
        number(occupancy.decode_batch),
        number(occupancy.vision_batch),
        percent(occupancy.vision_padding),
        percent(occupancy.decode_padding),
    )
}

fn utilisation(profile: &Profile, text: &mut String) -> std::fmt::Result {
    let (Some(peaks), Some(found)) = (&profile.peaks, &profile.utilisation) else { return Ok(()) };
    writeln!(text)?;
    let rate = |peak: &Peak, unit: &str| format!("{} G{unit}/s ({})", number(peak.rate / 1e9), peak.by);
    let mut parts = vec![format!("products of floats {}", rate(&peaks.float, "FLOP"))];
    parts.extend(peaks.int8.as_ref().map(|peak| format!("of int8 {}", rate(peak, "FLOP"))));
    parts.push(format!("reading memory {}", rate(&peaks.memory_read, "B")));
    writeln!(text, "peaks on {} threads: {}", peaks.num_threads, parts.join(", "))?;
    writeln!(
        text,
        "{:<11}{:>12}{:>12}{:>9}{:>11}{:>10}",
        "of them", "FLOP/s", "bytes/s", "FLOP", "bandwidth", "roofline"
    )?;
    let stages =
        [("vision", &found.vision), ("prefill", &found.prefill), ("decode", &found.decode), ("run", &found.run)];
    for (name, StageUtilisation { flops, bytes: read, seconds, mfu, bandwidth, roofline }) in stages {
        let per_second = |amount: f64| amount / seconds.max(1e-9);
        writeln!(
            text,
            "{name:<11}{:>12}{:>12}{:>9}{:>11}{:>10}",
            format!("{} G", number(per_second(*flops) / 1e9)),
            bytes(per_second(*read) as u64),
            percent(*mfu),
            percent(*bandwidth),
            percent(*roofline),
        )?;
    }
    Ok(())
}

fn operators(profile: &Profile, text: &mut String) -> std::fmt::Result {
    let Some(operators) = &profile.operators else { return Ok(()) };
    writeln!(text)?;
    writeln!(
        text,
        "operators, by ONNX Runtime: {} of {} in its runs",
        duration(operators.seconds),
        duration(operators.run_seconds)
    )?;
    for RegionProfile { graph, region, num_calls, seconds, share, operators } in &operators.regions {
        let mut kinds: Vec<_> = operators.iter().collect();
        kinds.sort_by(|a, b| b.1.total_cmp(a.1));
        let kinds: Vec<String> =
            kinds.iter().take(3).map(|(name, time)| format!("{name} {}", duration(**time))).collect();
        writeln!(
            text,
            "{:<26}{:>9}{:>9}{:>10} calls: {}",
            format!("{graph}: {region}"),
            duration(*seconds),
            percent(*share),
            num_calls,
            kinds.join(", "),
        )?;
    }
    Ok(())
}

fn gpus(profile: &Profile, text: &mut String) -> std::fmt::Result {
    for gpu in &profile.gpus {
        writeln!(
            text,
            "GPU {} {}: busy {}, memory busy {}, {} W on average, {} W at most, {} J, {} of memory in use",
            gpu.index,
            gpu.name,
            percent(gpu.utilisation),
            percent(gpu.memory_utilisation),
            number(gpu.mean_watts),
            number(gpu.max_watts),
            number(gpu.joules),
            bytes(gpu.max_memory_bytes),
        )?;
    }
    Ok(())
}
