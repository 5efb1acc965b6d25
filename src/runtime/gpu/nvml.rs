//! The GPUs of the machine, through NVIDIA's management library, which comes with the driver and is loaded at run time.

use std::ffi::OsStr;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde::Serialize;

/// The name that the driver installs.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Gpu {
    /// Among the machine's GPUs, in the order of their slots: as CUDA counts with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) uuid: String,
    /// `9.0`
    pub(crate) compute_capability: String,
    pub(crate) total_bytes: u64,
    pub(crate) free_bytes: u64,
}

/// The driver and its GPUs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Driver {
    /// `580.65.06`
    pub(crate) version: String,
    pub(crate) gpus: Vec<Gpu>,
}

/// What a GPU does at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sample {
    /// Share of the time of late in which a kernel ran.
    pub(crate) utilisation: f64,
    /// Share of the time of late in which memory was read or written.
    pub(crate) memory_utilisation: f64,
    pub(crate) watts: f64,
    /// In use, by anybody.
    pub(crate) memory_bytes: u64,
}

/// Reads what GPUs do; counts them as [`Gpu`] does.
pub(crate) struct Meter(Nvml);

impl Meter {
    /// # Errors
    /// Why there is no driver to ask.
    pub(crate) fn open() -> Result<Self, String> {
        Self::with_library(OsStr::new(LIBRARY))
    }

    fn with_library(library: &OsStr) -> Result<Self, String> {
        Nvml::builder().lib_path(library).init().map(Self).map_err(describe)
    }

    /// # Errors
    /// When there is no such GPU.
    pub(crate) fn name(&self, index: u32) -> Result<String, String> {
        self.0.device_by_index(index).and_then(|device| device.name()).map_err(describe)
    }

    /// # Errors
    /// When the GPU does not tell.
    pub(crate) fn sample(&self, index: u32) -> Result<Sample, String> {
        let read = || -> Result<Sample, NvmlError> {
            let device = self.0.device_by_index(index)?;
            let rates = device.utilization_rates()?;
            Ok(Sample {
                utilisation: f64::from(rates.gpu) / 100.0,
                memory_utilisation: f64::from(rates.memory) / 100.0,
                watts: f64::from(device.power_usage()?) / 1000.0,
                memory_bytes: device.memory_info()?.used,
            })
        };
        read().map_err(describe)
    }
}

/// The driver, or why there is none.
pub(crate) fn driver() -> Result<Driver, String> {
    read(OsStr::new(LIBRARY)).map_err(describe)
}

fn describe(error: NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(error) => {
            format!("no NVIDIA driver: {}", std::error::Error::source(&error).unwrap_or(&error))
        }
        NvmlError::DriverNotLoaded => "the NVIDIA driver is installed but not loaded".to_owned(),
        error => format!("NVIDIA's management library: {error}"),
    }
}

fn read(library: &OsStr) -> Result<Driver, NvmlError> {
    let nvml = Nvml::builder().lib_path(library).init()?;
    let gpu = |index| -> Result<Gpu, NvmlError> {
        let device = nvml.device_by_index(index)?;
        let (memory, capability) = (device.memory_info()?, device.cuda_compute_capability()?);
        Ok(Gpu {
            index,
            name: device.name()?,
            uuid: device.uuid()?,
            compute_capability: format!("{}.{}", capability.major, capability.minor),
            total_bytes: memory.total,
            free_bytes: memory.free,
        })
    };
    let gpus = (0..nvml.device_count()?).map(gpu).collect::<Result<_, _>>()?;
    Ok(Driver { version: nvml.sys_driver_version()?, gpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two GPUs, by nvml.h.
    const FAKE: &str = r#"
        #include <string.h>
        typedef struct { unsigned long long total, free, used; } Memory;
        typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
        int nvmlInit_v2(void) { return 0; }
        int nvmlShutdown(void) { return 0; }
        int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
        int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(size_t)(index + 1); return 0; }
        int nvmlDeviceGetName(void *device, char *name, unsigned length) { strcpy(name, "NVIDIA H100 80GB HBM3"); return 0; }
        int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
            strcpy(uuid, device == (void *)1 ? "GPU-a" : "GPU-b");
            return 0;
        }
        int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
            memory->total = 85899345920; memory->free = 85000000000; memory->used = 899345920;
            return 0;
        }
        int nvmlDeviceGetMemoryInfo_v2(void *device, Memory2 *memory) {
            memory->total = 85899345920; memory->free = 85000000000; memory->used = 899345920;
            return 0;
        }
        int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
        typedef struct { unsigned gpu, memory; } Rates;
        int nvmlDeviceGetUtilizationRates(void *device, Rates *rates) { rates->gpu = 93; rates->memory = 41; return 0; }
        int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 612500; return 0; }
        int nvmlSystemGetDriverVersion(char *version, unsigned length) { strcpy(version, "580.65.06"); return 0; }
        const char *nvmlErrorString(int status) { return "error"; }
    "#;

    #[test]
    fn every_gpu_is_listed_with_its_memory() {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("nvml.c"), folder.path().join("libnvidia-ml.so.1"));
        std::fs::write(&source, FAKE).unwrap();
        let output =
            std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let driver = read(library.as_os_str()).unwrap();
        assert_eq!((driver.version.as_str(), driver.gpus.len()), ("580.65.06", 2));
        let gpu = &driver.gpus[1];
        assert_eq!((gpu.index, gpu.uuid.as_str(), gpu.compute_capability.as_str()), (1, "GPU-b", "9.0"));
        assert_eq!((gpu.total_bytes, gpu.free_bytes), (85_899_345_920, 85_000_000_000));

        let meter = Meter::with_library(library.as_os_str()).unwrap();
        assert_eq!(meter.name(0).unwrap(), "NVIDIA H100 80GB HBM3");
        let expected = Sample { utilisation: 0.93, memory_utilisation: 0.41, watts: 612.5, memory_bytes: 899_345_920 };
        assert_eq!(meter.sample(1).unwrap(), expected);
    }

    #[test]
    fn without_a_driver_the_reason_names_the_library() {
        let error = read(OsStr::new("libnvidia-ml-that-is-not-there.so.1")).unwrap_err();
        assert!(matches!(error, NvmlError::LibloadingError(_)), "{error}");
        if let Err(reason) = driver() {
            assert!(reason.contains(LIBRARY) || reason.contains("driver"), "{reason}");
        }
    }
}
