//! The directory of a torch zip: where each entry's bytes lie in the file.
//!
//! An own parser of some hundred lines, since torch's archives use little of the format (one disk, stored, no comment)
//! and this is stricter than a general one: whatever is not such an archive is refused. The `zip` crate (9.8) would
//! bring nine dependencies, among them getrandom and zeroize, and reserves room for as many entries as a file claims.
//! Layouts are those of PKWARE's APPNOTE 6.3, sections 4.3.7 to 4.3.16.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::error::{TorchFileError, shown};

const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const CENTRAL_HEADER: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const ZIP64_END: &[u8] = b"PK\x06\x06";
const ZIP64_LOCATOR: &[u8] = b"PK\x06\x07";

const ZIP64_EXTRA_ID: u16 = 1;
const ENCRYPTED_FLAG: u16 = 1;

/// An entry's bytes as they lie in the file.
pub(super) struct Stored {
    /// Within the file, before the directory.
    pub(super) range: Range<usize>,
    /// 0 when the bytes are the content itself.
    pub(super) method: u16,
}

/// All entries by name.
pub(super) fn entries<'a>(file: &'a [u8], path: &Path) -> Result<BTreeMap<&'a str, Stored>, TorchFileError> {
    let damaged = |reason: String| TorchFileError::Damaged { path: path.to_owned(), reason };
    let (directory, num_entries) = directory(file).map_err(|reason| damaged(reason.to_owned()))?;
    let (data, mut rest) = (&file[..directory.start], &file[directory]);
    let mut entries = BTreeMap::new();
    while !rest.is_empty() {
        let (entry, after) = Entry::split_from(rest)
            .ok_or_else(|| damaged(format!("zip directory entry {} is invalid", entries.len() + 1)))?;
        rest = after;
        let range = entry.range(data).ok_or_else(|| {
            damaged(format!("zip entry `{}` does not lie where the directory says", shown(entry.name)))
        })?;
        if entries.insert(entry.name, Stored { range, method: entry.method }).is_some() {
            return Err(damaged(format!("zip entry `{}` is there twice", shown(entry.name))));
        }
    }
    if entries.len() as u64 != num_entries {
        return Err(damaged(format!("expected {num_entries} zip entries, got {}", entries.len())));
    }
    Ok(entries)
}

/// Where the central directory lies, and how many entries it should have. It must end where the end records begin.
fn directory(file: &[u8]) -> Result<(Range<usize>, u64), &'static str> {
    let (before_end, end) =
        file.split_last_chunk::<22>().filter(|(_, end)| end.starts_with(END)).ok_or("it does not end as a zip does")?;
    if u16_at(end, 20) != Some(0) {
        return Err("its zip end record announces a comment, which torch does not write");
    }
    let locator = before_end.split_last_chunk::<20>().filter(|(_, locator)| locator.starts_with(ZIP64_LOCATOR));
    let (directory_end, num_entries, size, start) = if let Some((before_locator, locator)) = locator {
        let at = u64_at(locator, 8).and_then(|at| usize::try_from(at).ok());
        let record = at.and_then(|at| before_locator.get(at..)).filter(|record| record.starts_with(ZIP64_END));
        let (Some(at), Some(record)) = (at, record) else {
            return Err("its zip64 end record is not where it should be");
        };
        (at, u64_at(record, 32), u64_at(record, 40), u64_at(record, 48))
    } else {
        let long = |at| u32_at(end, at).map(u64::from);
        (before_end.len(), u16_at(end, 10).map(u64::from), long(12), long(16))
    };
    let (Some(num_entries), Some(size), Some(start)) = (num_entries, size, start) else {
        return Err("its zip end record is cut off");
    };
    let is_adjacent = start.checked_add(size) == Some(directory_end as u64);
    // Since start <= directory_end, an offset in memory, the conversion cannot fail.
    let start = usize::try_from(start).ok().filter(|_| is_adjacent);
    Ok((start.ok_or("its zip directory is not where the end record says")?..directory_end, num_entries))
}

/// An entry of the central directory.
struct Entry<'a> {
    name: &'a str,
    method: u16,
    /// Bytes in the file.
    stored_size: u64,
    header_at: u64,
}

impl<'a> Entry<'a> {
    /// Splits the first entry off the directory; none when it is cut off, encrypted, or contradicts itself.
    fn split_from(directory: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (header, rest) = directory.split_at_checked(46).filter(|(header, _)| header.starts_with(CENTRAL_HEADER))?;
        let length = |at| u16_at(header, at).map(usize::from);
        let (name, rest) = rest.split_at_checked(length(28)?)?;
        let (extra, rest) = rest.split_at_checked(length(30)?)?;
        let (_comment, rest) = rest.split_at_checked(length(32)?)?;

        let method = u16_at(header, 10)?;
        let mut zip64 = zip64_extra(extra);
        // Fields too small for their value are all ones; the value is in the zip64 extra, in this order.
        let mut widened = |at| {
            let value = u32_at(header, at)?;
            if value != u32::MAX {
                return Some(u64::from(value));
            }
            let (value, rest) = zip64?.split_first_chunk::<8>()?;
            zip64 = Some(rest);
            Some(u64::from_le_bytes(*value))
        };
        let size = widened(24)?;
        let stored_size = widened(20)?;
        let header_at = widened(42)?;
        let is_encrypted = u16_at(header, 8)? & ENCRYPTED_FLAG != 0;
        if is_encrypted || (method == 0 && size != stored_size) {
            return None;
        }
        Some((Self { name: std::str::from_utf8(name).ok()?, method, stored_size, header_at }, rest))
    }

    /// Where the bytes lie in `data`, the part of the file before the directory. The sizes in the local header are not
    /// read: torch leaves them zero and writes them after the data.
    fn range(&self, data: &[u8]) -> Option<Range<usize>> {
        let header_at = usize::try_from(self.header_at).ok()?;
        let (header, rest) = data.get(header_at..)?.split_at_checked(30)?;
        let (name, rest) = rest.split_at_checked(u16_at(header, 26)?.into())?;
        if !header.starts_with(LOCAL_HEADER) || name != self.name.as_bytes() {
            return None;
        }
        let (_extra, rest) = rest.split_at_checked(u16_at(header, 28)?.into())?;
        let start = data.len() - rest.len();
        let size = usize::try_from(self.stored_size).ok()?;
        (size <= rest.len()).then(|| start..start + size)
    }
}

/// The body of the zip64 field among an entry's extra fields.
fn zip64_extra(mut extra: &[u8]) -> Option<&[u8]> {
    loop {
        let (field, rest) = extra.split_at_checked(4)?;
        let (body, rest) = rest.split_at_checked(u16_at(field, 2)?.into())?;
        if u16_at(field, 0) == Some(ZIP64_EXTRA_ID) {
            return Some(body);
        }
        extra = rest;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
