//! Storage against a real S3 server on loopback, with and without faults between, and against the local file system.

use std::io::{Read, Write};
use std::process::{Command, Output};

use parquet::file::reader::ChunkReader;
use recaption::storage::Location;

use crate::servers::{Fault, S3, proxy, s3_environment};
use crate::support::{demo_bundle, stderr};

/// Runs a test of this binary again, as a process with other settings in its environment.
fn run_again(name: &str, environment: &[(String, String)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let command = command.args(["--exact", &format!("storage::{name}"), "--nocapture"]);
    command.envs(environment.iter().cloned()).env("RECAPTION_TEST_CHILD", "1").output().unwrap()
}

fn is_child() -> bool {
    std::env::var_os("RECAPTION_TEST_CHILD").is_some()
}

fn bytes(length: usize) -> Vec<u8> {
    let mut state = 12345u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn location(text: &str) -> Location {
    Location::parse(text).unwrap()
}

fn read_all(location: &Location) -> Vec<u8> {
    let mut contents = Vec::new();
    location.open().unwrap().read_to_end(&mut contents).unwrap();
    contents
}

/// Small objects: what is written is read, created once, and deleted.
fn small_files(folder: &Location) {
    let claim = folder.join("claims/00000 ä.claim");
    assert!(!claim.exists().unwrap());
    assert!(claim.create_exclusive(b"first".as_slice()).unwrap().is_some());
    assert!(claim.create_exclusive(b"second".as_slice()).unwrap().is_none());
    let (contents, version) = claim.read_version(100).unwrap();
    assert_eq!(contents, b"first".as_slice());
    assert!(claim.update(b"again".as_slice(), &version).unwrap().is_some());
    assert_eq!((claim.read(5).unwrap(), claim.length().unwrap()), (b"again".as_slice().into(), 5));
    let error = claim.read(4).unwrap_err().to_string();
    assert!(error.contains("over the limit of 4"), "{error}");
    folder.join("claims/b").put(b"".as_slice()).unwrap();
    assert_eq!(read_all(&folder.join("claims/b")), b"");
    assert_eq!(folder.join("claims").names().unwrap(), ["00000 ä.claim", "b"]);
    assert_eq!(folder.join("nothing").names().unwrap(), [""; 0]);
    claim.delete().unwrap();
    claim.delete().unwrap();
    assert!(!claim.exists().unwrap());
    assert!(claim.open().is_err() && claim.read(10).is_err());
}

/// Large ones: whole or not there, streamed and read at any place.
fn large_files(folder: &Location) {
    let contents = bytes(21 << 20);
    let large = folder.join("large.bin");
    let mut writer = large.writer().unwrap();
    for part in contents.chunks(100_000) {
        writer.write_all(part).unwrap();
    }
    assert!(!large.exists().unwrap(), "before it is committed");
    writer.commit().unwrap();
    assert!(read_all(&large) == contents);
    let reader = large.ranges().unwrap();
    for (start, length) in [(0, 10), (contents.len() - 7, 7), (5 << 20, 3 << 20), ((5 << 20) + 1, 1), (100, 70_000)] {
        assert!(reader.get_bytes(start as u64, length).unwrap() == contents[start..start + length], "{start}");
    }
    assert!(reader.get_bytes(contents.len() as u64 - 1, 2).is_err());
    let mut rest = Vec::new();
    reader.get_read(20 << 20).unwrap().read_to_end(&mut rest).unwrap();
    assert!(rest == contents[20 << 20..]);

    let mut left = folder.join("left.bin").writer().unwrap();
    left.write_all(&contents).unwrap();
    drop(left);
    assert!(!folder.join("left.bin").exists().unwrap());
    assert_eq!(folder.names().unwrap(), ["large.bin"]);
}

#[test]
fn local_files_are_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::from(folder.path());
    std::fs::create_dir(folder.path().join("claims")).unwrap();
    small_files(&location);
    large_files(&location);
}

#[test]
fn objects_behave_as_files_do() {
    if is_child() {
        let folder = location("s3://bucket/a folder");
        large_files(&folder);
        small_files(&folder);
        let many = location("s3://bucket/many/below");
        let Location::Object(prefix) = &many else { unreachable!() };
        let keys: Vec<String> = prefix.list().unwrap().map(|listed| listed.unwrap().key).collect();
        assert_eq!(keys.len(), 1005);
        assert!(keys.is_sorted() && keys[0] == "x/0000.png");
        return;
    }
    let server = S3::start();
    // More than a page of a listing.
    let put =
        |first: usize| (first..1005).step_by(16).for_each(|at| server.put(&format!("many/below/x/{at:04}.png"), b"x"));
    std::thread::scope(|scope| (0..16).for_each(|first| drop(scope.spawn(move || put(first)))));
    server.put("many/below-not/x.png", b"x");
    let output = run_again("objects_behave_as_files_do", &s3_environment(server.port));
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
    let (_, uploads) = server.request("GET", "/bucket?uploads", b"");
    assert!(!String::from_utf8_lossy(&uploads).contains("<UploadId>"), "an upload was left");
}

#[test]
fn faults_of_the_store_are_outlived() {
    if is_child() {
        large_files(&location("s3://bucket/faults"));
        return;
    }
    let server = S3::start();
    let port = proxy(server.port, |request| match request % 7 {
        1 => Fault::ServerError,
        3 => Fault::CutOff,
        5 => Fault::Closed,
        _ => Fault::None,
    });
    let output = run_again("faults_of_the_store_are_outlived", &s3_environment(port));
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
}

/// Exit code and message of a run over `input`.
fn refusal(input: &str, environment: &[(String, String)], extra: &[&str]) -> String {
    let bundle = demo_bundle();
    let output = Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", input, "--model", bundle.to_str().unwrap(), "--quiet"])
        .args(extra)
        .envs(environment.iter().cloned())
        .output()
        .unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(!message.contains("not-to-be-seen"), "{message}");
    message
}

#[test]
fn what_is_wrong_with_a_store_is_told_before_anything_is_loaded() {
    let server = S3::start();
    let environment = s3_environment(server.port);
    let message = refusal("s3://bucket/no-such.tar", &environment, &[]);
    assert!(message.contains("`s3://bucket/no-such.tar`: no such object") && message.contains("hint:"), "{message}");
    let message = refusal("s3://bucket/empty/", &environment, &[]);
    assert!(message.contains("nothing lies below this prefix"), "{message}");
    let message = refusal("s3://no-such-bucket/{0..3}.tar", &environment, &[]);
    assert!(message.contains("no such object"), "{message}");
    let message = refusal("ftp://host/x.tar", &environment, &[]);
    assert!(message.contains("`ftp://` is not read"), "{message}");

    let patience = ["--storage-retries", "1", "--storage-timeout", "1"];
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let message = refusal("s3://bucket/x.tar", &s3_environment(nobody), &patience);
    assert!(message.contains("AWS_ENDPOINT_URL"), "{message}");
    let silent = proxy(server.port, |_| Fault::Silence);
    let message = refusal("s3://bucket/x.tar", &s3_environment(silent), &patience);
    assert!(message.contains("--storage-timeout"), "{message}");
    let failing = proxy(server.port, |_| Fault::ServerError);
    let message = refusal("s3://bucket/x.tar", &s3_environment(failing), &patience);
    assert!(message.contains("500") && message.contains("--storage-retries"), "{message}");
    let secret = format!("http://me:not-to-be-seen@127.0.0.1:{nobody}/x.tar?token=not-to-be-seen");
    let message = refusal(&secret, &environment, &patience);
    assert!(message.contains(&format!("`http://127.0.0.1:{nobody}/x.tar`")), "{message}");
}
