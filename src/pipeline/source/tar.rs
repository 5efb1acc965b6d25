//! A webdataset tar as img2dataset and DataComp write it: `{key}.jpg` with `{key}.txt` and `{key}.json` beside it, in
//! any order as long as the members of a key follow one another. The key ends at the first dot of the file name.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};
use tar::{Archive, EntryType};

use crate::error::{Error, Result};
use crate::pipeline::input::is_image_extension;
use crate::pipeline::row::InputColumns;
use crate::pipeline::source::{Emitter, stem};

/// Largest `.txt` or `.json` that is read.
const MAX_SIDECAR_BYTES: u64 = 16 << 20;

/// Sends every image of the tar at `path` as one shard.
pub(super) fn run(path: &Path, emitter: &mut Emitter<'_>) -> Result<()> {
    let name = stem(path);
    let name = [".tar.gz", ".tgz", ".tar"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
    if let Some(num_rows) = emitter.begin(name) {
        emitter.skip(num_rows);
        return Ok(());
    }
    let mut archive = Archive::new(open(path)?);
    let damaged = |error: std::io::Error| Error::Input {
        input: path.display().to_string(),
        reason: format!("the tar is damaged: {error}"),
        hint: "fetch it again; its finished rows are not kept, those of other shards are",
    };
    let mut sample = Sample::default();
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        if !matches!(entry.header().entry_type(), EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse) {
            continue;
        }
        let member = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((key, extension)) = split_member(&member) else { continue };
        if sample.key != key {
            std::mem::take(&mut sample).send(path, emitter);
            if emitter.is_done() {
                break;
            }
            sample.key = key.to_owned();
        }
        let size = entry.size();
        let mut read = |limit: u64| -> Result<Vec<u8>> {
            let mut bytes = Vec::with_capacity(size.min(limit) as usize);
            entry.read_to_end(&mut bytes).map_err(damaged)?;
            Ok(bytes)
        };
        let extension = extension.to_ascii_lowercase();
        if is_image_extension(&extension) && sample.image.is_none() {
            sample.image = Some(match emitter.check_size(size) {
                Ok(()) => Ok(read(emitter.max_image_bytes)?),
                Err(reason) => Err(reason),
            });
        } else if size <= MAX_SIDECAR_BYTES {
            match extension.as_str() {
                "txt" => sample.text = Some(String::from_utf8_lossy(&read(MAX_SIDECAR_BYTES)?).into_owned()),
                "json" => sample.json = Some(read(MAX_SIDECAR_BYTES)?),
                _ => {}
            }
        }
    }
    sample.send(path, emitter);
    emitter.end();
    Ok(())
}

/// Images in the tar, by its headers alone; `None` for a compressed or damaged one.
pub(super) fn count_images(path: &Path) -> Option<u64> {
    let mut file = File::open(path).ok()?;
    if is_gzip(&mut file).ok()? {
        return None;
    }
    let mut archive = Archive::new(BufReader::new(file));
    let mut count = 0;
    let mut last_key = String::new();
    for entry in archive.entries_with_seek().ok()? {
        let entry = entry.ok()?;
        let member = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((key, extension)) = split_member(&member) else { continue };
        if is_image_extension(extension) && last_key != key {
            key.clone_into(&mut last_key);
            count += 1;
        }
    }
    Some(count)
}

fn open(path: &Path) -> Result<Box<dyn Read>> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let is_gzip = is_gzip(&mut file).map_err(Error::io("read", path))?;
    let reader = BufReader::with_capacity(1 << 18, file);
    Ok(if is_gzip { Box::new(MultiGzDecoder::new(reader)) } else { Box::new(reader) })
}

/// Tells gzip by its first two bytes, and goes back to the start.
fn is_gzip(file: &mut File) -> std::io::Result<bool> {
    let mut magic = Vec::with_capacity(2);
    file.by_ref().take(2).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(magic == [0x1f, 0x8b])
}

/// Key and extension of a member: split at the first dot of the file name, folders belonging to the key.
fn split_member(member: &str) -> Option<(&str, &str)> {
    let name_start = member.rfind('/').map_or(0, |slash| slash + 1);
    let dot = name_start + member[name_start..].find('.')?;
    // A leading dot is a hidden file (`._x.jpg` of macOS), not a sample.
    (dot > name_start).then(|| (&member[..dot], &member[dot + 1..]))
}

/// The members of one key.
#[derive(Default)]
struct Sample {
    key: String,
    image: Option<Result<Vec<u8>, String>>,
    text: Option<String>,
    json: Option<Vec<u8>>,
}

impl Sample {
    /// Sends the sample if it has an image.
    fn send(self, source: &Path, emitter: &mut Emitter<'_>) {
        let Some(bytes) = self.image else { return };
        let mut input = InputColumns { key: self.key, source: source.display().to_string(), ..InputColumns::default() };
        let mut fields = match self.json.map(|json| serde_json::from_slice(&json)) {
            Some(Ok(Value::Object(fields))) => fields,
            _ => Map::new(),
        };
        input.url = take_text(&mut fields, "url");
        input.sha256 = take_text(&mut fields, "sha256");
        input.uid = take_text(&mut fields, "uid");
        let caption = take_text(&mut fields, "caption");
        input.org_caption = self.text.or(caption);
        // The key is a column of its own; repeating it in every row says nothing new.
        if fields.get("key").and_then(Value::as_str) == Some(&input.key) {
            fields.shift_remove("key");
        }
        input.metadata = (!fields.is_empty()).then(|| Value::Object(fields).to_string());
        emitter.push(input, bytes);
    }
}

/// Removes a text field; a field of another type stays in the metadata.
fn take_text(fields: &mut Map<String, Value>, name: &str) -> Option<String> {
    match fields.get(name) {
        Some(Value::String(_)) => match fields.shift_remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        },
        Some(Value::Null) => {
            fields.shift_remove(name);
            None
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::split_member;

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_file_name() {
        assert_eq!(split_member("000000012.jpg"), Some(("000000012", "jpg")));
        assert_eq!(split_member("a.b/c.seg.png"), Some(("a.b/c", "seg.png")));
        assert_eq!(split_member("a.b/noextension"), None);
        assert_eq!(split_member("a/._c.jpg"), None);
    }
}
