//! One file per subcommand: arguments to options, the call, the summary.

mod export;
mod run;

use std::process::ExitCode;

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

/// Carries out a command.
///
/// # Errors
/// What stopped it, with `hint` texts further down the chain where there are any.
pub fn execute(command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Export(args) => export::execute(&args),
        Command::Run(args) => run::execute(args),
    }
}
