//! Threads that have nothing of their own to do take tasks of the operators that other threads run.
//!
//! An engine has one thread. While it has no images, at the beginning of a run and at its end, or when they come slowly, it is a
//! [`Helper`]: operators that run meanwhile cut their work for one thread more, and send it a [`Call`]. What an operator
//! computes does not depend on the cut. With no helper an operator looks at one counter and does its work alone.

use std::any::Any;
use std::cell::Cell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::yield_now;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

/// Calls that no helper has taken yet: more are not sent.
const MAX_CALLS: usize = 64;

/// How long a helper looks for the next call before it sleeps: operators of one run follow each other within a few microseconds,
/// and waking a thread takes tens of them.
const PATIENCE: Duration = Duration::from_micros(100);

/// Looks at a counter before the thread lets others run.
const SPINS: usize = 200;

static NUM_HELPERS: AtomicUsize = AtomicUsize::new(0);
static CALLS: LazyLock<(Sender<Call>, Receiver<Call>)> = LazyLock::new(|| bounded(MAX_CALLS));

thread_local! {
    static HELPED_NS: Cell<u64> = const { Cell::new(0) };
}

/// A thread that helps; until it is dropped operators count on it.
#[derive(Debug)]
pub struct Helper(());

impl Helper {
    /// From now on this thread helps: it must take calls, and soon.
    #[must_use]
    pub fn enter() -> Self {
        NUM_HELPERS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }

    /// Where the calls come from, for one who waits for something else as well. Any helper may take any call.
    #[must_use]
    pub fn calls(&self) -> &'static Receiver<Call> {
        &CALLS.1
    }

    /// A call, if one comes soon and `is_over` does not hold before.
    pub fn call_soon(&self, is_over: impl Fn() -> bool) -> Option<Call> {
        let started = Instant::now();
        while !is_over() && started.elapsed() < PATIENCE {
            if let Ok(call) = self.calls().try_recv() {
                return Some(call);
            }
            spin_loop();
        }
        None
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        NUM_HELPERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Threads that help now.
pub(crate) fn num_helpers() -> usize {
    NUM_HELPERS.load(Ordering::Relaxed)
}

/// How long others have worked for the operators that this thread ran, in nanoseconds of their time, since this was last asked.
pub fn take_helped_ns() -> u64 {
    HELPED_NS.take()
}

/// Tasks of an operator that is running, or was when the call was sent.
#[derive(Clone)]
pub struct Call(Arc<Tasks>);

impl std::fmt::Debug for Call {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Call").field("num_tasks", &self.0.num_tasks).finish_non_exhaustive()
    }
}

impl Call {
    /// Works until no task is left. A panic in one is the caller's, not this thread's.
    pub fn help(self) {
        let tasks = &*self.0;
        tasks.num_helping.fetch_add(1, Ordering::AcqRel);
        let started = Instant::now();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| tasks.work())) {
            tasks.close();
            tasks.panic.lock().expect("bug: nobody panics with the lock held").get_or_insert(panic);
        }
        tasks.helped_ns.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        tasks.num_helping.fetch_sub(1, Ordering::AcqRel);
    }
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Tasks {
    /// Alive as long as a number below `num_tasks` can be drawn, and while somebody works on one: see [`Open`].
    task: *const Task<'static>,
    num_tasks: usize,
    next: AtomicUsize,
    num_helping: AtomicUsize,
    helped_ns: AtomicU64,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the function is `Sync`, and is called only while it is alive.
unsafe impl Send for Tasks {}
// SAFETY: as above.
unsafe impl Sync for Tasks {}

impl Tasks {
    /// Draws tasks until none is left.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::AcqRel);
            if index >= self.num_tasks {
                return;
            }
            // SAFETY: the number is below `num_tasks`.
            unsafe { (*self.task)(index) };
        }
    }

    /// Lets nobody draw another.
    fn close(&self) {
        self.next.fetch_add(self.num_tasks, Ordering::AcqRel);
    }
}

/// Holds the caller, however it ends, until nobody can touch what its tasks borrow.
struct Open(Arc<Tasks>);

impl Drop for Open {
    fn drop(&mut self) {
        // Whoever draws a task counted itself before; a draw that the close comes before is beyond the end.
        self.0.close();
        let mut spins = 0;
        while self.0.num_helping.load(Ordering::Acquire) > 0 {
            spins += 1;
            // The helper may be waiting for this core.
            if spins < SPINS { spin_loop() } else { yield_now() }
        }
    }
}

/// Runs all tasks, on this thread and on those that help, and returns when all are done.
pub(crate) fn for_each(num_tasks: usize, task: &Task<'_>) {
    let num_helpers = num_helpers().min(num_tasks.saturating_sub(1));
    if num_helpers == 0 {
        return (0..num_tasks).for_each(task);
    }
    // SAFETY: only the lifetime changes; `Open` keeps the borrow from ending before its last use.
    let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
    let open = Open(Arc::new(Tasks {
        task,
        num_tasks,
        next: AtomicUsize::new(0),
        num_helping: AtomicUsize::new(0),
        helped_ns: AtomicU64::new(0),
        panic: Mutex::default(),
    }));
    for _ in 0..num_helpers {
        // With no room in there the helpers have enough to look at.
        let _ = CALLS.0.try_send(Call(Arc::clone(&open.0)));
    }
    open.0.work();
    let tasks = Arc::clone(&open.0);
    drop(open);
    HELPED_NS.set(HELPED_NS.get() + tasks.helped_ns.load(Ordering::Relaxed));
    let panic = tasks.panic.lock().expect("bug: nobody panics with the lock held").take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// The helpers and the calls belong to the process: one test at a time.
    static ALONE: Mutex<()> = Mutex::new(());

    const NUM_ROUNDS: usize = if cfg!(miri) { 20 } else { 2000 };

    /// Does `body` while `count` threads help; it is told how many calls they took.
    fn with_helpers(count: usize, body: impl FnOnce(&AtomicUsize)) {
        let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (is_over, num_calls) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..count {
                let helper = Helper::enter();
                let (is_over, num_calls) = (&is_over, &num_calls);
                scope.spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        if let Some(call) = helper.call_soon(|| is_over.load(Ordering::Relaxed)) {
                            call.help();
                            num_calls.fetch_add(1, Ordering::Relaxed);
                        }
                        yield_now();
                    }
                });
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| body(&num_calls)));
            is_over.store(true, Ordering::Relaxed);
            outcome.unwrap_or_else(|panic| resume_unwind(panic));
        });
        assert_eq!(num_helpers(), 0);
    }

    #[test]
    fn every_task_is_done_once_before_the_call_returns() {
        with_helpers(3, |num_calls| {
            let mut round = 0;
            // Also until somebody was there to help.
            while round < NUM_ROUNDS || num_calls.load(Ordering::Relaxed) == 0 {
                round += 1;
                let counts: Vec<AtomicUsize> = (0..round % 17).map(|_| AtomicUsize::new(0)).collect();
                for_each(counts.len(), &|index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.into_iter().all(|count| count.into_inner() == 1));
            }
        });
    }

    #[test]
    fn callers_do_not_get_each_others_tasks() {
        with_helpers(2, |_| {
            std::thread::scope(|scope| {
                for caller in 0..3 {
                    scope.spawn(move || {
                        for _ in 0..NUM_ROUNDS / 4 {
                            let sum = AtomicUsize::new(0);
                            for_each(9, &|index| {
                                sum.fetch_add(caller * 100 + index, Ordering::Relaxed);
                            });
                            assert_eq!(sum.into_inner(), caller * 900 + 36);
                        }
                    });
                }
            });
        });
    }

    #[test]
    fn what_a_helper_did_is_counted_for_the_thread_that_called() {
        with_helpers(1, |_| {
            take_helped_ns();
            let this = std::thread::current().id();
            let was_helped = AtomicBool::new(false);
            // The helper may come late, and find nothing left.
            while !was_helped.load(Ordering::Acquire) {
                take_helped_ns();
                for_each(2, &|_| {
                    std::thread::sleep(Duration::from_millis(2));
                    was_helped.fetch_or(std::thread::current().id() != this, Ordering::AcqRel);
                });
            }
            assert!(take_helped_ns() >= 2_000_000);
            assert_eq!(take_helped_ns(), 0);
        });
    }

    #[test]
    fn a_panic_in_any_task_is_the_callers_and_helpers_go_on() {
        with_helpers(2, |_| {
            for panicking in 0..8 {
                let borrowed = Box::new([7_usize; 8]);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    for_each(8, &|index| {
                        yield_now();
                        assert!(index != panicking && borrowed[index] == 7, "task {index}");
                    });
                }));
                let panic = outcome.expect_err("a task panicked");
                assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some(&*format!("task {panicking}")));
            }
            for_each(4, &|_| {});
        });
    }

    #[test]
    fn without_helpers_tasks_run_in_order_on_this_thread() {
        let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (this, seen) = (std::thread::current().id(), Mutex::new(Vec::new()));
        for_each(3, &|index| seen.lock().unwrap().push((std::thread::current().id(), index)));
        assert_eq!(seen.into_inner().unwrap(), [(this, 0), (this, 1), (this, 2)]);
    }
}
