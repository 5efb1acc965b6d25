//! Claims in an object store, which has no locks: an object `claims/{shard}.json` that only one can create, and that its
//! owner keeps alive by rewriting it. One that has not changed for a while is its owner's no more, and is taken over in one
//! conditional step. No clocks are compared: what counts is how long this process has seen it unchanged.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

use crate::error::{Error, Result};
use crate::storage::{Location, Version};

/// Signs of life within the time after which a claim is nobody's: some may fail.
const BEATS: u32 = 5;
const MAX_CLAIM_BYTES: u64 = 1 << 16;

/// The claims of this process in one output.
pub(crate) struct StoreClaims {
    folder: Location,
    /// Tells this machine's work folder from others: claims of a killed process with the same one are its own.
    owner: String,
    /// Time without a sign of life after which a claim is nobody's.
    timeout: Duration,
    held: Arc<Mutex<HashMap<String, Held>>>,
    /// Claims of others, and since when they have not changed.
    seen: Mutex<HashMap<String, (Version, Instant)>>,
    /// Dropped with this, which ends the thread that beats.
    _stop: Sender<()>,
}

/// A claim that this process has, or had until another took it over.
struct Held {
    location: Location,
    version: Version,
    is_lost: bool,
}

impl StoreClaims {
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn new(folder: Location, owner: String, timeout: Duration) -> Result<Self> {
        let held: Arc<Mutex<HashMap<String, Held>>> = Arc::default();
        let (stop, stopped) = bounded(0);
        let (beating, name) = (Arc::clone(&held), owner.clone());
        let beat = move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(timeout / BEATS) {
                let shards: Vec<String> = lock(&beating).keys().cloned().collect();
                for shard in shards {
                    // A store that does not answer is the write stage's concern.
                    let _ = renew(&beating, &shard, &name);
                }
            }
        };
        let started = std::thread::Builder::new().name("claims".to_owned()).spawn(beat);
        started.map_err(Error::io("start thread", std::path::Path::new("claims")))?;
        Ok(Self { folder, owner, timeout, held, seen: Mutex::default(), _stop: stop })
    }

    /// Claims a shard; says whether it is this process's now.
    ///
    /// # Errors
    /// The store's.
    pub(crate) fn take(&self, shard: &str) -> Result<bool> {
        let location = self.folder.join(&format!("{shard}.json"));
        let version = match location.create_exclusive(contents(&self.owner))? {
            Some(version) => Some(version),
            None => self.take_over(shard, &location)?,
        };
        let is_taken = version.is_some();
        if let Some(version) = version {
            lock(&self.held).insert(shard.to_owned(), Held { location, version, is_lost: false });
        }
        Ok(is_taken)
    }

    /// Takes a claim that exists already, if it is this work folder's from before or nobody's any more.
    fn take_over(&self, shard: &str, location: &Location) -> Result<Option<Version>> {
        // It may be gone by now: then its shard is finished, and the next look finds that.
        let (claim, version) = location.read_version(MAX_CLAIM_BYTES)?;
        let owner = serde_json::from_slice::<serde_json::Value>(&claim)
            .ok()
            .and_then(|claim| claim["owner"].as_str().map(str::to_owned));
        let is_own = owner.as_deref() == Some(&self.owner);
        let is_stale = {
            let mut seen = lock(&self.seen);
            match seen.get(shard) {
                Some((known, since)) if *known == version => since.elapsed() >= self.timeout,
                _ => {
                    seen.insert(shard.to_owned(), (version.clone(), Instant::now()));
                    false
                }
            }
        };
        if is_own || is_stale { location.update(contents(&self.owner), &version) } else { Ok(None) }
    }

    /// How long the claims of others must be waited for until those that do not change are nobody's.
    pub(crate) fn time_until_stale(&self) -> Duration {
        let seen = lock(&self.seen);
        let left = seen.values().map(|(_, since)| self.timeout.saturating_sub(since.elapsed()));
        left.max().unwrap_or_default()
    }

    /// Makes sure that a claim is still this process's, before what it stands for is finished.
    ///
    /// # Errors
    /// [`Error::Output`] when another process took it over; the store's.
    pub(crate) fn confirm(&self, shard: &str) -> Result<()> {
        if renew(&self.held, shard, &self.owner)? {
            return Ok(());
        }
        Err(Error::Output {
            path: self.folder.join(&format!("{shard}.json")).to_string().into(),
            reason: "another process took this shard over, since this one showed no sign of life".to_owned(),
            hint: "that process does the shard; run the same command again for the others".to_owned(),
        })
    }

    /// Gives a claim up and deletes it: what it stood for is finished, or is left.
    pub(crate) fn finish(&self, shard: &str) {
        let held = lock(&self.held).remove(shard);
        // One that stays is taken for stale, and its shard found finished.
        let _ = held.filter(|held| !held.is_lost).map(|held| held.location.delete());
    }
}

/// Rewrites a claim; says whether it is still ours.
fn renew(held: &Mutex<HashMap<String, Held>>, shard: &str, owner: &str) -> Result<bool> {
    // Locked all the while: two renewals at once would take each other for another process.
    let mut held = lock(held);
    let Some(claim) = held.get_mut(shard) else { return Ok(true) };
    if !claim.is_lost {
        match claim.location.update(contents(owner), &claim.version)? {
            Some(version) => claim.version = version,
            None => claim.is_lost = true,
        }
    }
    Ok(!claim.is_lost)
}

/// A claim's contents: never the same twice, since stores may tell versions by their hash.
fn contents(owner: &str) -> Vec<u8> {
    serde_json::json!({"owner": owner, "beat": super::unique()}).to_string().into_bytes()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("bug: the lock is never held while panicking")
}
