//! A bundle's manifest, whatever the bundle does.

use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clip::ClipManifest;
use crate::error::{Error, Result};
use crate::graph::{hex, write_hashed};
use crate::manifest::{
    BundleFile, BundleHeader, BundleKind, FILE_NAME, FORMAT_VERSION, GraphFile, MAX_BYTES, Manifest, read_at_most,
};

/// The manifest of a bundle of either kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum BundleManifest {
    /// A captioner's.
    Llava(Box<Manifest>),
    /// That of a CLIP.
    Clip(Box<ClipManifest>),
}

impl BundleManifest {
    /// Reads `BUNDLE/manifest.json`.
    ///
    /// # Errors
    /// When it is not there, does not parse, or is of another format version.
    pub fn read(bundle: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Kind {
            kind: BundleKind,
        }
        let path = bundle.join(FILE_NAME);
        match std::fs::metadata(&path) {
            Ok(found) if found.is_file() => {}
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(Error::io("open", &path)(error)),
            _ => return Err(Error::not_a_bundle(bundle)),
        }
        let text = read_at_most(&path, MAX_BYTES)?;
        let invalid = |reason: String| Error::InvalidConfig { path: path.clone(), reason };
        let unreadable = |reason: serde_json::Error| invalid(reason.to_string());
        let json: serde_json::Value = serde_json::from_slice(&text).map_err(unreadable)?;
        let version = json.get("format_version").and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(FORMAT_VERSION)) {
            let found = version.map_or("none".to_owned(), |version| version.to_string());
            return Err(invalid(format!(
                "expected format_version {FORMAT_VERSION}, got {found}; export the checkpoint again"
            )));
        }
        let Kind { kind } = Kind::deserialize(&json).map_err(unreadable)?;
        let manifest = match kind {
            BundleKind::Llava => serde_json::from_value(json).map(Self::Llava),
            BundleKind::Clip => serde_json::from_value(json).map(Self::Clip),
        };
        let manifest = manifest.map_err(unreadable)?;
        if let Self::Llava(manifest) = &manifest {
            manifest.check_dims().map_err(invalid)?;
        }
        manifest.check_file_names().map_err(invalid)?;
        Ok(manifest)
    }

    /// What every bundle has.
    #[must_use]
    pub fn header(&self) -> &BundleHeader {
        match self {
            Self::Llava(manifest) => &manifest.header,
            Self::Clip(manifest) => &manifest.header,
        }
    }

    fn header_mut(&mut self) -> &mut BundleHeader {
        match self {
            Self::Llava(manifest) => &mut manifest.header,
            Self::Clip(manifest) => &mut manifest.header,
        }
    }

    /// The graphs with their names, in the order they run.
    #[must_use]
    pub fn named_graphs(&self) -> Vec<(&'static str, &GraphFile)> {
        match self {
            Self::Llava(manifest) => manifest.named_graphs(),
            Self::Clip(manifest) => {
                vec![("image_tower", &manifest.graphs.image_tower), ("text_tower", &manifest.graphs.text_tower)]
            }
        }
    }

    /// The entry of the file `name`.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&BundleFile> {
        self.files().iter().find(|file| file.path == name)
    }

    /// Whoever reads a manifest opens the files that it names: they are the bundle's own.
    fn check_file_names(&self) -> Result<(), String> {
        let graphs = self.named_graphs();
        let names = self.files().iter().map(|file| &file.path).chain(graphs.iter().map(|(_, graph)| &graph.file));
        for name in names {
            let is_plain = !name.contains(['/', '\\', ':']) && !name.chars().any(char::is_control);
            if !is_plain || ["", ".", "..", FILE_NAME].contains(&name.as_str()) {
                return Err(format!("file name {name:?}: expected the plain name of a file in the bundle"));
            }
        }
        match graphs.iter().find(|(_, graph)| self.file(&graph.file).is_none()) {
            Some((name, graph)) => Err(format!("`graphs.{name}`: `{}` is not among `files`", graph.file)),
            None => Ok(()),
        }
    }

    /// Every file of the bundle but the manifest.
    #[must_use]
    pub fn files(&self) -> &[BundleFile] {
        &self.header().files
    }

    /// Writes `manifest.json` into `folder`, with the fingerprint filled in: over everything that decides what the bundle
    /// gives, the files by their hashes and the settings beside them; not the checkpoint's name.
    pub(crate) fn write(mut self, folder: &Path) -> Result<Self> {
        let mut identity = self.clone();
        identity.header_mut().source.name.clear();
        let identity = serde_json::to_vec(&identity).expect("bug: the manifest serialises");
        self.header_mut().fingerprint = hex(&Sha256::digest(identity));
        let json = serde_json::to_vec_pretty(&self).expect("bug: the manifest serialises");
        write_hashed(folder, FILE_NAME, &json)?;
        Ok(self)
    }
}
