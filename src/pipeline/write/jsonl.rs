//! JSON Lines: one object a row, every column present.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::pipeline::write::AtomicFile;
use crate::pipeline::write::journal::Entry;
use crate::pipeline::write::written_row::WrittenRow;
use crate::storage::Location;

/// One row as a JSON object, without a newline.
#[must_use]
pub fn row_to_json(row: &WrittenRow, with_token_ids: bool) -> String {
    let mut json = serde_json::to_value(row).expect("bug: a row serialises");
    if with_token_ids {
        json["token_ids"] = row.token_ids.clone().into();
    }
    json.to_string()
}

/// Writes the rows of a shard to `file`, which is to be at `location`.
pub(super) fn write(
    file: &mut AtomicFile,
    location: &Location,
    rows: &mut dyn Iterator<Item = Result<Entry>>,
    with_token_ids: bool,
) -> Result<()> {
    let mut writer = BufWriter::new(file);
    for entry in rows {
        writeln!(writer, "{}", row_to_json(&entry?.row, with_token_ids)).map_err(Error::at("write", location))?;
    }
    writer.flush().map_err(Error::at("write", location))
}

pub(super) fn print(rows: &[WrittenRow], with_token_ids: bool) -> Result<()> {
    let mut output = std::io::stdout().lock();
    for row in rows {
        writeln!(output, "{}", row_to_json(row, with_token_ids))
            .map_err(Error::io("write", Path::new("standard output")))?;
    }
    output.flush().map_err(Error::io("write", Path::new("standard output")))
}

/// Reads the rows of a finished file, in order.
pub(super) fn read(path: &Path, each: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(Error::io("read", path))?;
        let row = serde_json::from_str(&line).and_then(WrittenRow::from_json);
        let row =
            row.map_err(|error| Error::io("read", path)(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
        each(Entry { row, image: Vec::new() })?;
    }
    Ok(())
}
