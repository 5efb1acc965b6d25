//! Every image of Pillow's test suite, against what Pillow says about it (`scripts/golden/make_pillow.py`). Whatever differs
//! stands with its reason in `tests/data/pillow/differences.tsv`, and what stands there must differ.

use std::collections::BTreeMap;
use std::io::Read;

use flate2::read::ZlibDecoder;
use recaption::pipeline::load::{LoadError, LoadLimits, load, stored_dimensions};
use serde_json::Value;

use crate::support::{demo_bundle, fetched, read_json, root, stderr};

/// Files of the suite, so that none goes missing.
const NUM_FILES: usize = 1060;

/// How far pixels may be from Pillow's: (mean, largest) of the absolute differences of 8-bit samples. Decoders of lossy
/// formats round differently; the others have no choice.
fn tolerance(format: &str) -> (f64, u8) {
    match format {
        "JPEG" | "MPO" => (0.6, 40),
        "WEBP" => (0.6, 8),
        _ => (0.0, 0),
    }
}

/// What differs, by file: (kind, reason).
fn known_differences() -> BTreeMap<String, (String, String)> {
    let text = std::fs::read_to_string(root("tests/data/pillow/differences.tsv")).unwrap();
    let rows = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let mut cells = line.split('\t').map(str::to_owned);
        let [file, kind, reason] = [(); 3].map(|()| cells.next().unwrap_or_default());
        assert!(!reason.is_empty(), "a row of file, kind and reason: {line:?}");
        (file, (kind, reason))
    });
    rows.collect()
}

/// (mean, largest) of the absolute differences.
fn difference(found: &[u8], expected: &[u8]) -> (f64, u8) {
    let differences = || found.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
    let sum: u64 = differences().map(u64::from).sum();
    (sum as f64 / found.len().max(1) as f64, differences().max().unwrap_or(0))
}

/// How our answer differs from Pillow's, if it does.
fn kind_of_difference(
    verdict: &Value,
    found: &Result<recaption::pipeline::load::RgbImage, LoadError>,
) -> Option<String> {
    let file = verdict["file"].as_str().unwrap();
    let is_pillows = verdict.get("width").is_some();
    match found {
        Err(LoadError::DecoderPanicked { .. }) => Some("panic".to_owned()),
        Err(_) => is_pillows.then(|| "refused".to_owned()),
        Ok(_) if !is_pillows => Some("taken".to_owned()),
        Ok(image) => {
            let size = (u64::from(image.width), u64::from(image.height));
            if size != (verdict["width"].as_u64().unwrap(), verdict["height"].as_u64().unwrap()) {
                return Some("size".to_owned());
            }
            let packed = std::fs::File::open(fetched(&format!("pillow/pixels/{file}.z"))).unwrap();
            let mut expected = Vec::new();
            ZlibDecoder::new(packed).read_to_end(&mut expected).unwrap();
            let (max_mean, max_largest) = tolerance(verdict["format"].as_str().unwrap());
            let (mean, largest) = difference(&image.pixels, &expected);
            let is_far = mean > max_mean || largest > max_largest;
            if is_far {
                eprintln!("{file}: mean difference {mean:.3}, largest {largest}");
            }
            is_far.then(|| "pixels".to_owned())
        }
    }
}

#[test]
fn every_image_of_pillows_suite_gives_pillows_answer_or_a_known_other() {
    let known = known_differences();
    let verdicts = read_json(&fetched("pillow/verdict.json"));
    let verdicts = verdicts.as_array().unwrap();
    assert_eq!(verdicts.len(), NUM_FILES);
    let mut wrong = Vec::new();
    let mut num_same = 0;
    for verdict in verdicts {
        let file = verdict["file"].as_str().unwrap();
        let bytes = std::fs::read(fetched(&format!("pillow/images/{file}"))).unwrap();
        let found = load(&bytes, &LoadLimits::default());
        let _ = stored_dimensions(&bytes);
        let kind = kind_of_difference(verdict, &found);
        num_same += usize::from(kind.is_none() && found.is_ok());
        let expected = known.get(file).map(|(kind, _)| kind.clone());
        if kind != expected {
            let ours =
                found.map_or_else(|error| error.to_string(), |image| format!("{}x{}", image.width, image.height));
            wrong.push(format!("{file}\t{}\tPillow: {verdict}; here: {ours}", kind.as_deref().unwrap_or("same")));
        }
    }
    assert!(wrong.is_empty(), "{} differ from what is known:\n{}", wrong.len(), wrong.join("\n"));
    assert!(num_same > 500, "{num_same}");
}

/// Peak memory of a run over the whole suite with the demo model; the model and ONNX Runtime are about 0.2 GB of it, and the
/// largest picture that loads has 8 million pixels.
#[cfg(target_os = "linux")]
const MAX_SUITE_RSS: u64 = 800 << 20;

#[test]
#[cfg(target_os = "linux")]
fn a_run_over_pillows_suite_has_a_row_for_each_file_in_bounded_memory() {
    let images = fetched("pillow/images");
    let verdicts = read_json(&fetched("pillow/verdict.json"));
    let known = known_differences();
    let files: Vec<&str> =
        verdicts.as_array().unwrap().iter().map(|verdict| verdict["file"].as_str().unwrap()).collect();
    let lines: String = files.iter().map(|file| format!("{}\n", images.join(file).display())).collect();
    let bundle = demo_bundle();
    let arguments = ["run", "-", "--model", bundle.to_str().unwrap(), "--quiet", "--max-new-tokens", "1"];
    let (output, peak) = crate::hostile::peak_of(&arguments, &lines);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let rows = crate::support::printed_rows(&output);
    assert_eq!(rows.len(), files.len());
    for (row, verdict) in rows.iter().zip(verdicts.as_array().unwrap()) {
        let file = verdict["file"].as_str().unwrap();
        assert!(row["key"].as_str().unwrap().ends_with(file));
        let kind = known.get(file).map(|(kind, _)| kind.as_str());
        let is_ok = kind == Some("taken") || (verdict.get("width").is_some() && kind != Some("refused"));
        assert_eq!(row["status"] == "ok", is_ok, "{file}: {}", row["error"]);
    }
    assert!(peak > 0 && peak < MAX_SUITE_RSS, "{peak} bytes at the peak");
}
