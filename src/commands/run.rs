//! `recaption run`: what the user typed becomes validated options, then rows.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::RunArgs;
use crate::commands::Outcome;
use crate::commands::captioning::{self, Request};
use crate::console::{print_error, print_line};
use crate::error::{Error, Result};
use crate::live::{self, Facts, Live};
use crate::model::{Bundle, Prompt};
use crate::pipeline::write::{Format, Sink, write_atomically};
use crate::pipeline::{RunOptions, Summary};
use crate::profile::recorder::Recorder;
use crate::runtime::load_library;

const SETTINGS_FILE: &str = "run.json";
const SUMMARY_FILE: &str = "summary.json";

pub(super) fn execute(args: RunArgs) -> anyhow::Result<Outcome> {
    let (is_quiet, is_json, out, overwrite) = (args.captioning.quiet, args.json, &args.out, args.overwrite);
    // Before anything else: a port that is taken should cost nobody a model that loads for minutes.
    let address = args.metrics.map(live::listen).transpose()?;
    let (mut options, settings) = prepare(&args)?;
    if let Some(address) = address {
        if !is_quiet {
            print_line(&format!("metrics: http://{address}/metrics"));
        }
        options.recorder = Some(Recorder::new(false, Some(Live::new(facts(&options)))));
    }
    if let Some(folder) = out {
        check_output(folder, &settings, overwrite)?;
    }
    let run = crate::pipeline::load_model(options)?;
    // Not before the model works: a failed start leaves the earlier captions as they are.
    if let Some(folder) = out {
        prepare_output(folder, &settings, overwrite)?;
    }
    let summary = run.run()?;
    summary.damaged_inputs.iter().for_each(|damage| print_error(damage, None));
    if !is_quiet {
        print_line(&describe(&summary, out.as_deref()));
    }
    if let Some(out) = out {
        let path = out.join(SUMMARY_FILE);
        write_json(&path, &serde_json::to_value(&summary)?)?;
        if is_json {
            writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&summary)?)
                .map_err(Error::io("write", Path::new("standard output")))?;
        }
    }
    Ok(match &summary {
        Summary { is_interrupted: true, .. } => Outcome::Interrupted,
        Summary { counts, damaged_inputs, .. } if counts.failed > 0 || !damaged_inputs.is_empty() => {
            Outcome::SomeFailed
        }
        _ => Outcome::Success,
    })
}

/// What metrics say of a run before it begins.
fn facts(options: &RunOptions) -> Facts {
    let header = &options.bundle.manifest.header;
    let provider = options.engines.first().map_or("none", |engine| engine.device.name());
    let prompt = options.prompt.len(options.bundle.manifest.vision.num_image_tokens);
    let build = [
        ("version", env!("CARGO_PKG_VERSION")),
        ("onnxruntime", load_library().map_or("", |library| &library.version)),
        ("model", &header.source.name),
        ("precision", header.precision.name()),
        ("target", header.target.name()),
        ("provider", provider),
    ];
    Facts {
        build: build.map(|(label, value)| (label, value.to_owned())).to_vec(),
        engines: options
            .engines
            .iter()
            .map(|engine| (engine.num_slots, prompt + engine.stop_rule.max_new_tokens))
            .collect(),
    }
}

/// Checks everything that can be checked before the first image.
fn prepare(args: &RunArgs) -> Result<(RunOptions, Value)> {
    let sink = match &args.out {
        Some(folder) => Sink::Folder { folder: folder.clone(), format: args.format.into() },
        None => Sink::StandardOutput,
    };
    let options = captioning::prepare(Request {
        inputs: &args.inputs,
        model: &args.model,
        captioning: &args.captioning,
        sink,
        with_token_ids: args.with_token_ids,
    })?;
    let settings = settings(args, &options.bundle, &options.prompt, args.format.into())?;
    Ok((options, settings))
}

/// `run.json`: what decides the captions. A run into the same folder must agree with it.
fn settings(args: &RunArgs, bundle: &Bundle, prompt: &Prompt, format: Format) -> Result<Value> {
    let manifest = &bundle.manifest;
    Ok(json!({
        "recaption": env!("CARGO_PKG_VERSION"),
        "onnxruntime": load_library()?.version,
        "settings": {
            "model": manifest.header.source.name,
            "model_fingerprint": manifest.header.fingerprint,
            "prompt": prompt.rendered,
            "template": prompt.template,
            "max_new_tokens": args.captioning.max_new_tokens,
            "ignore_eos": args.captioning.ignore_eos,
            "with_token_ids": args.with_token_ids,
            "limit": args.captioning.limit,
            "max_pixels": args.captioning.max_pixels,
            "max_image_bytes": args.captioning.max_image_bytes,
            "format": format,
        },
    }))
}

/// Checks that the output folder, if there is one, belongs to a run with the same settings.
fn check_output(folder: &Path, settings: &Value, overwrite: bool) -> Result<()> {
    let path = folder.join(SETTINGS_FILE);
    if overwrite || !path.is_file() {
        return Ok(());
    }
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let earlier: Value = serde_json::from_slice(&text).unwrap_or_default();
    let differences = differences(&earlier["settings"], &settings["settings"]);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::OtherRun { path: folder.to_owned(), differences: differences.join("; ") })
}

/// Makes the output folder, empties it if asked to, and notes the settings in it.
fn prepare_output(folder: &Path, settings: &Value, overwrite: bool) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    // Without settings the folder is not a run's: what lies in it is somebody else's.
    if overwrite && folder.join(SETTINGS_FILE).is_file() {
        for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            if is_ours(&path) {
                std::fs::remove_file(&path).map_err(Error::io("delete", &path))?;
            }
        }
    }
    write_json(&folder.join(SETTINGS_FILE), settings)
}

/// Whether a file in an output folder is one that a run writes.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_captions = name.starts_with("captions-")
        && [".parquet", ".jsonl", ".parquet.tmp", ".jsonl.tmp"].iter().any(|suffix| name.ends_with(suffix));
    is_captions || name == SETTINGS_FILE || name == SUMMARY_FILE
}

/// `name: was X, now Y` for each setting that differs.
fn differences(earlier: &Value, now: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let (earlier, now) = (earlier.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let names: BTreeMap<&String, ()> = earlier.keys().chain(now.keys()).map(|name| (name, ())).collect();
    let shown = |value: Option<&Value>| value.map_or("unset".to_owned(), ToString::to_string);
    names
        .into_keys()
        .filter(|name| earlier.get(*name) != now.get(*name))
        .map(|name| format!("{name} was {}, now {}", shown(earlier.get(name)), shown(now.get(name))))
        .collect()
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).expect("bug: JSON serialises");
    write_atomically(path, |file| file.write_all(&text).map_err(Error::io("write", path)))
}

fn describe(summary: &Summary, out: Option<&Path>) -> String {
    let counts = &summary.counts;
    let mut lines = vec![format!(
        "{} rows: {} ok, {} failed; {:.1} s to load, {:.1} s to run, {:.2} images/s, {} new tokens",
        counts.rows,
        counts.ok,
        counts.failed,
        summary.load_seconds,
        summary.run_seconds,
        summary.images_per_second,
        counts.new_tokens
    )];
    for failure in &summary.failed_engines {
        lines.push(format!("{failure}; its images went to the other engines"));
    }
    if summary.num_earlier_rows > 0 {
        lines.push(format!("{} of the rows are of earlier runs, and were not done again", summary.num_earlier_rows));
    }
    if let Some(out) = out {
        lines.push(format!("captions in `{}`", out.display()));
    }
    if summary.is_interrupted && out.is_none() {
        lines.push("interrupted".to_owned());
    } else if summary.is_interrupted {
        lines.push(format!(
            "interrupted: {} captions of unfinished shards were not kept; the same command goes on from the last whole shard",
            summary.num_discarded
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_differ_are_told_apart_by_name() {
        let earlier = json!({"prompt": "a", "limit": null, "format": "parquet"});
        let now = json!({"prompt": "b", "limit": null, "template": "x"});
        let found = differences(&earlier, &now);
        assert_eq!(
            found,
            [r#"format was "parquet", now unset"#, r#"prompt was "a", now "b""#, r#"template was unset, now "x""#]
        );
    }
}
