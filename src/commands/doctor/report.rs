//! What `recaption doctor` finds, as numbers for JSON and as lines for people.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::Path;

use serde::Serialize;

use crate::commands::inspect::numbers::counted;
use crate::commands::provider;
use crate::error::{Error, Result};
use crate::model::Bundle;
use crate::pipeline::vision::{check_device, decoder_device};
use crate::runtime::gpu::libraries::Location;
use crate::runtime::gpu::{self, nvml};
use crate::runtime::{Device, ProviderChoice, host, load_library, matmul};

/// Open files that a run with many input shards and stages may take.
const FEW_FILES: u64 = 4096;
/// A product that is further off than this is wrong, not rounded.
const MAX_MATMUL_ERROR: f64 = 1e-2;

/// Everything that was looked at.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    recaption: &'static str,
    /// Whether images can be captioned here: through some provider, and with the bundle if one was named.
    pub(super) can_caption: bool,
    onnxruntime: Found<OnnxRuntime>,
    providers: Vec<ProviderReport>,
    libraries: Vec<LibraryReport>,
    driver: Found<nvml::Driver>,
    processor: Processor,
    memory_available_bytes: Option<u64>,
    open_files: Option<OpenFiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bundle: Option<BundleReport>,
}

/// Something that is there, or why it is not and what to do.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Found<T> {
    Yes(T),
    No {
        reason: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

impl<T> Found<T> {
    fn of(result: Result<T>) -> Self {
        result.map_or_else(|error| Self::no(&error), Self::Yes)
    }

    fn no(error: &Error) -> Self {
        Self::No { reason: error.to_string(), hint: error.hint() }
    }
}

#[derive(Debug, Serialize)]
struct OnnxRuntime {
    path: String,
    version: String,
    /// Providers compiled into it.
    providers: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ProviderReport {
    name: &'static str,
    works: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    matmul_flops_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Debug, Serialize)]
struct LibraryReport {
    name: String,
    what: &'static str,
    found: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// In a Python wheel; libraries without one are the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Processor {
    name: Option<String>,
    architecture: &'static str,
    cores: usize,
    instruction_sets: BTreeMap<&'static str, bool>,
}

#[derive(Debug, Serialize)]
struct OpenFiles {
    soft: u64,
    hard: u64,
}

#[derive(Debug, Serialize)]
struct BundleReport {
    folder: String,
    precision: &'static str,
    target: &'static str,
    /// What `--provider auto` takes.
    auto: Found<String>,
    /// For each provider whether it runs the bundle.
    providers: BTreeMap<&'static str, Found<String>>,
}

impl Report {
    /// # Errors
    /// Only when `model` is no bundle: what is missing is in the report.
    pub(super) fn of_this_machine(model: Option<&Path>) -> Result<Self> {
        let bundle = model.map(Bundle::open).transpose()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let devices = [Device::Cpu, Device::Cuda(0), Device::TensorRt(0)];
        let onnxruntime = Found::of(load_library().map(|library| OnnxRuntime {
            path: library.path.display().to_string(),
            version: library.version.clone(),
            providers: library.providers(),
        }));
        let providers: Vec<ProviderReport> =
            devices.into_iter().map(|device| ProviderReport::of(device, cores)).collect();
        let bundle = bundle.map(|bundle| BundleReport::of(&bundle, &providers, devices));
        let works = |name: &str| providers.iter().any(|provider| provider.name == name && provider.works);
        let can_caption = match &bundle {
            None => works("cpu"),
            Some(bundle) => matches!(bundle.auto, Found::Yes(_)),
        };
        Ok(Self {
            recaption: env!("CARGO_PKG_VERSION"),
            can_caption,
            onnxruntime,
            providers,
            libraries: libraries(),
            driver: match nvml::driver() {
                Ok(driver) => Found::Yes(driver),
                Err(reason) => Found::No { reason, hint: None },
            },
            processor: Processor {
                name: host::processor_name(),
                architecture: std::env::consts::ARCH,
                cores,
                instruction_sets: host::instruction_sets().into_iter().collect(),
            },
            memory_available_bytes: host::available_memory(),
            open_files: host::open_files().map(|(soft, hard)| OpenFiles { soft, hard }),
            bundle,
        })
    }
}

impl ProviderReport {
    fn of(device: Device, num_threads: usize) -> Self {
        let measured = provider::check_machine(&[device]).and_then(|()| matmul::measure(device, num_threads));
        let (rate, failure) = match measured {
            Ok(rate) if rate.error <= MAX_MATMUL_ERROR => (Some(rate.flops_per_second), None),
            Ok(rate) => (None, Some((format!("a matrix product is off by {:.2e} of its size", rate.error), None))),
            // The line says already which provider it is about.
            Err(Error::Provider { reason, hint, .. }) => (None, Some((reason, Some(hint)))),
            Err(error) => (None, Some((error.to_string(), error.hint()))),
        };
        let (reason, hint) = failure.map_or((None, None), |(reason, hint)| (Some(reason), hint));
        Self { name: device.name(), works: rate.is_some(), matmul_flops_per_second: rate, reason, hint }
    }
}

/// Libraries that the providers of the ONNX Runtime in use need; none where it comes without GPU providers.
fn libraries() -> Vec<LibraryReport> {
    let needed = gpu::needed_libraries(Device::TensorRt(0)).or_else(|_| gpu::needed_libraries(Device::Cuda(0)));
    let report = |library: gpu::libraries::NeededLibrary| {
        let origin = library.origin();
        let is_missing = matches!(library.location, Location::Missing(_));
        LibraryReport {
            what: origin.what,
            found: !is_missing,
            version: library.version().map(|version| version.to_string()),
            path: match &library.location {
                Location::Wheel(path) => Some(path.display().to_string()),
                Location::System | Location::Missing(_) => None,
            },
            fix: is_missing.then_some(origin.fix),
            name: library.name,
        }
    };
    needed.unwrap_or_default().into_iter().map(report).collect()
}

impl BundleReport {
    fn of(bundle: &Bundle, working: &[ProviderReport], devices: [Device; 3]) -> Self {
        let manifest = &bundle.manifest;
        let fits = |device| check_device(device, manifest).and_then(|()| provider::check_cpu(device, manifest));
        let runs = |device: Device| match fits(device) {
            Err(error) => Found::no(&error),
            Ok(()) => match working.iter().find(|provider| provider.name == device.name() && !provider.works) {
                Some(provider) => {
                    Found::No { reason: provider.reason.clone().unwrap_or_default(), hint: provider.hint.clone() }
                }
                None => match provider::check_gpu(device, manifest) {
                    Err(error) => Found::no(&error),
                    Ok(()) if device != Device::Cpu && decoder_device(device, manifest) == Device::Cpu => {
                        let reason = provider::cuda_exception(manifest).unwrap_or_default();
                        Found::Yes(format!("runs its vision tower; the decoder runs on the CPU ({reason})"))
                    }
                    Ok(()) if decoder_device(device, manifest) != device => {
                        Found::Yes("runs its vision tower; the decoder runs on CUDA".to_owned())
                    }
                    Ok(()) => Found::Yes("runs".to_owned()),
                },
            },
        };
        Self {
            folder: bundle.folder.display().to_string(),
            precision: manifest.header.precision.name(),
            target: manifest.header.target.name(),
            auto: Found::of(provider::choose(ProviderChoice::Auto, &[0], 1, manifest).map(|choice| choice.line())),
            providers: devices.into_iter().map(|device| (device.name(), runs(device))).collect(),
        }
    }
}

/// A line of the table: a sign, what it is about, what was found; and what to do about it.
struct Line<'a> {
    is_good: bool,
    subject: &'a str,
    text: String,
    hint: Option<&'a str>,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.is_good { "ok" } else { "--" };
        writeln!(f, "{sign}  {:<16} {}", self.subject, self.text)?;
        match self.hint {
            Some(hint) => writeln!(f, "    {:<16} hint: {hint}", ""),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.onnxruntime {
            Found::Yes(OnnxRuntime { path, version, providers }) => {
                let text = format!("{version} at {path}, with {}", providers.join(", "));
                Line { is_good: true, subject: "ONNX Runtime", text, hint: None }.fmt(f)?;
            }
            Found::No { reason, hint } => {
                let (text, hint) = (reason.clone(), hint.as_deref());
                Line { is_good: false, subject: "ONNX Runtime", text, hint }.fmt(f)?;
            }
        }
        let mut told = None;
        for provider in &self.providers {
            let text = match provider.matmul_flops_per_second {
                Some(rate) => format!("works; a matrix product runs at {}FLOP/s", scaled(rate)),
                None => provider.reason.clone().unwrap_or_default(),
            };
            let subject = format!("provider {}", provider.name);
            // What two of them lack is told once.
            let hint = provider.hint.as_deref().filter(|hint| told != Some(*hint));
            told = hint.or(told);
            Line { is_good: provider.works, subject: &subject, text, hint }.fmt(f)?;
        }
        for library in &self.libraries {
            let version = library.version.as_deref().unwrap_or("found");
            let text = match (&library.path, library.found) {
                (_, false) => format!("{}: missing", library.name),
                (Some(path), true) => format!("{}: {version} at {path}", library.name),
                (None, true) => format!("{}: {version}", library.name),
            };
            Line { is_good: library.found, subject: library.what, text, hint: library.fix }.fmt(f)?;
        }
        match &self.driver {
            Found::No { reason, hint } => {
                let (text, hint) = (reason.clone(), hint.as_deref());
                Line { is_good: false, subject: "GPUs", text, hint }.fmt(f)?;
            }
            Found::Yes(driver) => {
                for gpu in &driver.gpus {
                    let (free, total) = (gib(gpu.free_bytes), gib(gpu.total_bytes));
                    let text = format!(
                        "{}: {}, compute capability {}, {free} of {total} GiB free, driver {}",
                        gpu.index, gpu.name, gpu.compute_capability, driver.version
                    );
                    Line { is_good: true, subject: "GPU", text, hint: None }.fmt(f)?;
                }
            }
        }
        self.host_lines(f)?;
        if let Some(bundle) = &self.bundle {
            bundle.fmt(f)?;
        }
        let verdict = match (self.can_caption, &self.bundle) {
            (true, None) => "images can be captioned on this machine",
            (true, Some(_)) => "this machine runs the bundle",
            (false, None) => "images cannot be captioned on this machine yet",
            (false, Some(_)) => "this machine does not run the bundle",
        };
        writeln!(f, "{verdict}")
    }
}

impl Report {
    fn host_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let processor = &self.processor;
        let sets: Vec<&str> =
            processor.instruction_sets.iter().filter(|(_, is_there)| **is_there).map(|(name, _)| *name).collect();
        let name = processor.name.as_deref().unwrap_or(processor.architecture);
        let text = format!("{name}, {}, {}", counted(processor.cores as u64, "core"), sets.join(" "));
        let slow = (!host::sums_8_bit_products_exactly())
            .then(|| format!("no VNNI: for 8-bit weights export {}", provider::INT8_WITHOUT_VNNI));
        Line { is_good: true, subject: "processor", text, hint: slow.as_deref() }.fmt(f)?;
        if let Some(bytes) = self.memory_available_bytes {
            let text = format!("{} GiB available", gib(bytes));
            Line { is_good: true, subject: "memory", text, hint: None }.fmt(f)?;
        }
        if let Some(OpenFiles { soft, hard }) = &self.open_files {
            let is_good = *soft >= FEW_FILES;
            let hint = (!is_good).then_some("raise it before large runs: ulimit -n 65536");
            let text = format!("{soft} at once, may be raised to {hard}");
            Line { is_good, subject: "open files", text, hint }.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for BundleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}: {}, target {}", self.folder, self.precision, self.target);
        Line { is_good: matches!(self.auto, Found::Yes(_)), subject: "bundle", text, hint: None }.fmt(f)?;
        for (name, runs) in &self.providers {
            let subject = format!("  on {name}");
            let text = match runs {
                Found::Yes(text) => text.clone(),
                Found::No { reason, .. } => reason.clone(),
            };
            Line { is_good: matches!(runs, Found::Yes(_)), subject: &subject, text, hint: None }.fmt(f)?;
        }
        let (text, hint) = match &self.auto {
            Found::Yes(line) => (line.clone(), None),
            Found::No { reason, hint } => (reason.clone(), hint.as_deref()),
        };
        Line { is_good: hint.is_none(), subject: "  auto takes", text, hint }.fmt(f)
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

/// `312 G`, `1.21 T`
fn scaled(rate: f64) -> String {
    if rate >= 1e12 { format!("{:.2} T", rate / 1e12) } else { format!("{:.0} G", rate / 1e9) }
}
