//! Claims: which process does which shard of an output that several share. A claim is a lock on `claims/{shard}.lock`;
//! the kernel releases it when the process ends, however it ends, so that none is ever stale.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A lock file that this process holds.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    _file: File,
}

impl Claim {
    /// Claims what `path` stands for; `None` when another process has it.
    ///
    /// # Errors
    /// [`Error::Output`] where the filesystem has no locks; the disk's.
    pub(crate) fn take(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(lock_error(path, error)),
            }
            // The holder before may have deleted the file in between: then this lock is on nothing.
            if is_same_file(&file, path) {
                return Ok(Some(Self { path: path.to_owned(), _file: file }));
            }
        }
    }

    /// Gives it up and deletes the lock file: what it stood for is finished.
    pub(crate) fn finish(self) {
        // Whoever finds the file later finds the shard finished as well: a file left over does no harm.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The lock of a whole output: every run in it shares it, and one that starts anew must have it alone.
#[derive(Debug)]
pub(crate) struct OutputLock {
    _file: File,
}

impl OutputLock {
    /// Shares the output, after `tidy` when nobody else works in it; waits while another process empties it.
    ///
    /// # Errors
    /// [`Error::Output`] where the filesystem has no locks; the disk's.
    pub(crate) fn share(path: &Path, tidy: impl FnOnce() -> Result<()>) -> Result<Self> {
        let file = open(path)?;
        if Self::try_alone(&file, path)? {
            tidy()?;
        }
        Self::share_from_here(file, path)
    }

    /// Shares the output after having had it alone while `prepare` ran.
    ///
    /// # Errors
    /// [`Error::Output`] when another process works in it, or where the filesystem has no locks; the disk's.
    pub(crate) fn share_after(path: &Path, prepare: impl FnOnce() -> Result<()>) -> Result<Self> {
        let file = open(path)?;
        if !Self::try_alone(&file, path)? {
            return Err(Error::Output {
                path: path.parent().unwrap_or(path).to_owned(),
                reason: "another process is captioning into it".to_owned(),
                hint: "wait for it or stop it before --overwrite, or choose another --out".to_owned(),
            });
        }
        prepare()?;
        Self::share_from_here(file, path)
    }

    fn try_alone(file: &File, path: &Path) -> Result<bool> {
        match file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(lock_error(path, error)),
        }
    }

    fn share_from_here(file: File, path: &Path) -> Result<Self> {
        file.unlock().and_then(|()| file.lock_shared()).map_err(|error| lock_error(path, error))?;
        Ok(Self { _file: file })
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    loop {
        match options.open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // A process that ends deletes the folder of claims when it is empty. Not the output's own: one that is
                // gone stays gone.
                super::create_folder(path.parent().unwrap_or(path))?;
            }
            result => return result.map_err(Error::io("create", path)),
        }
    }
}

#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().map(identity).ok() == std::fs::metadata(path).map(identity).ok()
}

#[cfg(not(unix))]
fn is_same_file(_: &File, path: &Path) -> bool {
    // A file that is open cannot be deleted there.
    path.exists()
}

fn lock_error(path: &Path, error: std::io::Error) -> Error {
    Error::Output {
        path: path.to_owned(),
        reason: format!("cannot lock it: {error}"),
        hint: "the filesystem has no file locks: use --no-claims, with --part or an --out for each process".to_owned(),
    }
}
