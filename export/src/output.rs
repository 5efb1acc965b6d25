//! Where a bundle goes: written under a temporary name beside its place, renamed when it is whole.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crate::bundle_manifest::BundleManifest;
use crate::error::{Error, Result};
use crate::graph::{GraphBuilder, write_hashed};
use crate::manifest::{self, BundleFile, BundleHeader, GraphFile, Saturation};

/// Name of the bundle within the staging folder.
const BUNDLE: &str = "bundle";

/// Whether a folder may be made, or written to, at `path`. Leaves nothing behind.
///
/// # Errors
/// [`Error::UnusableFolder`] with the reason.
pub fn check_folder(path: &Path) -> Result<()> {
    // A path's last ancestor, the empty one, is where the program runs.
    let here = |part| if part == Path::new("") { Path::new(".") } else { part };
    let mut parts = path.ancestors().map(here);
    let place = parts.find(|part| part.symlink_metadata().is_ok()).unwrap_or(Path::new("."));
    let refuse = |reason| Err(Error::UnusableFolder { path: path.to_owned(), reason });
    if !place.is_dir() {
        return refuse(match place == path {
            true => "it is not a folder".to_owned(),
            false => format!("`{}` is not a folder", place.display()),
        });
    }
    let trial = place.join(format!(".recaption-trial-{}", std::process::id()));
    // Another machine's process of this number may be trying the same; and of a full disk those tell more who write to it.
    let passed = [ErrorKind::AlreadyExists, ErrorKind::StorageFull, ErrorKind::QuotaExceeded];
    match std::fs::create_dir(&trial) {
        Err(error) if !passed.contains(&error.kind()) => {
            refuse(format!("nothing can be made in `{}` ({error})", place.display()))
        }
        _ => {
            let _ = std::fs::remove_dir(&trial);
            Ok(())
        }
    }
}

/// Where the bundle goes: written beside its final place, then renamed.
pub(crate) struct OutputFolder {
    folder: PathBuf,
    /// A bundle or an empty folder stands there, which makes way.
    replaces: bool,
}

impl OutputFolder {
    pub(crate) fn check(folder: &Path, overwrite: bool) -> Result<Self> {
        let refuse = |hint| Err(Error::OutputExists { path: folder.to_owned(), hint });
        if folder.file_name().is_none() {
            return refuse("it cannot be replaced; name a folder inside of it");
        }
        if folder.symlink_metadata().is_err() {
            check_folder(folder)?;
            return Ok(Self { folder: folder.to_owned(), replaces: false });
        }
        let Ok(entries) = std::fs::read_dir(folder) else {
            return refuse("it is not a folder; choose a name that does not exist");
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        let names = names.collect::<std::io::Result<Vec<_>>>().map_err(Error::io("read", folder))?;
        if is_mount_point(folder) {
            return refuse("it is a mount point, which cannot be replaced; name a folder inside of it");
        }
        // Only what export has written is ever deleted: the manifest and the files that it names.
        let is_bundle = BundleManifest::read(folder).is_ok_and(|manifest| {
            let files = manifest.files().iter().map(|file| file.path.as_str());
            names.iter().all(|name| name == manifest::FILE_NAME || files.clone().any(|file| file == name))
        });
        match (names.is_empty(), is_bundle, overwrite) {
            (true, ..) | (_, true, true) => Ok(Self { folder: folder.to_owned(), replaces: true }),
            (_, true, false) => refuse("it holds a bundle; replace it with --overwrite"),
            (_, false, _) => refuse("it holds other files; choose a folder that does not exist"),
        }
    }

    fn parent(&self) -> &Path {
        self.folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Starts a bundle in a temporary folder beside the final one, which is removed again unless finished.
    pub(crate) fn stage(self) -> Result<StagedBundle> {
        let parent = self.parent();
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let staging = tempfile::Builder::new()
            .prefix(".recaption-export-")
            .tempdir_in(parent)
            .map_err(Error::io("create a folder in", parent))?;
        let bundle = staging.path().join(BUNDLE);
        std::fs::create_dir(&bundle).map_err(Error::io("create", &bundle))?;
        Ok(StagedBundle { output: self, staging, folder: bundle, files: vec![], saturated_weights: vec![] })
    }

    /// Puts the staged bundle into its place. The old one is moved aside first and deleted last, so that at every moment
    /// one of the two is whole.
    fn commit(self, staging: tempfile::TempDir) -> Result<()> {
        let bundle = staging.path().join(BUNDLE);
        make_readable(&bundle)?;
        let old = staging.path().join("old");
        if self.replaces {
            std::fs::rename(&self.folder, &old).map_err(Error::io("move aside", &self.folder))?;
        }
        if let Err(error) = std::fs::rename(&bundle, &self.folder) {
            if self.replaces {
                std::fs::rename(&old, &self.folder).map_err(Error::io("move back", &self.folder))?;
            }
            return Err(Error::io("rename to", &self.folder)(error));
        }
        staging.close().map_err(Error::io("delete what was replaced at", &self.folder))
    }
}

/// A bundle while it is written.
pub(crate) struct StagedBundle {
    output: OutputFolder,
    staging: tempfile::TempDir,
    folder: PathBuf,
    files: Vec<BundleFile>,
    saturated_weights: Vec<Saturation>,
}

impl StagedBundle {
    /// Writes a file that is no graph.
    pub(crate) fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.files.push(write_hashed(&self.folder, name, bytes)?);
        Ok(())
    }

    /// Writes a graph with its weights.
    pub(crate) fn write_graph(&mut self, graph: GraphBuilder<'_>, cancel: &AtomicBool) -> Result<GraphFile> {
        let written = graph.write(&self.folder, cancel)?;
        self.files.extend(written.files);
        self.saturated_weights.extend(written.saturated);
        Ok(written.graph)
    }

    /// Adds what was written to `header`, writes the manifest that `make` makes of it, and puts the bundle into its place.
    pub(crate) fn finish(
        self,
        header: BundleHeader,
        make: impl FnOnce(BundleHeader) -> BundleManifest,
    ) -> Result<BundleManifest> {
        let Self { output, staging, folder, files, saturated_weights } = self;
        let manifest = make(BundleHeader { files, saturated_weights, ..header }).write(&folder)?;
        output.commit(staging)?;
        Ok(manifest)
    }
}

/// Whether another file system is mounted at `folder`.
fn is_mount_point(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
        device(folder) != device(&folder.join(".."))
    }
    #[cfg(not(unix))]
    false
}

/// Temporary folders are private to the user; a bundle is an ordinary folder.
fn make_readable(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let permissions = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder, permissions).map_err(Error::io("set the permissions of", folder))?;
    }
    Ok(())
}
