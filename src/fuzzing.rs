//! What the fuzz targets call, and nobody else should: parsers of what anybody may have written, without the threads and
//! sessions around them.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crossbeam::channel::unbounded;
use recaption_export::PromptSettings;

use crate::model::prompt;
use crate::pipeline::input::{self, Input};
use crate::pipeline::row::Message;
use crate::pipeline::source::limits::SourceLimits;
use crate::pipeline::source::{self, SourceChannels, SourceOptions};
use crate::pipeline::write::journal::Journal;

/// Reads one input to its end, as the source stage does. Returns the number of images and of failed rows.
///
/// # Panics
/// When an image or a sidecar is larger than the limits allow.
#[must_use]
pub fn source(input: Input, limits: &SourceLimits) -> (usize, usize) {
    let (records, images) = unbounded();
    let (rows, failed) = unbounded();
    let stop = AtomicBool::new(false);
    let _ = source::count_images(std::slice::from_ref(&input));
    let options = SourceOptions {
        inputs: vec![input],
        output: None,
        part: None,
        limit: None,
        limits: limits.clone(),
        image_column: None,
    };
    // What is wrong with the input is not of interest: that it is told is.
    let _ = source::run(options, SourceChannels { records, rows, stop: [&stop, &stop] });
    let mut num_images = 0;
    for image in &images {
        assert!(image.bytes.len() as u64 <= limits.max_image_bytes, "an image of {} bytes", image.bytes.len());
        num_images += 1;
    }
    // One message is the shard's end.
    let num_failed = failed.iter().filter(|message| matches!(message, Message::Row(_))).count();
    (num_images, num_failed)
}

/// Opens a journal that a killed run may have left, twice: what is dropped from it the first time is gone the second time.
/// Returns the number of its rows.
///
/// # Errors
/// What is wrong with it.
///
/// # Panics
/// When the second time gives other rows.
pub fn replay_journal(path: &Path) -> crate::Result<usize> {
    let Some(first) = Journal::replay(path)? else { return Ok(0) };
    let Some(second) = Journal::replay(path)? else { panic!("a journal of {} rows is gone", first.kept.len()) };
    assert_eq!((second.kept, second.num_dropped_bytes), (first.kept, 0), "another journal than the first time");
    Ok(second.journal.num_rows())
}

/// The paths that a brace range stands for.
///
/// # Errors
/// What is wrong with it.
pub fn expand_braces(text: &str) -> Result<Vec<String>, String> {
    input::expand_braces(text)
}

/// A Jinja template around a prompt.
///
/// # Errors
/// What is wrong with it.
pub fn render_chat(template: &str) -> Result<String, String> {
    let settings = PromptSettings {
        chat_template: None,
        image_token: "<image>".to_owned(),
        bos_token: Some("<s>".to_owned()),
        eos_token: None,
    };
    prompt::render_chat(template, "Describe it.", &settings)
}

/// A tokenizer, over a text that looks like a prompt.
///
/// # Errors
/// What is wrong with it.
pub fn tokenize(path: &Path) -> crate::Result<usize> {
    let tokenizer = crate::model::Tokenizer::open(path)?;
    let ids = tokenizer.encode("<|begin_of_text|>A <image> of\n\nnaïve 漢字 🎸 prompts")?;
    tokenizer.decode(&ids)?;
    Ok(ids.len())
}
