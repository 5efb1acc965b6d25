//! Threads that wait by spinning, as an engine's pool does between kernels.

use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use recaption_kernels::Workers;

type Task = *const (dyn Fn(usize) + Sync);

struct State {
    task: Mutex<Option<(SendTask, usize)>>,
    round: AtomicUsize,
    next: AtomicUsize,
    busy: AtomicUsize,
}

#[derive(Clone, Copy)]
struct SendTask(Task);
// SAFETY: the task is `Sync`, and `for_each` outlives its use.
unsafe impl Send for SendTask {}

pub(crate) struct Pool {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

const STOP: usize = usize::MAX;

impl Pool {
    pub(crate) fn new(threads: usize) -> Self {
        let state = Arc::new(State {
            task: Mutex::new(None),
            round: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
        });
        let spawn = |_| {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                let mut seen = 0;
                loop {
                    let mut round = state.round.load(Acquire);
                    while round == seen {
                        std::hint::spin_loop();
                        round = state.round.load(Acquire);
                    }
                    if round == STOP {
                        return;
                    }
                    seen = round;
                    let task = *state.task.lock().expect("no panic");
                    if let Some((task, count)) = task {
                        // SAFETY: `for_each` waits until `busy` is 0 before the task goes.
                        state.drain(unsafe { &*task.0 }, count);
                    }
                    state.busy.fetch_sub(1, AcqRel);
                }
            })
        };
        let threads = (1..threads).map(spawn).collect();
        Self { state, threads }
    }
}

impl State {
    fn drain(&self, task: &(dyn Fn(usize) + Sync), count: usize) {
        loop {
            let index = self.next.fetch_add(1, Relaxed);
            if index >= count {
                return;
            }
            task(index);
        }
    }
}

// SAFETY: each index is drawn once from the counter; it returns when no thread is busy.
unsafe impl Workers for Pool {
    fn num_threads(&self) -> usize {
        self.threads.len() + 1
    }

    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let state = &*self.state;
        // SAFETY: only the lifetime changes, and no thread holds the task when this returns.
        let pointer = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        *state.task.lock().expect("no panic") = Some((SendTask(pointer), num_tasks));
        state.next.store(0, Relaxed);
        state.busy.store(self.threads.len(), Release);
        state.round.fetch_add(1, AcqRel);
        state.drain(task, num_tasks);
        while state.busy.load(Acquire) > 0 {
            std::hint::spin_loop();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.round.store(STOP, Release);
        for thread in self.threads.drain(..) {
            thread.join().expect("no panic");
        }
    }
}
