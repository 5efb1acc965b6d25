//! `recaption profile`: a run whose captions are thrown away, and what it says about the machine.

mod table;

use std::collections::BTreeSet;
use std::io::{BufWriter, Write};
use std::path::Path;

use recaption_export::MANIFEST_FILE;

use crate::cli::ProfileArgs;
use crate::commands::Outcome;
use crate::commands::captioning;
use crate::commands::run::SETTINGS_FILE;
use crate::console::{print_error, print_line, print_warning};
use crate::error::{Error, Result};
use crate::pipeline::engine::EngineOptions;
use crate::pipeline::write::{AtomicFile, OutputOptions, Sink, write_atomically};
use crate::pipeline::{self, Summary};
use crate::profile::gpu::GpuSampler;
use crate::profile::operators::read_profiles;
use crate::profile::recorder::Recorder;
use crate::profile::{Profile, Setup, assemble, peaks, render_report, write_trace};
use crate::runtime::{Device, host};
use crate::storage::Location;

pub(super) const PROFILE_FILE: &str = "profile.json";
const TRACE_FILE: &str = "trace.json";
const REPORT_FILE: &str = "report.html";

pub(super) fn execute(args: &ProfileArgs) -> anyhow::Result<Outcome> {
    let out = args.out.as_path();
    refuse_others(out)?;
    recaption_export::check_folder(out).map_err(Error::from)?;
    let mut options =
        captioning::check(&args.inputs, &args.model, &args.captioning)?.options(Sink::StandardOutput, false)?;
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    // The real sink, so that writing is measured as it is; the folder goes when this returns.
    let captions = tempfile::Builder::new().prefix(".captions-").tempdir_in(out).map_err(Error::io("create", out))?;
    options.sink = Sink::Folder(OutputOptions::private(captions.path().to_owned()));
    let recorder = Recorder::new(true, None);
    options.recorder = (!args.no_record).then(|| recorder.clone());
    let setup = Setup::of(&options)?;
    let device = options.engines.first().map_or(Device::Cpu, |engine| engine.device);
    let num_threads = options.engines.iter().map(|engine| engine.num_threads).sum();

    let ort_profiles = tempfile::Builder::new().prefix(".ort-").tempdir_in(out).map_err(Error::io("create", out))?;
    if args.ort_profile {
        for (i, engine) in options.engines.iter_mut().enumerate() {
            engine.ort_profile = Some(ort_profiles.path().join(format!("{i}-")));
        }
    }
    let gpus = gpu_indices(&options.engines);

    let run = pipeline::load_model(options)?;
    let sampler = GpuSampler::start(&gpus).unwrap_or_else(|reason| {
        print_warning(&format!("utilisation and power of the GPUs are left out: {reason}"));
        None
    });
    let cpu_before = host::process_cpu_seconds();
    let summary = run.run()?;
    let cpu_seconds = host::process_cpu_seconds().zip(cpu_before).map(|(after, before)| after - before);
    let gpus = sampler.map_or_else(Vec::new, |sampler| sampler.finish(summary.run_seconds));
    drop(captions);
    report_damage(&summary);

    let peaks = match args.no_peaks {
        true => None,
        false => Some(peaks::measure(device, &setup.bundle, num_threads)?),
    };
    let records = recorder.take();
    let title = format!("recaption profile: {}", setup.bundle.name);
    let operators = match args.ort_profile {
        true => Some(read_profiles(ort_profiles.path())?),
        false => None,
    };
    let profile = Profile { operators, gpus, ..assemble(setup, &summary, cpu_seconds, &records, peaks)? };
    write_file(&out.join(PROFILE_FILE), |file| Ok(serde_json::to_writer_pretty(file, &profile)?))?;
    write_file(&out.join(TRACE_FILE), |file| write_trace(&records, &title, file))?;
    let report = render_report(&profile, &records)?;
    write_file(&out.join(REPORT_FILE), |file| file.write_all(report.as_bytes()))?;
    let text = if args.json { serde_json::to_string_pretty(&profile)? + "\n" } else { table::render(&profile) };
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(Error::io("write", Path::new("standard output")))?;
    if !args.captioning.quiet {
        print_line(&format!("profile in `{}`", out.display()));
    }
    Ok(outcome(&summary))
}

/// # Errors
/// [`Error::Setting`] when the folder holds something whose files are better not mixed with a profile's.
fn refuse_others(out: &Path) -> Result<()> {
    let kinds = [(SETTINGS_FILE, "the captions of a run"), (MANIFEST_FILE, "a bundle")];
    match kinds.into_iter().find(|(file, _)| out.join(file).is_file()) {
        Some((file, what)) => Err(Error::Setting {
            reason: format!("--out `{}` has a {file}: it holds {what}", out.display()),
            hint: "name a folder of its own for the profile".to_owned(),
        }),
        None => Ok(()),
    }
}

/// The GPUs that engines run on.
fn gpu_indices(engines: &[EngineOptions]) -> Vec<u32> {
    let indices = engines.iter().filter_map(|engine| u32::try_from(engine.device.gpu_index()?).ok());
    indices.collect::<BTreeSet<u32>>().into_iter().collect()
}

fn report_damage(summary: &Summary) {
    for damage in summary.damaged_inputs.iter().chain(&summary.failed_engines) {
        print_error(damage, None);
    }
}

fn outcome(summary: &Summary) -> Outcome {
    match summary {
        Summary { is_interrupted: true, .. } => Outcome::Interrupted,
        Summary { counts, damaged_inputs, .. } if counts.failed > 0 || !damaged_inputs.is_empty() => {
            Outcome::SomeFailed
        }
        _ => Outcome::Success,
    }
}

fn write_file(path: &Path, write: impl FnOnce(&mut BufWriter<&mut AtomicFile>) -> std::io::Result<()>) -> Result<()> {
    write_atomically(&Location::from(path), |file| {
        let mut buffered = BufWriter::new(file);
        write(&mut buffered).and_then(|()| buffered.flush()).map_err(Error::io("write", path))
    })
}
