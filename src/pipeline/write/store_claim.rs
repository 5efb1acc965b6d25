//! Claims in an object store, which has no locks: an object `claims/{shard}.json` that only one can create, and that its
//! owner keeps alive by rewriting it. One that has not changed for a while is its owner's no more, and is taken over in one
//! conditional step. No clocks are compared: what counts is how long this process has seen it unchanged.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

use crate::error::{Error, Result};
use crate::storage::{Failure, Location, Version};

/// Signs of life within the time after which a claim is nobody's: some may fail.
const BEATS: u32 = 5;
const MAX_CLAIM_BYTES: u64 = 1 << 16;
/// How often a claim is asked for that comes and goes.
const MAX_TRIES: usize = 3;
/// Looks at a claim of another within the time after which it is nobody's, while nothing else is left to do.
const LOOKS: u32 = 30;
const SHORTEST_LOOK: Duration = Duration::from_millis(100);

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
        let location = self.location(shard);
        // One that is there for the first request and gone for the second was deleted with its shard finished.
        for _ in 0..MAX_TRIES {
            let version = match location.create_exclusive(contents(&self.owner))? {
                Some(version) => Some(version),
                None => match read(&location)? {
                    Some((owner, version)) => self.take_over(shard, &location, owner.as_deref(), version)?,
                    None => continue,
                },
            };
            let is_taken = version.is_some();
            if let Some(version) = version {
                lock(&self.seen).remove(shard);
                lock(&self.held).insert(shard.to_owned(), Held { location, version, is_lost: false });
            }
            return Ok(is_taken);
        }
        Ok(false)
    }

    /// Takes a claim that exists already, if it is this work folder's from before or nobody's any more.
    fn take_over(
        &self,
        shard: &str,
        location: &Location,
        owner: Option<&str>,
        version: Version,
    ) -> Result<Option<Version>> {
        let is_own = owner == Some(&self.owner);
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
        if is_own || is_stale { replace(location, &self.owner, &version) } else { Ok(None) }
    }

    /// Waits until it is known of each claim of another whether that is alive: the claim changes, is gone, or does neither
    /// for as long as makes it nobody's. Ends early when `is_done` says so.
    ///
    /// # Errors
    /// The store's.
    pub(crate) fn wait_for_others(&self, mut is_done: impl FnMut() -> bool) -> Result<()> {
        let interval = (self.timeout / LOOKS).max(SHORTEST_LOOK);
        let mut next_look = Instant::now();
        loop {
            if next_look.elapsed() > Duration::ZERO {
                let waited_for: Vec<String> = lock(&self.seen).keys().cloned().collect();
                for shard in waited_for {
                    let found = read(&self.location(&shard))?.map(|(_, version)| version);
                    let mut seen = lock(&self.seen);
                    let is_unchanged = seen.get(&shard).is_some_and(|(version, _)| Some(version) == found.as_ref());
                    if !is_unchanged {
                        seen.remove(&shard);
                    }
                }
                next_look = Instant::now() + interval;
            }
            let is_waiting = lock(&self.seen).values().any(|(_, since)| since.elapsed() < self.timeout);
            if !is_waiting || is_done() {
                return Ok(());
            }
            std::thread::sleep(SHORTEST_LOOK);
        }
    }

    fn location(&self, shard: &str) -> Location {
        self.folder.join(&format!("{shard}.json"))
    }

    /// Makes sure that a claim is still this process's, before what it stands for is finished.
    ///
    /// # Errors
    /// [`Error::ClaimLost`] when another process took it over; the store's.
    pub(crate) fn confirm(&self, shard: &str) -> Result<()> {
        if renew(&self.held, shard, &self.owner)? { Ok(()) } else { Err(Error::ClaimLost { shard: shard.to_owned() }) }
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
        match replace(&claim.location, owner, &claim.version)? {
            Some(version) => claim.version = version,
            None => claim.is_lost = true,
        }
    }
    Ok(!claim.is_lost)
}

/// Rewrites a claim that is still at `version`; `None` when it is another's.
fn replace(location: &Location, owner: &str, version: &Version) -> Result<Option<Version>> {
    if let Some(version) = location.update(contents(owner), version)? {
        return Ok(Some(version));
    }
    // A write whose answer was lost is refused when it is repeated. Nobody else writes with this owner: the lock in the work
    // folder is this process's.
    Ok(read(location)?.and_then(|(found, version)| (found.as_deref() == Some(owner)).then_some(version)))
}

/// Owner and version of a claim; `None` when there is none.
fn read(location: &Location) -> Result<Option<(Option<String>, Version)>> {
    let (claim, version) = match location.read_version(MAX_CLAIM_BYTES) {
        Err(Error::Storage { failure: Failure::NotFound, .. }) => return Ok(None),
        found => found?,
    };
    let claim: serde_json::Value = serde_json::from_slice(&claim).unwrap_or_default();
    Ok(Some((claim["owner"].as_str().map(str::to_owned), version)))
}

/// A claim's contents: never the same twice, since stores may tell versions by their hash.
fn contents(owner: &str) -> Vec<u8> {
    serde_json::json!({"owner": owner, "beat": super::unique()}).to_string().into_bytes()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("bug: the lock is never held while panicking")
}
