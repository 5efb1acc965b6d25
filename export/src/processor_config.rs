//! transformers' `preprocessor_config.json` or `processor_config.json` -> [`Preprocessing`].
//!
//! Takes the parsed JSON of a CLIP or LLaVA image processor, gives everything the preprocess stage
//! needs. Must never guess: a processor type, resampling filter or size that this project does not
//! reproduce exactly is refused by name. Semantics and defaults: transformers 5.23,
//! `models/{clip,llava}/image_processing_pil_*.py` and `image_processing_backends.py`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::checkpoint::{Checkpoint, Layout, read_json};
use crate::error::Result;

/// How an RGB picture becomes `pixel_values`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocessing {
    /// Which part of the picture ends up where.
    pub geometry: Geometry,
    /// How pixels are resampled.
    pub filter: Filter,
    /// Height of `pixel_values` in pixels.
    pub height: u32,
    /// Width of `pixel_values` in pixels.
    pub width: u32,
    /// Factor from 0..=255 to the scale of `image_mean`, 1/255 as a rule.
    pub rescale_factor: f32,
    /// Red, green, blue; zero where the processor does not normalise.
    pub image_mean: [f32; 3],
    /// Red, green, blue; one where the processor does not normalise.
    pub image_std: [f32; 3],
}

/// How a picture of any shape becomes `height` x `width` pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Geometry {
    /// Centred in a square of its longer side, the rest filled with `background` (0..=255), then
    /// the square is resized to `height` x `width`. LLaVA 1.5's own preprocessing.
    Pad {
        /// Red, green, blue: `image_mean` * 255, rounded down.
        background: [u8; 3],
    },
    /// Resized, then the central `height` x `width` are cut out, with black (0, 0, 0) around a
    /// picture that is smaller than that. CLIP's preprocessing.
    ResizeCrop {
        /// Size before the crop.
        resize: Resize,
    },
}

/// The size that [`Geometry::ResizeCrop`] resizes to, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// Only crop.
    None,
    /// The shorter side gets this length, the longer one is scaled alike and rounded down.
    ShortestEdge(u32),
    /// Both sides are set; the picture is stretched.
    Exact {
        /// Height in pixels.
        height: u32,
        /// Width in pixels.
        width: u32,
    },
}

/// Resampling filters, with Pillow's meaning of each: `PIL.Image.Resampling`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the variants are the filters' names")]
pub enum Filter {
    Nearest,
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

impl Filter {
    /// From the number that the JSON files hold.
    #[must_use]
    pub fn from_pil(number: u64) -> Option<Self> {
        Some(match number {
            0 => Self::Nearest,
            1 => Self::Lanczos,
            2 => Self::Bilinear,
            3 => Self::Bicubic,
            4 => Self::Box,
            5 => Self::Hamming,
            _ => return None,
        })
    }
}

/// Why an image processor's settings are refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are shown in the messages")]
pub enum ProcessorConfigError {
    /// Not an image processor, or one without a name.
    #[error(
        "the image processor has no image_processor_type; \
         give the model's preprocessor_config.json, or a processor_config.json that holds one"
    )]
    NoType,
    /// A processor with other semantics, such as `LlavaNextImageProcessor`.
    #[error(
        "image processor type {0} is not supported; \
         use a model with CLIPImageProcessor or LlavaImageProcessor"
    )]
    UnknownType(String),
    /// A setting with a value that is not reproduced here, or no valid value.
    #[error("{key} is {found} in the image processor's settings; {wanted}")]
    Setting { key: &'static str, found: String, wanted: &'static str },
}

/// `image_mean` and `image_std` of OpenAI's CLIP, transformers' defaults for both processors.
const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
const MAX_SIDE: u64 = 16_384;

type Pair = (u32, u32);

impl Preprocessing {
    /// Reads the settings of a CLIP or LLaVA image processor.
    ///
    /// `preprocessor_config` is the root object of either file; an `image_processor` object in it
    /// is preferred. `fallback_size` (pixels, the vision tower's `image_size`) stands in for a
    /// missing `size` or `crop_size`.
    ///
    /// # Errors
    ///
    /// Names the first setting that is unsupported or malformed.
    pub fn from_hf(preprocessor_config: &Value, fallback_size: u32) -> Result<Self, ProcessorConfigError> {
        let settings = Settings(preprocessor_config.get("image_processor").unwrap_or(preprocessor_config));
        let is_llava = settings.is_llava()?;
        if settings.get("use_square_size").is_some_and(|value| value != &Value::Bool(false)) {
            return Err(settings.refuse("use_square_size", "remove it and give size as height and width"));
        }
        let mean = settings.channels("image_mean", CLIP_MEAN)?;
        let std = settings.channels("image_std", CLIP_STD)?;
        let resize = if settings.flag("do_resize", true)? { settings.resize(fallback_size)? } else { Resize::None };
        let crop = if settings.flag("do_center_crop", true)? { Some(settings.crop(fallback_size)?) } else { None };
        let (geometry, (height, width)) = if settings.flag("do_pad", false)? {
            if !is_llava {
                // CLIPImageProcessor pads the finished tensors of a batch, which does nothing
                // where all have one size. Whoever writes it expects LLaVA's padding.
                return Err(settings.refuse(
                    "do_pad",
                    "only LlavaImageProcessor pads to a square; name that type or set do_pad to false",
                ));
            }
            // transformers' order is pad, resize, crop: a square has equal sides after either
            // kind of resize.
            let resized = match resize {
                Resize::ShortestEdge(edge) => (edge, edge),
                Resize::Exact { height, width } => (height, width),
                Resize::None => {
                    return Err(settings.refuse("do_resize", "padding needs a resize to a fixed size"));
                }
            };
            if crop.is_some_and(|crop| crop != resized) {
                return Err(
                    settings.refuse("crop_size", "with do_pad it has to equal size, so that it cuts nothing off")
                );
            }
            let background = mean.map(|channel| (channel * 255.0) as u8);
            (Geometry::Pad { background }, resized)
        } else {
            let size = match (crop, resize) {
                (Some(crop), _) => crop,
                (None, Resize::Exact { height, width }) => (height, width),
                (None, Resize::ShortestEdge(_) | Resize::None) => {
                    return Err(settings.refuse(
                        "do_center_crop",
                        "without a crop, size has to hold a height and a width, as the model takes one shape",
                    ));
                }
            };
            (Geometry::ResizeCrop { resize }, size)
        };
        let normalize = settings.flag("do_normalize", true)?;
        Ok(Self {
            geometry,
            filter: settings.filter()?,
            height,
            width,
            rescale_factor: settings.rescale_factor()?,
            image_mean: if normalize { mean.map(|value| value as f32) } else { [0.0; 3] },
            image_std: if normalize { std.map(|value| value as f32) } else { [1.0; 3] },
        })
    }
}

/// The preprocessing of a checkpoint: its image processor's, else that of the folder of its vision tower, else CLIP's. In the
/// original layout `image_aspect_ratio` in config.json says whether images are padded, since a CLIP processor cannot; so it
/// does for a transformers checkpoint without a processor.
///
/// # Errors
/// What [`Preprocessing::from_hf`] refuses, and a size other than the vision tower's.
pub(crate) fn read(checkpoint: &Checkpoint, image_size: usize) -> Result<Preprocessing> {
    let image_size = u32::try_from(image_size).unwrap_or(u32::MAX);
    let stored = match (processor_of(&checkpoint.folder)?, &checkpoint.tower) {
        (None, Some(tower)) => processor_of(&tower.folder)?,
        (own, _) => own,
    };
    let is_stored = stored.is_some();
    let (path, mut settings) = stored.unwrap_or_else(|| {
        (checkpoint.config_path.clone(), serde_json::json!({"image_processor_type": "CLIPImageProcessor"}))
    });
    let invalid = |reason: String| crate::Error::InvalidConfig { path: path.clone(), reason };
    let refused = |reason: ProcessorConfigError| invalid(reason.to_string());
    if (checkpoint.layout == Layout::Original || !is_stored) && !Settings(&settings).is_llava().map_err(refused)? {
        let is_padded = checkpoint.config.get("image_aspect_ratio").and_then(Value::as_str) == Some("pad");
        settings["image_processor_type"] = "LlavaImageProcessor".into();
        settings["do_pad"] = is_padded.into();
    }
    let preprocessing = Preprocessing::from_hf(&settings, image_size).map_err(refused)?;
    if (preprocessing.height, preprocessing.width) != (image_size, image_size) {
        let Preprocessing { height, width, .. } = preprocessing;
        let reason = format!("images become {width}x{height}, but the vision tower takes {image_size}x{image_size}");
        return Err(invalid(reason));
    }
    Ok(preprocessing)
}

/// The image processor's settings in `folder`, in transformers' order: those inside of `processor_config.json`, else
/// `preprocessor_config.json`.
pub(crate) fn processor_of(folder: &Path) -> Result<Option<(PathBuf, Value)>> {
    let path = folder.join("processor_config.json");
    if let Some(settings) = read_json(&path)?.as_mut().and_then(|json| json.get_mut("image_processor")) {
        return Ok(Some((path, settings.take())));
    }
    let path = folder.join("preprocessor_config.json");
    let Some(mut json) = read_json(&path)? else { return Ok(None) };
    let settings = json.get_mut("image_processor").map(Value::take).unwrap_or(json);
    Ok(Some((path, settings)))
}

/// The image processor's JSON object.
struct Settings<'a>(&'a Value);

impl<'a> Settings<'a> {
    /// A key that is null counts as missing, as in transformers.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn refuse(&self, key: &'static str, wanted: &'static str) -> ProcessorConfigError {
        let found = self.get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
        ProcessorConfigError::Setting { key, found, wanted }
    }

    fn is_llava(&self) -> Result<bool, ProcessorConfigError> {
        let name = self
            .get("image_processor_type")
            .or_else(|| self.get("feature_extractor_type"))
            .and_then(Value::as_str)
            .ok_or(ProcessorConfigError::NoType)?;
        let base = name.strip_suffix("Fast").or_else(|| name.strip_suffix("Pil")).unwrap_or(name);
        match base {
            "LlavaImageProcessor" => Ok(true),
            // The older name, still in openai/clip-vit-large-patch14-336.
            "CLIPImageProcessor" | "CLIPFeatureExtractor" => Ok(false),
            _ => Err(ProcessorConfigError::UnknownType(name.to_owned())),
        }
    }

    fn flag(&self, key: &'static str, default: bool) -> Result<bool, ProcessorConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.refuse(key, "give true or false")),
        }
    }

    fn channels(&self, key: &'static str, default: [f64; 3]) -> Result<[f64; 3], ProcessorConfigError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let numbers: Option<Vec<f64>> = value.as_array().and_then(|values| values.iter().map(Value::as_f64).collect());
        let fits = |channel: &f64| match key {
            "image_std" => *channel > 0.0 && channel.is_finite(),
            _ => (0.0..=1.0).contains(channel),
        };
        numbers
            .and_then(|numbers| <[f64; 3]>::try_from(numbers).ok())
            .filter(|channels| channels.iter().all(fits))
            .ok_or_else(|| self.refuse(key, "give three numbers: means between 0 and 1, deviations above 0"))
    }

    fn filter(&self) -> Result<Filter, ProcessorConfigError> {
        match self.get("resample") {
            None => Ok(Filter::Bicubic),
            Some(value) => value
                .as_u64()
                .and_then(Filter::from_pil)
                .ok_or_else(|| self.refuse("resample", "give one of Pillow's numbers 0 to 5 (3 is bicubic)")),
        }
    }

    fn rescale_factor(&self) -> Result<f32, ProcessorConfigError> {
        if !self.flag("do_rescale", true)? {
            return Ok(1.0);
        }
        match self.get("rescale_factor") {
            None => Ok(1.0 / 255.0),
            Some(value) => value
                .as_f64()
                .filter(|factor| *factor > 0.0 && factor.is_finite())
                .map(|factor| factor as f32)
                .ok_or_else(|| self.refuse("rescale_factor", "give a number above 0, such as 1/255")),
        }
    }

    /// `size`: a number is the shortest edge (`default_to_square` is false in both processors).
    fn resize(&self, fallback_size: u32) -> Result<Resize, ProcessorConfigError> {
        const WANTED: &str = "give shortest_edge alone, height and width, or one number, of 1 to 16384 pixels";
        let Some(value) = self.get("size") else { return Ok(Resize::ShortestEdge(fallback_size)) };
        let has_other_edges = ["longest_edge", "max_height", "max_width"]
            .iter()
            .any(|key| value.get(key).is_some_and(|value| !value.is_null()));
        let edge = side(Some(value)).or_else(|| side(value.get("shortest_edge")));
        match (edge, height_and_width(value)) {
            _ if has_other_edges => None,
            (Some(edge), _) => Some(Resize::ShortestEdge(edge)),
            (None, Some((height, width))) => Some(Resize::Exact { height, width }),
            (None, None) => None,
        }
        .ok_or_else(|| self.refuse("size", WANTED))
    }

    /// `crop_size`: a number is both sides. As (height, width).
    fn crop(&self, fallback_size: u32) -> Result<Pair, ProcessorConfigError> {
        let Some(value) = self.get("crop_size") else { return Ok((fallback_size, fallback_size)) };
        side(Some(value))
            .map(|edge| (edge, edge))
            .or_else(|| height_and_width(value))
            .ok_or_else(|| self.refuse("crop_size", "give height and width, or one number, of 1 to 16384 pixels"))
    }
}

fn height_and_width(value: &Value) -> Option<Pair> {
    let (height, width) = match value.as_array().map(Vec::as_slice) {
        Some([height, width]) => (Some(height), Some(width)),
        _ => (value.get("height"), value.get("width")),
    };
    Some((side(height)?, side(width)?))
}

fn side(value: Option<&Value>) -> Option<u32> {
    value?.as_u64().filter(|side| (1..=MAX_SIDE).contains(side)).map(|side| side as u32)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(config: Value) -> String {
        Preprocessing::from_hf(&config, 336).unwrap_err().to_string()
    }

    #[test]
    fn llava_1_5_as_published() {
        let config = json!({
            "crop_size": {"height": 336, "width": 336}, "do_center_crop": true,
            "do_convert_rgb": true, "do_normalize": true, "do_rescale": true, "do_resize": true,
            "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
            "image_processor_type": "CLIPImageProcessor", "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 336},
        });
        let settings = Preprocessing::from_hf(&config, 224).unwrap();
        assert_eq!(settings.geometry, Geometry::ResizeCrop { resize: Resize::ShortestEdge(336) });
        assert_eq!((settings.height, settings.width), (336, 336));
        assert_eq!(settings.filter, Filter::Bicubic);
        assert_eq!(settings.rescale_factor, 1.0 / 255.0);
        // Nothing but the type: transformers' defaults and the model's size.
        let bare = json!({"processor_class": "LlavaProcessor",
            "image_processor": {"image_processor_type": "CLIPImageProcessorFast", "size": null}});
        assert_eq!(Preprocessing::from_hf(&bare, 336), Ok(settings.clone()));
        let text = serde_json::to_string(&settings).unwrap();
        assert!(text.contains(r#""geometry":{"mode":"resize_crop","resize":{"shortest_edge":336}}"#));
        assert_eq!(serde_json::from_str::<Preprocessing>(&text).unwrap(), settings);
    }

    #[test]
    fn llava_pads_with_the_mean() {
        let config = json!({"image_processor_type": "LlavaImageProcessorPil", "do_pad": true,
            "size": 336, "crop_size": 336});
        let settings = Preprocessing::from_hf(&config, 224).unwrap();
        assert_eq!(settings.geometry, Geometry::Pad { background: [122, 116, 104] });
        assert_eq!((settings.height, settings.width), (336, 336));
        let text = serde_json::to_string(&settings).unwrap();
        assert!(text.contains(r#""geometry":{"mode":"pad","background":[122,116,104]}"#));
        let exact = json!({"image_processor_type": "LlavaImageProcessor", "do_pad": true,
            "size": {"height": 300, "width": 200}, "do_center_crop": false, "do_normalize": false,
            "image_mean": [0.5, 1.0, 0.0], "do_rescale": false});
        let settings = Preprocessing::from_hf(&exact, 224).unwrap();
        assert_eq!(settings.geometry, Geometry::Pad { background: [127, 255, 0] });
        assert_eq!((settings.height, settings.width), (300, 200));
        assert_eq!((settings.image_mean, settings.image_std), ([0.0; 3], [1.0; 3]));
        assert_eq!(settings.rescale_factor, 1.0);
    }

    #[test]
    fn sizes_as_numbers_objects_and_lists() {
        let config = json!({"feature_extractor_type": "CLIPFeatureExtractor", "size": [240, 320],
            "do_center_crop": false, "resample": 2});
        let settings = Preprocessing::from_hf(&config, 224).unwrap();
        let exact = Resize::Exact { height: 240, width: 320 };
        assert_eq!(settings.geometry, Geometry::ResizeCrop { resize: exact });
        assert_eq!((settings.height, settings.width), (240, 320));
        assert_eq!(settings.filter, Filter::Bilinear);
    }

    #[test]
    fn refusals_name_what_they_refuse() {
        assert!(refusal(json!({"image_token": "<image>"})).contains("no image_processor_type"));
        let clip = |key: &str, value: Value| {
            let mut config = json!({"image_processor_type": "CLIPImageProcessor"});
            config[key] = value;
            refusal(config)
        };
        assert!(
            clip("image_processor_type", json!("LlavaNextImageProcessor"))
                .contains("LlavaNextImageProcessor is not supported")
        );
        assert!(clip("resample", json!(7)).starts_with("resample is 7 in"));
        assert!(clip("size", json!({"shortest_edge": 9, "longest_edge": 9})).starts_with("size is {"));
        assert!(clip("size", json!(0)).starts_with("size is 0 in"));
        assert!(clip("crop_size", json!({"shortest_edge": 9})).starts_with("crop_size is {"));
        assert!(clip("do_center_crop", json!(false)).contains("one shape"));
        assert!(clip("do_pad", json!(true)).contains("LlavaImageProcessor"));
        assert!(clip("do_resize", json!("yes")).contains("true or false"));
        assert!(clip("image_std", json!([1, 1, 0])).starts_with("image_std is [1,1,0]"));
        assert!(clip("image_mean", json!([0.5])).starts_with("image_mean is [0.5]"));
        assert!(clip("rescale_factor", json!(0)).starts_with("rescale_factor is 0"));
        let llava = json!({"image_processor_type": "LlavaImageProcessor", "do_pad": true,
            "size": 336, "crop_size": 224});
        assert!(refusal(llava).starts_with("crop_size is 224 in"));
    }
}
