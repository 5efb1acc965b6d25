//! Webdataset tars as they come: compressed, damaged, of one name, with sidecars that are not quite JSON. No row is lost,
//! and what cannot be read is told.

use std::io::Write;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::support::{demo_bundle, demo_shard, parquet_rows, printed_rows, read_json, recaption, root, stderr};

/// A tar of `(name, contents)`.
fn tar(path: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, contents) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *contents).unwrap();
    }
    builder.finish().unwrap();
}

fn image(name: &str) -> Vec<u8> {
    std::fs::read(root(&format!("tests/data/images/42/{name}.png"))).unwrap()
}

fn run(inputs: &[&Path], extra: &[&str]) -> Output {
    let bundle = demo_bundle();
    let mut args = vec!["run"];
    args.extend(inputs.iter().map(|path| path.to_str().unwrap()));
    args.extend(["--model", bundle.to_str().unwrap(), "--max-new-tokens", "3", "--quiet", "--provider", "cpu"]);
    args.extend(extra);
    recaption(&args)
}

fn keys(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["key"].as_str().unwrap()).collect()
}

#[test]
fn a_gzip_compressed_tar_gives_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let compressed = folder.path().join("00000.tar.gz");
    let file = std::fs::File::create(&compressed).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    encoder.write_all(&std::fs::read(demo_shard()).unwrap()).unwrap();
    encoder.finish().unwrap();
    let strip = |output: &Output| {
        let mut rows = printed_rows(output);
        rows.iter_mut().for_each(|row| row["source"] = Value::Null);
        rows
    };
    let plain = strip(&run(&[&demo_shard()], &["--limit", "10"]));
    assert_eq!(plain.len(), 10);
    assert_eq!(strip(&run(&[&compressed], &["--limit", "10"])), plain);
}

#[test]
fn a_damaged_tar_is_told_and_the_others_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["0.tar", "1.tar", "2.tar"] {
        tar(&path(name), &[("a.png", &image("a")), ("b.png", &image("b"))]);
    }
    let length = std::fs::metadata(path("1.tar")).unwrap().len();
    let cut = std::fs::OpenOptions::new().write(true).open(path("1.tar")).unwrap();
    cut.set_len(length / 2).unwrap();
    std::fs::write(path("3.tar"), "").unwrap();
    let out = path("out");
    let inputs = ["0.tar", "1.tar", "2.tar", "3.tar"].map(path);
    let inputs = inputs.each_ref().map(|input| input.as_path());
    let output = run(&inputs, &["--out", out.to_str().unwrap()]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("1.tar`: the tar is damaged") && message.contains("3.tar`: no image in it"), "{message}");
    for (shard, is_there) in [("0", true), ("1", false), ("2", true), ("3", false)] {
        assert_eq!(out.join(format!("captions-{shard}.parquet")).exists(), is_there, "shard {shard}");
    }
    let summary = read_json(&out.join("summary.json"));
    assert_eq!((&summary["rows"], summary["damaged_inputs"].as_array().unwrap().len()), (&4.into(), 2));

    // On standard output the rows before the damage are out already; those of the next tar follow.
    let printed = printed_rows(&run(&inputs, &["--engines", "2", "--slots", "1"]));
    let sources: Vec<&str> = printed.iter().map(|row| row["source"].as_str().unwrap()).collect();
    assert!(sources.is_sorted(), "{sources:?}");
    assert_eq!(sources.iter().filter(|source| source.ends_with("0.tar") || source.ends_with("2.tar")).count(), 4);

    // Fetched again, the damaged shard is made and the others are not made twice.
    tar(&path("1.tar"), &[("a.png", &image("a")), ("b.png", &image("b"))]);
    let again = run(&inputs[..3], &["--out", out.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert_eq!(parquet_rows(&out).len(), 6);
}

#[test]
fn rows_of_a_damaged_tar_are_counted_and_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("a.tar"), folder.path().join("out"));
    let (names, image): (Vec<String>, _) = ((0..300).map(|i| format!("{i:03}.png")).collect(), image("a"));
    let members: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &image[..])).collect();
    tar(&path, &members);
    // Within the last member. 256 keys wait for their sidecars: only the others have become rows.
    let length = 299 * 1024 + 700;
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
    let [bundle, path] = [&demo_bundle(), &path].map(|path| path.to_str().unwrap().to_owned());
    let args = ["run", &path, "--model", &bundle, "--provider", "cpu", "--max-new-tokens", "1", "--out"];
    let output = recaption(&[&args[..], &[out.to_str().unwrap()]].concat());
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("its rows are in no file of --out\n0 rows: 0 ok, 0 failed; "), "{message}");
    assert!(message.contains("\n44 more rows, of damaged inputs, were captioned and are not kept\n"), "{message}");
    assert!(!out.join("captions-a.parquet").exists());
}

#[test]
fn inputs_of_one_name_get_numbers_that_are_free() {
    let folder = tempfile::tempdir().unwrap();
    for (index, name) in ["x/a.tar", "y/a.tar", "a-2.tar"].into_iter().enumerate() {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        tar(&path, &[(&format!("{index}.png"), &image("a"))]);
    }
    let inputs = ["x/a.tar", "y/a.tar", "a-2.tar"].map(|name| folder.path().join(name));
    let inputs = inputs.each_ref().map(|input| input.as_path());
    let out = folder.path().join("out");
    let output = run(&inputs, &["--out", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let key = |name: &str| {
        let file = std::fs::File::open(out.join(format!("captions-{name}.parquet"))).unwrap();
        let reader = parquet::file::reader::SerializedFileReader::new(file).unwrap();
        let row = reader.into_iter().next().unwrap().unwrap().to_json_value();
        row["key"].as_str().unwrap().to_owned()
    };
    assert_eq!((key("a"), key("a-2"), key("a-2-2")), ("0".to_owned(), "1".to_owned(), "2".to_owned()));
}

#[test]
fn another_tar_under_the_name_of_a_finished_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("a.tar"), folder.path().join("out"));
    tar(&path, &[("0.png", &image("a"))]);
    assert_eq!(run(&[&path], &["--out", out.to_str().unwrap()]).status.code(), Some(0));
    tar(&path, &[("0.png", &image("b"))]);
    let output = run(&[&path], &["--out", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("the output has shard `a` of other images"), "{}", stderr(&output));
}

#[test]
fn members_are_matched_by_key_in_any_order_and_none_is_dropped_silently() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tar");
    let members: [(&str, &[u8]); 10] = [
        ("./0.json", br#"{"caption": "from json", "score": NaN, "url": "https://example.org/0"}"#),
        ("./0.png", &image("a")),
        ("1.png", &image("b")),
        ("1.txt", b"from txt"),
        ("1.json", br#"{"caption": "another", "uid": "u1", "key": "1"}"#),
        ("2.txt", b"no image"),
        ("3.png", &image("c")),
        ("3.webp", b"not an image"),
        ("4.png", &image("a")),
        ("4.json", b"{broken"),
    ];
    tar(&path, &members);
    let rows = printed_rows(&run(&[&path], &[]));
    assert_eq!(keys(&rows), ["0", "1", "3", "3", "4"]);
    assert_eq!((&rows[0]["org_caption"], &rows[0]["url"]), (&"from json".into(), &"https://example.org/0".into()));
    assert_eq!(rows[0]["metadata"], r#"{"score":null}"#);
    assert_eq!((&rows[1]["org_caption"], &rows[1]["uid"]), (&"from txt".into(), &"u1".into()));
    assert_eq!(rows[1]["metadata"], r#"{"caption":"another"}"#);
    assert_eq!(rows[2]["status"], "ok");
    assert_eq!(rows[3]["error"], "source: the key has another image before this .webp");
    assert_eq!((&rows[4]["status"], &rows[4]["metadata"]), (&"ok".into(), &"{broken".into()));
}

#[test]
fn a_failed_start_leaves_the_earlier_captions_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("a.tar"), folder.path().join("out"));
    tar(&path, &[("0.png", &image("a"))]);
    assert_eq!(run(&[&path], &["--out", out.to_str().unwrap()]).status.code(), Some(0));
    let output = run(&[&path], &["--out", out.to_str().unwrap(), "--overwrite", "--provider", "cuda"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(parquet_rows(&out).len(), 1);
}

#[test]
fn folders_longer_than_a_shard_are_cut_and_numbered() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("many");
    std::fs::create_dir(&images).unwrap();
    // Not images: they fail at once, so that the cut is seen without ten thousand captions.
    for index in 0..10_003 {
        std::fs::write(images.join(format!("{index:05}.png")), "x").unwrap();
    }
    let out = folder.path().join("out");
    let output = run(&[&images], &["--out", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(out.join("captions-many-00000.parquet").exists() && out.join("captions-many-00001.parquet").exists());
    let rows = parquet_rows(&out);
    assert_eq!(rows.len(), 10_003);
    assert!(rows.iter().enumerate().all(|(index, row)| row["key"] == format!("{index:05}.png")));
}
