//! Random access for Parquet. A file is read where it lies; of an object up to 16 windows of 1 MiB stay in memory, so that
//! a footer, a page's header and the small columns between cost a request together, not one each.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, Bytes};
use object_store::ObjectStoreExt;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use crate::error::{Error, Result};
use crate::storage::client::wait;
use crate::storage::read::{Source, to_io};
use crate::storage::{Failure, Location};

const WINDOW_BYTES: u64 = 1 << 20;
const MAX_WINDOWS: usize = 16;

/// A file or object of known length, read at any place.
#[derive(Clone)]
pub struct RangeReader(Inner);

#[derive(Clone)]
enum Inner {
    Local(Arc<File>),
    Object(Arc<Windows>),
}

struct Windows {
    source: Source,
    /// Offset and bytes; the one used last is the last.
    windows: Mutex<Vec<(u64, Bytes)>>,
    /// Why the last request failed: libraries between make text of it.
    failure: Mutex<Option<Error>>,
}

impl Location {
    /// Opens it for reading at any place.
    ///
    /// # Errors
    /// When it does not exist or cannot be read.
    pub fn ranges(&self) -> Result<RangeReader> {
        Ok(RangeReader(match self {
            Self::Local(path) => Inner::Local(Arc::new(File::open(path).map_err(Error::io("open", path))?)),
            Self::Object(object) => {
                let meta = object.ask("open", |store, path| async move { store.head(&path).await });
                let meta = meta.map_err(|error| match error {
                    // It does not even say how long the file is.
                    Error::Storage { action, location, failure: Failure::Other, reason } if !self.is_writable() => {
                        Error::Storage { action, location, failure: Failure::Unsupported, reason }
                    }
                    error => error,
                })?;
                let source = Source::new(object, object.store()?, &meta);
                Inner::Object(Arc::new(Windows { source, windows: Mutex::default(), failure: Mutex::default() }))
            }
        }))
    }
}

impl Windows {
    /// `length` bytes at `start`, or those up to the end.
    fn get(&self, start: u64, length: u64) -> std::io::Result<Bytes> {
        let size = self.source.size;
        let wanted = start.min(size)..start.saturating_add(length).min(size);
        if wanted.is_empty() {
            return Ok(Bytes::new());
        }
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            windows.iter().position(|(at, bytes)| *at <= wanted.start && wanted.end <= *at + bytes.len() as u64);
        if let Some(known) = known {
            let window = windows.remove(known);
            let bytes = slice(&window, &wanted);
            windows.push(window);
            return Ok(bytes);
        }
        // A read near the end is of the footer: the window ends with the file.
        let end = (wanted.start + WINDOW_BYTES).max(wanted.end).min(size);
        let begin = if end == size { wanted.start.min(size.saturating_sub(WINDOW_BYTES)) } else { wanted.start };
        let fetched = wait(self.source.clone().fetch(begin..end));
        let bytes = fetched.map_err(|error| {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(self.source.object.error("read", &error));
            to_io(self.source.object.error("read", &error))
        })?;
        let window = (begin, bytes);
        let found = slice(&window, &wanted);
        // What is larger than a window is read once.
        if end - begin <= WINDOW_BYTES {
            if windows.len() == MAX_WINDOWS {
                windows.remove(0);
            }
            windows.push(window);
        }
        Ok(found)
    }
}

fn slice((at, bytes): &(u64, Bytes), wanted: &Range<u64>) -> Bytes {
    bytes.slice((wanted.start - at) as usize..(wanted.end - at) as usize)
}

impl RangeReader {
    /// Why the last request to an object store failed, if one did: once.
    #[must_use]
    pub fn take_failure(&self) -> Option<Error> {
        match &self.0 {
            Inner::Local(_) => None,
            Inner::Object(windows) => windows.failure.lock().unwrap_or_else(PoisonError::into_inner).take(),
        }
    }

    /// `length` bytes at `start`, or those up to the end.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read_at(&self, start: u64, length: u64) -> std::io::Result<Bytes> {
        match &self.0 {
            Inner::Local(file) => {
                let available = file.metadata()?.len().saturating_sub(start);
                let length = length.min(available) as usize;
                file.get_bytes(start, length).map_err(std::io::Error::other)
            }
            Inner::Object(windows) => windows.get(start, length),
        }
    }
}

impl Length for RangeReader {
    fn len(&self) -> u64 {
        match &self.0 {
            Inner::Local(file) => Length::len(file.as_ref()),
            Inner::Object(windows) => windows.source.size,
        }
    }
}

impl ChunkReader for RangeReader {
    type T = RangeCursor;

    fn get_read(&self, start: u64) -> ParquetResult<RangeCursor> {
        Ok(match &self.0 {
            Inner::Local(file) => RangeCursor::Local(file.get_read(start)?),
            Inner::Object(_) => RangeCursor::Object { reader: self.clone(), position: start, current: Bytes::new() },
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = match &self.0 {
            Inner::Local(file) => return file.get_bytes(start, length),
            Inner::Object(windows) => windows.get(start, length as u64).map_err(ParquetError::from)?,
        };
        if bytes.len() != length {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} reach beyond the end of the file")));
        }
        Ok(bytes)
    }
}

/// A [`RangeReader`] read on from one place.
pub enum RangeCursor {
    /// Of a local file.
    Local(BufReader<File>),
    /// Of an object.
    Object {
        /// Where from.
        reader: RangeReader,
        /// Where the next window begins.
        position: u64,
        /// The rest of the present window.
        current: Bytes,
    },
}

/// A cursor reads headers of pages mostly: a little at a time, out of the windows.
const CURSOR_BYTES: u64 = 1 << 14;

impl Read for RangeCursor {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Local(file) => file.read(buffer),
            Self::Object { reader, position, current } => {
                if current.is_empty() {
                    *current = reader.read_at(*position, CURSOR_BYTES.max(buffer.len() as u64))?;
                    *position += current.len() as u64;
                }
                let length = buffer.len().min(current.len());
                current.copy_to_slice(&mut buffer[..length]);
                Ok(length)
            }
        }
    }
}
