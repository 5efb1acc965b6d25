//! A webdataset tar as img2dataset and DataComp write it: `{key}.jpg` with `{key}.txt` and `{key}.json`, in any order within
//! a [window]. The key ends at the first dot of the file name. The tar is read as a stream, once.

mod sidecar;
mod window;

use std::cell::Cell;
use std::fs::File;
use std::io::{BufReader, Read};
use std::rc::Rc;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use tar::{Archive, Entry, EntryType};

use crate::error::{Error, Result};
use crate::pipeline::input::is_image_extension;
use crate::pipeline::source::emitter::{Begun, Emitter, check_size};
use crate::pipeline::source::identity::identity;
use crate::pipeline::source::stem;
use crate::pipeline::source::tar::window::{Member, Window};
use crate::storage::Location;

/// Largest `.txt` or `.json` that is read.
const MAX_SIDECAR_BYTES: u64 = 16 << 20;
/// Most bytes of headers, long names and PAX records before one member.
const MAX_HEADER_BYTES: u64 = 4 << 20;

/// Sends every image of the tar as one shard. Returns what is wrong with the tar, if anything is.
pub(super) fn run(location: &Location, emitter: &mut Emitter<'_>) -> Result<Option<Error>> {
    let name = stem(location);
    let name = [".tar.gz", ".tgz", ".tar"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
    let identity = match identity(location) {
        Ok(identity) => identity,
        Err(error) => return Ok(Some(error)),
    };
    if emitter.begin(name, Some(&identity))? == Begun::Skip {
        return Ok(None);
    }
    match send_members(location, emitter) {
        Ok(num_late) if emitter.num_rows() > 0 || emitter.is_done() => {
            if num_late > 0 {
                tracing::warn!("`{location}`: {num_late} .txt or .json came too long after their images to be used");
            }
            emitter.end(&identity)?;
            Ok(None)
        }
        Ok(_) => {
            emitter.abandon();
            Ok(Some(Error::Input {
                input: location.to_string(),
                reason: "no image in it".to_owned(),
                hint: "members are named {key}.jpg, .jpeg, .png, .webp, .gif or .bmp; the key ends at the first dot",
            }))
        }
        Err(TarError::Run(error)) => Err(error),
        Err(TarError::Damaged(error)) => {
            emitter.abandon();
            // What the object store says is no damage of the tar.
            Ok(Some(error.downcast::<Error>().unwrap_or_else(|error| Error::Input {
                input: location.to_string(),
                reason: format!("the tar is damaged: {error}"),
                hint: "fetch it again; none of its rows were written",
            })))
        }
    }
}

/// Why a tar is not read to its end.
enum TarError {
    /// It cannot be read.
    Damaged(std::io::Error),
    /// The run cannot go on.
    Run(Error),
}

impl From<std::io::Error> for TarError {
    fn from(error: std::io::Error) -> Self {
        Self::Damaged(error)
    }
}

impl From<Error> for TarError {
    fn from(error: Error) -> Self {
        Self::Run(error)
    }
}

/// Returns how many sidecars came too late.
fn send_members(location: &Location, emitter: &mut Emitter<'_>) -> Result<usize, TarError> {
    let budget = Rc::new(Cell::new(u64::MAX));
    let reader = location.open().map_err(std::io::Error::other)?;
    let mut archive = Archive::new(Budgeted { reader: uncompressed(reader)?, budget: Rc::clone(&budget) });
    let mut window = Window::new(location.to_string());
    let mut entries = archive.entries()?;
    loop {
        budget.set(MAX_HEADER_BYTES);
        let Some(entry) = entries.next() else { break };
        budget.set(u64::MAX);
        let mut entry = entry?;
        if let Some((key, member)) = read_member(&mut entry, emitter.max_image_bytes())? {
            window.add(&key, member, emitter)?;
        }
        pass_over(&mut entry, emitter)?;
        if emitter.is_done() {
            return Ok(0);
        }
    }
    Ok(window.finish(emitter)?)
}

/// Key and contents of a member that a row is made of. Links are inert: nothing is ever looked up by what they name.
fn read_member(entry: &mut Entry<'_, impl Read>, max_image_bytes: u64) -> std::io::Result<Option<(Vec<u8>, Member)>> {
    let kind = entry.header().entry_type();
    let is_link = matches!(kind, EntryType::Link | EntryType::Symlink);
    if !is_link && !matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse) {
        return Ok(None);
    }
    let path = entry.path_bytes().into_owned();
    let Some((key, extension)) = split_member(&path) else { return Ok(None) };
    let extension = String::from_utf8_lossy(extension).to_ascii_lowercase();
    let size = entry.size();
    let mut read = |limit: u64| -> std::io::Result<Vec<u8>> {
        // A header may claim any size: no more is set aside than a usual image takes.
        let mut bytes = Vec::with_capacity(size.min(limit).min(1 << 20) as usize);
        entry.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let member = if is_image_extension(&extension) {
        let image = match check_size(size, max_image_bytes) {
            _ if is_link => Err("the image is a link inside of the tar".to_owned()),
            Ok(()) => Ok(Bytes::from(read(max_image_bytes)?)),
            Err(reason) => Err(reason),
        };
        Member::Image { image, extension }
    } else if is_link || size > MAX_SIDECAR_BYTES {
        return Ok(None);
    } else {
        match extension.as_str() {
            "txt" => Member::Text(String::from_utf8_lossy(&read(MAX_SIDECAR_BYTES)?).into_owned()),
            "json" => Member::Json(read(MAX_SIDECAR_BYTES)?),
            _ => return Ok(None),
        }
    };
    Ok(Some((key.to_owned(), member)))
}

/// Reads the rest of a member, and looks at the stop flags meanwhile: a small compressed tar may hold an endless one.
fn pass_over(entry: &mut Entry<'_, impl Read>, emitter: &mut Emitter<'_>) -> std::io::Result<()> {
    const STEP_BYTES: u64 = 16 << 20;
    while std::io::copy(&mut entry.by_ref().take(STEP_BYTES), &mut std::io::sink())? == STEP_BYTES && !emitter.is_done()
    {
    }
    Ok(())
}

/// Images in the tar, by its headers alone; `None` for one that is compressed, damaged or far away.
pub(super) fn count_images(location: &Location) -> Option<u64> {
    let file = File::open(location.local_path()?).ok()?;
    let mut reader = BufReader::new(file);
    if is_gzip(&mut reader).ok()? {
        return None;
    }
    let mut archive = Archive::new(reader);
    let mut count = 0;
    for entry in archive.entries_with_seek().ok()? {
        let entry = entry.ok()?;
        let member = entry.path_bytes();
        let Some((_, extension)) = split_member(&member) else { continue };
        count += u64::from(is_image_extension(&String::from_utf8_lossy(extension)));
    }
    Some(count)
}

fn uncompressed(reader: impl Read + 'static) -> std::io::Result<Box<dyn Read>> {
    let mut reader = BufReader::with_capacity(1 << 18, reader);
    Ok(if is_gzip(&mut reader)? { Box::new(MultiGzDecoder::new(reader)) } else { Box::new(reader) })
}

/// Tells gzip by its first two bytes, which stay unread.
fn is_gzip(reader: &mut BufReader<impl Read>) -> std::io::Result<bool> {
    use std::io::BufRead;
    Ok(reader.fill_buf()?.starts_with(&[0x1f, 0x8b]))
}

/// A reader that ends in an error after so many bytes: the tar library reads long names and PAX records whole, however long
/// they say they are.
struct Budgeted<R> {
    reader: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for Budgeted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = self.budget.get();
        if left == 0 && !buffer.is_empty() {
            return Err(std::io::Error::other(format!("a member's headers are longer than {MAX_HEADER_BYTES} bytes")));
        }
        let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let length = self.reader.read(&mut buffer[..length])?;
        self.budget.set(left - length as u64);
        Ok(length)
    }
}

/// Key and extension of a member: split at the first dot of the file name, folders belonging to the key, `./` not.
fn split_member(member: &[u8]) -> Option<(&[u8], &[u8])> {
    let member = member.strip_prefix(b"./").unwrap_or(member);
    let name_start = member.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let dot = name_start + member[name_start..].iter().position(|&byte| byte == b'.')?;
    // A leading dot is a hidden file (`._x.jpg` of macOS), not a sample.
    (dot > name_start).then(|| (&member[..dot], &member[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_file_name() {
        let split = |member: &'static str| {
            let (key, extension) = split_member(member.as_bytes())?;
            Some((std::str::from_utf8(key).unwrap(), std::str::from_utf8(extension).unwrap()))
        };
        assert_eq!(split("000000012.jpg"), Some(("000000012", "jpg")));
        assert_eq!(split("./b.jpg"), Some(("b", "jpg")));
        assert_eq!(split("a.b/c.seg.png"), Some(("a.b/c", "seg.png")));
        assert_eq!(split("a.b/noextension"), None);
        assert_eq!(split("a/._c.jpg"), None);
    }
}
