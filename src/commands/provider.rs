//! What `--provider` and `--device` mean on this machine: exactly what was asked for or an error, and for `auto` the best
//! that works, with the reason. Shared by `run` and `doctor`.

use recaption_export::{Manifest, Precision, Target, lint};

use crate::error::{Error, Result};
use crate::pipeline::vision::{check_device, decoder_device};
use crate::runtime::{self, Device, ProviderChoice, host, load_library, provider};

/// What the engines run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// One engine each.
    pub(super) devices: Vec<Device>,
    /// What the first device leaves to another.
    pub(super) decoder: Device,
    /// Why not something better.
    pub(super) reason: Option<String>,
}

impl Choice {
    /// `provider: tensorrt, decoder: cuda (…)`
    pub(super) fn line(&self) -> String {
        let device = self.devices.first().copied().unwrap_or(Device::Cpu);
        let mut line = format!("provider: {}", device.name());
        if self.decoder != device {
            line.push_str(&format!(", decoder: {}", self.decoder.name()));
        }
        if let Some(reason) = &self.reason {
            line.push_str(&format!(" ({reason})"));
        }
        line
    }
}

/// Chooses for the bundle of `manifest`: `gpus` are the indices of `--device`, `cpu_engines` is how many engines a CPU gets.
///
/// # Errors
/// [`Error::Provider`] when what was asked for does not work here, [`Error::Setting`] when the bundle does not go with it.
pub(super) fn choose(choice: ProviderChoice, gpus: &[i32], cpu_engines: usize, manifest: &Manifest) -> Result<Choice> {
    load_library()?;
    let with = |device: fn(i32) -> Device| -> Vec<Device> { gpus.iter().map(|&index| device(index)).collect() };
    let on_cpu = || vec![Device::Cpu; cpu_engines];
    let chosen = |devices: Vec<Device>, reason| {
        let device = devices.first().copied().unwrap_or(Device::Cpu);
        let decoder = decoder_device(device, manifest);
        let reason = if decoder == Device::Cpu && device != decoder { cuda_exception(manifest) } else { reason };
        Choice { devices, decoder, reason }
    };
    let asked = match choice {
        ProviderChoice::Cpu => on_cpu(),
        ProviderChoice::Cuda => with(Device::Cuda),
        ProviderChoice::TensorRt => with(Device::TensorRt),
        ProviderChoice::Auto => {
            // Without a driver there is nothing to say of what CUDA would do.
            let (candidates, mut reasons) = match runtime::has_nvidia_driver() {
                true => (vec![with(Device::TensorRt), with(Device::Cuda)], vec![]),
                false => (vec![], vec!["no NVIDIA driver".to_owned()]),
            };
            for devices in candidates {
                let first = devices.first().copied().unwrap_or(Device::Cuda(0));
                if let Some(reason) = why_not(first, manifest) {
                    reasons.push(reason);
                    continue;
                }
                match check_all(&devices, manifest) {
                    Ok(()) => return Ok(chosen(devices, reasons.into_iter().next())),
                    // CUDA works: what was asked of it does not.
                    Err(error @ Error::NoSuchGpu { .. }) => return Err(error),
                    Err(Error::Provider { reason, .. }) => reasons.push(format!("no {}: {reason}", title(first))),
                    Err(error) => reasons.push(format!("no {}: {error}", title(first))),
                }
            }
            // Whatever CUDA lacks, TensorRT lacks as well; but fp8 is for TensorRT alone.
            let reason = match manifest.header.precision {
                Precision::Fp8 => reasons.into_iter().next(),
                _ => reasons.pop(),
            };
            check_all(&[Device::Cpu], manifest).map_err(|error| match (error, &reason) {
                (Error::Setting { reason: cpu, hint }, Some(gpu)) => {
                    Error::Setting { reason: format!("{cpu}; {gpu}"), hint }
                }
                (error, _) => error,
            })?;
            return Ok(chosen(on_cpu(), reason));
        }
    };
    check_all(&asked, manifest)?;
    Ok(chosen(asked, None))
}

/// Why `auto` leaves out a device that would work.
fn why_not(device: Device, manifest: &Manifest) -> Option<String> {
    if let Err(error) = check_device(device, manifest) {
        return Some(error.to_string());
    }
    let reason = cuda_exception(manifest).filter(|_| decoder_device(device, manifest) == Device::Cpu);
    reason.map(|reason| format!("{reason}; --provider cuda runs the vision tower on the GPU"))
}

/// Why the bundle's decoder does not run on CUDA.
pub(super) fn cuda_exception(manifest: &Manifest) -> Option<String> {
    lint::cuda_exception(&manifest.header).map(str::to_owned)
}

fn title(device: Device) -> &'static str {
    match device {
        Device::Cpu => "CPU",
        Device::Cuda(_) => "CUDA",
        Device::TensorRt(_) => "TensorRT",
    }
}

/// Checks that the bundle goes with each of `devices`, and that they work.
fn check_all(devices: &[Device], manifest: &Manifest) -> Result<()> {
    for &device in devices {
        check_device(device, manifest)?;
        check_cpu(device, manifest)?;
    }
    check_machine(devices)?;
    devices.iter().try_for_each(|&device| check_gpu(device, manifest))
}

/// The first compute capability with fp8 products: Ada; Hopper is 9.0.
const FP8_CAPABILITY: (i32, i32) = (8, 9);

/// # Errors
/// [`Error::Setting`] when the GPU, which CUDA must see, cannot multiply in the bundle's precision.
pub(super) fn check_gpu(device: Device, manifest: &Manifest) -> Result<()> {
    match (device.gpu_index(), manifest.header.precision) {
        (Some(index), Precision::Fp8) => check_fp8(index, runtime::compute_capability(index)?),
        _ => Ok(()),
    }
}

fn check_fp8(index: i32, (major, minor): (i32, i32)) -> Result<()> {
    if (major, minor) >= FP8_CAPABILITY {
        return Ok(());
    }
    Err(Error::Setting {
        reason: format!(
            "fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper); GPU {index} has {major}.{minor}"
        ),
        hint: "export with --precision fp16 --target tensorrt".to_owned(),
    })
}

/// Whether this machine has what `devices`, all of one kind, need: libraries, versions, driver, the GPUs themselves, and the
/// provider.
pub(super) fn check_machine(devices: &[Device]) -> Result<()> {
    let Some(first) = devices.iter().find(|device| device.gpu_index().is_some()) else { return Ok(()) };
    runtime::check_libraries(*first)?;
    let count = runtime::num_gpus()?;
    if let Some(index) =
        devices.iter().filter_map(|device| device.gpu_index()).find(|index| !(0..count).contains(index))
    {
        let there = runtime::gpu_names().unwrap_or_default();
        let listed = if there.is_empty() { String::new() } else { format!(": {}", there.join(", ")) };
        return Err(Error::NoSuchGpu { index, count, listed });
    }
    devices.iter().try_for_each(|&device| provider::probe(device))
}

/// What a processor without VNNI takes instead of int8 bundles of ONNX Runtime's operators.
pub(super) const INT8_WITHOUT_VNNI: &str = "with --precision int8 --target cpu, which is exact and fast on any processor; or, for ONNX Runtime's own operators, with \
     --precision int8-block or int8 --reduce-range";

/// # Errors
/// [`Error::Setting`] when this processor would sum the bundle's integers wrongly.
pub(super) fn check_cpu(device: Device, manifest: &Manifest) -> Result<()> {
    let is_int8 = [manifest.header.precision, manifest.header.vision_precision].contains(&Precision::Int8);
    let is_exact =
        manifest.header.reduce_range || manifest.header.target == Target::Cpu || host::sums_8_bit_products_exactly();
    if device != Device::Cpu || !is_int8 || is_exact {
        return Ok(());
    }
    Err(Error::Setting {
        reason: "this processor has no VNNI: ONNX Runtime's sums of 8-bit products would overflow".to_owned(),
        hint: format!("export again {INT8_WITHOUT_VNNI}"),
    })
}

/// Whether the operators of target cpu would be faster here with the bundle's weights reduced.
pub(super) fn is_for_others(device: Device, manifest: &Manifest) -> bool {
    let header = &manifest.header;
    device == Device::Cpu
        && header.target == Target::Cpu
        && !header.reduce_range
        && !host::sums_8_bit_products_exactly()
}

#[cfg(test)]
mod tests {
    use recaption_export::{BundleManifest, ExportOptions, Target, export};

    use super::*;

    fn manifest(options: &ExportOptions) -> Manifest {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/checkpoints/published-f16");
        match export(checkpoint.as_ref(), &folder.path().join("bundle"), options).unwrap() {
            BundleManifest::Llava(manifest) => *manifest,
            BundleManifest::Clip(_) => unreachable!("a captioner"),
        }
    }

    /// What `auto` has against TensorRT and CUDA, and where the decoder goes when TensorRT has the vision tower.
    #[test]
    fn auto_wants_vision_on_tensorrt_and_the_decoder_where_it_has_kernels() {
        let (trt, cuda) = (Device::TensorRt(1), Device::Cuda(1));
        let of = |precision| ExportOptions { precision, ..ExportOptions::default() };
        let standard = |precision| ExportOptions { target: Target::TensorRt, ..of(precision) };
        let half = ExportOptions { activations: Some(Precision::Fp16), ..of(Precision::Int4) };
        let half_vision = ExportOptions { vision_precision: Some(Precision::Fp16), ..half.clone() };
        let blocks = "provider tensorrt does not run int8-block vision towers";
        let no_fp8 = "provider cuda does not run fp8 bundles";
        let cases = [
            (of(Precision::Fp16), None, None, cuda),
            (of(Precision::Bf16), None, None, cuda),
            (half, Some(blocks), None, cuda),
            (half_vision, None, None, cuda),
            (standard(Precision::Fp16), None, None, trt),
            (standard(Precision::Fp8), None, Some(no_fp8), trt),
        ];
        for (options, on_tensorrt, on_cuda, decoder) in cases {
            let manifest = manifest(&options);
            assert_eq!(why_not(trt, &manifest).as_deref(), on_tensorrt, "{options:?}");
            assert_eq!(why_not(cuda, &manifest).as_deref(), on_cuda, "{options:?}");
            assert_eq!(decoder_device(trt, &manifest), decoder, "{options:?}");
        }
        let exact = manifest(&of(Precision::Fp32));
        assert_eq!(decoder_device(trt, &exact), Device::Cpu);
        assert!(why_not(trt, &exact).is_some_and(|reason| reason.contains("f16 and bf16 only")));
    }

    #[test]
    fn fp8_wants_an_ada_or_later() {
        for capability in [(8, 9), (9, 0), (10, 0), (12, 1)] {
            check_fp8(0, capability).unwrap();
        }
        for (capability, text) in [((8, 6), "GPU 1 has 8.6"), ((7, 5), "GPU 1 has 7.5")] {
            let error = check_fp8(1, capability).unwrap_err();
            assert!(error.to_string().contains(text) && error.hint().is_some(), "{error}");
        }
    }
}
