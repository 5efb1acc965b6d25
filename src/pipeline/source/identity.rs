//! What tells one input file from another of the same name.

use recaption_export::hex;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::storage::{Failure, Location};

/// Hash of a file's length, its beginning and its end: the same wherever it lies. Of a web server that serves no ranges,
/// the length alone.
///
/// # Errors
/// When the file does not exist or cannot be read.
pub(super) fn identity(location: &Location) -> Result<String> {
    const SAMPLE_BYTES: u64 = 1 << 16;
    let length = match location.length() {
        // A web server that answers GET alone: nothing is known before it is read.
        Err(Error::Storage { failure: Failure::Unsupported | Failure::Other | Failure::Server, .. })
            if !location.is_writable() =>
        {
            return Ok(hex(&Sha256::digest(location.to_string())));
        }
        length => length?,
    };
    let sample = || -> std::io::Result<Vec<u8>> {
        let reader = location.ranges().map_err(std::io::Error::other)?;
        let mut sample = reader.read_at(0, SAMPLE_BYTES)?.to_vec();
        sample.extend(reader.read_at(length.saturating_sub(SAMPLE_BYTES), SAMPLE_BYTES)?);
        Ok(sample)
    };
    let mut sample = match sample().map_err(Error::at("read", location)) {
        Err(Error::Storage { failure: Failure::Unsupported, .. }) => Vec::new(),
        sample => sample?,
    };
    sample.extend(length.to_le_bytes());
    Ok(hex(&Sha256::digest(sample)))
}
