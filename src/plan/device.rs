//! Devices to plan for: peak rates and memory. GPUs stand in a table made from their makers' datasheets.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Dense rates, without sparsity; where a datasheet gives only the rate with it, half of that. `scripts/gpu/peaks.py` reads the
/// same file.
const TABLE: &str = include_str!("gpus.json");

/// What a device can do at most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    /// `h100-sxm`, or what the user described.
    pub kind: String,
    /// Floating-point operations per second of matrix products on 16-bit floats.
    pub fp16_flops: f64,
    /// The same on 8-bit floats, where the device has them.
    pub fp8_flops: Option<f64>,
    /// The same on 8-bit integers, where they are run as such: on CPUs.
    pub int8_flops: Option<f64>,
    /// The same on 32-bit floats, where they are run as such: on CPUs.
    pub fp32_flops: Option<f64>,
    /// Bytes per second that it reads from its memory.
    pub bytes_per_second: f64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Where the numbers come from.
    pub source: String,
    /// Whether it is a GPU.
    pub is_gpu: bool,
}

/// A row of the table.
#[derive(Deserialize)]
struct Gpu {
    kind: String,
    /// What the driver calls it, less the maker's name; a star at the end stands for anything.
    names: Vec<String>,
    fp16_tflops: f64,
    fp8_tflops: Option<f64>,
    terabytes_per_second: f64,
    gigabytes: f64,
    source: String,
}

impl From<Gpu> for Device {
    fn from(gpu: Gpu) -> Self {
        Self {
            kind: gpu.kind,
            fp16_flops: gpu.fp16_tflops * 1e12,
            fp8_flops: gpu.fp8_tflops.map(|rate| rate * 1e12),
            int8_flops: None,
            fp32_flops: None,
            bytes_per_second: gpu.terabytes_per_second * 1e12,
            memory_bytes: (gpu.gigabytes * 1e9) as u64,
            source: gpu.source,
            is_gpu: true,
        }
    }
}

fn rows() -> Vec<Gpu> {
    serde_json::from_str(TABLE).expect("bug: a test reads the table")
}

impl Device {
    /// All of the table, in its order.
    #[must_use]
    pub fn table() -> Vec<Self> {
        rows().into_iter().map(Self::from).collect()
    }

    /// The GPU that the driver calls `name`, if it is in the table.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        let name = name.trim().trim_start_matches("NVIDIA ").trim_start_matches("GeForce ");
        let is_it = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        };
        rows().into_iter().find(|gpu| gpu.names.iter().any(is_it)).map(Self::from)
    }

    /// What each of `num_engines` has that use it at once: engines on a CPU have their own threads, on a GPU its time.
    #[must_use]
    pub fn share(&self, num_engines: usize) -> Self {
        let share = |rate: f64| rate / num_engines.max(1) as f64;
        Self {
            fp16_flops: share(self.fp16_flops),
            fp8_flops: self.fp8_flops.map(share),
            int8_flops: self.int8_flops.map(share),
            fp32_flops: self.fp32_flops.map(share),
            bytes_per_second: share(self.bytes_per_second),
            ..self.clone()
        }
    }

    /// The GPU of this name.
    ///
    /// # Errors
    /// [`Error::Setting`] for one that is not in the table.
    pub fn of_kind(kind: &str) -> Result<Self> {
        let table = Self::table();
        let names: Vec<String> = table.iter().map(|device| device.kind.clone()).collect();
        table.into_iter().find(|device| device.kind == kind.to_ascii_lowercase()).ok_or_else(|| Error::Setting {
            reason: format!("--device-kind: no GPU `{kind}` in the table, which has {}", names.join(", ")),
            hint: "describe another with --peak-tflops, --bandwidth and --memory".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_table_is_whole_and_plausible() {
        let table = Device::table();
        assert!(table.len() >= 15);
        assert_eq!(table.iter().map(|device| &device.kind).collect::<HashSet<_>>().len(), table.len());
        for device in table {
            // All of them do 60 to 450 operations for each byte they read, and 8-bit floats twice as fast as 16-bit ones.
            let intensity = device.fp16_flops / device.bytes_per_second;
            assert!((60.0..450.0).contains(&intensity), "{device:?}");
            let ratio = device.fp8_flops.map_or(2.0, |fp8| fp8 / device.fp16_flops);
            assert!((1.98..2.03).contains(&ratio), "{device:?}");
            assert!((15e9..300e9).contains(&(device.memory_bytes as f64)) && device.source.starts_with("NVIDIA "));
        }
    }

    #[test]
    fn drivers_names_are_known() {
        let kind = |name: &str| Device::of_name(name).map(|device| device.kind);
        assert_eq!(kind("NVIDIA H100 80GB HBM3").as_deref(), Some("h100-sxm"));
        assert_eq!(kind("NVIDIA H100 SXM5 80GB").as_deref(), Some("h100-sxm"));
        assert_eq!(kind("NVIDIA A100 80GB PCIe").as_deref(), Some("a100-80-pcie"));
        assert_eq!(kind("NVIDIA GeForce RTX 4090").as_deref(), Some("rtx-4090"));
        assert_eq!(kind("NVIDIA L40").as_deref(), Some("l40"));
        assert_eq!(kind("NVIDIA L400"), None);
    }

    #[test]
    fn an_unknown_kind_is_refused_with_the_known_ones() {
        assert_eq!(Device::of_kind("H100-SXM").unwrap().fp16_flops, 989.4e12);
        let error = Device::of_kind("h101").unwrap_err();
        assert!(error.to_string().contains("h100-sxm") && error.hint().unwrap().contains("--bandwidth"), "{error}");
    }
}
