//! Write: token ids to rows. Detokenizes, puts finished rows into the journal of their shard, and makes a file of a shard
//! whose rows are all there.
//!
//! A file is written under a temporary name and renamed, so that one that is there is whole. On standard output rows wait
//! for those before them.

mod atomic;
pub(crate) mod claim;
pub mod failures;
pub mod fault;
pub(crate) mod journal;
mod jsonl;
pub(crate) mod output;
mod parquet;
mod store_claim;
mod webdataset;
mod written_row;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use crate::error::{Error, Result};
use crate::live::{self, ShardState};
use crate::model::Tokenizer;
use crate::pipeline::progress::Progress;
use crate::pipeline::row::{Failure, Message, Row, Shard};
use crate::pipeline::write::failures::MaxFailures;
use crate::pipeline::write::output::{OpenShard, Output};
use crate::profile::recorder::{self, Work};
use crate::stage::Stage;

pub(crate) use self::atomic::{
    AtomicFile, create_folder, fingerprint, sync_folder, unique, write_atomically, write_new, write_shared,
};
pub use self::jsonl::row_to_json;
pub use self::output::{Format, OutputOptions};
pub use self::written_row::{Counts, Status, WrittenRow};

/// Where rows go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// A file per shard in a folder.
    Folder(OutputOptions),
    /// JSON objects to standard output, one a line, in input order.
    StandardOutput,
}

/// What the write stage needs to know.
pub(crate) struct WriteOptions<'a> {
    /// The output folder; standard output without one.
    pub(crate) output: Option<&'a Output>,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) with_token_ids: bool,
    /// Prompt tokens of each caption.
    pub(crate) prompt_tokens: usize,
    /// When the run is given up.
    pub(crate) max_failures: Option<MaxFailures>,
}

/// What the write stage did.
#[derive(Debug, Default)]
pub(crate) struct WriteReport {
    /// Rows that were finished in this run.
    pub(crate) done: Counts,
    /// Those of them that are in the files of shards.
    pub(crate) num_committed: u64,
    /// Rows in the journals of shards that are not whole: the next run goes on after them.
    pub(crate) num_journaled: u64,
    /// Finished rows of inputs that turned out to be damaged: they are not kept.
    pub(crate) num_dropped: u64,
    /// Shards that other processes took over and have.
    pub(crate) lost_shards: Vec<String>,
}

/// Writes rows until the channel is closed and empty.
///
/// # Errors
/// The disk's, and [`Error::TooManyFailures`]; everything written before stays.
pub(crate) fn run(options: &WriteOptions<'_>, rows: &Receiver<Message>, progress: &Progress) -> Result<WriteReport> {
    let mut writer = Writer::new(options);
    let result = writer.write_all(rows, progress);
    // Whatever happened, what is journaled should also survive the machine.
    let synced = writer.sync();
    result.and(synced)?;
    let Writer { shards, mut report, .. } = writer;
    let pending = shards.values();
    report.num_journaled =
        pending.map(|shard| shard.open.as_ref().map_or(0, |open| open.journal.num_rows() as u64)).sum();
    Ok(report)
}

/// The shards that are being filled.
struct Writer<'a> {
    options: &'a WriteOptions<'a>,
    shards: BTreeMap<usize, PendingShard>,
    /// Shards that are out, on standard output.
    num_printed_shards: usize,
    report: WriteReport,
    last_sync: Instant,
}

/// A shard that is not whole yet.
#[derive(Default)]
struct PendingShard {
    /// Its journal, in an output folder.
    open: Option<Box<OpenShard>>,
    /// Rows that wait for those before them, on standard output.
    rows: BTreeMap<usize, WrittenRow>,
    num_printed: usize,
    ended: Option<EndedShard>,
}

/// What the source says of a shard when it has met all its rows.
struct EndedShard {
    shard: Arc<Shard>,
    num_rows: usize,
    identity: Option<String>,
}

impl<'a> Writer<'a> {
    fn new(options: &'a WriteOptions<'a>) -> Self {
        let (shards, report) = (BTreeMap::new(), WriteReport::default());
        Self { options, shards, num_printed_shards: 0, report, last_sync: Instant::now() }
    }

    fn write_all(&mut self, rows: &Receiver<Message>, progress: &Progress) -> Result<()> {
        let interval = self.options.output.map(|output| output.options.sync_interval);
        loop {
            let message = match interval {
                // Rows that wait for the disk must not wait for the next row.
                Some(interval) => match recorder::receive_timeout(rows, interval.max(Duration::from_millis(10))) {
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                    Ok(message) => Some(message),
                },
                None => match recorder::receive(rows) {
                    Some(message) => Some(message),
                    None => return Ok(()),
                },
            };
            if let Some(message) = message {
                Stage::Write.enter();
                let begun = recorder::begin();
                let work = if matches!(message, Message::Row(_)) { Work::IMAGE } else { Work::default() };
                self.accept(message, progress)?;
                begun.end(Stage::Write, work);
            }
            if interval.is_some_and(|interval| self.last_sync.elapsed() >= interval) {
                self.sync()?;
            }
        }
    }

    fn accept(&mut self, message: Message, progress: &Progress) -> Result<()> {
        match message {
            Message::ShardBegan { shard, open } => {
                progress.add_earlier(open.num_kept as u64);
                self.shards.entry(shard.index).or_default().open = Some(open);
                Ok(())
            }
            Message::Row(row) => {
                let shard = row.draft.shard.index;
                self.add_row(*row, progress)?;
                self.advance(shard)
            }
            Message::ShardEnded { shard, num_rows, identity } => {
                let index = shard.index;
                self.shards.entry(index).or_default().ended = Some(EndedShard { shard, num_rows, identity });
                self.advance(index)
            }
        }
    }

    fn add_row(&mut self, mut row: Row, progress: &Progress) -> Result<()> {
        row.draft.times.is_taken(Stage::Write);
        self.tell(&row);
        let (shard, index, image) = (row.draft.shard.index, row.draft.index, row.draft.image.take());
        let row = WrittenRow::new(row, self.options.tokenizer, self.options.with_token_ids)?;
        let pending = self.shards.entry(shard).or_default();
        match &mut pending.open {
            Some(open) => open.journal.append(index, &row, image.as_deref().filter(|_| row.is_ok()))?,
            None => drop(pending.rows.insert(index, row.clone())),
        }
        progress.add_row(row.is_ok());
        let done = &mut self.report.done;
        done.add_row(&row);
        match self.options.max_failures {
            Some(max) if !row.is_ok() && max.is_exceeded(done.failed, done.rows) => Err(Error::TooManyFailures {
                failed: done.failed,
                rows: done.rows,
                reasons: failures::most_frequent(&done.failures, 3).join(", "),
            }),
            _ => Ok(()),
        }
    }

    /// Says to logs and metrics how an image went.
    fn tell(&self, row: &Row) {
        match &row.outcome {
            Err(Failure { stage, reason }) => {
                let (key, source) = (&row.draft.input.key, &row.draft.input.source);
                tracing::info!(shard = row.draft.shard.name, key, source, %stage, reason, "image failed");
                live::count_row(Err(*stage));
            }
            Ok(generated) => {
                live::count_row(Ok((self.options.prompt_tokens as u64, generated.token_ids.len() as u64)));
            }
        }
    }

    fn advance(&mut self, shard: usize) -> Result<()> {
        match self.options.output {
            Some(output) => self.commit_if_whole(shard, output),
            None => self.print_ready(),
        }
    }

    /// Brings all journals to the disk.
    fn sync(&mut self) -> Result<()> {
        self.last_sync = Instant::now();
        self.shards.values_mut().filter_map(|shard| shard.open.as_mut()).try_for_each(|open| open.journal.sync())
    }

    /// Makes the file of a shard whose rows are all there.
    fn commit_if_whole(&mut self, index: usize, output: &Output) -> Result<()> {
        let Some(PendingShard { open: Some(open), ended: Some(ended), .. }) = self.shards.get(&index) else {
            return Ok(());
        };
        let num_new_rows = open.journal.num_rows() - open.num_kept;
        // A shard that is given up has lost none of its rows on the way either: it ends when all of them are in.
        if open.journal.num_rows() < ended.num_rows {
            return Ok(());
        }
        let Some(PendingShard { open: Some(open), ended: Some(ended), .. }) = self.shards.remove(&index) else {
            return Ok(());
        };
        match &ended.identity {
            Some(identity) => {
                let (ok, failed) = (open.journal.counts().ok, open.journal.counts().failed);
                match output.commit(&ended.shard.name, *open, ended.num_rows, identity) {
                    Err(Error::ClaimLost { shard }) => {
                        tracing::warn!(shard, "another process took this shard over and does it");
                        self.report.lost_shards.push(shard);
                        return Ok(());
                    }
                    committed => committed?,
                }
                live::count_shard(ShardState::Written);
                let location = output.location(&ended.shard.name);
                tracing::info!(
                    shard = ended.shard.name,
                    path = %location,
                    rows = ended.num_rows,
                    ok,
                    failed,
                    "shard written"
                );
                self.report.num_committed += num_new_rows as u64;
                Ok(())
            }
            None => {
                self.report.num_dropped += open.journal.num_rows() as u64;
                output.abandon(&ended.shard.name, *open)
            }
        }
    }

    /// Prints the rows whose predecessors are all out, shard by shard.
    fn print_ready(&mut self) -> Result<()> {
        while let Some(pending) = self.shards.get_mut(&self.num_printed_shards) {
            let mut ready = Vec::new();
            while let Some(row) = pending.rows.remove(&pending.num_printed) {
                pending.num_printed += 1;
                ready.push(row);
            }
            let is_over = pending.ended.as_ref().is_some_and(|ended| pending.num_printed == ended.num_rows);
            jsonl::print(&ready, self.options.with_token_ids)?;
            if !is_over {
                break;
            }
            self.shards.remove(&self.num_printed_shards);
            self.num_printed_shards += 1;
            live::count_shard(ShardState::Written);
        }
        Ok(())
    }
}
