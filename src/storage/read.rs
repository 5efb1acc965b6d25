//! Streams of bytes. An object comes in windows of up to 8 MiB, each a request of its own, the next one on its way while
//! one is read: a slow reader holds no connection open, and a broken one costs a window.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, path::Path as Key};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::storage::client::{policy, spawn, wait};
use crate::storage::failure::Failure;
use crate::storage::{Location, Object, Scheme};

/// The first window is small, for those who only look at a beginning; then they double.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;
const MAX_WINDOW_BYTES: u64 = 8 << 20;
const LOCAL_BUFFER_BYTES: usize = 1 << 18;

/// A file or object, read from its beginning to its end.
pub struct Reader(Inner);

enum Inner {
    Local(BufReader<File>),
    Windows(Windows),
    Whole(Whole),
}

impl Location {
    /// Opens it for reading. An object that changes while it is read is an error, not a mixture.
    ///
    /// # Errors
    /// When it does not exist or cannot be read.
    pub fn open(&self) -> Result<Reader> {
        Ok(Reader(match self {
            Self::Local(path) => {
                let file = File::open(path).map_err(Error::io("open", path))?;
                Inner::Local(BufReader::with_capacity(LOCAL_BUFFER_BYTES, file))
            }
            Self::Object(object) => object.open()?,
        }))
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match &mut self.0 {
            Inner::Local(file) => file.read(buffer),
            Inner::Windows(windows) => windows.read(buffer),
            Inner::Whole(whole) => whole.read(buffer),
        }
    }
}

impl Object {
    fn open(&self) -> Result<Inner> {
        let store = self.store()?;
        let found = self.ask("open", |store, path| async move { store.head(&path).await });
        let meta = match found {
            Ok(meta) => meta,
            // Some web servers answer GET alone.
            Err(Error::Storage { failure: Failure::Other | Failure::Unsupported | Failure::Server, .. })
                if self.scheme == Scheme::Http =>
            {
                return Ok(Inner::Whole(Whole::open(self, store)?));
            }
            Err(error) => return Err(error),
        };
        let mut windows = Windows {
            source: Source::new(self, store, &meta),
            position: 0,
            window: FIRST_WINDOW_BYTES,
            current: Bytes::new(),
            next: None,
        };
        match windows.advance() {
            Ok(()) => Ok(Inner::Windows(windows)),
            Err(Error::Storage { failure: Failure::Unsupported, .. }) if self.scheme == Scheme::Http => {
                Ok(Inner::Whole(Whole::open(self, Arc::clone(&windows.source.store))?))
            }
            Err(error) => Err(error),
        }
    }
}

/// One state of an object, and how its ranges are fetched.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) object: Object,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) size: u64,
    e_tag: Option<String>,
}

impl Source {
    pub(super) fn new(object: &Object, store: Arc<dyn ObjectStore>, meta: &ObjectMeta) -> Self {
        // A weak tag never matches for a range.
        let e_tag = meta.e_tag.clone().filter(|tag| !tag.starts_with("W/"));
        Self { object: object.clone(), store, size: meta.size, e_tag }
    }

    /// The bytes of `range`, which lies within the object.
    pub(super) async fn fetch(self, range: Range<u64>) -> Result<Bytes, object_store::Error> {
        let mut failures = 0;
        loop {
            match get(&self.store, &self.object.path, range.clone(), self.e_tag.clone()).await {
                Ok(bytes) => return Ok(bytes),
                Err((error, is_body)) if !is_body || failures >= policy().max_retries => return Err(error),
                // Requests are repeated by the client itself; an answer that breaks off is not always.
                Err(_) => {
                    failures += 1;
                    back_off(failures).await;
                }
            }
        }
    }
}

async fn get(
    store: &Arc<dyn ObjectStore>,
    path: &Key,
    range: Range<u64>,
    e_tag: Option<String>,
) -> Result<Bytes, (object_store::Error, bool)> {
    let length = range.end - range.start;
    let options = GetOptions::new().with_range(Some(range)).with_if_match(e_tag);
    let found = store.get_opts(path, options).await.map_err(|error| (error, false))?;
    let bytes = found.bytes().await.map_err(|error| (error, true))?;
    if bytes.len() as u64 != length {
        let source = format!("{} bytes came where {length} were asked for", bytes.len()).into();
        return Err((object_store::Error::Generic { store: "range", source }, true));
    }
    Ok(bytes)
}

/// Waits after the `failures`-th failure: 0.1 s, doubling up to 15 s.
pub(super) async fn back_off(failures: usize) {
    let wait = Duration::from_millis(100 << failures.saturating_sub(1).min(8));
    tokio::time::sleep(wait.min(Duration::from_secs(15))).await;
}

/// A stream made of ranges.
struct Windows {
    source: Source,
    /// Where the next window begins.
    position: u64,
    window: u64,
    current: Bytes,
    next: Option<JoinHandle<Result<Bytes, object_store::Error>>>,
}

impl Windows {
    /// Takes the next window, and asks for the one after.
    fn advance(&mut self) -> Result<()> {
        let Some(next) = self.next.take().or_else(|| self.request()) else { return Ok(()) };
        self.current = match wait(next) {
            Ok(window) => window.map_err(|error| self.source.object.error("read", &error))?,
            Err(_) => {
                let reason = "the reading of it was cancelled".to_owned();
                return Err(self.source.object.failure("read", Failure::Other, reason));
            }
        };
        self.next = self.request();
        Ok(())
    }

    fn request(&mut self) -> Option<JoinHandle<Result<Bytes, object_store::Error>>> {
        let range = self.position..self.source.size.min(self.position + self.window);
        if range.is_empty() {
            return None;
        }
        self.position = range.end;
        self.window = (self.window * 2).min(MAX_WINDOW_BYTES);
        Some(spawn(self.source.clone().fetch(range)))
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.current.is_empty() {
            self.advance().map_err(to_io)?;
        }
        Ok(take(&mut self.current, buffer))
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        if let Some(next) = &self.next {
            next.abort();
        }
    }
}

/// A stream that one answer gives, from a server without ranges.
struct Whole {
    object: Object,
    stream: BoxStream<'static, Result<Bytes, object_store::Error>>,
    current: Bytes,
}

impl Whole {
    fn open(object: &Object, store: Arc<dyn ObjectStore>) -> Result<Self> {
        let path = object.path.clone();
        let found = wait(async move { store.get(&path).await }).map_err(|error| object.error("open", &error))?;
        Ok(Self { object: object.clone(), stream: found.into_stream(), current: Bytes::new() })
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.current.is_empty() {
            match wait(self.stream.next()) {
                Some(Ok(bytes)) => self.current = bytes,
                Some(Err(error)) => return Err(to_io(self.object.error("read", &error))),
                None => return Ok(0),
            }
        }
        Ok(take(&mut self.current, buffer))
    }
}

fn take(bytes: &mut Bytes, buffer: &mut [u8]) -> usize {
    let length = buffer.len().min(bytes.len());
    bytes.copy_to_slice(&mut buffer[..length]);
    length
}

/// An error on its way through `Read` or `Write`; [`Error::at`] takes it out again.
pub(super) fn to_io(error: Error) -> std::io::Error {
    use std::io::ErrorKind;
    let kind = match &error {
        Error::Storage { failure: Failure::NotFound, .. } => ErrorKind::NotFound,
        Error::Storage { failure: Failure::Denied, .. } => ErrorKind::PermissionDenied,
        Error::Storage { failure: Failure::TimedOut, .. } => ErrorKind::TimedOut,
        _ => ErrorKind::Other,
    };
    std::io::Error::new(kind, error)
}
