//! The output folder: which shards are finished, in work elsewhere or open, and how an open one becomes a file.
//!
//! ```text
//! OUT/captions-{shard}.{parquet|jsonl|tar}   whole, or not there
//! OUT/shards/{shard}.json                    counts and identity, for formats whose files cannot hold them
//! OUT/journal/{shard}.journal                rows of a shard in progress (or in the work folder)
//! OUT/claims/{shard}.lock                    held by the process that does the shard
//! OUT/run.lock                               shared by all runs into the folder
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pipeline::write::claim::Claim;
use crate::pipeline::write::journal::{Entry, Header, Journal, Replayed, key_hash};
use crate::pipeline::write::written_row::Counts;
use crate::pipeline::write::{create_folder, fingerprint, jsonl, parquet, webdataset, write_atomically};

/// Format of the files of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One Parquet file per shard, zstd.
    #[default]
    Parquet,
    /// One JSON object a line.
    Jsonl,
    /// A tar per shard: the images as they were, captions and columns beside them.
    Webdataset,
}

impl Format {
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Jsonl => "jsonl",
            Self::Webdataset => "tar",
        }
    }

    /// Whether its files hold the images.
    pub(crate) fn has_images(self) -> bool {
        self == Self::Webdataset
    }
}

/// How long a finished row may be lost to a power loss where nobody says.
const DEFAULT_SYNC_INTERVAL: Duration = Duration::from_secs(5);

/// An output folder and how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputOptions {
    /// The folder.
    pub folder: PathBuf,
    /// Format of the files.
    pub format: Format,
    /// Where the journals go, if not into `folder`.
    pub work_folder: Option<PathBuf>,
    /// Fingerprint of the settings that the captions depend on.
    pub settings: String,
    /// Longest time that a finished row may be lost to a power loss.
    pub sync_interval: Duration,
    /// Do the failed rows of finished shards again.
    pub retry_failed: bool,
    /// Several processes may share the folder.
    pub has_claims: bool,
}

impl OutputOptions {
    /// A folder of this process's own, written as Parquet.
    #[must_use]
    pub fn private(folder: PathBuf) -> Self {
        Self {
            folder,
            format: Format::Parquet,
            work_folder: None,
            settings: String::new(),
            sync_interval: DEFAULT_SYNC_INTERVAL,
            retry_failed: false,
            has_claims: false,
        }
    }

    /// The folder of the journals.
    pub(crate) fn journal_folder(&self) -> PathBuf {
        self.work_folder.as_ref().unwrap_or(&self.folder).join("journal")
    }

    pub(crate) fn claim_folder(&self) -> PathBuf {
        self.folder.join("claims")
    }

    pub(crate) fn stats_folder(&self) -> PathBuf {
        self.folder.join("shards")
    }
}

/// A shard whose file is in the output folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FinishedShard {
    pub(crate) counts: Counts,
    /// Tells its input from another of the same name; files of earlier versions may not have it.
    pub(crate) identity: Option<String>,
}

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
        let output = Self { options, prompt_tokens, with_token_ids, finished: Mutex::default() };
        output.count()?;
        Ok(output)
    }

    /// The file of `shard`.
    pub(crate) fn path(&self, shard: &str) -> PathBuf {
        let extension = self.options.format.extension();
        self.options.folder.join(format!("captions-{shard}.{extension}"))
    }

    fn journal_path(&self, shard: &str) -> PathBuf {
        self.options.journal_folder().join(format!("{shard}.journal"))
    }

    fn stats_path(&self, shard: &str) -> PathBuf {
        self.options.stats_folder().join(format!("{shard}.json"))
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, FinishedShard>> {
        self.finished.lock().expect("bug: the lock is never held while panicking")
    }

    /// Counts the rows of all finished shards, those that other processes finished too.
    ///
    /// # Errors
    /// When the folder or one of its files cannot be read.
    pub(crate) fn count(&self) -> Result<Counts> {
        let folder = &self.options.folder;
        let mut counts = Counts::default();
        for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let name = entry.map_err(Error::io("read", folder))?.file_name().to_string_lossy().into_owned();
            let shard =
                name.strip_prefix("captions-").and_then(|name| name.strip_suffix(self.options.format.extension()));
            let Some(shard) = shard.and_then(|shard| shard.strip_suffix('.')) else { continue };
            let known = self.known().get(shard).cloned();
            let finished = known.map_or_else(|| self.read_finished(shard), Ok)?;
            counts.add(&finished.counts);
        }
        Ok(counts)
    }

    /// What the file of a finished shard, or what lies beside it, says of it.
    fn read_finished(&self, shard: &str) -> Result<FinishedShard> {
        let path = self.path(shard);
        let finished = match self.options.format {
            Format::Parquet => parquet::read_finished(&path)?,
            Format::Jsonl | Format::Webdataset => match std::fs::read(self.stats_path(shard)) {
                Ok(json) => serde_json::from_slice(&json).map_err(|error| Error::Output {
                    path: self.stats_path(shard),
                    reason: format!("it is damaged: {error}"),
                    hint: "delete it: the shard's file is then read instead".to_owned(),
                })?,
                Err(_) => {
                    let mut counts = Counts::default();
                    self.read_rows(shard, &mut |entry| {
                        counts.add_row(&entry.row);
                        Ok(())
                    })?;
                    FinishedShard { counts: counts.with_prompt_tokens(self.prompt_tokens), identity: None }
                }
            },
        };
        self.known().insert(shard.to_owned(), finished.clone());
        Ok(finished)
    }

    /// Reads the rows of a finished shard, in order.
    fn read_rows(&self, shard: &str, each: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
        let path = self.path(shard);
        match self.options.format {
            Format::Parquet => parquet::read(&path, each),
            Format::Jsonl => jsonl::read(&path, each),
            Format::Webdataset => webdataset::read(&path, each),
        }
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
            match Claim::take(&self.options.claim_folder().join(format!("{shard}.lock")))? {
                Some(claim) => Some(claim),
                None => return Ok(BegunShard::Busy),
            }
        } else {
            None
        };
        // Only now: another process may have finished it a moment ago.
        let path = self.path(shard);
        let replaces = match path.try_exists().map_err(Error::io("read", &path))? {
            true => Some(self.read_finished(shard)?),
            false => None,
        };
        if let Some(finished) = replaces.as_ref().filter(|finished| is_final(finished)) {
            // The run that wrote the file may have been killed before it deleted the journal.
            let _ = std::fs::remove_file(self.journal_path(shard));
            if let Some(claim) = claim {
                claim.finish();
            }
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
        let replaces = fingerprint(&self.path(shard))?;
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
        self.read_rows(shard, &mut |entry| {
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
    /// The disk's; the journal is then kept.
    pub(crate) fn commit(&self, shard: &str, open: OpenShard, num_rows: usize, identity: &str) -> Result<()> {
        let OpenShard { claim, mut journal, .. } = open;
        let path = self.path(shard);
        let counts = journal.counts().clone().with_prompt_tokens(self.prompt_tokens);
        let finished = FinishedShard { counts, identity: Some(identity.to_owned()) };
        let rows = &mut (0..num_rows).map(|index| journal.read(index));
        match self.options.format {
            Format::Parquet => parquet::write(&path, rows, &finished, self.with_token_ids)?,
            Format::Jsonl | Format::Webdataset => {
                let json = serde_json::to_vec(&finished).expect("bug: counts serialise");
                create_folder(&self.options.stats_folder())?;
                write_atomically(&self.stats_path(shard), |file| {
                    std::io::Write::write_all(file, &json).map_err(Error::io("write", &self.stats_path(shard)))
                })?;
                match self.options.format {
                    Format::Jsonl => jsonl::write(&path, rows, self.with_token_ids)?,
                    _ => webdataset::write(&path, rows)?,
                }
            }
        }
        self.known().insert(shard.to_owned(), finished);
        journal.remove()?;
        if let Some(claim) = claim {
            claim.finish();
        }
        Ok(())
    }

    /// Leaves a shard whose input cannot be read to its end: its rows are not kept.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn abandon(&self, open: OpenShard) -> Result<()> {
        open.journal.remove()
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

/// Whether a path in an output folder is a shard's file, or was to become one.
pub(crate) fn is_output_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".tmp").unwrap_or(&name);
    name.starts_with("captions-") && [".parquet", ".jsonl", ".tar"].iter().any(|suffix| name.ends_with(suffix))
}
