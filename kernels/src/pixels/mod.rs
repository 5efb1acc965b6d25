//! Pixels: the inverse DCT, chroma upsampling and colour conversion of JPEG, and the resampling of 8-bit RGB.
//!
//! All in integers with one definition, so that every level gives the same bits: those of libjpeg-turbo (its accurate inverse
//! DCT and triangle upsampling) and of Pillow's `resize`. Whatever the samples, nothing here panics on a value.

mod color;
mod idct;
mod reduced;
mod resample;
mod upsample;

pub use color::{grey_to_rgb, ycc_to_rgb};
pub use idct::{Block, inverse_dct};
pub use reduced::inverse_dct_means;
pub use resample::{Rows, WEIGHT_BITS, Weights, horizontal, vertical};
pub use upsample::{upsample_columns, upsample_columns_and_rows};
