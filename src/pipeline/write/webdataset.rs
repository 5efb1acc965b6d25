//! webdataset tars, as img2dataset and `webdataset` read them: `{key}.jpg` with the image's bytes as they were, `{key}.txt`
//! with the new caption, `{key}.json` with the sidecar and our columns. A failed row is its `.json` alone.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::pipeline::load;
use crate::pipeline::write::AtomicFile;
use crate::pipeline::write::journal::Entry;
use crate::pipeline::write::written_row::WrittenRow;
use crate::storage::Location;

const BUFFER_BYTES: usize = 1 << 20;
/// Fields of a sidecar that have the name of a column; img2dataset's have a `status`, for instance.
const SHADOWED: &str = "sidecar";

/// Writes the rows of a shard to `file`, which is to be at `location`.
pub(super) fn write(
    file: &mut AtomicFile,
    location: &Location,
    rows: &mut dyn Iterator<Item = Result<Entry>>,
) -> Result<()> {
    let failed = |error| Error::at("write", location)(error);
    let mut builder = tar::Builder::new(BufWriter::with_capacity(BUFFER_BYTES, file));
    let mut keys = HashSet::new();
    for entry in rows {
        let Entry { row, image } = entry?;
        let key = member_key(&row.key, &mut keys);
        let mut add = |extension: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            builder.append_data(&mut header, format!("{key}.{extension}"), bytes).map_err(failed)
        };
        if let (true, Some(caption)) = (row.is_ok(), &row.re_caption) {
            add(load::extension(&image).unwrap_or("bin"), &image)?;
            add("txt", caption.as_bytes())?;
        }
        add("json", json_of(&row).to_string().as_bytes())?;
    }
    builder.into_inner().and_then(|mut writer| writer.flush()).map_err(failed)
}

/// Reads the rows of a finished file, in order.
pub(super) fn read(path: &Path, each: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
    let failed = |error| Error::io("read", path)(error);
    let file = File::open(path).map_err(failed)?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(BUFFER_BYTES, file));
    let mut image = Vec::new();
    for member in archive.entries().map_err(failed)? {
        let mut member = member.map_err(failed)?;
        let name = member.path_bytes().into_owned();
        if name.ends_with(b".json") {
            let json = serde_json::from_reader(&mut member).ok().and_then(row_of);
            let row = json.ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
            // The members of a failed row before this one are none.
            each(Entry { row, image: std::mem::take(&mut image) })?;
        } else if !name.ends_with(b".txt") {
            image.clear();
            member.read_to_end(&mut image).map_err(failed)?;
        }
    }
    Ok(())
}

/// A name for the row's members that readers take for one key: relative, without dots in the file name, and its own.
fn member_key(key: &str, taken: &mut HashSet<String>) -> String {
    let (folder, name) = key.rsplit_once('/').map_or(("", key), |(folder, name)| (folder, name));
    // The extension of a file's key says nothing here.
    let stem = name
        .rsplit_once('.')
        .filter(|(stem, extension)| !stem.is_empty() && crate::pipeline::input::is_image_extension(extension));
    let clean = |text: &str| text.replace(|char: char| char == '.' || char == '\\' || char.is_control(), "_");
    let name = clean(stem.map_or(name, |(stem, _)| stem));
    let folders = folder.split('/').filter(|part| !part.is_empty() && *part != "." && *part != "..");
    let folders = folders.map(|part| part.replace(|char: char| char == '\\' || char.is_control(), "_"));
    let name = folders.chain([if name.is_empty() { "_".to_owned() } else { name }]).collect::<Vec<_>>().join("/");
    let numbered = (2..).map(|number| format!("{name}_{number}"));
    let mut candidates = std::iter::once(name.clone()).chain(numbered);
    let key = candidates.find(|name| !taken.contains(name)).expect("bug: numbers do not end");
    taken.insert(key.clone());
    key
}

/// The sidecar's fields and our columns, the latter first; what has a column's name in the sidecar stands below `sidecar`.
fn json_of(row: &WrittenRow) -> Value {
    let mut json = serde_json::to_value(row).expect("bug: a row serialises");
    if let Some(ids) = &row.token_ids {
        json["token_ids"] = ids.clone().into();
    }
    let fields = json.as_object_mut().expect("bug: a row is an object");
    let sidecar = row.metadata.as_deref().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
    // A sidecar that is no object stays the text that it is.
    let Some(sidecar) = sidecar else { return json };
    fields.insert("metadata".to_owned(), Value::Null);
    let mut shadowed = Map::new();
    for (name, value) in sidecar {
        if fields.contains_key(&name) || name == SHADOWED {
            shadowed.insert(name, value);
        } else {
            fields.insert(name, value);
        }
    }
    if !shadowed.is_empty() {
        fields.insert(SHADOWED.to_owned(), shadowed.into());
    }
    json
}

/// The reverse of [`json_of`].
fn row_of(json: Map<String, Value>) -> Option<WrittenRow> {
    let mut columns = Map::new();
    let mut sidecar = Map::new();
    let mut shadowed = Map::new();
    let is_column = |name: &str| COLUMNS.contains(&name);
    for (name, value) in json {
        match value {
            value if is_column(&name) => drop(columns.insert(name, value)),
            Value::Object(fields) if name == SHADOWED => shadowed = fields,
            value => drop(sidecar.insert(name, value)),
        }
    }
    sidecar.extend(shadowed);
    if !sidecar.is_empty() {
        columns.insert("metadata".to_owned(), Value::Object(sidecar).to_string().into());
    }
    WrittenRow::from_json(columns.into()).ok()
}

/// Names of a row's columns.
const COLUMNS: [&str; 22] = [
    "key",
    "url",
    "org_caption",
    "sha256",
    "uid",
    "re_caption",
    "org_length",
    "re_length",
    "org_clip_score",
    "re_clip_score",
    "org_gpt4v_score",
    "re_gpt4v_score",
    "status",
    "error",
    "finish_reason",
    "num_tokens",
    "width",
    "height",
    "image_sha256",
    "source",
    "metadata",
    "token_ids",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_members_are_relative_without_dots_and_their_own() {
        let mut taken = HashSet::new();
        let mut key = |key| member_key(key, &mut taken);
        assert_eq!(key("000000012"), "000000012");
        assert_eq!(key("000000012"), "000000012_2");
        assert_eq!(key("/data/../x.y/a.b.png"), "data/x.y/a_b");
        assert_eq!(key("a_b.JPEG"), "a_b");
        assert_eq!(key("a.b.gif"), "a_b_2");
        assert_eq!(key(".png"), "_png");
    }

    #[test]
    fn a_row_comes_back_from_its_json() {
        let columns = serde_json::json!({
            "key": "1", "url": null, "org_caption": "a", "sha256": null, "uid": null, "re_caption": "b", "org_length": 1,
            "re_length": 1, "org_clip_score": 0.25, "re_clip_score": null, "org_gpt4v_score": null,
            "re_gpt4v_score": null, "status": "ok", "error": null, "finish_reason": "stop", "num_tokens": 1, "width": 2,
            "height": 3, "image_sha256": "x", "source": "s",
            "metadata": r#"{"similarity":0.5,"status":"success","sidecar":7}"#,
        });
        let row = WrittenRow::from_json(columns).unwrap();
        assert_eq!(serde_json::to_value(&row).unwrap().as_object().unwrap().len() + 1, COLUMNS.len());
        let json = json_of(&row);
        assert_eq!((&json["status"], &json["similarity"]), (&"ok".into(), &0.5.into()));
        assert_eq!(json["sidecar"], serde_json::json!({"status": "success", "sidecar": 7}));
        let back = row_of(json.as_object().unwrap().clone()).unwrap();
        assert_eq!(json_of(&back).to_string(), json.to_string());
        assert_eq!(back.re_caption, row.re_caption);
    }
}
