//! A row in the form it is written: the columns of the output, and the counts that are kept of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::Tokenizer;
use crate::model::sequence::FinishReason;
use crate::pipeline::row::Row;
use crate::pipeline::write::failures;

/// How a row ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// With a caption.
    Ok,
    /// Without one.
    #[default]
    Failed,
}

impl Status {
    /// As the `status` column has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
        }
    }
}

/// A row in the form it is written: the columns of the output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Whether there is a caption.
    pub status: Status,
    /// `stage: reason`.
    pub error: Option<String>,
    /// Why the caption ended.
    pub finish_reason: Option<FinishReason>,
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

impl WrittenRow {
    /// Whether it has a caption.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.status == Status::Ok
    }

    /// A row from its columns as JSON.
    pub(crate) fn from_json(mut json: serde_json::Value) -> serde_json::Result<Self> {
        let token_ids = json.get_mut("token_ids").map(serde_json::Value::take).unwrap_or_default();
        Ok(Self { token_ids: serde_json::from_value(token_ids)?, ..serde_json::from_value(json)? })
    }

    /// The row's columns, its ids decoded.
    ///
    /// # Errors
    /// The tokenizer's.
    pub(crate) fn new(row: Row, tokenizer: &Tokenizer, with_token_ids: bool) -> Result<Self> {
        let Row { draft, outcome } = row;
        let num_words = |text: &str| text.split_whitespace().count() as i64;
        let dimension = |side: u32| i32::try_from(side).unwrap_or(i32::MAX);
        let (generated, failure) = match outcome {
            Ok(generated) => (Some(generated), None),
            Err(failure) => (None, Some(failure)),
        };
        let re_caption = match &generated {
            Some(generated) => Some(tokenizer.decode(&generated.token_ids)?.trim().to_owned()),
            None => None,
        };
        Ok(Self {
            org_length: draft.input.org_caption.as_deref().map(num_words),
            re_length: re_caption.as_deref().map(num_words),
            re_caption,
            org_clip_score: None,
            re_clip_score: None,
            org_gpt4v_score: None,
            re_gpt4v_score: None,
            status: if failure.is_none() { Status::Ok } else { Status::Failed },
            error: failure.map(|failure| format!("{}: {}", failure.stage, failure.reason)),
            finish_reason: generated.as_ref().map(|generated| generated.finish_reason),
            num_tokens: generated.as_ref().map(|generated| generated.token_ids.len() as i64),
            width: draft.dimensions.map(|(width, _)| dimension(width)),
            height: draft.dimensions.map(|(_, height)| dimension(height)),
            image_sha256: draft.image_sha256,
            token_ids: generated
                .filter(|_| with_token_ids)
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
}

/// Counts of rows, also stored with each shard's file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Failed rows by reason, what differs from image to image taken out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, u64>,
}

impl Counts {
    /// With the tokens of `per_row` long prompts.
    pub(crate) fn with_prompt_tokens(self, per_row: usize) -> Self {
        Self { prompt_tokens: self.ok * per_row as u64, ..self }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.ok += other.ok;
        self.failed += other.failed;
        self.prompt_tokens += other.prompt_tokens;
        self.new_tokens += other.new_tokens;
        for (reason, count) in &other.failures {
            failures::add(&mut self.failures, reason, *count);
        }
    }

    /// Counts a row, but for the tokens of its prompt: those are the same for all with a caption.
    pub(crate) fn add_row(&mut self, row: &WrittenRow) {
        self.rows += 1;
        self.new_tokens += row.num_tokens.unwrap_or(0) as u64;
        if row.is_ok() {
            self.ok += 1;
        } else {
            self.failed += 1;
            failures::add(&mut self.failures, &failures::class(row.error.as_deref().unwrap_or_default()), 1);
        }
    }
}
