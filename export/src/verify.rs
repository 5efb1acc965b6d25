//! Whether the files of a bundle are those that were exported: each one's SHA-256 against the manifest's. Reads in blocks;
//! memory does not grow with the files.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::bundle_manifest::BundleManifest;
use crate::error::{Error, Result};
use crate::graph::hex;
use crate::manifest::{BundleFile, FILE_NAME, read_fingerprint};

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
pub fn verify(bundle: &Path, manifest: &BundleManifest, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let mut differences = Vec::new();
    let mut note = |path: &str, difference| differences.push(FileDifference { path: path.to_owned(), difference });
    if read_fingerprint(bundle)? != manifest.header().fingerprint {
        note(FILE_NAME, Difference::Contents);
    }
    for file in manifest.files() {
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{ExportOptions, export};

    fn exported() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/checkpoints/published-f16");
        let bundle = folder.path().join("bundle");
        export(&checkpoint, &bundle, &ExportOptions::default()).unwrap();
        (folder, bundle)
    }

    fn differences(bundle: &Path) -> Vec<(String, Difference)> {
        match verify(bundle, &BundleManifest::read(bundle).unwrap(), &mut |_| ()) {
            Ok(()) => Vec::new(),
            Err(Error::DifferentFiles { differences, .. }) => {
                differences.into_iter().map(|file| (file.path, file.difference)).collect()
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn every_file_that_differs_is_named() {
        let (_folder, bundle) = exported();
        let manifest = BundleManifest::read(&bundle).unwrap();
        let mut num_bytes = 0;
        verify(&bundle, &manifest, &mut |bytes| num_bytes += bytes).unwrap();
        assert_eq!(num_bytes, manifest.files().iter().map(|file| file.size).sum::<u64>());

        let data = bundle.join("decoder.onnx.data");
        let mut bytes = std::fs::read(&data).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&data, &bytes).unwrap();
        std::fs::remove_file(bundle.join("projector.onnx")).unwrap();
        std::fs::remove_file(bundle.join("projector.onnx.data")).unwrap();
        std::fs::create_dir(bundle.join("projector.onnx.data")).unwrap();
        std::fs::write(bundle.join("tokenizer.json"), "{}").unwrap();
        std::fs::write(bundle.join("notes.txt"), "mine").unwrap();
        let size = manifest.file("tokenizer.json").unwrap().size;
        let expected = [
            ("tokenizer.json", Difference::Size { expected: size, found: 2 }),
            ("projector.onnx.data", Difference::Missing),
            ("projector.onnx", Difference::Missing),
            ("decoder.onnx.data", Difference::Contents),
            ("notes.txt", Difference::Extra),
        ];
        assert_eq!(differences(&bundle), expected.map(|(name, difference)| (name.to_owned(), difference)));
    }

    #[test]
    fn a_manifest_that_was_edited_is_named_but_for_the_checkpoints_name() {
        let (_folder, bundle) = exported();
        let path = bundle.join(FILE_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        let edit = |from: &str, to: &str| {
            assert!(text.contains(from));
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            differences(&bundle)
        };
        assert_eq!(edit("\"name\": \"published-f16\"", "\"name\": \"other\""), []);
        assert_eq!(
            edit("\"stop_token_ids\": [", "\"stop_token_ids\": [7,"),
            [(FILE_NAME.to_owned(), Difference::Contents)]
        );
    }

    #[test]
    fn a_manifest_names_files_of_the_bundle_only() {
        let (_folder, bundle) = exported();
        let path = bundle.join(FILE_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        let refusal = |from: &str, to: &str| {
            let edited = text.replacen(from, to, 1);
            assert!(edited != text, "no {from}");
            std::fs::write(&path, edited).unwrap();
            BundleManifest::read(&bundle).expect_err(to).to_string()
        };
        for name in ["../decoder.onnx", "/etc/passwd", "a\\\\b", "C:b", "..", "", "manifest.json", "\\u001b[2J"] {
            for key in ["path", "file"] {
                let old = if key == "path" { "tokenizer.json" } else { "decoder.onnx" };
                let message = refusal(&format!("\"{key}\": \"{old}\""), &format!("\"{key}\": \"{name}\""));
                assert!(message.contains("expected the plain name of a file in the bundle"), "{message}");
                assert!(!message.contains('\u{1b}'), "{message:?}");
            }
        }
        let message = refusal("\"file\": \"decoder.onnx\"", "\"file\": \"no.onnx\"");
        assert!(message.contains("`graphs.decoder`: `no.onnx` is not among `files`"), "{message}");
        let message = refusal("\"patch_size\": 7", "\"patch_size\": 0");
        assert!(message.contains("`vision.patch_size`: expected 1 to 16777216, got 0"), "{message}");
        std::fs::write(&path, vec![b' '; (16 << 20) + 1]).unwrap();
        assert!(matches!(BundleManifest::read(&bundle), Err(Error::TooLarge { .. })));
    }
}
