//! GIF bytes -> stored RGB pixels of the first frame, as Pillow shows it.
//!
//! The gif crate is used directly, because `image` turns what the first frame leaves uncovered into
//! transparent black, where Pillow gives it the colour of the transparent index (else of index 0).
//! Must never decode a second frame: an animation can be far larger than its file.

use std::borrow::Cow;
use std::num::NonZeroU64;

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};
use image::metadata::Orientation;

use super::probe::Format;
use super::{LoadError, LoadLimits, Stored};

/// Decodes the first frame into [height, width, 3] samples of 8 bits.
///
/// # Errors
///
/// Truncated or damaged files, files without a frame or a colour table, limits.
pub(super) fn decode(bytes: &[u8], limits: &LoadLimits) -> Result<Stored, LoadError> {
    let to_error = |error| decode_error(bytes, &error);
    let bytes = &*with_palette(bytes);
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    if let Some(max_bytes) = NonZeroU64::new(limits.max_alloc_bytes) {
        options.set_memory_limit(MemoryLimit::Bytes(max_bytes));
    }
    let mut decoder = options.read_info(bytes).map_err(to_error)?;
    let screen = [decoder.width(), decoder.height()].map(usize::from);
    let Some(frame) = decoder.next_frame_info().map_err(to_error)? else {
        return Err(LoadError::Corrupt { format: Format::Gif, message: "no frame".to_owned() });
    };
    let [left, top, frame_width, frame_height] = [frame.left, frame.top, frame.width, frame.height].map(usize::from);
    let fill = frame.transparent.unwrap_or(0);
    // Pillow lets a frame that sticks out of the screen enlarge it.
    let (width, height) = (screen[0].max(left + frame_width), screen[1].max(top + frame_height));
    limits.check_pixels((width as u32, height as u32))?;
    limits.check_bytes((frame_width * frame_height + 3 * width * height) as u64)?;
    // [frame_height, frame_width]
    let mut indices = vec![0; frame_width * frame_height];
    decoder.read_into_buffer(&mut indices).map_err(to_error)?;

    let mut colors = [[0; 3]; 256];
    let palette = decoder.palette().map_err(to_error)?;
    for (color, entry) in colors.iter_mut().zip(palette.chunks_exact(3)) {
        color.copy_from_slice(entry);
    }
    let mut pixels = Vec::with_capacity(width * height * 3);
    let mut push = |num_pixels: usize, index: u8| {
        for _ in 0..num_pixels {
            pixels.extend_from_slice(&colors[usize::from(index)]);
        }
    };
    push(top * width, fill);
    // An empty frame has no rows to visit; what follows then fills the whole screen.
    for row in indices.chunks_exact(frame_width.max(1)) {
        push(left, fill);
        for &index in row {
            push(1, index);
        }
        push(width - left - frame_width, fill);
    }
    let num_missing = width * height - pixels.len() / 3;
    for _ in 0..num_missing {
        pixels.extend_from_slice(&colors[usize::from(fill)]);
    }
    let orientation = Orientation::NoTransforms;
    Ok(Stored { width: width as u32, height: height as u32, pixels, orientation })
}

/// A file without a global colour table gets one of greys, which Pillow assumes; frames with their own do not look at it.
fn with_palette(bytes: &[u8]) -> Cow<'_, [u8]> {
    const HEADER_BYTES: usize = 13;
    const HAS_PALETTE: u8 = 0x80;
    const COLORS_256: u8 = 0x07;
    match bytes.get(..HEADER_BYTES) {
        Some(header) if header[10] & HAS_PALETTE == 0 => {
            let mut with_greys = header.to_vec();
            with_greys[10] |= HAS_PALETTE | COLORS_256;
            with_greys.extend((0..=255).flat_map(|grey| [grey; 3]));
            with_greys.extend(&bytes[HEADER_BYTES..]);
            Cow::Owned(with_greys)
        }
        _ => Cow::Borrowed(bytes),
    }
}

fn decode_error(bytes: &[u8], error: &DecodingError) -> LoadError {
    match error {
        DecodingError::UnexpectedEof => LoadError::Truncated { format: Format::Gif, num_bytes: bytes.len() },
        other => LoadError::Corrupt { format: Format::Gif, message: other.to_string() },
    }
}
