//! `recaption doctor`: what this machine can caption with, and what is missing.

mod report;

use std::io::Write;
use std::path::Path;

use crate::cli::DoctorArgs;
use crate::commands::Outcome;
use crate::error::Error;
use report::Report;

pub(super) fn execute(args: &DoctorArgs) -> anyhow::Result<Outcome> {
    let report = Report::of_this_machine(args.model.as_deref())?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.to_string() };
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(Error::io("write", Path::new("standard output")))?;
    Ok(if report.can_caption { Outcome::Success } else { Outcome::Error })
}
