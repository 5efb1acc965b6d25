//! The one list of the pipeline's stages. Thread names, row errors, gauges and reports take their word from here.

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// A stage of the pipeline, in the order the data takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Reads image bytes and their metadata.
    Source,
    /// Turns bytes into an upright RGB image.
    Load,
    /// Turns the image into `pixel_values`.
    Preprocess,
    /// Vision tower and projector: `pixel_values` to `image_features`.
    Vision,
    /// First pass of the decoder over prompt and image.
    Prefill,
    /// The token loop.
    Decode,
    /// Detokenizes and writes rows.
    Write,
}

impl Stage {
    /// All stages, in order.
    pub const ALL: [Self; 7] =
        [Self::Source, Self::Load, Self::Preprocess, Self::Vision, Self::Prefill, Self::Decode, Self::Write];

    /// Lower-case name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Load => "load",
            Self::Preprocess => "preprocess",
            Self::Vision => "vision",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Write => "write",
        }
    }
}

/// Stage that is to panic, and after how many items: see [`inject_panic`].
static INJECTED: Mutex<Option<(Stage, usize)>> = Mutex::new(None);
static IS_INJECTED: AtomicBool = AtomicBool::new(false);

/// Makes `stage` panic at its item `count` (from 0): tests that a run ends well when a stage does not.
#[doc(hidden)]
pub fn inject_panic(stage: Stage, count: usize) {
    *INJECTED.lock().expect("bug: the lock is never held while panicking") = Some((stage, count));
    IS_INJECTED.store(true, Ordering::Relaxed);
}

impl Stage {
    /// Called by each stage before each item; panics where [`inject_panic`] says so.
    pub(crate) fn enter(self) {
        if !IS_INJECTED.load(Ordering::Relaxed) {
            return;
        }
        let is_now = {
            let mut injected = INJECTED.lock().expect("bug: the lock is never held while panicking");
            match &mut *injected {
                Some((stage, 0)) => *stage == self,
                Some((stage, count)) if *stage == self => {
                    *count -= 1;
                    false
                }
                _ => false,
            }
        };
        assert!(!is_now, "injected");
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|stage| stage.name() == name).ok_or_else(|| {
            format!("expected one of source, load, preprocess, vision, prefill, decode, write, got `{name}`")
        })
    }
}
