//! Where a run's time went, and how far that is from what the machine can do: `recaption profile`.
//!
//! [`recorder`] takes what the stages' threads did, `peaks.rs` measures the machine, [`Profile`] is what comes of both, and
//! `profile.json`. [`mod@utilisation`] has the one definition of how well the machine was used.

mod assemble;
mod data;
pub(crate) mod gpu;
pub(crate) mod operators;
pub(crate) mod peaks;
pub mod recorder;
mod report;
mod trace;
pub mod utilisation;

pub(crate) use assemble::is_engine;
pub use assemble::{Setup, assemble};
pub use data::*;
pub use report::render_report;
pub use trace::write_trace;
