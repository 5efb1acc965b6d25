//! Where bytes lie: on this machine or in an object store. Everything here blocks; a small runtime behind it does the
//! waiting for the network. Local paths go straight to the file system.
//!
//! ```no_run
//! # fn main() -> recaption::Result<()> {
//! use recaption::storage::Location;
//! let out = Location::parse("s3://bucket/captions")?;
//! if let Some(_version) = out.join("00000.claim").create_exclusive(b"mine".as_slice())? {
//!     let mut file = out.join("captions-00000.parquet").writer()?;
//!     std::io::Write::write_all(&mut file, b"...").map_err(|error| file.failed(error))?;
//!     file.commit()?; // not there before, whole after
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod failure;
mod list;
mod ranges;
mod read;
mod small;
mod write;

use std::fmt;
use std::path::{Path, PathBuf};

use url::Url;

use crate::error::{Error, Result};

pub use client::{Policy, configure};
pub use failure::Failure;
pub use list::{Listed, Listing};
pub use ranges::{RangeCursor, RangeReader};
pub use read::Reader;
pub use small::{PendingRead, Version};
pub use write::AtomicWriter;

/// A file, folder, object or prefix.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// On this machine.
    Local(PathBuf),
    /// In an object store or on a web server.
    Object(Object),
}

/// An object, or a prefix of objects.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Object {
    scheme: Scheme,
    /// What the client is made from: `s3://bucket`, or an origin with its credentials and query.
    root: String,
    /// The key below it, without a leading slash.
    path: object_store::path::Path,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Scheme {
    S3,
    Google,
    Azure,
    Http,
}

const SCHEMES: &str = "s3://, gs://, az://, abfss://, http://, https:// and file:// are";

impl Location {
    /// Reads a path or a URL (`s3://`, `gs://`, `az://`, `abfss://`, `http://`, `https://`, `file://`). Keys of object stores
    /// are taken as they stand; web addresses are decoded.
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown scheme or a URL that is none.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else { return Ok(Self::Local(PathBuf::from(text))) };
        let refuse = |reason: String| Error::Input {
            input: redacted(text),
            reason,
            hint: "a URL looks like s3://bucket/folder/00000.tar or https://host/00000.tar",
        };
        let kind = match scheme.to_ascii_lowercase().as_str() {
            "s3" | "s3a" => Scheme::S3,
            "gs" => Scheme::Google,
            "az" | "azure" | "abfs" | "abfss" | "adl" => Scheme::Azure,
            "http" | "https" => {
                let mut url = Url::parse(text).map_err(|error| refuse(error.to_string()))?;
                let path =
                    object_store::path::Path::from_url_path(url.path()).map_err(|error| refuse(error.to_string()))?;
                url.set_path("");
                url.set_fragment(None);
                return Ok(Self::Object(Object { scheme: Scheme::Http, root: url.into(), path }));
            }
            "file" => {
                let url = Url::parse(text).map_err(|error| refuse(error.to_string()))?;
                let path = url.to_file_path().map_err(|()| refuse("not the URL of a local file".to_owned()))?;
                return Ok(Self::Local(path));
            }
            // A path with `://` in it is rare, but it is a path.
            other if !other.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                return Ok(Self::Local(PathBuf::from(text)));
            }
            other => return Err(refuse(format!("`{other}://` is not read; {SCHEMES}"))),
        };
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(refuse("it names no bucket".to_owned()));
        }
        let path = object_store::path::Path::parse(key).map_err(|error| refuse(error.to_string()))?;
        let scheme = if scheme.eq_ignore_ascii_case("s3a") { "s3" } else { scheme };
        Ok(Self::Object(Object { scheme: kind, root: format!("{scheme}://{bucket}"), path }))
    }

    /// Whether it lies on this machine.
    #[must_use]
    pub fn local_path(&self) -> Option<&Path> {
        match self {
            Self::Local(path) => Some(path),
            Self::Object(_) => None,
        }
    }

    /// Whether it can be written to: object stores can, web servers cannot.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !matches!(self, Self::Object(Object { scheme: Scheme::Http, .. }))
    }

    /// Whether it can be listed: object stores can, web servers cannot.
    #[must_use]
    pub fn is_listable(&self) -> bool {
        self.is_writable()
    }

    /// What lies at `name` below: `/` in it separates folders.
    #[must_use]
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::Local(path) => Self::Local(path.join(name)),
            Self::Object(object) => {
                // Names are keys as they stand, as in a URL; what no key may have is escaped.
                let path = object_store::path::Path::parse(format!("{}/{name}", object.path)).unwrap_or_else(|_| {
                    let parts = name.split('/').filter(|part| !part.is_empty());
                    parts.fold(object.path.clone(), |path, part| path.join(part))
                });
                Self::Object(Object { path, ..object.clone() })
            }
        }
    }

    /// The last part of the path or key; empty for the root of a bucket.
    #[must_use]
    pub fn file_name(&self) -> String {
        match self {
            Self::Local(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Self::Object(object) => object.path.filename().unwrap_or_default().to_owned(),
        }
    }
}

impl From<PathBuf> for Location {
    fn from(path: PathBuf) -> Self {
        Self::Local(path)
    }
}

impl From<&Path> for Location {
    fn from(path: &Path) -> Self {
        Self::Local(path.to_owned())
    }
}

/// A path as given, or a URL without credentials and query.
impl fmt::Display for Location {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => path.display().fmt(formatter),
            Self::Object(object) => object.fmt(formatter),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.scheme != Scheme::Http {
            return write!(formatter, "{}/{}", self.root, self.path);
        }
        let Ok(mut url) = Url::parse(&self.root) else { return formatter.write_str(&redacted(&self.root)) };
        url.set_query(None);
        let _ = url.set_username("").and_then(|()| url.set_password(None));
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(self.path.parts());
        }
        url.fmt(formatter)
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Location({self})")
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Object({self})")
    }
}

/// `text` without the credentials and queries of the web addresses in it, and without control characters: servers write
/// parts of what ends up here.
fn redacted(text: &str) -> String {
    const MAX_CHARS: usize = 400;
    let mut clean = String::new();
    for word in text.split_inclusive(|c: char| c.is_whitespace() || matches!(c, '"' | '(' | ')')) {
        let Some((scheme, rest)) =
            word.split_once("://").filter(|(scheme, _)| scheme.ends_with("http") || scheme.ends_with("https"))
        else {
            clean.push_str(word);
            continue;
        };
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let query = path.find(['?', '#']).unwrap_or(path.len());
        let end = word
            .chars()
            .next_back()
            .filter(|c| query < path.len() && (c.is_whitespace() || matches!(c, '"' | '(' | ')')));
        clean.extend([scheme, "://", host, &path[..query]]);
        clean.extend(end);
    }
    let mut clean: String = clean.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_CHARS + 1).collect();
    if clean.chars().count() > MAX_CHARS {
        clean.pop();
        clean.push('…');
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_read_and_shown_without_credentials() {
        let shown = |text: &str| Location::parse(text).unwrap().to_string();
        assert_eq!(shown("a/b.tar"), "a/b.tar");
        assert_eq!(shown("s3://bucket/a b%41/c#?.tar"), "s3://bucket/a b%41/c#?.tar");
        assert_eq!(shown("gs://bucket"), "gs://bucket/");
        assert_eq!(shown("abfss://box@account.host/x"), "abfss://box@account.host/x");
        assert_eq!(shown("https://me:secret@host:81/a%20b.tar?signature=secret#x"), "https://host:81/a%20b.tar");
        assert_eq!(shown("file:///tmp/a%20b"), "/tmp/a b");
        assert_eq!(Location::parse("s3://b/x/").unwrap().join("y/z.tar").to_string(), "s3://b/x/y/z.tar");
        assert_eq!(Location::parse("s3://b").unwrap().join("ä 1%.txt").to_string(), "s3://b/ä 1%.txt");
        assert_eq!(Location::parse("s3://b/x").unwrap().join("../y").to_string(), "s3://b/x/%2E%2E/y");
        assert_eq!(Location::parse("s3://b/x/y.tar").unwrap().file_name(), "y.tar");
        for bad in ["ftp://host/a", "s3:///a", "s3://bucket/a//b", "s3://bucket/../b", "http://", "file://host/a"] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
        let error = Location::parse("http://me:secret@[/?token=secret").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn messages_lose_secrets_and_escapes() {
        let message = "GET http://u:p@host/a?X-Sig=s in 3s - error (\"https://host/b?q=s\")\u{1b}[2J";
        assert_eq!(redacted(message), "GET http://host/a in 3s - error (\"https://host/b\") [2J");
    }
}
