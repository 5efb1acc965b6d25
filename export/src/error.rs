//! Everything that can stop an export, named by cause, with what to do about it.

use std::path::{Path, PathBuf};

use crate::lint::Finding;
use crate::torch_file::TorchFileError;
use crate::verify::{Difference, FileDifference};

const EXPORT_AGAIN: &str = "export the checkpoint again with --overwrite";

/// Why an export stopped. `Display` is one line; [`Error::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read, created, written or renamed.
    #[error("{action} `{path}`: {source}")]
    Io {
        /// What was being done, such as `read`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file that every checkpoint has is missing.
    #[error("`{checkpoint}` has no {what}")]
    MissingFile {
        /// The checkpoint folder.
        checkpoint: PathBuf,
        /// What is missing.
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A folder has no manifest, or there is no such folder.
    #[error("`{path}` is not a bundle: {reason}")]
    NotABundle {
        /// What was named.
        path: PathBuf,
        /// What is there instead.
        reason: &'static str,
        /// What to do.
        hint: String,
    },
    /// A bundle does something else than what it was opened for.
    #[error("bundle `{path}` is a {found} bundle; {reader} takes a {wanted} bundle")]
    OtherBundleKind {
        /// The bundle.
        path: PathBuf,
        /// Its kind.
        found: &'static str,
        /// Who opened it.
        reader: &'static str,
        /// The kind that it takes.
        wanted: &'static str,
    },
    /// A JSON file does not parse or a field has an unexpected type or value.
    #[error("`{path}`: {reason}")]
    InvalidConfig {
        /// The JSON file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The checkpoint asks for something this exporter does not build.
    #[error("{what} is not supported: {found}")]
    Unsupported {
        /// The setting's name, as the config spells it.
        what: String,
        /// The value found.
        found: String,
        /// What would work.
        hint: String,
    },
    /// A checkpoint of the original layout without its vision tower, and no folder for it.
    #[error("checkpoint `{checkpoint}` does not hold its vision tower, `{tower}`")]
    MissingVisionTower {
        /// The checkpoint folder.
        checkpoint: PathBuf,
        /// The model that config.json names.
        tower: String,
    },
    /// A safetensors file is damaged.
    #[error("`{path}` is not a whole safetensors file: {reason}")]
    InvalidSafetensors {
        /// The shard.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A file of `torch.save` is damaged, or holds more than tensors.
    #[error("{reason}")]
    InvalidTorchFile {
        /// What is wrong with which file.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// A tensor that the configuration calls for is not there.
    #[error("checkpoint has no tensor `{name}`")]
    MissingTensor {
        /// The full name looked for.
        name: String,
    },
    /// Tensors that no part of the model uses.
    #[error("checkpoint has {count} tensor(s) that the model does not use: {names}")]
    UnexpectedTensors {
        /// How many.
        count: usize,
        /// The first few names.
        names: String,
    },
    /// A tensor's shape differs from what the configuration implies.
    #[error("tensor `{name}`: expected shape {expected:?}, got {found:?}")]
    ShapeMismatch {
        /// The tensor.
        name: String,
        /// Shape from the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is stored in a type that is not a float.
    #[error("tensor `{name}`: expected f32, f16 or bf16, got {found}")]
    UnsupportedDtype {
        /// The tensor.
        name: String,
        /// The stored type.
        found: String,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{name}` holds {count} NaN or infinite value(s)")]
    NonFiniteWeight {
        /// The tensor.
        name: String,
        /// How many values.
        count: usize,
    },
    /// A tensor stands in two shards.
    #[error("tensor `{name}` is in `{first}` and in `{second}`")]
    DuplicateTensor {
        /// The tensor.
        name: String,
        /// One shard.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A tensor of a LoRA adapter that goes with none of the checkpoint's.
    #[error("adapter tensor `{name}`: {reason}")]
    UnmatchedAdapter {
        /// The adapter's tensor.
        name: String,
        /// What is missing.
        reason: String,
    },
    /// A graph uses an operator that its target does not have: a bug of the exporter, or a bundle that was edited.
    #[error("`{graph}` node `{node}`: operator `{op}` is not one of target {target}")]
    ForeignOperator {
        /// The graph.
        graph: String,
        /// The node.
        node: String,
        /// The operator, with its domain.
        op: String,
        /// The target.
        target: &'static str,
    },
    /// A graph that the GPU it is for could not run whole: a bug of the exporter.
    #[error("{0}")]
    UnfitForGpu(Finding),
    /// A file is larger than any of its kind: not read.
    #[error("`{path}` is larger than {max_bytes} bytes, the most that is read of such a file")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most.
        max_bytes: u64,
    },
    /// A graph does not decode, or is not the one that the manifest describes.
    #[error("graph `{path}`: {reason}")]
    InvalidGraph {
        /// The `.onnx` file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// Files of a bundle are not as they were exported.
    #[error("bundle `{path}` is not as it was exported: {}", join(differences))]
    DifferentFiles {
        /// The bundle.
        path: PathBuf,
        /// Each file that differs.
        differences: Vec<FileDifference>,
    },
    /// The user ended the export; nothing was left behind.
    #[error("export was interrupted; nothing was written")]
    Cancelled,
    /// A folder is not one, or cannot be made or written to.
    #[error("cannot write into `{path}`: {reason}")]
    UnusableFolder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The output folder exists.
    #[error("cannot write a bundle to `{path}`")]
    OutputExists {
        /// The folder.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
}

impl Error {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::MissingFile { hint, .. } | Self::OutputExists { hint, .. } | Self::InvalidTorchFile { hint, .. } => {
                Some((*hint).to_owned())
            }
            Self::MissingVisionTower { tower, .. } => {
                Some(format!("fetch `{tower}` and give its folder with --vision-tower DIR"))
            }
            Self::Unsupported { hint, .. } if !hint.is_empty() => Some(hint.clone()),
            Self::InvalidConfig { .. } => Some("check that it is the file that it should be, and whole".to_owned()),
            Self::NotABundle { hint, .. } => Some(hint.clone()),
            Self::UnusableFolder { .. } => {
                Some("name a folder that you may write to, or a new one inside of it".to_owned())
            }
            Self::InvalidSafetensors { .. } => {
                Some("the download may have been cut off; fetch the file again and compare its size".to_owned())
            }
            Self::MissingTensor { .. } => {
                Some("check that the checkpoint is complete: every shard that its index names".to_owned())
            }
            Self::ShapeMismatch { .. } => Some("config.json and the weights do not belong together".to_owned()),
            Self::UnexpectedTensors { .. } => Some(
                "this may be another architecture; LLaVA-1.5 and CLIP checkpoints export, adapters with --lora"
                    .to_owned(),
            ),
            Self::UnmatchedAdapter { .. } => {
                Some("the adapter was trained on another model; adapter_config.json names it".to_owned())
            }
            Self::NonFiniteWeight { .. } => {
                Some("the checkpoint is damaged or was saved after a diverged training run".to_owned())
            }
            Self::DifferentFiles { differences, .. } => {
                let is_extra = |file: &&FileDifference| file.difference == Difference::Extra;
                Some(match (differences.iter().filter(is_extra).count(), differences.len()) {
                    (0, _) => EXPORT_AGAIN.to_owned(),
                    (extra, all) if extra == all => "move what does not belong to the bundle elsewhere".to_owned(),
                    _ => format!("move what does not belong to the bundle elsewhere, then {EXPORT_AGAIN}"),
                })
            }
            Self::InvalidGraph { .. } | Self::ForeignOperator { .. } | Self::TooLarge { .. } => {
                Some(EXPORT_AGAIN.to_owned())
            }
            Self::UnfitForGpu(_) => {
                Some("this is a bug of the exporter: please report the checkpoint's config.json".to_owned())
            }
            _ => None,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Fails when there are tensors that nothing asked for.
    pub(crate) fn refuse_tensors(unused: &[&str]) -> Result<()> {
        if unused.is_empty() {
            return Ok(());
        }
        let mut names = unused.iter().take(4).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        if unused.len() > 4 {
            names.push_str(", …");
        }
        Err(Self::UnexpectedTensors { count: unused.len(), names })
    }

    /// What `path`, which has no manifest, is instead.
    pub(crate) fn not_a_bundle(path: &Path) -> Self {
        let make = "`recaption export CHECKPOINT_DIR --out BUNDLE_DIR`";
        let (reason, hint) = match std::fs::metadata(path) {
            Err(_) => ("there is no such folder", format!("check the path, or make one with {make}")),
            Ok(found) if !found.is_dir() => ("it is not a folder", format!("make one with {make}")),
            Ok(_) if path.join("config.json").is_file() => (
                "it has no manifest.json, but a checkpoint's config.json",
                format!("make one of it with `recaption export {} --out BUNDLE_DIR`", path.display()),
            ),
            Ok(_) => ("it has no manifest.json", format!("make one with {make}")),
        };
        Self::NotABundle { path: path.to_owned(), reason, hint }
    }

    pub(crate) fn torch_file(error: TorchFileError) -> Self {
        Self::InvalidTorchFile { reason: error.to_string(), hint: error.hint() }
    }

    pub(crate) fn unsupported(what: &str, found: impl ToString, hint: &str) -> Self {
        Self::Unsupported { what: what.to_owned(), found: found.to_string(), hint: hint.to_owned() }
    }

    /// What only LLaVA-NeXT (LLaVA-1.6) has.
    pub(crate) fn llava_next(what: &str, found: impl std::fmt::Display) -> Self {
        Self::unsupported(
            what,
            format!("{found} (LLaVA-NeXT)"),
            "only LLaVA-1.5 checkpoints export: one view of each image",
        )
    }
}

fn join(differences: &[FileDifference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
