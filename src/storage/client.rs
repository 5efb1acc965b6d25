//! Clients of object stores, one per bucket, their settings, and the runtime that waits for the network.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use tokio::runtime::Runtime;

use crate::error::Result;
use crate::storage::{Object, Scheme};

/// How patient the clients of object stores are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How often a request is tried again after a server error, a broken connection or a time-out, with waits that grow from
    /// 0.1 s to 15 s.
    pub max_retries: usize,
    /// When a request without an answer is given up. Requests carry at most 8 MiB.
    pub timeout: Duration,
}

impl Default for Policy {
    /// 8 retries (half a minute of waiting or so), 60 s.
    fn default() -> Self {
        Self { max_retries: 8, timeout: Duration::from_secs(60) }
    }
}

/// Connections are made or not in this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// No retry begins later than this after the first try: signatures would run out.
const RETRY_TIMEOUT: Duration = Duration::from_secs(240);

static POLICY: OnceLock<Policy> = OnceLock::new();

/// Sets the policy of all clients. The first call counts; without one, and after the first client, it is the default.
pub fn configure(policy: Policy) {
    let _ = POLICY.set(policy);
}

pub(super) fn policy() -> Policy {
    *POLICY.get_or_init(Policy::default)
}

/// The runtime: two threads, made when the first object is touched.
fn runtime() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let builder = builder.worker_threads(2).thread_name("storage").enable_all();
        builder.build().expect("bug: the machine has no room for two threads")
    });
    &RUNTIME
}

/// Waits for `future` on this thread.
pub(super) fn wait<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}

/// Runs `future` on the runtime.
pub(super) fn spawn<F>(future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    runtime().spawn(future)
}

impl Object {
    /// The client of this object's bucket.
    pub(super) fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        static STORES: LazyLock<Mutex<HashMap<String, Arc<dyn ObjectStore>>>> = LazyLock::new(Mutex::default);
        let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&self.root) {
            return Ok(Arc::clone(store));
        }
        // TLS wants one provider of cryptography; whoever installed one before is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = self.build().map_err(|error| self.error("open", &error))?;
        stores.insert(self.root.clone(), Arc::clone(&store));
        Ok(store)
    }

    fn build(&self) -> Result<Arc<dyn ObjectStore>, object_store::Error> {
        let Policy { max_retries, timeout } = policy();
        let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries, retry_timeout: RETRY_TIMEOUT };
        let (timeout, connect) = (seconds(timeout), seconds(CONNECT_TIMEOUT));
        let settings = |prefix: &'static str| {
            let all = [(ClientConfigKey::Timeout, timeout.clone()), (ClientConfigKey::ConnectTimeout, connect.clone())];
            // What the environment says goes first.
            all.into_iter().filter(move |(key, _)| {
                std::env::var_os(format!("{prefix}_{}", key.as_ref().to_ascii_uppercase())).is_none()
            })
        };
        Ok(match self.scheme {
            Scheme::S3 => {
                let builder = AmazonS3Builder::from_env().with_url(&self.root).with_retry(retry);
                let builder = settings("AWS")
                    .fold(builder, |builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value));
                Arc::new(builder.build()?)
            }
            Scheme::Google => {
                let builder = GoogleCloudStorageBuilder::from_env().with_url(&self.root).with_retry(retry);
                let builder = settings("GOOGLE")
                    .fold(builder, |builder, (key, value)| builder.with_config(GoogleConfigKey::Client(key), value));
                Arc::new(builder.build()?)
            }
            Scheme::Azure => {
                let builder = MicrosoftAzureBuilder::from_env().with_url(&self.root).with_retry(retry);
                let builder = settings("AZURE")
                    .fold(builder, |builder, (key, value)| builder.with_config(AzureConfigKey::Client(key), value));
                Arc::new(builder.build()?)
            }
            // A server without ranges sends a tar in one answer, for as long as it is being read: silence times out.
            Scheme::Http => {
                let options = ClientOptions::new()
                    .with_allow_http(true)
                    .with_timeout_disabled()
                    .with_read_timeout(policy().timeout)
                    .with_connect_timeout(CONNECT_TIMEOUT);
                Arc::new(
                    HttpBuilder::new().with_url(&self.root).with_client_options(options).with_retry(retry).build()?,
                )
            }
        })
    }

    /// Does something with the client, and waits for it.
    pub(super) fn ask<T, F>(
        &self,
        action: &'static str,
        request: impl FnOnce(Arc<dyn ObjectStore>, object_store::path::Path) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, object_store::Error>>,
    {
        let store = self.store()?;
        wait(request(store, self.path.clone())).map_err(|error| self.error(action, &error))
    }
}

fn seconds(duration: Duration) -> String {
    format!("{} seconds", duration.as_secs().max(1))
}
