//! Whole small objects: read, written, compared and deleted in one request.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{Error as StoreError, ObjectStoreExt, PutMode, PutOptions, PutResult, UpdateVersion};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::storage::client::{policy, spawn, wait};
use crate::storage::failure::{Failure, is_unanswered};
use crate::storage::read::back_off;
use crate::storage::{AtomicWriter, Location, Object};

/// What tells a state of a small file from its later ones: an object's ETag, a local file's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(Kind);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Contents(Vec<u8>),
    Object { e_tag: Option<String>, version: Option<String> },
}

/// A read on its way. Dropped, it is given up.
pub struct PendingRead(Object, Option<JoinHandle<Result<(Bytes, Version)>>>);

impl Object {
    /// Starts to read it whole, up to `max_bytes`, while this thread does something else.
    ///
    /// # Errors
    /// When no client can be made from the settings.
    pub fn read_ahead(&self, max_bytes: u64) -> Result<PendingRead> {
        Ok(PendingRead(self.clone(), Some(spawn(self.begin_read(max_bytes)?))))
    }
}

impl PendingRead {
    /// Waits for it.
    ///
    /// # Errors
    /// As those of [`Location::read`].
    pub fn wait(mut self) -> Result<Bytes> {
        let cancelled = || self.0.failure("read", Failure::Other, "the reading of it was cancelled".to_owned());
        let Some(task) = self.1.take() else { return Err(cancelled()) };
        wait(task).unwrap_or_else(|_| Err(cancelled())).map(|(bytes, _)| bytes)
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        if let Some(task) = &self.1 {
            task.abort();
        }
    }
}

impl From<PutResult> for Version {
    fn from(put: PutResult) -> Self {
        Self(Kind::Object { e_tag: put.e_tag, version: put.version })
    }
}

impl Location {
    /// Reads it whole, up to `max_bytes`.
    ///
    /// # Errors
    /// When it does not exist, cannot be read, or is longer.
    pub fn read(&self, max_bytes: u64) -> Result<Bytes> {
        Ok(self.read_version(max_bytes)?.0)
    }

    /// The same, with what [`Location::update`] wants.
    ///
    /// # Errors
    /// As [`Location::read`].
    pub fn read_version(&self, max_bytes: u64) -> Result<(Bytes, Version)> {
        match self {
            Self::Local(path) => {
                let read = || {
                    let file = File::open(path)?;
                    let size = file.metadata()?.len();
                    let mut bytes = Vec::with_capacity(size.min(max_bytes) as usize);
                    // A file may grow while it is read, and a pipe has no length.
                    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
                    if bytes.len() as u64 > max_bytes {
                        return Err(std::io::Error::new(ErrorKind::FileTooLarge, over_limit(size, max_bytes)));
                    }
                    Ok(bytes)
                };
                let bytes = read().map_err(Error::io("read", path))?;
                Ok((Bytes::from(bytes.clone()), Version(Kind::Contents(bytes))))
            }
            Self::Object(object) => object.read(max_bytes),
        }
    }

    /// Whether there is a file or object. A prefix of objects is none.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn exists(&self) -> Result<bool> {
        match self {
            Self::Local(path) => path.try_exists().map_err(Error::io("look at", path)),
            Self::Object(object) => match object.length() {
                Ok(_) => Ok(true),
                Err(Error::Storage { failure: Failure::NotFound, .. }) => Ok(false),
                Err(error) => Err(error),
            },
        }
    }

    /// Length in bytes.
    ///
    /// # Errors
    /// When it does not exist or its length cannot be told.
    pub fn length(&self) -> Result<u64> {
        match self {
            Self::Local(path) => Ok(std::fs::metadata(path).map_err(Error::io("look at", path))?.len()),
            Self::Object(object) => object.length(),
        }
    }

    /// Writes it whole: readers see the old contents or the new, also after a crash.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, contents: impl Into<Bytes>) -> Result<Version> {
        self.put_as(contents.into(), PutMode::Overwrite)?.ok_or_else(|| self.unsupported("write"))
    }

    /// Writes it if nothing is there, in one atomic step: of many processes that try, one gets `Some`. None does if the
    /// store did so but its answer was lost on the way: then the contents tell whose they are.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create_exclusive(&self, contents: impl Into<Bytes>) -> Result<Option<Version>> {
        let contents = contents.into();
        let Self::Local(path) = self else { return self.put_as(contents, PutMode::Create) };
        let mut file = match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
            Err(error) => return Err(Error::io("create", path)(error)),
        };
        let written = file.write_all(&contents).and_then(|()| file.sync_all());
        if let Err(error) = written {
            // Half a file would look like another's.
            let _ = std::fs::remove_file(path);
            return Err(Error::io("write", path)(error));
        }
        Ok(Some(Version(Kind::Contents(contents.into()))))
    }

    /// Replaces it if it is still at `version`; `None` when it is not. In object stores one atomic step; of local files the
    /// contents are compared first, which is no lock against other processes. As in [`Location::create_exclusive`], `None`
    /// may be the second answer to a write of this process.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn update(&self, contents: impl Into<Bytes>, version: &Version) -> Result<Option<Version>> {
        match (&version.0, self) {
            (Kind::Contents(known), Self::Local(path)) => match std::fs::read(path) {
                Ok(present) if present == *known => Ok(Some(self.put(contents)?)),
                Ok(_) => Ok(None),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::io("read", path)(error)),
            },
            (Kind::Object { e_tag, version }, Self::Object(_)) => {
                let known = UpdateVersion { e_tag: e_tag.clone(), version: version.clone() };
                self.put_as(contents.into(), PutMode::Update(known))
            }
            _ => Ok(None),
        }
    }

    /// Deletes it. What is not there is deleted already.
    ///
    /// # Errors
    /// When it is there and stays.
    pub fn delete(&self) -> Result<()> {
        match self {
            Self::Local(path) => match std::fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("delete", path)(error)),
                _ => Ok(()),
            },
            Self::Object(object) => {
                let deleted = object.ask("delete", |store, path| async move { store.delete(&path).await });
                match deleted {
                    Err(Error::Storage { failure: Failure::NotFound, .. }) => Ok(()),
                    other => other,
                }
            }
        }
    }

    /// `None` where the mode's condition does not hold.
    fn put_as(&self, contents: Bytes, mode: PutMode) -> Result<Option<Version>> {
        let Self::Object(object) = self else {
            let mut writer = AtomicWriter::create(self)?;
            writer.write_all(&contents).map_err(|error| writer.failed(error))?;
            writer.commit()?;
            return Ok(Some(Version(Kind::Contents(contents.into()))));
        };
        if !self.is_writable() {
            return Err(self.unsupported("write"));
        }
        let put = object.ask("write", |store, path| async move {
            let mut failures = 0;
            loop {
                let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
                match store.put_opts(&path, contents.clone().into(), options).await {
                    Ok(put) => return Ok(Some(put)),
                    Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => return Ok(None),
                    Err(StoreError::NotFound { .. }) if matches!(mode, PutMode::Update(_)) => return Ok(None),
                    Err(error) if failures < policy().max_retries && is_unanswered(&error) => {
                        failures += 1;
                        back_off(failures).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        })?;
        Ok(put.map(Version::from))
    }

    pub(super) fn unsupported(&self, action: &'static str) -> Error {
        let reason = "web servers are only read from".to_owned();
        Error::Storage { action, location: self.to_string(), failure: Failure::Unsupported, reason }
    }
}

impl Object {
    pub(super) fn length(&self) -> Result<u64> {
        Ok(self.ask("look at", |store, path| async move { store.head(&path).await })?.size)
    }

    fn read(&self, max_bytes: u64) -> Result<(Bytes, Version)> {
        wait(self.begin_read(max_bytes)?)
    }

    /// The request of a read, for whoever waits for it.
    fn begin_read(&self, max_bytes: u64) -> Result<impl Future<Output = Result<(Bytes, Version)>> + Send + use<>> {
        let (object, store, policy) = (self.clone(), self.store()?, policy());
        let path = self.path.clone();
        let read = async move {
            let mut failures = 0;
            loop {
                let found = store.get(&path).await?;
                let size = found.meta.size;
                if size > max_bytes {
                    return Ok(Err(size));
                }
                let version = Kind::Object { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
                let chunks: Result<Vec<Bytes>, _> = found.into_stream().try_collect().await;
                match chunks {
                    Ok(chunks) => return Ok(Ok((join(chunks), Version(version)))),
                    Err(error) if failures >= policy.max_retries => return Err(error),
                    Err(_) => {
                        failures += 1;
                        back_off(failures).await;
                    }
                }
            }
        };
        Ok(async move {
            let read: Result<_, object_store::Error> = read.await;
            match read.map_err(|error| object.error("read", &error))? {
                Ok(found) => Ok(found),
                Err(size) => Err(object.failure("read", Failure::TooLarge, over_limit(size, max_bytes))),
            }
        })
    }
}

fn join(mut chunks: Vec<Bytes>) -> Bytes {
    if chunks.len() == 1 { chunks.remove(0) } else { chunks.concat().into() }
}

fn over_limit(size: u64, limit: u64) -> String {
    format!("{size} bytes is over the limit of {limit}")
}
