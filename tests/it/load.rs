//! The load stage on pictures made here: limits, damage, orientation, sample formats.

use std::io::Cursor;

use image::codecs::{bmp::BmpEncoder, jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder};
use recaption::export::Preprocessing;
use recaption::pipeline::load::{Format, LoadError, LoadLimits, Loader, RgbImage, load, stored_dimensions};
use serde_json::json;

use crate::support::root;

const WIDTH: u32 = 21;
const HEIGHT: u32 = 13;

fn samples(num_channels: u32) -> Vec<u8> {
    (0..WIDTH * HEIGHT * num_channels).map(|index| (index * 7 % 256) as u8).collect()
}

fn png(data: &[u8], color: ExtendedColorType, exif: Option<u8>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = PngEncoder::new(&mut bytes);
    if let Some(orientation) = exif {
        let tiff = [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0", &[orientation, 0, 0, 0, 0, 0, 0, 0][..]];
        encoder.set_exif_metadata(tiff.concat()).unwrap();
    }
    encoder.write_image(data, WIDTH, HEIGHT, color).unwrap();
    bytes
}

fn jpeg() -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = JpegEncoder::new_with_quality(&mut bytes, 90);
    encoder.write_image(&samples(3), WIDTH, HEIGHT, ExtendedColorType::Rgb8).unwrap();
    bytes
}

fn gif() -> Vec<u8> {
    let mut bytes = Vec::new();
    // The frame covers a part of the screen only.
    let mut encoder = gif::Encoder::new(&mut bytes, 21, 13, &[1, 2, 3, 4, 5, 6]).unwrap();
    let frame =
        gif::Frame { left: 2, top: 1, width: 10, height: 5, buffer: vec![1; 50].into(), ..gif::Frame::default() };
    encoder.write_frame(&frame).unwrap();
    drop(encoder);
    bytes
}

fn every_format() -> [(Format, Vec<u8>); 5] {
    let mut webp = Vec::new();
    let encoder = WebPEncoder::new_lossless(&mut webp);
    encoder.write_image(&samples(3), WIDTH, HEIGHT, ExtendedColorType::Rgb8).unwrap();
    let mut bmp = Cursor::new(Vec::new());
    let encoder = BmpEncoder::new(&mut bmp);
    encoder.write_image(&samples(3), WIDTH, HEIGHT, ExtendedColorType::Rgb8).unwrap();
    [
        (Format::Jpeg, jpeg()),
        (Format::Png, png(&samples(3), ExtendedColorType::Rgb8, None)),
        (Format::WebP, webp),
        (Format::Gif, gif()),
        (Format::Bmp, bmp.into_inner()),
    ]
}

/// Plain JPEGs of the kinds that have a decoder of their own: subsampled chroma, restart markers, grey, turned.
fn plain_jpegs() -> Vec<Vec<u8>> {
    let folder = root("tests/data/images/edge");
    let names = ["colour-420.jpg", "rgb-restarts.jpg", "grey.jpg", "orientation-6.jpg"];
    names.into_iter().map(|name| std::fs::read(folder.join(name)).unwrap()).collect()
}

fn pixels(bytes: &[u8]) -> Vec<u8> {
    load(bytes, &LoadLimits::default()).unwrap().pixels
}

fn reason(bytes: &[u8]) -> String {
    load(bytes, &LoadLimits::default()).unwrap_err().to_string()
}

#[test]
fn every_format_loads_and_tells_its_size() {
    for (format, bytes) in every_format() {
        let image = load(&bytes, &LoadLimits::default()).unwrap();
        assert_eq!((image.width, image.height), (WIDTH, HEIGHT), "{format}");
        assert_eq!(stored_dimensions(&bytes), Some((WIDTH, HEIGHT)), "{format}");
        if !matches!(format, Format::Jpeg | Format::Gif) {
            assert_eq!(image.pixels, samples(3), "{format}");
        }
    }
}

#[test]
fn what_a_gif_frame_leaves_open_has_the_first_colour() {
    let pixels = pixels(&gif());
    for (index, pixel) in pixels.chunks_exact(3).enumerate() {
        let (x, y) = (index % 21, index / 21);
        let is_covered = (2..12).contains(&x) && (1..6).contains(&y);
        assert_eq!(pixel, if is_covered { [4, 5, 6] } else { [1, 2, 3] });
    }
}

#[test]
fn sample_formats_become_rgb() {
    let grey = pixels(&png(&samples(1), ExtendedColorType::L8, None));
    assert!(grey.chunks_exact(3).zip(samples(1)).all(|(rgb, grey)| rgb == [grey; 3]));
    let grey_alpha = pixels(&png(&samples(2), ExtendedColorType::La8, None));
    assert!(grey_alpha.chunks_exact(3).zip(samples(2).chunks_exact(2)).all(|(rgb, la)| rgb == [la[0]; 3]));
    let alpha = pixels(&png(&samples(4), ExtendedColorType::Rgba8, None));
    assert!(alpha.chunks_exact(3).zip(samples(4).chunks_exact(4)).all(|(rgb, rgba)| *rgb == rgba[..3]));
    // 16-bit samples keep the high byte; the encoder takes them in native order.
    let high = usize::from(cfg!(target_endian = "little"));
    for (channels, color) in
        [(2, ExtendedColorType::L16), (6, ExtendedColorType::Rgb16), (8, ExtendedColorType::Rgba16)]
    {
        let data = samples(channels);
        let rgb = pixels(&png(&data, color, None));
        for (rgb, wide) in rgb.chunks_exact(3).zip(data.chunks_exact(channels as usize)) {
            let offsets = if channels == 2 { [0, 0, 0] } else { [0, 2, 4] };
            assert_eq!(rgb, offsets.map(|offset| wide[offset + high]));
        }
    }
}

#[test]
fn orientations_turn_the_picture_upright() {
    let at = |image: &RgbImage, x: u32, y: u32| image.pixels[((y * image.width + x) * 3) as usize];
    let stored = load(&png(&samples(3), ExtendedColorType::Rgb8, None), &LoadLimits::default()).unwrap();
    let corners = [(0, 0), (WIDTH - 1, 0), (WIDTH - 1, HEIGHT - 1), (0, HEIGHT - 1)];
    // Where the upright picture's top left and top right corner are stored (Exif 2.32, tag 274).
    let expected = [(0, 1), (1, 0), (2, 3), (3, 2), (0, 3), (3, 0), (2, 1), (1, 2)];
    for (orientation, (top_left, top_right)) in (1..).zip(expected) {
        let bytes = png(&samples(3), ExtendedColorType::Rgb8, Some(orientation));
        let image = load(&bytes, &LoadLimits::default()).unwrap();
        let is_turned = orientation >= 5;
        let upright = if is_turned { (HEIGHT, WIDTH) } else { (WIDTH, HEIGHT) };
        assert_eq!((image.width, image.height), upright);
        assert_eq!((image.stored_width, image.stored_height), (WIDTH, HEIGHT));
        for (x, corner) in [(0, top_left), (image.width - 1, top_right)] {
            let (stored_x, stored_y) = corners[corner];
            assert_eq!(at(&image, x, 0), at(&stored, stored_x, stored_y), "orientation {orientation}");
        }
    }
}

#[test]
fn what_is_no_image_says_how_it_starts() {
    assert_eq!(reason(b""), "empty file (0 bytes); fetch it again");
    let text = "not a JPEG, PNG, WebP, GIF or BMP image (starts with `<!DO`)";
    assert_eq!(reason(b"<!DOCTYPE html>"), text);
    assert!(reason(b"\0\xffa").ends_with("(starts with `\\x00\\xffa`)"));
    assert_eq!(stored_dimensions(b"<!DOCTYPE html>"), None);
}

#[test]
fn a_decompression_bomb_costs_nothing() {
    let mut bomb = png(&samples(3), ExtendedColorType::Rgb8, None);
    bomb[16..24].copy_from_slice(&[0, 0, 0x75, 0x30, 0, 0, 0x75, 0x30]);
    assert_eq!(
        reason(&bomb),
        "30000x30000 is 900000000 pixels, above the limit of 178956970; \
         raise the limit if the image is genuine"
    );
    assert_eq!(stored_dimensions(&bomb), Some((30_000, 30_000)));
    for (format, bytes) in every_format() {
        let few_pixels = LoadLimits { max_pixels: 272, ..LoadLimits::default() };
        assert!(matches!(load(&bytes, &few_pixels), Err(LoadError::TooManyPixels { .. })), "{format}");
        let few_bytes = LoadLimits { max_alloc_bytes: 818, ..LoadLimits::default() };
        if format != Format::Gif {
            assert!(matches!(load(&bytes, &few_bytes), Err(LoadError::TooManyBytes { .. })), "{format}");
        }
    }
}

#[test]
fn a_cut_file_is_refused_at_every_length() {
    for (format, bytes) in every_format() {
        let complete = load(&bytes, &LoadLimits::default()).unwrap();
        for length in 1..bytes.len() {
            match load(&bytes[..length], &LoadLimits::default()) {
                Err(LoadError::DecoderPanicked { message, .. }) => panic!("{format} {length}: {message}"),
                Err(_) => {}
                // GIF's trailer, BMP's last padding and the last checksum of a PNG hold no pixels.
                Ok(image) => {
                    assert!(length + 4 >= bytes.len(), "{format} cut to {length} of {}", bytes.len());
                    assert!(!matches!(format, Format::Jpeg | Format::WebP));
                    assert_eq!(image, complete);
                }
            }
        }
    }
    let whole = jpeg();
    let cut = LoadError::Truncated { format: Format::Jpeg, num_bytes: whole.len() - 2 };
    assert_eq!(load(&whole[..whole.len() - 2], &LoadLimits::default()), Err(cut));
}

#[test]
fn what_follows_the_end_of_an_image_is_ignored() {
    for (format, mut bytes) in every_format() {
        let alone = pixels(&bytes);
        bytes.extend_from_slice(b"\xff\xd8\xff\xe1 trailing bytes of another tool");
        assert_eq!(pixels(&bytes), alone, "{format}");
    }
}

#[test]
fn damaged_files_never_panic_through() {
    let mut random = 1_u32;
    // Loaders that have seen damage before, and that reduce what they load to a few pixels.
    let config = json!({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 2},
        "crop_size": {"height": 2, "width": 2}});
    let limits = LoadLimits { max_pixels: 1 << 20, max_alloc_bytes: 1 << 24 };
    let mut loader = Loader::new(limits.clone(), Some(Preprocessing::from_hf(&config, 2).unwrap()));
    for bytes in every_format().into_iter().map(|(_, bytes)| bytes).chain(plain_jpegs()) {
        for _ in 0..400 {
            let mut damaged = bytes.clone();
            for _ in 0..3 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let position = random as usize % damaged.len();
                damaged[position] = (random >> 24) as u8;
            }
            for loaded in [load(&damaged, &limits), loader.load(&damaged, Vec::new())] {
                match loaded {
                    Ok(image) => {
                        let [columns, rows] = [image.width, image.height].map(|side| side.div_ceil(image.reduction));
                        assert_eq!(image.pixels.len() as u64, 3 * u64::from(columns) * u64::from(rows));
                    }
                    Err(LoadError::DecoderPanicked { format: Format::Jpeg, message }) => panic!("{message}"),
                    Err(_) => {}
                }
            }
            let _ = stored_dimensions(&damaged);
        }
    }
}

#[test]
fn a_plain_jpeg_is_cut_or_continued_as_any_other() {
    for bytes in plain_jpegs() {
        let alone = pixels(&bytes);
        for length in 1..bytes.len() {
            let cut = load(&bytes[..length], &LoadLimits::default());
            assert!(
                !matches!(cut, Ok(_) | Err(LoadError::DecoderPanicked { .. })),
                "cut to {length} of {}",
                bytes.len()
            );
        }
        let followed = [&bytes[..], b"\xff\xd8\xff\xe1 trailing bytes of another tool"].concat();
        assert_eq!(pixels(&followed), alone);
    }
}

#[test]
fn a_loader_forgets_the_picture_before() {
    let mut files = plain_jpegs();
    files.extend(every_format().into_iter().map(|(_, bytes)| bytes));
    let mut loader = Loader::new(LoadLimits::default(), None);
    let mut memory = Vec::new();
    for bytes in files.iter().chain(files.iter().rev()) {
        let image = loader.load(bytes, std::mem::take(&mut memory)).unwrap();
        assert_eq!(image, load(bytes, &LoadLimits::default()).unwrap());
        // A damaged file in between leaves nothing behind.
        assert!(loader.load(&bytes[..bytes.len() / 2], Vec::new()).is_err());
        memory = image.pixels;
    }
}
