//! `recaption`: parses, calls, maps to an exit code.

use std::process::ExitCode;

use clap::Parser;
use recaption::cli::Cli;
use recaption::commands::{self, Outcome};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("RECAPTION_LOG").unwrap_or_else(|_| EnvFilter::new("warn,ort=error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match commands::execute(cli.command) {
        Ok(outcome) => outcome.into(),
        // Whoever read standard output has seen enough: `recaption run … | head -1`.
        Err(error) if error.downcast_ref::<recaption::Error>().is_some_and(recaption::Error::is_broken_pipe) => {
            Outcome::Interrupted.into()
        }
        Err(error) => {
            eprintln!("error: {}", recaption::terminal::escape(&error.to_string()));
            if let Some(hint) = error.downcast_ref::<recaption::Error>().and_then(recaption::Error::hint) {
                eprintln!("hint: {}", recaption::terminal::escape(&hint));
            }
            Outcome::Error.into()
        }
    }
}
