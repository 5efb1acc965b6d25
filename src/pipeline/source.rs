//! Source: inputs to [`ImageRecord`]s, in input order, with what the input says about each image.
//!
//! Cuts the inputs into shards, skips those that are written already, and tells the write stage how many rows each
//! shard has. An image that cannot be read is a failed row; an input that cannot be read on ends the run.

mod folder;
mod tar;

use std::collections::HashMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::Sender;

use crate::error::{Error, Result};
use crate::pipeline::input::Input;
use crate::pipeline::row::{InputColumns, Message, RowDraft, Shard};
use crate::stage::Stage;

/// Rows of a shard that is made of single files.
const FILES_PER_SHARD: usize = 10_000;
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
    /// Rows of the shards that are written already, by name.
    pub(crate) finished: HashMap<String, usize>,
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

/// Reads all inputs.
///
/// # Errors
/// [`Error::Io`] or [`Error::Input`] when an input cannot be read on.
pub(crate) fn run(options: SourceOptions, channels: SourceChannels<'_>) -> Result<()> {
    let mut emitter = Emitter {
        channels,
        finished: options.finished,
        remaining: options.limit.unwrap_or(usize::MAX),
        max_image_bytes: options.max_image_bytes,
        names: HashMap::new(),
        num_shards: 0,
        shard: None,
        num_rows: 0,
    };
    let mut loose = FileShards::new(IMAGES.to_owned());
    for input in options.inputs {
        if emitter.is_done() {
            break;
        }
        match input {
            Input::Image(path) => loose.push(&mut emitter, &path, path.display().to_string())?,
            Input::StandardInput => {
                for line in std::io::stdin().lock().split(b'\n') {
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
                folder::run(&path, &mut emitter)?;
            }
            Input::Tar(path) => {
                loose.end(&mut emitter)?;
                tar::run(&path, &mut emitter)?;
            }
        }
    }
    loose.end(&mut emitter)
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
    finished: HashMap<String, usize>,
    remaining: usize,
    max_image_bytes: u64,
    /// Times each shard name was used.
    names: HashMap<String, usize>,
    num_shards: usize,
    shard: Option<Arc<Shard>>,
    /// Rows of the shard so far.
    num_rows: usize,
}

impl Emitter<'_> {
    /// Whether nothing more is wanted.
    fn is_done(&self) -> bool {
        self.remaining == 0 || self.is_stopped()
    }

    fn is_stopped(&self) -> bool {
        self.channels.stop.iter().any(|stop| stop.load(Ordering::Relaxed))
    }

    /// Starts a shard. Returns the rows of the shard when it is written already and needs no reading.
    fn begin(&mut self, name: &str) -> Option<usize> {
        let uses = self.names.entry(name.to_owned()).or_insert(0);
        *uses += 1;
        let name = if *uses == 1 { name.to_owned() } else { format!("{name}-{uses}") };
        let num_rows = self.finished.get(&name).copied();
        self.shard = num_rows.is_none().then(|| Arc::new(Shard { index: self.num_shards, name }));
        self.num_shards += 1;
        self.num_rows = 0;
        num_rows
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
    fn end(&mut self) {
        let Some(shard) = self.shard.take().filter(|_| !self.is_stopped()) else { return };
        let _ = self.channels.rows.send(Message::ShardEnded { shard, num_rows: self.num_rows });
    }

    /// Reads a file, within the size limit.
    fn read_file(&self, path: &Path) -> Result<Vec<u8>, String> {
        let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
        self.check_size(size)?;
        std::fs::read(path).map_err(|error| error.to_string())
    }

    fn check_size(&self, size: u64) -> Result<(), String> {
        if size > self.max_image_bytes {
            return Err(format!("{size} bytes is over the limit of {} (--max-image-bytes)", self.max_image_bytes));
        }
        Ok(())
    }
}

/// Cuts a stream of files into shards `{name}-{00000}`.
struct FileShards {
    name: String,
    num_shards: usize,
    /// Files of the present shard so far.
    num_files: usize,
    /// Rows of the present shard if it is written already.
    written: Option<usize>,
}

impl FileShards {
    fn new(name: String) -> Self {
        Self { name, num_shards: 0, num_files: 0, written: None }
    }

    fn push(&mut self, emitter: &mut Emitter<'_>, path: &Path, key: String) -> Result<()> {
        if self.num_files == 0 {
            self.written = emitter.begin(&format!("{}-{:05}", self.name, self.num_shards));
            self.num_shards += 1;
        }
        self.num_files += 1;
        if self.written.is_some() {
            emitter.skip(1);
        } else {
            let bytes = emitter.read_file(path);
            let input = InputColumns { key, source: path.display().to_string(), ..InputColumns::default() };
            emitter.push(input, bytes);
        }
        if self.num_files == FILES_PER_SHARD { self.end(emitter) } else { Ok(()) }
    }

    /// # Errors
    /// [`Error::Input`] when a shard that is written has another number of files now: some would be passed over.
    fn end(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        let num_files = std::mem::take(&mut self.num_files);
        if num_files == 0 {
            return Ok(());
        }
        match self.written.take() {
            Some(written) if written != num_files && !emitter.is_stopped() => Err(Error::Input {
                input: self.name.clone(),
                reason: format!(
                    "the output has {written} rows of shard `{}-{:05}`, which is {num_files} images now",
                    self.name,
                    self.num_shards - 1
                ),
                hint: "images were added or removed since; choose another --out, or start anew with --overwrite",
            }),
            Some(_) => Ok(()),
            None => {
                emitter.end();
                Ok(())
            }
        }
    }
}

/// Name of a file or folder, for shards.
fn stem(path: &Path) -> String {
    let absolute: PathBuf = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    absolute.file_name().map_or_else(|| IMAGES.to_owned(), |name| name.to_string_lossy().into_owned())
}
