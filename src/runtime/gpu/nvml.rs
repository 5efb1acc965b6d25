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

/// The driver, or why there is none.
pub(crate) fn driver() -> Result<Driver, String> {
    read(OsStr::new(LIBRARY)).map_err(|error| match error {
        NvmlError::LibloadingError(error) => {
            format!("no NVIDIA driver: {}", std::error::Error::source(&error).unwrap_or(&error))
        }
        NvmlError::DriverNotLoaded => "the NVIDIA driver is installed but not loaded".to_owned(),
        error => format!("NVIDIA's management library: {error}"),
    })
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
