//! JSON Lines: one object a row, every column present.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::pipeline::write::{Counts, WrittenRow, write_atomically};

/// One row as a JSON object, without a newline.
#[must_use]
pub fn row_to_json(row: &WrittenRow, with_token_ids: bool) -> String {
    let mut json = serde_json::to_value(row).expect("bug: a row serialises");
    if with_token_ids {
        json["token_ids"] = row.token_ids.clone().into();
    }
    json.to_string()
}

pub(super) fn write(path: &Path, rows: &[WrittenRow], with_token_ids: bool) -> Result<()> {
    write_atomically(path, |file| {
        let mut writer = BufWriter::new(file);
        for row in rows {
            writeln!(writer, "{}", row_to_json(row, with_token_ids)).map_err(Error::io("write", path))?;
        }
        writer.flush().map_err(Error::io("write", path))
    })
}

pub(super) fn print(rows: &[WrittenRow], with_token_ids: bool) -> Result<()> {
    let mut output = std::io::stdout().lock();
    for row in rows {
        writeln!(output, "{}", row_to_json(row, with_token_ids))
            .map_err(Error::io("write", Path::new("standard output")))?;
    }
    output.flush().map_err(Error::io("write", Path::new("standard output")))
}

/// Counts of a finished file, by reading it.
pub(super) fn read_counts(path: &Path, prompt_tokens: usize) -> Result<Counts> {
    #[derive(serde::Deserialize)]
    struct Fields {
        status: String,
        num_tokens: Option<u64>,
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut counts = Counts::default();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(Error::io("read", path))?;
        let fields: Fields = serde_json::from_str(&line)
            .map_err(|error| Error::io("read", path)(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
        let is_ok = u64::from(fields.status == "ok");
        counts.add(Counts {
            rows: 1,
            ok: is_ok,
            failed: 1 - is_ok,
            prompt_tokens: is_ok * prompt_tokens as u64,
            new_tokens: fields.num_tokens.unwrap_or(0),
        });
    }
    Ok(counts)
}
