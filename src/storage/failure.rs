//! What goes wrong with object stores, sorted by what helps.

use std::error::Error as _;

use object_store::client::{HttpError, HttpErrorKind};

use crate::error::Error;
use crate::storage::{Object, Scheme, redacted};

/// Why an object store did not do what it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such object or bucket.
    NotFound,
    /// The credentials are missing, wrong, or not good for this.
    Denied,
    /// No server answers there.
    Unreachable,
    /// The server took too long, again and again.
    TimedOut,
    /// The server failed, again and again.
    Server,
    /// The object is another one than when its reading began.
    Changed,
    /// The server cannot do this, or not this way.
    Unsupported,
    /// An object is over a limit.
    TooLarge,
    /// Anything else.
    Other,
}

impl Failure {
    /// What to do about it.
    pub(crate) fn hint(self) -> Option<&'static str> {
        match self {
            Self::NotFound => Some("check bucket and key (and the region: AWS_REGION)"),
            Self::Denied => Some(
                "set the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for public buckets), \
                 GOOGLE_APPLICATION_CREDENTIALS, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
            ),
            Self::Unreachable => Some(
                "check host and network; S3-compatible stores need AWS_ENDPOINT_URL, and AWS_ALLOW_HTTP=true without TLS",
            ),
            Self::TimedOut | Self::Server => {
                Some("the store is in trouble; the same command goes on later (--storage-retries, --storage-timeout)")
            }
            Self::Changed => Some("somebody writes to it; run again when it stays as it is"),
            Self::Unsupported => Some("web servers are for reading only, and parquet needs one that serves ranges"),
            Self::TooLarge | Self::Other => None,
        }
    }

    fn of(error: &object_store::Error) -> Self {
        use object_store::Error as Store;
        match error {
            // Of a web server that answers GET alone, the client says that nothing is there.
            Store::NotFound { source, .. } if source.to_string().contains("status code: 405") => {
                return Self::Unsupported;
            }
            Store::NotFound { .. } => return Self::NotFound,
            Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => return Self::Denied,
            Store::Precondition { .. } | Store::NotModified { .. } => return Self::Changed,
            Store::NotImplemented { .. } | Store::NotSupported { .. } => return Self::Unsupported,
            _ => {}
        }
        let text = error.to_string();
        // No credentials in the environment: the client asks the cloud's metadata service, and nobody answers.
        if ["169.254.", "metadata.google.internal"].iter().any(|service| text.contains(service)) {
            return Self::Denied;
        }
        if text.contains("non-partial response") {
            return Self::Unsupported;
        }
        let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<HttpError>() {
                return match error.kind() {
                    HttpErrorKind::Connect => Self::Unreachable,
                    HttpErrorKind::Timeout => Self::TimedOut,
                    HttpErrorKind::Interrupted | HttpErrorKind::Request => Self::Server,
                    _ => Self::Other,
                };
            }
            cause = error.source();
        }
        if text.contains("status code: 5") || text.contains("status code: 429") { Self::Server } else { Self::Other }
    }
}

/// Whether a request may or may not have been done: the client repeats only those that it may do twice.
pub(super) fn is_unanswered(error: &object_store::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<HttpError>() {
            return matches!(error.kind(), HttpErrorKind::Timeout | HttpErrorKind::Interrupted);
        }
        cause = error.source();
    }
    false
}

impl Object {
    /// The error of an action on this object.
    pub(super) fn error(&self, action: &'static str, source: &object_store::Error) -> Error {
        let failure = Failure::of(source);
        let mut reason = match failure {
            Failure::NotFound => "no such object".to_owned(),
            Failure::Changed => "it changed while it was being read".to_owned(),
            _ => {
                // The outer levels repeat each other; the last ones say what happened.
                let mut text = source.to_string();
                let mut cause = source.source();
                while let Some(error) = cause {
                    let inner = error.to_string();
                    if !text.contains(&inner) {
                        text = format!("{text}: {inner}");
                    }
                    cause = error.source();
                }
                redacted(&text)
            }
        };
        if failure == Failure::Unsupported && self.scheme == Scheme::Http && reason.contains("non-partial") {
            reason = "the server does not serve ranges".to_owned();
        }
        self.failure(action, failure, reason)
    }

    pub(super) fn failure(&self, action: &'static str, failure: Failure, reason: String) -> Error {
        Error::Storage { action, location: self.to_string(), failure, reason }
    }
}
