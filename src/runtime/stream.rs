//! The order of work of one engine: its copies and its graph runs go through one stream. On the CPU a stream does at once
//! what it is given; on a GPU it queues it, and [`Stream::synchronize`] waits for it. The code around it is the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::runtime::buffer::Buffer;
pub(crate) use crate::runtime::cuda::Rows;
use crate::runtime::cuda::{CudaStream, CudaTimer};
use crate::runtime::provider::Device;

/// Copies and graph runs, in the order they were asked for.
pub(crate) struct Stream {
    queue: Queue,
    counts: Counters,
}

enum Queue {
    Host,
    Cuda(CudaStream),
}

#[derive(Default)]
struct Counters {
    uploads: AtomicU64,
    downloads: AtomicU64,
    waits: AtomicU64,
    uploaded_bytes: AtomicU64,
    downloaded_bytes: AtomicU64,
}

/// What has gone between host and device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyCounts {
    /// Copies from host to device.
    pub uploads: u64,
    /// Copies from device to host.
    pub downloads: u64,
    /// Times that the host waited for the device.
    pub waits: u64,
    /// Bytes of the uploads.
    pub uploaded_bytes: u64,
    /// Bytes of the downloads.
    pub downloaded_bytes: u64,
}

impl Stream {
    /// # Errors
    /// [`crate::Error::Cuda`] when there is no such GPU.
    pub(crate) fn open(device: Device) -> Result<Arc<Self>> {
        let queue = match device.gpu_index() {
            None => Queue::Host,
            Some(index) => Queue::Cuda(CudaStream::new(index)?),
        };
        Ok(Arc::new(Self { queue, counts: Counters::default() }))
    }

    /// The stream that providers put their kernels into; none on the CPU.
    pub(super) fn handle(&self) -> Option<*mut ()> {
        match &self.queue {
            Queue::Host => None,
            Queue::Cuda(stream) => Some(stream.handle()),
        }
    }

    /// Copies the first `num_bytes` of `staging` (host) to the start of `device`. `staging` must not change before the next
    /// [`Self::synchronize`].
    pub(crate) fn upload(&self, staging: &Buffer, device: &mut Buffer, num_bytes: usize) -> Result<()> {
        self.counts.uploads.fetch_add(1, Ordering::Relaxed);
        self.counts.uploaded_bytes.fetch_add(num_bytes as u64, Ordering::Relaxed);
        self.copy_start(staging, device, num_bytes)
    }

    /// Copies the first `num_bytes` of `device` to the start of `staging`, which holds them after the next
    /// [`Self::synchronize`].
    pub(crate) fn download(&self, device: &Buffer, staging: &mut Buffer, num_bytes: usize) -> Result<()> {
        self.counts.downloads.fetch_add(1, Ordering::Relaxed);
        self.counts.downloaded_bytes.fetch_add(num_bytes as u64, Ordering::Relaxed);
        self.copy_start(device, staging, num_bytes)
    }

    fn copy_start(&self, from: &Buffer, to: &mut Buffer, num_bytes: usize) -> Result<()> {
        let fits = num_bytes <= from.num_bytes() && num_bytes <= to.num_bytes();
        assert!(fits, "bug: {num_bytes} bytes of {} into {}", from.num_bytes(), to.num_bytes());
        let (from, to) = (from.address().as_ptr(), to.address().as_ptr());
        // SAFETY: both allocations have so many bytes and are two (one is borrowed mutably); the buffers outlive the
        // stream's work, since engines drop them after their last wait.
        unsafe {
            match &self.queue {
                Queue::Host => to.copy_from_nonoverlapping(from, num_bytes),
                Queue::Cuda(stream) => stream.copy(to, from, num_bytes)?,
            }
        }
        Ok(())
    }

    /// Copies `rows` within `buffer` from byte `from` to byte `to`; the two must not overlap.
    pub(crate) fn copy_rows(&self, buffer: &mut Buffer, from: usize, to: usize, rows: Rows) -> Result<()> {
        let span = rows.num_rows.saturating_sub(1) * rows.pitch + rows.row_bytes;
        let is_inside = from.max(to) + span <= buffer.num_bytes();
        assert!(is_inside && from.abs_diff(to) >= span, "bug: {rows:?} from {from} to {to}");
        let data = buffer.address().as_ptr();
        // SAFETY: both places are inside the allocation and apart (checked above).
        unsafe {
            let (from, to) = (data.add(from), data.add(to));
            match &self.queue {
                Queue::Cuda(stream) => stream.copy_rows(to, from, rows)?,
                Queue::Host => (0..rows.num_rows).for_each(|row| {
                    let offset = row * rows.pitch;
                    to.add(offset).copy_from_nonoverlapping(from.add(offset), rows.row_bytes);
                }),
            }
        }
        Ok(())
    }

    /// Fills `buffer` with zeros.
    pub(super) fn zero(&self, buffer: &mut Buffer) -> Result<()> {
        let (data, num_bytes) = (buffer.address().as_ptr(), buffer.num_bytes());
        // SAFETY: the allocation has so many bytes.
        unsafe {
            match &self.queue {
                Queue::Host => data.write_bytes(0, num_bytes),
                Queue::Cuda(stream) => stream.zero(data, num_bytes)?,
            }
        }
        Ok(())
    }

    /// Waits until everything before is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.counts.waits.fetch_add(1, Ordering::Relaxed);
        match &self.queue {
            Queue::Host => Ok(()),
            Queue::Cuda(stream) => stream.synchronize(),
        }
    }

    /// A timer of the device's work, if the host's clock does not tell it.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`]
    pub(crate) fn timer(self: &Arc<Self>) -> Result<Option<DeviceTimer>> {
        match &self.queue {
            Queue::Host => Ok(None),
            Queue::Cuda(cuda) => {
                let timer = CudaTimer::new(cuda)?;
                Ok(Some(DeviceTimer { timer, stream: Arc::clone(self), has_ended: false }))
            }
        }
    }

    /// What has been copied so far.
    pub(crate) fn counts(&self) -> CopyCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CopyCounts {
            uploads: get(&self.counts.uploads),
            downloads: get(&self.counts.downloads),
            waits: get(&self.counts.waits),
            uploaded_bytes: get(&self.counts.uploaded_bytes),
            downloaded_bytes: get(&self.counts.downloaded_bytes),
        }
    }
}

/// Times work on a device, between two places in its stream.
pub(crate) struct DeviceTimer {
    timer: CudaTimer,
    stream: Arc<Stream>,
    has_ended: bool,
}

impl DeviceTimer {
    /// What is queued from here on is timed.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.has_ended = false;
        match &self.stream.queue {
            Queue::Cuda(stream) => self.timer.begin(stream),
            Queue::Host => Ok(()),
        }
    }

    /// Up to here.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.has_ended = true;
        match &self.stream.queue {
            Queue::Cuda(stream) => self.timer.end(stream),
            Queue::Host => Ok(()),
        }
    }

    /// Nanoseconds between the two, once; call it after a wait for the stream.
    pub(crate) fn take_ns(&mut self) -> Result<Option<u64>> {
        std::mem::take(&mut self.has_ended).then(|| self.timer.elapsed_ns()).transpose()
    }
}
