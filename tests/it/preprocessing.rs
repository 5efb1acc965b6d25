//! Loading and preprocessing against Pillow: edge cases by their pixels, photographs by the normalised tensor.

use recaption::export::Preprocessing;
use recaption::pipeline::load::{LoadLimits, load};
use recaption::pipeline::preprocess::Preprocessor;
use serde_json::{Value, json};

use crate::support::{fetched, integers, read_json, root};

/// Most that the mean of the normalised tensor may be off, and any one value.
const MEAN_TOLERANCE: f64 = 0.01;
const MAX_TOLERANCE: f64 = 0.08;

#[test]
fn edge_cases_load_as_in_pillow() {
    let folder = root("tests/data/images/edge");
    let cases = read_json(&folder.join("expected.json"));
    for case in cases.as_array().unwrap() {
        let file = case["file"].as_str().unwrap();
        let loaded = load(&std::fs::read(folder.join(file)).unwrap(), &LoadLimits::default());
        if case["error"] == true {
            let error = loaded.err().unwrap_or_else(|| panic!("{file}: loaded, expected a refusal"));
            assert!(!error.to_string().is_empty());
            continue;
        }
        let image = loaded.unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(vec![i64::from(image.width), i64::from(image.height)], integers(&case["size"]), "{file}");
        let stored = vec![i64::from(image.stored_width), i64::from(image.stored_height)];
        assert_eq!(stored, integers(&case["stored"]), "{file}");
        let tolerance = case["tolerance"].as_i64().unwrap();
        for point in case["points"].as_array().unwrap() {
            let [x, y, rgb @ ..] = &integers(point)[..] else { panic!("{file}: {point}") };
            let start = 3 * (*y as usize * image.width as usize + *x as usize);
            let found = &image.pixels[start..start + 3];
            let is_close = found.iter().zip(rgb).all(|(&a, &b)| (i64::from(a) - b).abs() <= tolerance);
            assert!(is_close, "{file} at ({x}, {y}): expected {rgb:?}, got {found:?}");
        }
    }
}

fn settings(do_pad: bool) -> Preprocessing {
    let kind = if do_pad { "LlavaImageProcessor" } else { "CLIPImageProcessor" };
    let config = json!({"image_processor_type": kind, "do_pad": do_pad,
        "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}});
    Preprocessing::from_hf(&config, 336).unwrap()
}

#[test]
fn photographs_become_the_tensors_of_the_reference() {
    let folder = fetched("photos");
    let index = read_json(&folder.join("index.json"));
    let photos: &[Value] = index["photos"].as_array().unwrap();
    assert!(photos.len() >= 20, "{} photographs", photos.len());
    let mut worst = [(0.0, 0.0); 2];
    for photo in photos {
        let file = photo["file"].as_str().unwrap();
        let image = load(&std::fs::read(folder.join(file)).unwrap(), &LoadLimits::default()).unwrap();
        for (mode, worst) in ["pad", "crop"].into_iter().zip(&mut worst) {
            let mut preprocessor = Preprocessor::new(settings(mode == "pad"));
            let mut found = vec![f32::NAN; preprocessor.num_values()];
            preprocessor.run(&image, &mut found).unwrap();
            let bytes = std::fs::read(folder.join(photo[mode].as_str().unwrap())).unwrap();
            let expected: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            assert_eq!(found.len(), expected.len());
            let differences = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs()));
            let (sum, max) = differences.fold((0.0, 0.0), |(sum, max): (f64, f64), d| (sum + d, max.max(d)));
            let mean = sum / found.len() as f64;
            assert!(mean <= MEAN_TOLERANCE && max <= MAX_TOLERANCE, "{file} {mode}: mean {mean}, max {max}");
            *worst = (f64::max(worst.0, mean), f64::max(worst.1, max));
        }
    }
    println!("{} photographs; worst (mean, max): pad {:?}, crop {:?}", photos.len(), worst[0], worst[1]);
}

#[test]
fn limits_are_kept_before_anything_is_decoded() {
    let bytes = std::fs::read(root("tests/data/images/28/a.png")).unwrap();
    let limits = LoadLimits { max_pixels: 28 * 28 - 1, ..LoadLimits::default() };
    assert!(load(&bytes, &limits).unwrap_err().to_string().contains("28x28"));
    assert!(load(&bytes, &LoadLimits { max_pixels: 28 * 28, ..LoadLimits::default() }).is_ok());
}
