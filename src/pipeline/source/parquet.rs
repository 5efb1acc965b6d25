//! A Parquet file with a column of images: a struct `image{bytes, path}` as `datasets` writes, or plain bytes. Rows come in
//! small batches, of the columns that are carried alone; a row group without a wanted image is read without its images.

mod columns;
mod json;
mod pages;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::pipeline::row::InputColumns;
use crate::pipeline::source::emitter::{Begun, Emitter, check_size};
use crate::pipeline::source::identity::identity;
use crate::pipeline::source::stem;
use crate::storage::{Location, RangeReader};

use self::columns::Columns;
use self::pages::LimitedPages;

/// Most rows read at once, and about how many bytes of images.
const MAX_BATCH_ROWS: usize = 64;
const BATCH_BYTES: i64 = 16 << 20;

/// Sends every row of the file as one shard. Returns what is wrong with the file, if anything is.
pub(super) fn run(location: &Location, image_column: Option<&str>, emitter: &mut Emitter<'_>) -> Result<Option<Error>> {
    let name = stem(location);
    let name = name.strip_suffix(".parquet").unwrap_or(&name);
    let table = match Table::open(location, image_column) {
        Ok(table) => table,
        Err(error) => return Ok(Some(error)),
    };
    let identity = match identity(location) {
        Ok(identity) => identity,
        Err(error) => return Ok(Some(error)),
    };
    if emitter.begin(name, Some(&identity))? == Begun::Skip {
        return Ok(None);
    }
    match table.send(name, emitter) {
        Ok(()) if emitter.num_rows() > 0 || emitter.is_done() => {
            emitter.end(&identity)?;
            Ok(None)
        }
        Ok(()) => {
            emitter.abandon();
            Ok(Some(Error::Input {
                input: location.to_string(),
                reason: "no row in it".to_owned(),
                hint: "leave it out, or write it again",
            }))
        }
        Err(TableError::Run(error)) => Err(error),
        Err(TableError::Damaged(error)) => {
            emitter.abandon();
            Ok(Some(damage(location, &table.reader, &error)))
        }
    }
}

/// Whether the file can be read as an input, by its footer.
///
/// # Errors
/// [`Error::Input`] when not, with the reason.
pub(super) fn check(location: &Location, image_column: Option<&str>) -> Result<()> {
    Table::open(location, image_column).map(|_| ())
}

/// Rows of the file, by its footer; `None` for one that is damaged or far away.
pub(super) fn count_images(location: &Location) -> Option<u64> {
    location.local_path()?;
    let reader = location.ranges().ok()?;
    let metadata = ArrowReaderMetadata::load(&reader, ArrowReaderOptions::new()).ok()?;
    u64::try_from(metadata.metadata().file_metadata().num_rows()).ok()
}

/// Why a file is not read to its end.
enum TableError {
    Damaged(ParquetError),
    Run(Error),
}

impl From<Error> for TableError {
    fn from(error: Error) -> Self {
        Self::Run(error)
    }
}

/// What the object store said if that is the cause, else that the file is damaged.
fn damage(location: &Location, reader: &RangeReader, error: &ParquetError) -> Error {
    reader.take_failure().unwrap_or_else(|| Error::Input {
        input: location.to_string(),
        reason: format!("the parquet file is damaged: {error}"),
        hint: "fetch it again; its rows are in no file of --out",
    })
}

/// The library panics on some damaged files: for one file that is an error like others.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(ParquetError::General("its reader gave up on it".to_owned())))
}

/// A Parquet file and the columns that are read of it.
struct Table {
    location: Location,
    reader: RangeReader,
    metadata: ArrowReaderMetadata,
    columns: Columns,
}

impl Table {
    fn open(location: &Location, image_column: Option<&str>) -> Result<Self> {
        let reader = location.ranges()?;
        // Arrow's own schema, which some writers embed, brings large, dictionary and view types: the plain ones do.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = guarded(|| ArrowReaderMetadata::load(&reader, options))
            .map_err(|error| damage(location, &reader, &error))?;
        let columns = Columns::find(location, metadata.schema(), image_column)?;
        Ok(Self { location: location.clone(), reader, metadata, columns })
    }

    fn send(&self, name: &str, emitter: &mut Emitter<'_>) -> Result<(), TableError> {
        let num_groups = self.metadata.metadata().num_row_groups();
        for group in 0..num_groups {
            let num_rows = usize::try_from(self.metadata.metadata().row_group(group).num_rows()).unwrap_or(0);
            let with_image = emitter.wants_any(num_rows);
            let pages =
                LimitedPages { reader: self.reader.clone(), max_page_bytes: emitter.limits().max_parquet_page_bytes };
            let mut batches = guarded(|| self.batches(pages, group, with_image)).map_err(TableError::Damaged)?;
            while let Some(batch) =
                guarded(|| batches.next().transpose().map_err(ParquetError::from)).map_err(TableError::Damaged)?
            {
                for row in 0..batch.num_rows() {
                    let input = self.input(&batch, row, || format!("{name}-{:09}", emitter.num_rows()));
                    let max_bytes = emitter.max_image_bytes();
                    emitter.push(input, || self.image(&batch, row, max_bytes))?;
                    if emitter.is_done() {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn batches(
        &self,
        pages: LimitedPages,
        group: usize,
        with_image: bool,
    ) -> Result<ParquetRecordBatchReader, ParquetError> {
        let row_group = self.metadata.metadata().row_group(group);
        let num_rows = row_group.num_rows().max(1);
        let bytes_per_row = (row_group.total_byte_size() / num_rows).max(1);
        let batch_rows =
            if with_image { (BATCH_BYTES / bytes_per_row).clamp(1, MAX_BATCH_ROWS as i64) as usize } else { 1024 };
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), self.columns.read(with_image));
        ParquetRecordBatchReaderBuilder::new_with_metadata(pages, self.metadata.clone())
            .with_projection(mask)
            .with_row_groups(vec![group])
            .with_batch_size(batch_rows)
            .build()
    }

    /// A column of the file in a batch, which has only some of them.
    fn column<'a>(&self, batch: &'a RecordBatch, index: usize) -> Option<&'a Arc<dyn Array>> {
        batch.column_by_name(self.metadata.schema().field(index).name())
    }

    fn text(&self, batch: &RecordBatch, row: usize, index: Option<usize>) -> Option<String> {
        let column = self.column(batch, index?)?;
        match json::value(column, row)? {
            Value::String(text) => Some(text),
            Value::Null => None,
            other => Some(other.to_string()),
        }
    }

    fn input(&self, batch: &RecordBatch, row: usize, numbered: impl FnOnce() -> String) -> InputColumns {
        let text = |index| self.text(batch, row, index);
        let mut rest = Map::new();
        for &index in &self.columns.rest {
            let value = self.column(batch, index).and_then(|column| json::value(column, row));
            if let Some(value) = value {
                rest.insert(self.metadata.schema().field(index).name().clone(), value);
            }
        }
        InputColumns {
            key: text(self.columns.key).unwrap_or_else(numbered),
            source: self.location.to_string(),
            url: text(self.columns.url),
            org_caption: text(self.columns.caption),
            sha256: text(self.columns.sha256),
            uid: text(self.columns.uid),
            metadata: (!rest.is_empty()).then(|| Value::Object(rest).to_string()),
        }
    }

    /// The bytes of the row's image, or the reason of its failed row.
    fn image(&self, batch: &RecordBatch, row: usize, max_bytes: u64) -> Result<Bytes, String> {
        let column = self.column(batch, self.columns.image).ok_or("the image was not read")?;
        let missing = || "the image is null".to_owned();
        if column.is_null(row) {
            return Err(missing());
        }
        let bytes = match column.data_type() {
            DataType::Struct(_) => {
                let image = column.as_struct();
                let bytes = image.column_by_name("bytes").ok_or_else(missing)?;
                if bytes.is_null(row) {
                    let path = image.column_by_name("path").and_then(|path| json::value(path, row));
                    return Err(match path {
                        Some(Value::String(path)) => {
                            format!("the row has the image's path alone, `{path}`, not its bytes")
                        }
                        _ => missing(),
                    });
                }
                bytes.as_binary::<i32>().value(row)
            }
            _ => column.as_binary::<i32>().value(row),
        };
        check_size(bytes.len() as u64, max_bytes)?;
        Ok(Bytes::copy_from_slice(bytes))
    }
}
