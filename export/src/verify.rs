//! Whether the files of a bundle are those that were exported: each one's SHA-256 against the manifest's. Reads in blocks;
//! memory does not grow with the files.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::graph::hex;
use crate::manifest::{BundleFile, FILE_NAME, Manifest, read_fingerprint};

const BLOCK_BYTES: usize = 1 << 20;

/// A file of a bundle that is not as it was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDifference {
    /// Its name.
    pub path: String,
    /// What is wrong with it.
    pub difference: Difference,
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It is not there, or it is no file.
    Missing,
    /// It has another length.
    Size {
        /// Bytes that were exported.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// It has the length but not the contents.
    Contents,
    /// The manifest does not name it.
    Extra,
}

impl fmt::Display for FileDifference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "`{}` ", self.path.escape_debug())?;
        match &self.difference {
            Difference::Missing => write!(formatter, "is missing"),
            Difference::Size { expected, found } => write!(formatter, "has {found} bytes of {expected}"),
            Difference::Contents => write!(formatter, "has other contents"),
            Difference::Extra => write!(formatter, "is extra"),
        }
    }
}

/// Compares all files of the bundle with its manifest, and the manifest with its own fingerprint. `progress` is told how many
/// bytes were read, block by block.
///
/// # Errors
/// [`Error::DifferentFiles`] naming every file that differs, is missing or is extra; or the disk's.
pub fn verify(bundle: &Path, manifest: &Manifest, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let mut differences = Vec::new();
    let mut note = |path: &str, difference| differences.push(FileDifference { path: path.to_owned(), difference });
    if read_fingerprint(bundle)? != manifest.fingerprint {
        note(FILE_NAME, Difference::Contents);
    }
    for file in &manifest.files {
        if let Some(difference) = difference(bundle, file, progress)? {
            note(&file.path, difference);
        }
    }
    let entries = std::fs::read_dir(bundle).map_err(Error::io("read", bundle))?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<std::io::Result<Vec<String>>>().map_err(Error::io("read", bundle))?;
    names.retain(|name| name != FILE_NAME && manifest.file(name).is_none());
    names.sort();
    names.iter().for_each(|name| note(name, Difference::Extra));
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Error::DifferentFiles { path: bundle.to_owned(), differences }),
    }
}

fn difference(bundle: &Path, file: &BundleFile, progress: &mut dyn FnMut(u64)) -> Result<Option<Difference>> {
    let path = bundle.join(&file.path);
    let size = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        Ok(_) => return Ok(Some(Difference::Missing)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Some(Difference::Missing)),
        Err(error) => return Err(Error::io("open", &path)(error)),
    };
    if size != file.size {
        return Ok(Some(Difference::Size { expected: file.size, found: size }));
    }
    let mut reader = File::open(&path).map_err(Error::io("open", &path))?;
    let (mut hash, mut block) = (Sha256::new(), vec![0; BLOCK_BYTES]);
    loop {
        let length = match reader.read(&mut block) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        hash.update(&block[..length]);
        progress(length as u64);
    }
    let is_same = hex(&hash.finalize()).eq_ignore_ascii_case(&file.sha256);
    Ok((!is_same).then_some(Difference::Contents))
}
