//! JPEG bytes -> stored RGB pixels (not yet oriented), with the colours libjpeg and Pillow give.
//!
//! Plain files are decoded by `baseline`. The decoder of all others (progressive, CMYK, damaged, odd in any way), and so of
//! every verdict, is zune-jpeg. It is used directly, not through `image`, because `image` runs it
//! leniently (a truncated file becomes a half grey picture without an error) and because its CMYK
//! and YCCK conversions are not Pillow's. Must never return a picture that misses its end.

mod baseline;
mod header;
mod huffman;

use image::metadata::Orientation;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::probe::{Format, JpegHeader, next_marker};
use super::{LoadError, LoadLimits, Stored, orientation_of};

const EOI: u8 = 0xd9;

/// What the samples of a JPEG mean, by libjpeg's rules (`default_decompress_parms`).
#[derive(Clone, Copy, PartialEq)]
enum Colors {
    /// Greyscale, YCbCr, or RGB by its component names: zune-jpeg converts these as libjpeg does.
    Plain,
    /// Three components that an Adobe marker declares to be RGB.
    Rgb,
    /// Four components, stored inverted (Adobe's convention, which Pillow assumes always).
    Cmyk,
    /// As `Cmyk`, with the inverted CMY stored as YCbCr.
    Ycck,
}

/// Memory that is kept from picture to picture.
#[derive(Default)]
pub(super) struct Scratch(baseline::Scratch);

/// What is wanted of a picture of (width, height): each pixel may be the mean of a square of that many (1, 2, 4 or 8) a side.
pub(super) type Reduction<'a> = &'a dyn Fn(u32, u32) -> u32;

/// Decodes a plain file into `pixels`, reduced where that is wanted and possible: the second result is by how
/// much. `None` where [`decode`] is to do it.
pub(super) fn decode_plain(
    bytes: &[u8],
    limits: &LoadLimits,
    reduction: Reduction<'_>,
    scratch: &mut Scratch,
    pixels: &mut Vec<u8>,
) -> Option<(Stored, u32)> {
    let Scratch(scratch) = scratch;
    let frame = baseline::read_frame(bytes, scratch)?;
    let (width, height) = (frame.width as u32, frame.height as u32);
    limits.check_pixels((width, height)).ok()?;
    limits.check_bytes(3 * u64::from(width) * u64::from(height)).ok()?;
    let of = |range: &Option<std::ops::Range<usize>>| range.clone().and_then(|range| bytes.get(range));
    let orientation = orientation_of(of(&frame.exif), of(&frame.xmp)).unwrap_or(Orientation::NoTransforms);
    // Squares begin at the stored picture's corner; turned, they must still begin at a corner.
    let is_turned = orientation != Orientation::NoTransforms;
    let wanted = reduction(width, height);
    let reduction = if is_turned && [width, height].iter().any(|side| side % wanted != 0) { 1 } else { wanted };
    baseline::decode(bytes, &frame, reduction as usize, scratch, pixels)?;
    Some((Stored { width, height, pixels: std::mem::take(pixels), orientation }, reduction))
}

/// Decodes a JPEG into [height, width, 3] samples of 8 bits.
///
/// # Errors
///
/// Truncated files (no end-of-image marker behind the last scan, as in Pillow), damaged entropy
/// coded data, arithmetic coding, 12-bit samples, two components.
pub(super) fn decode(bytes: &[u8], limits: &LoadLimits) -> Result<Stored, LoadError> {
    let Some(header) = JpegHeader::read(bytes) else {
        return Err(LoadError::Truncated { format: Format::Jpeg, num_bytes: bytes.len() });
    };
    if !reaches_end_of_image(bytes, &header) {
        return Err(LoadError::Truncated { format: Format::Jpeg, num_bytes: bytes.len() });
    }
    let colors = match (header.num_components, header.adobe.map(|(_, transform)| transform)) {
        (1, _) | (3, None | Some(1)) => Colors::Plain,
        (3, Some(0)) => Colors::Rgb,
        (3, Some(_)) => Colors::Plain,
        (4, Some(2)) => Colors::Ycck,
        (4, _) => Colors::Cmyk,
        (num_components, _) => {
            return Err(LoadError::Unsupported {
                format: Format::Jpeg,
                feature: format!("{num_components} components"),
            });
        }
    };
    // A progressive file keeps the coefficients of the whole picture, two bytes each.
    let num_pixels = u64::from(header.width) * u64::from(header.height);
    let num_components = u64::from(header.num_components);
    let coefficients = if header.is_progressive { 2 * num_components } else { 0 };
    limits.check_bytes(num_pixels * (num_components.max(3) + coefficients))?;

    // zune-jpeg lets the Adobe marker choose the colour space, and trips over the combinations
    // that are not `Plain`. Without the marker it takes the samples for YCbCr or CMYK, and gives
    // them unconverted where the output is to be the same.
    let mut renamed;
    let bytes = match header.adobe {
        Some((adobe, transform)) if colors != Colors::Plain || transform > 1 => {
            renamed = bytes.to_vec();
            renamed[adobe] = b'a';
            &renamed[..]
        }
        _ => bytes,
    };
    let output = match colors {
        Colors::Plain => ColorSpace::RGB,
        Colors::Rgb => ColorSpace::YCbCr,
        Colors::Cmyk | Colors::Ycck => ColorSpace::CMYK,
    };
    // Lenient for the header (stray bytes between segments are common and harmless), strict for
    // the scans: otherwise zune-jpeg fills what it cannot read with grey and reports success.
    let options =
        DecoderOptions::default().set_max_width(usize::MAX).set_max_height(usize::MAX).jpeg_set_out_colorspace(output);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options.set_strict_mode(false));
    decoder.decode_headers().map_err(|error| decode_error(&error))?;
    let orientation = orientation_of(decoder.exif().map(Vec::as_slice), decoder.xmp().map(Vec::as_slice));
    // A component named 'R', 'G', 'B' overrides what the marker says, here and in libjpeg.
    if colors == Colors::Rgb && decoder.input_colorspace() == Some(ColorSpace::RGB) {
        decoder.set_options(options.jpeg_set_out_colorspace(ColorSpace::RGB).set_strict_mode(true));
    } else {
        decoder.set_options(options.set_strict_mode(true));
    }
    let mut pixels = decoder.decode().map_err(|error| decode_error(&error))?;
    match colors {
        Colors::Plain | Colors::Rgb => {}
        Colors::Cmyk => cmyk_to_rgb(&mut pixels, |sample| sample),
        Colors::Ycck => cmyk_to_rgb(&mut pixels, ycc_to_cmy),
    }
    Ok(Stored {
        width: u32::from(header.width),
        height: u32::from(header.height),
        pixels,
        orientation: orientation.unwrap_or(Orientation::NoTransforms),
    })
}

/// Whether an end-of-image marker follows the last scan. Pillow refuses every file without one
/// ("image file is truncated"), complete or not; what follows the marker is of no interest.
fn reaches_end_of_image(bytes: &[u8], header: &JpegHeader) -> bool {
    let mut position = header.scan_start;
    while let Some((marker, start)) = position.and_then(|start| next_marker(bytes, start)) {
        position = match marker {
            EOI => return true,
            0x01 | 0xd0..=0xd8 => Some(start),
            _ => bytes
                .get(start..)
                .and_then(|rest| rest.first_chunk())
                .map(|length| start + usize::from(u16::from_be_bytes(*length)).max(2)),
        };
    }
    false
}

/// Pillow's raw mode `CMYK;I` followed by `convert("RGB")`, in place: 4 bytes per pixel become 3.
fn cmyk_to_rgb(pixels: &mut Vec<u8>, to_cmy: impl Fn([u8; 3]) -> [u8; 3]) {
    let num_pixels = pixels.len() / 4;
    for index in 0..num_pixels {
        let [first, second, third, key]: [u8; 4] =
            pixels[index * 4..][..4].try_into().expect("bug: a slice of four bytes");
        // Stored inverted: the stored key is already 255 - K.
        let cmy = to_cmy([first, second, third]).map(|inverted| 255 - inverted);
        let rgb = cmy.map(|ink| key - multiply_by_255th(ink, key));
        pixels[index * 3..][..3].copy_from_slice(&rgb);
    }
    pixels.truncate(num_pixels * 3);
}

/// Pillow's `MULDIV255`: a * b / 255, rounded. Never above either operand.
fn multiply_by_255th(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    (((product >> 8) + product) >> 8) as u8
}

/// libjpeg's `ycck_cmyk_convert` (jdcolor.c), 16-bit fixed point: YCbCr -> RGB -> 255 - RGB.
fn ycc_to_cmy([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let [y, cb, cr] = [i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128];
    let red = y + ((91_881 * cr + HALF) >> 16);
    let green = y + ((-22_554 * cb - 46_802 * cr + HALF) >> 16);
    let blue = y + ((116_130 * cb + HALF) >> 16);
    [red, green, blue].map(|value| (255 - value).clamp(0, 255) as u8)
}

fn decode_error(error: &DecodeErrors) -> LoadError {
    match error {
        DecodeErrors::Unsupported(feature) => {
            LoadError::Unsupported { format: Format::Jpeg, feature: format!("{feature:?}") }
        }
        other => LoadError::Corrupt { format: Format::Jpeg, message: other.to_string() },
    }
}
