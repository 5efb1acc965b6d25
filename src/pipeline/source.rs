//! Source: inputs to [`ImageRecord`]s, in input order, with what the input says about each image.
//!
//! Cuts the inputs into shards, skips those that are written already, and tells the write stage how many rows each
//! shard has. An image that cannot be read is a failed row; an input that cannot be read on is
//! reported, and the others go on.

mod folder;
pub mod limits;
mod tar;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};
use recaption_export::hex;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::pipeline::input::Input;
use crate::pipeline::row::{InputColumns, Message, RowDraft, Shard};
use crate::pipeline::source::limits::SourceLimits;
use crate::pipeline::write::FinishedShard;
use crate::stage::Stage;

/// Rows of a shard that is made of single files.
const FILES_PER_SHARD: usize = 10_000;
/// How often a stage that waits for standard input looks at the stop flags.
const STOP_INTERVAL: Duration = Duration::from_millis(100);
/// Name of the shards made of single files that no folder names.
const IMAGES: &str = "images";

/// An image as read: its row and its bytes.
pub(crate) struct ImageRecord {
    pub(crate) draft: RowDraft,
    pub(crate) bytes: Vec<u8>,
}

/// What the source stage needs to know.
pub(crate) struct SourceOptions {
    pub(crate) inputs: Vec<Input>,
    /// The shards that are written already, by name.
    pub(crate) finished: HashMap<String, FinishedShard>,
    /// Most images to take, over all inputs.
    pub(crate) limit: Option<usize>,
    pub(crate) limits: SourceLimits,
}

/// Where the source stage's output goes, and when it should stop.
pub(crate) struct SourceChannels<'a> {
    pub(crate) records: Sender<ImageRecord>,
    pub(crate) rows: Sender<Message>,
    /// Any of these set: the run should end early, because of a signal or another stage's failure.
    pub(crate) stop: [&'a AtomicBool; 2],
}

/// How the reading of the inputs went.
#[derive(Debug)]
pub(crate) struct SourceReport {
    /// Inputs that could not be read to their end, or hold no image; the others were read all the same.
    pub(crate) damaged: Vec<Error>,
    /// A stop flag was raised before everything was read.
    pub(crate) is_cut_short: bool,
}

/// Reads all inputs.
///
/// # Errors
/// [`Error::Input`] when a shard of the output was made from another input, [`Error::Io`] when standard input fails.
pub(crate) fn run(options: SourceOptions, channels: SourceChannels<'_>) -> Result<SourceReport> {
    let mut emitter = Emitter {
        channels,
        finished: options.finished,
        remaining: options.limit.unwrap_or(usize::MAX),
        limits: options.limits,
        names: HashSet::new(),
        num_shards: 0,
        shard: None,
        num_rows: 0,
        is_cut_short: false,
    };
    let mut damaged = Vec::new();
    let mut loose = FileShards::new(IMAGES.to_owned());
    for input in options.inputs {
        if emitter.is_done() {
            break;
        }
        match input {
            Input::Image(path) => loose.push(&mut emitter, &path, path.display().to_string())?,
            Input::StandardInput => {
                for line in standard_input_lines(emitter.channels.stop) {
                    let line = line.map_err(Error::io("read", Path::new("standard input")))?;
                    let line = line.strip_suffix(b"\r").unwrap_or(&line);
                    if !line.is_empty() {
                        loose.push(&mut emitter, &path_of(line), String::from_utf8_lossy(line).into_owned())?;
                    }
                    if emitter.is_done() {
                        break;
                    }
                }
            }
            Input::Folder(path) => {
                loose.end(&mut emitter)?;
                damaged.extend(folder::run(&path, &mut emitter)?);
            }
            Input::Tar(path) => {
                loose.end(&mut emitter)?;
                damaged.extend(tar::run(&path, &mut emitter)?);
            }
        }
    }
    loose.end(&mut emitter)?;
    Ok(SourceReport { damaged, is_cut_short: emitter.is_cut_short })
}

/// Lines of standard input, until its end or a stop flag. A thread of its own reads them: a pipe that stays silent must
/// not keep the run from ending.
fn standard_input_lines(stop: [&AtomicBool; 2]) -> impl Iterator<Item = std::io::Result<Vec<u8>>> {
    let (sender, lines) = bounded(64);
    let read = move || {
        let mut lines = std::io::stdin().lock().split(b'\n');
        while lines.next().is_some_and(|line| sender.send(line).is_ok()) {}
    };
    let started = std::thread::Builder::new().name("stdin".to_owned()).spawn(read);
    let mut failure = started.err().map(Err);
    std::iter::from_fn(move || {
        loop {
            if let Some(failure) = failure.take() {
                return Some(failure);
            }
            match lines.recv_timeout(STOP_INTERVAL) {
                Ok(line) => return Some(line),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if stop.iter().any(|stop| stop.load(Ordering::Relaxed)) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    })
}

/// A path as standard input has it: any bytes on Unix, UTF-8 elsewhere.
fn path_of(line: &[u8]) -> PathBuf {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        PathBuf::from(std::ffi::OsStr::from_bytes(line))
    }
    #[cfg(not(unix))]
    PathBuf::from(String::from_utf8_lossy(line).into_owned())
}

/// Number of images in `inputs`, where that can be told without reading them: for progress and its ETA only.
pub(crate) fn count_images(inputs: &[Input]) -> Option<u64> {
    inputs
        .iter()
        .map(|input| match input {
            Input::Image(_) => Some(1),
            Input::StandardInput => None,
            Input::Folder(path) => folder::count_images(path),
            Input::Tar(path) => tar::count_images(path),
        })
        .sum()
}

/// Sends records and keeps the count of rows and shards.
struct Emitter<'a> {
    channels: SourceChannels<'a>,
    finished: HashMap<String, FinishedShard>,
    remaining: usize,
    limits: SourceLimits,
    /// Shard names in use.
    names: HashSet<String>,
    num_shards: usize,
    shard: Option<Arc<Shard>>,
    /// Rows of the shard so far.
    num_rows: usize,
    /// A stop flag ended the reading.
    is_cut_short: bool,
}

impl Emitter<'_> {
    /// Whether nothing more is wanted.
    fn is_done(&mut self) -> bool {
        self.is_cut_short |= self.is_stopped();
        self.remaining == 0 || self.is_cut_short
    }

    fn is_stopped(&self) -> bool {
        self.channels.stop.iter().any(|stop| stop.load(Ordering::Relaxed))
    }

    /// Starts a shard; two inputs of one name get `-2`, `-3`. Returns what is known of it when it is written already.
    fn begin(&mut self, name: &str) -> Option<FinishedShard> {
        let numbered = (2..).map(|number| format!("{name}-{number}"));
        let mut candidates = std::iter::once(name.to_owned()).chain(numbered);
        let name = candidates.find(|name| !self.names.contains(name)).expect("bug: numbers do not end");
        self.names.insert(name.clone());
        let finished = self.finished.get(&name).cloned();
        self.shard = finished.is_none().then(|| Arc::new(Shard { index: self.num_shards, name }));
        self.num_shards += 1;
        self.num_rows = 0;
        finished
    }

    /// Passes over rows of a shard that is written already.
    fn skip(&mut self, num_rows: usize) {
        self.remaining = self.remaining.saturating_sub(num_rows);
    }

    /// Sends one image, or the failed row of an image whose bytes could not be had.
    fn push(&mut self, input: InputColumns, bytes: Result<Vec<u8>, String>) {
        let Some(shard) = self.shard.clone().filter(|_| !self.is_done()) else { return };
        let draft = RowDraft { shard, index: self.num_rows, input, dimensions: None, image_sha256: None };
        Stage::Source.enter();
        self.num_rows += 1;
        self.remaining -= 1;
        // A closed channel means that the run is failing elsewhere; the stop flag ends this stage.
        let _ = match bytes {
            Ok(bytes) => self.channels.records.send(ImageRecord { draft, bytes }).map_err(|_| ()),
            Err(reason) => self.channels.rows.send(draft.fail(Stage::Source, reason).into()).map_err(|_| ()),
        };
    }

    /// Ends the shard, unless the run is being stopped: then it is not whole.
    fn end(&mut self, identity: String) {
        let Some(shard) = self.shard.take() else { return };
        if self.is_stopped() {
            self.is_cut_short = true;
            return;
        }
        let message = Message::ShardEnded { shard, num_rows: self.num_rows, identity: Some(identity) };
        let _ = self.channels.rows.send(message);
    }

    /// Leaves a shard that cannot be read to its end: it is not kept.
    fn abandon(&mut self) {
        let Some(shard) = self.shard.take() else { return };
        let _ = self.channels.rows.send(Message::ShardEnded { shard, num_rows: self.num_rows, identity: None });
    }

    /// Reads a file, within the size limit.
    fn read_file(&self, path: &Path) -> Result<Vec<u8>, String> {
        let reason = |error: std::io::Error| error.to_string();
        let metadata = std::fs::metadata(path).map_err(reason)?;
        // A pipe would keep the run waiting, and a device never end.
        if !metadata.is_file() {
            return Err("not a file".to_owned());
        }
        self.check_size(metadata.len())?;
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        let file = File::open(path).map_err(reason)?;
        file.take(self.limits.max_image_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(reason)?;
        self.check_size(bytes.len() as u64)?;
        Ok(bytes)
    }

    fn check_size(&self, size: u64) -> Result<(), String> {
        if size > self.limits.max_image_bytes {
            let max_bytes = self.limits.max_image_bytes;
            return Err(format!("{size} bytes is over the limit of {max_bytes} (--max-image-bytes)"));
        }
        Ok(())
    }
}

/// Cuts a stream of files into shards `{name}-{00000}`.
struct FileShards {
    name: String,
    num_shards: usize,
    /// Files of the present shard so far, and the hash of their keys.
    num_files: usize,
    keys: Sha256,
    /// The present shard if it is written already.
    finished: Option<FinishedShard>,
}

impl FileShards {
    fn new(name: String) -> Self {
        Self { name, num_shards: 0, num_files: 0, keys: Sha256::new(), finished: None }
    }

    fn push(&mut self, emitter: &mut Emitter<'_>, path: &Path, key: String) -> Result<()> {
        if self.num_files == 0 {
            self.finished = emitter.begin(&format!("{}-{:05}", self.name, self.num_shards));
            self.num_shards += 1;
        }
        self.num_files += 1;
        self.keys.update(&key);
        self.keys.update([0]);
        if self.finished.is_some() {
            emitter.skip(1);
        } else {
            let bytes = emitter.read_file(path);
            let input = InputColumns { key, source: path.display().to_string(), ..InputColumns::default() };
            emitter.push(input, bytes);
        }
        if self.num_files == FILES_PER_SHARD { self.end(emitter) } else { Ok(()) }
    }

    /// # Errors
    /// [`Error::Input`] when the shard was written from other files: some would be passed over.
    fn end(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        let num_files = std::mem::take(&mut self.num_files);
        let identity = hex(&self.keys.finalize_reset());
        match self.finished.take() {
            Some(finished) if !emitter.is_stopped() => {
                let is_same_count = finished.counts.rows == num_files as u64;
                let is_same = finished.identity.as_ref().is_none_or(|known| *known == identity);
                if is_same_count && is_same {
                    return Ok(());
                }
                Err(other_input(&self.name, &format!("{}-{:05}", self.name, self.num_shards - 1)))
            }
            Some(_) => Ok(()),
            None => {
                emitter.end(identity);
                Ok(())
            }
        }
    }
}

/// The output holds a shard of this name that was made from other images.
fn other_input(input: &str, shard: &str) -> Error {
    Error::Input {
        input: input.to_owned(),
        reason: format!("the output has shard `{shard}` of other images"),
        hint: "images were added, removed or reordered since; choose another --out, or start anew with --overwrite",
    }
}

/// Name of a file or folder, for shards: as typed, so that a link keeps its own.
fn stem(path: &Path) -> String {
    let named = match path.file_name() {
        Some(_) => path.to_owned(),
        None => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
    };
    named.file_name().map_or_else(|| IMAGES.to_owned(), |name| name.to_string_lossy().into_owned())
}
