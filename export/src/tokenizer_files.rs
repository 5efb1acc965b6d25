//! What a checkpoint says about text: `tokenizer.json`, `tokenizer_config.json`, the chat template in any of its three
//! places, and the stop ids.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::config::{LlavaConfig, TokenIds};
use crate::error::{Error, Result};
use crate::manifest::PromptSettings;

/// LLaMA-3's end of a turn: ends a caption even where the configuration names only `<|end_of_text|>`.
const END_OF_TURN: &str = "<|eot_id|>";

/// The text side of a checkpoint.
pub(crate) struct TokenizerFiles {
    /// Contents of `tokenizer.json`.
    pub(crate) tokenizer: Vec<u8>,
    pub(crate) prompt: PromptSettings,
    pub(crate) stop_token_ids: Vec<u32>,
}

impl TokenizerFiles {
    /// Reads them; `tokenizer` (a file or a folder) takes the place of the checkpoint's own `tokenizer.json`.
    pub(crate) fn read(checkpoint: &Checkpoint, config: &LlavaConfig, tokenizer: Option<&Path>) -> Result<Self> {
        let (bytes, json) = read_tokenizer(&checkpoint.folder, tokenizer)?;
        let added = AddedTokens::new(&json);

        let settings = match tokenizer.and_then(|tokenizer| beside(tokenizer, "tokenizer_config.json")) {
            Some(path) => {
                let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
                serde_json::from_slice(&bytes)
                    .map_err(|reason| Error::InvalidConfig { path: path.clone(), reason: reason.to_string() })?
            }
            None => checkpoint.json("tokenizer_config.json")?.unwrap_or_default(),
        };
        let bos_token = token_text(settings.get("bos_token"))
            .or_else(|| config.bos_token_id.and_then(|id| added.text_of(id)))
            .or_else(|| added.id_of("<|begin_of_text|>").map(|_| "<|begin_of_text|>".to_owned()));
        let prompt = PromptSettings {
            chat_template: chat_template(checkpoint, &settings, tokenizer)?,
            image_token: config.image_token_id.and_then(|id| added.text_of(id)).unwrap_or_else(|| "<image>".to_owned()),
            bos_token,
            eos_token: token_text(settings.get("eos_token")),
        };
        Ok(Self { tokenizer: bytes, prompt, stop_token_ids: stop_token_ids(checkpoint, config, &added)? })
    }
}

/// Where `tokenizer.json` is: `tokenizer` (a file or a folder), else in the folder `checkpoint`.
///
/// # Errors
/// [`Error::MissingFile`] when the checkpoint has none and none was given.
pub fn tokenizer_path(checkpoint: &Path, tokenizer: Option<&Path>) -> Result<PathBuf> {
    match tokenizer {
        Some(path) => {
            let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
            Some(file).filter(|file| file.is_file()).ok_or_else(|| {
                let hint = "--tokenizer takes a tokenizer.json, or a folder that has one";
                Error::MissingFile { checkpoint: path.to_owned(), what: "tokenizer.json", hint }
            })
        }
        None => Some(checkpoint.join("tokenizer.json")).filter(|path| path.is_file()).ok_or_else(|| {
            let hint = "give one with --tokenizer FILE_OR_DIR";
            Error::MissingFile { checkpoint: checkpoint.to_owned(), what: "tokenizer.json", hint }
        }),
    }
}

/// `tokenizer.json` as its bytes and parsed: `tokenizer` (a file or a folder), else the one in the folder `checkpoint`.
pub(crate) fn read_tokenizer(checkpoint: &Path, tokenizer: Option<&Path>) -> Result<(Vec<u8>, Value)> {
    let path = tokenizer_path(checkpoint, tokenizer)?;
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let invalid = |reason: String| Error::InvalidConfig { path: path.clone(), reason };
    let json: Value = serde_json::from_slice(&bytes).map_err(|reason| invalid(reason.to_string()))?;
    if json.get("model").and_then(|model| model.get("vocab")).is_none() {
        return Err(invalid("it has no `model.vocab`: not a tokenizer.json of the tokenizers library".to_owned()));
    }
    Ok((bytes, json))
}

/// The file `name` beside a tokenizer given by hand.
fn beside(tokenizer: &Path, name: &str) -> Option<PathBuf> {
    let folder = if tokenizer.is_dir() { tokenizer } else { tokenizer.parent()? };
    Some(folder.join(name)).filter(|path| path.is_file())
}

/// generation_config.json first, as transformers does, else config.json; `<|eot_id|>` always.
fn stop_token_ids(checkpoint: &Checkpoint, config: &LlavaConfig, added: &AddedTokens<'_>) -> Result<Vec<u32>> {
    let generation = checkpoint.json("generation_config.json")?.unwrap_or_default();
    let mut ids = match generation.get("eos_token_id").filter(|ids| !ids.is_null()) {
        Some(ids) => serde_json::from_value::<TokenIds>(ids.clone())
            .map_err(|_| Error::InvalidConfig {
                path: checkpoint.folder.join("generation_config.json"),
                reason: format!("`eos_token_id`: expected a token id or a list of them, got {ids}"),
            })?
            .into_vec(),
        None => config.eos_token_ids.clone(),
    };
    ids.extend(added.id_of(END_OF_TURN));
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The chat template, in transformers' order: `processor_config.json`, `chat_template.json`, `chat_template.jinja` (also
/// beside a tokenizer given by hand), `tokenizer_config.json`, where it is a text or a list of named ones.
fn chat_template(checkpoint: &Checkpoint, settings: &Value, tokenizer: Option<&Path>) -> Result<Option<String>> {
    let text = |json: &Value| json.get("chat_template").and_then(Value::as_str).map(str::to_owned);
    for name in ["processor_config.json", "chat_template.json"] {
        if let Some(template) = checkpoint.json(name)?.as_ref().and_then(text) {
            return Ok(Some(template));
        }
    }
    let beside = tokenizer.and_then(|tokenizer| beside(tokenizer, "chat_template.jinja"));
    let own = Some(checkpoint.folder.join("chat_template.jinja")).filter(|path| path.is_file());
    if let Some(path) = own.or(beside) {
        return std::fs::read_to_string(&path).map(Some).map_err(Error::io("read", &path));
    }
    Ok(match settings.get("chat_template") {
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template"))
            .and_then(Value::as_str)
            .map(str::to_owned),
        _ => text(settings),
    })
}

/// A token in `tokenizer_config.json`: its text, or an object with `content`.
fn token_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Object(fields) => fields.get("content").and_then(Value::as_str).map(str::to_owned),
        _ => None,
    }
}

/// `added_tokens` of `tokenizer.json`.
struct AddedTokens<'a>(Vec<(u32, &'a str)>);

impl<'a> AddedTokens<'a> {
    fn new(tokenizer: &'a Value) -> Self {
        let tokens = tokenizer.get("added_tokens").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        Self(
            tokens
                .iter()
                .filter_map(|token| {
                    let id = u32::try_from(token.get("id")?.as_u64()?).ok()?;
                    Some((id, token.get("content")?.as_str()?))
                })
                .collect(),
        )
    }

    fn id_of(&self, text: &str) -> Option<u32> {
        self.0.iter().find(|(_, known)| *known == text).map(|(id, _)| *id)
    }

    fn text_of(&self, id: u32) -> Option<String> {
        self.0.iter().find(|(known, _)| *known == id).map(|(_, text)| (*text).to_owned())
    }
}
