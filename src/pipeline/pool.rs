//! Buffers that go round: `pixel_values` of one image are handed from preprocess to the engine and come back when the
//! engine has copied them.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

/// A pool of equal buffers; a lock-free queue of those that are free.
#[derive(Clone)]
pub(crate) struct BufferPool {
    free: Arc<ArrayQueue<Vec<f32>>>,
    num_values: usize,
}

impl BufferPool {
    /// Keeps up to `capacity` free buffers of `num_values`; more are made when they are asked for, and dropped later.
    pub(crate) fn new(capacity: usize, num_values: usize) -> Self {
        Self { free: Arc::new(ArrayQueue::new(capacity.max(1))), num_values }
    }

    /// A buffer with undefined contents.
    pub(crate) fn take(&self) -> PooledBuffer {
        let values = self.free.pop().unwrap_or_else(|| vec![0.0; self.num_values]);
        PooledBuffer { values, free: Arc::clone(&self.free) }
    }
}

/// A buffer that goes back to its pool when dropped.
pub(crate) struct PooledBuffer {
    values: Vec<f32>,
    free: Arc<ArrayQueue<Vec<f32>>>,
}

impl PooledBuffer {
    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.values
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let _ = self.free.push(std::mem::take(&mut self.values));
    }
}
