//! Listings: of everything below a prefix, page by page in the store's order (lexicographic by key), and of the names in
//! one folder.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path as Key;
use object_store::{Error as StoreError, ObjectMeta, ObjectStore};

use crate::error::{Error, Result};
use crate::storage::client::{policy, wait};
use crate::storage::read::back_off;
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
    store: Arc<dyn ObjectStore>,
    stream: BoxStream<'static, Result<ObjectMeta, StoreError>>,
    /// The last key that came: after a failure the listing goes on behind it.
    last: Option<Key>,
    failures: usize,
}

impl Object {
    /// Everything below this prefix.
    ///
    /// # Errors
    /// When no client can be made from the settings.
    pub fn list(&self) -> Result<Listing> {
        let store = self.store()?;
        let stream = store.list(self.prefix());
        Ok(Listing { prefix: self.clone(), store, stream, last: None, failures: 0 })
    }

    fn prefix(&self) -> Option<&Key> {
        (!self.path.as_ref().is_empty()).then_some(&self.path)
    }
}

impl Iterator for Listing {
    type Item = Result<Listed>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = loop {
            match wait(self.stream.next())? {
                Err(error) if is_broken_off(&error) && self.failures < policy().max_retries => {
                    self.failures += 1;
                    wait(back_off(self.failures));
                    self.stream = match &self.last {
                        Some(last) => self.store.list_with_offset(self.prefix.prefix(), last),
                        None => self.store.list(self.prefix.prefix()),
                    };
                }
                found => break found,
            }
        };
        let meta = match found {
            Ok(meta) => meta,
            Err(error) => return Some(Err(self.prefix.error("list", &error))),
        };
        self.failures = 0;
        self.last = Some(meta.location.clone());
        let key = meta.location.as_ref();
        let below = key.strip_prefix(self.prefix.path.as_ref()).unwrap_or(key);
        Some(Ok(Listed {
            key: below.trim_start_matches('/').to_owned(),
            size: meta.size,
            location: Location::Object(Object { path: meta.location, ..self.prefix.clone() }),
        }))
    }
}

/// Whether the answer came, but not to its end. Other failures were repeated by the client.
fn is_broken_off(error: &StoreError) -> bool {
    matches!(error, StoreError::Generic { .. }) && error.to_string().contains("list response")
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
                    let prefix = (!path.as_ref().is_empty()).then_some(&path);
                    let mut failures = 0;
                    loop {
                        match store.list_with_delimiter(prefix).await {
                            Err(error) if is_broken_off(&error) && failures < policy().max_retries => {
                                failures += 1;
                                back_off(failures).await;
                            }
                            found => return found,
                        }
                    }
                })?;
                let names = found.objects.iter().filter_map(|meta| meta.location.filename().map(str::to_owned));
                Ok(names.collect::<BTreeSet<_>>().into_iter().collect())
            }
        }
    }
}
