//! Utilisation and power of GPUs during a run, asked of NVIDIA's management library ten times a second.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::profile::GpuProfile;
use crate::runtime::gpu::nvml::{Meter, Sample};

const INTERVAL: Duration = Duration::from_millis(100);

/// Samples until it is stopped.
pub(crate) struct GpuSampler {
    stop: Sender<()>,
    thread: JoinHandle<Vec<Gpu>>,
}

struct Gpu {
    index: u32,
    name: String,
    samples: Vec<Sample>,
}

impl GpuSampler {
    /// Starts to sample these GPUs, if there are any.
    ///
    /// # Errors
    /// The library's reason when it cannot be asked.
    pub(crate) fn start(indices: &[u32]) -> Result<Option<Self>, String> {
        if indices.is_empty() {
            return Ok(None);
        }
        let meter = Meter::open()?;
        let gpu = |&index: &u32| Ok(Gpu { index, name: meter.name(index)?, samples: Vec::new() });
        let mut gpus = indices.iter().map(gpu).collect::<Result<Vec<_>, String>>()?;
        let (stop, stopped) = channel();
        let sample = move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                for gpu in &mut gpus {
                    // A reading that fails now and then is one less.
                    gpu.samples.extend(meter.sample(gpu.index).ok());
                }
            }
            gpus
        };
        let thread = std::thread::Builder::new().name("gpus".to_owned()).spawn(sample);
        thread.map(|thread| Some(Self { stop, thread })).map_err(|error| error.to_string())
    }

    /// Stops, and sums up.
    pub(crate) fn finish(self, wall_seconds: f64) -> Vec<GpuProfile> {
        drop(self.stop);
        let gpus = self.thread.join().unwrap_or_default();
        gpus.into_iter().map(|gpu| summarise(gpu, wall_seconds)).collect()
    }
}

fn summarise(gpu: Gpu, wall_seconds: f64) -> GpuProfile {
    let Gpu { index, name, samples } = gpu;
    let mean = |what: fn(&Sample) -> f64| samples.iter().map(what).sum::<f64>() / samples.len().max(1) as f64;
    let mean_watts = mean(|sample| sample.watts);
    GpuProfile {
        index,
        name,
        num_samples: samples.len() as u64,
        utilisation: mean(|sample| sample.utilisation),
        memory_utilisation: mean(|sample| sample.memory_utilisation),
        mean_watts,
        max_watts: samples.iter().map(|sample| sample.watts).fold(0.0, f64::max),
        joules: mean_watts * wall_seconds,
        max_memory_bytes: samples.iter().map(|sample| sample.memory_bytes).max().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_become_means_and_energy() {
        let sample = |utilisation, watts| Sample { utilisation, memory_utilisation: 0.5, watts, memory_bytes: 7 };
        let gpu = Gpu { index: 1, name: "x".to_owned(), samples: vec![sample(0.8, 300.0), sample(1.0, 500.0)] };
        let found = summarise(gpu, 10.0);
        assert_eq!((found.mean_watts, found.max_watts, found.joules), (400.0, 500.0, 4000.0));
        assert!((found.utilisation - 0.9).abs() < 1e-12 && found.num_samples == 2 && found.max_memory_bytes == 7);
    }

    #[test]
    fn nothing_is_sampled_on_a_cpu() {
        assert!(GpuSampler::start(&[]).unwrap().is_none());
    }
}
