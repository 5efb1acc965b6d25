//! Splitting work over a caller's threads.
//!
//! A kernel cuts its output into tasks that write disjoint parts; a [`Workers`] runs them in any order on any thread. No
//! result depends on the cut.

use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A pool of threads.
///
/// # Safety
/// `for_each` calls `task(i)` exactly once for each `i` below `num_tasks` and returns after all calls have returned: tasks
/// write to their own part of the output without further checks.
pub unsafe trait Workers {
    /// How many threads there are: a hint for how finely to cut.
    fn num_threads(&self) -> usize;
    /// Runs all tasks.
    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// The calling thread alone.
#[derive(Clone, Copy, Debug)]
pub struct Serial;

// SAFETY: a plain loop.
unsafe impl Workers for Serial {
    fn num_threads(&self) -> usize {
        1
    }

    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..num_tasks).for_each(task);
    }
}

/// Threads started anew for each call: for tests and tools, too slow for an engine.
#[derive(Clone, Copy, Debug)]
pub struct Scoped(pub NonZeroUsize);

// SAFETY: each index is drawn once from the counter, and the scope joins every thread.
unsafe impl Workers for Scoped {
    fn num_threads(&self) -> usize {
        self.0.get()
    }

    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.0.get() {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= num_tasks {
                            break;
                        }
                        task(index);
                    }
                });
            }
        });
    }
}

/// A slice that tasks write disjoint parts of.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts, and `part`'s caller promises that no two of them overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other part that overlaps it is alive.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    #[inline(always)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "bug: a task reaches beyond its output");
        // SAFETY: inside the slice that `new` borrowed for 'a (asserted); disjoint from other live parts by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

impl<T> Shared<'_, T> {
    /// Elements `start..start + len`, to be read.
    ///
    /// # Safety
    /// No part that overlaps it is alive.
    #[inline(always)]
    pub(crate) unsafe fn shared_part(&self, start: usize, len: usize) -> &[T] {
        // SAFETY: by contract.
        unsafe { self.part(start, len) }
    }
}

/// Part `index` of `0..total` cut into `parts` nearly equal ranges.
pub(crate) fn part_of(total: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    let (each, rest) = (total / parts, total % parts);
    let start = index * each + index.min(rest);
    start..start + each + usize::from(index < rest)
}
