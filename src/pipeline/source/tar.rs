//! A webdataset tar as img2dataset and DataComp write it: `{key}.jpg` with `{key}.txt` and `{key}.json`, in any order within
//! a [window]. The key ends at the first dot of the file name. The tar is read as a stream, once.

mod sidecar;
mod window;

use std::fs::File;
use std::io::{BufReader, Read};

use bytes::Bytes;
use tar::{Archive, Entry, EntryType};

use crate::error::{Error, Result};
use crate::pipeline::input::is_image_extension;
use crate::pipeline::source::emitter::{Begun, Emitter, check_size};
use crate::pipeline::source::identity::identity;
use crate::pipeline::source::limits::{BoundedGzip, HeaderBudget, SourceLimits};
use crate::pipeline::source::stem;
use crate::pipeline::source::tar::window::{Member, Window};
use crate::storage::Location;

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
            let or_none = if emitter.num_rows() == 0 { ", or it is none" } else { "" };
            emitter.abandon();
            // What the object store says is no damage of the tar.
            Ok(Some(error.downcast::<Error>().unwrap_or_else(|error| Error::Input {
                input: location.to_string(),
                reason: format!("the tar is damaged{or_none}: {error}"),
                hint: "fetch it again; its rows are in no file of --out",
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
    let limits = emitter.limits().clone();
    let budget = HeaderBudget::new();
    let reader = location.open().map_err(std::io::Error::other)?;
    let mut archive = Archive::new(budget.reader(uncompressed(reader, &limits)?));
    let mut window = Window::new(location.to_string(), limits.max_json_depth);
    for entry in archive.entries()? {
        let mut entry = entry?;
        // Until the next member: the rest of this one, whose size in a sparse file is that of its blocks.
        let is_sparse = entry.header().entry_type() == EntryType::GNUSparse;
        budget.start(if is_sparse { entry.header().entry_size()? } else { entry.size() });
        if let Some((key, member)) = read_member(&mut entry, &limits)? {
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
fn read_member(entry: &mut Entry<'_, impl Read>, limits: &SourceLimits) -> std::io::Result<Option<(Vec<u8>, Member)>> {
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
        entry.by_ref().take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let member = if is_image_extension(&extension) {
        let image = match check_size(size, limits.max_image_bytes) {
            _ if is_link => Err("the image is a link inside of the tar".to_owned()),
            Ok(()) => Ok(Bytes::from(read(limits.max_image_bytes)?)),
            Err(reason) => Err(reason),
        };
        Member::Image { image, extension }
    } else if is_link || size > limits.max_sidecar_bytes {
        return Ok(None);
    } else {
        match extension.as_str() {
            "txt" => Member::Text(String::from_utf8_lossy(&read(limits.max_sidecar_bytes)?).into_owned()),
            "json" => Member::Json(read(limits.max_sidecar_bytes)?),
            _ => return Ok(None),
        }
    };
    Ok(Some((key.to_owned(), member)))
}

/// Reads the rest of a member, and looks at the stop flags meanwhile: a small compressed tar may hold an endless one.
fn pass_over(entry: &mut Entry<'_, impl Read>, emitter: &mut Emitter<'_>) -> std::io::Result<()> {
    const STEP_BYTES: u64 = 16 << 20;
    // Its holes are not in the tar, and may be of any size.
    if entry.header().entry_type() == EntryType::GNUSparse {
        return Ok(());
    }
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
    let budget = HeaderBudget::new();
    let mut archive = Archive::new(budget.reader(reader));
    let mut count = 0;
    for entry in archive.entries_with_seek().ok()? {
        let entry = entry.ok()?;
        budget.start(0);
        let member = entry.path_bytes();
        let Some((_, extension)) = split_member(&member) else { continue };
        count += u64::from(is_image_extension(&String::from_utf8_lossy(extension)));
    }
    Some(count)
}

fn uncompressed(reader: impl Read + 'static, limits: &SourceLimits) -> std::io::Result<Box<dyn Read>> {
    let mut reader = BufReader::with_capacity(1 << 18, reader);
    Ok(if is_gzip(&mut reader)? { Box::new(BoundedGzip::new(reader, limits.max_gzip_ratio)) } else { Box::new(reader) })
}

/// Tells gzip by its first two bytes, which stay unread.
fn is_gzip(reader: &mut BufReader<impl Read>) -> std::io::Result<bool> {
    use std::io::BufRead;
    Ok(reader.fill_buf()?.starts_with(&[0x1f, 0x8b]))
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
