//! Exported graphs against transformers in fp32: prefill logits close, greedy ids identical. The goldens are of the
//! stored weights; `scripts/golden/make_checkpoints.py` makes both.

use std::path::Path;

use recaption::model::Bundle;
use recaption::pipeline::preprocess::PixelValues;

use crate::golden::{Golden, open_engine, pixel_values, prompt};
use crate::support::{FP32_LOGITS, assert_close, bundle, floats, integers, read_json, root};

#[test]
fn prompts_have_the_ids_that_transformers_gives() {
    for golden in Golden::all() {
        let bundle = Bundle::open(&golden.bundle()).unwrap();
        let prompt = prompt(&golden, &bundle);
        for image in golden.images() {
            assert_eq!(prompt.rendered, image["rendered_prompt"].as_str().unwrap(), "{}", golden.name);
            let num_image_tokens = bundle.manifest.vision.num_image_tokens;
            let ids = integers(&image["input_ids"]);
            assert_eq!(ids.len(), prompt.len(num_image_tokens), "{}", golden.name);
            let text: Vec<i64> = prompt.before.iter().chain(&prompt.after).map(|&id| i64::from(id)).collect();
            let (start, end) = (prompt.before.len(), prompt.before.len() + num_image_tokens);
            assert_eq!(text, [&ids[..start], &ids[end..]].concat(), "{}", golden.name);
        }
    }
}

#[test]
fn prefill_logits_match_transformers() {
    recaption::runtime::load_library().unwrap();
    let mut largest: f32 = 0.0;
    for golden in Golden::all() {
        let bundle = Bundle::open(&golden.bundle()).unwrap();
        let paths = golden.image_paths();
        let mut engine = open_engine(&golden, &bundle, paths.len());
        let pixels: Vec<PixelValues> = paths.iter().map(|path| pixel_values(&bundle, Path::new(path))).collect();
        let vocab_size = bundle.manifest.decoder.vocab_size;
        let views: Vec<&PixelValues> = pixels.iter().collect();
        let batched = engine.prefill_logits(&views).unwrap();
        for (i, image) in golden.images().iter().enumerate() {
            let expected = floats(&image["logits"]);
            let what = format!("{} image {i}", golden.name);
            let difference = assert_close(&batched[i * vocab_size..][..vocab_size], &expected, FP32_LOGITS, &what);
            largest = largest.max(difference);
            let alone = engine.prefill_logits(&views[i..=i]).unwrap();
            assert_close(&alone, &expected, FP32_LOGITS, &format!("{what} alone"));
        }
    }
    println!("largest difference of logits: {largest:e}");
}

#[test]
fn greedy_ids_are_those_of_transformers_batched_and_one_at_a_time() {
    for golden in Golden::all() {
        for slots in ["1", "3"] {
            for (row, image) in golden.run(&["--ignore-eos", "--slots", slots]).iter().zip(golden.images()) {
                let what = format!("{} {}, {slots} slots", golden.name, image["image"]);
                assert_eq!(row["status"], "ok", "{what}: {}", row["error"]);
                assert_eq!(integers(&row["token_ids"]), integers(&image["token_ids"]), "{what}");
                assert_eq!(row["finish_reason"], "length", "{what}");
            }
        }
    }
}

#[test]
fn captions_end_where_transformers_ends_them() {
    let mut num_stopped = 0;
    for golden in Golden::all() {
        let stop_ids = integers(&golden.json["stop_ids"]);
        let bundle = Bundle::open(&golden.bundle()).unwrap();
        assert!(stop_ids.iter().all(|&id| bundle.manifest.stop_token_ids.contains(&(id as u32))), "{}", golden.name);
        for (row, image) in golden.run(&[]).iter().zip(golden.images()) {
            let expected = integers(&image["token_ids"]);
            let is_stop = |id: &i64| bundle.manifest.stop_token_ids.contains(&(*id as u32));
            let length = expected.iter().position(is_stop).unwrap_or(expected.len());
            assert_eq!(integers(&row["token_ids"]), &expected[..length], "{}", golden.name);
            assert_eq!(row["num_tokens"], length);
            let is_stopped = length < expected.len();
            assert_eq!(row["finish_reason"], if is_stopped { "stop" } else { "length" });
            num_stopped += usize::from(is_stopped);
            // The manifest may know one stop more than the golden (`<|eot_id|>`): then the golden's text is longer.
            if stop_ids.len() == bundle.manifest.stop_token_ids.len() {
                assert_eq!(row["re_caption"], image["caption"].as_str().unwrap().trim(), "{}", golden.name);
            }
        }
    }
    assert!(num_stopped > 0, "no golden stops: the test shows nothing");
}

#[test]
fn the_goldens_cover_an_image_token_outside_of_the_embedding_table() {
    let manifest = Bundle::open(&bundle("tests/data/checkpoints/image-token-outside-f16")).unwrap().manifest;
    let config = read_json(&root("tests/data/checkpoints/image-token-outside-f16/config.json"));
    let image_id = config["image_token_index"].as_u64().or(config["image_token_id"].as_u64()).unwrap();
    assert!(image_id >= manifest.decoder.vocab_size as u64, "the checkpoint does not show it");
}

#[test]
fn tower_layers_above_the_selected_one_are_left_out() {
    let manifest = Bundle::open(&bundle("tests/data/checkpoints/published-f16")).unwrap().manifest;
    let config = read_json(&root("tests/data/checkpoints/published-f16/config.json"));
    assert_eq!(config["vision_feature_layer"], -2);
    let num_layers = config["vision_config"]["num_hidden_layers"].as_u64().unwrap();
    assert_eq!(manifest.vision.num_layers as u64, num_layers - 1);
}
