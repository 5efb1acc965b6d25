//! Image bytes -> upright 8-bit RGB.
//!
//! Takes the bytes of one file (JPEG, PNG, WebP, GIF or BMP, told by content), gives the pixels
//! that Pillow's `ImageOps.exif_transpose(Image.open(file)).convert("RGB")` gives: grey is
//! replicated, palettes are expanded, alpha is dropped. Must never allocate for a picture above the
//! limits, never let a decoder's panic through, and never return part of a truncated picture.

mod bmp;
mod gif;
mod jpeg;
mod probe;

use std::error::Error as _;
use std::io::{Cursor, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crossbeam::channel::{Receiver, Sender};
use image::codecs::{bmp::BmpDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageError};
use recaption_export::{Preprocessing, hex};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::error::panic_message;
use crate::pipeline::pool::SamplePool;
use crate::pipeline::preprocess::max_reduction;
use crate::pipeline::row::{Message, RowDraft};
use crate::pipeline::source::ImageRecord;
use crate::profile::recorder::{self, Work};
use crate::stage::Stage;

pub use probe::Format;

/// An image that decoded: its row and its pixels.
pub(crate) struct LoadedImage {
    pub(crate) draft: RowDraft,
    pub(crate) image: RgbImage,
}

/// Loads images until `records` is closed and empty; an image that does not load becomes a failed row.
pub(crate) fn run(
    records: &Receiver<ImageRecord>,
    loaded: &Sender<LoadedImage>,
    rows: &Sender<Message>,
    mut loader: Loader,
    pool: &SamplePool,
) {
    while let Some(ImageRecord { mut draft, bytes }) = recorder::receive(records) {
        Stage::Load.enter();
        draft.times.is_taken(Stage::Load);
        let begun = recorder::begin();
        draft.image_sha256 = Some(hex(&Sha256::digest(&bytes)));
        let image = loader.load(&bytes, pool.take());
        begun.end(Stage::Load, Work::IMAGE);
        draft.times.is_queued();
        let is_sent = match image {
            Ok(image) => {
                draft.dimensions = Some((image.stored_width, image.stored_height));
                recorder::send(loaded, LoadedImage { draft, image }).is_ok()
            }
            Err(reason) => {
                draft.dimensions = stored_dimensions(&bytes);
                recorder::send(rows, draft.fail(Stage::Load, reason).into()).is_ok()
            }
        };
        // A closed channel means that the run is failing elsewhere.
        if !is_sent {
            return;
        }
    }
}

/// What one picture may cost. Checked against the header, before anything large is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadLimits {
    /// Width times height as stored. The default is the count above which Pillow raises
    /// `DecompressionBombError`.
    pub max_pixels: u64,
    /// Bytes that the decoder's pixel buffers may take (an orientation that turns the picture
    /// holds a second copy for a moment, 3 bytes per pixel).
    pub max_alloc_bytes: u64,
}

/// Scans of a JPEG whose pixels are at the limit; smaller pictures may have more, up to [`MAX_SCANS`].
const MAX_PASSES: u64 = 16;
const MAX_SCANS: u64 = 1000;

impl Default for LoadLimits {
    fn default() -> Self {
        Self { max_pixels: 178_956_970, max_alloc_bytes: 1 << 30 }
    }
}

impl LoadLimits {
    fn check_pixels(&self, (width, height): (u32, u32)) -> Result<(), LoadError> {
        let num_pixels = u64::from(width) * u64::from(height);
        if num_pixels > self.max_pixels {
            let max_pixels = self.max_pixels;
            return Err(LoadError::TooManyPixels { width, height, num_pixels, max_pixels });
        }
        Ok(())
    }

    /// A progressive JPEG may say next to nothing in each of a hundred thousand scans, and every one of them is a pass over
    /// the picture. Real ones have about ten.
    fn check_scans(&self, jpeg: &[u8]) -> Result<(), LoadError> {
        let Some(header) = probe::JpegHeader::read(jpeg) else { return Ok(()) };
        let num_pixels = u64::from(header.width) * u64::from(header.height);
        let max_scans = (self.max_pixels.saturating_mul(MAX_PASSES) / num_pixels.max(1)).clamp(MAX_PASSES, MAX_SCANS);
        match probe::count_scans(jpeg, &header) {
            num_scans if num_scans > max_scans => Err(LoadError::TooManyScans { num_scans, max_scans }),
            _ => Ok(()),
        }
    }

    fn check_bytes(&self, num_bytes: u64) -> Result<(), LoadError> {
        if num_bytes > self.max_alloc_bytes {
            return Err(LoadError::TooManyBytes { num_bytes, max_bytes: self.max_alloc_bytes });
        }
        Ok(())
    }
}

/// An upright picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Width of the upright picture.
    pub width: u32,
    /// Height of the upright picture.
    pub height: u32,
    /// [height / reduction, width / reduction, 3], rounded up; sRGB samples of 8 bits (colour profiles are not applied).
    pub pixels: Vec<u8>,
    /// Each of `pixels` is the mean of a square of that many pixels a side: 1, or more where a smaller picture was asked for.
    pub reduction: u32,
    /// Width in the file, before the EXIF orientation was applied.
    pub stored_width: u32,
    /// Height in the file, before the EXIF orientation was applied.
    pub stored_height: u32,
}

/// Why a file gave no picture. The texts are meant to follow `load: ` in a row's reason.
#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are named and shown in the messages")]
pub enum LoadError {
    /// Zero bytes.
    #[error("empty file (0 bytes); fetch it again")]
    Empty,
    /// No magic bytes of a format that is read.
    #[error("not a JPEG, PNG, WebP, GIF or BMP image (starts with `{start}`)")]
    NotAnImage { start: String },
    /// Above [`LoadLimits::max_pixels`].
    #[error(
        "{width}x{height} is {num_pixels} pixels, above the limit of {max_pixels}; \
         raise the limit if the image is genuine"
    )]
    TooManyPixels { width: u32, height: u32, num_pixels: u64, max_pixels: u64 },
    /// Above [`LoadLimits::max_alloc_bytes`].
    #[error(
        "decoding takes {num_bytes} bytes of memory, above the limit of {max_bytes}; \
         raise the limit if the image is genuine"
    )]
    TooManyBytes { num_bytes: u64, max_bytes: u64 },
    /// A JPEG that would be passed over too often.
    #[error("JPEG image of {num_scans} scans, above the limit of {max_scans} for its size; save it anew")]
    TooManyScans { num_scans: u64, max_scans: u64 },
    /// The file ends before the picture does.
    #[error("truncated {format} image (ends after {num_bytes} bytes); fetch it again")]
    Truncated { format: Format, num_bytes: usize },
    /// The decoder cannot make sense of the data.
    #[error("corrupt {format} image ({message}); fetch it again")]
    Corrupt { format: Format, message: String },
    /// A valid file of a kind that is not read.
    #[error("{format} image uses {feature}, which is not supported; convert it first")]
    Unsupported { format: Format, feature: String },
    /// A bug of the decoder, confined to this picture.
    #[error("the {format} decoder panicked ({message}); please report the image")]
    DecoderPanicked { format: Format, message: String },
}

/// Pixels as stored, with what is left to do.
struct Stored {
    width: u32,
    height: u32,
    /// [height, width, 3]
    pixels: Vec<u8>,
    orientation: Orientation,
}

/// Decodes one file into upright RGB, at its full size.
///
/// Of an animation only the first frame is decoded. 16-bit samples keep their high byte.
///
/// # Errors
///
/// Every way in which the bytes are not a complete, supported image within `limits`.
pub fn load(bytes: &[u8], limits: &LoadLimits) -> Result<RgbImage, LoadError> {
    Loader::new(limits.clone(), None).load(bytes, Vec::new())
}

/// Decodes files one after another, with memory that is kept between them.
pub struct Loader {
    limits: LoadLimits,
    /// What the pictures are loaded for: they may come reduced as far as that does not show.
    preprocessing: Option<Preprocessing>,
    jpeg: jpeg::Scratch,
}

impl Loader {
    /// With `preprocessing`, large pictures may come reduced ([`RgbImage::reduction`]), as far as the result of that is the same
    /// but for rounding.
    #[must_use]
    pub fn new(limits: LoadLimits, preprocessing: Option<Preprocessing>) -> Self {
        Self { limits, preprocessing, jpeg: jpeg::Scratch::default() }
    }

    /// As [`load`]; `memory`, whatever it holds, may become the picture's pixels.
    ///
    /// # Errors
    ///
    /// As [`load`].
    pub fn load(&mut self, bytes: &[u8], mut memory: Vec<u8>) -> Result<RgbImage, LoadError> {
        if bytes.is_empty() {
            return Err(LoadError::Empty);
        }
        let Some(format) = probe::sniff(bytes) else {
            let start = bytes[..bytes.len().min(4)].escape_ascii().to_string();
            return Err(LoadError::NotAnImage { start });
        };
        let Self { limits, preprocessing, jpeg } = self;
        let reduction = |width, height| preprocessing.as_ref().map_or(1, |to| max_reduction(to, width, height));
        // Decoders read untrusted bytes here: one panic must cost one row, not the run. Nothing that they touched outlives the
        // call but the memory that is given up then, so no broken state can be observed.
        let decoded = catch_unwind(AssertUnwindSafe(|| {
            let plain = match format {
                Format::Jpeg => jpeg::decode_plain(bytes, limits, &reduction, jpeg, &mut memory),
                _ => None,
            };
            if let Some((stored, reduction)) = plain {
                return Ok(upright(stored, reduction));
            }
            if let Some(dimensions) = probe::dimensions(format, bytes) {
                limits.check_pixels(dimensions)?;
            }
            let stored = match format {
                Format::Jpeg => {
                    limits.check_scans(bytes)?;
                    jpeg::decode(&probe::without_short_app14(bytes), limits)
                }
                Format::Gif => gif::decode(bytes, limits),
                // libwebp refuses a file that is shorter than its container says; image-webp does not
                // notice where the first frame is complete.
                Format::WebP if probe::riff_end(bytes).is_some_and(|end| end > bytes.len() as u64) => {
                    Err(LoadError::Truncated { format, num_bytes: bytes.len() })
                }
                _ => decode(format, bytes, limits),
            };
            stored.map(|stored| upright(stored, 1))
        }));
        decoded.unwrap_or_else(|panic| {
            self.jpeg = jpeg::Scratch::default();
            let message = panic_message(panic.as_ref());
            Err(LoadError::DecoderPanicked { format, message })
        })
    }
}

/// Extension of the file's format, told by content: `jpg`, `png`, `webp`, `gif` or `bmp`.
pub(crate) fn extension(bytes: &[u8]) -> Option<&'static str> {
    Some(match probe::sniff(bytes)? {
        Format::Jpeg => "jpg",
        Format::Png => "png",
        Format::WebP => "webp",
        Format::Gif => "gif",
        Format::Bmp => "bmp",
    })
}

/// Reads (width, height) as stored, from the header alone: also for files that do not decode.
#[must_use]
pub fn stored_dimensions(bytes: &[u8]) -> Option<(u32, u32)> {
    probe::dimensions(probe::sniff(bytes)?, bytes)
}

/// Decodes PNG, WebP and BMP through the `image` crate.
fn decode(format: Format, bytes: &[u8], limits: &LoadLimits) -> Result<Stored, LoadError> {
    let (bytes, is_turned) = if format == Format::Bmp { bmp::normalised(bytes) } else { (bytes.into(), false) };
    let bytes = &*bytes;
    let input = Cursor::new(bytes);
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.max_alloc_bytes);
    let opened: Result<Box<dyn ImageDecoder>, ImageError> = match format {
        Format::Png => PngDecoder::with_limits(input, decoder_limits.clone())
            .map(|decoder| Box::new(decoder) as Box<dyn ImageDecoder>),
        Format::WebP => WebPDecoder::new(input).map(|decoder| Box::new(decoder) as _),
        Format::Bmp => BmpDecoder::new(input).map(|decoder| Box::new(decoder) as _),
        Format::Jpeg | Format::Gif => unreachable!("bug: {format} has its own decoder"),
    };
    let to_error = |error| decode_error(format, bytes, &error);
    let mut decoder = opened.map_err(to_error)?;
    let (width, height) = decoder.dimensions();
    limits.check_pixels((width, height))?;
    limits.check_bytes(decoder.total_bytes().saturating_add(3 * u64::from(width) * u64::from(height)))?;
    decoder.set_limits(decoder_limits).map_err(to_error)?;
    // Broken metadata must not cost the picture: Pillow shows it unrotated then.
    let (exif, xmp) = if format == Format::WebP {
        let chunk = |kind| probe::webp_chunk(bytes, kind).map(<[u8]>::to_vec);
        (chunk(b"EXIF"), chunk(b"XMP "))
    } else {
        (decoder.exif_metadata().ok().flatten(), decoder.xmp_metadata().ok().flatten())
    };
    let exif = exif.or_else(|| if format == Format::Png { probe::png_raw_exif(bytes) } else { None });
    let orientation = orientation_of(exif.as_deref(), xmp.as_deref());
    let color_type = decoder.color_type();
    let mut samples = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut samples).map_err(to_error)?;
    if is_turned {
        let num_bytes = samples.len() / (height as usize).max(1);
        samples = samples.rchunks_exact(num_bytes.max(1)).flatten().copied().collect();
    }
    let Some(pixels) = to_rgb8(samples, color_type) else {
        return Err(LoadError::Unsupported { format, feature: format!("{color_type:?} samples") });
    };
    let orientation = orientation.unwrap_or(Orientation::NoTransforms);
    Ok(Stored { width, height, pixels, orientation })
}

/// Keeps the colour of each pixel and the high byte of each sample. The transparent parts of a
/// picture show whatever colour is stored there, as with `convert("RGB")`: nothing is composited.
fn to_rgb8(mut samples: Vec<u8>, color_type: ColorType) -> Option<Vec<u8>> {
    // `image` gives 16-bit samples in native byte order.
    let high = if cfg!(target_endian = "little") { 1 } else { 0 };
    // (bytes per pixel, offsets of the red, green and blue byte in it)
    let (stride, [red, green, blue]) = match color_type {
        ColorType::Rgb8 => return Some(samples),
        ColorType::L8 => (1, [0; 3]),
        ColorType::La8 => (2, [0; 3]),
        ColorType::Rgba8 => (4, [0, 1, 2]),
        ColorType::L16 => (2, [high; 3]),
        ColorType::La16 => (4, [high; 3]),
        ColorType::Rgb16 => (6, [high, 2 + high, 4 + high]),
        ColorType::Rgba16 => (8, [high, 2 + high, 4 + high]),
        _ => return None,
    };
    if stride < 3 {
        let mut rgb = Vec::with_capacity(samples.len() / stride * 3);
        for pixel in samples.chunks_exact(stride) {
            rgb.extend_from_slice(&[pixel[red]; 3]);
        }
        return Some(rgb);
    }
    // In place: a pixel's new position is never behind its old one.
    let num_pixels = samples.len() / stride;
    for index in 0..num_pixels {
        let from = index * stride;
        let rgb = [samples[from + red], samples[from + green], samples[from + blue]];
        samples[index * 3..][..3].copy_from_slice(&rgb);
    }
    samples.truncate(num_pixels * 3);
    samples.shrink_to_fit();
    Some(samples)
}

/// The orientation in the EXIF block, else the one in the XMP packet (Pillow's `getexif` too).
fn orientation_of(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Option<Orientation> {
    let from_exif = exif.and_then(|mut tiff| {
        // Some writers keep the JPEG segment's prefix in PNG and WebP chunks.
        while let Some(rest) = tiff.strip_prefix(b"Exif\0\0") {
            tiff = rest;
        }
        Orientation::from_exif_chunk(tiff)
    });
    from_exif.or_else(|| {
        const NAME: &[u8] = b"tiff:Orientation";
        let xmp = xmp?;
        let digit = xmp.windows(NAME.len() + 3).find_map(|window| {
            let value = window.strip_prefix(NAME)?;
            let value = value.strip_prefix(b"=\"").or_else(|| value.strip_prefix(b">"))?;
            value[0].is_ascii_digit().then(|| value[0] - b'0')
        })?;
        Orientation::from_exif(digit)
    })
}

fn upright(stored: Stored, reduction: u32) -> RgbImage {
    let Stored { width: stored_width, height: stored_height, pixels, orientation } = stored;
    if orientation == Orientation::NoTransforms {
        let (width, height) = (stored_width, stored_height);
        return RgbImage { width, height, pixels, reduction, stored_width, stored_height };
    }
    let [columns, rows] = [stored_width, stored_height].map(|side| side.div_ceil(reduction));
    let buffer = image::RgbImage::from_raw(columns, rows, pixels)
        .expect("bug: the decoder's buffer does not match its dimensions");
    let mut turned = DynamicImage::ImageRgb8(buffer);
    turned.apply_orientation(orientation);
    let turned = turned.into_rgb8();
    // A side changes by a turn only.
    let (width, height) = match turned.dimensions() == (columns, rows) {
        true => (stored_width, stored_height),
        false => (stored_height, stored_width),
    };
    RgbImage { width, height, pixels: turned.into_raw(), reduction, stored_width, stored_height }
}

fn decode_error(format: Format, bytes: &[u8], error: &ImageError) -> LoadError {
    // `image` wraps the decoder's own message in "Format error decoding Png: ".
    let message = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let ends_early = match error {
        ImageError::IoError(cause) => cause.kind() == ErrorKind::UnexpectedEof,
        _ => message.contains("unexpected end of file"),
    };
    match error {
        _ if ends_early => LoadError::Truncated { format, num_bytes: bytes.len() },
        ImageError::Unsupported(_) => LoadError::Unsupported { format, feature: message },
        _ => LoadError::Corrupt { format, message },
    }
}
