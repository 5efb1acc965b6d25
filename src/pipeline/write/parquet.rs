//! Parquet: the columns of Recap-DataComp-1B and ours, zstd; the counts of the rows stand in the file's metadata, so
//! that a resumed run need not read them.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{Int64Builder, ListBuilder};
use arrow_array::{ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::error::{Error, Result};
use crate::model::sequence::FinishReason;
use crate::pipeline::write::AtomicFile;
use crate::pipeline::write::journal::Entry;
use crate::pipeline::write::output::FinishedShard;
use crate::pipeline::write::written_row::WrittenRow;
use crate::storage::Location;

/// Key of the shard's counts and identity in the file's metadata.
const SHARD_KEY: &str = "recaption.shard";

/// Rows that are turned into columns at a time.
const ROWS_PER_BATCH: usize = 1024;
/// A row group is in memory until it is whole: compressed, this much of it.
const MAX_ROW_GROUP_BYTES: usize = 64 << 20;

/// Writes the rows of a shard to `file`, which is to be at `location`.
pub(super) fn write(
    file: &mut AtomicFile,
    location: &Location,
    rows: &mut dyn Iterator<Item = Result<Entry>>,
    shard: &FinishedShard,
    with_token_ids: bool,
) -> Result<()> {
    let shard = serde_json::to_string(shard).expect("bug: counts serialise");
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_key_value_metadata(Some(vec![KeyValue::new(SHARD_KEY.to_owned(), shard)]))
        .build();
    let failed = |source| disk_error("write", location, source);
    let schema = record_batch(&[], with_token_ids).schema();
    let mut writer = ArrowWriter::try_new(file, schema, Some(properties)).map_err(failed)?;
    loop {
        let batch = rows.take(ROWS_PER_BATCH).map(|entry| Ok(entry?.row)).collect::<Result<Vec<_>>>()?;
        if batch.is_empty() {
            break;
        }
        writer.write(&record_batch(&batch, with_token_ids)).map_err(failed)?;
        if writer.in_progress_size() > MAX_ROW_GROUP_BYTES {
            writer.flush().map_err(failed)?;
        }
    }
    writer.close().map(|_| ()).map_err(failed)
}

/// Reads the rows of a finished file, in order.
pub(super) fn read(path: &Path, each: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
    let location = &Location::from(path);
    let file = File::open(path).map_err(Error::io("open", path))?;
    let failed = |source| disk_error("read", location, source);
    let reader = SerializedFileReader::new(file).map_err(failed)?;
    for row in reader.get_row_iter(None).map_err(failed)? {
        let json = row.map_err(failed)?.to_json_value();
        let row = WrittenRow::from_json(json)
            .map_err(|error| failed(ParquetError::General(format!("its columns are not those of a run: {error}"))))?;
        each(Entry { row, image: Vec::new() })?;
    }
    Ok(())
}

/// What a finished file says of its shard, from its metadata.
pub(super) fn read_finished(path: &Path) -> Result<FinishedShard> {
    let location = &Location::from(path);
    let file = File::open(path).map_err(Error::io("open", path))?;
    let reader = SerializedFileReader::new(file).map_err(|source| disk_error("read", location, source))?;
    let metadata = reader.metadata().file_metadata();
    let shard = metadata
        .key_value_metadata()
        .and_then(|pairs| pairs.iter().find(|pair| pair.key == SHARD_KEY))
        .and_then(|pair| serde_json::from_str(pair.value.as_deref()?).ok());
    shard.ok_or_else(|| {
        let reason = format!("it has no `{SHARD_KEY}`: another program wrote it");
        disk_error("read", location, ParquetError::General(reason))
    })
}

/// The operating system's error if there is one inside, so that a full disk is told as that.
fn disk_error(action: &'static str, location: &Location, source: ParquetError) -> Error {
    let failed = |source| Error::Parquet { action, path: location.to_string().into(), source };
    match source {
        ParquetError::External(inner) => match inner.downcast::<std::io::Error>() {
            Ok(error) => Error::at(action, location)(*error),
            Err(inner) => failed(ParquetError::External(inner)),
        },
        source => failed(source),
    }
}

/// The columns, in the order of the contract.
fn record_batch(rows: &[WrittenRow], with_token_ids: bool) -> RecordBatch {
    let mut columns = Columns { rows, fields: Vec::new(), arrays: Vec::new() };
    columns.required("key", |row| &row.key);
    columns.text("url", |row| row.url.as_deref());
    columns.text("org_caption", |row| row.org_caption.as_deref());
    columns.text("sha256", |row| row.sha256.as_deref());
    columns.text("uid", |row| row.uid.as_deref());
    columns.text("re_caption", |row| row.re_caption.as_deref());
    columns.int64("org_length", |row| row.org_length);
    columns.int64("re_length", |row| row.re_length);
    columns.float64("org_clip_score", |row| row.org_clip_score);
    columns.float64("re_clip_score", |row| row.re_clip_score);
    columns.int64("org_gpt4v_score", |row| row.org_gpt4v_score);
    columns.int64("re_gpt4v_score", |row| row.re_gpt4v_score);
    columns.required("status", |row| row.status.name());
    columns.text("error", |row| row.error.as_deref());
    columns.text("finish_reason", |row| row.finish_reason.map(FinishReason::name));
    columns.int64("num_tokens", |row| row.num_tokens);
    columns.int32("width", |row| row.width);
    columns.int32("height", |row| row.height);
    columns.text("image_sha256", |row| row.image_sha256.as_deref());
    columns.required("source", |row| &row.source);
    columns.text("metadata", |row| row.metadata.as_deref());
    if with_token_ids {
        columns.token_ids();
    }
    let Columns { fields, arrays, .. } = columns;
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).expect("bug: columns of one length")
}

struct Columns<'a> {
    rows: &'a [WrittenRow],
    fields: Vec<Field>,
    arrays: Vec<ArrayRef>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, name: &str, data_type: DataType, is_nullable: bool, array: ArrayRef) {
        self.fields.push(Field::new(name, data_type, is_nullable));
        self.arrays.push(array);
    }

    fn required(&mut self, name: &str, value: impl Fn(&'a WrittenRow) -> &'a str) {
        let array = StringArray::from_iter_values(self.rows.iter().map(value));
        self.push(name, DataType::Utf8, false, Arc::new(array));
    }

    fn text(&mut self, name: &str, value: impl Fn(&'a WrittenRow) -> Option<&'a str>) {
        let array: StringArray = self.rows.iter().map(value).collect();
        self.push(name, DataType::Utf8, true, Arc::new(array));
    }

    fn int64(&mut self, name: &str, value: impl Fn(&WrittenRow) -> Option<i64>) {
        let array: Int64Array = self.rows.iter().map(value).collect();
        self.push(name, DataType::Int64, true, Arc::new(array));
    }

    fn int32(&mut self, name: &str, value: impl Fn(&WrittenRow) -> Option<i32>) {
        let array: Int32Array = self.rows.iter().map(value).collect();
        self.push(name, DataType::Int32, true, Arc::new(array));
    }

    fn float64(&mut self, name: &str, value: impl Fn(&WrittenRow) -> Option<f64>) {
        let array: Float64Array = self.rows.iter().map(value).collect();
        self.push(name, DataType::Float64, true, Arc::new(array));
    }

    fn token_ids(&mut self) {
        let mut builder = ListBuilder::new(Int64Builder::new());
        for row in self.rows {
            match &row.token_ids {
                Some(ids) => {
                    builder.values().append_slice(ids);
                    builder.append(true);
                }
                None => builder.append(false),
            }
        }
        let item = Arc::new(Field::new("item", DataType::Int64, true));
        self.push("token_ids", DataType::List(item), true, Arc::new(builder.finish()));
    }
}
