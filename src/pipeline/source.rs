//! Source: inputs to `ImageRecord`s, in input order, with what the input says about each image.
//!
//! Cuts the inputs into shards, skips those that are written already, and tells the write stage how many rows each
//! shard has. An image that cannot be read is a failed row; an input that cannot be read on is
//! reported, and the others go on.

mod emitter;
mod folder;
mod identity;
pub mod limits;
mod parquet;
mod tar;

use std::collections::VecDeque;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use crossbeam::channel::{RecvTimeoutError, Sender, bounded};
use recaption_export::hex;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::pipeline::input::Input;
use crate::pipeline::row::{InputColumns, Message, RowDraft};
use crate::pipeline::source::emitter::{Emitter, read_file};
use crate::pipeline::source::limits::SourceLimits;
use crate::pipeline::write::output::Output;
use crate::storage::{Failure, Location, Object, PendingRead};

/// Rows of a shard that is made of single files.
const FILES_PER_SHARD: usize = 10_000;
/// How often a stage that waits for standard input looks at the stop flags.
const STOP_INTERVAL: Duration = Duration::from_millis(100);
/// Most single objects that are read ahead of their turn.
const MAX_READS_AHEAD: usize = 16;
/// Name of the shards made of single files that no folder names.
const IMAGES: &str = "images";

/// An image as read: its row and its bytes.
pub(crate) struct ImageRecord {
    pub(crate) draft: RowDraft,
    pub(crate) bytes: Bytes,
}

/// What the source stage needs to know.
pub(crate) struct SourceOptions<'a> {
    pub(crate) inputs: Vec<Input>,
    /// The output folder, which knows the shards that are written already; none for standard output.
    pub(crate) output: Option<&'a Output>,
    /// The share of the shards that this run does.
    pub(crate) part: Option<Part>,
    /// Most images to take, over all inputs.
    pub(crate) limit: Option<usize>,
    /// What the inputs may cost.
    pub(crate) limits: SourceLimits,
    /// The column of Parquet inputs that holds the images, where it cannot be told by itself.
    pub(crate) image_column: Option<String>,
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
    /// Shards that other processes have, and had again at the end.
    pub(crate) busy: Vec<String>,
}

/// A share of the shards, for processes that do not talk to one another: `--part I/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which one, from 0.
    index: usize,
    count: usize,
}

impl Part {
    /// Whether the shard of this number is in it.
    fn has(self, number: usize) -> bool {
        number % self.count == self.index
    }
}

impl FromStr for Part {
    type Err = String;

    /// `I/N`, from 1 to N.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match numbers {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Self { index: index - 1, count }),
            _ => Err(format!("expected I/N with I from 1 to N, such as 2/8, got `{text}`")),
        }
    }
}

/// Reads all inputs; those with shards that other processes had, once more at the end.
///
/// # Errors
/// [`Error::Input`] when a shard of the output was made from another input, [`Error::Io`] when standard input fails.
pub(crate) fn run(options: SourceOptions<'_>, channels: SourceChannels<'_>) -> Result<SourceReport> {
    let mut emitter = Emitter::new(&options, channels);
    let mut damaged = Vec::new();
    read_all(&options, &mut emitter, &mut damaged)?;
    let mut busy = emitter.take_busy();
    if !busy.is_empty() && options.limit.is_none() && !options.inputs.contains(&Input::StandardInput) {
        // Their process may have ended meanwhile, well or not.
        if let Some(output) = options.output {
            output.wait_for_others(|| emitter.is_done())?;
        }
        let num_damaged = damaged.len();
        read_all(&options, &mut emitter, &mut damaged)?;
        damaged.truncate(num_damaged);
        busy = emitter.take_busy();
    }
    Ok(SourceReport { damaged, is_cut_short: emitter.is_cut_short(), busy })
}

fn read_all(options: &SourceOptions<'_>, emitter: &mut Emitter<'_>, damaged: &mut Vec<Error>) -> Result<()> {
    let image_column = options.image_column.as_deref();
    let mut loose = FileShards::new(IMAGES.to_owned());
    let mut first_loose = None;
    for (index, input) in options.inputs.iter().enumerate() {
        if emitter.is_done() {
            break;
        }
        let is_loose = matches!(input, Input::Image(_) | Input::StandardInput);
        match (is_loose, loose.num_files) {
            (true, 0) => emitter.enter_input(*first_loose.get_or_insert(index), loose.num_shards),
            (true, _) => {}
            (false, _) => {
                loose.end(emitter)?;
                emitter.enter_input(index, 0);
            }
        }
        match input {
            Input::Image(location) => loose.push(emitter, location.clone(), location.to_string())?,
            Input::StandardInput => {
                let mut is_empty = true;
                for line in standard_input_lines(emitter.stop_flags()) {
                    let Some(line) = line.map_err(Error::io("read", Path::new("standard input")))? else {
                        // Whoever writes the list may wait for these rows first.
                        loose.flush(emitter)?;
                        continue;
                    };
                    let line = line.strip_suffix(b"\r").unwrap_or(&line);
                    if !line.is_empty() {
                        is_empty = false;
                        let location = listed(line)?;
                        let key = match &location {
                            Location::Local(_) => String::from_utf8_lossy(line).into_owned(),
                            Location::Object(_) => location.to_string(),
                        };
                        loose.push(emitter, location, key)?;
                    }
                    if emitter.is_done() {
                        break;
                    }
                }
                if is_empty && !emitter.is_done() {
                    damaged.push(Error::Input {
                        input: "-".to_owned(),
                        reason: "standard input named no image".to_owned(),
                        hint: "pipe in paths or URLs of images, one a line: find DIR -name '*.jpg' | recaption run - ...",
                    });
                }
            }
            Input::Folder(location) => damaged.extend(folder::run(location, emitter)?),
            Input::Tar(location) => damaged.extend(tar::run(location, emitter)?),
            Input::Parquet(location) => damaged.extend(parquet::run(location, image_column, emitter)?),
        }
    }
    loose.end(emitter)
}

/// Lines of standard input, until its end or a stop flag, and `None` now and then while none comes. A thread of its own reads them: a pipe that stays silent must
/// not keep the run from ending.
fn standard_input_lines(stop: [&AtomicBool; 2]) -> impl Iterator<Item = std::io::Result<Option<Vec<u8>>>> {
    let (sender, lines) = bounded(64);
    let read = move || {
        let mut lines = std::io::stdin().lock().split(b'\n');
        while lines.next().is_some_and(|line| sender.send(line).is_ok()) {}
    };
    let started = std::thread::Builder::new().name("stdin".to_owned()).spawn(read);
    let mut failure = started.err().map(Err);
    std::iter::from_fn(move || {
        if let Some(failure) = failure.take() {
            return Some(failure);
        }
        match lines.recv_timeout(STOP_INTERVAL) {
            Ok(line) => Some(line.map(Some)),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) if stop.iter().any(|stop| stop.load(Ordering::Relaxed)) => None,
            Err(RecvTimeoutError::Timeout) => Some(Ok(None)),
        }
    })
}

/// What a line of standard input names: a URL, or a path.
fn listed(line: &[u8]) -> Result<Location> {
    match std::str::from_utf8(line) {
        Ok(text) if text.contains("://") => Location::parse(text),
        _ => Ok(Location::Local(path_of(line))),
    }
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
            Input::Folder(location) => folder::count_images(location),
            Input::Tar(location) => tar::count_images(location),
            Input::Parquet(location) => parquet::count_images(location),
        })
        .sum()
}

/// Cuts a stream of files into shards `{name}-{00000}`.
struct FileShards {
    name: String,
    num_shards: usize,
    /// Files of the present shard so far, and the hash of their keys.
    num_files: usize,
    keys: Sha256,
    /// Objects whose turn has not come, but whose bytes may be on their way.
    ahead: VecDeque<(Object, String, Option<PendingRead>)>,
}

impl FileShards {
    fn new(name: String) -> Self {
        Self { name, num_shards: 0, num_files: 0, keys: Sha256::new(), ahead: VecDeque::new() }
    }

    /// Takes an image. Objects wait until some more are asked for.
    ///
    /// # Errors
    /// As those of [`Emitter::begin`], [`Emitter::push`] and [`Emitter::end`]; [`Error::Storage`] when a bucket gives no
    /// answer.
    fn push(&mut self, emitter: &mut Emitter<'_>, location: Location, key: String) -> Result<()> {
        let object = match location {
            Location::Local(path) => {
                self.flush(emitter)?;
                let max_bytes = emitter.max_image_bytes();
                return self.send(emitter, key, path.display().to_string(), || Ok(read_file(&path, max_bytes)));
            }
            Location::Object(object) => object,
        };
        // Whether the bytes are wanted is known within the present shard only.
        let place = self.num_files + self.ahead.len();
        let is_wanted = self.num_files > 0 && place < FILES_PER_SHARD && emitter.wants_bytes_after(self.ahead.len());
        let pending = if is_wanted { Some(object.read_ahead(emitter.max_image_bytes())?) } else { None };
        self.ahead.push_back((object, key, pending));
        // The first image opens the shard, which tells what is wanted of it.
        if self.num_files == 0 || self.ahead.len() > MAX_READS_AHEAD { self.send_first(emitter) } else { Ok(()) }
    }

    /// Sends what waits.
    fn flush(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        while !self.ahead.is_empty() && !emitter.is_done() {
            self.send_first(emitter)?;
        }
        Ok(())
    }

    fn send_first(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        let Some((object, key, pending)) = self.ahead.pop_front() else { return Ok(()) };
        let max_bytes = emitter.max_image_bytes();
        let source = object.to_string();
        self.send(emitter, key, source, || {
            let pending = pending.map_or_else(|| object.read_ahead(max_bytes), Ok)?;
            or_failed_row(&Location::Object(object), pending.wait())
        })
    }

    /// Sends an image in its turn; `read` is called where the bytes are wanted, its inner error is a failed row's reason.
    fn send(
        &mut self,
        emitter: &mut Emitter<'_>,
        key: String,
        source: String,
        read: impl FnOnce() -> Result<Result<Bytes, String>>,
    ) -> Result<()> {
        if self.num_files == 0 {
            // Written or not, the files are counted and their keys hashed: only then is it known whether they are the same.
            emitter.begin(&format!("{}-{:05}", self.name, self.num_shards), None)?;
            self.num_shards += 1;
        }
        self.num_files += 1;
        self.keys.update(&key);
        self.keys.update([0]);
        let bytes = if emitter.wants_bytes() { read()? } else { Err("not read".to_owned()) };
        emitter.push(InputColumns { key, source, ..InputColumns::default() }, || bytes)?;
        if self.num_files == FILES_PER_SHARD { self.finish(emitter) } else { Ok(()) }
    }

    /// Sends what waits, and ends the present shard.
    ///
    /// # Errors
    /// As [`FileShards::push`]'s.
    fn end(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        self.flush(emitter)?;
        self.finish(emitter)
    }

    /// # Errors
    /// As [`Emitter::end`]'s: some files would be passed over.
    fn finish(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        if std::mem::take(&mut self.num_files) == 0 {
            return Ok(());
        }
        emitter.end(&hex(&self.keys.finalize_reset()))
    }
}

/// What the reading of an object brought; the inner error is the reason of a failed row.
///
/// # Errors
/// [`Error::Storage`] when a bucket gives no answer at all: rows would fail by the million. A web server is one of many.
fn or_failed_row(location: &Location, read: Result<Bytes>) -> Result<Result<Bytes, String>> {
    Ok(match read {
        Ok(bytes) => Ok(bytes),
        Err(Error::Storage { failure: Failure::TooLarge, reason, .. }) => Err(format!("{reason} (--max-image-bytes)")),
        Err(Error::Storage { failure: Failure::NotFound, .. }) => Err("no such object".to_owned()),
        Err(error) if location.is_writable() => return Err(error),
        Err(error) => Err(error.to_string()),
    })
}

/// Refuses inputs without images before anything is loaded: of Parquet files the first is looked at, and folders where there is
/// nothing else. Beside other inputs an empty folder is told at the end.
///
/// # Errors
/// [`Error::Input`] with the reason, [`Error::Setting`] when there is a column for none of `inputs`.
pub(crate) fn check(inputs: &[Input], image_column: Option<&str>) -> Result<()> {
    let first = inputs.iter().find_map(|input| match input {
        Input::Parquet(location) => Some(location),
        _ => None,
    });
    if let Some(location) = first {
        return parquet::check(location, image_column);
    }
    if let Some(column) = image_column
        && !inputs.contains(&Input::StandardInput)
    {
        return Err(Error::Setting {
            reason: format!("--image-column `{column}` is for Parquet files, and none of the inputs is one"),
            hint: "leave it out, or name a .parquet file".to_owned(),
        });
    }
    let is_empty = |input: &Input| matches!(input, Input::Folder(Location::Local(path)) if folder::is_empty(path));
    match inputs {
        [Input::Folder(first), ..] if inputs.iter().all(is_empty) => Err(folder::no_image(first)),
        _ => Ok(()),
    }
}

/// Name of a file or folder, for shards: as typed, so that a link keeps its own.
fn stem(location: &Location) -> String {
    let path = match location {
        Location::Local(path) => path,
        Location::Object(_) => {
            return Some(location.file_name()).filter(|name| !name.is_empty()).unwrap_or_else(|| IMAGES.to_owned());
        }
    };
    let named = match path.file_name() {
        Some(_) => path.clone(),
        None => path.canonicalize().unwrap_or_else(|_| path.clone()),
    };
    named.file_name().map_or_else(|| IMAGES.to_owned(), |name| name.to_string_lossy().into_owned())
}
