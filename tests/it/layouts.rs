//! The layouts that checkpoints come in: what is told when a part is missing, of another model, or damaged. That they
//! caption alike is in `parity.rs`.

use std::path::{Path, PathBuf};

use recaption::export::{BundleManifest, Error, ExportOptions, Manifest, export};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{bundle, copy_folder, edit_json, export_options, recaption, root, stderr};

/// A copy of a committed checkpoint, to damage.
struct Copy {
    folder: TempDir,
}

impl Copy {
    fn of(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&root(&format!("tests/data/checkpoints/{name}")), &folder.path().join("checkpoint"));
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("checkpoint").join(name)
    }

    fn try_export(&self) -> Result<Manifest, Error> {
        self.export_with(&export_options(&self.path("")))
    }

    fn export_with(&self, options: &ExportOptions) -> Result<Manifest, Error> {
        let out = self.folder.path().join("bundle");
        let exported = export(&self.path(""), &out, options);
        assert_eq!(exported.is_ok(), out.exists());
        let _ = std::fs::remove_dir_all(&out);
        exported.map(|manifest| match manifest {
            BundleManifest::Llava(manifest) => *manifest,
            BundleManifest::Clip(_) => panic!("a captioner's checkpoint became a CLIP bundle"),
        })
    }

    fn refusal(&self) -> String {
        self.try_export().unwrap_err().to_string()
    }
}

fn layout_of(checkpoint: &str) -> String {
    Manifest::read(&bundle(&format!("tests/data/checkpoints/{checkpoint}"))).unwrap().header.source.layout
}

#[test]
fn the_manifest_names_the_layout() {
    for name in ["original-embedded", "original-clip-folder-bf16", "lora-original-f16"] {
        assert_eq!(layout_of(name), "original-llava", "{name}");
    }
    for name in ["published-f16", "sharded-bin-f16", "lora-published-bf16"] {
        assert_eq!(layout_of(name), "transformers-llava", "{name}");
    }
}

#[test]
fn images_are_padded_as_the_original_layout_says_whatever_the_towers_processor() {
    use recaption::export::Geometry;
    let preprocessing =
        |name: &str| Manifest::read(&bundle(&format!("tests/data/checkpoints/{name}"))).unwrap().header.preprocessing;
    let embedded = preprocessing("original-embedded");
    assert_eq!(embedded.geometry, Geometry::Pad { background: [122, 116, 104] });
    assert_eq!((embedded.width, embedded.height), (28, 28));
    let folder = preprocessing("original-clip-folder-bf16");
    assert_eq!((folder.geometry, folder.image_mean), (Geometry::Pad { background: [127; 3] }, [0.5; 3]));
    assert!(matches!(preprocessing("lora-original-f16").geometry, Geometry::ResizeCrop { .. }));
}

#[test]
fn a_missing_vision_tower_is_named_with_the_flag_that_gives_it() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = root("tests/data/checkpoints/original-clip-folder-bf16");
    let out = folder.path().join("bundle");
    let output = recaption(&["export", checkpoint.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for expected in ["does not hold its vision tower, `openai/clip-vit-large-patch14-336`", "hint: ", "--vision-tower"]
    {
        assert!(message.contains(expected), "{message}");
    }
    let none = ["--vision-tower", folder.path().to_str().unwrap()];
    let args = ["export", checkpoint.to_str().unwrap(), "--out", out.to_str().unwrap()];
    assert!(stderr(&recaption(&[&args[..], &none].concat())).contains("has no config.json"));
}

#[test]
fn a_vision_tower_is_refused_where_the_layout_has_its_own() {
    let copy = Copy::of("published-f16");
    let tower = root("tests/data/checkpoints/lora-original-f16/vision_tower");
    let error = copy.export_with(&ExportOptions { vision_tower: Some(tower), ..ExportOptions::default() }).unwrap_err();
    assert!(error.to_string().starts_with("--vision-tower is not supported"), "{error}");
    assert_eq!(error.hint().as_deref(), Some("leave --vision-tower out"));
}

/// Heads of 10 cannot be told from shapes.
#[test]
fn an_embedded_tower_whose_heads_are_unknown_takes_its_settings_from_a_folder() {
    let copy = Copy::of("lora-original-f16");
    let bytes = std::fs::read(copy.path("vision_tower/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let embedded = |(name, view)| (format!("model.vision_tower.vision_tower.{name}"), view);
    let tensors = tensors.tensors().into_iter().map(embedded);
    std::fs::write(copy.path("tower.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    let index = json!({"weight_map": {"a": "pytorch_model.bin", "b": "tower.safetensors"}});
    std::fs::write(copy.path("pytorch_model.bin.index.json"), index.to_string()).unwrap();
    std::fs::remove_file(copy.path("vision_tower/model.safetensors")).unwrap();

    let mut options = export_options(&copy.path(""));
    let exported = copy.export_with(&options).unwrap();
    let reference = Manifest::read(&bundle("tests/data/checkpoints/lora-original-f16")).unwrap();
    assert_eq!(exported.header.files, reference.header.files, "the same tower, embedded");
    options.vision_tower = None;
    let error = copy.export_with(&options).unwrap_err().to_string();
    assert!(error.contains("40 wide") && error.contains("--vision-tower"), "{error}");
}

#[test]
fn llava_next_is_refused_by_name() {
    let cases = [
        ("original-embedded", "mm_patch_merge_type", json!("spatial_unpad")),
        ("original-embedded", "image_aspect_ratio", json!("anyres_max_9")),
        ("published-f16", "model_type", json!("llava_next")),
    ];
    for (name, key, value) in cases {
        let copy = Copy::of(name);
        edit_json(&copy.path("config.json"), |config| config[key] = value.clone());
        let message = copy.refusal();
        assert!(message.contains("LLaVA-NeXT") && message.contains(key), "{message}");
    }
    for (name, prefix) in [("original-embedded", "model."), ("published-f16", "")] {
        let copy = Copy::of(name);
        edit_tensors(&copy.path("model.safetensors"), |tensors| {
            let norm = tensors.iter().find(|(name, _)| name.ends_with("model.norm.weight")).unwrap().1.clone();
            tensors.push((format!("{prefix}image_newline"), norm));
        });
        let message = copy.refusal();
        assert!(message.contains("LLaVA-NeXT") && message.contains("image_newline"), "{message}");
    }
}

#[test]
fn what_the_original_layout_has_and_export_does_not_build_is_refused_by_name() {
    let cases = [
        ("model_type", json!("llava_mistral"), "`llava_mistral`"),
        ("mm_projector_type", json!("linear"), "mm_projector_type is not supported: `linear`"),
        ("mm_projector_type", json!(null), "`linear`"),
        ("mm_vision_select_feature", json!("cls"), "`cls`"),
        ("mm_use_im_start_end", json!(true), "mm_use_im_start_end"),
        ("mm_use_im_patch_token", json!(true), "mm_use_im_patch_token"),
        ("image_aspect_ratio", json!("highres"), "`highres`"),
        ("mm_vision_select_layer", json!(-9), "-9"),
        ("num_key_value_heads", json!(3), "num_attention_heads"),
        ("hidden_size", json!(64), "`model.mm_projector.0.weight`: expected shape [64, 64], got [48, 64]"),
        ("vocab_size", json!(299), "`model.embed_tokens.weight`: expected shape [299, 48], got [298, 48]"),
        ("intermediate_size", json!(65), "`model.layers.0.mlp.gate_proj.weight`"),
        ("num_hidden_layers", json!(3), "no tensor `model.layers.2."),
        ("num_hidden_layers", json!(1), "`model.layers.1."),
    ];
    for (key, value, expected) in cases {
        let copy = Copy::of("original-embedded");
        edit_json(&copy.path("config.json"), |config| config[key] = value.clone());
        let message = copy.refusal();
        assert!(message.contains(expected), "{key}: {message}");
    }
}

#[test]
fn a_hostile_pickle_is_refused_and_not_run() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let copy = Copy::of("original-clip-folder-bf16");
    let pickle = format!("\u{80}\u{2}cos\nsystem\n(S'touch {}'\ntR.", trace.display());
    let bytes: Vec<u8> = pickle.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
    std::fs::write(copy.path("vision_tower/pytorch_model.bin"), bytes).unwrap();
    let (checkpoint, tower, out) = (copy.path(""), copy.path("vision_tower"), folder.path().join("bundle"));
    let [checkpoint, tower, out] = [&checkpoint, &tower, &out].map(|path| path.to_str().unwrap());
    let output = recaption(&["export", checkpoint, "--vision-tower", tower, "--out", out]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("pytorch_model.bin`") && message.contains("os.system"), "{message}");
    assert!(message.contains("hint: nothing in it was run"), "{message}");
    assert!(!trace.exists() && !Path::new(out).exists());
}

#[test]
fn a_torch_file_that_is_cut_off_is_refused_by_name() {
    for (name, file) in [
        ("sharded-bin-f16", "pytorch_model-00002-of-00003.bin"),
        ("lora-original-f16", "lora/non_lora_trainables.bin"),
        ("lora-original-f16", "lora/adapter_model.bin"),
    ] {
        let copy = Copy::of(name);
        let bytes = std::fs::read(copy.path(file)).unwrap();
        std::fs::write(copy.path(file), &bytes[..bytes.len() - 100]).unwrap();
        let message = copy.refusal();
        assert!(message.contains(Path::new(file).file_name().unwrap().to_str().unwrap()), "{message}");
    }
}

#[test]
fn safetensors_go_before_torch_files() {
    let copy = Copy::of("published-f16");
    std::fs::write(copy.path("pytorch_model.bin"), "not a torch file").unwrap();
    copy.try_export().unwrap();
    std::fs::remove_file(copy.path("model.safetensors")).unwrap();
    assert!(copy.refusal().contains("pytorch_model.bin`"));
    std::fs::remove_file(copy.path("pytorch_model.bin")).unwrap();
    assert!(copy.refusal().contains("has no model.safetensors, pytorch_model.bin"));
}

#[test]
fn a_tensor_of_another_type_is_refused_by_name() {
    let copy = Copy::of("minimal-config-f32");
    let bytes = std::fs::read(copy.path("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let retyped = tensors.tensors().into_iter().map(|(name, view)| {
        let is_norm = name.ends_with("model.norm.weight");
        let dtype = if is_norm { safetensors::Dtype::I32 } else { view.dtype() };
        (name, safetensors::tensor::TensorView::new(dtype, view.shape().to_vec(), view.data()).unwrap())
    });
    let written = safetensors::serialize(retyped, None).unwrap();
    std::fs::write(copy.path("model.safetensors"), written).unwrap();
    let message = copy.refusal();
    assert_eq!(message, "tensor `language_model.model.norm.weight`: expected f32, f16 or bf16, got i32");
}

#[test]
fn the_sources_fingerprint_covers_the_tower_and_the_adapter() {
    let fingerprint = |edit: &dyn Fn(&Copy)| {
        let copy = Copy::of("lora-original-f16");
        edit(&copy);
        copy.try_export().unwrap().header.source.fingerprint
    };
    let first = fingerprint(&|_| ());
    assert_eq!(first, fingerprint(&|_| ()));
    let edits: [(&str, &str, Value); 3] = [
        ("lora/adapter_config.json", "lora_alpha", json!(13)),
        ("lora/config.json", "rope_theta", json!(20000.0)),
        ("vision_tower/config.json", "layer_norm_eps", json!(1e-4)),
    ];
    for (file, key, value) in edits {
        let changed = fingerprint(&|copy| edit_json(&copy.path(file), |json| json[key] = value.clone()));
        assert_ne!(changed, first, "{file}");
    }
}

/// A tensor of a safetensors file, held: type, shape, bytes.
type Held = (safetensors::Dtype, Vec<usize>, Vec<u8>);

/// Writes a safetensors file anew with other tensors.
fn edit_tensors(path: &Path, edit: impl FnOnce(&mut Vec<(String, Held)>)) {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let held = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    let mut all: Vec<(String, Held)> = tensors.tensors().into_iter().map(held).collect();
    edit(&mut all);
    let views = all.iter().map(|(name, (dtype, shape, data))| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

mod adapters {
    use super::*;

    const WEIGHTS: &str = "lora/adapter_model.safetensors";
    const UP_A: &str = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight";

    fn refusal(edit: impl FnOnce(&mut Vec<(String, Held)>)) -> String {
        let copy = Copy::of("lora-published-bf16");
        edit_tensors(&copy.path(WEIGHTS), edit);
        copy.refusal()
    }

    fn named<'t>(tensors: &'t mut [(String, Held)], name: &str) -> &'t mut (String, Held) {
        tensors.iter_mut().find(|(known, _)| known == name).unwrap()
    }

    #[test]
    fn an_adapter_changes_the_bundle_and_its_folder_is_needed_whole() {
        let copy = Copy::of("lora-published-bf16");
        let without = copy.export_with(&ExportOptions::default()).unwrap();
        let with = copy.try_export().unwrap();
        assert_ne!((&with.header.files, &with.header.source), (&without.header.files, &without.header.source));
        std::fs::remove_file(copy.path(WEIGHTS)).unwrap();
        assert!(copy.refusal().contains("has no adapter_model.safetensors"));
        std::fs::remove_file(copy.path("lora/adapter_config.json")).unwrap();
        assert!(copy.refusal().contains("has no adapter_config.json"));
    }

    #[test]
    fn what_matches_nothing_is_refused_by_name() {
        let renamed = |from: &'static str, to: &'static str| {
            refusal(move |tensors| {
                tensors.iter_mut().for_each(|(name, _)| *name = name.replace(from, to));
            })
        };
        let message = renamed("layers.0.mlp.up_proj", "layers.7.mlp.up_proj");
        assert!(message.contains("layers.7.mlp.up_proj.lora_A") && message.contains("has no tensor"), "{message}");
        let message = renamed("lm_head.weight", "visual.head.weight");
        assert!(message.contains("`base_model.model.visual.head.weight`"), "{message}");
        let message = renamed("lm_head.weight", "model.language_model.layers.0.mlp.up_proj.bias");
        assert!(message.contains("does not use") && message.contains("up_proj.bias"), "{message}");
        let message = refusal(|tensors| tensors.retain(|(name, _)| name != UP_A));
        assert!(message.contains("layers.0.mlp.up_proj.lora_B") && message.contains("missing"), "{message}");
    }

    #[test]
    fn shapes_and_values_are_checked_by_name() {
        let message = refusal(|tensors| named(tensors, UP_A).1.1 = vec![48, 4]);
        assert_eq!(message, format!("tensor `{UP_A}`: expected shape [4, 48], got [48, 4]"));
        let nan = half::f16::NAN.to_le_bytes();
        let message = refusal(|tensors| named(tensors, UP_A).1.2[..2].copy_from_slice(&nan));
        assert_eq!(message, format!("tensor `{UP_A}` holds 1 NaN or infinite value(s)"));
        let message = refusal(|tensors| named(tensors, UP_A).1.0 = safetensors::Dtype::I16);
        assert_eq!(message, format!("tensor `{UP_A}`: expected f32, f16 or bf16, got i16"));
    }

    #[test]
    fn what_is_more_than_a_low_rank_update_is_refused_by_name() {
        let cases = [
            ("use_dora", json!(true), "use_dora"),
            ("peft_type", json!("LOHA"), "peft_type is not supported: `LOHA`"),
            ("init_lora_weights", json!("pissa_niter_4"), "pissa_niter_4"),
            ("layer_replication", json!([[0, 2]]), "layer_replication"),
            ("trainable_token_indices", json!([3]), "trainable_token_indices"),
            ("rank_pattern", json!({"layers\\.[01]\\..*": 2}), "rank_pattern"),
            ("r", json!(0), "`r`"),
            ("r", json!(5), "expected shape [5, "),
            ("lora_alpha", json!("much"), "lora_alpha"),
        ];
        for (key, value, expected) in cases {
            let copy = Copy::of("lora-published-bf16");
            edit_json(&copy.path("lora/adapter_config.json"), |config| config[key] = value.clone());
            let message = copy.refusal();
            assert!(message.contains(expected), "{key}: {message}");
        }
        let message = refusal(|tensors| {
            named(tensors, UP_A).0 = UP_A.replace("lora_A", "lora_magnitude_vector");
        });
        assert!(message.contains("DoRA is not supported") && message.contains("up_proj"), "{message}");
    }
}
