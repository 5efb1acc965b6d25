//! Text to ids and back, as transformers' fast tokenizers do it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::error::{Error, Result, panic_message};

/// A `tokenizer.json`, loaded.
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    path: std::path::PathBuf,
}

impl Tokenizer {
    /// Loads `tokenizer.json` at `path`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn open(path: &Path) -> Result<Self> {
        let mut tokenizer = guarded(path, || {
            let json = std::fs::read(path)?;
            // The library expects what it reads a decoder from to be JSON.
            let Parts { .. } = serde_json::from_slice(&json)?;
            tokenizers::Tokenizer::from_bytes(&json)
        })?;
        // A file saved with truncation or padding on must not cut or fill prompts.
        tokenizer.with_padding(None);
        let _ = tokenizer.with_truncation(None);
        Ok(Self { tokenizer, path: path.to_owned() })
    }

    /// Ids of `text`; special tokens written in it are recognised, none are added.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(&self.path, || self.tokenizer.encode(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids` without special tokens: transformers' `decode(ids, skip_special_tokens=True)`. Like transformers 5, and
    /// unlike 4, it leaves spaces before punctuation alone whatever `clean_up_tokenization_spaces` says.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(&self.path, || self.tokenizer.decode(ids, true))
    }

    /// The id of a token by its exact text.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }
}

/// What is not skipped of a `tokenizer.json` that is only checked.
#[derive(serde::Deserialize)]
struct Parts {
    #[serde(rename = "decoder", default)]
    _decoder: serde_json::Value,
}

/// Runs the library, which panics where some files are wrong inside.
fn guarded<T>(path: &Path, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let reason = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(result)) => return Ok(result),
        Ok(Err(reason)) => reason.to_string(),
        Err(panic) => format!("the tokenizers library panicked: {}", panic_message(panic.as_ref())),
    };
    Err(Error::Tokenizer { path: path.to_owned(), reason })
}
