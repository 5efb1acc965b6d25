//! Files that are not there before they are whole. Locally: a temporary name, sync, rename, sync of the folder. In an
//! object store: parts of 8 MiB, which become an object in one step at the end; what fits into one part is put at once.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use object_store::{MultipartUpload, ObjectStoreExt};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::storage::client::{spawn, wait};
use crate::storage::failure::Failure;
use crate::storage::read::to_io;
use crate::storage::{Location, Object};

/// S3 wants parts of 5 MiB or more, and has at most 10,000 of them: objects of up to 78 GiB.
const PART_BYTES: usize = 8 << 20;
/// Parts on their way at once.
const MAX_PARTS_IN_FLIGHT: usize = 4;
/// What a temporary name ends with.
const TEMPORARY: &str = ".tmp";

/// Writes a file or object that appears when it is [committed](AtomicWriter::commit), or not at all.
pub struct AtomicWriter {
    target: Location,
    inner: Inner,
}

enum Inner {
    Local {
        file: BufWriter<File>,
        temporary: PathBuf,
    },
    Object(Upload),
    /// Committed, or given up.
    Done,
}

impl Location {
    /// Starts to write it. The folder of a local file must be there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn writer(&self) -> Result<AtomicWriter> {
        AtomicWriter::create(self)
    }

    /// Whether `name` is that of a file that was being written here, by a process that may have died.
    #[must_use]
    pub fn is_temporary_name(name: &str) -> bool {
        name.ends_with(TEMPORARY)
    }
}

impl AtomicWriter {
    pub(super) fn create(target: &Location) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let inner = match target {
            Location::Local(path) => {
                let mut name = path.file_name().unwrap_or_default().to_owned();
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                name.push(format!(".{}-{count}{TEMPORARY}", std::process::id()));
                let temporary = path.with_file_name(name);
                let file = BufWriter::with_capacity(
                    1 << 18,
                    File::create(&temporary).map_err(Error::io("create", &temporary))?,
                );
                Inner::Local { file, temporary }
            }
            Location::Object(object) => {
                if !target.is_writable() {
                    return Err(target.unsupported("write"));
                }
                Inner::Object(Upload {
                    object: object.clone(),
                    buffer: BytesMut::new(),
                    upload: None,
                    parts: Vec::new(),
                })
            }
        };
        Ok(Self { target: target.clone(), inner })
    }

    /// Puts it in place, durably.
    ///
    /// # Errors
    /// When it cannot be written to its end; nothing is there then.
    pub fn commit(mut self) -> Result<()> {
        match &mut self.inner {
            Inner::Local { file, temporary } => {
                let Location::Local(path) = &self.target else { return Ok(()) };
                file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", path))?;
                std::fs::rename(&*temporary, path).map_err(Error::io("rename", temporary))?;
                self.inner = Inner::Done;
                sync_folder(path)
            }
            Inner::Object(upload) => {
                upload.complete()?;
                self.inner = Inner::Done;
                Ok(())
            }
            Inner::Done => Ok(()),
        }
    }

    /// The error of a write to this.
    #[must_use]
    pub fn failed(&self, error: std::io::Error) -> Error {
        Error::at("write", &self.target)(error)
    }
}

impl Write for AtomicWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.inner {
            Inner::Local { file, .. } => file.write(bytes),
            Inner::Object(upload) => upload.write(bytes).map_err(to_io),
            Inner::Done => Ok(0),
        }
    }

    /// Does nothing: only whole files are seen.
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for AtomicWriter {
    fn drop(&mut self) {
        match &mut self.inner {
            Inner::Local { temporary, .. } => drop(std::fs::remove_file(temporary)),
            Inner::Object(upload) => upload.abort(),
            Inner::Done => {}
        }
    }
}

/// A rename is durable when its folder is.
fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", folder))?;
    }
    Ok(())
}

/// An object on its way.
struct Upload {
    object: Object,
    buffer: BytesMut,
    /// Begun when the first part is full.
    upload: Option<Box<dyn MultipartUpload>>,
    parts: Vec<JoinHandle<Result<(), object_store::Error>>>,
}

impl Upload {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let length = bytes.len().min(PART_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..length]);
        if self.buffer.len() == PART_BYTES {
            self.send_part()?;
        }
        Ok(length)
    }

    fn send_part(&mut self) -> Result<()> {
        if self.parts.len() == MAX_PARTS_IN_FLIGHT {
            let oldest = self.parts.remove(0);
            self.join(oldest)?;
        }
        let part: Bytes = self.buffer.split().freeze();
        let upload = match &mut self.upload {
            Some(upload) => upload,
            none => {
                none.insert(self.object.ask("write", |store, path| async move { store.put_multipart(&path).await })?)
            }
        };
        self.parts.push(spawn(upload.put_part(part.into())));
        Ok(())
    }

    fn join(&self, part: JoinHandle<Result<(), object_store::Error>>) -> Result<()> {
        match wait(part) {
            Ok(sent) => sent.map_err(|error| self.object.error("write", &error)),
            Err(_) => Err(self.object.failure("write", Failure::Other, "a part's upload was cancelled".to_owned())),
        }
    }

    fn complete(&mut self) -> Result<()> {
        if self.upload.is_none() {
            let contents = self.buffer.split().freeze();
            self.object.ask("write", |store, path| async move { store.put(&path, contents.into()).await })?;
            return Ok(());
        }
        if !self.buffer.is_empty() {
            self.send_part()?;
        }
        for part in std::mem::take(&mut self.parts) {
            self.join(part)?;
        }
        let Some(upload) = &mut self.upload else { return Ok(()) };
        wait(upload.complete()).map_err(|error| self.object.error("write", &error))?;
        self.upload = None;
        Ok(())
    }

    /// Parts that no object is made of cost money until they are deleted.
    fn abort(&mut self) {
        self.parts.drain(..).for_each(|part| part.abort());
        if let Some(mut upload) = self.upload.take() {
            let _ = wait(upload.abort());
        }
    }
}
