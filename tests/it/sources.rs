//! Inputs as others make them and wherever they lie: img2dataset's and webdataset's tars, datasets' and pyarrow's Parquet,
//! long names, members out of order; from S3, from web servers, from lists. References: tests/data/shards, made by
//! scripts/golden/make_shards.py.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::servers::{Fault, S3, WebServer, proxy, s3_environment};
use crate::support::{demo_bundle, parquet_rows, printed_rows, read_json, root, stderr};

fn shard(name: &str) -> String {
    root(&format!("tests/data/shards/{name}")).to_str().unwrap().to_owned()
}

fn contents(name: &str) -> Vec<u8> {
    std::fs::read(shard(name)).unwrap()
}

fn image(name: &str) -> Vec<u8> {
    std::fs::read(root(&format!("tests/data/images/42/{name}.png"))).unwrap()
}

/// A tar of `(name, contents)`.
fn tar_of(members: &[(String, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, contents) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *contents).unwrap();
    }
    builder.into_inner().unwrap()
}

/// `recaption run`, with lines on standard input and an environment.
fn run_with(args: &[&str], lines: &str, environment: &[(String, String)]) -> Output {
    let bundle = demo_bundle();
    let mut child = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .arg("run")
        .args(args)
        .args(["--model", bundle.to_str().unwrap(), "--max-new-tokens", "2", "--quiet", "--provider", "cpu"])
        .envs(environment.iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn run(args: &[&str]) -> Output {
    run_with(args, "", &[])
}

fn column<'a>(rows: &'a [Value], name: &str) -> Vec<&'a Value> {
    rows.iter().map(|row| &row[name]).collect()
}

#[test]
fn tars_of_img2dataset_and_webdataset_give_what_their_own_readers_give() {
    let expected = read_json(Path::new(&shard("expected.json")));
    for name in ["img2dataset.tar", "webdataset.tar", "pax.tar", "gnu.tar"] {
        let mut rows = printed_rows(&run(&[&shard(name)]));
        if name.starts_with("pax") || name.starts_with("gnu") {
            let link = rows.pop().unwrap();
            assert_eq!(
                (&link["key"], &link["error"]),
                (&json!("link"), &json!("source: the image is a link inside of the tar"))
            );
        }
        let expected = expected[name].as_array().unwrap();
        assert_eq!(rows.len(), expected.len(), "{name}");
        for (row, expected) in rows.iter().zip(expected) {
            assert_eq!((&row["key"], &row["status"]), (&expected["key"], &json!("ok")), "{name}");
            assert_eq!(row["image_sha256"], expected["image_sha256"], "{name}");
            let sidecar = expected["json"].as_str().map(|text| text.replace("NaN", "null"));
            let sidecar: Value = sidecar.map_or(Value::Null, |text| serde_json::from_str(&text).unwrap());
            let caption = expected.get("txt").unwrap_or(&sidecar["caption"]);
            assert_eq!(row["org_caption"], *caption, "{name}");
            for field in ["url", "sha256", "uid"] {
                assert_eq!(row[field], sidecar[field], "{name} {field}");
            }
        }
        if name == "img2dataset.tar" {
            let metadata: Value = serde_json::from_str(rows[0]["metadata"].as_str().unwrap()).unwrap();
            let names: Vec<&String> = metadata.as_object().unwrap().keys().collect();
            let kept =
                ["score", "status", "error_message", "width", "height", "original_width", "original_height", "exif"];
            assert_eq!(names, kept);
        }
    }
}

#[test]
fn members_of_a_key_may_lie_apart_and_its_second_image_fails() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("apart.tar");
    let (a, b) = (image("a"), image("b"));
    let mut members: Vec<(String, &[u8])> = Vec::new();
    // All captions first, then all images backwards, then all sidecars; 5 has no image, 9 two, 7 comes whole and again.
    members.extend((0..20).map(|key| (format!("{key:02}.txt"), b"caption".as_slice())));
    members.extend((0..20).rev().filter(|key| *key != 5).map(|key| (format!("{key:02}.png"), a.as_slice())));
    members.push(("09.jpg".to_owned(), &b));
    members.extend((0..20).map(|key| (format!("{key:02}.json"), br#"{"url": "u"}"#.as_slice())));
    members.push(("07.png".to_owned(), &b));
    members.push(("07.txt".to_owned(), b"another"));
    std::fs::write(&path, tar_of(&members)).unwrap();
    let rows = printed_rows(&run(&[path.to_str().unwrap()]));
    let keys: Vec<&str> = rows.iter().map(|row| row["key"].as_str().unwrap()).collect();
    let mut expected: Vec<String> = (0..20).filter(|key| *key != 5).map(|key| format!("{key:02}")).collect();
    expected.insert(9, "09".to_owned());
    expected.insert(7, "07".to_owned());
    assert_eq!(keys, expected);
    let failed: Vec<&Value> = rows.iter().filter(|row| row["status"] == "failed").collect();
    assert_eq!(column(&rows, "error").iter().filter(|error| !error.is_null()).count(), 2);
    assert_eq!(failed[0]["error"], "source: the key has another image before this .png");
    assert_eq!(failed[1]["error"], "source: the key has another image before this .jpg");
    for row in rows.iter().filter(|row| row["status"] == "ok") {
        assert_eq!((&row["org_caption"], &row["url"]), (&json!("caption"), &json!("u")), "{}", row["key"]);
    }
}

#[test]
fn sidecars_too_far_from_their_image_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("far.tar");
    let mut members: Vec<(String, &[u8])> = (0..400).map(|key| (format!("{key:03}.png"), b"x".as_slice())).collect();
    members.extend((0..400).map(|key| (format!("{key:03}.txt"), b"caption".as_slice())));
    std::fs::write(&path, tar_of(&members)).unwrap();
    let output = run(&[path.to_str().unwrap()]);
    let rows = printed_rows(&output);
    let with_caption = column(&rows, "org_caption").iter().filter(|caption| !caption.is_null()).count();
    assert_eq!((rows.len(), with_caption), (400, 256));
    assert!(stderr(&output).contains("144 .txt or .json came too long after their images"), "{}", stderr(&output));
}

#[test]
fn headers_without_end_damage_a_tar_and_cost_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.tar.gz");
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_path("././@LongLink").unwrap();
    header.set_size(1 << 30);
    header.set_cksum();
    let file = std::fs::File::create(&path).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    encoder.write_all(header.as_bytes()).unwrap();
    (0..1024).for_each(|_| encoder.write_all(&[b'a'; 1 << 16]).unwrap());
    encoder.finish().unwrap();
    let output = run(&[path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("names are longer than 1048576 bytes"), "{}", stderr(&output));
}

#[test]
fn parquet_gives_what_pyarrow_gives() {
    let expected = read_json(Path::new(&shard("expected.json")));
    let rows = printed_rows(&run(&[&shard("plain.parquet")]));
    let expected_rows = expected["plain.parquet"].as_array().unwrap();
    assert_eq!(rows.len(), expected_rows.len());
    for (row, expected) in rows.iter().zip(expected_rows) {
        for (name, other) in [
            ("key", "key"),
            ("url", "url"),
            ("org_caption", "TEXT"),
            ("sha256", "sha256"),
            ("image_sha256", "image_sha256"),
        ] {
            assert_eq!(row[name], expected[other], "{name}");
        }
        assert_eq!(row["status"], "ok");
    }
    let metadata: Value = serde_json::from_str(rows[0]["metadata"].as_str().unwrap()).unwrap();
    let day = "2024-02-29";
    let known = json!({
        "weight": 0.1, "tags": ["a"], "box": {"x": 0, "y": null}, "seen": format!("{day}T12:34:56.789Z"), "day": day,
        "price": "12.50", "big": u64::MAX, "ok": true, "counts": {"one": 1},
    });
    assert_eq!(metadata, known);
    let order: Vec<&String> = metadata.as_object().unwrap().keys().collect();
    assert_eq!(order, ["weight", "tags", "box", "seen", "day", "price", "big", "ok", "counts"]);
    let metadata: Value = serde_json::from_str(rows[1]["metadata"].as_str().unwrap()).unwrap();
    assert_eq!((&metadata["weight"], &metadata["tags"]), (&Value::Null, &json!([])));

    let rows = printed_rows(&run(&[&shard("datasets.parquet")]));
    let expected_rows = expected["datasets.parquet"].as_array().unwrap();
    assert_eq!(rows.len(), expected_rows.len());
    for (index, (row, expected)) in rows.iter().zip(expected_rows).enumerate() {
        assert_eq!(row["key"], format!("datasets-{index:09}"));
        assert_eq!(
            (&row["image_sha256"], &row["org_caption"]),
            (&expected["image_sha256"], &expected["text"]),
            "{index}"
        );
    }
    assert_eq!(rows[5]["error"], "source: the row has the image's path alone, `elsewhere.jpg`, not its bytes");
    assert_eq!(rows[6]["error"], "source: the image is null");
    assert_eq!(rows[4]["metadata"], r#"{"label":0}"#);
}

#[test]
fn the_image_column_of_a_parquet_file_is_chosen_or_refused_by_name() {
    let plain = shard("plain.parquet");
    // Bytes, but not images: the rows fail, all of them.
    let output = run(&[&plain, "--image-column", "thumbnail"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(printed_rows(&output).iter().all(|row| row["error"].as_str().unwrap().starts_with("load: ")));
    for (args, expected) in [
        (vec![plain.as_str(), "--image-column", "url"], "column `url` is Utf8, not bytes of images"),
        (vec![plain.as_str(), "--image-column", "nothing"], "there is no column `nothing`"),
        (vec![&shard("img2dataset.parquet")], "hint: this is img2dataset's table of a shard: give the .tar beside it"),
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[test]
fn a_damaged_parquet_file_is_told_and_the_others_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.parquet");
    let mut bytes = contents("plain.parquet");
    // Inside of the first pages; the footer stays.
    bytes[40..9000].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    let out = folder.path().join("out");
    let output = run(&[path.to_str().unwrap(), &shard("datasets.parquet"), "--out", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("the parquet file is damaged"), "{}", stderr(&output));
    assert_eq!(parquet_rows(&out).len(), 7);
}

#[test]
fn a_page_over_the_limit_is_refused_before_it_is_read() {
    let plain = shard("plain.parquet");
    let output = run(&[&plain, "--max-parquet-page-bytes", "1000"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is over the limit of 1000 (--max-parquet-page-bytes)"), "{}", stderr(&output));
    assert_eq!(printed_rows(&run(&[&plain, "--max-parquet-page-bytes", "100000"])).len(), 7);
}

#[test]
fn a_folder_comes_in_the_order_of_its_keys() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a/b.png", "a-b.png", "a.png", "a/a/c.png", "a/ä.png", "b/.png", "B.png", "a b.png", "c.txt"] {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "x").unwrap();
    }
    let rows = printed_rows(&run(&[folder.path().to_str().unwrap()]));
    let keys: Vec<&str> = rows.iter().map(|row| row["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["B.png", "a b.png", "a-b.png", "a.png", "a/a/c.png", "a/b.png", "a/ä.png"]);
}

#[test]
fn inputs_in_s3_give_the_rows_of_the_same_files() {
    let server = S3::start();
    for name in ["img2dataset.tar", "webdataset.tar", "plain.parquet"] {
        server.put(&format!("shards/{name}"), &contents(name));
    }
    for (number, name) in ["img2dataset.tar", "webdataset.tar"].into_iter().enumerate() {
        server.put(&format!("numbered/{number}.tar"), &contents(name));
    }
    for name in ["a", "b", "c"] {
        server.put(&format!("photos/deep/{name}.png"), &image(name));
    }
    server.put("photos/notes.txt", b"no image");
    // Through a proxy that breaks every fourth answer.
    let port = proxy(server.port, |request| match request % 8 {
        3 => Fault::CutOff,
        7 => Fault::ServerError,
        _ => Fault::None,
    });
    let environment = s3_environment(port);
    let strip = |output: &Output| {
        let mut rows = printed_rows(output);
        assert!(!rows.is_empty(), "{}", stderr(output));
        rows.iter_mut().for_each(|row| drop(row.as_object_mut().unwrap().remove("source")));
        rows
    };
    for name in ["img2dataset.tar", "webdataset.tar", "plain.parquet"] {
        let far = run_with(&[&format!("s3://bucket/shards/{name}")], "", &environment);
        assert_eq!(strip(&far), strip(&run(&[&shard(name)])), "{name}");
        assert_eq!(printed_rows(&far)[0]["source"], format!("s3://bucket/shards/{name}"));
    }
    let range = run_with(&["s3://bucket/numbered/{0..1}.tar"], "", &environment);
    assert_eq!(printed_rows(&range).len(), 5 + 4, "{}", stderr(&range));
    let prefix = run_with(&["s3://bucket/photos/"], "", &environment);
    let local = run(&[root("tests/data/images/42").to_str().unwrap()]);
    let captions = |output: &Output| -> Vec<Value> {
        printed_rows(output).iter().map(|row| json!([row["re_caption"], row["image_sha256"]])).collect()
    };
    assert_eq!(captions(&prefix), captions(&local));
    let rows = printed_rows(&prefix);
    assert_eq!(column(&rows, "key"), ["deep/a.png", "deep/b.png", "deep/c.png"]);

    let lines = "s3://bucket/photos/deep/a.png\ns3://bucket/photos/deep/none.png\n";
    let listed = printed_rows(&run_with(&["-"], lines, &environment));
    assert_eq!((&listed[0]["status"], &listed[1]["error"]), (&json!("ok"), &json!("source: no such object")));
}

#[test]
fn web_servers_are_read_with_ranges_and_without() {
    let files =
        [("t.tar", contents("webdataset.tar")), ("p.parquet", contents("plain.parquet")), ("image", image("a"))];
    let expected = printed_rows(&run(&[&shard("webdataset.tar")]));
    for server in [
        WebServer { has_ranges: true, has_head: true },
        WebServer { has_ranges: false, has_head: true },
        WebServer { has_ranges: false, has_head: false },
    ] {
        let port = server.start(&files);
        let url = |name: &str| format!("http://127.0.0.1:{port}/{name}");
        let patience = ["--storage-retries", "1"];
        let output = run(&[&[url("t.tar?token=secret").as_str(), &url("image")], &patience[..]].concat());
        let rows = printed_rows(&output);
        assert_eq!(rows.len(), 5, "{server:?}: {}", stderr(&output));
        assert_eq!(column(&rows[..4], "image_sha256"), column(&expected, "image_sha256"), "{server:?}");
        assert_eq!((&rows[0]["source"], &rows[4]["key"]), (&json!(url("t.tar")), &json!(url("image"))));
        assert_eq!(rows[4]["status"], "ok", "{server:?}");
        let output = run(&[&[url("p.parquet").as_str()], &patience[..]].concat());
        if server.has_ranges {
            assert_eq!(printed_rows(&output).len(), 7, "{}", stderr(&output));
        } else {
            assert_eq!(output.status.code(), Some(2), "{server:?}");
            assert!(stderr(&output).contains("parquet needs one that serves ranges"), "{}", stderr(&output));
        }
    }
}
