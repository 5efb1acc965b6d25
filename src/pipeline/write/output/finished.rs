//! Shards whose files are in the output: their counts, their rows, and what is left beside them.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pipeline::write::claim::Claim;
use crate::pipeline::write::journal::{Entry, Journal};
use crate::pipeline::write::output::{Format, Output};
use crate::pipeline::write::written_row::Counts;
use crate::pipeline::write::{create_folder, jsonl, parquet, unique, webdataset, write_atomically};
use crate::storage::{Failure, Location, PendingRead};

const MAX_STATS_BYTES: u64 = 16 << 20;
/// Most counts of shards that are asked of a store at once.
const MAX_READS_AHEAD: usize = 32;
const COPY_BYTES: usize = 1 << 18;

/// A shard whose file is in the output folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FinishedShard {
    pub(crate) counts: Counts,
    /// Tells its input from another of the same name; files of earlier versions may not have it.
    pub(crate) identity: Option<String>,
}

/// A finished shard's file on this machine.
pub(super) struct LocalCopy {
    pub(super) path: PathBuf,
    is_temporary: bool,
}

impl Drop for LocalCopy {
    fn drop(&mut self) {
        if self.is_temporary {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Output {
    /// Counts the rows of all finished shards, those that other processes finished too.
    ///
    /// # Errors
    /// When the folder or one of its files cannot be read.
    pub(crate) fn count(&self) -> Result<Counts> {
        let mut counts = Counts::default();
        let mut unknown = VecDeque::new();
        for name in self.options.folder.names()? {
            let shard =
                name.strip_prefix("captions-").and_then(|name| name.strip_suffix(self.options.format.extension()));
            let Some(shard) = shard.and_then(|shard| shard.strip_suffix('.')) else { continue };
            if let Some(finished) = self.known().get(shard) {
                counts.add(&finished.counts);
                continue;
            }
            // Of a store's many answers the next ones are on their way while one is waited for.
            let pending = match self.stats_location(shard) {
                Location::Object(stats) => Some(stats.read_ahead(MAX_STATS_BYTES)?),
                Location::Local(_) => None,
            };
            unknown.push_back((shard.to_owned(), pending));
            if unknown.len() > MAX_READS_AHEAD
                && let Some((shard, pending)) = unknown.pop_front()
            {
                counts.add(&self.read_finished(&shard, pending)?.counts);
            }
        }
        for (shard, pending) in unknown {
            counts.add(&self.read_finished(&shard, pending)?.counts);
        }
        Ok(counts)
    }

    /// What the file of a finished shard, or what lies beside it, says of it. The latter may be `pending` already.
    pub(super) fn read_finished(&self, shard: &str, pending: Option<PendingRead>) -> Result<FinishedShard> {
        let location = self.stats_location(shard);
        let stats = match pending.map_or_else(|| self.read_stats(&location), |pending| pending.wait().map(Some)) {
            Err(Error::Storage { failure: Failure::NotFound, .. }) => None,
            stats => stats?,
        };
        let finished = if let Some(stats) = stats {
            serde_json::from_slice(&stats).map_err(|error| Error::Output {
                path: location.to_string().into(),
                reason: format!("it is damaged: {error}"),
                hint: "delete it: the shard's file is then read instead".to_owned(),
            })?
        } else if self.options.format == Format::Parquet {
            parquet::read_finished(&self.local_copy(shard)?.path)?
        } else {
            let mut counts = Counts::default();
            self.read_rows(&self.local_copy(shard)?.path, &mut |entry| {
                counts.add_row(&entry.row);
                Ok(())
            })?;
            FinishedShard { counts: counts.with_prompt_tokens(self.prompt_tokens), identity: None }
        };
        self.known().insert(shard.to_owned(), finished.clone());
        Ok(finished)
    }

    fn read_stats(&self, stats: &Location) -> Result<Option<Bytes>> {
        match self.options.has_stats() && stats.exists()? {
            true => stats.read(MAX_STATS_BYTES).map(Some),
            false => Ok(None),
        }
    }

    /// Reads the rows of a finished shard, in order.
    pub(super) fn read_rows(&self, path: &Path, each: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
        match self.options.format {
            Format::Parquet => parquet::read(path, each),
            Format::Jsonl => jsonl::read(path, each),
            Format::Webdataset => webdataset::read(path, each),
        }
    }

    /// The file of a finished shard on this machine: a copy, if it lies elsewhere.
    pub(super) fn local_copy(&self, shard: &str) -> Result<LocalCopy> {
        let location = self.location(shard);
        if let Some(path) = location.local_path() {
            return Ok(LocalCopy { path: path.to_owned(), is_temporary: false });
        }
        let path = self.options.journal_folder().join(format!("{shard}.{}.copy", unique()));
        let mut file = std::fs::File::create(&path).map_err(Error::io("create", &path))?;
        let copy = LocalCopy { path, is_temporary: true };
        // What of it is read and what is written fails with errors of its own.
        let mut object = location.open()?;
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            let length = object.read(&mut buffer).map_err(Error::at("read", &location))?;
            if length == 0 {
                return Ok(copy);
            }
            file.write_all(&buffer[..length]).map_err(Error::io("write", &copy.path))?;
        }
    }

    pub(super) fn write_stats(&self, shard: &str, finished: &FinishedShard) -> Result<()> {
        let json = serde_json::to_vec(finished).expect("bug: counts serialise");
        let stats = self.stats_location(shard);
        if let Some(folder) = self.options.stats_folder().local_path() {
            create_folder(folder)?;
        }
        write_atomically(&stats, |file| file.write_all(&json).map_err(Error::at("write", &stats)))
    }

    /// Deletes the journals and claims of shards that are finished: a run was killed between a file and its journal, or another process
    /// took the shard over.
    pub(super) fn delete_old_journals(&self) -> Result<()> {
        for name in Location::Local(self.options.journal_folder()).names()? {
            let Some(shard) = name.strip_suffix(".journal").filter(|shard| self.known().contains_key(*shard)) else {
                continue;
            };
            // Without a lock nobody knows whether it is in use.
            let claim = match self.options.has_claims {
                true => Claim::take(&self.claim_path(shard))?,
                false => None,
            };
            let Some(claim) = claim else { continue };
            // One that replaces a finished shard's failed rows may be gone on with.
            let is_old = match Journal::replay(&self.journal_path(shard)) {
                Ok(found) => found.is_none_or(|found| found.header.replaces.is_none()),
                Err(_) => false,
            };
            if is_old {
                if let Some(claims) = &self.store_claims
                    && claims.take(shard)?
                {
                    claims.finish(shard);
                }
                let _ = std::fs::remove_file(self.journal_path(shard));
            }
            claim.finish();
        }
        if self.options.has_claims {
            // And lock files alone: a run was killed between a journal and its claim.
            for name in Location::Local(self.options.claim_folder()).names()? {
                if let Some(shard) = name.strip_suffix(".lock").filter(|shard| self.known().contains_key(*shard))
                    && !self.journal_path(shard).exists()
                    && let Some(claim) = Claim::take(&self.claim_path(shard))?
                {
                    claim.finish();
                }
            }
        }
        Ok(())
    }
}
