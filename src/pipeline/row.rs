//! A row of the output, from the moment its image is met until it is written. Every image that the source counts
//! becomes exactly one row, whatever happens to it on the way.

use std::fmt::Display;
use std::sync::Arc;

use bytes::Bytes;

use crate::model::sequence::FinishReason;
use crate::pipeline::write::output::OpenShard;
use crate::profile::recorder::ImageTimes;
use crate::stage::Stage;

/// A unit of output: the rows of one tar, or of up to 10,000 files.
#[derive(Debug, PartialEq, Eq)]
pub struct Shard {
    /// Place among the shards of this run.
    pub index: usize,
    /// Name within the output: `captions-{name}.parquet`.
    pub name: String,
}

/// What the input says about an image, untouched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InputColumns {
    /// Tar stem, or path below the folder.
    pub key: String,
    /// The input file.
    pub source: String,
    /// Where the image was downloaded from.
    pub url: Option<String>,
    /// The caption it came with.
    pub org_caption: Option<String>,
    /// The input's own hash: img2dataset's is of the bytes as downloaded.
    pub sha256: Option<String>,
    /// DataComp's id.
    pub uid: Option<String>,
    /// The rest of the sidecar, as JSON.
    pub metadata: Option<String>,
}

/// A row on its way.
#[derive(Clone, Debug)]
pub struct RowDraft {
    /// The shard it belongs to.
    pub shard: Arc<Shard>,
    /// Its place in the shard.
    pub index: usize,
    /// What the input says.
    pub input: InputColumns,
    /// Width and height of the image as stored.
    pub dimensions: Option<(u32, u32)>,
    /// SHA-256 of the image bytes as read.
    pub image_sha256: Option<String>,
    /// When it passed from stage to stage.
    pub times: ImageTimes,
    /// The bytes as read, where the output has them too.
    pub image: Option<Bytes>,
}

impl RowDraft {
    /// Ends the row as failed.
    pub(crate) fn fail(self, stage: Stage, reason: impl Display) -> Row {
        Row { draft: self, outcome: Err(Failure { stage, reason: reason.to_string() }) }
    }
}

/// A finished row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was known before the caption.
    pub draft: RowDraft,
    /// The caption's ids, or why there is none.
    pub outcome: Result<Generated, Failure>,
}

/// What the decoder made.
#[derive(Clone, Debug)]
pub struct Generated {
    /// New ids, without the stop token.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Why a row has no caption.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Where it failed.
    pub stage: Stage,
    /// Why.
    pub reason: String,
}

/// What the write stage receives.
pub(crate) enum Message {
    /// The source will send rows of a shard of an output folder.
    ShardBegan { shard: Arc<Shard>, open: Box<OpenShard> },
    /// A row, finished in any order.
    Row(Box<Row>),
    /// The source will send no more rows of a shard.
    ShardEnded {
        shard: Arc<Shard>,
        num_rows: usize,
        /// Tells the shard's input from another of the same name; none when the input could not be read to its end, so
        /// that the shard must not be kept.
        identity: Option<String>,
    },
}

impl From<Row> for Message {
    fn from(row: Row) -> Self {
        Self::Row(Box::new(row))
    }
}
