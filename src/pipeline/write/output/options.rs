//! Where a run's files go and what they are.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::storage::Location;

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
    /// As `--format` takes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Jsonl => "jsonl",
            Self::Webdataset => "webdataset",
        }
    }

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
const DEFAULT_CLAIM_TIMEOUT: Duration = Duration::from_secs(150);

/// An output folder and how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputOptions {
    /// The folder, here or in an object store.
    pub folder: Location,
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
    /// Time without a sign of life after which a claim in an object store is nobody's.
    pub claim_timeout: Duration,
}

impl OutputOptions {
    /// A folder of this process's own, written as Parquet.
    #[must_use]
    pub fn private(folder: PathBuf) -> Self {
        Self {
            folder: folder.into(),
            format: Format::Parquet,
            work_folder: None,
            settings: String::new(),
            sync_interval: DEFAULT_SYNC_INTERVAL,
            retry_failed: false,
            has_claims: false,
            claim_timeout: DEFAULT_CLAIM_TIMEOUT,
        }
    }

    /// The folder on this machine that holds what is in progress.
    pub(crate) fn local_folder(&self) -> &Path {
        let local = self.work_folder.as_deref().or_else(|| self.folder.local_path());
        local.expect("bug: an output in an object store has a work folder")
    }

    /// The folder of the journals.
    pub(crate) fn journal_folder(&self) -> PathBuf {
        self.local_folder().join("journal")
    }

    /// The folder of the locks: in the output, or, for one in an object store, in the work folder.
    pub(crate) fn claim_folder(&self) -> PathBuf {
        self.folder.local_path().unwrap_or_else(|| self.local_folder()).join("claims")
    }

    pub(crate) fn stats_folder(&self) -> Location {
        self.folder.join("shards")
    }

    /// Whether a shard's counts lie beside its file: in an object store reading the file for them would take too long.
    pub(super) fn has_stats(&self) -> bool {
        self.format != Format::Parquet || self.folder.local_path().is_none()
    }
}
