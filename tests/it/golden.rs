//! The committed checkpoints with what transformers makes of them; `scripts/golden/make_checkpoints.py` makes both.

use std::path::{Path, PathBuf};
use std::process::Command;

use recaption::export::ExportOptions;
use recaption::model::prompt::Preset;
use recaption::model::sequence::StopRule;
use recaption::model::{Bundle, Prompt, TemplateChoice, Tokenizer};
use recaption::pipeline::engine::{Engine, EngineOptions};
use recaption::pipeline::load::{LoadLimits, load};
use recaption::pipeline::preprocess::{PixelFormat, PixelValues, Preprocessor};
use recaption::runtime::Device;
use serde_json::Value;

use crate::support::{bundle, checkpoints, export_options, printed_rows, read_json, root, stderr};

/// One checkpoint and its goldens.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) json: Value,
}

impl Golden {
    pub(crate) fn all() -> Vec<Self> {
        let goldens: Vec<Self> = checkpoints()
            .into_iter()
            .map(|name| {
                let json = read_json(&root(&format!("tests/data/checkpoints/{name}/golden.json")));
                Self { name, json }
            })
            .collect();
        assert!(goldens.len() >= 17, "{} checkpoints", goldens.len());
        goldens
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        bundle(&format!("tests/data/checkpoints/{}", self.name))
    }

    /// The checkpoint's folder, and `options` with what it needs beside itself.
    pub(crate) fn export_options(&self, options: &ExportOptions) -> (PathBuf, ExportOptions) {
        let folder = root(&format!("tests/data/checkpoints/{}", self.name));
        let ExportOptions { vision_tower, lora, tokenizer, .. } = export_options(&folder);
        (folder, ExportOptions { vision_tower, lora, tokenizer, ..options.clone() })
    }

    pub(crate) fn prompt(&self) -> &str {
        self.json["prompt"].as_str().unwrap()
    }

    /// A template that knows text only got its image in the text: that is the plain preset here, not the default.
    pub(crate) fn template(&self) -> Option<Preset> {
        self.json["messages"][0]["content"].is_string().then_some(Preset::PlainLlama3)
    }

    pub(crate) fn images(&self) -> &[Value] {
        self.json["images"].as_array().unwrap()
    }

    pub(crate) fn image_paths(&self) -> Vec<String> {
        let folder = root(&format!("tests/data/checkpoints/{}", self.name));
        let path = |image: &Value| folder.join(image["image"].as_str().unwrap()).canonicalize().unwrap();
        self.images().iter().map(|image| path(image).display().to_string()).collect()
    }

    /// Runs the command line on the golden's images; `extra` arguments go last.
    pub(crate) fn run(&self, extra: &[&str]) -> Vec<Value> {
        self.run_bundle(&self.bundle(), extra)
    }

    /// As [`Self::run`], with a bundle made otherwise.
    pub(crate) fn run_bundle(&self, bundle: &Path, extra: &[&str]) -> Vec<Value> {
        self.run_bundle_at(None, bundle, extra)
    }

    /// With `level` as `RECAPTION_CPU`.
    pub(crate) fn run_bundle_at(&self, level: Option<&str>, bundle: &Path, extra: &[&str]) -> Vec<Value> {
        let (bundle, paths) = (bundle.display().to_string(), self.image_paths());
        let mut args = vec!["run"];
        args.extend(paths.iter().map(String::as_str));
        args.extend(["--model", &bundle, "--prompt", self.prompt(), "--max-new-tokens", "48"]);
        args.extend(["--with-token-ids", "--quiet", "--provider", "cpu"]);
        if let Some(template) = self.template() {
            args.extend(["--template", template.name()]);
        }
        args.extend(extra);
        let mut command = Command::new(env!("CARGO_BIN_EXE_recaption"));
        level.map(|level| command.env("RECAPTION_CPU", level));
        let output = command.args(&args).output().unwrap();
        let rows = printed_rows(&output);
        assert_eq!(rows.len(), self.images().len(), "{}: {}", self.name, stderr(&output));
        rows
    }
}

pub(crate) fn pixel_values(bundle: &Bundle, path: &Path) -> PixelValues {
    let image = load(&std::fs::read(path).unwrap(), &LoadLimits::default()).unwrap();
    let format = PixelFormat::of(&bundle.manifest);
    let mut pixel_values = format.allocate();
    let mut preprocessor = Preprocessor::new(bundle.manifest.header.preprocessing.clone());
    preprocessor.preprocess(&image, format, &mut pixel_values).unwrap();
    pixel_values
}

pub(crate) fn prompt(golden: &Golden, bundle: &Bundle) -> Prompt {
    let tokenizer = Tokenizer::open(&bundle.tokenizer_path()).unwrap();
    let template = golden.template().map(TemplateChoice::Preset);
    Prompt::build(golden.prompt(), template.as_ref(), &bundle.manifest.prompt, &tokenizer).unwrap()
}

/// An engine on one thread that takes `batch` images at once.
pub(crate) fn open_engine(golden: &Golden, bundle: &Bundle, batch: usize) -> Engine<()> {
    let stop_rule = StopRule { stop_token_ids: vec![], max_new_tokens: 1, ignore_eos: true };
    let options = EngineOptions { num_slots: batch, vision_batch: batch, ..EngineOptions::new(Device::Cpu, stop_rule) };
    Engine::open(bundle, &prompt(golden, bundle), &options).unwrap()
}
