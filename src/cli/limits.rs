//! Flags of `recaption run` that bound what an input may cost: every one has a safe default.

use clap::Args;

use crate::pipeline::load::LoadLimits;
use crate::pipeline::source::limits::SourceLimits;

/// Limits of inputs and images.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits on the input")]
pub struct LimitArgs {
    /// Fail images of more pixels than this, before they are decoded
    ///
    /// The default is where Pillow refuses an image as a decompression bomb. Example: --max-pixels 50000000
    #[arg(long, value_name = "N", default_value_t = LoadLimits::default().max_pixels)]
    pub max_pixels: u64,
    /// Fail images whose decoder would need more memory than this, before it gets any
    ///
    /// Each of --load-threads may take it at once. Example: --max-decoded-bytes 500000000
    #[arg(long, value_name = "BYTES", default_value_t = LoadLimits::default().max_alloc_bytes)]
    pub max_decoded_bytes: u64,
    /// Fail image files larger than this
    ///
    /// Files, members of a tar and cells of a parquet. Example: --max-image-bytes 20000000
    #[arg(long, value_name = "BYTES", default_value_t = SourceLimits::default().max_image_bytes)]
    pub max_image_bytes: u64,
    /// Pass over sidecars (.txt, .json) of a tar larger than this; their image is captioned all the same
    ///
    /// Example: --max-sidecar-bytes 1000000
    #[arg(long, value_name = "BYTES", default_value_t = SourceLimits::default().max_sidecar_bytes)]
    pub max_sidecar_bytes: u64,
    /// Keep a sidecar's JSON as text where more brackets than this are open at once
    ///
    /// At most 127. Example: --max-json-depth 16
    #[arg(long, value_name = "N", default_value_t = SourceLimits::default().max_json_depth as u8, value_parser = clap::value_parser!(u8).range(1..=127))]
    pub max_json_depth: u8,
    /// Refuse parquet files with a page larger than this, uncompressed
    ///
    /// A page of images holds several. Example: --max-parquet-page-bytes 100000000
    #[arg(long, value_name = "BYTES", default_value_t = SourceLimits::default().max_parquet_page_bytes)]
    pub max_parquet_page_bytes: u64,
    /// Refuse gzip-compressed tars that grow by more than this factor (and 64 MiB)
    ///
    /// Images hardly compress: more is an attack, or no tar of images. Example: --max-gzip-ratio 20
    #[arg(long, value_name = "N", default_value_t = SourceLimits::default().max_gzip_ratio)]
    pub max_gzip_ratio: u64,
}

impl LimitArgs {
    /// What one image may cost.
    #[must_use]
    pub fn load(&self) -> LoadLimits {
        LoadLimits { max_pixels: self.max_pixels, max_alloc_bytes: self.max_decoded_bytes }
    }

    /// What the inputs may cost before that.
    #[must_use]
    pub fn source(&self) -> SourceLimits {
        SourceLimits {
            max_image_bytes: self.max_image_bytes,
            max_sidecar_bytes: self.max_sidecar_bytes,
            max_json_depth: self.max_json_depth.into(),
            max_parquet_page_bytes: self.max_parquet_page_bytes,
            max_gzip_ratio: self.max_gzip_ratio,
        }
    }
}
