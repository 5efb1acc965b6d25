//! `recaption profile`: its sums add up, its counts are those of `run`, its trace and its page are what they should be.

use std::collections::BTreeMap;
use std::path::Path;

use recaption::Stage;
use recaption::profile::Profile;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    copy_folder, demo_bundle, demo_shard, edit_json, parquet_rows, read_json, recaption, root, stderr,
};

/// Time of a thread that nothing accounts for, as a share of the run's. (Of its own it can be more where it is there for a few
/// milliseconds, and put aside in one of them.)
const MAX_OTHER_SHARE: f64 = 0.03;

struct Profiled {
    folder: TempDir,
    profile: Profile,
    table: String,
}

fn profile(bundle: &Path, inputs: &[&Path], flags: &[&str], expected: i32) -> Profiled {
    let folder = tempfile::tempdir().unwrap();
    let mut args = vec!["profile"];
    args.extend(inputs.iter().map(|path| path.to_str().unwrap()));
    args.extend(["--model", bundle.to_str().unwrap(), "--out", folder.path().to_str().unwrap(), "--provider", "cpu"]);
    args.extend(flags);
    let output = recaption(&args);
    assert_eq!(output.status.code(), Some(expected), "{}", stderr(&output));
    let profile = Profile::read(&folder.path().join("profile.json")).unwrap();
    Profiled { folder, profile, table: String::from_utf8(output.stdout).unwrap() }
}

fn check_sums(profile: &Profile) {
    for track in &profile.tracks {
        let between = track.waited_seconds + track.blocked_seconds + track.scheduling_seconds + track.helping_seconds;
        let accounted = track.stages.values().sum::<f64>() + between;
        let sum = accounted + track.other_seconds;
        assert!((sum - track.wall_seconds).abs() < 1e-6, "{track:?}");
        // Nothing is counted twice.
        assert!(track.other_seconds > -1e-6, "{track:?}");
        // What the system did not let it run is nobody's.
        let off = track.cpu_seconds.map_or(0.0, |cpu| (track.wall_seconds - cpu - between).max(0.0));
        assert!(track.other_seconds <= MAX_OTHER_SHARE * profile.run.wall_seconds + off, "{track:?}");
        assert!(track.wall_seconds <= profile.run.wall_seconds + 1e-3, "{track:?}");
    }
    for stage in &profile.stages {
        assert_eq!(stage.service.count, stage.num_batches, "{stage:?}");
        let mean = stage.service_seconds / stage.num_batches.max(1) as f64;
        // The histogram's mean is exact to its three digits.
        assert!((stage.service.mean - mean).abs() <= 0.01 * mean, "{stage:?}");
        let by_track: f64 = profile.tracks.iter().filter_map(|track| track.stages.get(&stage.stage)).sum();
        assert!((by_track - stage.service_seconds).abs() < 1e-6, "{stage:?}");
        let times = &stage.service;
        assert!(times.p50 <= times.p95 && times.p95 <= times.p99 && times.p99 <= times.max, "{stage:?}");
    }
}

#[test]
fn a_profile_adds_up_and_counts_what_a_run_writes() {
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let Profiled { folder, profile, table } = profile(&bundle, &[&shard], &["--slots", "8"], 0);
    check_sums(&profile);

    let out = tempfile::tempdir().unwrap();
    let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--provider", "cpu", "--quiet"];
    let output = recaption(&[&args[..], &["--out", out.path().to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let rows = parquet_rows(out.path());
    // A stop token is computed and not kept; every caption of the demo ends with one.
    assert!(rows.iter().all(|row| row["finish_reason"] == "stop"));
    let new_tokens: u64 = rows.iter().map(|row| row["num_tokens"].as_u64().unwrap() + 1).sum();
    let summary = read_json(&out.path().join("summary.json"));

    let run = &profile.run;
    assert_eq!((run.images, run.ok, run.failed), (64, 64, 0));
    assert_eq!((run.new_tokens, run.prompt_tokens), (new_tokens, summary["prompt_tokens"].as_u64().unwrap()));
    let stage = |stage: Stage| profile.stage(stage).unwrap();
    for one in [Stage::Source, Stage::Load, Stage::Preprocess, Stage::Vision, Stage::Prefill, Stage::Write] {
        assert_eq!(stage(one).num_images, 64, "{one}");
    }
    assert_eq!(stage(Stage::Decode).num_tokens + 64, new_tokens);
    assert_eq!(stage(Stage::Vision).num_tokens, 64 * 64);
    // A row each, and the beginning and the end of the shard.
    assert_eq!(stage(Stage::Write).num_batches, 66);
    assert_eq!((profile.captions.ttft.count, profile.captions.tpot.count), (64, 64));
    assert!(profile.captions.ttft.p50 >= profile.captions.ttft_in_engine.p50);
    for one in [Stage::Load, Stage::Preprocess, Stage::Vision, Stage::Write] {
        assert_eq!(stage(one).queued.count, 64, "{one}");
    }

    // A caption that makes n tokens in n - 1 steps sees prompt + 1, prompt + 2, …
    let prompt = profile.settings.prompt_tokens as u64;
    let context: u64 = rows
        .iter()
        .map(|row| row["num_tokens"].as_u64().unwrap())
        .map(|steps| steps * prompt + steps * (steps + 1) / 2)
        .sum();
    assert_eq!(stage(Stage::Decode).context_tokens, context);
    assert!(profile.occupancy.slots > 0.3 && profile.occupancy.slots <= 1.0, "{:?}", profile.occupancy);
    assert_eq!(profile.settings.engines[0].num_slots, 8);

    let (peaks, used) = (profile.peaks.as_ref().unwrap(), profile.utilisation.as_ref().unwrap());
    assert!(peaks.float.rate > 1e8 && peaks.memory_read.rate > 1e8 && peaks.int8.is_none(), "{peaks:?}");
    for stage in [&used.vision, &used.prefill, &used.decode, &used.run] {
        assert!(stage.mfu > 0.0 && stage.mfu < 1.0 && stage.roofline >= stage.mfu.max(stage.bandwidth), "{stage:?}");
    }
    // What `inspect` says of one image.
    let inspected = recaption(&["inspect", bundle.to_str().unwrap(), "--json"]);
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let of_image = &inspected["flops_per_image"];
    let vision = of_image["vision"].as_f64().unwrap() + of_image["projector"].as_f64().unwrap();
    assert_eq!(used.vision.flops, 64.0 * vision);
    let decoder = inspected["graphs"].as_array().unwrap().iter().find(|graph| graph["name"] == "decoder").unwrap();
    assert_eq!(profile.bundle.weight_bytes["decoder"], decoder["read_bytes"].as_u64().unwrap());
    // All but the embedding table, which is looked up in: 706 rows of 192 f32 that the demo's head does not share.
    let (read, all) = (decoder["read_bytes"].as_f64().unwrap(), decoder["data_bytes"].as_f64().unwrap());
    assert!(((read + 4.0 * 706.0 * 192.0) / all - 1.0).abs() < 0.01, "{read} of {all}");

    assert!(table.contains("bottleneck: ") && table.contains("time per output token"), "{table}");
    let mut files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["profile.json", "report.html", "trace.json"], "captions are thrown away");
}

#[test]
fn the_trace_has_a_track_a_thread_and_a_slice_a_batch() {
    let Profiled { folder, profile, .. } =
        profile(&demo_bundle(), &[&demo_shard()], &["--no-peaks", "--engines", "2", "--limit", "20"], 0);
    assert!(profile.peaks.is_none() && profile.utilisation.is_none());
    let trace = read_json(&folder.path().join("trace.json"));
    let events = trace["traceEvents"].as_array().unwrap();
    let (mut names, mut slices, mut counters) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for event in events {
        let key = event["tid"].as_u64();
        match event["ph"].as_str().unwrap() {
            "M" if event["name"] == "thread_name" => {
                names.insert(key.unwrap(), event["args"]["name"].as_str().unwrap());
            }
            "M" => {}
            "X" => slices.entry(key.unwrap()).or_insert_with(Vec::new).push(event),
            "C" => *counters.entry(event["name"].as_str().unwrap()).or_insert(0) += 1,
            other => panic!("{other}"),
        }
        assert_eq!(event["pid"], 1);
    }
    let mut threads: Vec<&str> = names.values().copied().collect();
    threads.sort_unstable();
    assert_eq!(threads, ["engine-0", "engine-1", "load-0", "preprocess-0", "source", "write"]);
    for (thread, slices) in &slices {
        let mut end = 0.0;
        for slice in slices {
            let (start, duration) = (slice["ts"].as_f64().unwrap(), slice["dur"].as_f64().unwrap());
            // To the nanosecond that decimals of a microsecond are rounded to.
            assert!(start >= end - 2e-3 && duration >= 0.0, "{}: {slice} begins before {end}", names[thread]);
            end = start + duration;
        }
    }
    for stage in &profile.stages {
        let of_stage = slices.values().flatten().filter(|slice| slice["name"] == stage.stage.as_str());
        assert_eq!(of_stage.count() as u64, stage.num_batches, "{}", stage.stage);
    }
    let steps = profile.stage(Stage::Decode).unwrap().num_batches;
    let slots: u64 = ["slots of engine-0", "slots of engine-1"].iter().filter_map(|name| counters.get(name)).sum();
    assert_eq!(slots, steps);
    assert_eq!(counters["queue before load"], 20);
}

#[test]
fn the_report_loads_nothing_and_names_cannot_break_it() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    copy_folder(&demo_bundle(), &bundle);
    let name = "</script><img src=x onerror=alert(1)>&\"'{{data}}";
    edit_json(&bundle.join("manifest.json"), |manifest| manifest["source"]["name"] = name.into());
    let Profiled { folder, profile, .. } =
        profile(&bundle, &[&demo_shard()], &["--no-peaks", "--limit", "4", "--slots", "2", "--max-new-tokens", "5"], 0);
    assert_eq!(profile.bundle.name, name);
    let report = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
    // A namespace is a name, not an address.
    let report = report.replace("http://www.w3.org/2000/svg", "");
    // Within the data the name is text: its angle bracket is an escape.
    let page = report.replace("\\u003cimg src=", "").replace("&lt;img src=", "");
    for reference in ["http:", "https:", "//cdn", " src=", "href=", "url(", "@import", "fetch(", "<img"] {
        assert!(!page.contains(reference), "{reference}");
    }
    assert_eq!((report.matches("</script>").count(), report.matches("<script").count()), (2, 2));
    let (_, data) = report.split_once("id=\"data\">").unwrap();
    let data: Value = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
    assert_eq!(data["profile"]["bundle"]["name"], name);
    assert_eq!(data["profile"], read_json(&folder.path().join("profile.json")));
    let num_slots = profile.settings.engines[0].num_slots;
    for curve in data["timeline"]["slots"].as_array().unwrap() {
        let points = curve["points"].as_array().unwrap();
        let values: Vec<f64> = points.iter().map(|point| point[1].as_f64().unwrap()).collect();
        assert!(
            values.iter().all(|&value| value <= num_slots as f64) && values.contains(&(num_slots as f64)),
            "{curve}"
        );
        assert_eq!(values.last(), Some(&0.0), "{curve}");
    }
    let histograms = data["histograms"].as_array().unwrap();
    for histogram in histograms {
        let bins = histogram["bins"].as_array().unwrap();
        assert_eq!(bins.iter().map(|bin| bin[2].as_u64().unwrap()).sum::<u64>(), histogram["count"].as_u64().unwrap());
    }
    assert_eq!(histograms.len(), 3 + Stage::ALL.len());
}

#[test]
fn operators_are_summed_by_part_of_the_model() {
    let flags = ["--no-peaks", "--limit", "8", "--ort-profile"];
    let Profiled { folder, profile, table } = profile(&demo_bundle(), &[&demo_shard()], &flags, 0);
    let operators = profile.operators.unwrap();
    let share = |graph: &str, region: &str| {
        let found = operators.regions.iter().find(|one| one.graph == graph && one.region == region);
        found.map_or(0.0, |one| one.share)
    };
    for (graph, region) in [
        ("decoder", "attention"),
        ("decoder", "MLP"),
        ("decoder", "norms"),
        ("decoder", "logits"),
        ("vision_tower", "attention"),
        ("vision_tower", "MLP"),
        ("projector", "projector"),
    ] {
        assert!(share(graph, region) > 0.0, "{graph} {region}: {operators:?}");
    }
    let (sum, other): (f64, f64) = operators.regions.iter().fold((0.0, 0.0), |(sum, other), one| {
        (sum + one.share, if one.region == "other" { other + one.share } else { other })
    });
    assert!((sum - 1.0).abs() < 1e-6 && other < 0.1, "{operators:?}");
    assert!(operators.seconds > 0.0 && operators.seconds <= operators.run_seconds, "{operators:?}");
    assert!(table.contains("decoder: MLP"), "{table}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "ONNX Runtime's files are deleted");
}

#[test]
fn failed_images_and_engines_are_counted() {
    let photos = root("tests/data/images/42");
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    copy_folder(&photos, &images);
    std::fs::write(images.join("broken.jpg"), b"\xff\xd8\xff\xe0 not much of a picture").unwrap();
    let found = profile(&demo_bundle(), &[&images], &["--no-peaks", "--max-new-tokens", "6"], 1).profile;
    check_sums(&found);
    assert_eq!((found.run.images, found.run.ok, found.run.failed), (4, 3, 1));
    assert_eq!(found.stage(Stage::Load).unwrap().num_images, 4);
    assert_eq!(found.stage(Stage::Preprocess).unwrap().num_images, 3);
    assert_eq!((found.captions.ttft.count, found.stage(Stage::Write).unwrap().num_images), (3, 4));

    let flags =
        ["--no-peaks", "--engines", "2", "--slots", "3", "--inject-failure", "1:4", "--load-threads", "1", "--quiet"];
    let found = profile(&demo_bundle(), &[&demo_shard()], &flags, 0).profile;
    assert_eq!((found.run.images, found.captions.ttft.count), (64, 64));
    // What the failed engine had begun was begun again.
    assert!(found.stage(Stage::Vision).unwrap().num_images >= 64);
    let names: Vec<&str> = found.tracks.iter().map(|track| track.name.as_str()).collect();
    assert_eq!(names, ["source", "load-0", "preprocess-0", "engine-0", "engine-1", "write"]);
}

#[test]
fn a_profile_of_another_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("profile.json");
    for (text, expected) in [
        ("{\"version\": 99}", "expected version 1, got 99"),
        ("{}", "it has no `version`"),
        ("[", "not a profile"),
        ("{\"version\": 1}", "missing field"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = Profile::read(&path).unwrap_err();
        assert!(error.to_string().contains(expected) && error.hint().is_some(), "{error}");
    }
}
