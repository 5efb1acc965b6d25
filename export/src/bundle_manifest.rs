//! A bundle's manifest, whatever the bundle does.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clip::ClipManifest;
use crate::error::{Error, Result};
use crate::graph::{hex, write_hashed};
use crate::manifest::{BundleFile, BundleKind, FILE_NAME, FORMAT_VERSION, GraphFile, Manifest, Saturation, Source};

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
        std::fs::metadata(bundle).map_err(Error::io("open bundle", bundle))?;
        if !path.is_file() {
            return Err(Error::NotABundle { path: bundle.to_owned() });
        }
        let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
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
        match kind {
            BundleKind::Llava => serde_json::from_value(json).map(Self::Llava),
            BundleKind::Clip => serde_json::from_value(json).map(Self::Clip),
        }
        .map_err(unreadable)
    }

    /// What the bundle does.
    #[must_use]
    pub fn kind(&self) -> BundleKind {
        match self {
            Self::Llava(manifest) => manifest.kind,
            Self::Clip(manifest) => manifest.kind,
        }
    }

    /// The graphs, in the order they run.
    #[must_use]
    pub fn graphs(&self) -> Vec<&GraphFile> {
        match self {
            Self::Llava(manifest) => {
                vec![&manifest.graphs.vision_tower, &manifest.graphs.projector, &manifest.graphs.decoder]
            }
            Self::Clip(manifest) => vec![&manifest.graphs.image_tower, &manifest.graphs.text_tower],
        }
    }

    /// Every file of the bundle but the manifest.
    #[must_use]
    pub fn files(&self) -> &[BundleFile] {
        match self {
            Self::Llava(manifest) => &manifest.files,
            Self::Clip(manifest) => &manifest.files,
        }
    }

    /// Weights outside of fp16's range, where the bundle has fp16 weights.
    #[must_use]
    pub fn saturated_weights(&self) -> &[Saturation] {
        match self {
            Self::Llava(manifest) => &manifest.saturated_weights,
            Self::Clip(manifest) => &manifest.saturated_weights,
        }
    }

    /// SHA-256 that tells this bundle from others: see [`Manifest::fingerprint`].
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        match self {
            Self::Llava(manifest) => &manifest.fingerprint,
            Self::Clip(manifest) => &manifest.fingerprint,
        }
    }

    fn source_and_fingerprint(&mut self) -> (&mut Source, &mut String) {
        match self {
            Self::Llava(manifest) => (&mut manifest.source, &mut manifest.fingerprint),
            Self::Clip(manifest) => (&mut manifest.source, &mut manifest.fingerprint),
        }
    }

    /// Writes `manifest.json` into `folder`, with the fingerprint filled in: over everything that decides what the bundle
    /// gives, the files by their hashes and the settings beside them; not the checkpoint's name.
    pub(crate) fn write(mut self, folder: &Path) -> Result<Self> {
        let mut identity = self.clone();
        identity.source_and_fingerprint().0.name.clear();
        let identity = serde_json::to_vec(&identity).expect("bug: the manifest serialises");
        *self.source_and_fingerprint().1 = hex(&Sha256::digest(identity));
        let json = serde_json::to_vec_pretty(&self).expect("bug: the manifest serialises");
        write_hashed(folder, FILE_NAME, &json)?;
        Ok(self)
    }
}
