//! A bundle on disk: its manifest, and the paths of the files it names.

use std::path::{Path, PathBuf};

use recaption_export::{BundleFile, GraphFile, Manifest};

use crate::error::{Error, Result};

/// An exported model.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The folder.
    pub folder: PathBuf,
    /// What is in it.
    pub manifest: Manifest,
}

impl Bundle {
    /// Reads the manifest and checks that every file is there in full size.
    ///
    /// # Errors
    /// [`Error::Bundle`] without a readable manifest, [`Error::Setting`] when a file is missing or cut off.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest = Manifest::read(folder)?;
        check_files(folder, &manifest.header.files)?;
        Ok(Self { folder: folder.to_owned(), manifest })
    }

    /// Path of a graph's `.onnx` file.
    #[must_use]
    pub fn graph_path(&self, graph: &GraphFile) -> PathBuf {
        self.folder.join(&graph.file)
    }

    /// Path of `tokenizer.json`.
    #[must_use]
    pub fn tokenizer_path(&self) -> PathBuf {
        self.folder.join("tokenizer.json")
    }
}

/// # Errors
/// [`Error::Setting`] when one of `files` is not in `folder`, or cut off.
pub(crate) fn check_files(folder: &Path, files: &[BundleFile]) -> Result<()> {
    for file in files {
        let path = folder.join(&file.path);
        let size = std::fs::metadata(&path).map(|metadata| metadata.len()).ok();
        if size != Some(file.size) {
            let found = size.map_or("nothing".to_owned(), |size| format!("{size} bytes"));
            return Err(Error::Setting {
                reason: format!("bundle file `{}`: expected {} bytes, got {found}", path.display(), file.size),
                hint: "export the checkpoint again with --overwrite".to_owned(),
            });
        }
    }
    Ok(())
}
