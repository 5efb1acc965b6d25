//! `recaption`: parses, calls, maps to an exit code.

use std::process::ExitCode;

use clap::Parser;
use recaption::cli::Cli;
use recaption::commands::{self, Outcome};
use recaption::console;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(reason) = console::start_logging(cli.log.log_level.as_deref(), cli.log.log_format) {
        console::print_error(
            &format!("--log-level: {reason}"),
            Some("use error, warn, info, debug, trace or off, or directives such as recaption=debug,ort=warn"),
        );
        return Outcome::Error.into();
    }
    match commands::execute(cli.command) {
        Ok(outcome) => outcome.into(),
        // Whoever read standard output has seen enough: `recaption run … | head -1`.
        Err(error) if error.downcast_ref::<recaption::Error>().is_some_and(recaption::Error::is_broken_pipe) => {
            Outcome::Interrupted.into()
        }
        Err(error) => {
            let hint = error.downcast_ref::<recaption::Error>().and_then(recaption::Error::hint);
            console::print_error(&error.to_string(), hint.as_deref());
            Outcome::Error.into()
        }
    }
}
