//! Servers on loopback: S3 (moto's), a web server, and a proxy that fails on purpose.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{fetched, root};

/// What a client of the test's S3 server is told. The server takes any credentials.
const CREDENTIALS: [(&str, &str); 4] = [
    ("AWS_ACCESS_KEY_ID", "testing"),
    ("AWS_SECRET_ACCESS_KEY", "not-to-be-seen"),
    ("AWS_REGION", "us-east-1"),
    ("AWS_ALLOW_HTTP", "true"),
];

/// An S3 server, in memory, with one bucket named `bucket`. It ends with this value.
pub(crate) struct S3 {
    child: Child,
    pub(crate) port: u16,
}

impl S3 {
    pub(crate) fn start() -> Self {
        let python = fetched("venv/bin/python");
        let mut child = Command::new(python)
            .arg(root("scripts/golden/serve_s3.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let server = Self { child, port: line.trim().parse().unwrap() };
        assert_eq!(server.request("PUT", "/bucket", b"").0, 200);
        server
    }

    pub(crate) fn put(&self, key: &str, contents: &[u8]) {
        assert_eq!(self.request("PUT", &format!("/bucket/{key}"), contents).0, 200, "{key}");
    }

    /// Status and body.
    pub(crate) fn request(&self, method: &str, target: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let authorization =
            "AWS4-HMAC-SHA256 Credential=testing/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x";
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\nAuthorization: {authorization}\r\n\
             Content-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        let mut reader = BufReader::new(stream);
        let head = read_head(&mut reader).unwrap();
        let status = head[0].split(' ').nth(1).unwrap().parse().unwrap();
        let mut body = Vec::new();
        reader.read_to_end(&mut body).unwrap();
        (status, body)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // It ends when its standard input does.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The environment for a client of the server at `port`.
pub(crate) fn s3_environment(port: u16) -> Vec<(String, String)> {
    let endpoint = ("AWS_ENDPOINT_URL".to_owned(), format!("http://127.0.0.1:{port}"));
    CREDENTIALS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).chain([endpoint]).collect()
}

/// The lines of a request's or answer's head; none when the connection is closed.
fn read_head(reader: &mut impl BufRead) -> Option<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line.trim_end().is_empty() {
            return Some(lines);
        }
        lines.push(line.trim_end().to_owned());
    }
}

fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// 500, without asking the server.
    ServerError,
    /// Closed without an answer.
    Closed,
    /// The answer ends in its middle.
    CutOff,
    /// No answer, ever.
    Silence,
    /// The server does it, and the connection is closed without its answer.
    Unheard,
}

/// A proxy before a server; `plan` decides by the number of the request. It serves until the process ends.
pub(crate) fn proxy(upstream: u16, plan: impl Fn(usize) -> Fault + Send + Sync + 'static) -> u16 {
    proxy_by_request(upstream, move |number, _| plan(number))
}

/// A proxy whose `plan` decides by number and first line (`PUT /bucket/key HTTP/1.1`) of the request.
pub(crate) fn proxy_by_request(upstream: u16, plan: impl Fn(usize, &str) -> Fault + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (plan, count) = (Arc::new(plan), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (plan, count) = (Arc::clone(&plan), Arc::clone(&count));
            std::thread::spawn(move || pass_on(stream, upstream, plan.as_ref(), &count));
        }
    });
    port
}

/// One request a connection.
fn pass_on(
    mut client: TcpStream,
    upstream: u16,
    plan: &dyn Fn(usize, &str) -> Fault,
    count: &AtomicUsize,
) -> Option<()> {
    let mut reader = BufReader::new(client.try_clone().ok()?);
    let head = read_head(&mut reader)?;
    let length = header(&head, "content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    // What is cut off is what one reads.
    let fault = match plan(count.fetch_add(1, Ordering::SeqCst), &head[0]) {
        Fault::CutOff if !head[0].starts_with("GET ") => Fault::None,
        fault => fault,
    };
    match fault {
        Fault::ServerError => {
            let answer = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            return client.write_all(answer.as_bytes()).ok();
        }
        Fault::Closed => return None,
        Fault::Silence => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
        Fault::None | Fault::CutOff | Fault::Unheard => {}
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream)).ok()?;
    let mut lines: Vec<&str> = head.iter().map(String::as_str).collect();
    lines.retain(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    let request = format!("{}\r\nConnection: close\r\n\r\n", lines.join("\r\n"));
    server.write_all(&[request.as_bytes(), &body].concat()).ok()?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).ok()?;
    if fault == Fault::Unheard {
        return None;
    }
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let body_length = answer.len() - end;
    if fault == Fault::CutOff {
        answer.truncate(end + body_length / 2);
    }
    client.write_all(&answer).ok()
}

/// How a web server behaves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WebServer {
    pub(crate) has_ranges: bool,
    pub(crate) has_head: bool,
}

impl WebServer {
    /// Serves `files` until the process ends.
    pub(crate) fn start(self, files: &[(&str, Vec<u8>)]) -> u16 {
        let files: HashMap<String, Vec<u8>> =
            files.iter().map(|(name, contents)| (format!("/{name}"), contents.clone())).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let files = Arc::new(files);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let files = Arc::clone(&files);
                std::thread::spawn(move || self.answer(stream, &files));
            }
        });
        port
    }

    fn answer(self, mut client: TcpStream, files: &HashMap<String, Vec<u8>>) -> Option<()> {
        let mut reader = BufReader::new(client.try_clone().ok()?);
        let head = read_head(&mut reader)?;
        let mut words = head[0].split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let is_head = method == "HEAD";
        let found = files.get(target.split('?').next()?).filter(|_| self.has_head || !is_head);
        let (status, range, body) = match (found, header(&head, "range").filter(|_| self.has_ranges)) {
            (None, _) if is_head && !self.has_head => ("405 Method Not Allowed", String::new(), &[][..]),
            (None, _) => ("404 Not Found", String::new(), &[][..]),
            (Some(file), None) => ("200 OK", String::new(), file.as_slice()),
            (Some(file), Some(range)) => {
                let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
                let start: usize = start.parse().ok()?;
                let end = end.parse::<usize>().map_or(file.len(), |last| (last + 1).min(file.len()));
                let range = format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, file.len());
                ("206 Partial Content", range, &file[start..end])
            }
        };
        let head = format!(
            "HTTP/1.1 {status}\r\n{range}Content-Length: {}\r\nConnection: close\r\n\
             Last-Modified: Sat, 01 Jan 2022 00:00:00 GMT\r\n\r\n",
            body.len()
        );
        client.write_all(head.as_bytes()).ok()?;
        if is_head { Some(()) } else { client.write_all(body).ok() }
    }
}
