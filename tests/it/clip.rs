//! CLIP bundles against transformers and OpenAI's code in fp32; `scripts/golden/make_clip.py` makes checkpoints and goldens.

use std::path::{Path, PathBuf};

use recaption::analysis::clip::Clip;
use recaption::export::{BundleManifest, ClipManifest, EosRule, ExportOptions, Manifest, Target, export};
use recaption::pipeline::load::{LoadLimits, load};
use recaption::pipeline::preprocess::{PixelFormat, PixelValues, Preprocessor};
use recaption::runtime::Device;

use crate::support::{assert_close, copy_folder, floats, integers, read_json, recaption, root, stderr};

/// Largest difference of embeddings, relative to their largest value.
const FP32_EMBEDS: f32 = 1e-4;

fn checkpoint(name: &str) -> PathBuf {
    root("tests/data/clip").join(name)
}

fn options(target: Target) -> ExportOptions {
    ExportOptions { target, tokenizer: Some(checkpoint("legacy-eos-f32")), ..ExportOptions::default() }
}

fn pixel_values(manifest: &ClipManifest, path: &Path) -> PixelValues {
    let image = load(&std::fs::read(path).unwrap(), &LoadLimits::default()).unwrap();
    let format = PixelFormat::of_clip(manifest);
    let mut pixel_values = format.allocate();
    Preprocessor::new(manifest.header.preprocessing.clone()).preprocess(&image, format, &mut pixel_values).unwrap();
    pixel_values
}

#[test]
fn embeddings_match_the_reference() {
    recaption::runtime::load_library().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for name in ["legacy-eos-f32", "gelu-f16", "openai-f16", "openai-long-f16"] {
        let golden = read_json(&checkpoint(name).join("golden.json"));
        let (images, texts) = (golden["images"].as_array().unwrap(), golden["texts"].as_array().unwrap());
        let expected_images: Vec<f32> = images.iter().flat_map(|image| floats(&image["image_embeds"])).collect();
        let expected_texts: Vec<f32> = texts.iter().flat_map(|text| floats(&text["text_embeds"])).collect();
        let largest = |values: &[f32]| values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        for target in [Target::Ort, Target::TensorRt] {
            let bundle = folder.path().join(format!("{name}-{}", target.name()));
            export(&checkpoint(name), &bundle, &options(target)).unwrap();
            let mut clip = Clip::open(&bundle, Device::Cpu, 1).unwrap();
            let scale = golden["logit_scale"].as_f64().unwrap() as f32;
            assert!((clip.manifest().logit_scale / scale - 1.0).abs() < 1e-6, "{name}");

            let path = |image: &serde_json::Value| checkpoint(name).join(image["image"].as_str().unwrap());
            let pixels: Vec<PixelValues> =
                images.iter().map(|image| pixel_values(clip.manifest(), &path(image))).collect();
            let found = clip.embed_images(&pixels.iter().collect::<Vec<_>>()).unwrap();
            let tolerance = FP32_EMBEDS * largest(&expected_images);
            assert_close(&found, &expected_images, tolerance, &format!("{name} images"));

            let ids = |text: &serde_json::Value| integers(&text["input_ids"]).iter().map(|&id| id as u32).collect();
            let ids: Vec<Vec<u32>> = texts.iter().map(ids).collect();
            let tolerance = FP32_EMBEDS * largest(&expected_texts);
            let found = clip.embed_texts(&ids).unwrap();
            assert_close(&found, &expected_texts, tolerance, &format!("{name} texts"));
            let width = found.len() / ids.len();
            for (i, text) in ids.iter().enumerate() {
                let alone = clip.embed_texts(std::slice::from_ref(text)).unwrap();
                assert_close(
                    &alone,
                    &expected_texts[i * width..][..width],
                    tolerance,
                    &format!("{name} text {i} alone"),
                );
            }
        }
    }
}

#[test]
fn a_checkpoint_under_openai_names_may_be_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let weights = checkpoint("openai-long-f16").join("model.safetensors");
    let bundle = folder.path().join("bundle");
    let exported = export(&weights, &bundle, &options(Target::Ort)).unwrap();
    assert_eq!(exported, BundleManifest::read(&bundle).unwrap());
    let manifest = ClipManifest::read(&bundle).unwrap();
    assert_eq!(
        (manifest.header.source.name.as_str(), manifest.header.source.layout.as_str()),
        ("model.safetensors", "openai-clip")
    );
    assert_eq!((manifest.text.context_length, manifest.text.eos), (248, EosRule::LargestId));

    let without_tokenizer = ExportOptions::default();
    let error = export(&weights, &folder.path().join("other"), &without_tokenizer).unwrap_err();
    assert!(error.to_string().contains("has no tokenizer.json"), "{error}");
    let llava = root("tests/data/checkpoints/minimal-config-f32/model.safetensors");
    let error = export(&llava, &folder.path().join("other"), &without_tokenizer).unwrap_err();
    assert!(error.to_string().contains("visual.conv1.weight"), "{error}");
}

#[test]
fn a_clip_bundle_is_exported_and_refused_by_run() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle").display().to_string();
    let source = checkpoint("gelu-f16").display().to_string();
    for overwrite in [None, Some("--overwrite")] {
        let mut args = vec!["export", &source, "--out", &bundle, "--precision", "int8"];
        args.extend(overwrite);
        let output = recaption(&args);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{message}");
        assert!(message.contains("image_tower.onnx ") && message.contains("text_tower.onnx "), "{message}");
    }
    let image = root("tests/data/images/28/a.png").display().to_string();
    let output = recaption(&["run", &image, "--model", &bundle]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    let expected = format!("bundle `{bundle}` is a clip bundle; `recaption run` takes a llava bundle");
    assert!(message.contains(&expected), "{message}");
    assert!(Manifest::read(bundle.as_ref()).is_err());
}

#[test]
fn a_damaged_clip_is_refused_by_the_name_of_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint("openai-f16");
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let refusal = |name: &str, change: &dyn Fn(&str) -> Option<String>| {
        let copy = folder.path().join(name);
        copy_folder(&source, &copy);
        let kept = tensors.tensors().into_iter().filter_map(|(name, view)| Some((change(&name)?, view)));
        std::fs::write(copy.join("model.safetensors"), safetensors::serialize(kept, None).unwrap()).unwrap();
        let out = folder.path().join("bundle");
        let error = export(&copy, &out, &options(Target::Ort)).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    let in_proj = "transformer.resblocks.0.attn.in_proj_weight";
    let without = refusal("without", &|name| (name != in_proj).then(|| name.to_owned()));
    assert_eq!(without, format!("checkpoint has no tensor `{in_proj}`"));
    let resnet = refusal("resnet", &|name| (name != "visual.proj").then(|| name.to_owned()));
    assert!(resnet.contains("a ResNet"), "{resnet}");
    let renamed = refusal("renamed", &|name| Some(name.replace("logit_scale", "logit_scales")));
    assert!(renamed.contains("logit_scale"), "{renamed}");
}
