//! What `recaption run` reads from anybody: images, tars, sidecars, templates, ranges.

use recaption::fuzzing;
use recaption::pipeline::input::Input;
use recaption::pipeline::load::{LoadError, LoadLimits, load, stored_dimensions};
use recaption::pipeline::source::limits::SourceLimits;

/// An image of any format.
pub fn image(data: &[u8]) {
    let limits = LoadLimits { max_pixels: 1 << 20, max_alloc_bytes: 1 << 26 };
    let stored = stored_dimensions(data);
    match load(data, &limits) {
        Ok(image) => {
            let num_pixels = u64::from(image.width) * u64::from(image.height);
            assert!(num_pixels <= limits.max_pixels);
            assert_eq!(image.pixels.len() as u64, 3 * num_pixels);
            assert!(stored.is_some(), "a picture without dimensions");
        }
        // The load stage confines a decoder's panic to one row: the fuzzer has seen it already.
        Err(LoadError::DecoderPanicked { format, message }) => panic!("{format}: {message}"),
        Err(_) => {}
    }
}

/// A tar, gzip-compressed where it says so.
pub fn tar(data: &[u8]) {
    let limits = SourceLimits {
        max_image_bytes: 1 << 20,
        max_sidecar_bytes: 1 << 16,
        max_gzip_ratio: 10,
        ..SourceLimits::default()
    };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("fuzz.tar");
    std::fs::write(&path, data).expect("writes");
    let _ = fuzzing::source(Input::Tar(path.into()), &limits);
}

/// A tar of one image with `data` as its sidecar.
pub fn sidecar(data: &[u8]) {
    let mut tar = Vec::new();
    for (name, content) in [("0.jpg", &b"\xff\xd8\xff"[..]), ("0.json", data)] {
        let mut header = [0_u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar  \0");
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend(header);
        tar.extend(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.extend([0; 1024]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("fuzz.tar");
    std::fs::write(&path, tar).expect("writes");
    assert_eq!(fuzzing::source(Input::Tar(path.into()), &SourceLimits::default()), (1, 0), "the image goes missing");
}

/// A Parquet file.
pub fn parquet(data: &[u8]) {
    let limits = SourceLimits { max_image_bytes: 1 << 20, max_parquet_page_bytes: 1 << 24, ..SourceLimits::default() };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("fuzz.parquet");
    std::fs::write(&path, data).expect("writes");
    let _ = fuzzing::source(Input::Parquet(path.into()), &limits);
}

/// The journal of a run that was killed.
pub fn journal(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("fuzz.journal");
    std::fs::write(&path, data).expect("writes");
    let _ = fuzzing::replay_journal(&path);
}

/// A Jinja template, a brace range.
pub fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = fuzzing::render_chat(text);
    // A longer range may stand for ten million paths, which are not of interest here.
    if text.len() < 10 {
        let _ = fuzzing::expand_braces(text);
    }
}

/// A `tokenizer.json`.
pub fn tokenizer(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, data).expect("writes");
    let _ = fuzzing::tokenize(&path);
}
