//! The output folder: which shards are finished, in work elsewhere or open, and how an open one becomes a file.
//!
//! ```text
//! OUT/captions-{shard}.{parquet|jsonl|tar}   whole, or not there
//! OUT/shards/{shard}.json                    counts and identity, for formats whose files cannot hold them
//! OUT/journal/{shard}.journal                rows of a shard in progress (or in the work folder)
//! OUT/claims/{shard}.lock                    held by the process that does the shard
//! OUT/run.lock                               shared by all runs into the folder
//! ```
//!
//! In an object store there are neither journals nor locks: those lie in the work folder, and beside them claims are objects
//! (`store_claim.rs`).

mod finished;
mod options;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::pipeline::write::claim::Claim;
use crate::pipeline::write::journal::{Header, Journal, Replayed, key_hash};
use crate::pipeline::write::store_claim::StoreClaims;
use crate::pipeline::write::{create_folder, fingerprint, jsonl, parquet, webdataset, write_atomically, write_new};
use crate::storage::Location;

pub(crate) use self::finished::FinishedShard;
pub use self::options::{Format, OutputOptions};

/// What becomes of a shard that is begun.
pub(crate) enum BegunShard {
    Finished(FinishedShard),
    /// Another process has it.
    Busy,
    Open(Box<OpenShard>, Kept),
}

/// A shard in the hands of this process.
pub(crate) struct OpenShard {
    claim: Option<Claim>,
    pub(crate) journal: Journal,
    /// Rows in the journal when it was opened.
    pub(crate) num_kept: usize,
}

/// What there is of an open shard already.
#[derive(Default)]
pub(crate) struct Kept {
    /// Rows that are done, with the hash of their keys.
    pub(crate) rows: HashMap<usize, u64>,
    /// The finished shard whose failed rows are done again.
    pub(crate) replaces: Option<FinishedShard>,
}

/// The output folder of a run.
pub(crate) struct Output {
    pub(crate) options: OutputOptions,
    prompt_tokens: usize,
    with_token_ids: bool,
    /// For an output in an object store, which other machines may share.
    store_claims: Option<StoreClaims>,
    /// What is known of the shards that are finished.
    finished: Mutex<HashMap<String, FinishedShard>>,
}

impl Output {
    /// Looks at what is there.
    ///
    /// # Errors
    /// When the folder or one of its files cannot be read.
    pub(crate) fn open(options: OutputOptions, prompt_tokens: usize, with_token_ids: bool) -> Result<Self> {
        create_folder(&options.journal_folder())?;
        let store_claims = match (&options.folder, options.has_claims) {
            (Location::Object(_), true) => {
                let owner = owner(options.local_folder())?;
                Some(StoreClaims::new(options.folder.join("claims"), owner, options.claim_timeout)?)
            }
            _ => None,
        };
        let output = Self { options, prompt_tokens, with_token_ids, store_claims, finished: Mutex::default() };
        output.count()?;
        output.delete_old_journals()?;
        Ok(output)
    }

    fn claim_path(&self, shard: &str) -> PathBuf {
        self.options.claim_folder().join(format!("{shard}.lock"))
    }

    /// The file of `shard`.
    pub(crate) fn location(&self, shard: &str) -> Location {
        let extension = self.options.format.extension();
        self.options.folder.join(&format!("captions-{shard}.{extension}"))
    }

    fn journal_path(&self, shard: &str) -> PathBuf {
        self.options.journal_folder().join(format!("{shard}.journal"))
    }

    fn stats_location(&self, shard: &str) -> Location {
        self.options.stats_folder().join(&format!("{shard}.json"))
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, FinishedShard>> {
        self.finished.lock().expect("bug: the lock is never held while panicking")
    }

    /// Begins a shard: finished, another process's, or this one's from here on. `identity` is its input's, where that is
    /// known already.
    ///
    /// # Errors
    /// [`Error::Input`] when what is there was made from another input; the disk's.
    pub(crate) fn begin(&self, shard: &str, identity: Option<&str>) -> Result<BegunShard> {
        let is_final = |finished: &FinishedShard| !self.options.retry_failed || finished.counts.failed == 0;
        if let Some(finished) = self.known().get(shard).filter(|finished| is_final(finished)) {
            return Ok(BegunShard::Finished(finished.clone()));
        }
        let claim = if self.options.has_claims {
            match Claim::take(&self.claim_path(shard))? {
                Some(claim) => Some(claim),
                None => return Ok(BegunShard::Busy),
            }
        } else {
            None
        };
        let is_others = match &self.store_claims {
            Some(claims) => !claims.take(shard)?,
            None => false,
        };
        if is_others {
            return Ok(BegunShard::Busy);
        }
        // Only now: another process may have finished it a moment ago.
        let replaces = match self.location(shard).exists()? {
            true => Some(self.read_finished(shard, None)?),
            false => None,
        };
        if let Some(finished) = replaces.as_ref().filter(|finished| is_final(finished)) {
            // The run that wrote the file may have been killed before it deleted the journal.
            let _ = std::fs::remove_file(self.journal_path(shard));
            self.finish_claims(shard, claim);
            return Ok(BegunShard::Finished(finished.clone()));
        }
        if let Some(finished) = &replaces {
            check_identity(shard, finished.identity.as_deref(), identity)?;
        }
        let (journal, rows) = match &replaces {
            Some(_) => self.journal_of_retry(shard, identity)?,
            None => self.journal(shard, identity)?,
        };
        let open = OpenShard { claim, journal, num_kept: rows.len() };
        Ok(BegunShard::Open(Box::new(open), Kept { rows, replaces }))
    }

    /// Waits until it is known of the shards that others have whether those are alive, or `is_done` says so. Locks on this
    /// machine tell that at once.
    ///
    /// # Errors
    /// The store's.
    pub(crate) fn wait_for_others(&self, is_done: impl FnMut() -> bool) -> Result<()> {
        self.store_claims.as_ref().map_or(Ok(()), |claims| claims.wait_for_others(is_done))
    }

    /// Whether a shard that another process had is finished by now. One whose failed rows are done again has its file all along.
    pub(crate) fn is_finished(&self, shard: &str) -> bool {
        !self.options.retry_failed && self.location(shard).exists().unwrap_or(false)
    }

    /// The journal that an earlier run left, or a new one.
    fn journal(&self, shard: &str, identity: Option<&str>) -> Result<(Journal, HashMap<usize, u64>)> {
        let path = self.journal_path(shard);
        if let Some(replayed) = Journal::replay(&path)? {
            let Replayed { journal, header, kept, num_dropped_bytes } = replayed;
            check_identity(shard, header.identity.as_deref(), identity)?;
            if header.settings != self.options.settings {
                return Err(Error::Output {
                    path,
                    reason: "the journal is of a run with other settings".to_owned(),
                    hint: "repeat those settings, or delete the journal: its shard is then done anew".to_owned(),
                });
            }
            if num_dropped_bytes > 0 {
                tracing::info!("{shard}: dropped {num_dropped_bytes} bytes of an unfinished record in the journal");
            }
            return Ok((journal, kept));
        }
        let journal = Journal::create(&path, &Header::new(shard, &self.options.settings, identity, None))?;
        Ok((journal, HashMap::new()))
    }

    /// A journal that starts with the good rows of a finished shard.
    fn journal_of_retry(&self, shard: &str, identity: Option<&str>) -> Result<(Journal, HashMap<usize, u64>)> {
        let path = self.journal_path(shard);
        let copy = self.local_copy(shard)?;
        let replaces = fingerprint(&copy.path)?;
        match Journal::replay(&path)? {
            Some(replayed) if replayed.header.replaces.as_ref() == Some(&replaces) => {
                return Ok((replayed.journal, replayed.kept));
            }
            // Of the run that wrote the file, killed before it deleted the journal.
            Some(_) | None => {}
        }
        // Under another name until it is whole: else a run killed meanwhile would take the rest for failed rows.
        let temporary = self.options.journal_folder().join(format!("{shard}.journal.new"));
        let header = Header::new(shard, &self.options.settings, identity, Some(replaces));
        let mut journal = Journal::create(&temporary, &header)?;
        let mut kept = HashMap::new();
        let mut index = 0;
        self.read_rows(&copy.path, &mut |entry| {
            if entry.row.is_ok() {
                journal.append(index, &entry.row, Some(&entry.image))?;
                kept.insert(index, key_hash(&entry.row.key));
            }
            index += 1;
            Ok(())
        })?;
        Ok((journal.move_to(&path)?, kept))
    }

    /// Writes the file of a shard whose rows are all in the journal, then deletes the journal and the claim.
    ///
    /// # Errors
    /// The disk's or the store's; the journal is then kept. [`Error::ClaimLost`] when the shard is another process's by now.
    pub(crate) fn commit(&self, shard: &str, open: OpenShard, num_rows: usize, identity: &str) -> Result<()> {
        let OpenShard { claim, mut journal, .. } = open;
        let location = self.location(shard);
        let counts = journal.counts().clone().with_prompt_tokens(self.prompt_tokens);
        let finished = FinishedShard { counts, identity: Some(identity.to_owned()) };
        // A file always has its counts beside it. Those of one that is replaced are deleted first: if the process ends in
        // between, they are not taken for the new ones', nor the new ones for the old file's.
        let is_replaced = self.options.has_stats() && location.exists()?;
        match (self.options.has_stats(), is_replaced) {
            (true, true) => self.stats_location(shard).delete()?,
            (true, false) => self.write_stats(shard, &finished)?,
            (false, _) => {}
        }
        let rows = &mut (0..num_rows).map(|index| journal.read(index));
        write_atomically(&location, |file| {
            match self.options.format {
                Format::Parquet => parquet::write(file, &location, rows, &finished, self.with_token_ids)?,
                Format::Jsonl => jsonl::write(file, &location, rows, self.with_token_ids)?,
                Format::Webdataset => webdataset::write(file, &location, rows)?,
            }
            // As late as can be: all but the last request is done.
            self.store_claims.as_ref().map_or(Ok(()), |claims| claims.confirm(shard))
        })?;
        if is_replaced {
            self.write_stats(shard, &finished)?;
        }
        self.known().insert(shard.to_owned(), finished);
        // The journal after the claim: as long as it is there, the next run finds what a kill left of either.
        if let Some(claims) = &self.store_claims {
            claims.finish(shard);
        }
        journal.remove()?;
        self.finish_claims(shard, claim);
        Ok(())
    }

    fn finish_claims(&self, shard: &str, claim: Option<Claim>) {
        if let Some(claims) = &self.store_claims {
            claims.finish(shard);
        }
        if let Some(claim) = claim {
            claim.finish();
        }
    }

    /// Leaves a shard whose input cannot be read to its end: its rows are not kept.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn abandon(&self, shard: &str, open: OpenShard) -> Result<()> {
        open.journal.remove()?;
        self.finish_claims(shard, open.claim);
        Ok(())
    }

    /// Leaves nothing in the folder that a finished output does not need.
    pub(crate) fn tidy(&self) {
        // They stay when there is something in them.
        let _ = std::fs::remove_dir(self.options.journal_folder());
        let _ = std::fs::remove_dir(self.options.claim_folder());
    }
}

fn check_identity(shard: &str, known: Option<&str>, identity: Option<&str>) -> Result<()> {
    match (known, identity) {
        (Some(known), Some(identity)) if known != identity => Err(other_input(shard)),
        _ => Ok(()),
    }
}

/// The output holds a shard of this name that was made from other images.
pub(crate) fn other_input(shard: &str) -> Error {
    Error::Input {
        input: shard.to_owned(),
        reason: format!("the output has shard `{shard}` of other images"),
        hint: "images were added, removed or reordered since; choose another --out, start anew with --overwrite, or \
               delete the shard's captions and journal",
    }
}

/// A name for a work folder, the same for every process that has it.
fn owner(work_folder: &Path) -> Result<String> {
    let path = work_folder.join("owner");
    write_new(&path, super::unique().as_bytes())?;
    std::fs::read_to_string(&path).map_err(Error::io("read", &path))
}

/// Whether a path in an output folder is a shard's file, or was to become one.
pub(crate) fn is_output_name(name: &str) -> bool {
    let name = name.strip_suffix(".tmp").unwrap_or(name);
    name.starts_with("captions-") && [".parquet", ".jsonl", ".tar"].iter().any(|suffix| name.ends_with(suffix))
}
