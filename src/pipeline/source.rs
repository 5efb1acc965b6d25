//! Source: inputs to [`ImageRecord`]s, in input order, with what the input says about each image.
//!
//! Cuts the inputs into shards, skips those that are written already, and tells the write stage how many rows each
//! shard has. An image that cannot be read is a failed row; an input that cannot be read on is
//! reported, and the others go on.

mod emitter;
mod folder;
mod tar;

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
use crate::pipeline::write::output::Output;

/// Rows of a shard that is made of single files.
const FILES_PER_SHARD: usize = 10_000;
/// How often a stage that waits for standard input looks at the stop flags.
const STOP_INTERVAL: Duration = Duration::from_millis(100);
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
    /// Largest image file that is read.
    pub(crate) max_image_bytes: u64,
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
    read_all(&options.inputs, &mut emitter, &mut damaged)?;
    let mut busy = emitter.take_busy();
    if !busy.is_empty() && options.limit.is_none() && !options.inputs.contains(&Input::StandardInput) {
        // Their process may have ended meanwhile, well or not.
        let num_damaged = damaged.len();
        read_all(&options.inputs, &mut emitter, &mut damaged)?;
        damaged.truncate(num_damaged);
        busy = emitter.take_busy();
    }
    Ok(SourceReport { damaged, is_cut_short: emitter.is_cut_short(), busy })
}

fn read_all(inputs: &[Input], emitter: &mut Emitter<'_>, damaged: &mut Vec<Error>) -> Result<()> {
    let mut loose = FileShards::new(IMAGES.to_owned());
    let mut first_loose = None;
    for (index, input) in inputs.iter().enumerate() {
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
            Input::Image(path) => loose.push(emitter, path, path.display().to_string())?,
            Input::StandardInput => {
                for line in standard_input_lines(emitter.stop_flags()) {
                    let line = line.map_err(Error::io("read", Path::new("standard input")))?;
                    let line = line.strip_suffix(b"\r").unwrap_or(&line);
                    if !line.is_empty() {
                        loose.push(emitter, &path_of(line), String::from_utf8_lossy(line).into_owned())?;
                    }
                    if emitter.is_done() {
                        break;
                    }
                }
            }
            Input::Folder(path) => damaged.extend(folder::run(path, emitter)?),
            Input::Tar(path) => damaged.extend(tar::run(path, emitter)?),
        }
    }
    loose.end(emitter)
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

/// Cuts a stream of files into shards `{name}-{00000}`.
struct FileShards {
    name: String,
    num_shards: usize,
    /// Files of the present shard so far, and the hash of their keys.
    num_files: usize,
    keys: Sha256,
}

impl FileShards {
    fn new(name: String) -> Self {
        Self { name, num_shards: 0, num_files: 0, keys: Sha256::new() }
    }

    /// # Errors
    /// As those of [`Emitter::begin`], [`Emitter::push`] and [`Emitter::end`].
    fn push(&mut self, emitter: &mut Emitter<'_>, path: &Path, key: String) -> Result<()> {
        if self.num_files == 0 {
            // Written or not, the files are counted and their keys hashed: only then is it known whether they are the same.
            emitter.begin(&format!("{}-{:05}", self.name, self.num_shards), None)?;
            self.num_shards += 1;
        }
        self.num_files += 1;
        self.keys.update(&key);
        self.keys.update([0]);
        let input = InputColumns { key, source: path.display().to_string(), ..InputColumns::default() };
        let max_bytes = emitter.max_image_bytes();
        emitter.push(input, || read_file(path, max_bytes))?;
        if self.num_files == FILES_PER_SHARD { self.end(emitter) } else { Ok(()) }
    }

    /// # Errors
    /// As [`Emitter::end`]'s: some files would be passed over.
    fn end(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        if std::mem::take(&mut self.num_files) == 0 {
            return Ok(());
        }
        emitter.end(&hex(&self.keys.finalize_reset()))
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
