//! Everything that can stop a run, named by cause, with what to do about it. A bad image is not here: it is a row.

use std::any::Any;
use std::path::{Path, PathBuf};

use crate::stage::Stage;
use crate::storage::{Failure, Location};

/// Why a run could not start or go on. `Display` is one line; [`Error::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bundle cannot be read.
    #[error(transparent)]
    Bundle(#[from] recaption_export::Error),
    /// The ONNX Runtime library is missing, too old or not that library at all.
    #[error("{reason}")]
    OnnxRuntimeLibrary {
        /// What was found or not found, and where.
        reason: String,
        /// Where the right one comes from.
        hint: String,
    },
    /// ONNX Runtime refused a graph, a tensor or a run.
    #[error("{doing}: {source}")]
    OnnxRuntime {
        /// What was being done.
        doing: String,
        /// Its own words.
        source: ort::Error,
    },
    /// The execution provider asked for does not work here.
    #[error("provider `{provider}` does not work here: {reason}")]
    Provider {
        /// Its name.
        provider: &'static str,
        /// ONNX Runtime's reason.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// `--device` names a GPU that is not there.
    #[error("--device {index}: CUDA sees {count} GPUs{listed}")]
    NoSuchGpu {
        /// What was asked for.
        index: i32,
        /// How many there are.
        count: i32,
        /// The machine's GPUs, after a colon, where the driver tells.
        listed: String,
    },
    /// The CUDA runtime refused: the GPU is gone, full, or not there.
    #[error("CUDA, {doing}: {reason} ({status})")]
    Cuda {
        /// What was being done.
        doing: &'static str,
        /// Its error number.
        status: i32,
        /// Its own words.
        reason: String,
    },
    /// The bundle's tokenizer does not load or encode.
    #[error("tokenizer `{path}`: {reason}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The tokenizers library's reason.
        reason: String,
    },
    /// The prompt template does not parse, render or place an image.
    #[error("prompt template `{template}`: {reason}")]
    Template {
        /// Preset, file or `checkpoint`.
        template: String,
        /// What is wrong.
        reason: String,
    },
    /// A setting contradicts the model or another setting.
    #[error("{reason}")]
    Setting {
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// An input does not exist or is of a kind that is not read.
    #[error("input `{input}`: {reason}")]
    Input {
        /// As given on the command line.
        input: String,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// A file or folder of the run could not be read or written.
    #[error("{action} `{path}`: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// An object store did not do what it was asked to.
    #[error("{action} `{location}`: {reason}")]
    Storage {
        /// What was being done.
        action: &'static str,
        /// To what, without credentials.
        location: String,
        /// What kind of failure it is.
        failure: Failure,
        /// Its own words, without credentials.
        reason: String,
    },
    /// The output folder belongs to a run with other settings.
    #[error("`{path}` was written with other settings: {differences}")]
    OtherRun {
        /// The output folder.
        path: PathBuf,
        /// Which settings differ.
        differences: String,
    },
    /// A Parquet file could not be written or read.
    #[error("{action} `{path}`: {source}")]
    Parquet {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The library's reason.
        source: parquet::errors::ParquetError,
    },
    /// Something in the output folder is not as it should be.
    #[error("`{path}`: {reason}")]
    Output {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A shard that this process had is another's: it gave no sign of life for too long.
    #[error("shard `{shard}` is another process's by now")]
    ClaimLost {
        /// The shard.
        shard: String,
    },
    /// More rows failed than `--max-failures` allows.
    #[error("{failed} of {rows} images failed, more than --max-failures allows: {reasons}")]
    TooManyFailures {
        /// Failed rows of this run.
        failed: u64,
        /// Rows of this run.
        rows: u64,
        /// The most frequent reasons.
        reasons: String,
    },
    /// A stage stopped with an error that is not one image's.
    #[error("{stage} stage: {source}")]
    Stage {
        /// Which stage.
        stage: Stage,
        /// Why.
        source: Box<Error>,
    },
    /// A stage panicked: a bug of this program.
    #[error("{stage} stage panicked: {message}")]
    Panicked {
        /// Which stage.
        stage: Stage,
        /// The panic's message.
        message: String,
    },
}

impl Error {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Bundle(error) => error.hint(),
            Self::OnnxRuntimeLibrary { hint, .. }
            | Self::Setting { hint, .. }
            | Self::Provider { hint, .. }
            | Self::Output { hint, .. } => Some(hint.clone()),
            Self::Input { hint, .. } => Some((*hint).to_owned()),
            Self::Template { .. } => Some(
                "use --template with llava-pp-llama3, llava-next-llama3, plain-llama3, or a Jinja file that places an image"
                    .to_owned(),
            ),
            Self::OtherRun { .. } => {
                Some("choose another --out, repeat the earlier settings, or start anew with --overwrite".to_owned())
            }
            Self::Cuda { .. } => Some(
                "`recaption doctor` shows what is there; a GPU that fails again and again is worth a look at `nvidia-smi -q`"
                    .to_owned(),
            ),
            Self::NoSuchGpu { .. } => Some("use indices from 0 on; CUDA_VISIBLE_DEVICES hides GPUs".to_owned()),
            Self::Panicked { .. } => {
                Some("this is a bug; finished rows are kept, and the same command goes on after them".to_owned())
            }
            Self::TooManyFailures { .. } => Some(
                "all rows are kept; mend the cause, then the same command goes on after them, and --retry-failed does the \
                 failed ones again"
                    .to_owned(),
            ),
            Self::Stage { source, .. } => source.hint(),
            Self::Storage { failure, .. } => failure.hint().map(str::to_owned),
            Self::Io { source, action, .. } => disk_hint(source, action),
            Self::Parquet { action: "read", .. } => Some(
                "delete it, and the shard is done again by the same command; or start anew with --overwrite".to_owned(),
            ),
            _ => None,
        }
    }

    /// Whether the reader of standard output went away.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::BrokenPipe)
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// The error of an action on `location`: a storage error that came through `Read` or `Write`, or the file system's.
    pub(crate) fn at(action: &'static str, location: &Location) -> impl FnOnce(std::io::Error) -> Self {
        let location = location.clone();
        move |source| match source.downcast::<Self>() {
            Ok(error) => error,
            Err(source) => Self::Io { action, path: location.to_string().into(), source },
        }
    }

    pub(crate) fn ort(doing: impl Into<String>) -> impl FnOnce(ort::Error) -> Self {
        let doing = doing.into();
        move |source| Self::OnnxRuntime { doing, source }
    }
}

/// What to do about a disk that refuses.
fn disk_hint(source: &std::io::Error, action: &str) -> Option<String> {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let is_writing = ["write", "sync", "create", "rename to", "delete"].contains(&action);
    match source.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => {
            Some("free some space; with --out the same command goes on after the rows that are finished".to_owned())
        }
        _ if is_writing => Some(
            "see to the disk or folder; with --out the same command goes on after the rows that are finished"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The text that a panic was raised with.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}
