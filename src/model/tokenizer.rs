//! Text to ids and back, as transformers' fast tokenizers do it.

use std::path::Path;

use crate::error::{Error, Result};

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
        let mut tokenizer = tokenizers::Tokenizer::from_file(path)
            .map_err(|reason| Error::Tokenizer { path: path.to_owned(), reason: reason.to_string() })?;
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
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|reason| Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids` without special tokens: transformers' `decode(ids, skip_special_tokens=True)`. Like transformers 5, and
    /// unlike 4, it leaves spaces before punctuation alone whatever `clean_up_tokenization_spaces` says.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|reason| Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() })
    }

    /// The id of a token by its exact text.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }
}
