//! Files and objects that are there whole or not at all, and what else the write stage asks of a folder.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use recaption_export::hex;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::pipeline::write::fault::{self, Operation};
use crate::storage::{AtomicWriter, Location};

/// A file in the making.
pub(crate) enum AtomicFile {
    Local(std::fs::File),
    Object(AtomicWriter),
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        fault::check(Operation::CommitWrite)?;
        match self {
            Self::Local(file) => file.write(bytes),
            Self::Object(writer) => writer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Local(file) => file.flush(),
            Self::Object(writer) => writer.flush(),
        }
    }
}

/// Writes a file under a temporary name in the same folder, syncs it, renames it and syncs the folder; or an object, which
/// is there as a whole or not at all. It must be this process's alone.
///
/// # Errors
/// The disk's or the store's; nothing is left then.
pub(crate) fn write_atomically<T>(location: &Location, write: impl FnOnce(&mut AtomicFile) -> Result<T>) -> Result<T> {
    if let Some(path) = location.local_path() {
        return write_by_way_of(&with_suffix(path, ".tmp"), path, write);
    }
    let mut file = AtomicFile::Object(location.writer()?);
    let result = write(&mut file)?;
    fault::check(Operation::CommitSync).map_err(Error::at("write", location))?;
    if let AtomicFile::Object(writer) = file {
        writer.commit()?;
    }
    Ok(result)
}

/// Writes a file that several processes may write at once: the last one stays.
///
/// # Errors
/// The disk's or the store's.
pub(crate) fn write_shared(location: &Location, contents: &[u8]) -> Result<()> {
    let Some(path) = location.local_path() else { return location.put(contents.to_vec()).map(drop) };
    write_by_way_of(&with_suffix(path, &format!(".{}.tmp", unique())), path, |file| {
        file.write_all(contents).map_err(Error::io("write", path))
    })
}

/// Writes a file unless there is one of this name, even if another process does the same at once. Says whether it did.
///
/// # Errors
/// The disk's; nothing is left then.
pub(crate) fn write_new(path: &Path, contents: &[u8]) -> Result<bool> {
    let temporary = with_suffix(path, &format!(".{}.tmp", unique()));
    write_by_way_of(&with_suffix(&temporary, ".tmp"), &temporary, |file| {
        file.write_all(contents).map_err(Error::io("write", path))
    })?;
    let linked = std::fs::hard_link(&temporary, path);
    let result = match linked {
        Ok(()) => sync_folder(path).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // A filesystem without links: the check and the renaming are two steps there.
        Err(_) if !path.exists() => {
            std::fs::rename(&temporary, path).map(|()| true).map_err(Error::io("rename to", path))
        }
        Err(_) => Ok(false),
    };
    let _ = std::fs::remove_file(&temporary);
    result
}

fn write_by_way_of<T>(temporary: &Path, path: &Path, write: impl FnOnce(&mut AtomicFile) -> Result<T>) -> Result<T> {
    let mut file = AtomicFile::Local(std::fs::File::create(temporary).map_err(Error::io("create", temporary))?);
    let result = write(&mut file).and_then(|result| {
        let AtomicFile::Local(file) = &file else { return Ok(result) };
        fault::check(Operation::CommitSync).and_then(|()| file.sync_all()).map_err(Error::io("sync", temporary))?;
        fault::check(Operation::CommitRename)
            .and_then(|()| std::fs::rename(temporary, path))
            .map_err(Error::io("rename to", path))?;
        sync_folder(path)?;
        Ok(result)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(temporary);
    }
    result
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A word that no other process or thread has.
pub(crate) fn unique() -> String {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    format!("{}-{nanos:x}", std::process::id())
}

/// Makes the name of a file survive a power loss.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(Error::io("sync", folder))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Makes a folder, not those above it.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", path)(error)),
        _ => Ok(()),
    }
}

/// Tells a file from another: its length, its beginning and its end.
pub(crate) fn fingerprint(path: &Path) -> Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    const SAMPLE_BYTES: u64 = 1 << 16;
    let read = || -> io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        let mut sample = Vec::new();
        Read::by_ref(&mut file).take(SAMPLE_BYTES).read_to_end(&mut sample)?;
        file.seek(SeekFrom::Start(length.saturating_sub(SAMPLE_BYTES)))?;
        file.take(SAMPLE_BYTES).read_to_end(&mut sample)?;
        sample.extend(length.to_le_bytes());
        Ok(hex(&Sha256::digest(sample)))
    };
    read().map_err(Error::io("read", path))
}
