//! Loading and preprocessing against Pillow: edge cases by their pixels, photographs by all their pixels and by the
//! normalised tensor.

use recaption::export::{Preprocessing, hex};
use recaption::pipeline::load::{LoadLimits, Loader, RgbImage, load};
use recaption::pipeline::preprocess::{Preprocessor, max_reduction};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{fetched, integers, read_json, root};

/// Most that the mean of the normalised tensor may be off, and any one value.
const MEAN_TOLERANCE: f64 = 0.01;
const MAX_TOLERANCE: f64 = 0.08;
/// The same for pictures whose pixels are Pillow's: the resampling is exact, so only f32 rounding of the normalisation is left.
const EXACT_TOLERANCE: f64 = 2e-6;

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

pub(crate) fn settings(do_pad: bool) -> Preprocessing {
    let kind = if do_pad { "LlavaImageProcessor" } else { "CLIPImageProcessor" };
    let config = json!({"image_processor_type": kind, "do_pad": do_pad,
        "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}});
    Preprocessing::from_hf(&config, 336).unwrap()
}

/// The photographs: file name, bytes, what the index says.
fn photographs() -> Vec<(String, Vec<u8>, Value)> {
    let folder = fetched("photos");
    let index = read_json(&folder.join("index.json"));
    let photos: Vec<_> = index["photos"].as_array().unwrap().clone();
    assert!(photos.len() >= 20, "{} photographs", photos.len());
    let read = |photo: Value| {
        let file = photo["file"].as_str().unwrap().to_owned();
        (file.clone(), std::fs::read(folder.join(file)).unwrap(), photo)
    };
    photos.into_iter().map(read).collect()
}

/// Mean and largest difference of the picture's tensor from the reference's.
fn difference(image: &RgbImage, mode: &str, photo: &Value) -> (f64, f64) {
    let mut preprocessor = Preprocessor::new(settings(mode == "pad"));
    let mut found = vec![f32::NAN; preprocessor.num_values()];
    preprocessor.run(image, &mut found).unwrap();
    let bytes = std::fs::read(fetched("photos").join(photo[mode].as_str().unwrap())).unwrap();
    let expected: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs()));
    let (sum, max) = differences.fold((0.0, 0.0), |(sum, max): (f64, f64), d| (sum + d, max.max(d)));
    (sum / found.len() as f64, max)
}

#[test]
fn photographs_become_the_tensors_of_the_reference() {
    let (mut num_exact, mut num_plain) = (0, 0);
    let mut worst = [(0.0, 0.0); 2];
    for (file, bytes, photo) in photographs() {
        let image = load(&bytes, &LoadLimits::default()).unwrap();
        let is_exact = hex(&Sha256::digest(&image.pixels)) == photo["rgb_sha256"].as_str().unwrap();
        // libjpeg-turbo's and libpng's pixels to the last bit; others decode progressive JPEGs and lossy WebPs.
        if file.ends_with(".png") || file.ends_with(".jpg") && !bytes.windows(2).any(|marker| marker == b"\xff\xc2") {
            assert!(is_exact, "{file} has other pixels than in Pillow");
            num_plain += 1;
        }
        num_exact += usize::from(is_exact);
        for (mode, worst) in ["pad", "crop"].into_iter().zip(&mut worst) {
            let (mean, max) = difference(&image, mode, &photo);
            let tolerances =
                if is_exact { (EXACT_TOLERANCE, EXACT_TOLERANCE) } else { (MEAN_TOLERANCE, MAX_TOLERANCE) };
            assert!(mean <= tolerances.0 && max <= tolerances.1, "{file} {mode}: mean {mean}, max {max}");
            *worst = (f64::max(worst.0, mean), f64::max(worst.1, max));
        }
    }
    assert!(num_plain >= 20, "{num_plain} plain files");
    println!("{num_exact} pictures exact; worst (mean, max): pad {:?}, crop {:?}", worst[0], worst[1]);
}

#[test]
fn large_photographs_are_loaded_smaller_and_become_the_same_tensors() {
    let mut num_reduced = 0;
    for (file, bytes, photo) in photographs() {
        for mode in ["pad", "crop"] {
            let settings = settings(mode == "pad");
            let whole = load(&bytes, &LoadLimits::default()).unwrap();
            let wanted = max_reduction(&settings, whole.width, whole.height);
            let image = Loader::new(LoadLimits::default(), Some(settings)).load(&bytes, Vec::new()).unwrap();
            assert_eq!((image.width, image.height), (whole.width, whole.height), "{file}");
            if image.reduction == 1 {
                continue;
            }
            num_reduced += 1;
            assert_eq!(image.reduction, wanted, "{file}");
            let (mean, max) = difference(&image, mode, &photo);
            println!("{file} {mode} by {}: mean {mean:.4}, max {max:.4}", image.reduction);
            assert!(mean <= MEAN_TOLERANCE && max <= MAX_TOLERANCE, "{file} {mode}: mean {mean}, max {max}");
        }
    }
    assert!(num_reduced >= 2, "{num_reduced} were reduced");
}

#[test]
fn limits_are_kept_before_anything_is_decoded() {
    let bytes = std::fs::read(root("tests/data/images/28/a.png")).unwrap();
    let limits = LoadLimits { max_pixels: 28 * 28 - 1, ..LoadLimits::default() };
    assert!(load(&bytes, &limits).unwrap_err().to_string().contains("28x28"));
    assert!(load(&bytes, &LoadLimits { max_pixels: 28 * 28, ..LoadLimits::default() }).is_ok());
}
