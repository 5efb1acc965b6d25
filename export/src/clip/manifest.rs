//! `manifest.json` of a CLIP bundle, which scores images against texts.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::bundle_manifest::BundleManifest;
use crate::error::{Error, Result};
use crate::manifest::{BundleHeader, BundleKind, GraphFile};

/// The contents of `manifest.json` in a bundle of kind `clip`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClipManifest {
    /// What every bundle has.
    #[serde(flatten)]
    pub header: BundleHeader,
    /// Dimensions of the image tower.
    pub image: ImageDims,
    /// Dimensions of the text tower.
    pub text: TextDims,
    /// Width of `image_embeds` and `text_embeds`.
    pub projection_dim: usize,
    /// What cosine similarities are multiplied by: the exponential of the stored parameter.
    pub logit_scale: f32,
    /// The graphs.
    pub graphs: ClipGraphs,
}

/// Dimensions of an image tower.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDims {
    /// Side of the square `pixel_values`, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Width of the tower.
    pub hidden_size: usize,
    /// Encoder layers.
    pub num_layers: usize,
}

/// Dimensions of a text tower.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextDims {
    /// Longest sequence of token ids.
    pub context_length: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the tower.
    pub hidden_size: usize,
    /// Encoder layers.
    pub num_layers: usize,
    /// Where a text ends: the token whose state is the text's.
    pub eos: EosRule,
    /// The id that the checkpoint pads texts with, if it says; any other below the end's does as well.
    pub pad_token_id: Option<u32>,
}

/// Which token of a sequence is the end of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum EosRule {
    /// The first `token_id`.
    First {
        /// The id of `<|endoftext|>`.
        token_id: u32,
    },
    /// The first of the largest ids, as in OpenAI's code: `<|endoftext|>` is the vocabulary's last.
    LargestId,
}

/// The graphs of a CLIP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipGraphs {
    /// `pixel_values` to `image_embeds`.
    pub image_tower: GraphFile,
    /// `input_ids` to `text_embeds`.
    pub text_tower: GraphFile,
}

impl ClipManifest {
    /// Reads `BUNDLE/manifest.json`.
    ///
    /// # Errors
    /// When it is not there, does not parse, is of another format version, or that of a captioner.
    pub fn read(bundle: &Path) -> Result<Self> {
        match BundleManifest::read(bundle)? {
            BundleManifest::Clip(manifest) => Ok(*manifest),
            BundleManifest::Llava(_) => Err(Error::OtherBundleKind {
                path: bundle.to_owned(),
                found: BundleKind::Llava.name(),
                reader: "scoring",
                wanted: BundleKind::Clip.name(),
            }),
        }
    }
}
