//! Faults of the disk that tests ask for (`--inject-io-error`): the n-th write, sync or rename of a kind fails.

use std::io::{Error, ErrorKind, Result};
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the write stage asks of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A record is added to a journal.
    JournalWrite,
    /// A journal is synced.
    JournalSync,
    /// A part of a shard's file is written.
    CommitWrite,
    /// A shard's file is synced.
    CommitSync,
    /// A shard's file gets its name.
    CommitRename,
}

/// A fault to come: the operation's `count`-th time (from 0) and every one after it fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What fails.
    pub operation: Operation,
    /// How many succeed before.
    pub count: usize,
    /// How it fails.
    pub kind: FaultKind,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The disk is full.
    StorageFull,
    /// The disk is broken.
    InputOutput,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let expected = || {
            let operations = "journal-write, journal-sync, commit-write, commit-sync, commit-rename";
            format!("expected OPERATION:COUNT:KIND with one of {operations} and enospc or eio, got `{text}`")
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [operation, count, kind] = parts[..] else { return Err(expected()) };
        let operation = match operation {
            "journal-write" => Operation::JournalWrite,
            "journal-sync" => Operation::JournalSync,
            "commit-write" => Operation::CommitWrite,
            "commit-sync" => Operation::CommitSync,
            "commit-rename" => Operation::CommitRename,
            _ => return Err(expected()),
        };
        let kind = match kind {
            "enospc" => FaultKind::StorageFull,
            "eio" => FaultKind::InputOutput,
            _ => return Err(expected()),
        };
        Ok(Self { operation, count: count.parse().map_err(|_| expected())?, kind })
    }
}

static FAULT: Mutex<Option<Fault>> = Mutex::new(None);
static IS_SET: AtomicBool = AtomicBool::new(false);

/// Lets an operation fail from some point on.
pub(crate) fn inject(fault: Fault) {
    *FAULT.lock().expect("bug: the lock is never held while panicking") = Some(fault);
    IS_SET.store(true, Ordering::Relaxed);
}

/// Called before each operation.
pub(crate) fn check(operation: Operation) -> Result<()> {
    if !IS_SET.load(Ordering::Relaxed) {
        return Ok(());
    }
    match &mut *FAULT.lock().expect("bug: the lock is never held while panicking") {
        Some(fault) if fault.operation == operation && fault.count == 0 => Err(match fault.kind {
            FaultKind::StorageFull => ErrorKind::StorageFull.into(),
            FaultKind::InputOutput => Error::other("Input/output error (injected)"),
        }),
        Some(fault) if fault.operation == operation => {
            fault.count -= 1;
            Ok(())
        }
        _ => Ok(()),
    }
}
