//! What the fuzz targets call, and nobody else should: readers of files that anybody may have written, without the steps
//! around them.

use std::path::Path;

use crate::checkpoint::{Checkpoint, Entry, entries};
use crate::clip::ClipCheckpoint;
use crate::config::LlavaConfig;
use crate::error::Result;
use crate::inspect::GraphContents;
use crate::tokenizer_files::TokenizerFiles;
use crate::{BundleManifest, Preprocessing, processor_config};

/// Number of tensors in a file of weights: torch's, or safetensors'.
///
/// # Errors
/// Whatever is wrong with it.
///
/// # Panics
/// When a tensor lies outside of the file.
pub fn weights(file: &[u8], is_torch: bool) -> Result<usize> {
    let entries = entries(file, Path::new("fuzz"), is_torch)?;
    for Entry { name, start, end, .. } in &entries {
        assert!(start <= end && *end <= file.len(), "`{name}` lies at {start}..{end} of {}", file.len());
    }
    Ok(entries.len())
}

/// Reads everything that the small files of a checkpoint say, as an export does before it builds a graph.
///
/// # Errors
/// Whatever is wrong with them.
pub fn checkpoint(folder: &Path) -> Result<Preprocessing> {
    let checkpoint = Checkpoint::open(folder, None, None)?;
    let config = LlavaConfig::read(&checkpoint)?;
    TokenizerFiles::read(&checkpoint, &config, None)?;
    processor_config::read(&checkpoint, config.vision.image_size)
}

/// Whether there is a CLIP at `path`, whose files are read as an export does.
///
/// # Errors
/// Whatever is wrong with them.
pub fn is_clip(path: &Path) -> Result<bool> {
    Ok(ClipCheckpoint::find(path)?.is_some())
}

/// Reads a bundle's manifest and graphs, as `recaption inspect` does.
///
/// # Errors
/// Whatever is wrong with them.
pub fn bundle(folder: &Path) -> Result<usize> {
    let manifest = BundleManifest::read(folder)?;
    let graphs = manifest.named_graphs();
    graphs.iter().map(|(_, graph)| GraphContents::read(folder, &manifest, graph).map(|graph| graph.num_nodes)).sum()
}
