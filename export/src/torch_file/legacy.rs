//! The format from before torch 1.6: pickles of a magic number, a version, the machine's traits, the objects and the
//! storages' keys, one after the other; then for each key an i64 count and the storage's elements.

use std::collections::HashMap;
use std::path::Path;

use super::error::{TorchFileError, shown};
use super::objects::{Pickle, Value};
use super::pickle;
use super::{StorageRanges, TorchTensor, state_dict};

/// 0x1950a86a20f9469cfc6c, as a pickle writes it.
const MAGIC: Value<'static> = Value::LongInt(&[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19]);
const VERSION: Value<'static> = Value::Int(1001);

pub(super) fn read(file: &[u8], path: &Path) -> Result<Vec<TorchTensor>, TorchFileError> {
    let mut rest = file;
    if next(&mut rest, path)?.root != MAGIC {
        let found = "a plain pickle";
        return Err(TorchFileError::NotATorchFile { path: path.to_owned(), found });
    }
    let damaged = |reason: String| TorchFileError::Damaged { path: path.to_owned(), reason };
    if next(&mut rest, path)?.root != VERSION {
        return Err(damaged("expected version 1001 of the legacy format".to_owned()));
    }
    if !is_little_endian(&next(&mut rest, path)?) {
        return Err(TorchFileError::ByteOrder { path: path.to_owned(), found: "big".to_owned() });
    }
    let objects = next(&mut rest, path)?;
    let list = next(&mut rest, path)?;
    let keys = if let Value::List(keys) = list.root { list.sequences[keys].as_slice() } else { &[] };

    let known: HashMap<&str, _> = objects.storages.iter().map(|storage| (storage.key, storage)).collect();
    let mut ranges = StorageRanges::new();
    for key in keys {
        let storage = if let Value::Str(key) = key { known.get(key) } else { None };
        let Some(storage) = storage else { return Err(damaged("it has a storage that no tensor uses".to_owned())) };
        let cut_off = || damaged(format!("it ends within storage `{}`", shown(storage.key)));
        let (count, after) = rest.split_first_chunk().ok_or_else(cut_off)?;
        let count = usize::try_from(i64::from_le_bytes(*count)).ok();
        let num_bytes = count.and_then(|count| count.checked_mul(storage.dtype.bitsize() / 8));
        let Some((_, after_data)) = num_bytes.and_then(|num_bytes| after.split_at_checked(num_bytes)) else {
            return Err(cut_off());
        };
        if ranges.insert(storage.key, file.len() - after.len()..file.len() - after_data.len()).is_some() {
            return Err(damaged(format!("storage `{}` is there twice", shown(storage.key))));
        }
        rest = after_data;
    }
    if !rest.is_empty() {
        return Err(damaged(format!("{} bytes follow the last storage", rest.len())));
    }
    state_dict::tensors(&objects, &ranges, path)
}

/// What the traits of the machine that wrote the file say; no file is without them.
fn is_little_endian(machine: &Pickle<'_>) -> bool {
    let Value::Dict(traits) = machine.root else { return false };
    machine.dicts[traits].contains(&(Value::Str("little_endian"), Value::Bool(true)))
}

/// Reads the pickle at the start of `rest`, and moves past it.
fn next<'a>(rest: &mut &'a [u8], path: &Path) -> Result<Pickle<'a>, TorchFileError> {
    let pickle = pickle::parse(rest, path)?;
    *rest = &rest[pickle.end..];
    Ok(pickle)
}
