//! Buffers that go round: the pixels of one image are handed from load to preprocess and come back; its `pixel_values` are
//! handed from preprocess to the engine and come back when the engine has copied them.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use crate::pipeline::preprocess::{PixelFormat, PixelValues};

/// A pool of equal buffers; a lock-free queue of those that are free.
#[derive(Clone)]
pub(crate) struct BufferPool {
    free: Arc<ArrayQueue<PixelValues>>,
    format: PixelFormat,
}

impl BufferPool {
    /// Keeps up to `capacity` free buffers; more are made when they are asked for, and dropped later.
    pub(crate) fn new(capacity: usize, format: PixelFormat) -> Self {
        Self { free: Arc::new(ArrayQueue::new(capacity.max(1))), format }
    }

    /// What the buffers are for.
    pub(crate) fn format(&self) -> PixelFormat {
        self.format
    }

    /// A buffer with undefined contents.
    pub(crate) fn take(&self) -> PooledBuffer {
        let values = self.free.pop().unwrap_or_else(|| self.format.allocate());
        PooledBuffer { values, free: Arc::clone(&self.free) }
    }
}

/// A buffer that goes back to its pool when dropped.
pub(crate) struct PooledBuffer {
    values: PixelValues,
    free: Arc<ArrayQueue<PixelValues>>,
}

impl PooledBuffer {
    pub(crate) fn values(&self) -> &PixelValues {
        &self.values
    }

    /// Gives the memory back before the buffer is dropped; it is empty then.
    pub(crate) fn give_back(&mut self) {
        let values = std::mem::replace(&mut self.values, PixelValues::U8(Vec::new()));
        if !values.is_empty() {
            let _ = self.free.push(values);
        }
    }

    pub(crate) fn values_mut(&mut self) -> &mut PixelValues {
        &mut self.values
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Memory for the pixels of pictures, of any size.
#[derive(Clone)]
pub(crate) struct SamplePool {
    free: Arc<ArrayQueue<Vec<u8>>>,
}

/// Most bytes that a free buffer may hold: larger ones (pictures of some 20 megapixels that were not reduced) are rare, and
/// dropped.
const MAX_FREE_BYTES: usize = 64 << 20;

impl SamplePool {
    /// Keeps up to `capacity` free buffers.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { free: Arc::new(ArrayQueue::new(capacity.max(1))) }
    }

    /// A buffer of some length with undefined contents; a new one is empty.
    pub(crate) fn take(&self) -> Vec<u8> {
        self.free.pop().unwrap_or_default()
    }

    /// Keeps a buffer for later.
    pub(crate) fn give_back(&self, samples: Vec<u8>) {
        if samples.capacity() <= MAX_FREE_BYTES {
            let _ = self.free.push(samples);
        }
    }
}
