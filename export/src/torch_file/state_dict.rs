//! Finds the state dict in what a pickle describes, and checks each of its tensors against the storages in the file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::error::{TorchFileError, shown};
use super::objects::{Pickle, Tensor, Value};
use super::{StorageRanges, TorchTensor};

/// Keys under which training scripts put the state dict.
const WRAPPER_KEYS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// Wrappers within wrappers, at most.
const MAX_WRAPPERS: usize = 4;

/// Dimensions of a tensor, at most: a shape can be shared, so this is what bounds its copies.
const MAX_RANK: usize = 8;

/// The tensors of the state dict, in its order.
pub(super) fn tensors(
    pickle: &Pickle<'_>,
    storages: &StorageRanges<'_>,
    path: &Path,
) -> Result<Vec<TorchTensor>, TorchFileError> {
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    for (key, value) in &pickle.dicts[state_dict(pickle, path)?] {
        // Of two, Python would keep the last; torch never writes two.
        let name = if let Value::Str(name) = *key { Some(name) } else { None };
        if let Some(name) = name.filter(|name| !names.insert(*name)) {
            return Err(TorchFileError::DuplicateTensor { path: path.to_owned(), tensor: shown(name) });
        }
        let Value::Tensor(tensor) = *value else { continue };
        let Some(name) = name else {
            let found = "a tensor under a key that is not a string".to_owned();
            return Err(TorchFileError::NoTensors { path: path.to_owned(), found });
        };
        tensors.push(View { name, path, pickle, storages, tensor: &pickle.tensors[tensor] }.locate()?);
    }
    Ok(tensors)
}

/// Index of the one dict of tensors: the outermost, or the one under a wrapper's key.
fn state_dict(pickle: &Pickle<'_>, path: &Path) -> Result<usize, TorchFileError> {
    let is_tensor = |value: &Value| matches!(value, Value::Tensor(_));
    let has_tensors: Vec<bool> =
        pickle.dicts.iter().map(|dict| dict.iter().any(|(_, value)| is_tensor(value))).collect();
    let mut root = pickle.root;
    for _ in 0..=MAX_WRAPPERS {
        let Value::Dict(dict) = root else { break };
        let inner = |value: &Value| matches!(value, Value::Dict(inner) if has_tensors[*inner]);
        let entries = &pickle.dicts[dict];
        if has_tensors[dict] {
            // Tensors in a dict beside plain ones would be lost without a word.
            if let Some((key, _)) = entries.iter().find(|(_, value)| inner(value)) {
                let key = if let Value::Str(key) = key { shown(key) } else { "another key".to_owned() };
                let found = format!("the outer one, and that under `{key}`");
                return Err(TorchFileError::SeveralStateDicts { path: path.to_owned(), found });
            }
            return Ok(dict);
        }
        let wrapped: BTreeMap<&str, Value<'_>> = entries
            .iter()
            .filter_map(|(key, value)| match (key, value) {
                (Value::Str(key), Value::Dict(_)) if WRAPPER_KEYS.contains(key) => Some((*key, *value)),
                _ => None,
            })
            .collect();
        let with_tensors: Vec<&str> = wrapped.iter().filter(|(_, value)| inner(value)).map(|(key, _)| *key).collect();
        root = match (with_tensors.as_slice(), wrapped.len()) {
            ([key], _) => wrapped[key],
            ([], 1) => *wrapped.values().next().unwrap_or(&Value::None),
            ([], _) => break,
            (keys, _) => {
                let found = keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
                return Err(TorchFileError::SeveralStateDicts { path: path.to_owned(), found });
            }
        };
    }
    let found = match pickle.root {
        Value::Tensor(_) => "a single tensor".to_owned(),
        Value::Dict(dict) => {
            let keys = pickle.dicts[dict].iter().filter_map(|(key, _)| match key {
                Value::Str(key) => Some(format!("`{key}`")),
                _ => None,
            });
            let keys = keys.take(4).collect::<Vec<_>>().join(", ");
            if keys.is_empty() { "a dict without names".to_owned() } else { format!("a dict of {}", shown(&keys)) }
        }
        _ => "something else".to_owned(),
    };
    Err(TorchFileError::NoTensors { path: path.to_owned(), found })
}

/// A named tensor, still to be checked.
struct View<'a> {
    name: &'a str,
    path: &'a Path,
    pickle: &'a Pickle<'a>,
    storages: &'a StorageRanges<'a>,
    tensor: &'a Tensor,
}

impl View<'_> {
    fn locate(&self) -> Result<TorchTensor, TorchFileError> {
        let (path, tensor) = (|| self.path.to_owned(), || shown(self.name));
        let storage = self.pickle.storages[self.tensor.storage];
        let Some(stored) = self.storages.get(storage.key) else {
            let storage = shown(storage.key);
            return Err(TorchFileError::MissingStorage { path: path(), tensor: tensor(), storage });
        };
        let element_bytes = storage.dtype.bitsize() / 8;
        let (expected, found) = (storage.num_elements, stored.len() / element_bytes);
        if expected != found {
            let storage = shown(storage.key);
            return Err(TorchFileError::StorageLength { path: path(), tensor: tensor(), storage, expected, found });
        }

        let shape = self.sizes(self.tensor.shape)?;
        let strides = self.sizes(self.tensor.strides)?;
        if strides.len() != shape.len() {
            return Err(self.invalid(format!("expected {} strides, got {}", shape.len(), strides.len())));
        }
        if self.tensor.is_lazy {
            return Err(TorchFileError::LazyTensor { path: path(), tensor: tensor() });
        }
        let offset = self.tensor.offset;
        let num_elements = if shape.contains(&0) {
            Some(0)
        } else {
            shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size))
        };
        let expected = contiguous_strides(&shape);
        // The stride of an axis of one element is never used, and torch leaves anything there.
        let is_contiguous =
            num_elements == Some(0) || (0..shape.len()).all(|axis| shape[axis] == 1 || strides[axis] == expected[axis]);
        if !is_contiguous {
            let (path, tensor) = (path(), tensor());
            return Err(TorchFileError::NotContiguous { path, tensor, shape, expected, found: strides });
        }
        let Some(end) = num_elements.and_then(|count| offset.checked_add(count)).filter(|end| *end <= found) else {
            return Err(TorchFileError::OutOfStorage { path: path(), tensor: tensor(), shape, offset, found });
        };
        // Both ends are within the storage, hence within the file: no overflow.
        let range = stored.start + offset * element_bytes..stored.start + end * element_bytes;
        Ok(TorchTensor { name: self.name.to_owned(), dtype: storage.dtype, shape, range })
    }

    fn sizes(&self, sequence: usize) -> Result<Vec<usize>, TorchFileError> {
        let values = &self.pickle.sequences[sequence];
        if values.len() > MAX_RANK {
            return Err(self.invalid(format!("expected at most {MAX_RANK} dimensions, got {}", values.len())));
        }
        let size = |value: &Value| match value {
            Value::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        let sizes: Option<_> = values.iter().map(size).collect();
        sizes.ok_or_else(|| self.invalid("expected sizes and strides that are integers from 0".to_owned()))
    }

    fn invalid(&self, reason: String) -> TorchFileError {
        TorchFileError::InvalidTensor { path: self.path.to_owned(), tensor: shown(self.name), reason }
    }
}

/// Strides in elements of a row-major tensor; they saturate only where its number of elements overflows.
fn contiguous_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1_usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1));
    }
    strides
}
