//! Which columns of a Parquet file are the image, the key, the caption: told by type and name.

use arrow_schema::{DataType, Schema};

use crate::error::{Error, Result};
use crate::storage::Location;

/// Names of image columns, where several columns hold bytes.
const IMAGE_NAMES: [&str; 9] = ["image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "images"];
const KEY_NAMES: [&str; 2] = ["key", "__key__"];
const URL_NAMES: [&str; 3] = ["url", "URL", "image_url"];
/// Recap-DataComp's, img2dataset's, DataComp's, LAION's.
const CAPTION_NAMES: [&str; 4] = ["org_caption", "caption", "text", "TEXT"];

/// Indices of top-level columns.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) image: usize,
    pub(super) key: Option<usize>,
    pub(super) url: Option<usize>,
    pub(super) caption: Option<usize>,
    pub(super) sha256: Option<usize>,
    pub(super) uid: Option<usize>,
    /// What goes to the metadata, in the order of the file.
    pub(super) rest: Vec<usize>,
}

impl Columns {
    /// # Errors
    /// [`Error::Input`] when there is no image column, or more than one that may be meant.
    pub(super) fn find(location: &Location, schema: &Schema, image_column: Option<&str>) -> Result<Self> {
        let image = image(schema, image_column).map_err(|(reason, hint)| Error::Input {
            input: location.to_string(),
            reason,
            hint,
        })?;
        let find = |names: &[&str], accepts: fn(&DataType) -> bool| {
            let found = names.iter().find_map(|name| schema.column_with_name(name));
            found.filter(|(_, field)| accepts(field.data_type())).map(|(index, _)| index)
        };
        let is_text = |data_type: &DataType| *data_type == DataType::Utf8;
        let mut columns = Self {
            image,
            key: find(&KEY_NAMES, |data_type| *data_type == DataType::Utf8 || data_type.is_integer()),
            url: find(&URL_NAMES, is_text),
            caption: find(&CAPTION_NAMES, is_text),
            sha256: find(&["sha256"], is_text),
            uid: find(&["uid"], is_text),
            rest: Vec::new(),
        };
        let known = columns.mapped();
        let is_rest = |index: &usize| !known.contains(index) && !is_bytes(schema.field(*index).data_type());
        columns.rest = (0..schema.fields().len()).filter(is_rest).collect();
        Ok(columns)
    }

    fn mapped(&self) -> Vec<usize> {
        let texts = [self.key, self.url, self.caption, self.sha256, self.uid];
        std::iter::once(self.image).chain(texts.into_iter().flatten()).collect()
    }

    /// The columns to read, in the order of the file; the image only where it is wanted.
    pub(super) fn read(&self, with_image: bool) -> Vec<usize> {
        let mut all = self.mapped();
        all.retain(|&index| with_image || index != self.image);
        all.extend(&self.rest);
        all.sort_unstable();
        all
    }
}

/// A column of bytes, or a struct with a field of them, as `datasets` has images.
fn is_bytes(data_type: &DataType) -> bool {
    match data_type {
        DataType::Binary | DataType::FixedSizeBinary(_) => true,
        DataType::Struct(fields) => {
            fields.iter().any(|field| field.name() == "bytes" && *field.data_type() == DataType::Binary)
        }
        _ => false,
    }
}

fn image(schema: &Schema, image_column: Option<&str>) -> Result<usize, (String, &'static str)> {
    let is_candidate = |data_type: &DataType| is_bytes(data_type) && !matches!(data_type, DataType::FixedSizeBinary(_));
    if let Some(name) = image_column {
        return match schema.column_with_name(name) {
            Some((index, field)) if is_candidate(field.data_type()) => Ok(index),
            Some((_, field)) => Err((
                format!("column `{name}` is {}, not bytes of images", field.data_type()),
                "--image-column names a column of bytes, or a struct of `bytes` and `path`",
            )),
            None => {
                Err((format!("there is no column `{name}`; columns are {}", names(schema)), "check --image-column"))
            }
        };
    }
    let fields = schema.fields();
    let candidates: Vec<usize> = (0..fields.len()).filter(|&index| is_candidate(fields[index].data_type())).collect();
    match candidates[..] {
        [] => Err(no_image(schema)),
        [only] => Ok(only),
        _ => {
            let named = IMAGE_NAMES.iter().find_map(|name| schema.column_with_name(name)).map(|(index, _)| index);
            named.filter(|index| candidates.contains(index)).ok_or_else(|| {
                let names: Vec<&str> = candidates.iter().map(|&index| fields[index].name().as_str()).collect();
                (format!("several columns hold bytes: {}", names.join(", ")), "say which with --image-column")
            })
        }
    }
}

fn no_image(schema: &Schema) -> (String, &'static str) {
    let has = |name: &str| schema.column_with_name(name).is_some();
    let reason = format!("no column of it holds images; columns are {}", names(schema));
    let hint = if has("url") && has("status") && has("error_message") {
        "this is img2dataset's table of a shard: give the .tar beside it"
    } else if URL_NAMES.iter().any(|name| has(name)) {
        "these are links to images: download them first (img2dataset), or give their addresses on standard input"
    } else {
        "images are a column of bytes, or a struct of `bytes` and `path` as `datasets` writes"
    };
    (reason, hint)
}

fn names(schema: &Schema) -> String {
    const MAX_NAMES: usize = 20;
    let fields = schema.fields();
    let mut names: Vec<&str> = fields.iter().take(MAX_NAMES).map(|field| field.name().as_str()).collect();
    if fields.len() > MAX_NAMES {
        names.push("…");
    }
    names.join(", ")
}
