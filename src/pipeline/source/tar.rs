//! A webdataset tar as img2dataset and DataComp write it: `{key}.jpg` with `{key}.txt` and `{key}.json` beside it, in
//! any order as long as the members of a key follow one another. The key ends at the first dot of the file name.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use recaption_export::hex;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tar::{Archive, EntryType};

use crate::error::{Error, Result};
use crate::pipeline::input::is_image_extension;
use crate::pipeline::row::InputColumns;
use crate::pipeline::source::limits::{BoundedGzip, HeaderBudget, SourceLimits, is_deeper_than};
use crate::pipeline::source::{Emitter, other_input, stem};

/// Sends every image of the tar at `path` as one shard. Returns what is wrong with the tar, if anything is.
pub(super) fn run(path: &Path, emitter: &mut Emitter<'_>) -> Result<Option<Error>> {
    let name = stem(path);
    let name = [".tar.gz", ".tgz", ".tar"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
    let identity = match identity(path) {
        Ok(identity) => identity,
        Err(error) => return Ok(Some(error)),
    };
    if let Some(finished) = emitter.begin(name) {
        if finished.identity.is_some_and(|known| known != identity) {
            return Err(other_input(&path.display().to_string(), name));
        }
        emitter.skip(finished.counts.rows as usize);
        return Ok(None);
    }
    match send_members(path, emitter) {
        Ok(()) if emitter.num_rows > 0 || emitter.is_done() => {
            emitter.end(identity);
            Ok(None)
        }
        Ok(()) => {
            emitter.abandon();
            Ok(Some(Error::Input {
                input: path.display().to_string(),
                reason: "no image in it".to_owned(),
                hint: "members are named {key}.jpg, .jpeg, .png, .webp, .gif or .bmp; the key ends at the first dot",
            }))
        }
        Err(error) => {
            emitter.abandon();
            Ok(Some(Error::Input {
                input: path.display().to_string(),
                reason: format!("the tar is damaged: {error}"),
                hint: "fetch it again; none of its rows were written",
            }))
        }
    }
}

/// Tells one tar from another of the same name, wherever it lies: its length, its beginning and its end.
fn identity(path: &Path) -> Result<String> {
    const SAMPLE_BYTES: u64 = 1 << 16;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut sample = Vec::new();
        file.by_ref().take(SAMPLE_BYTES).read_to_end(&mut sample)?;
        file.seek(SeekFrom::Start(length.saturating_sub(SAMPLE_BYTES)))?;
        file.take(SAMPLE_BYTES).read_to_end(&mut sample)?;
        sample.extend(length.to_le_bytes());
        Ok(hex(&Sha256::digest(sample)))
    };
    read().map_err(Error::io("read", path))
}

fn send_members(path: &Path, emitter: &mut Emitter<'_>) -> std::io::Result<()> {
    let limits = emitter.limits.clone();
    let max_sidecar_bytes = limits.max_sidecar_bytes;
    let budget = HeaderBudget::new();
    let mut archive = Archive::new(budget.reader(open(path, &limits)?));
    let mut sample = Sample::default();
    let mut entries = archive.entries()?;
    while let Some(entry) = entries.next() {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        // Until the next member: the rest of this one, whose size in a sparse file is that of its blocks.
        let is_sparse = kind == EntryType::GNUSparse;
        budget.start(if is_sparse { entry.header().entry_size()? } else { entry.size() });
        let is_link = matches!(kind, EntryType::Link | EntryType::Symlink);
        if !is_link && !matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse) {
            continue;
        }
        let member = entry.path_bytes().into_owned();
        let Some((key, extension)) = split_member(&member) else { continue };
        if sample.key != key {
            std::mem::take(&mut sample).send(path, emitter);
            if emitter.is_done() {
                return Ok(());
            }
            sample.key = key.to_owned();
        }
        let size = entry.size();
        let mut read = |limit: u64| -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::with_capacity(size.min(limit) as usize);
            entry.by_ref().take(limit).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let extension = String::from_utf8_lossy(extension).to_ascii_lowercase();
        if is_image_extension(&extension) {
            let image = match emitter.check_size(size) {
                _ if is_link => Err("the image is a link inside of the tar".to_owned()),
                _ if !sample.images.is_empty() => Err(format!("the key has another image before this .{extension}")),
                Ok(()) => Ok(read(emitter.limits.max_image_bytes)?),
                Err(reason) => Err(reason),
            };
            sample.images.push(image);
        } else if size <= max_sidecar_bytes && !is_link {
            match extension.as_str() {
                "txt" => sample.text = Some(String::from_utf8_lossy(&read(max_sidecar_bytes)?).into_owned()),
                "json" => sample.json = Some(read(max_sidecar_bytes)?),
                _ => {}
            }
        }
    }
    sample.send(path, emitter);
    Ok(())
}

/// Images in the tar, by its headers alone; `None` for a compressed or damaged one.
pub(super) fn count_images(path: &Path) -> Option<u64> {
    let mut file = File::open(path).ok()?;
    if is_gzip(&mut file).ok()? {
        return None;
    }
    let budget = HeaderBudget::new();
    let mut archive = Archive::new(budget.reader(BufReader::new(file)));
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

fn open(path: &Path, limits: &SourceLimits) -> std::io::Result<Box<dyn Read>> {
    let mut file = File::open(path)?;
    let is_gzip = is_gzip(&mut file)?;
    let reader = BufReader::with_capacity(1 << 18, file);
    Ok(if is_gzip { Box::new(BoundedGzip::new(reader, limits.max_gzip_ratio)) } else { Box::new(reader) })
}

/// Tells gzip by its first two bytes, and goes back to the start.
fn is_gzip(file: &mut File) -> std::io::Result<bool> {
    let mut magic = Vec::with_capacity(2);
    file.by_ref().take(2).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(magic == [0x1f, 0x8b])
}

/// Key and extension of a member: split at the first dot of the file name, folders belonging to the key, `./` not.
fn split_member(member: &[u8]) -> Option<(&[u8], &[u8])> {
    let member = member.strip_prefix(b"./").unwrap_or(member);
    let name_start = member.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let dot = name_start + member[name_start..].iter().position(|&byte| byte == b'.')?;
    // A leading dot is a hidden file (`._x.jpg` of macOS), not a sample.
    (dot > name_start).then(|| (&member[..dot], &member[dot + 1..]))
}

/// The members of one key.
#[derive(Default)]
struct Sample {
    key: Vec<u8>,
    /// Its image, and failures for what claims to be another image of it.
    images: Vec<Result<Vec<u8>, String>>,
    text: Option<String>,
    json: Option<Vec<u8>>,
}

impl Sample {
    /// Sends the sample if it has an image.
    fn send(self, source: &Path, emitter: &mut Emitter<'_>) {
        if self.images.is_empty() {
            return;
        }
        let key = String::from_utf8_lossy(&self.key).into_owned();
        let mut input = InputColumns { key, source: source.display().to_string(), ..InputColumns::default() };
        let mut fields = Map::new();
        match self.json.as_deref().map(|json| parse_sidecar(json, emitter.limits.max_json_depth)) {
            Some(Ok(parsed)) => fields = parsed,
            // Unreadable, but not lost.
            Some(Err(text)) => input.metadata = Some(text),
            None => {}
        }
        input.url = take_text(&mut fields, "url");
        input.sha256 = take_text(&mut fields, "sha256");
        input.uid = take_text(&mut fields, "uid");
        input.org_caption = match self.text {
            Some(text) => {
                // A caption that differs from the `.txt` stays in the metadata.
                if fields.get("caption").and_then(Value::as_str) == Some(&text) {
                    fields.shift_remove("caption");
                }
                Some(text)
            }
            None => take_text(&mut fields, "caption"),
        };
        // The key is a column of its own; repeating it in every row says nothing new.
        if fields.get("key").and_then(Value::as_str) == Some(&input.key) {
            fields.shift_remove("key");
        }
        if !fields.is_empty() {
            input.metadata = Some(Value::Object(fields).to_string());
        }
        for image in self.images {
            emitter.push(input.clone(), image);
        }
    }
}

/// A sidecar's object. Python writes NaN and infinities, which JSON has no word for: they become null. What is no object
/// at all comes back as its text.
fn parse_sidecar(json: &[u8], max_depth: usize) -> Result<Map<String, Value>, String> {
    if is_deeper_than(json, max_depth) {
        return Err(String::from_utf8_lossy(json).into_owned());
    }
    let parse = |json: &[u8]| match serde_json::from_slice(json) {
        Ok(Value::Object(fields)) => Some(fields),
        _ => None,
    };
    parse(json).or_else(|| parse(&without_non_finite(json))).ok_or_else(|| String::from_utf8_lossy(json).into_owned())
}

/// `NaN`, `Infinity` and `-Infinity` outside of strings replaced by `null`.
fn without_non_finite(json: &[u8]) -> Vec<u8> {
    let mut clean = Vec::with_capacity(json.len());
    let mut is_in_string = false;
    let mut rest = json;
    while let [byte, tail @ ..] = rest {
        if is_in_string && *byte == b'\\' && !tail.is_empty() {
            clean.extend(&rest[..2]);
            rest = &tail[1..];
            continue;
        }
        is_in_string ^= *byte == b'"';
        let words: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
        match words.iter().find(|word| !is_in_string && rest.starts_with(word)) {
            Some(word) => {
                clean.extend(b"null");
                rest = &rest[word.len()..];
            }
            None => {
                clean.push(*byte);
                rest = tail;
            }
        }
    }
    clean
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

    #[test]
    fn numbers_that_json_has_no_word_for_become_null() {
        let fields = parse_sidecar(br#"{"url": "a NaN \" Infinity", "score": NaN, "low": -Infinity}"#, 9).unwrap();
        assert_eq!(fields["url"], "a NaN \" Infinity");
        assert!(fields["score"].is_null() && fields["low"].is_null());
        assert_eq!(parse_sidecar(b"[1]", 9), Err("[1]".to_owned()));
    }
}
