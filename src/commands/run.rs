//! `recaption run`: what the user typed becomes validated options, then rows.

mod output;

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::{LimitArgs, RunArgs};
use crate::commands::Outcome;
use crate::commands::captioning;
use crate::commands::inspect::numbers::counted;
use crate::console::{print_error, print_line, print_warning};
use crate::error::{Error, Result};
use crate::live::{self, Facts, Live};
use crate::model::{Bundle, Prompt};
use crate::pipeline::write::{Sink, failures, fault, write_shared};
use crate::pipeline::{RunOptions, Summary};
use crate::profile::recorder::Recorder;
use crate::runtime::load_library;
use crate::storage::Location;

/// The settings of a run, in its output folder.
pub(super) const SETTINGS_FILE: &str = "run.json";
const SUMMARY_FILE: &str = "summary.json";
/// Reasons of failed rows that the last lines of a run show.
const SHOWN_REASONS: usize = 3;

pub(super) fn execute(args: &RunArgs) -> anyhow::Result<Outcome> {
    let (is_quiet, is_json, overwrite) = (args.captioning.quiet, args.json, args.overwrite);
    // Before anything else: a port that is taken should cost nobody a model that loads for minutes.
    let address = args.metrics.map(live::listen).transpose()?;
    let place = output::place(args)?;
    let (mut options, settings) = prepare(args, place)?;
    if let Some(address) = address {
        if !is_quiet {
            print_line(&format!("metrics: http://{address}/metrics"));
        }
        options.recorder = Some(Recorder::new(false, Some(Live::new(facts(&options)))));
    }
    let sink = options.sink.clone();
    let out = match &sink {
        Sink::Folder(options) => Some(&options.folder),
        Sink::StandardOutput => None,
    };
    let run = crate::pipeline::load_model(options)?;
    // Not before the model works: a failed start leaves the earlier captions as they are.
    let _lock = match &sink {
        Sink::Folder(options) => output::prepare(options, &settings, overwrite)?,
        Sink::StandardOutput => None,
    };
    let summary = run.run()?;
    summary.damaged_inputs.iter().for_each(|damage| print_error(damage, None));
    if !is_quiet {
        print_line(&describe(&summary, out));
    }
    if let Some(out) = out {
        write_shared(&out.join(SUMMARY_FILE), &serde_json::to_vec_pretty(&summary)?)?;
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
fn prepare(args: &RunArgs, place: Option<Location>) -> Result<(RunOptions, Value)> {
    if let Some(fault) = args.inject_io_error {
        fault::inject(fault);
    }
    let checked = captioning::check(&args.inputs, &args.model, &args.captioning)?;
    let settings = settings(args, &checked.bundle, &checked.prompt)?;
    let sink = match place {
        Some(folder) => {
            output::check(&folder, &settings, args.overwrite)?;
            if args.retry_failed && !output::has_run(&folder)? {
                print_warning(&format!(
                    "--retry-failed: `{folder}` has no run whose rows failed; all images are captioned"
                ));
            }
            Sink::Folder(output::options(folder, args, &settings)?)
        }
        None => Sink::StandardOutput,
    };
    let options = checked.options(sink, args.with_token_ids)?;
    Ok((RunOptions { max_failures: args.max_failures, part: args.part, ..options }, settings))
}

/// Limits decide which images fail.
fn settings_of(limits: &LimitArgs) -> Value {
    json!({
        "max_pixels": limits.max_pixels,
        "max_decoded_bytes": limits.max_decoded_bytes,
        "max_image_bytes": limits.max_image_bytes,
        "max_sidecar_bytes": limits.max_sidecar_bytes,
        "max_json_depth": limits.max_json_depth,
    })
}

/// `run.json`: what decides the captions. A run into the same folder must agree with it.
fn settings(args: &RunArgs, bundle: &Bundle, prompt: &Prompt) -> Result<Value> {
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
            "image_column": args.captioning.image_column,
            "limits": settings_of(&args.captioning.limits),
            "format": output::format(args),
        },
    }))
}

fn describe(summary: &Summary, out: Option<&Location>) -> String {
    let counts = &summary.counts;
    let mut lines = vec![format!(
        "{}: {} ok, {} failed; {:.1} s to load, {:.1} s to run",
        counted(counts.rows, "row"),
        counts.ok,
        counts.failed,
        summary.load_seconds,
        summary.run_seconds,
    )];
    // Of nothing there is no rate.
    if summary.images_per_second > 0.0 {
        lines[0] += &format!(", {:.2} captioned images/s", summary.images_per_second);
    }
    if counts.ok > 0 {
        lines[0] += &format!(", {}", counted(counts.new_tokens, "new token"));
    }
    for failure in &summary.failed_engines {
        lines.push(format!("{failure}; its images went to the other engines"));
    }
    let reasons = failures::most_frequent(&counts.failures, SHOWN_REASONS);
    lines.extend(reasons.into_iter().map(|reason| format!("failed: {reason}")));
    match counts.failures.len().saturating_sub(SHOWN_REASONS) {
        0 => {}
        more => lines.push(format!("failed: {}, see summary.json", counted(more as u64, "more reason"))),
    }
    if counts.failed > 0 && out.is_some() {
        let again = "failed rows have the whole reason in the column `error`; --retry-failed does them again";
        lines.push(again.to_owned());
    }
    if let [first, ..] = &summary.busy_shards[..] {
        lines.push(match summary.busy_shards.len() {
            1 => format!("shard `{first}` is in work in another process, and was left to that"),
            count => {
                format!("{count} shards are in work in other processes, `{first}` among them, and were left to those")
            }
        });
    }
    match summary.num_earlier_rows {
        0 => {}
        1 => lines.push("1 of the rows is of an earlier run or another process, and was not done again".to_owned()),
        count => {
            lines.push(format!("{count} of the rows are of earlier runs or other processes, and were not done again"));
        }
    }
    match summary.num_dropped {
        0 => {}
        1 => lines.push("1 more row, of a damaged input, was captioned and is not kept".to_owned()),
        count => lines.push(format!("{count} more rows, of damaged inputs, were captioned and are not kept")),
    }
    if let Some(out) = out {
        lines.push(format!("captions in `{out}`"));
    }
    if summary.is_interrupted && out.is_none() {
        lines.push("interrupted".to_owned());
    } else if summary.is_interrupted {
        let are = if summary.num_journaled == 1 { "is" } else { "are" };
        lines.push(format!(
            "interrupted: {} of shards in progress {are} kept in the journal; the same command goes on after them",
            counted(summary.num_journaled, "finished row")
        ));
    }
    lines.join("\n")
}
