//! How far a run is: counters that the stages raise, and the reporter that shows them, as a bar on a terminal and as a
//! line every ten seconds elsewhere.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::console::{self, print_line};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
const BAR_INTERVAL: Duration = Duration::from_millis(200);

/// Counters of a run.
pub(crate) struct Progress {
    started: Instant,
    /// Images that this run will do; 0 while that is not known.
    total: AtomicU64,
    /// Images of shards in progress that earlier runs did.
    earlier: AtomicU64,
    ok: AtomicU64,
    failed: AtomicU64,
    tokens: AtomicU64,
    is_over: AtomicBool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            total: AtomicU64::new(0),
            earlier: AtomicU64::new(0),
            ok: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        }
    }

    /// Takes out of the total what an earlier run did of a shard that this one finishes.
    pub(crate) fn add_earlier(&self, count: u64) {
        self.earlier.fetch_add(count, Ordering::Relaxed);
    }

    fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed).saturating_sub(self.earlier.load(Ordering::Relaxed))
    }

    pub(crate) fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    pub(crate) fn add_row(&self, is_ok: bool) {
        let counter = if is_ok { &self.ok } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_tokens(&self, count: usize) {
        self.tokens.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn num_rows(&self) -> u64 {
        self.ok.load(Ordering::Relaxed) + self.failed.load(Ordering::Relaxed)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn finish(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Shows the counters on standard error until [`Self::finish`].
    pub(crate) fn report(&self) {
        if console::is_terminal() {
            self.show_bar();
        } else {
            self.write_lines();
        }
    }

    /// `captioned 12400/50000 (3 failed), 41.2 img/s, decode 1830 tok/s, ETA 15m12s`, without rates as long as nothing is captioned.
    /// Failed rows are no images that were captioned, but count for the time that is left.
    fn line(&self) -> String {
        let (ok, failed) = (self.ok.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        let rows = ok + failed;
        let seconds = self.elapsed().as_secs_f64().max(1e-9);
        let (rate, row_rate) = (ok as f64 / seconds, rows as f64 / seconds);
        let token_rate = self.tokens.load(Ordering::Relaxed) as f64 / seconds;
        let total = self.total();
        let of_total = if total > 0 { format!("/{total}") } else { String::new() };
        let eta = match total.checked_sub(rows) {
            Some(left) if left > 0 && rows > 0 && !self.is_over.load(Ordering::Acquire) => {
                format!(", ETA {}", short_duration(Duration::from_secs_f64(left as f64 / row_rate)))
            }
            _ => String::new(),
        };
        let rates = match ok {
            0 => String::new(),
            _ => format!(", {rate:.1} img/s, decode {token_rate:.0} tok/s"),
        };
        format!("captioned {ok}{of_total} ({failed} failed){rates}{eta}")
    }

    fn write_lines(&self) {
        let mut last = Instant::now();
        while !self.is_over.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(50));
            if last.elapsed() >= LINE_INTERVAL {
                print_line(&self.line());
                last = Instant::now();
            }
        }
        print_line(&self.line());
    }

    fn show_bar(&self) {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let spinner = ProgressStyle::with_template("{spinner} {wide_msg}").expect("bug: valid template");
        let with_bar = ProgressStyle::with_template("{bar:16} {wide_msg}").expect("bug: valid template");
        bar.set_style(spinner);
        console::set_bar(Some(bar.clone()));
        while !self.is_over.load(Ordering::Acquire) {
            let total = self.total();
            if total > 0 && bar.length().is_none() {
                bar.set_length(total);
                bar.set_style(with_bar.clone());
            }
            bar.set_position(self.num_rows());
            bar.set_message(self.line());
            std::thread::sleep(BAR_INTERVAL);
        }
        console::set_bar(None);
        bar.finish_and_clear();
        print_line(&self.line());
    }
}

/// `2h05m`, `15m12s` or `8s`.
fn short_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_rows_count_for_the_time_that_is_left_alone() {
        let started = Instant::now().checked_sub(Duration::from_secs(100)).unwrap();
        let progress = Progress { started, ..Progress::new() };
        progress.set_total(2000);
        (0..1000).for_each(|row| progress.add_row(row < 200));
        assert_eq!(progress.line(), "captioned 200/2000 (800 failed), 2.0 img/s, decode 0 tok/s, ETA 1m40s");
    }

    #[test]
    fn durations_show_two_units() {
        let shown = [8, 912, 7500].map(|seconds| short_duration(Duration::from_secs(seconds)));
        assert_eq!(shown, ["8s", "15m12s", "2h05m"]);
    }
}
