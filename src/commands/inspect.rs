//! `recaption inspect`.

pub(super) mod numbers;
mod report;
mod table;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use recaption_export::{BundleManifest, verify};

use crate::cli::InspectArgs;
use crate::commands::Outcome;
use crate::console::print_line;
use crate::error::Error;
use crate::model::bundle::check_files;
use report::{CaptionLength, Report};

/// Time between two lines of progress; what takes less long has none.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

pub(super) fn execute(args: &InspectArgs) -> anyhow::Result<Outcome> {
    if args.verify {
        verify_files(&args.bundle)?;
    }
    let manifest = BundleManifest::read(&args.bundle).map_err(Error::from)?;
    check_files(&args.bundle, manifest.files())?;
    let length = CaptionLength { prompt_tokens: args.prompt_tokens as usize, new_tokens: args.new_tokens as usize };
    let report = Report::of(&args.bundle, &manifest, length, args.verify)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => table::render(&report),
    };
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(Error::io("write", Path::new("standard output")))?;
    Ok(Outcome::Success)
}

/// # Errors
/// When a file is not as it was exported; says on standard error how far it is.
fn verify_files(folder: &Path) -> Result<(), Error> {
    let manifest = BundleManifest::read(folder)?;
    let total: u64 = manifest.files().iter().map(|file| file.size).fold(0, u64::saturating_add);
    let (mut num_read, mut shown) = (0_u64, Instant::now());
    verify::verify(folder, &manifest, &mut |num_bytes| {
        num_read += num_bytes;
        if shown.elapsed() >= LINE_INTERVAL {
            shown = Instant::now();
            print_line(&format!("verified {} of {}", numbers::bytes(num_read), numbers::bytes(total)));
        }
    })?;
    Ok(())
}
