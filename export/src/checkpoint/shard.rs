//! A file of weights, mapped: where each tensor lies in it, and which files of a folder hold the weights.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::parse_json;
use crate::error::{Error, Result};
use crate::tensor::StoredTensor;
use crate::torch_file::{self, TorchTensor};

/// A mapped file of weights.
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) map: Mmap,
}

/// A tensor in a [`Shard`].
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range within the file.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Shard {
    /// Maps `path` and reads what tensors it holds; no weight is touched.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Entry>)> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the mapping is read-only; the checkpoint is not expected to change while it is exported, and both
        // readers check the header against the file's length.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let is_torch =
            path.extension().is_some_and(|extension| ["bin", "pt", "pth"].iter().any(|name| extension == *name));
        let mut entries = entries(&map, path, is_torch)?;
        // One order, for the fingerprint.
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok((Self { path: path.to_owned(), map }, entries))
    }
}

impl Entry {
    /// Name, type, shape and place go into a checkpoint's fingerprint.
    pub(crate) fn add_to(&self, fingerprint: &mut Sha256) {
        let Self { name, dtype, shape, start, end } = self;
        fingerprint.update(format!("{name:?} {dtype:?} {shape:?} {start}..{end}\n"));
    }

    /// The tensor itself, in the shard that it was found in.
    pub(crate) fn stored<'a>(&self, shard: &'a Shard) -> Result<StoredTensor<'a>> {
        let Self { name, dtype, shape, start, end } = self.clone();
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::UnsupportedDtype { name, found: format!("{dtype:?}").to_lowercase() });
        }
        Ok(StoredTensor { name, dtype, shape, start, end, shard, update: None })
    }
}

/// What tensors a file of weights holds. `path` only names it in errors.
pub(crate) fn entries(file: &[u8], path: &Path, is_torch: bool) -> Result<Vec<Entry>> {
    if is_torch { torch_entries(file, path) } else { safetensors_entries(file, path) }
}

fn safetensors_entries(file: &[u8], path: &Path) -> Result<Vec<Entry>> {
    let (header_bytes, metadata) = SafeTensors::read_metadata(file)
        .map_err(|reason| Error::InvalidSafetensors { path: path.to_owned(), reason: reason.to_string() })?;
    let data_start = header_bytes + size_of::<u64>();
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| Entry {
        name,
        dtype: info.dtype,
        shape: info.shape.clone(),
        start: data_start + info.data_offsets.0,
        end: data_start + info.data_offsets.1,
    };
    Ok(metadata.tensors().into_iter().map(entry).collect())
}

fn torch_entries(file: &[u8], path: &Path) -> Result<Vec<Entry>> {
    let entry =
        |TorchTensor { name, dtype, shape, range }| Entry { name, dtype, shape, start: range.start, end: range.end };
    Ok(torch_file::read(file, path).map_err(Error::torch_file)?.into_iter().map(entry).collect())
}

/// The files that hold the weights of the model in `folder`, safetensors before torch's own: those that an index names,
/// or the one file. Empty when there are none.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for single in ["model.safetensors", "pytorch_model.bin"] {
        let index = folder.join(format!("{single}.index.json"));
        if index.is_file() {
            return indexed_files(&index, folder);
        }
        let single = folder.join(single);
        if single.is_file() {
            return Ok(vec![single]);
        }
    }
    Ok(vec![])
}

fn indexed_files(index: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let bytes = std::fs::read(index).map_err(Error::io("read", index))?;
    let json = parse_json(index, &bytes)?;
    let invalid = |reason: String| Error::InvalidConfig { path: index.to_owned(), reason };
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| invalid("expected an object `weight_map`".to_owned()))?;
    let mut names = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().unwrap_or_default();
        if name.is_empty() || name.contains(['/', '\\']) {
            return Err(invalid(format!("expected the name of a file in this folder, got {file}")));
        }
        names.insert(name);
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}
