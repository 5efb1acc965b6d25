//! The `.onnx.data` file of a graph. Hashing and writing go on in two threads while the next block is converted, so that
//! an export costs little more than a copy of the file.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::graph::hex;
use crate::manifest::BundleFile;

/// External tensors start at multiples of this, so that the data file can be mapped page by page.
pub(crate) const ALIGNMENT: u64 = 4096;
/// Blocks that wait for the hash, and as many that wait for the disk.
const MAX_QUEUED_BLOCKS: usize = 4;

/// Appends blocks to a file and hashes them.
pub(crate) struct DataFile<'a> {
    cancel: &'a AtomicBool,
    path: PathBuf,
    blocks: Option<SyncSender<Vec<u8>>>,
    /// Blocks that are written, to be filled again.
    used_blocks: Receiver<Vec<u8>>,
    hasher: Option<JoinHandle<String>>,
    writer: Option<JoinHandle<Result<()>>>,
    offset: u64,
}

impl<'a> DataFile<'a> {
    pub(crate) fn create(path: &Path, cancel: &'a AtomicBool) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        let (blocks, to_hash) = sync_channel::<Vec<u8>>(MAX_QUEUED_BLOCKS);
        let (hashed, to_write) = sync_channel(MAX_QUEUED_BLOCKS);
        let (written, used_blocks) = sync_channel(2 * MAX_QUEUED_BLOCKS + 2);
        let hasher = std::thread::spawn(move || {
            let mut hasher = Sha256::new();
            for block in to_hash {
                hasher.update(&block);
                // A writer that failed has closed its end: its error is found in `finish`.
                if hashed.send(block).is_err() {
                    break;
                }
            }
            hex(&hasher.finalize())
        });
        let owned_path = path.to_owned();
        let writer = std::thread::spawn(move || write_all(file, &owned_path, &to_write, &written));
        Ok(Self {
            cancel,
            path: path.to_owned(),
            blocks: Some(blocks),
            used_blocks,
            hasher: Some(hasher),
            writer: Some(writer),
            offset: 0,
        })
    }

    /// Bytes written so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Fills up with zeros to the next multiple of [`ALIGNMENT`].
    pub(crate) fn align(&mut self) -> Result<()> {
        let padding = self.offset.next_multiple_of(ALIGNMENT) - self.offset;
        if padding == 0 {
            return Ok(());
        }
        self.write_with(|block| block.resize(padding as usize, 0))
    }

    /// Appends what `fill` puts into an empty block.
    pub(crate) fn write_with(&mut self, fill: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let mut block = self.used_blocks.try_recv().unwrap_or_default();
        block.clear();
        fill(&mut block);
        self.offset += block.len() as u64;
        let is_sent = self.blocks.as_ref().is_some_and(|blocks| blocks.send(block).is_ok());
        if is_sent { Ok(()) } else { Err(self.failure()) }
    }

    /// Why the writer ended early.
    fn failure(&mut self) -> Error {
        self.blocks = None;
        let result = self.writer.take().and_then(|writer| writer.join().ok());
        match result {
            Some(Err(error)) => error,
            _ => Error::io("write", &self.path)(std::io::ErrorKind::Other.into()),
        }
    }

    /// Waits until all is on the disk; removes the file again when nothing went into it.
    pub(crate) fn finish(mut self, name: String) -> Result<Option<BundleFile>> {
        self.blocks = None;
        let sha256 = self.hasher.take().and_then(|hasher| hasher.join().ok());
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(written)) => written?,
            _ => return Err(self.failure()),
        }
        if self.offset == 0 {
            std::fs::remove_file(&self.path).map_err(Error::io("remove", &self.path))?;
            return Ok(None);
        }
        let sha256 = sha256.expect("bug: the hasher ends when its input does");
        Ok(Some(BundleFile { path: name, size: self.offset, sha256 }))
    }
}

impl Drop for DataFile<'_> {
    /// An export that failed removes its files next: nobody may still write to them.
    fn drop(&mut self) {
        self.blocks = None;
        let _ = self.hasher.take().map(JoinHandle::join);
        let _ = self.writer.take().map(JoinHandle::join);
    }
}

fn write_all(mut file: File, path: &Path, blocks: &Receiver<Vec<u8>>, written: &SyncSender<Vec<u8>>) -> Result<()> {
    for block in blocks {
        file.write_all(&block).map_err(Error::io("write", path))?;
        // Full or closed: the block is dropped instead of kept.
        let _ = written.try_send(block);
    }
    file.sync_all().map_err(Error::io("write", path))
}
