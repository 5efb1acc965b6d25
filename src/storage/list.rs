//! Listings: of everything below a prefix, page by page in the store's order (lexicographic by key), and of the names in
//! one folder.

use std::collections::BTreeSet;

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::ObjectMeta;

use crate::error::{Error, Result};
use crate::storage::client::wait;
use crate::storage::{Location, Object};

/// An object below a prefix.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The object.
    pub location: Location,
    /// Its key below the prefix.
    pub key: String,
    /// Length in bytes.
    pub size: u64,
}

/// The objects below a prefix; a page of at most a thousand is in memory at a time.
pub struct Listing {
    prefix: Object,
    stream: BoxStream<'static, Result<ObjectMeta, object_store::Error>>,
}

impl Object {
    /// Everything below this prefix.
    ///
    /// # Errors
    /// When no client can be made from the settings.
    pub fn list(&self) -> Result<Listing> {
        let prefix = (!self.path.as_ref().is_empty()).then_some(&self.path);
        Ok(Listing { prefix: self.clone(), stream: self.store()?.list(prefix) })
    }
}

impl Iterator for Listing {
    type Item = Result<Listed>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = wait(self.stream.next())?;
        Some(found.map_err(|error| self.prefix.error("list", &error)).map(|meta| {
            let below =
                meta.location.as_ref().strip_prefix(self.prefix.path.as_ref()).unwrap_or(meta.location.as_ref());
            Listed {
                key: below.trim_start_matches('/').to_owned(),
                size: meta.size,
                location: Location::Object(Object { path: meta.location, ..self.prefix.clone() }),
            }
        }))
    }
}

impl Location {
    /// Names of the files or objects directly in this folder or prefix, sorted. Nothing there is an empty list.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn names(&self) -> Result<Vec<String>> {
        match self {
            Self::Local(path) => {
                let entries = match std::fs::read_dir(path) {
                    Ok(entries) => entries,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                    Err(error) => return Err(Error::io("list", path)(error)),
                };
                let mut names = BTreeSet::new();
                for entry in entries {
                    let entry = entry.map_err(Error::io("list", path))?;
                    if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        names.insert(entry.file_name().to_string_lossy().into_owned());
                    }
                }
                Ok(names.into_iter().collect())
            }
            Self::Object(object) => {
                let found = object.ask("list", |store, path| async move {
                    store.list_with_delimiter((!path.as_ref().is_empty()).then_some(&path)).await
                })?;
                let names = found.objects.iter().filter_map(|meta| meta.location.filename().map(str::to_owned));
                Ok(names.collect::<BTreeSet<_>>().into_iter().collect())
            }
        }
    }
}
