//! Inputs made to hurt: bombs, endless files, links, names that climb out. Each costs one row or one shard, and a bounded
//! amount of memory.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use recaption::pipeline::load::{LoadError, LoadLimits, load, stored_dimensions};
use serde_json::Value;

use crate::support::{demo_bundle, printed_rows, recaption, root, stderr};

/// A PNG of these chunks; `IHDR` says 8-bit RGB.
fn png(width: u32, height: u32, chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend([8, 2, 0, 0, 0]);
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    let all = [(b"IHDR", header)];
    for (name, data) in all.iter().chain(chunks).chain(&[(b"IEND", Vec::new())]) {
        bytes.extend((data.len() as u32).to_be_bytes());
        let start = bytes.len();
        bytes.extend(*name);
        bytes.extend(data);
        let crc = crc32fast::hash(&bytes[start..]);
        bytes.extend(crc.to_be_bytes());
    }
    bytes
}

/// `num_bytes` zeros, zlib-compressed a thousandfold.
fn zeros(num_bytes: usize) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    let block = vec![0; 1 << 16];
    for _ in 0..num_bytes >> 16 {
        encoder.write_all(&block).unwrap();
    }
    encoder.write_all(&block[..num_bytes % (1 << 16)]).unwrap();
    encoder.finish().unwrap()
}

/// The pixels of a `side` x `side` PNG.
fn pixels(side: usize) -> Vec<u8> {
    zeros(side * (3 * side + 1))
}

/// A grey progressive JPEG of one DC scan and `num_scans` AC scans that say "nothing" for all blocks.
fn progressive_jpeg(side: u16, num_scans: usize) -> Vec<u8> {
    let mut bytes = b"\xff\xd8\xff\xdb\0\x43\0".to_vec();
    bytes.extend([1; 64]);
    bytes.extend(b"\xff\xc2\0\x0b\x08");
    bytes.extend([side.to_be_bytes(), side.to_be_bytes()].concat());
    bytes.extend([1, 1, 0x11, 0]);
    // One code of one bit each: DC difference 0; AC "no more in 2^14 blocks and as many as 14 bits say".
    for (class, symbol) in [(0x00, 0x00), (0x10, 0xe0)] {
        bytes.extend([0xff, 0xc4, 0, 20, class, 1]);
        bytes.extend([0; 15]);
        bytes.push(symbol);
    }
    let blocks = usize::from(side).div_ceil(8).pow(2);
    bytes.extend(b"\xff\xda\0\x08\x01\x01\0\0\0\0");
    bytes.extend(vec![0; blocks.div_ceil(8)]);
    let num_bits = 15 * blocks.div_ceil(1 << 14);
    for scan in 0..num_scans {
        bytes.extend([0xff, 0xda, 0, 8, 1, 1, 0, 1 + (scan % 63) as u8, 1 + (scan % 63) as u8, 0]);
        bytes.extend(vec![0; num_bits.div_ceil(8)]);
    }
    bytes.extend(b"\xff\xd9");
    bytes
}

/// A GIF of one small picture after a million frames of nothing would come a small picture: the first frame counts.
fn endless_gif(num_frames: usize) -> Vec<u8> {
    let mut bytes = b"GIF89a\x04\0\x04\0\x80\0\0\0\0\0\xff\xff\xff".to_vec();
    for _ in 0..num_frames {
        bytes.extend(b",\0\0\0\0\x04\0\x04\0\0\x02\x05\x84\x8f\xa9\xcb\x0d\0");
    }
    bytes
}

fn decoded(bytes: &[u8]) -> Result<(u32, u32), LoadError> {
    load(bytes, &LoadLimits::default()).map(|image| (image.width, image.height))
}

#[test]
fn what_swells_beyond_the_picture_is_never_held() {
    let bomb = zeros(256 << 20);
    let text = |keyword: &[u8], middle: &[u8]| [keyword, middle, &bomb].concat();
    let chunks: [(&[u8; 4], Vec<u8>); 4] = [
        (b"iTXt", text(b"XML:com.adobe.xmp", b"\0\x01\0\0\0")),
        (b"zTXt", text(b"Comment", b"\0\0")),
        (b"iCCP", text(b"profile", b"\0\0")),
        (b"eXIf", vec![b'I'; 32 << 20]),
    ];
    for chunk in chunks {
        let name = String::from_utf8_lossy(chunk.0).into_owned();
        let bytes = png(4, 4, &[chunk, (b"IDAT", pixels(4))]);
        assert_eq!(stored_dimensions(&bytes), Some((4, 4)));
        assert_eq!(decoded(&bytes), Ok((4, 4)), "{name}");
    }
    // Pixels behind the last row are not asked for.
    assert_eq!(decoded(&png(4, 4, &[(b"IDAT", bomb)])), Ok((4, 4)));
}

#[test]
fn a_jpeg_of_many_scans_is_refused_and_one_of_some_is_not() {
    assert_eq!(decoded(&progressive_jpeg(16, 63)), Ok((16, 16)));
    let refused = decoded(&progressive_jpeg(16, 20_000)).unwrap_err();
    assert_eq!(refused, LoadError::TooManyScans { num_scans: 20_001, max_scans: 1000 });
    let refused = decoded(&progressive_jpeg(8000, 63)).unwrap_err();
    assert_eq!(refused, LoadError::TooManyScans { num_scans: 64, max_scans: 44 });
}

#[test]
fn of_an_endless_animation_the_first_frame_is_taken() {
    assert_eq!(decoded(&endless_gif(1)), Ok((4, 4)));
    assert_eq!(decoded(&endless_gif(1_000_000)), Ok((4, 4)));
}

/// Runs the binary over `inputs`, with the most memory it has had, in bytes.
#[cfg(target_os = "linux")]
pub(crate) fn peak_of(arguments: &[&str], lines: &str) -> (std::process::Output, u64) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let status = format!("/proc/{}/status", child.id());
    // The kernel's own high-water mark: what is missed is what the last moment before the exit adds.
    let watch = std::thread::spawn(move || {
        let mut peak = 0;
        while let Ok(text) = std::fs::read_to_string(&status) {
            let Some(line) = text.lines().find_map(|line| line.strip_prefix("VmHWM:")) else { break };
            peak = line.trim().trim_end_matches(" kB").parse().unwrap_or(peak);
            std::thread::sleep(Duration::from_millis(5));
        }
        peak * 1024
    });
    let output = child.wait_with_output().unwrap();
    (output, watch.join().unwrap())
}

/// Peak memory of a run over bombs; that of the demo model over one small picture is about 0.2 GB of it.
#[cfg(target_os = "linux")]
const MAX_BOMBS_RSS: u64 = 1 << 30;

#[test]
#[cfg(target_os = "linux")]
fn a_folder_of_bombs_is_captioned_within_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let bomb = zeros(512 << 20);
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    let text = [b"XML:com.adobe.xmp\0\x01\0\0\0", &bomb[..]].concat();
    write("00-pixels-behind.png", &png(4, 4, &[(b"IDAT", bomb.clone())]));
    write("01-text.png", &png(4, 4, &[(b"iTXt", text.clone()), (b"IDAT", pixels(4))]));
    write("02-texts.png", &png(4, 4, &[(b"iTXt", text.clone()), (b"iTXt", text), (b"IDAT", pixels(4))]));
    write("03-profile.png", &png(4, 4, &[(b"iCCP", [b"p\0\0", &bomb[..]].concat()), (b"IDAT", pixels(4))]));
    write("04-animation.gif", &endless_gif(1_000_000));
    // From here on nothing loads.
    write("10-claims-900-mpx.png", &png(30_000, 30_000, &[(b"IDAT", bomb.clone())]));
    write(
        "11-claims-4-gpx.gif",
        b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x05\x84\x8f\xa9\xcb\x0d\0;",
    );
    write("12-claims-268-mpx.webp", b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xfe\x3f\0\xfe\x3f\0");
    write("13-claims-4-epx.bmp", b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\xff\xff\xff\x7f\xff\xff\xff\x7f\x01\0\x18\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    write("14-scans.jpg", &progressive_jpeg(1000, 100_000));
    write("15-a-zip.jpg", &[b"PK\x03\x04", &bomb[..]].concat());
    std::os::unix::fs::symlink("/dev/zero", folder.path().join("20-endless.jpg")).unwrap();
    std::os::unix::fs::symlink("30-loop.png", folder.path().join("30-loop.png")).unwrap();
    let fifo = folder.path().join("31-silent.png");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    std::os::unix::fs::symlink(folder.path(), folder.path().join("32-itself")).unwrap();

    let bundle = demo_bundle();
    let arguments = ["--model", bundle.to_str().unwrap(), "--quiet", "--max-new-tokens", "2", "--provider", "cpu"];
    // The list names what a search through the folder may pass over.
    let lines: Vec<String> = ["20-endless.jpg", "30-loop.png", "31-silent.png", ".", "nowhere.png"]
        .iter()
        .map(|name| format!("{}\n", folder.path().join(name).display()))
        .collect();
    let inputs = ["run", folder.path().to_str().unwrap(), "-"];
    let (output, peak) = peak_of(&[&inputs[..], &arguments].concat(), &lines.concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let rows = printed_rows(&output);
    let failed: Vec<&str> =
        rows.iter().filter(|row| row["status"] == "failed").map(|row| row["key"].as_str().unwrap()).collect();
    let (good, bad): (Vec<&Value>, _) = rows.iter().partition(|row| row["key"].as_str().unwrap().starts_with('0'));
    assert_eq!(good.len(), 5, "{rows:?}");
    assert!(good.iter().all(|row| row["status"] == "ok"), "{failed:?}");
    assert!(bad.len() >= 11 && bad.iter().all(|row| row["status"] == "failed"), "{failed:?}");
    assert!(peak > 0 && peak < MAX_BOMBS_RSS, "{peak} bytes at the peak");
}

/// A tar's member as its bytes lie: name, type, content.
fn member(tar: &mut tar::Builder<Vec<u8>>, name: &[u8], kind: tar::EntryType, link: &str, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    // `set_path` refuses what this is about.
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    tar.append(&header, content).unwrap();
}

fn files_below(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn names_and_links_in_a_tar_reach_nothing_outside() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret.png");
    let image = std::fs::read(root("tests/data/images/42/a.png")).unwrap();
    std::fs::write(&secret, &image).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let plain = tar::EntryType::Regular;
    for name in ["../../climbs.png", "/absolute.png", "a/../../b.png", "..\\windows.png", "C:\\drive.png"] {
        member(&mut tar, name.as_bytes(), plain, "", &image);
    }
    member(&mut tar, b"soft.png", tar::EntryType::Symlink, secret.to_str().unwrap(), b"");
    member(&mut tar, b"hard.png", tar::EntryType::Link, "../secret.png", b"");
    member(&mut tar, b"device.png", tar::EntryType::Block, "", b"");
    member(&mut tar, b"pipe.png", tar::EntryType::Fifo, "", b"");
    member(&mut tar, b"last.png", plain, "", &image);
    let path = folder.path().join("in.tar");
    std::fs::write(&path, tar.into_inner().unwrap()).unwrap();
    let out = folder.path().join("out");
    let bundle = demo_bundle();
    for arguments in [&["--format", "jsonl", "--out", out.to_str().unwrap()][..], &[]] {
        let inputs = ["run", path.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"];
        let output = recaption(&[&inputs[..], &["--max-new-tokens", "2"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        if arguments.is_empty() {
            let rows = printed_rows(&output);
            let of = |status: &str| -> Vec<&str> {
                rows.iter().filter(|row| row["status"] == status).map(|row| row["key"].as_str().unwrap()).collect()
            };
            // `..\\windows.png` begins with a dot: hidden, like macOS's `._x`.
            assert_eq!(of("ok"), ["../../climbs", "/absolute", "a/../../b", "C:\\drive", "last"]);
            assert!(of("failed").iter().all(|key| ["soft", "hard"].contains(key)), "{rows:?}");
        }
    }
    assert_eq!(files_below(folder.path()), ["in.tar", "out", "secret.png"]);
    let above: Vec<String> = files_below(folder.path().parent().unwrap());
    assert!(!above.iter().any(|name| name.contains("climbs") || name == "b.png"));
}

/// One tar, run: the exit code, the rows, what was said.
fn run_tar(bytes: &[u8], name: &str, arguments: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let bundle = demo_bundle();
    let inputs = ["run", path.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--quiet"];
    let output = recaption(&[&inputs[..], &["--max-new-tokens", "2"], arguments].concat());
    (output.status.code(), printed_rows(&output), stderr(&output))
}

#[test]
fn a_tar_that_swells_is_refused_by_the_name_of_the_limit() {
    let gzip = |parts: &[&[u8]], zeros: usize| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        parts.iter().for_each(|part| encoder.write_all(part).unwrap());
        let block = vec![0; 1 << 20];
        (0..zeros).for_each(|_| encoder.write_all(&block).unwrap());
        encoder.finish().unwrap()
    };
    let mut header = tar::Header::new_gnu();
    header.set_path("bomb.bin").unwrap();
    header.set_size(4 << 30);
    header.set_cksum();
    let (code, rows, message) = run_tar(&gzip(&[header.as_bytes()], 200), "bomb.tar.gz", &[]);
    assert_eq!((code, rows.len()), (Some(1), 0), "{message}");
    assert!(message.contains("--max-gzip-ratio"), "{message}");

    // A name of gigabytes, in a long-name and in a PAX record.
    for kind in [tar::EntryType::GNULongName, tar::EntryType::XHeader] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_path("././@LongLink").unwrap();
        header.set_size(4 << 30);
        header.set_cksum();
        let (code, rows, message) = run_tar(&gzip(&[header.as_bytes()], 60), "name.tar.gz", &[]);
        assert_eq!((code, rows.len()), (Some(1), 0), "{message}");
        assert!(message.contains("names are longer than"), "{message}");
    }
}

#[test]
fn sidecars_beyond_the_limits_do_not_cost_the_image() {
    let image = std::fs::read(root("tests/data/images/42/a.png")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let plain = tar::EntryType::Regular;
    member(&mut tar, b"a.png", plain, "", &image);
    member(&mut tar, b"a.json", plain, "", "[".repeat(1_000_000).as_bytes());
    member(&mut tar, b"b.png", plain, "", &image);
    member(&mut tar, b"b.json", plain, "", br#"{"url": "u", "deep": [[[[[[1]]]]]]}"#);
    member(&mut tar, b"c.png", plain, "", &image);
    member(&mut tar, b"c.txt", plain, "", &vec![b'x'; 2_000_000]);
    let limits = ["--max-json-depth", "5", "--max-sidecar-bytes", "1500000"];
    let (code, rows, message) = run_tar(&tar.into_inner().unwrap(), "deep.tar", &limits);
    assert_eq!(code, Some(0), "{message}");
    let metadata = |index: usize| rows[index]["metadata"].as_str().unwrap();
    assert_eq!(metadata(0).len(), 1_000_000);
    assert_eq!((metadata(1), &rows[1]["url"]), (r#"{"url": "u", "deep": [[[[[[1]]]]]]}"#, &Value::Null));
    assert_eq!(rows[2]["org_caption"], Value::Null);
}

#[test]
fn a_sparse_member_of_a_terabyte_is_a_failed_row() {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse.png").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_size(512);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize = *b"\x80\0\0\0\0\0\x01\0\0\0\0\0";
    gnu.sparse[0].offset = *b"\x80\0\0\0\0\0\0\xff\xff\xff\xfe\0";
    gnu.sparse[0].numbytes = *b"00000001000\0";
    header.set_cksum();
    let image = std::fs::read(root("tests/data/images/42/a.png")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, &[0; 512][..]).unwrap();
    member(&mut tar, b"good.png", tar::EntryType::Regular, "", &image);
    let (code, rows, message) = run_tar(&tar.into_inner().unwrap(), "sparse.tar", &[]);
    assert_eq!(code, Some(1), "{message}");
    assert!(rows.iter().all(|row| (row["status"] == "ok") == (row["key"] == "good")), "{rows:?}");
}

#[test]
fn a_parquet_page_beyond_the_limit_is_not_inflated() {
    let column: arrow_array::ArrayRef = std::sync::Arc::new(arrow_array::BinaryArray::from_vec(vec![&[0; 3_000_000]]));
    let batch = arrow_array::RecordBatch::try_from_iter([("image", column)]).unwrap();
    let compression = parquet::basic::Compression::SNAPPY;
    let properties = parquet::file::properties::WriterProperties::builder().set_compression(compression).build();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    assert!(bytes.len() < 300_000);
    let (code, rows, message) = run_tar(&bytes, "zeros.parquet", &["--max-parquet-page-bytes", "1000000"]);
    assert_eq!((code, rows.len()), (Some(1), 0), "{message}");
    assert!(message.contains("--max-parquet-page-bytes"), "{message}");
    let (code, rows, message) = run_tar(&bytes, "zeros.parquet", &[]);
    assert_eq!((code, rows.len()), (Some(1), 1), "{message}");
    assert!(rows[0]["error"].as_str().unwrap().contains("not a JPEG"), "{rows:?}");
}
