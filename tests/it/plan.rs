//! `recaption plan`: its arithmetic against numbers computed here, what it takes as a model and a device, and what it refuses.

use std::process::Output;

use serde_json::{Value, json};

use crate::support::{demo_bundle, demo_shard, read_json, recaption, root, stderr};

fn plan(args: &[&str]) -> Output {
    recaption(&[&["plan"], args].concat())
}

fn plan_json(args: &[&str]) -> Value {
    let output = plan(&[args, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

const README: [&str; 10] = [
    "--model",
    "llava-llama-3-8b",
    "--device-kind",
    "h100-sxm",
    "--images",
    "1.3e9",
    "--devices",
    "512",
    "--price-per-hour",
    "2.5",
];

#[test]
fn the_readmes_billion_images_add_up() {
    let plan = plan_json(&README);
    // export/src/flops.rs computes these by hand: 576 image and 60 prompt tokens, 64 new ones.
    let flops = &plan["image"]["flops"];
    let stages = [366_033_858_560_u64, 24_159_191_040, 8_739_919_757_312, 967_651_098_624];
    assert_eq!(["vision", "projector", "prefill", "decode"].map(|stage| flops[stage].as_u64().unwrap()), stages);
    assert_eq!(flops["total"], 10_097_763_905_536_u64);

    let split = &plan["steady"]["split"];
    let shares = ["vision", "projector", "prefill", "decode", "idle"].map(|stage| number(&split[stage]));
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{shares:?}");
    let steady = &plan["steady"]["images_per_second"];
    let [slow, likely, fast] = ["low", "likely", "high"].map(|name| number(&steady[name]));
    assert!(slow < likely && likely < fast, "{steady}");
    // No captioner is faster than the arithmetic at the datasheet's rate.
    assert!(fast < 989.4e12 / 10_097_763_905_536.0);
    assert!((number(&plan["steady"]["utilisation"]) / (likely * 10_097_763_905_536.0 / 989.4e12) - 1.0).abs() < 1e-6);

    // The likely captioner by hand: prefill at half the peak, vision at 40 % of it, and steps that read 15 GB of weights and
    // 256 caches of 636 to 699 tokens of 131,072 bytes at 65 % of the bandwidth.
    let vision = (stages[0] + stages[1]) as f64 / (0.40 * 989.4e12) + 3e-4 / 16.0;
    let prefill = stages[2] as f64 / (0.50 * 989.4e12) + 3e-4 / 16.0;
    let weights = 2.0 * (32.0 * 218_103_808.0 + 128_256.0 * 4096.0);
    let cache = 256.0 * (636.0 + 32.0) * 131_072.0;
    let step = (weights + cache) / (0.65 * 3.35e12) + 3e-4;
    let expected = 1.0 / (vision + prefill + 63.0 * step / 256.0);
    assert!((likely / expected - 1.0).abs() < 0.01, "{likely} images/s, by hand {expected}");
    assert!((number(&plan["steady"]["step_seconds"]) / step - 1.0).abs() < 0.01);
    assert_eq!(plan["memory"]["num_slots"], 256);
    assert_eq!(plan["memory"]["bytes_per_slot"], (576 + 60 + 128) * 131_072);

    let job = &plan["job"];
    for (name, rate) in [("low", slow), ("likely", likely), ("high", fast)] {
        let hours = number(&job["hours"][name]);
        assert!((hours / (1.3e9 / (512.0 * rate) / 3600.0) - 1.0).abs() < 0.01, "{name}: {hours} h at {rate}");
        assert!((number(&job["device_hours"][name]) / (512.0 * hours) - 1.0).abs() < 1e-9);
        assert!((number(&job["cost"][name]) / (512.0 * hours * 2.5) - 1.0).abs() < 1e-9);
    }
}

#[test]
fn the_table_of_the_readmes_example() {
    let output = plan(&README);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    insta::assert_snapshot!("plan", String::from_utf8(output.stdout).unwrap());
}

#[test]
fn a_bundle_a_folder_a_config_and_a_name_are_models() {
    let bundle = demo_bundle();
    let device = ["--peak-tflops", "100", "--bandwidth", "1", "--memory", "24"];
    let of = |model: &str, tail: &[&str]| plan_json(&[&["--model", model], &device[..], tail].concat());
    // fp32 does not run on GPUs: the bundle is refused, the checkpoint planned in fp16.
    let refused = plan(&[&["--model", bundle.to_str().unwrap()], &device[..]].concat());
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("no fp32 arithmetic for fp32 weights"), "{}", stderr(&refused));

    let (folder, config) = (root("models/demo"), root("models/demo/config.json"));
    let plans = [of(folder.to_str().unwrap(), &[]), of(config.to_str().unwrap(), &[])];
    assert_eq!(plans[0], plans[1]);
    let inspected = recaption(&["inspect", bundle.to_str().unwrap(), "--json"]);
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(plans[0]["model"]["name"], "demo");
    for field in ["vision", "decoder"] {
        assert_eq!(plans[0]["model"][field], inspected[field]);
    }
    for stage in ["vision", "projector", "prefill", "decode", "total"] {
        assert_eq!(plans[0]["image"]["flops"][stage], inspected["flops_per_image"][stage], "{stage}");
    }
    // Weights as export counts them, two bytes each; norms and biases are not counted here.
    let parameters = number(&inspected["num_parameters"]);
    let bytes = number(&plans[0]["model"]["vision_bytes"]) + number(&plans[0]["model"]["decoder_bytes"]);
    assert!((bytes / (2.0 * parameters) - 1.0).abs() < 0.01, "{bytes} bytes for {parameters} weights");
    assert_eq!(of("llava-1.5-7b", &[])["model"]["decoder"]["num_kv_heads"], 32);
}

#[test]
fn better_devices_and_smaller_weights_are_faster_and_need_more_cores() {
    let likely = |tail: &[&str]| {
        let plan = plan_json(&[&["--model", "llava-llama-3-8b"], tail].concat());
        let cores = number(&plan["preprocessing"]["cores_per_device"]["likely"]);
        (number(&plan["steady"]["images_per_second"]["likely"]), cores)
    };
    let h100 = likely(&["--device-kind", "h100-sxm"]);
    for slower in ["h100-pcie", "a100-80", "l40s", "a10"] {
        let other = likely(&["--device-kind", slower]);
        assert!(other.0 < h100.0 && other.1 < h100.1, "{slower}: {other:?}, h100-sxm {h100:?}");
    }
    let fp8 = likely(&["--device-kind", "h100-sxm", "--precision", "fp8"]);
    assert!((1.3..2.0).contains(&(fp8.0 / h100.0)), "{fp8:?} {h100:?}");
    // More bytes a second only help.
    let wide = likely(&["--device-kind", "h200-sxm"]);
    assert!(wide.0 > h100.0);
    let short = likely(&["--device-kind", "h100-sxm", "--new-tokens", "16.5"]);
    assert!(short.0 > h100.0);
}

#[test]
fn too_few_cores_make_the_device_wait() {
    let args = ["--model", "llava-llama-3-8b", "--device-kind", "h100-sxm", "--cores", "0.2"];
    let plan = plan_json(&args);
    let preprocessing = number(&plan["preprocessing"]["seconds_per_image"]["likely"]);
    let rate = number(&plan["steady"]["images_per_second"]["likely"]);
    assert!((rate / (0.2 / preprocessing) - 1.0).abs() < 0.02, "{rate} images/s from 0.2 cores");
    // Steps go on meanwhile, with fewer captions in each: what vision and prefill leave is decode's, or nobody's.
    let left = |plan: &Value| ["decode", "idle"].map(|part| number(&plan["steady"]["split"][part])).iter().sum::<f64>();
    let (starved, fed) = (left(&plan), left(&plan_json(&args[..4])));
    assert!(starved > fed + 0.2, "{starved} of the time beside {fed} with enough cores");
}

#[test]
fn few_images_take_longer_each_than_many() {
    let seconds = |images: &str| {
        let plan = plan_json(&["--model", "llava-llama-3-8b", "--device-kind", "h100-sxm", "--images", images]);
        number(&plan["job"]["hours"]["likely"]) * 3600.0 / images.parse::<f64>().unwrap()
    };
    let [one, some, many] = ["1", "300", "1e6"].map(seconds);
    assert!(one > 5.0 * many && some > 1.02 * many, "{one} {some} {many}");
}

/// The demo's own profile: a plan for the same images must say what they took. And for others it must be made of the same parts.
#[test]
fn a_profile_predicts_its_own_run_and_scales_to_others() {
    let (bundle, out) = (demo_bundle(), tempfile::tempdir().unwrap());
    let (shard, out_text) = (demo_shard(), out.path().to_str().unwrap());
    let fixed = ["profile", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--out", out_text];
    let output =
        recaption(&[&fixed[..], &["--provider", "cpu", "--quiet", "--ignore-eos", "--max-new-tokens", "32"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let file = out.path().join("profile.json");
    let (profile, file) = (read_json(&file), file.to_str().unwrap().to_owned());
    let from = |tail: &[&str]| plan_json(&[&["--from", &file], tail].concat());
    assert_eq!(plan_json(&["--from", out_text]), from(&[]), "the folder stands for the file in it");

    // Batches add up to their stages.
    for stage in ["vision", "prefill", "decode"] {
        let of_stage = |value: &Value| value["stage"] == stage;
        let groups = profile["batches"].as_array().unwrap().iter().filter(|group| of_stage(group));
        let total = profile["stages"].as_array().unwrap().iter().find(|found| of_stage(found)).unwrap();
        let (mut seconds, mut count, mut context) = (0.0, 0, 0);
        for group in groups {
            seconds += number(&group["seconds"]);
            count += group["count"].as_u64().unwrap();
            context += group["context_tokens"].as_u64().unwrap();
        }
        assert!((seconds / number(&total["service_seconds"]) - 1.0).abs() < 1e-6, "{stage}");
        assert_eq!((&total["num_batches"], &total["context_tokens"]), (&count.into(), &context.into()), "{stage}");
    }

    let plan = from(&["--images", "64"]);
    let (told, measured) =
        (number(&plan["job"]["images_per_second"]["likely"]), number(&profile["run"]["images_per_second"]));
    // What batches took is in the profile, so other tests beside it do no harm; scripts/plan_check.py checks plans of other runs.
    assert!((0.85..1.15).contains(&(told / measured)), "the plan says {told} images/s, the run made {measured}");
    assert_eq!(plan["image"]["new_tokens"], 32.0);
    assert_eq!(plan["memory"]["num_slots"], profile["settings"]["engines"][0]["num_slots"]);
    assert_eq!(plan["basis"]["kind"], "profile");
    let split = number(&plan["steady"]["split"]["decode"]);
    let longer = from(&["--new-tokens", "64"]);
    assert!(number(&longer["steady"]["split"]["decode"]) > split, "longer captions are more decode");
    let rate = |plan: &Value| number(&plan["steady"]["images_per_second"]["likely"]);
    assert!(rate(&longer) < rate(&plan) && rate(&longer) > 0.45 * rate(&plan));
    assert!(rate(&from(&["--slots", "1"])) < rate(&plan), "one caption at a time");
    // A larger model on the same machine.
    let larger = root("tests/data/checkpoints/published-f16/config.json");
    assert!(rate(&from(&["--model", larger.to_str().unwrap()])) > 0.0);

    for (args, expected) in
        [(&["--device-kind", "h100-sxm"][..], "says nothing of a GPU"), (&["--measure"], "cannot be used with")]
    {
        let output = self::plan(&[&["--from", &file], args].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
    }
    let no_profile = self::plan(&["--from", root("models/demo/config.json").to_str().unwrap()]);
    assert!(stderr(&no_profile).contains("not a profile"), "{}", stderr(&no_profile));
}

#[test]
fn this_machine_can_be_measured() {
    let plan = plan_json(&[
        "--model",
        root("models/demo").to_str().unwrap(),
        "--precision",
        "fp32",
        "--measure",
        "--images",
        "1000",
    ]);
    assert!(number(&plan["device"]["fp32_flops"]) > 1e9 && number(&plan["device"]["bytes_per_second"]) > 1e8);
    assert_eq!(plan["device"]["is_gpu"], false);
    assert!(number(&plan["job"]["hours"]["low"]) > number(&plan["job"]["hours"]["high"]));
}

/// A CPU's own way is int8 for its own operators; what it would turn into fp32 first has no peak to plan with.
#[test]
fn this_machine_is_measured_for_what_it_multiplies() {
    let model = ["--model", "llava-llama-3-8b", "--measure"];
    for precision in ["fp16", "bf16", "fp8"] {
        let output = plan(&[&model[..], &["--precision", precision]].concat());
        assert_eq!(output.status.code(), Some(2), "{precision}");
        let message = stderr(&output);
        assert!(message.contains(&format!("--measure says nothing of {precision} weights")), "{message}");
        assert!(message.contains("hint: use --precision int8 --target cpu"), "{message}");
        assert!(output.stdout.is_empty());
    }
    let plan = plan_json(&["--model", root("models/demo").to_str().unwrap(), "--measure"]);
    assert_eq!((&plan["model"]["precision"], &plan["model"]["target"]), (&json!("int8"), &json!("cpu")));
    assert_eq!(plan["decoder_arithmetic"], "int8");
}

#[test]
fn what_cannot_be_planned_is_refused_with_a_hint() {
    let cases: [(&[&str], &str); 8] = [
        (&["--model", "llava-llama-3-8b"], "hint: use --device-kind"),
        (&["--model", "llava-llama-3-8b", "--device-kind", "h101"], "h100-sxm"),
        (&["--model", "no-such", "--device-kind", "l4"], "hint: known names: llava-llama-3-8b"),
        (&["--model", "llava-llama-3-8b", "--device-kind", "t4"], "does not fit into the GPU's memory"),
        (&["--model", "llava-llama-3-8b", "--device-kind", "a100-80", "--precision", "fp8"], "no fp8 arithmetic"),
        (
            &["--model", "llava-llama-3-8b", "--device-kind", "l4", "--precision", "int8", "--target", "cpu"],
            "int8 bundles run on processors alone, not on l4",
        ),
        (
            &["--model", "llava-llama-3-8b", "--device-kind", "l4", "--precision", "fp8", "--target", "ort"],
            "only TensorRT runs fp8",
        ),
        (
            &["--model", "llava-llama-3-8b", "--device-kind", "l4", "--images", "none"],
            "expected a number from 1 to 1e15",
        ),
    ];
    for (args, expected) in cases {
        let output = plan(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
    let int4 = plan_json(&["--model", "llava-llama-3-8b", "--device-kind", "t4", "--precision", "int4"]);
    assert!(int4["memory"]["num_slots"].as_u64().unwrap() > 8, "{}", int4["memory"]);
    assert_eq!(int4["model"]["precision"], json!("int4"));
}
