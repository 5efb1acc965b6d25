//! What a file's first bytes say: its format and its stored size.
//!
//! Takes the whole file's bytes, gives the [`Format`] and the dimensions written in the header.
//! Must never allocate, never look at the file's name, and never need more than the header to be
//! intact: the size of a truncated picture is still worth writing to its row.

use std::borrow::Cow;
use std::fmt;
use std::io::Read;

/// Image formats that [`super::load`] reads.
#[expect(missing_docs, reason = "the variants are the formats' names")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Jpeg,
    Png,
    WebP,
    Gif,
    Bmp,
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
        })
    }
}

/// Finds the format by its magic bytes.
pub(super) fn sniff(bytes: &[u8]) -> Option<Format> {
    if bytes.starts_with(b"\xff\xd8\xff") {
        Some(Format::Jpeg)
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        Some(Format::Png)
    } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
        Some(Format::WebP)
    } else if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") {
        Some(Format::Gif)
    } else if bytes.starts_with(b"BM") && bytes.len() >= 18 && bmp_header_size_is_known(bytes) {
        Some(Format::Bmp)
    } else {
        None
    }
}

/// Reads (width, height) as stored, before any EXIF orientation. `None` where the header is
/// missing, cut short, or says zero.
pub(super) fn dimensions(format: Format, bytes: &[u8]) -> Option<(u32, u32)> {
    let (width, height) = match format {
        Format::Jpeg => {
            let header = JpegHeader::read(bytes)?;
            (u32::from(header.width), u32::from(header.height))
        }
        // PNG (third edition) 11.2.1: IHDR is the first chunk, its data start at byte 16.
        Format::Png if bytes.get(12..16) == Some(b"IHDR") => {
            (u32::from_be_bytes(array(bytes, 16)?), u32::from_be_bytes(array(bytes, 20)?))
        }
        Format::Png => return None,
        Format::WebP => webp_dimensions(bytes)?,
        // GIF89a section 18: the logical screen.
        Format::Gif => (u16_le(bytes, 6)?, u16_le(bytes, 8)?),
        Format::Bmp => bmp_dimensions(bytes)?,
    };
    (width > 0 && height > 0).then_some((width, height))
}

/// The parts of a JPEG's header that decide how its samples are turned into colours.
pub(super) struct JpegHeader {
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) num_components: u8,
    pub(super) is_progressive: bool,
    /// Offset of the word `Adobe` in the first APP14 segment, and that segment's colour transform.
    pub(super) adobe: Option<(usize, u8)>,
    /// Offset just behind the header of the first scan, where its entropy-coded data start.
    /// `None` where the file ends before.
    pub(super) scan_start: Option<usize>,
}

impl JpegHeader {
    /// Walks the marker segments (ITU-T T.81, annex B) up to the first scan.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut found: Option<Self> = None;
        let mut adobe = None;
        let mut position = 2;
        while let Some((marker, start)) = next_marker(bytes, position) {
            if marker == 0xd9 {
                break;
            }
            // TEM and RSTn stand alone, without a length.
            if marker == 0x01 || (0xd0..=0xd8).contains(&marker) {
                position = start;
                continue;
            }
            let Some(length) = array(bytes, start).map(u16::from_be_bytes) else { break };
            let end = start + usize::from(length).max(2);
            match marker {
                // SOF0 to SOF15 without DHT (c4), JPG (c8) and DAC (cc).
                0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) && found.is_none() => {
                    found = Some(Self {
                        height: u16::from_be_bytes(array(bytes, start + 3)?),
                        width: u16::from_be_bytes(array(bytes, start + 5)?),
                        num_components: *bytes.get(start + 7)?,
                        is_progressive: matches!(marker, 0xc2 | 0xc6 | 0xca | 0xce),
                        adobe: None,
                        scan_start: None,
                    });
                }
                0xee if adobe.is_none() && bytes.get(start + 2..start + 7) == Some(b"Adobe") => {
                    adobe = bytes.get(start + 13).map(|&transform| (start + 2, transform));
                }
                0xda => {
                    if let Some(header) = &mut found {
                        header.scan_start = Some(end);
                    }
                    break;
                }
                _ => {}
            }
            position = end;
        }
        if let Some(header) = &mut found {
            header.adobe = adobe;
        }
        found
    }
}

/// Scans of a JPEG, each of which is a pass over the picture.
pub(super) fn count_scans(bytes: &[u8], header: &JpegHeader) -> u64 {
    let mut num_scans = 0;
    let mut position = header.scan_start;
    while let Some((marker, start)) = position.and_then(|start| next_marker(bytes, start)) {
        num_scans += u64::from(marker == 0xda);
        position = match marker {
            0xd9 => break,
            0x01 | 0xd0..=0xd8 => Some(start),
            _ => array(bytes, start).map(|length| start + usize::from(u16::from_be_bytes(length)).max(2)),
        };
    }
    num_scans + u64::from(header.scan_start.is_some())
}

/// An APP14 segment too short to be Adobe's says nothing: libjpeg passes over it, zune-jpeg refuses it.
pub(super) fn without_short_app14(jpeg: &[u8]) -> Cow<'_, [u8]> {
    const ADOBE_BYTES: u16 = 14;
    let mut position = 2;
    while let Some((marker, start)) = next_marker(jpeg, position) {
        let Some(length) = array(jpeg, start).map(u16::from_be_bytes) else { break };
        match marker {
            0xda | 0xd9 => break,
            0xee if length < ADOBE_BYTES => {
                let mut commented = jpeg.to_vec();
                commented[start - 1] = 0xfe;
                return Cow::Owned(commented);
            }
            0x01 | 0xd0..=0xd8 => position = start,
            _ => position = start + usize::from(length).max(2),
        }
    }
    Cow::Borrowed(jpeg)
}

/// The EXIF block that ImageMagick used to write into PNGs: as hexadecimal digits in a text chunk, compressed or not.
pub(super) fn png_raw_exif(png: &[u8]) -> Option<Vec<u8>> {
    const KEYWORD: &[u8] = b"Raw profile type exif\0";
    const MAX_TEXT_BYTES: u64 = 1 << 20;
    let mut position = 8;
    while let Some(length) = array(png, position).map(u32::from_be_bytes) {
        let (kind, data) = (array::<4>(png, position + 4)?, png.get(position + 8..)?);
        let data = data.get(..length as usize)?;
        position += 12 + length as usize;
        let Some(text) = data.strip_prefix(KEYWORD) else { continue };
        let mut inflated = Vec::new();
        let text = match &kind {
            b"zTXt" => {
                flate2::read::ZlibDecoder::new(text.get(1..)?).take(MAX_TEXT_BYTES).read_to_end(&mut inflated).ok()?;
                &inflated[..]
            }
            b"tEXt" => text,
            _ => continue,
        };
        // A line with the name, one with the length, then the digits.
        let digits = text.splitn(4, |&byte| byte == b'\n').nth(3)?;
        let digits: Vec<u8> =
            digits.iter().filter_map(|&byte| char::from(byte).to_digit(16)).map(|digit| digit as u8).collect();
        return Some(digits.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect());
    }
    None
}

/// The first chunk of a kind in an extended WebP file, if the file has all of it. (`image-webp` makes room for whatever length the
/// chunk states.)
pub(super) fn webp_chunk<'a>(webp: &'a [u8], kind: &[u8; 4]) -> Option<&'a [u8]> {
    let mut position = 12;
    if &array::<4>(webp, position)? != b"VP8X" {
        return None;
    }
    loop {
        let length = u32::from_le_bytes(array(webp, position + 4)?) as usize;
        let data = webp.get(position + 8..)?;
        if &array::<4>(webp, position)? == kind {
            return data.get(..length);
        }
        position += 8 + length.next_multiple_of(2);
    }
}

/// Finds the next marker at or behind `position`: its code and the offset behind it. Skips
/// entropy-coded data, stuffed bytes (`ff 00`), fill bytes (`ff ff`) and stray bytes, as libjpeg.
pub(super) fn next_marker(bytes: &[u8], mut position: usize) -> Option<(u8, usize)> {
    loop {
        position += memchr::memchr(0xff, bytes.get(position..)?)? + 1;
        match bytes.get(position)? {
            0x00 => position += 1,
            0xff => {}
            &marker => return Some((marker, position + 1)),
        }
    }
}

/// WebP container specification and RFC 6386 section 9.1: extended, lossless or lossy header.
fn webp_dimensions(bytes: &[u8]) -> Option<(u32, u32)> {
    match bytes.get(12..16)? {
        b"VP8X" => {
            let [w0, w1, w2, h0, h1, h2] = array(bytes, 24)?;
            Some((u32::from_le_bytes([w0, w1, w2, 0]) + 1, u32::from_le_bytes([h0, h1, h2, 0]) + 1))
        }
        b"VP8L" if bytes.get(20) == Some(&0x2f) => {
            let packed = u32::from_le_bytes(array(bytes, 21)?);
            Some(((packed & 0x3fff) + 1, (packed >> 14 & 0x3fff) + 1))
        }
        b"VP8 " if bytes.get(23..26) == Some(b"\x9d\x01\x2a") => {
            Some((u16_le(bytes, 26)? & 0x3fff, u16_le(bytes, 28)? & 0x3fff))
        }
        _ => None,
    }
}

/// Where a WebP file ends by its own account.
pub(super) fn riff_end(bytes: &[u8]) -> Option<u64> {
    array(bytes, 4).map(|size| u64::from(u32::from_le_bytes(size)) + 8)
}

/// `BM` alone is too weak a sign: plenty of text starts with it.
fn bmp_header_size_is_known(bytes: &[u8]) -> bool {
    array(bytes, 14).map(u32::from_le_bytes).is_some_and(|size| matches!(size, 12 | 16..=124))
}

/// The height of a BMP is negative where its rows run from the top.
fn bmp_dimensions(bytes: &[u8]) -> Option<(u32, u32)> {
    if u32::from_le_bytes(array(bytes, 14)?) == 12 {
        return Some((u16_le(bytes, 18)?, u16_le(bytes, 20)?));
    }
    let width = i32::from_le_bytes(array(bytes, 18)?);
    let height = i32::from_le_bytes(array(bytes, 22)?);
    Some((u32::try_from(width).ok()?, height.unsigned_abs()))
}

fn array<const N: usize>(bytes: &[u8], start: usize) -> Option<[u8; N]> {
    bytes.get(start..)?.first_chunk().copied()
}

fn u16_le(bytes: &[u8], start: usize) -> Option<u32> {
    array(bytes, start).map(u16::from_le_bytes).map(u32::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_of_a_webp_is_found_where_the_file_has_all_of_it() {
        let file = |length: u32| {
            let mut file =
                b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\x08\0\0\0\x13\0\0\x10\0\0VP8 \x03\0\0\0abc\0EXIF".to_vec();
            file.extend(length.to_le_bytes());
            file.extend(b"Exif!");
            file
        };
        assert_eq!(webp_chunk(&file(5), b"EXIF"), Some(&b"Exif!"[..]));
        assert_eq!(webp_chunk(&file(5), b"VP8 "), Some(&b"abc"[..]));
        assert_eq!(webp_chunk(&file(5), b"XMP "), None);
        for length in [6, 0x7fff_ffff, u32::MAX] {
            assert_eq!(webp_chunk(&file(length), b"EXIF"), None, "{length}");
            assert_eq!(webp_chunk(&file(length), b"XMP "), None, "{length}");
        }
        let simple = b"RIFF\x10\0\0\0WEBPVP8 \x04\0\0\0abcdEXIF\x01\0\0\0x";
        assert_eq!(webp_chunk(simple, b"EXIF"), None, "not an extended file");
    }

    #[test]
    fn text_that_starts_like_a_bitmap_is_no_bitmap() {
        assert_eq!(sniff(b"BMW sells cars, here is a page about them"), None);
    }

    #[test]
    fn every_prefix_of_a_header_is_handled() {
        let jpeg = b"\xff\xd8\xff\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02\
            \xff\xc2\x00\x14\x08\x00\x07\x00\x09\x04\x01\x11\x00\x02\x11\x00\x03\x11\x00\x04\x11\x00\
            \xff\xda\x00\x04\x00\x00\x12\x34\xff\x00\x56\xff\xd9";
        for end in 0..jpeg.len() {
            let _ = JpegHeader::read(&jpeg[..end]);
        }
        let header = JpegHeader::read(jpeg).unwrap();
        assert_eq!((header.width, header.height, header.num_components), (9, 7, 4));
        assert!(header.is_progressive);
        assert_eq!(header.adobe.unwrap().1, 2);
        let scan_start = header.scan_start.unwrap();
        assert_eq!(&jpeg[scan_start..scan_start + 2], b"\x12\x34");
        assert_eq!(next_marker(jpeg, scan_start), Some((0xd9, jpeg.len())));
        for magic in [&b"RIFF\x20\0\0\0WEBPVP8X"[..], b"RIFF\x20\0\0\0WEBPVP8L", b"GIF89a"] {
            assert_eq!(dimensions(sniff(magic).unwrap(), magic), None);
        }
    }
}
