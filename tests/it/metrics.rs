//! `run --metrics`: scraped while a run goes on, read by Prometheus' own Python parser, compared with what the run says
//! of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{demo_bundle, fetched, read_json, recaption, root, stderr};

/// Far above what a run takes.
const HANG: Duration = Duration::from_secs(120);

/// A port that is free now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The page at `/metrics`, once somebody listens.
fn scrape(port: u16) -> String {
    let started = Instant::now();
    loop {
        let page = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            write!(stream, "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
            let mut page = String::new();
            stream.read_to_string(&mut page)?;
            Ok(page)
        });
        match page {
            Ok(page) => {
                let (head, body) = page.split_once("\r\n\r\n").unwrap();
                assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                assert!(!head.to_ascii_lowercase().contains("chunked"), "{head}");
                return body.to_owned();
            }
            Err(error) => assert!(started.elapsed() < HANG, "nobody listens: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Samples by `name{label="value",…}`, as Prometheus' own parser reads them; it fails on what it does not understand.
fn parse(page: &str) -> BTreeMap<String, f64> {
    const READ: &str = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families
samples = {}
for family in text_string_to_metric_families(sys.stdin.read()):
    assert family.type in ('counter', 'gauge', 'histogram'), family
    assert family.documentation, family
    for sample in family.samples:
        labels = ','.join(f'{name}={value}' for name, value in sorted(sample.labels.items()))
        key = f'{sample.name}{{{labels}}}'
        assert key not in samples, key
        samples[key] = sample.value
print(json.dumps(samples))";
    let mut child = Command::new(fetched("venv/bin/python"))
        .args(["-c", READ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the page does not parse:\n{page}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A run over paths from a pipe, which waits while the pipe is open.
fn run(port: u16, out: &str, extra: &[&str]) -> Child {
    let address = port.to_string();
    Command::new(env!("CARGO_BIN_EXE_recaption"))
        .args(["run", "-", "--model", demo_bundle().to_str().unwrap(), "--provider", "cpu", "--out", out])
        .args(["--metrics", &address, "--slots", "4", "--quiet"])
        .args(extra)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Scrapes until `num_rows` rows are through.
fn scrape_after(port: u16, num_rows: f64) -> BTreeMap<String, f64> {
    let started = Instant::now();
    loop {
        let samples = parse(&scrape(port));
        // None at all before the run is prepared.
        let of =
            |status: &str| samples.get(&format!("recaption_rows_total{{status={status}}}")).copied().unwrap_or(0.0);
        let rows = of("ok") + of("failed");
        if rows >= num_rows {
            return samples;
        }
        assert!(started.elapsed() < HANG, "{rows} rows only");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_scrape_parses_and_its_totals_are_those_of_the_summary() {
    let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let broken = folder.path().join("broken.png");
    std::fs::write(&broken, "no image").unwrap();
    let image = root("tests/data/images/42/a.png");
    let (num_good, num_bad) = (7, 2);
    let port = free_port();
    let mut child = run(port, out.path().to_str().unwrap(), &[]);
    // Everything is there before the first image.
    let mut before = scrape(port);
    while !before.contains("recaption_build_info") {
        before = scrape(port);
    }
    let before = parse(&before);
    let mut pipe = child.stdin.take().unwrap();
    for _ in 0..num_good {
        writeln!(pipe, "{}", image.display()).unwrap();
    }
    for _ in 0..num_bad {
        writeln!(pipe, "{}", broken.display()).unwrap();
    }
    writeln!(pipe, "{}", folder.path().join("missing.png").display()).unwrap();
    pipe.flush().unwrap();
    let samples = scrape_after(port, f64::from(num_good + num_bad + 1));
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));

    let summary = read_json(&out.path().join("summary.json"));
    let of = |name: &str| samples.get(name).copied().unwrap_or_else(|| panic!("no {name} in {samples:#?}"));
    for (name, field) in [
        ("recaption_rows_total{status=ok}", "ok"),
        ("recaption_rows_total{status=failed}", "failed"),
        ("recaption_prompt_tokens_total{}", "prompt_tokens"),
        ("recaption_new_tokens_total{}", "new_tokens"),
    ] {
        assert_eq!(of(name), summary[field].as_f64().unwrap(), "{name}");
    }
    assert_eq!(of("recaption_row_failures_total{stage=load}"), f64::from(num_bad));
    assert_eq!(of("recaption_row_failures_total{stage=source}"), 1.0);
    assert_eq!(of("recaption_row_failures_total{stage=decode}"), 0.0);
    let num_bytes = f64::from(num_good) * std::fs::metadata(&image).unwrap().len() as f64 + f64::from(num_bad) * 8.0;
    assert_eq!(of("recaption_read_bytes_total{}"), num_bytes);
    assert_eq!(of("recaption_shards_total{state=claimed}"), 1.0);

    // Histograms: one observation for each batch, caption, or caption of several tokens.
    assert_eq!(of("recaption_stage_seconds_count{stage=load}"), f64::from(num_good + num_bad));
    assert_eq!(of("recaption_stage_seconds_count{stage=preprocess}"), f64::from(num_good));
    assert_eq!(of("recaption_time_to_first_token_seconds_count{}"), f64::from(num_good));
    assert_eq!(of("recaption_time_per_output_token_seconds_count{}"), f64::from(num_good));
    assert_eq!(
        of("recaption_stage_seconds_bucket{le=+Inf,stage=decode}"),
        of("recaption_stage_seconds_count{stage=decode}")
    );
    assert!(of("recaption_stage_seconds_sum{stage=decode}") > 0.0);

    assert_eq!((of("recaption_engines_alive{}"), of("recaption_slots{engine=0}")), (1.0, 4.0));
    assert_eq!((of("recaption_slots_in_use{engine=0}"), of("recaption_kv_cache_usage_ratio{engine=0}")), (0.0, 0.0));
    assert!(of("recaption_queue_capacity{queue=vision}") >= 1.0 && of("recaption_queue_depth{queue=vision}") >= 0.0);
    let queues = |metric: &str| samples.keys().filter_map(|name| name.strip_prefix(metric)).collect::<Vec<_>>();
    assert_eq!(queues("recaption_queue_depth"), queues("recaption_queue_capacity"));
    let build = samples.iter().find(|(name, _)| name.starts_with("recaption_build_info{")).unwrap();
    assert!(
        build.0.contains(concat!("version=", env!("CARGO_PKG_VERSION"))) && build.0.contains("provider=cpu"),
        "{build:?}"
    );

    for (name, value) in &before {
        if name.contains("_total{") {
            assert_eq!(*value, 0.0, "{name} before the first image");
        }
    }
    let new: Vec<&String> = samples.keys().filter(|name| !before.contains_key(*name)).collect();
    let is_later = |name: &str| {
        [
            "recaption_images_per_second",
            "process_resident",
            "recaption_stage_seconds",
            "recaption_time",
            "recaption_queue_depth",
        ]
        .iter()
        .any(|later| name.starts_with(later))
    };
    assert!(new.iter().all(|name| is_later(name)), "series that appear late are missed by rate(): {new:?}");
}

/// The manual and the dashboard name what there is, and the manual all of it.
#[test]
fn manual_and_dashboard_have_the_metrics_of_a_scrape() {
    let out = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut child = run(port, out.path().to_str().unwrap(), &[]);
    let mut pipe = child.stdin.take().unwrap();
    writeln!(pipe, "{}", root("tests/data/images/42/a.png").display()).unwrap();
    pipe.flush().unwrap();
    scrape_after(port, 1.0);
    // Rates and memory are looked at every second.
    let started = Instant::now();
    let page = loop {
        let page = scrape(port);
        if page.contains("process_resident_memory_bytes ") || started.elapsed() > HANG {
            break page;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    drop(pipe);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let served: BTreeSet<&str> = types.collect();
    let manual = std::fs::read_to_string(root("docs/metrics.md")).unwrap();
    let rows = manual.lines().filter(|line| line.starts_with("| `"));
    let cells: Vec<&str> = rows.map(|line| line.split('|').nth(1).unwrap()).collect();
    let named: BTreeSet<&str> = cells.iter().flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    assert_eq!(named, served, "docs/metrics.md, and what is served");
    let dashboard = std::fs::read_to_string(root("docs/grafana-dashboard.json")).unwrap();
    let is_part = |character: char| character.is_ascii_alphanumeric() || character == '_';
    for word in dashboard.split(|character| !is_part(character)) {
        if word.starts_with("recaption_") || word.starts_with("process_") {
            let suffixes = ["_bucket", "_sum", "_count"];
            let family = suffixes.iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
            assert!(served.contains(word) || served.contains(family), "the dashboard's {word} is not served");
        }
    }
}

#[test]
fn slots_in_use_show_while_captions_are_in_flight() {
    let out = tempfile::tempdir().unwrap();
    let port = free_port();
    // Long captions, so that some are in flight whenever it is looked.
    let mut child = run(port, out.path().to_str().unwrap(), &["--ignore-eos", "--max-new-tokens", "400"]);
    let mut pipe = child.stdin.take().unwrap();
    for _ in 0..24 {
        writeln!(pipe, "{}", root("tests/data/images/42/a.png").display()).unwrap();
    }
    drop(pipe);
    let mut largest: BTreeMap<&str, f64> = BTreeMap::new();
    while child.try_wait().unwrap().is_none() {
        // The run may end between the two.
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { continue };
        let mut page = String::new();
        let asked = write!(stream, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        if asked.and_then(|()| stream.read_to_string(&mut page).map(|_| ())).is_err() {
            continue;
        }
        for name in ["recaption_slots_in_use", "recaption_kv_cache_usage_ratio"] {
            let line = page.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0);
            let seen = largest.entry(name).or_default();
            *seen = seen.max(value);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(largest["recaption_slots_in_use"], 4.0);
    assert!((0.2..=1.0).contains(&largest["recaption_kv_cache_usage_ratio"]), "{largest:?}");
}

#[test]
fn a_port_that_is_taken_is_an_error_before_anything_else() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("captions");
    let (image, bundle) = (root("tests/data/images/42/a.png"), demo_bundle());
    let fixed =
        ["run", image.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--out", folder.to_str().unwrap()];
    let output = recaption(&[&fixed[..], &["--provider", "cpu", "--metrics", &port]].concat());
    assert_eq!(output.status.code(), Some(2));
    let message = stderr(&output);
    assert!(
        message.contains(&format!("error: --metrics 127.0.0.1:{port}: "))
            && message.contains("hint: choose another port"),
        "{message}"
    );
    assert!(!folder.exists());

    let wrong = recaption(&[&fixed[..], &["--metrics", "localhost"]].concat());
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("such as 9090"), "{}", stderr(&wrong));
}

#[test]
fn any_free_port_is_told() {
    let (image, bundle) = (root("tests/data/images/42/a.png"), demo_bundle());
    let output = recaption(&[
        "run",
        image.to_str().unwrap(),
        "--model",
        bundle.to_str().unwrap(),
        "--provider",
        "cpu",
        "--metrics",
        "0",
        "--log-format",
        "json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let lines = stderr(&output);
    let told = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let told: Vec<String> = told.filter_map(|event| event["message"].as_str().map(str::to_owned)).collect();
    let address = told.iter().find_map(|message| message.strip_prefix("metrics: http://127.0.0.1:")).unwrap();
    let port: u16 = address.strip_suffix("/metrics").unwrap().parse().unwrap();
    assert!(port > 0);
}
