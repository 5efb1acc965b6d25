//! RGB picture -> normalised `pixel_values`.
//!
//! Takes an upright RGB picture of any shape, gives float32 [3, height, width] as transformers'
//! image processors do: resampling equals Pillow's `Image.resize` bit for bit (`Resample.c`: an
//! 8-bit intermediate, horizontal pass first). Must never build the padded square or the whole
//! resized picture: for every shape, memory stays near that of `pixel_values`, and is reused.

mod resample;

use thiserror::Error;

use crossbeam::channel::{Receiver, Sender};
use recaption_export::{Geometry, Preprocessing, Resize};

use crate::pipeline::load::{LoadedImage, RgbImage};
use crate::pipeline::pool::{BufferPool, PooledBuffer};
use crate::pipeline::row::{Message, RowDraft};
use crate::stage::Stage;
use resample::{Axis, AxisShape};

/// Longest side in pixels: the weights of one axis take up to 32 bytes per pixel of it. JPEG, WebP
/// and GIF cannot reach it; a PNG of 178 million x 1 pixels would take gigabytes.
const MAX_SIDE: u32 = 1 << 20;

/// Why a picture was not preprocessed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PreprocessError {
    #[error("the image has no pixels ({width}x{height}); skip it")]
    NoPixels { width: u32, height: u32 },
    #[error("a side of {width}x{height} is above the limit of 1048576 pixels; crop the image")]
    TooLong { width: u32, height: u32 },
    #[error("{width}x{height} pixels came with {num_bytes} bytes; pass 3 bytes per pixel")]
    PixelsLength { width: u32, height: u32, num_bytes: usize },
    #[error("pixel_values has room for {found} values; pass a slice of {wanted}")]
    OutputLength { found: usize, wanted: usize },
}

/// An image ready for the vision tower.
pub(crate) struct PreprocessedImage {
    pub(crate) draft: RowDraft,
    /// `[3, height, width]`
    pub(crate) pixel_values: PooledBuffer,
}

/// Preprocesses images until `loaded` is closed and empty; an image that fails becomes a failed row.
pub(crate) fn run(
    loaded: &Receiver<LoadedImage>,
    preprocessed: &Sender<PreprocessedImage>,
    rows: &Sender<Message>,
    mut preprocessor: Preprocessor,
    pool: &BufferPool,
) {
    for LoadedImage { draft, image } in loaded {
        Stage::Preprocess.enter();
        let mut pixel_values = pool.take();
        let is_sent = match preprocessor.run(&image, pixel_values.as_mut_slice()) {
            Ok(()) => preprocessed.send(PreprocessedImage { draft, pixel_values }).is_ok(),
            Err(reason) => rows.send(draft.fail(Stage::Preprocess, reason).into()).is_ok(),
        };
        // A closed channel means that the run is failing elsewhere.
        if !is_sent {
            return;
        }
    }
}

/// Preprocesses pictures one after another, with buffers that are kept between them.
pub struct Preprocessor {
    settings: Preprocessing,
    /// Normalised value of each 8-bit sample, per channel: [3][256].
    normalized: [[f32; 256]; 3],
    horizontal: Axis,
    vertical: Axis,
    /// One source row after the horizontal pass: [columns, 3].
    row: Vec<u8>,
    /// The vertical pass' fixed-point sums: [rows, columns, 3].
    sums: Vec<i32>,
}

impl Preprocessor {
    #[must_use]
    pub fn new(settings: Preprocessing) -> Self {
        let normalized = std::array::from_fn(|channel| {
            let (mean, std) = (settings.image_mean[channel], settings.image_std[channel]);
            std::array::from_fn(|sample| (sample as f32 * settings.rescale_factor - mean) / std)
        });
        Self {
            settings,
            normalized,
            horizontal: Axis::default(),
            vertical: Axis::default(),
            row: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// The settings given to [`Preprocessor::new`].
    #[must_use]
    pub fn settings(&self) -> &Preprocessing {
        &self.settings
    }

    /// Length of `pixel_values`: 3 * height * width.
    #[must_use]
    pub fn num_values(&self) -> usize {
        3 * self.settings.height as usize * self.settings.width as usize
    }

    /// Fills `pixel_values` ([3, height, width], normalised) from one picture.
    ///
    /// # Errors
    ///
    /// A picture without pixels, or slices of the wrong length.
    pub fn run(&mut self, image: &RgbImage, pixel_values: &mut [f32]) -> Result<(), PreprocessError> {
        let (width, height) = (image.width, image.height);
        if width == 0 || height == 0 {
            return Err(PreprocessError::NoPixels { width, height });
        }
        if width.max(height) > MAX_SIDE {
            return Err(PreprocessError::TooLong { width, height });
        }
        let num_bytes = image.pixels.len();
        if num_bytes as u64 != 3 * u64::from(width) * u64::from(height) {
            return Err(PreprocessError::PixelsLength { width, height, num_bytes });
        }
        let (found, wanted) = (pixel_values.len(), self.num_values());
        if found != wanted {
            return Err(PreprocessError::OutputLength { found, wanted });
        }

        let (horizontal, vertical) = axis_shapes(&self.settings, width, height);
        self.horizontal.plan(&horizontal, self.settings.filter);
        self.vertical.plan(&vertical, self.settings.filter);
        let surroundings = match self.settings.geometry {
            Geometry::Pad { background } => background,
            Geometry::ResizeCrop { .. } => [0; 3],
        };
        self.resample(image, surroundings);
        self.write(surroundings, pixel_values);
        Ok(())
    }

    /// Both passes, row by row of the source: each row is resampled horizontally and added to the
    /// sums of all output rows that it contributes to. The sums are integers, so their order does
    /// not matter, and the intermediate picture of Pillow needs no memory.
    fn resample(&mut self, image: &RgbImage, surroundings: [u8; 3]) {
        let row_len = self.horizontal.num_touched() * 3;
        self.row.resize(row_len, 0);
        self.sums.resize(self.vertical.num_touched() * row_len, 0);
        if row_len == 0 || self.sums.is_empty() {
            return;
        }
        for (taps, sums) in self.vertical.touched().zip(self.sums.chunks_exact_mut(row_len)) {
            let start = taps.start_sums(surroundings);
            for pixel in sums.chunks_exact_mut(3) {
                pixel.copy_from_slice(&start);
            }
        }
        let stride = image.width as usize * 3;
        // The first output row that may still need the current source row.
        let mut first = 0;
        for y in self.vertical.sources() {
            self.horizontal.resample_row(&image.pixels[y * stride..][..stride], surroundings, &mut self.row);
            while self.vertical.taps(first).end() <= y {
                first += 1;
            }
            let rows = self.vertical.touched().zip(self.sums.chunks_exact_mut(row_len)).skip(first);
            for (taps, sums) in rows.take_while(|(taps, _)| taps.start() <= y) {
                let Some(weight) = taps.weight_of(y) else { continue };
                for (sum, &sample) in sums.iter_mut().zip(&self.row) {
                    *sum += weight * i32::from(sample);
                }
            }
        }
    }

    /// Turns the sums into samples, and those into `pixel_values` [3, height, width].
    fn write(&self, surroundings: [u8; 3], pixel_values: &mut [f32]) {
        let (height, width) = (self.settings.height as usize, self.settings.width as usize);
        let (num_rows, num_columns) = (self.vertical.num_touched(), self.horizontal.num_touched());
        let (top, left) = (self.vertical.first_touched(), self.horizontal.first_touched());
        for (channel, plane) in pixel_values.chunks_exact_mut(height * width).enumerate() {
            let normalized = &self.normalized[channel];
            if num_rows < height || num_columns < width {
                plane.fill(normalized[usize::from(surroundings[channel])]);
            }
            if num_columns == 0 {
                continue;
            }
            let rows = plane[top * width..].chunks_exact_mut(width);
            for (row, sums) in rows.zip(self.sums.chunks_exact(num_columns * 3)) {
                for (value, sum) in row[left..].iter_mut().zip(sums[channel..].iter().step_by(3)) {
                    *value = normalized[usize::from(resample::to_sample(*sum))];
                }
            }
        }
    }
}

/// The (horizontal, vertical) way from a picture's pixels to those of `pixel_values`.
fn axis_shapes(settings: &Preprocessing, width: u32, height: u32) -> (AxisShape, AxisShape) {
    let [width, height] = [u64::from(width), u64::from(height)];
    let output = [u64::from(settings.width), u64::from(settings.height)];
    match settings.geometry {
        Geometry::Pad { .. } => {
            let side = width.max(height);
            let shape = |source, output| AxisShape {
                source,
                canvas: side,
                // Rounded down, as `pad_to_square` and LLaVA's `expand2square`.
                source_start: (side - source) / 2,
                resized: output,
                window_start: 0,
                output,
            };
            (shape(width, output[0]), shape(height, output[1]))
        }
        Geometry::ResizeCrop { resize } => {
            let resized = match resize {
                Resize::None => [width, height],
                Resize::Exact { height, width } => [u64::from(width), u64::from(height)],
                Resize::ShortestEdge(edge) => {
                    let (short, long) = (width.min(height), width.max(height));
                    // Python's `int(edge * long / short)`: one division, rounded towards zero.
                    let long = ((u64::from(edge) * long) as f64 / short as f64) as u64;
                    if width <= height { [u64::from(edge), long] } else { [long, u64::from(edge)] }
                }
            };
            let shape = |source, resized: u64, output: u64| AxisShape {
                source,
                canvas: source,
                source_start: 0,
                resized,
                // transformers' `center_crop`: rounded down where it cuts; where it fills up, the
                // margin before the picture is the larger one. Both are the floor of half.
                window_start: (resized as i64 - output as i64).div_euclid(2),
                output,
            };
            (shape(width, resized[0], output[0]), shape(height, resized[1], output[1]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use recaption_export::Filter;

    fn settings(geometry: Geometry, height: u32, width: u32) -> Preprocessing {
        let (image_mean, image_std, rescale_factor) = ([0.0; 3], [1.0; 3], 1.0);
        let filter = Filter::Bicubic;
        Preprocessing { geometry, filter, height, width, rescale_factor, image_mean, image_std }
    }

    fn image(width: u32, height: u32) -> RgbImage {
        let pixels = (0..width * height * 3).map(|index| (index * 37 % 251) as u8).collect();
        RgbImage { width, height, pixels, stored_width: width, stored_height: height }
    }

    #[test]
    fn without_a_resize_the_crop_is_a_copy() {
        let image = image(9, 8);
        let mut preprocessor = Preprocessor::new(settings(Geometry::ResizeCrop { resize: Resize::None }, 5, 4));
        let mut values = vec![f32::NAN; 3 * 5 * 4];
        preprocessor.run(&image, &mut values).unwrap();
        for channel in 0..3 {
            for (y, x) in (0..5).flat_map(|y| (0..4).map(move |x| (y, x))) {
                let expected = image.pixels[((y + 1) * 9 + x + 2) * 3 + channel];
                assert_eq!(values[channel * 20 + y * 4 + x], f32::from(expected));
            }
        }
    }

    #[test]
    fn a_small_picture_is_surrounded_by_black_with_the_larger_margin_first() {
        let geometry = Geometry::ResizeCrop { resize: Resize::None };
        let mut preprocessor = Preprocessor::new(settings(geometry, 4, 2));
        let white = RgbImage { width: 1, height: 1, pixels: vec![255; 3], stored_width: 1, stored_height: 1 };
        let mut values = vec![f32::NAN; 3 * 8];
        preprocessor.run(&white, &mut values).unwrap();
        assert_eq!(values[..8], [0.0, 0.0, 0.0, 0.0, 0.0, 255.0, 0.0, 0.0]);
    }

    #[test]
    fn a_preprocessor_forgets_the_picture_before() {
        for geometry in [
            Geometry::Pad { background: [122, 116, 104] },
            Geometry::ResizeCrop { resize: Resize::ShortestEdge(14) },
            Geometry::ResizeCrop { resize: Resize::Exact { height: 9, width: 20 } },
        ] {
            let mut used = Preprocessor::new(settings(geometry, 14, 14));
            for (width, height) in [(1, 1), (300, 7), (7, 300), (1, 900), (33, 33), (2, 1)] {
                let image = image(width, height);
                let mut values = [vec![f32::NAN; 588], vec![f32::NAN; 588]];
                used.run(&image, &mut values[0]).unwrap();
                Preprocessor::new(settings(geometry, 14, 14)).run(&image, &mut values[1]).unwrap();
                assert_eq!(values[0], values[1], "{width}x{height} {geometry:?}");
            }
        }
    }

    #[test]
    fn extreme_shapes_need_little_memory() {
        for geometry in
            [Geometry::Pad { background: [122, 116, 104] }, Geometry::ResizeCrop { resize: Resize::ShortestEdge(336) }]
        {
            for (width, height) in [(1_000_000, 1), (1, 1_000_000)] {
                let image = image(width, height);
                let mut preprocessor = Preprocessor::new(settings(geometry, 336, 336));
                preprocessor.run(&image, &mut vec![0.0; 3 * 336 * 336]).unwrap();
                assert!(preprocessor.sums.capacity() <= 3 * 336 * 336);
                let num_weights = preprocessor.horizontal.num_weights() + preprocessor.vertical.num_weights();
                assert!(num_weights < 8 * 1_000_000, "{num_weights} weights");
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let mut preprocessor = Preprocessor::new(settings(Geometry::ResizeCrop { resize: Resize::None }, 2, 2));
        let mut wrong = image(3, 3);
        let too_short = PreprocessError::OutputLength { found: 11, wanted: 12 };
        assert_eq!(preprocessor.run(&wrong, &mut [0.0; 11]), Err(too_short));
        wrong.pixels.pop();
        let lost = PreprocessError::PixelsLength { width: 3, height: 3, num_bytes: 26 };
        assert_eq!(preprocessor.run(&wrong, &mut [0.0; 12]), Err(lost));
        let long = PreprocessError::TooLong { width: 1, height: 1 << 21 };
        assert_eq!(preprocessor.run(&image(1, 1 << 21), &mut [0.0; 12]), Err(long));
        let empty = PreprocessError::NoPixels { width: 0, height: 3 };
        assert_eq!(preprocessor.run(&image(0, 3), &mut [0.0; 12]), Err(empty));
    }
}
