//! `recaption export`.

use std::time::Instant;

use recaption_export::{BundleManifest, Calibration, ExportOptions, Precision, Rounding, Target, tokenizer_path};

use crate::cli::{ActivationsArg, ExportArgs, PrecisionArg, RoundingArg};
use crate::commands::Outcome;
use crate::console::{print_line, print_warning};
use crate::error::Error;
use crate::model::Tokenizer;
use crate::runtime::sums_8_bit_products_exactly;

/// Captions of pictures that do not exist: text as a captioner writes it.
const CAPTIONS: &str = include_str!("calibration.txt");

pub(super) fn execute(args: &ExportArgs) -> anyhow::Result<Outcome> {
    refuse_ignored(args)?;
    let options = ExportOptions {
        precision: args.precision.into(),
        vision_precision: args.vision_precision.map(Precision::from),
        activations: args.activations.map(|activations| match activations {
            ActivationsArg::Fp32 => Precision::Fp32,
            ActivationsArg::Fp16 => Precision::Fp16,
        }),
        rounding: match args.rounding {
            Some(RoundingArg::Nearest) => Rounding::Nearest,
            Some(RoundingArg::Search) => Rounding::Search,
            None => Rounding::default(),
        },
        calibration: calibration(args)?,
        reduce_range: args.reduce_range,
        target: args.target.into(),
        vision_tower: args.vision_tower.clone(),
        lora: args.lora.clone(),
        tokenizer: args.tokenizer.clone(),
        overwrite: args.overwrite,
        cancel: super::interrupt_flag(),
    };
    // Before it takes its time: for other machines it may be right.
    let is_int8 = [args.precision, args.vision_precision.unwrap_or(args.precision)].contains(&PrecisionArg::Int8);
    let is_of_standard_operators = matches!(args.target.into(), Target::Ort);
    if is_int8 && is_of_standard_operators && !args.reduce_range && !sums_8_bit_products_exactly() {
        print_line(
            "hint: this processor has no VNNI and does not run such a bundle; for processors like it add --target cpu",
        );
    }
    let started = Instant::now();
    let manifest = match recaption_export::export(&args.checkpoint, &args.out, &options) {
        Err(error @ recaption_export::Error::Cancelled) => {
            print_line(&error.to_string());
            return Ok(Outcome::Interrupted);
        }
        exported => exported.map_err(Error::from)?,
    };
    if let BundleManifest::Llava(manifest) = &manifest
        && manifest.stop_token_ids.is_empty()
    {
        print_warning("the checkpoint names no stop token: every caption will have --max-new-tokens tokens");
    }
    for saturation in &manifest.header().saturated_weights {
        print_warning(&format!(
            "{} value(s) of `{}` do not fit fp16 (largest {:e}) and were set to its end; try --precision bf16",
            saturation.count,
            saturation.tensors.join("`, `"),
            saturation.largest
        ));
    }
    print_line(&format!(
        "exported `{}` to `{}` in {:.1} s\n{}",
        args.checkpoint.display(),
        args.out.display(),
        started.elapsed().as_secs_f64(),
        describe(&manifest)
    ));
    Ok(Outcome::Success)
}

/// Whether the decoder's precision learns from a calibration.
fn learns(args: &ExportArgs) -> bool {
    use PrecisionArg::{Fp8, Int4, Int8, Int8Block};
    matches!(args.precision, Fp8 | Int8 | Int8Block | Int4)
}

/// # Errors
/// [`Error::Setting`] when a flag is given that the precision has no use for.
fn refuse_ignored(args: &ExportArgs) -> Result<(), Error> {
    use PrecisionArg::{Int4, Int8Block};
    // Of blocks of 8 bits it decides whether they are calibrated.
    let rounds = matches!(args.precision, Int4 | Int8Block) || matches!(args.vision_precision, Some(Int4));
    // To learn from nothing is what the others do.
    let is_calibrated = args.calibration.as_deref().is_some_and(|calibration| calibration != "none");
    let (flag, hint) = match (args.rounding, is_calibrated) {
        (Some(_), _) if !rounds => ("--rounding", "leave it out: it is for int4"),
        (_, true) if !learns(args) => ("--calibration", "leave it out: it is for fp8, int8, int8-block and int4"),
        _ => return Ok(()),
    };
    let precision = Precision::from(args.precision).name();
    Err(Error::Setting {
        reason: format!("{flag} is not supported: with --precision {precision}"),
        hint: hint.to_owned(),
    })
}

/// The calibration asked for; a text is read and tokenised only where the precision learns from it.
fn calibration(args: &ExportArgs) -> Result<Calibration, Error> {
    let text = match args.calibration.as_deref() {
        _ if !learns(args) => return Ok(Calibration::None),
        Some("none") => return Ok(Calibration::None),
        Some("random") => return Ok(Calibration::Random),
        None | Some("captions") => CAPTIONS.to_owned(),
        Some(path) => std::fs::read_to_string(path).map_err(|error| Error::Setting {
            reason: format!("--calibration `{path}`: {error}"),
            hint: "use captions, random, none, or the path of a text file".to_owned(),
        })?,
    };
    // A CLIP in one file learns nothing from text: its export looks for the tokenizer itself.
    if args.checkpoint.is_file() {
        return Ok(Calibration::None);
    }
    let tokenizer = tokenizer_path(&args.checkpoint, args.tokenizer.as_deref())?;
    Ok(Calibration::Tokens(Tokenizer::open(&tokenizer)?.encode(&text)?))
}

fn describe(manifest: &BundleManifest) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let files = manifest.files();
    let mut lines = Vec::new();
    for (_, graph) in manifest.named_graphs() {
        let size: u64 = files.iter().filter(|file| file.path.starts_with(&graph.file)).map(|file| file.size).sum();
        let parameters = graph.num_parameters as f64 / 1e6;
        lines.push(format!("  {:<18} {parameters:>9.1} M parameters {:>9.1} MB", graph.file, megabytes(size)));
    }
    let total: u64 = files.iter().map(|file| file.size).sum();
    lines.push(format!("  {:<18} {:>35.1} MB", "all files", megabytes(total)));
    lines.join("\n")
}
