//! Engines: what they copy, that shapes and neighbours change nothing, and that one that fails loses nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

use recaption::model::Bundle;
use recaption::model::sequence::StopRule;
use recaption::pipeline::engine::{Engine, EngineOptions};
use recaption::pipeline::preprocess::PixelValues;
use recaption::runtime::Device;
use serde_json::Value;

use crate::golden::{Golden, pixel_values, prompt};
use crate::support::{demo_bundle, demo_shard, printed_rows, recaption, stderr};

const NEW_TOKENS: usize = 8;

fn engine(golden: &Golden, bundle: &Bundle, is_captured: bool, num_slots: usize) -> Engine<usize> {
    let stop_rule = StopRule { stop_token_ids: vec![], max_new_tokens: NEW_TOKENS, ignore_eos: true };
    let options = EngineOptions {
        num_slots,
        vision_batch: num_slots,
        has_fixed_shapes: is_captured,
        captures_graphs: is_captured,
        ..EngineOptions::new(Device::Cpu, stop_rule)
    };
    Engine::open(bundle, &prompt(golden, bundle), &options).unwrap()
}

/// An engine with two captions of one image in flight.
fn engine_with_two_captions() -> Engine<usize> {
    recaption::runtime::load_library().unwrap();
    let golden = Golden::all().into_iter().next().unwrap();
    let bundle = Bundle::open(&golden.bundle()).unwrap();
    let mut engine = engine(&golden, &bundle, false, 2);
    let image = pixel_values(&bundle, Path::new(&golden.image_paths()[0]));
    engine.start(vec![0, 1], &[&image, &image]).unwrap();
    engine
}

#[test]
fn a_decode_step_copies_its_inputs_once_and_the_new_ids_once() {
    let mut engine = engine_with_two_captions();
    for _ in 1..NEW_TOKENS {
        let before = engine.copy_counts();
        engine.step().unwrap();
        let after = engine.copy_counts();
        assert_eq!(after.uploads - before.uploads, 1);
        assert_eq!(after.downloads - before.downloads, 1);
        assert_eq!(after.waits - before.waits, 1);
        // Of two captions, an i64 each.
        assert_eq!(after.downloaded_bytes - before.downloaded_bytes, 16);
        assert!(after.uploaded_bytes - before.uploaded_bytes <= 4096, "{after:?}");
    }
}

#[test]
fn image_features_do_not_pass_through_the_host() {
    let counts = engine_with_two_captions().copy_counts();
    // Down: the first ids only. Up: pixel values and the prompt's ids.
    assert_eq!((counts.downloads, counts.downloaded_bytes), (1, 16));
    assert_eq!(counts.uploads, 2);
}

/// Ids of `count` captions of the golden's images, started in two waves so that free slots lie behind active ones.
fn ids_of(engine: &mut Engine<usize>, images: &[PixelValues], count: usize) -> Vec<Vec<u32>> {
    let mut ids = vec![vec![]; count];
    let image = |i: usize| &images[i % images.len()];
    let first = count.div_ceil(2);
    engine.start((0..first).collect(), &(0..first).map(image).collect::<Vec<_>>()).unwrap();
    let mut finished = engine.step().unwrap();
    if first < count {
        engine.start((first..count).collect(), &(first..count).map(image).collect::<Vec<_>>()).unwrap();
    }
    while finished.len() < count {
        finished.extend(engine.step().unwrap());
    }
    for sequence in finished {
        ids[sequence.subject] = sequence.token_ids;
    }
    ids
}

#[test]
fn the_fixed_shapes_of_captured_graphs_change_no_caption() {
    recaption::runtime::load_library().unwrap();
    for golden in Golden::all() {
        let bundle = Bundle::open(&golden.bundle()).unwrap();
        let images: Vec<_> = golden.image_paths().iter().map(|path| pixel_values(&bundle, Path::new(path))).collect();
        let expected = ids_of(&mut engine(&golden, &bundle, false, 11), &images, 11);
        // Steps of 1, 2, 4, 8 and 11: captions of 3, 5 and 9 leave parked slots in them.
        for count in [1, 3, 5, 9, 11] {
            let found = ids_of(&mut engine(&golden, &bundle, true, 11), &images, count);
            assert_eq!(found, expected[..count], "{} x {count}", golden.name);
        }
    }
}

/// Runs the demo's shard; ids by key.
fn demo_ids(extra: &[&str]) -> (BTreeMap<String, Value>, Output) {
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let mut args = vec!["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--with-token-ids"];
    args.extend(["--provider", "cpu", "--max-new-tokens", "12", "--slots", "4", "--vision-batch", "2"]);
    args.extend(extra);
    let output = recaption(&args);
    let rows = printed_rows(&output);
    (rows.into_iter().map(|row| (row["key"].as_str().unwrap().to_owned(), row["token_ids"].clone())).collect(), output)
}

#[test]
fn an_engine_that_fails_loses_nothing() {
    let (expected, _) = demo_ids(&[]);
    assert_eq!(expected.len(), 64);
    for failure in ["0:0", "1:3", "0:5:start", "1:0:start", "1:9:panic"] {
        let (ids, output) = demo_ids(&["--engines", "2", "--threads", "2", "--inject-failure", failure]);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{failure}: {message}");
        assert!(message.contains("the other engines go on"), "{failure}: {message}");
        assert_eq!(ids, expected, "{failure}");
    }
}

#[test]
fn the_failure_of_the_last_engine_ends_the_run() {
    let (_, output) = demo_ids(&["--inject-failure", "0:5"]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("decode stage: CUDA, wait for the GPU: injected failure (719)"), "{message}");
}
