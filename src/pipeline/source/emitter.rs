//! The emitter: what every kind of input sends its images through. It begins and ends shards, passes over what is
//! done already, keeps the count of rows, and looks at the stop flags.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use crate::error::Result;
use crate::live::{self, ShardState};
use crate::pipeline::row::{InputColumns, Message, RowDraft, Shard};
use crate::pipeline::source::limits::SourceLimits;
use crate::pipeline::source::{ImageRecord, Part, SourceChannels, SourceOptions};
use crate::pipeline::write::journal::key_hash;
use crate::pipeline::write::output::{BegunShard, FinishedShard, Kept, Output, other_input};
use crate::profile::recorder::{self, ImageTimes, Work};
use crate::stage::Stage;

/// What a source has to do for a shard that it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// Send its images, and end it.
    Open,
    /// Nothing: it is done. A source that cannot tell its input's identity yet still sends the images, whose bytes are
    /// not asked for, and ends the shard.
    Skip,
}

/// Sends records and keeps the count of rows and shards.
pub(super) struct Emitter<'a> {
    channels: SourceChannels<'a>,
    output: Option<&'a Output>,
    remaining: usize,
    limits: SourceLimits,
    /// Whether the write stage wants the image bytes as well.
    keeps_images: bool,
    part: Option<Part>,
    /// Place of the present input among all, and the number of its next shard.
    input: (usize, usize),
    /// Names of shards in use, and which input's which shard has each.
    names: HashMap<String, (usize, usize)>,
    num_shards: usize,
    state: State,
    /// Rows of the shard so far.
    num_rows: usize,
    /// Shards that other processes have.
    busy: Vec<String>,
    /// Shards that this process has ended.
    ended: HashSet<String>,
    /// A stop flag ended the reading.
    is_cut_short: bool,
    /// Since the last image was sent.
    reading: recorder::Begun,
}

/// The present shard.
enum State {
    /// None, or one that is not this process's: its images are passed over.
    None,
    /// One that is not this process's, whose images are counted against the limit.
    Passed,
    Open(Arc<Shard>, Kept),
    /// It is written already; its rows are counted, to compare.
    Finished(Arc<Shard>, FinishedShard),
}

impl<'a> Emitter<'a> {
    pub(super) fn new(options: &SourceOptions<'a>, channels: SourceChannels<'a>) -> Self {
        Self {
            channels,
            output: options.output,
            remaining: options.limit.unwrap_or(usize::MAX),
            limits: options.limits.clone(),
            keeps_images: options.output.is_some_and(|output| output.options.format.has_images()),
            part: options.part,
            input: (0, 0),
            names: HashMap::new(),
            num_shards: 0,
            state: State::None,
            num_rows: 0,
            busy: Vec::new(),
            ended: HashSet::new(),
            is_cut_short: false,
            reading: recorder::begin(),
        }
    }

    /// Says which input is read from here on, and the number of its next shard: the parts of a run and the names of shards
    /// go by that.
    pub(super) fn enter_input(&mut self, index: usize, next_shard: usize) {
        self.input = (index, next_shard);
    }

    /// Shards that were another process's since the last call.
    pub(super) fn take_busy(&mut self) -> Vec<String> {
        std::mem::take(&mut self.busy)
    }

    /// Whether nothing more is wanted.
    pub(super) fn is_done(&mut self) -> bool {
        self.is_cut_short |= self.is_stopped();
        self.remaining == 0 || self.is_cut_short
    }

    pub(super) fn is_cut_short(&self) -> bool {
        self.is_cut_short
    }

    /// Whether one of the stop flags is raised.
    fn is_stopped(&self) -> bool {
        self.channels.stop.iter().any(|stop| stop.load(Ordering::Relaxed))
    }

    pub(super) fn stop_flags(&self) -> [&'a AtomicBool; 2] {
        self.channels.stop
    }

    /// Rows of the present shard so far.
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Largest image file that is read.
    pub(super) fn max_image_bytes(&self) -> u64 {
        self.limits.max_image_bytes
    }

    /// What the inputs may cost.
    pub(super) fn limits(&self) -> &SourceLimits {
        &self.limits
    }

    /// Starts a shard; two inputs of one name get `-2`, `-3`. `identity` tells the input from another of the same name,
    /// where that is known before it is read; a finished shard is then passed over as a whole.
    ///
    /// # Errors
    /// [`Error::Input`] when the output holds the shard, made from another input; the disk's.
    pub(super) fn begin(&mut self, name: &str, identity: Option<&str>) -> Result<Begun> {
        let place = self.input;
        self.input.1 += 1;
        let numbered = (2..).map(|number| format!("{name}-{number}"));
        let mut candidates = std::iter::once(name.to_owned()).chain(numbered);
        let is_free = |name: &String| self.names.get(name).is_none_or(|other| *other == place);
        let name = candidates.find(is_free).expect("bug: numbers do not end");
        self.names.insert(name.clone(), place);
        self.num_rows = 0;
        self.state = State::None;
        if self.ended.contains(&name) || self.part.is_some_and(|part| !part.has(place.0 + place.1)) {
            return Ok(Begun::Skip);
        }
        let begun = match self.output {
            Some(output) => Some(output.begin(&name, identity)?),
            None => None,
        };
        let shard = Arc::new(Shard { index: self.num_shards, name });
        let kept = match begun {
            None => Kept::default(),
            Some(BegunShard::Busy) => {
                tracing::info!(shard = shard.name, "shard is in work in another process");
                self.busy.push(shard.name.clone());
                self.state = State::Passed;
                return Ok(Begun::Skip);
            }
            Some(BegunShard::Finished(finished)) => {
                live::count_shard(ShardState::Skipped);
                tracing::info!(shard = shard.name, rows = finished.counts.rows, "shard is written already");
                self.ended.insert(shard.name.clone());
                match identity {
                    Some(identity) => {
                        check_identity(&shard, &finished, identity)?;
                        self.remaining = self.remaining.saturating_sub(finished.counts.rows as usize);
                    }
                    None => self.state = State::Finished(shard, finished),
                }
                return Ok(Begun::Skip);
            }
            Some(BegunShard::Open(open, kept)) => {
                // A closed channel means that the write stage failed; the stop flag ends this stage.
                let _ = self.channels.rows.send(Message::ShardBegan { shard: Arc::clone(&shard), open });
                kept
            }
        };
        live::count_shard(ShardState::Claimed);
        tracing::info!(shard = shard.name, kept = kept.rows.len(), "shard begun");
        self.num_shards += 1;
        self.state = State::Open(shard, kept);
        Ok(Begun::Open)
    }

    /// Whether the bytes of the next image are wanted: not when its row is there already.
    pub(super) fn wants_bytes(&self) -> bool {
        matches!(&self.state, State::Open(_, kept) if !kept.rows.contains_key(&self.num_rows))
    }

    /// Whether the bytes of the image after `count` others are wanted.
    pub(super) fn wants_bytes_after(&self, count: usize) -> bool {
        matches!(&self.state, State::Open(_, kept) if !kept.rows.contains_key(&(self.num_rows + count)))
    }

    /// Whether the bytes of any of the next `count` images are wanted.
    pub(super) fn wants_any(&self, count: usize) -> bool {
        match &self.state {
            State::Open(_, kept) => (self.num_rows..self.num_rows + count).any(|row| !kept.rows.contains_key(&row)),
            _ => false,
        }
    }

    /// Sends one image, or the failed row of an image whose bytes could not be had. `bytes` is called only when they
    /// are wanted; its error is the reason.
    ///
    /// # Errors
    /// [`Error::Input`] when the output holds another image in this place.
    pub(super) fn push(
        &mut self,
        input: InputColumns,
        bytes: impl FnOnce() -> std::result::Result<Bytes, String>,
    ) -> Result<()> {
        if self.is_done() || matches!(self.state, State::None) {
            return Ok(());
        }
        let index = self.num_rows;
        self.num_rows += 1;
        self.remaining -= 1;
        let State::Open(shard, kept) = &self.state else { return Ok(()) };
        if let Some(known) = kept.rows.get(&index) {
            return if *known == key_hash(&input.key) { Ok(()) } else { Err(other_input(&shard.name)) };
        }
        let shard = Arc::clone(shard);
        let mut draft = RowDraft {
            shard,
            index,
            input,
            dimensions: None,
            image_sha256: None,
            times: ImageTimes::default(),
            image: None,
        };
        Stage::Source.enter();
        let bytes = bytes();
        self.reading.end(Stage::Source, Work::IMAGE);
        draft.times.is_read();
        draft.times.is_queued();
        // A closed channel means that the run is failing elsewhere; the stop flag ends this stage.
        let _ = match bytes {
            Ok(bytes) => {
                live::count_read(bytes.len());
                draft.image = self.keeps_images.then(|| bytes.clone());
                recorder::send(&self.channels.records, ImageRecord { draft, bytes }).map_err(|_| ())
            }
            Err(reason) => {
                recorder::send(&self.channels.rows, draft.fail(Stage::Source, reason).into()).map_err(|_| ())
            }
        };
        self.reading = recorder::begin();
        Ok(())
    }

    /// Ends the shard, unless the run is being stopped: then it is not whole.
    ///
    /// # Errors
    /// [`Error::Input`] when the output holds the shard, made from another input.
    pub(super) fn end(&mut self, identity: &str) -> Result<()> {
        self.is_cut_short |= self.is_stopped();
        let state = std::mem::replace(&mut self.state, State::None);
        if self.is_cut_short {
            return Ok(());
        }
        let check = |shard: &Shard, finished: &FinishedShard| {
            if finished.counts.rows != self.num_rows as u64 {
                return Err(other_input(&shard.name));
            }
            check_identity(shard, finished, identity)
        };
        match state {
            State::None | State::Passed => Ok(()),
            State::Finished(shard, finished) => check(&shard, &finished),
            State::Open(shard, kept) => {
                if let Some(finished) = &kept.replaces {
                    check(&shard, finished)?;
                }
                if kept.rows.keys().any(|index| *index >= self.num_rows) {
                    return Err(other_input(&shard.name));
                }
                self.ended.insert(shard.name.clone());
                let (num_rows, identity) = (self.num_rows, Some(identity.to_owned()));
                let _ = self.channels.rows.send(Message::ShardEnded { shard, num_rows, identity });
                Ok(())
            }
        }
    }

    /// Leaves a shard that cannot be read to its end: it is not kept.
    pub(super) fn abandon(&mut self) {
        let State::Open(shard, _) = std::mem::replace(&mut self.state, State::None) else { return };
        self.ended.insert(shard.name.clone());
        let _ = self.channels.rows.send(Message::ShardEnded { shard, num_rows: self.num_rows, identity: None });
    }
}

fn check_identity(shard: &Shard, finished: &FinishedShard, identity: &str) -> Result<()> {
    match &finished.identity {
        Some(known) if known != identity => Err(other_input(&shard.name)),
        _ => Ok(()),
    }
}

/// Reads a file, within the size limit.
///
/// # Errors
/// The reason of a failed row.
pub(super) fn read_file(path: &Path, max_bytes: u64) -> std::result::Result<Bytes, String> {
    let reason = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => format!("there is no file `{}`", path.display()),
        _ => format!("cannot read `{}`: {error}", path.display()),
    };
    let metadata = std::fs::metadata(path).map_err(reason)?;
    // A pipe would keep the run waiting, and a device never end.
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a folder" } else { "a pipe or device" };
        return Err(format!("`{}` is {found}, not a file", path.display()));
    }
    check_size(metadata.len(), max_bytes)?;
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    let file = File::open(path).map_err(reason)?;
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(reason)?;
    check_size(bytes.len() as u64, max_bytes)?;
    Ok(bytes.into())
}

/// # Errors
/// The reason of a failed row, when `size` is over the limit.
pub(super) fn check_size(size: u64, max_bytes: u64) -> std::result::Result<(), String> {
    if size > max_bytes {
        return Err(format!("{size} bytes is over the limit of {max_bytes} (--max-image-bytes)"));
    }
    Ok(())
}
