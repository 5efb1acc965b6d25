//! Reads the files that `torch.save` writes: `pytorch_model.bin`, `*.pt`, zip or legacy (before torch 1.6).
//!
//! Takes the bytes of a mapped file; gives each tensor's name, type, shape and place in the file. No weight is touched
//! or copied. The pickle within is never executed: its reader knows plain tensors and refuses all else by name. A
//! hostile file costs memory in proportion to its pickle and zip directory, never to a number that it claims. Damage
//! within the weights goes unseen, since nothing here checks sums.

mod error;
mod legacy;
mod objects;
mod pickle;
mod pickle_bytes;
mod state_dict;
#[cfg(test)]
mod tests;
mod zip;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;

pub(crate) use error::TorchFileError;

/// Where the bytes of each storage lie in the file, by the key that the pickle calls it.
type StorageRanges<'a> = BTreeMap<&'a str, Range<usize>>;

/// A tensor and where it lies. Two tensors may share bytes, and none need be aligned to its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TorchTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range within the file: row-major, little-endian.
    pub(crate) range: Range<usize>,
}

/// Lists the tensors of the state dict in `file`, in its order. `path` only names the file in errors.
pub(crate) fn read(file: &[u8], path: &Path) -> Result<Vec<TorchTensor>, TorchFileError> {
    if file.starts_with(b"PK") {
        return read_zip(file, path);
    }
    if file.first() == Some(&pickle::PROTO) {
        return legacy::read(file, path);
    }
    let found = if file.is_empty() { "an empty file" } else { "neither a zip nor a pickle" };
    Err(TorchFileError::NotATorchFile { path: path.to_owned(), found })
}

fn read_zip(file: &[u8], path: &Path) -> Result<Vec<TorchTensor>, TorchFileError> {
    let entries = zip::entries(file, path)?;
    let is_program = |entry: &str| {
        entry.split_once('/').is_some_and(|(_, record)| record == "constants.pkl" || record.starts_with("code/"))
    };
    if let Some(entry) = entries.keys().find(|entry| is_program(entry)) {
        return Err(TorchFileError::TorchScript { path: path.to_owned(), entry: error::shown(entry) });
    }
    if let Some((entry, stored)) = entries.iter().find(|(_, stored)| stored.method != 0) {
        let (entry, method) = (error::shown(entry), stored.method);
        return Err(TorchFileError::CompressedEntry { path: path.to_owned(), entry, method });
    }
    let mut folders =
        entries.keys().filter_map(|entry| entry.strip_suffix("/data.pkl")).filter(|folder| !folder.contains('/'));
    let (Some(folder), None) = (folders.next(), folders.next()) else {
        let found = "a zip without exactly one data.pkl";
        return Err(TorchFileError::NotATorchFile { path: path.to_owned(), found });
    };
    let record = |name: &str| file.get(entries.get(format!("{folder}/{name}").as_str())?.range.clone());
    // Archives from before torch 2.1 have no such record; all but those of s390x machines are little-endian.
    if let Some(order) = record("byteorder").filter(|order| *order != b"little") {
        let found = error::shown(&String::from_utf8_lossy(&order[..order.len().min(16)]));
        return Err(TorchFileError::ByteOrder { path: path.to_owned(), found });
    }
    let bytes = record("data.pkl").unwrap_or_default();
    let pickle = pickle::parse(bytes, path)?;
    if pickle.end != bytes.len() {
        let reason = format!("data.pkl goes on for {} bytes after its end", bytes.len() - pickle.end);
        return Err(TorchFileError::Damaged { path: path.to_owned(), reason });
    }
    let storages = entries
        .iter()
        .filter_map(|(entry, stored)| {
            let key = entry.strip_prefix(folder)?.strip_prefix("/data/")?;
            Some((key, stored.range.clone()))
        })
        .collect();
    state_dict::tensors(&pickle, &storages, path)
}
