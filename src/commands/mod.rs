//! One file per subcommand: arguments to options, the call, the summary.

mod captioning;
mod doctor;
mod export;
mod inspect;
mod plan;
mod profile;
mod provider;
mod run;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::cli::Command;

/// How a command ended; its number is the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All written.
    Success = 0,
    /// Finished, some images failed.
    SomeFailed = 1,
    /// Usage or set-up.
    Error = 2,
    /// Interrupted; the output is valid and the run resumable.
    Interrupted = 130,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(outcome as u8)
    }
}

/// A flag that SIGINT and SIGTERM raise: the first asks to end well, the second ends the process at once.
fn interrupt_flag() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // Without them the process just dies, as it would by default.
        let _ =
            signal_hook::flag::register_conditional_shutdown(signal, Outcome::Interrupted as i32, Arc::clone(&flag));
        let _ = signal_hook::flag::register(signal, Arc::clone(&flag));
    }
    flag
}

/// Carries out a command.
///
/// # Errors
/// What stopped it, with `hint` texts further down the chain where there are any.
pub fn execute(command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Export(args) => export::execute(&args),
        Command::Inspect(args) => inspect::execute(&args),
        Command::Doctor(args) => doctor::execute(&args),
        Command::Plan(args) => plan::execute(&args),
        Command::Profile(args) => profile::execute(&args),
        Command::Run(args) => run::execute(&args),
    }
}
