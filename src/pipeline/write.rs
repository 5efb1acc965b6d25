//! Write: token ids to rows. Detokenizes, puts rows back into input order, and commits a file per shard.
//!
//! Rows wait here until their shard is whole (files) or the rows before them are out (standard output). A shard's file
//! is written under a temporary name and renamed, so that a file that is there is whole.

mod jsonl;
mod parquet;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam::channel::Receiver;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Tokenizer;
use crate::pipeline::progress::Progress;
use crate::pipeline::row::{Message, Row, Shard};
use crate::stage::Stage;

pub use self::jsonl::row_to_json;

/// Format of the files of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One Parquet file per shard, zstd.
    #[default]
    Parquet,
    /// One JSON object a line.
    Jsonl,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Jsonl => "jsonl",
        }
    }
}

/// Where rows go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// A file per shard in this folder.
    Folder {
        /// The output folder.
        folder: PathBuf,
        /// Format of the files.
        format: Format,
    },
    /// JSON objects to standard output, one a line, in input order.
    StandardOutput,
}

impl Sink {
    /// Path of a shard's file; `None` for standard output.
    fn path(&self, shard: &str) -> Option<PathBuf> {
        match self {
            Self::Folder { folder, format } => Some(folder.join(format!("captions-{shard}.{}", format.extension()))),
            Self::StandardOutput => None,
        }
    }
}

/// Counts of rows, also stored with each shard's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows, failed ones too.
    pub rows: u64,
    /// Rows with a caption.
    pub ok: u64,
    /// Rows without.
    pub failed: u64,
    /// Prompt tokens of the rows with a caption, image tokens included.
    pub prompt_tokens: u64,
    /// New tokens, stop tokens not counted.
    pub new_tokens: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.ok += other.ok;
        self.failed += other.failed;
        self.prompt_tokens += other.prompt_tokens;
        self.new_tokens += other.new_tokens;
    }
}

/// A row in the form it is written: the columns of the output.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WrittenRow {
    /// Tar stem, or path below the folder.
    pub key: String,
    /// As the input has it.
    pub url: Option<String>,
    /// As the input has it.
    pub org_caption: Option<String>,
    /// As the input has it.
    pub sha256: Option<String>,
    /// As the input has it.
    pub uid: Option<String>,
    /// The new caption.
    pub re_caption: Option<String>,
    /// Words of the original caption.
    pub org_length: Option<i64>,
    /// Words of the new caption.
    pub re_length: Option<i64>,
    /// Not scored yet.
    pub org_clip_score: Option<f64>,
    /// Not scored yet.
    pub re_clip_score: Option<f64>,
    /// Not judged yet.
    pub org_gpt4v_score: Option<i64>,
    /// Not judged yet.
    pub re_gpt4v_score: Option<i64>,
    /// `ok` or `failed`.
    pub status: &'static str,
    /// `stage: reason`.
    pub error: Option<String>,
    /// `stop` or `length`.
    pub finish_reason: Option<&'static str>,
    /// New tokens, the stop token not counted.
    pub num_tokens: Option<i64>,
    /// Of the image as stored.
    pub width: Option<i32>,
    /// Of the image as stored.
    pub height: Option<i32>,
    /// Of the image bytes as read.
    pub image_sha256: Option<String>,
    /// The input file.
    pub source: String,
    /// The rest of the sidecar, as JSON.
    pub metadata: Option<String>,
    /// New ids, a column with `--with-token-ids` only.
    #[serde(skip)]
    pub token_ids: Option<Vec<i64>>,
}

/// What the write stage needs to know.
pub(crate) struct WriteOptions {
    pub(crate) sink: Sink,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) with_token_ids: bool,
    /// Prompt tokens of each caption.
    pub(crate) prompt_tokens: usize,
}

/// Writes rows until the channel is closed and empty. Returns the counts of what was committed, and how many rows of
/// unfinished shards were not.
///
/// # Errors
/// The disk's; everything committed before stays.
pub(crate) fn run(options: &WriteOptions, rows: &Receiver<Message>, progress: &Progress) -> Result<(Counts, u64)> {
    let mut writer =
        Writer { options, shards: BTreeMap::new(), num_printed_shards: 0, committed: Counts::default(), num_lost: 0 };
    for message in rows {
        Stage::Write.enter();
        let index = match message {
            Message::Row(row) => {
                let (shard, index) = (row.draft.shard.index, row.draft.index);
                let row = detokenize(*row, options)?;
                progress.add_row(row.status == "ok");
                writer.shards.entry(shard).or_default().rows.insert(index, row);
                shard
            }
            Message::ShardEnded { shard, num_rows, identity } => {
                let index = shard.index;
                writer.shards.entry(index).or_default().ended = Some(EndedShard { shard, num_rows, identity });
                index
            }
        };
        match &options.sink {
            Sink::StandardOutput => writer.print_ready()?,
            Sink::Folder { format, .. } => writer.commit_if_whole(index, *format)?,
        }
    }
    let num_pending: usize = writer.shards.values().map(|shard| shard.rows.len()).sum();
    Ok((writer.committed, writer.num_lost + num_pending as u64))
}

/// The shards that are being filled.
struct Writer<'a> {
    options: &'a WriteOptions,
    shards: BTreeMap<usize, PendingShard>,
    /// Shards that are out, on standard output.
    num_printed_shards: usize,
    committed: Counts,
    /// Rows of shards that could not be kept.
    num_lost: u64,
}

/// Rows that wait for the rest of their shard.
#[derive(Default)]
struct PendingShard {
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

impl Writer<'_> {
    /// Writes the file of a shard whose rows are all there.
    fn commit_if_whole(&mut self, index: usize, format: Format) -> Result<()> {
        let Some(PendingShard { rows, ended: Some(ended), .. }) = self.shards.get(&index) else { return Ok(()) };
        if rows.len() < ended.num_rows {
            return Ok(());
        }
        let Some(PendingShard { rows, ended: Some(ended), .. }) = self.shards.remove(&index) else { return Ok(()) };
        if ended.identity.is_none() {
            self.num_lost += rows.len() as u64;
            return Ok(());
        }
        let rows: Vec<WrittenRow> = rows.into_values().collect();
        let counts = count(&rows, self.options);
        let path = self.options.sink.path(&ended.shard.name).expect("bug: a folder has paths");
        match format {
            Format::Parquet => {
                let finished = FinishedShard { counts, identity: ended.identity };
                parquet::write(&path, &rows, &finished, self.options.with_token_ids)?;
            }
            Format::Jsonl => jsonl::write(&path, &rows, self.options.with_token_ids)?,
        }
        self.committed.add(counts);
        Ok(())
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
            self.committed.add(count(&ready, self.options));
            jsonl::print(&ready, self.options.with_token_ids)?;
            if !is_over {
                break;
            }
            self.shards.remove(&self.num_printed_shards);
            self.num_printed_shards += 1;
        }
        Ok(())
    }
}

fn detokenize(row: Row, options: &WriteOptions) -> Result<WrittenRow> {
    let Row { draft, outcome } = row;
    let num_words = |text: &str| text.split_whitespace().count() as i64;
    let dimension = |side: u32| i32::try_from(side).unwrap_or(i32::MAX);
    let (generated, failure) = match outcome {
        Ok(generated) => (Some(generated), None),
        Err(failure) => (None, Some(failure)),
    };
    let re_caption = match &generated {
        Some(generated) => Some(options.tokenizer.decode(&generated.token_ids)?.trim().to_owned()),
        None => None,
    };
    Ok(WrittenRow {
        org_length: draft.input.org_caption.as_deref().map(num_words),
        re_length: re_caption.as_deref().map(num_words),
        re_caption,
        org_clip_score: None,
        re_clip_score: None,
        org_gpt4v_score: None,
        re_gpt4v_score: None,
        status: if failure.is_none() { "ok" } else { "failed" },
        error: failure.map(|failure| format!("{}: {}", failure.stage, failure.reason)),
        finish_reason: generated.as_ref().map(|generated| generated.finish_reason.name()),
        num_tokens: generated.as_ref().map(|generated| generated.token_ids.len() as i64),
        width: draft.dimensions.map(|(width, _)| dimension(width)),
        height: draft.dimensions.map(|(_, height)| dimension(height)),
        image_sha256: draft.image_sha256,
        token_ids: generated
            .filter(|_| options.with_token_ids)
            .map(|generated| generated.token_ids.into_iter().map(i64::from).collect()),
        key: draft.input.key,
        url: draft.input.url,
        org_caption: draft.input.org_caption,
        sha256: draft.input.sha256,
        uid: draft.input.uid,
        source: draft.input.source,
        metadata: draft.input.metadata,
    })
}

fn count(rows: &[WrittenRow], options: &WriteOptions) -> Counts {
    let ok = rows.iter().filter(|row| row.status == "ok").count() as u64;
    Counts {
        rows: rows.len() as u64,
        ok,
        failed: rows.len() as u64 - ok,
        prompt_tokens: ok * options.prompt_tokens as u64,
        new_tokens: rows.iter().filter_map(|row| row.num_tokens).sum::<i64>() as u64,
    }
}

/// A shard whose file is in the output folder already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FinishedShard {
    pub(crate) counts: Counts,
    /// Tells its input from another of the same name; JSON Lines files do not keep it.
    pub(crate) identity: Option<String>,
}

/// The shards whose files are in the folder already, by name.
///
/// # Errors
/// When the folder or one of the files cannot be read.
pub(crate) fn finished_shards(sink: &Sink, prompt_tokens: usize) -> Result<HashMap<String, FinishedShard>> {
    let Sink::Folder { folder, format } = sink else { return Ok(HashMap::new()) };
    let mut finished = HashMap::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let shard = name.strip_prefix("captions-").and_then(|name| name.strip_suffix(format.extension()));
        let Some(shard) = shard.and_then(|shard| shard.strip_suffix('.')) else { continue };
        let shard_finished = match format {
            Format::Parquet => parquet::read_finished(&path)?,
            Format::Jsonl => FinishedShard { counts: jsonl::read_counts(&path, prompt_tokens)?, identity: None },
        };
        finished.insert(shard.to_owned(), shard_finished);
    }
    Ok(finished)
}

/// Writes a file under a temporary name in the same folder, syncs it and renames it to `path`.
pub(crate) fn write_atomically<T>(path: &Path, write: impl FnOnce(&mut std::fs::File) -> Result<T>) -> Result<T> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let mut file = std::fs::File::create(&temporary).map_err(Error::io("create", &temporary))?;
    let result = write(&mut file)?;
    file.sync_all().map_err(Error::io("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(Error::io("rename to", path))?;
    Ok(result)
}
