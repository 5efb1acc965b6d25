//! Why a torch file is refused. Names that come from the file are shortened and freed of control characters before
//! they reach a message.

use std::path::PathBuf;

/// Characters of a name from the file that a message shows at most.
const MAX_SHOWN_CHARS: usize = 120;

/// Why a torch file was refused. `Display` is one line; [`TorchFileError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TorchFileError {
    /// The bytes are neither a torch zip nor a legacy torch file.
    #[error("`{path}`: expected a file that `torch.save` wrote, got {found}")]
    NotATorchFile { path: PathBuf, found: &'static str },
    /// The structure contradicts itself or ends early.
    #[error("`{path}` is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    /// The pickle is longer than any state dict's.
    #[error("`{path}`: expected a pickle of at most {max} bytes, got a longer one")]
    PickleTooLong { path: PathBuf, max: usize },
    /// A zip entry is compressed, so its bytes cannot be used in place.
    #[error("`{path}`: entry `{entry}`: expected to be stored uncompressed, got zip method {method}")]
    CompressedEntry { path: PathBuf, entry: String, method: u16 },
    /// The archive holds a program next to its tensors.
    #[error("`{path}`: expected a state dict, got a TorchScript archive (it has `{entry}`)")]
    TorchScript { path: PathBuf, entry: String },
    /// The tensors were written on a big-endian machine.
    #[error("`{path}`: expected byte order `little`, got `{found}`")]
    ByteOrder { path: PathBuf, found: String },
    /// The pickle names a class or function that no state dict of plain tensors needs.
    #[error("`{path}`: expected only tensors, got the Python object `{global}`")]
    ForbiddenGlobal { path: PathBuf, global: String },
    /// The pickle holds an instruction that no state dict of plain tensors needs.
    #[error("`{path}`: expected only tensors, got pickle opcode {name} (0x{opcode:02x}) at byte {at} of the pickle")]
    ForbiddenOpcode { path: PathBuf, opcode: u8, name: &'static str, at: usize },
    /// No dict of tensors is where one is looked for.
    #[error("`{path}`: expected a dict of tensors, got {found}")]
    NoTensors { path: PathBuf, found: String },
    /// More than one dict could be the state dict.
    #[error("`{path}`: expected one dict of tensors, got several: {found}")]
    SeveralStateDicts { path: PathBuf, found: String },
    /// A name stands twice in the state dict.
    #[error("`{path}`: tensor `{tensor}` is there twice")]
    DuplicateTensor { path: PathBuf, tensor: String },
    /// The bytes that a tensor points to are not in the file.
    #[error("`{path}`: tensor `{tensor}`: the file has no storage `{storage}`")]
    MissingStorage { path: PathBuf, tensor: String, storage: String },
    /// A storage has another length than the pickle says.
    #[error("`{path}`: tensor `{tensor}`: expected storage `{storage}` of {expected} elements, got {found}")]
    StorageLength { path: PathBuf, tensor: String, storage: String, expected: usize, found: usize },
    /// A tensor reaches beyond its storage.
    #[error(
        "`{path}`: tensor `{tensor}`: shape {shape:?} from element {offset} exceeds its storage of {found} elements"
    )]
    OutOfStorage { path: PathBuf, tensor: String, shape: Vec<usize>, offset: usize, found: usize },
    /// The shape or the strides are not such as torch writes.
    #[error("`{path}`: tensor `{tensor}`: {reason}")]
    InvalidTensor { path: PathBuf, tensor: String, reason: String },
    /// The values are to be computed from the stored ones.
    #[error("`{path}`: tensor `{tensor}`: expected stored values, got a view that negates or conjugates them")]
    LazyTensor { path: PathBuf, tensor: String },
    /// The elements do not lie in row-major order.
    #[error("`{path}`: tensor `{tensor}` of shape {shape:?}: expected contiguous strides {expected:?}, got {found:?}")]
    NotContiguous { path: PathBuf, tensor: String, shape: Vec<usize>, expected: Vec<usize>, found: Vec<usize> },
}

impl TorchFileError {
    /// What the user can do about it.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::NotATorchFile { .. } => "give a pytorch_model.bin or .pt file, or convert the model to safetensors",
            Self::Damaged { .. } | Self::MissingStorage { .. } | Self::StorageLength { .. } => {
                "the download may have been cut off; fetch the file again and compare its size"
            }
            Self::CompressedEntry { .. } => {
                "the zip was packed anew; load it in Python and save it again with `torch.save(state_dict, path)`"
            }
            Self::TorchScript { .. } => {
                "save its weights alone: `torch.save(torch.jit.load(path).state_dict(), new_path)`"
            }
            Self::ByteOrder { .. } => "load it in Python on a little-endian machine and save it again",
            Self::LazyTensor { .. } => "save it again with `tensor.resolve_neg().resolve_conj()` for each tensor",
            Self::NotContiguous { .. } => {
                "save it again with `{name: tensor.contiguous() for name, tensor in state_dict.items()}`"
            }
            Self::NoTensors { .. } | Self::SeveralStateDicts { .. } => {
                "save the state dict alone: `torch.save(model.state_dict(), path)`"
            }
            Self::ForbiddenGlobal { .. } | Self::ForbiddenOpcode { .. } | Self::PickleTooLong { .. } => {
                "nothing in it was run; if you trust the file, load it in Python and save `model.state_dict()` alone"
            }
            Self::DuplicateTensor { .. } | Self::OutOfStorage { .. } | Self::InvalidTensor { .. } => {
                "torch does not write such a file; do not load it unless you trust where it came from"
            }
        }
    }
}

/// `name` as a message may show it.
pub(super) fn shown(name: &str) -> String {
    let mut shown: String = name
        .chars()
        .take(MAX_SHOWN_CHARS)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if name.chars().nth(MAX_SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}
