//! `recaption export`.

use std::time::Instant;

use recaption_export::{ExportOptions, Manifest, Precision, Target};

use crate::cli::{ExportArgs, PrecisionArg, TargetArg};
use crate::commands::Outcome;
use crate::error::Error;

pub(super) fn execute(args: &ExportArgs) -> anyhow::Result<Outcome> {
    let options = ExportOptions {
        precision: match args.precision {
            PrecisionArg::Fp32 => Precision::Fp32,
        },
        target: match args.target {
            TargetArg::Ort => Target::Ort,
        },
        vision_tower: args.vision_tower.clone(),
        lora: args.lora.clone(),
        tokenizer: args.tokenizer.clone(),
        overwrite: args.overwrite,
        cancel: super::interrupt_flag(),
    };
    let started = Instant::now();
    let manifest = match recaption_export::export(&args.checkpoint, &args.out, &options) {
        Err(error @ recaption_export::Error::Cancelled) => {
            eprintln!("{error}");
            return Ok(Outcome::Interrupted);
        }
        exported => exported.map_err(Error::from)?,
    };
    if manifest.stop_token_ids.is_empty() {
        eprintln!("warning: the checkpoint names no stop token: every caption will have --max-new-tokens tokens");
    }
    eprintln!(
        "exported `{}` to `{}` in {:.1} s\n{}",
        args.checkpoint.display(),
        args.out.display(),
        started.elapsed().as_secs_f64(),
        describe(&manifest)
    );
    Ok(Outcome::Success)
}

fn describe(manifest: &Manifest) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let graphs = [&manifest.graphs.vision_tower, &manifest.graphs.projector, &manifest.graphs.decoder];
    let mut lines = Vec::new();
    for graph in graphs {
        let size: u64 =
            manifest.files.iter().filter(|file| file.path.starts_with(&graph.file)).map(|file| file.size).sum();
        let parameters = graph.num_parameters as f64 / 1e6;
        lines.push(format!("  {:<18} {parameters:>9.1} M parameters {:>9.1} MB", graph.file, megabytes(size)));
    }
    let total: u64 = manifest.files.iter().map(|file| file.size).sum();
    lines.push(format!("  {:<18} {:>35.1} MB", "all files", megabytes(total)));
    lines.join("\n")
}
