//! Preprocess: RGB image to normalised `pixel_values`.
//!
//! Takes an upright RGB picture of any shape, gives float32 `[3, height, width]` as transformers' image processors do, or the
//! same samples before normalisation as u8 patches.
//! Resamples one axis at a time with an 8-bit intermediate and integer weights, as Pillow's `Image.resize` does, to the same
//! samples. Must never build the padded square or the whole resized picture: whatever the shape, only what reaches the output
//! is resampled, in buffers that are kept.

mod axis;

use crossbeam::channel::{Receiver, Sender};
use recaption_export::{ClipManifest, Filter, Geometry, Manifest, PixelLayout, Preprocessing};
use recaption_kernels::Level;
use recaption_kernels::pixels::{self, Rows, Weights};
use thiserror::Error;

use crate::pipeline::load::{LoadedImage, RgbImage};
use crate::pipeline::pool::{BufferPool, PooledBuffer, SamplePool};
use crate::pipeline::preprocess::axis::AxisPlan;
use crate::pipeline::row::{Message, RowDraft};
use crate::profile::recorder::{self, Work};
use crate::runtime::block::Block;
use crate::stage::Stage;

/// An image ready for the vision tower.
pub(crate) struct PreprocessedImage {
    pub(crate) draft: RowDraft,
    pub(crate) pixel_values: PooledBuffer,
    /// Engines that failed while they had it.
    pub(crate) num_failures: u32,
}

/// `pixel_values` of one image.
#[derive(Clone, Debug, PartialEq)]
pub enum PixelValues {
    /// `[3, height, width]`, normalised.
    F32(Vec<f32>),
    /// `[1 + patches, 3 * patch * patch]`, samples as they are.
    U8(Vec<u8>),
}

impl PixelValues {
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::F32(values) => values.is_empty(),
            Self::U8(values) => values.is_empty(),
        }
    }

    /// Copies the values to where image `index` of a batch belongs in the only tensor of `batch`.
    pub(crate) fn copy_to(&self, batch: &mut Block, index: usize) {
        fn place<T>(values: &mut [T], index: usize, length: usize) -> &mut [T] {
            &mut values[index * length..(index + 1) * length]
        }
        match self {
            Self::F32(values) => place(batch.tensor_mut(0), index, values.len()).copy_from_slice(values),
            Self::U8(values) => place(batch.tensor_mut(0), index, values.len()).copy_from_slice(values),
        }
    }
}

/// What a bundle takes as `pixel_values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelFormat {
    layout: PixelLayout,
    height: usize,
    width: usize,
    patch_size: usize,
}

impl PixelFormat {
    /// As the manifest of a captioner says.
    #[must_use]
    pub fn of(manifest: &Manifest) -> Self {
        Self::new(manifest.header.pixel_values.layout, &manifest.header.preprocessing, manifest.vision.patch_size)
    }

    /// As the manifest of a CLIP says.
    #[must_use]
    pub fn of_clip(manifest: &ClipManifest) -> Self {
        Self::new(manifest.header.pixel_values.layout, &manifest.header.preprocessing, manifest.image.patch_size)
    }

    /// Of one layout, for patches of `patch_size` pixels a side.
    #[must_use]
    pub fn new(layout: PixelLayout, preprocessing: &Preprocessing, patch_size: usize) -> Self {
        let Preprocessing { height, width, .. } = *preprocessing;
        Self { layout, height: height as usize, width: width as usize, patch_size }
    }

    /// Shape of `batch` images.
    #[must_use]
    pub fn shape(self, batch: usize) -> Vec<usize> {
        let Self { layout, height, width, patch_size } = self;
        match layout {
            PixelLayout::Nchw => vec![batch, 3, height, width],
            PixelLayout::Patches { .. } => {
                let num_patches = (height / patch_size) * (width / patch_size);
                vec![batch, 1 + num_patches, 3 * patch_size * patch_size]
            }
        }
    }

    /// Values of one image.
    #[must_use]
    pub fn num_values(self) -> usize {
        self.shape(1).iter().product()
    }

    /// Room for one image.
    #[must_use]
    pub fn allocate(self) -> PixelValues {
        match self.layout {
            PixelLayout::Nchw => PixelValues::F32(vec![0.0; self.num_values()]),
            PixelLayout::Patches { .. } => PixelValues::U8(vec![0; self.num_values()]),
        }
    }
}

/// Preprocesses images until `loaded` is closed and empty; an image that fails becomes a failed row.
pub(crate) fn run(
    loaded: &Receiver<LoadedImage>,
    preprocessed: &Sender<PreprocessedImage>,
    rows: &Sender<Message>,
    mut preprocessor: Preprocessor,
    (pool, samples): (&BufferPool, &SamplePool),
) {
    while let Some(LoadedImage { mut draft, image }) = recorder::receive(loaded) {
        Stage::Preprocess.enter();
        draft.times.is_taken(Stage::Preprocess);
        let begun = recorder::begin();
        let mut pixel_values = pool.take();
        let outcome = preprocessor.preprocess(&image, pool.format(), pixel_values.values_mut());
        samples.give_back(image.pixels);
        begun.end(Stage::Preprocess, Work::IMAGE);
        draft.times.is_queued();
        let is_sent = match outcome {
            Ok(()) => recorder::send(preprocessed, PreprocessedImage { draft, pixel_values, num_failures: 0 }).is_ok(),
            Err(reason) => recorder::send(rows, draft.fail(Stage::Preprocess, reason).into()).is_ok(),
        };
        // A closed channel means that the run is failing elsewhere.
        if !is_sent {
            return;
        }
    }
}

/// Longest side in pixels: the weights of one axis take some 32 bytes per pixel of it. JPEG, WebP and GIF cannot reach
/// it; a PNG of 178 million x 1 pixels would take gigabytes.
const MAX_SIDE: u32 = 1 << 20;

/// Pixels per output pixel that are left at least when a picture is loaded reduced. Halved down to 4 of them, photographs that are
/// sharp to the pixel differ by at most 0.0065 in the mean of the normalised tensor and 0.058 in any value; at 3
/// it is 0.0105 and 0.088, beyond the tolerance of the tests.
const MIN_SCALE_REDUCED: f64 = 4.0;

/// By how much a picture of (width, height) may be reduced (1, 2, 4 or 8) before it is preprocessed, so that the result is the
/// same but for rounding.
#[must_use]
pub fn max_reduction(settings: &Preprocessing, width: u32, height: u32) -> u32 {
    if width == 0 || height == 0 || settings.filter == Filter::Nearest {
        return 1;
    }
    let [horizontal, vertical] = axis::plan(settings, width, height);
    let scale = horizontal.scale().min(vertical.scale());
    [8, 4, 2].into_iter().find(|&by| scale >= MIN_SCALE_REDUCED * f64::from(by)).unwrap_or(1)
}

/// Why a picture was not preprocessed.
#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are named and shown in the messages")]
pub enum PreprocessError {
    /// Width or height is zero.
    #[error("the image has no pixels ({width}x{height}); skip it")]
    NoPixels { width: u32, height: u32 },
    /// A side above a million pixels.
    #[error("a side of {width}x{height} is above the limit of 1048576 pixels; crop the image")]
    TooLong { width: u32, height: u32 },
    /// `pixels` does not fit width and height.
    #[error("{width}x{height} pixels came with {num_bytes} bytes; pass 3 bytes per pixel")]
    PixelsLength { width: u32, height: u32, num_bytes: usize },
    /// `pixel_values` does not fit the settings.
    #[error("pixel_values has room for {found} values; pass a slice of {wanted}")]
    OutputLength { found: usize, wanted: usize },
}

/// Preprocesses pictures one after another, with buffers that are kept between them.
pub struct Preprocessor {
    settings: Preprocessing,
    /// Normalised value of each 8-bit sample, per channel: `[3][256]`.
    normalized: [[f32; 256]; 3],
    level: Level,
    horizontal: Axis,
    vertical: Axis,
    /// After the first pass: `[rows, columns, 3]`.
    first: Vec<u8>,
    /// The part of the output that the picture reaches: `[rows, columns, 3]`.
    resampled: Vec<u8>,
}

/// The weights of an axis, kept for the next picture of the same size.
#[derive(Default)]
struct Axis {
    plan: Option<(AxisPlan, u32)>,
    weights: Weights,
}

impl Axis {
    fn prepare(&mut self, plan: AxisPlan, reduction: u32, background: [u8; 3]) {
        if self.plan != Some((plan, reduction)) {
            plan.weights(reduction, background, &mut self.weights);
            self.plan = Some((plan, reduction));
        }
    }
}

impl Preprocessor {
    /// Computes the lookup tables of the normalisation; the first picture allocates the rest.
    #[must_use]
    pub fn new(settings: Preprocessing) -> Self {
        let normalized = std::array::from_fn(|channel| {
            let (mean, std) = (settings.image_mean[channel], settings.image_std[channel]);
            std::array::from_fn(|sample| (sample as f32 * settings.rescale_factor - mean) / std)
        });
        Self {
            settings,
            normalized,
            // What masks instructions is validated where the model is loaded.
            level: Level::current().unwrap_or(Level::PORTABLE),
            horizontal: Axis::default(),
            vertical: Axis::default(),
            first: Vec::new(),
            resampled: Vec::new(),
        }
    }

    /// Fills `pixel_values`, which `format` has allocated, from one picture.
    ///
    /// # Errors
    /// A picture without pixels or with a side above a million.
    pub fn preprocess(
        &mut self,
        image: &RgbImage,
        format: PixelFormat,
        pixel_values: &mut PixelValues,
    ) -> Result<(), PreprocessError> {
        match (pixel_values, format.layout) {
            (PixelValues::F32(values), _) => self.run(image, values),
            (PixelValues::U8(patches), PixelLayout::Patches { zero_point }) => {
                self.run_patches(image, (format.patch_size, zero_point), patches)
            }
            (PixelValues::U8(_), PixelLayout::Nchw) => unreachable!("bug: {format:?} allocates floats"),
        }
    }

    /// Length of `pixel_values`: 3 * height * width.
    #[must_use]
    pub fn num_values(&self) -> usize {
        3 * self.settings.height as usize * self.settings.width as usize
    }

    /// Fills `pixel_values` (`[3, height, width]`, normalised) from one picture.
    ///
    /// # Errors
    /// A picture without pixels or with a side above a million, or slices of the wrong length.
    pub fn run(&mut self, image: &RgbImage, pixel_values: &mut [f32]) -> Result<(), PreprocessError> {
        let (found, wanted) = (pixel_values.len(), self.num_values());
        if found != wanted {
            return Err(PreprocessError::OutputLength { found, wanted });
        }
        let (horizontal, vertical, surroundings) = self.resample_checked(image)?;
        self.write(&horizontal, &vertical, surroundings, pixel_values);
        Ok(())
    }

    /// Resamples the picture; its plans for both axes, and what surrounds it.
    fn resample_checked(&mut self, image: &RgbImage) -> Result<(AxisPlan, AxisPlan, [u8; 3]), PreprocessError> {
        let (width, height) = (image.width, image.height);
        if width == 0 || height == 0 {
            return Err(PreprocessError::NoPixels { width, height });
        }
        if width.max(height) > MAX_SIDE {
            return Err(PreprocessError::TooLong { width, height });
        }
        let num_bytes = image.pixels.len();
        let [columns, rows] = [width, height].map(|side| u64::from(side.div_ceil(image.reduction.max(1))));
        if num_bytes as u64 != 3 * columns * rows {
            return Err(PreprocessError::PixelsLength { width, height, num_bytes });
        }
        let [horizontal, vertical] = axis::plan(&self.settings, width, height);
        let surroundings = match self.settings.geometry {
            Geometry::Pad { background } => background,
            Geometry::ResizeCrop { .. } => [0; 3],
        };
        self.resample(image, &horizontal, &vertical, surroundings);
        Ok((horizontal, vertical, surroundings))
    }

    /// Fills `patches` (`[1 + patches, 3 * patch * patch]`, row 0 with `zero_point`) from one picture.
    fn run_patches(
        &mut self,
        image: &RgbImage,
        (patch_size, zero_point): (usize, u8),
        patches: &mut [u8],
    ) -> Result<(), PreprocessError> {
        let (height, width) = (self.settings.height as usize, self.settings.width as usize);
        let patch_length = 3 * patch_size * patch_size;
        let (found, wanted) = (patches.len(), (1 + (height / patch_size) * (width / patch_size)) * patch_length);
        if found != wanted {
            return Err(PreprocessError::OutputLength { found, wanted });
        }
        let (horizontal, vertical, surroundings) = self.resample_checked(image)?;
        let (class, patches) = patches.split_at_mut(patch_length);
        class.fill(zero_point);
        let (num_rows, num_columns) = (vertical.num_touched() as usize, horizontal.num_touched() as usize);
        if num_rows < height || num_columns < width {
            for channels in patches.chunks_exact_mut(patch_length) {
                for (plane, sample) in channels.chunks_exact_mut(patch_size * patch_size).zip(surroundings) {
                    plane.fill(sample);
                }
            }
        }
        let (top, left) = (vertical.first_touched() as usize, horizontal.first_touched() as usize);
        let (patch_rows, patch_columns) = (height / patch_size, width / patch_size);
        for (row, samples) in self.resampled.chunks_exact(num_columns * 3).enumerate().take(num_rows) {
            let y = top + row;
            // A tower whose side is no multiple of its patches leaves the last rows and columns out.
            if y >= patch_rows * patch_size {
                break;
            }
            let first_patch = (y / patch_size) * patch_columns * patch_length;
            let in_patch = (y % patch_size) * patch_size;
            for (column, pixel) in samples.as_chunks::<3>().0.iter().enumerate() {
                let x = left + column;
                if x >= patch_columns * patch_size {
                    break;
                }
                let place = first_patch + (x / patch_size) * patch_length + in_patch + x % patch_size;
                for (channel, sample) in pixel.iter().enumerate() {
                    patches[place + channel * patch_size * patch_size] = *sample;
                }
            }
        }
        Ok(())
    }

    /// Both passes, in Pillow's order.
    fn resample(&mut self, image: &RgbImage, horizontal: &AxisPlan, vertical: &AxisPlan, surroundings: [u8; 3]) {
        let reduction = image.reduction.max(1);
        self.horizontal.prepare(*horizontal, reduction, surroundings);
        self.vertical.prepare(*vertical, reduction, surroundings);
        let (along, down) = (&self.horizontal.weights, &self.vertical.weights);
        let ((x, width), (y, height)) = (horizontal.needed_reduced(reduction), vertical.needed_reduced(reduction));
        let [x, y, width, height] = [x, y, width, height].map(|pixels| pixels as usize);
        let stride = 3 * image.width.div_ceil(reduction) as usize;
        let source = Rows { samples: &image.pixels[y * stride + 3 * x..], stride, width, height };
        self.resampled.resize(3 * along.len() * down.len(), 0);
        if axis::is_vertical_first(horizontal, vertical) {
            self.first.resize(3 * width * down.len(), 0);
            pixels::vertical(self.level, down, source, &mut self.first);
            let first = Rows { samples: &self.first, stride: 3 * width, width, height: down.len() };
            pixels::horizontal(self.level, along, first, &mut self.resampled);
        } else {
            self.first.resize(3 * along.len() * height, 0);
            pixels::horizontal(self.level, along, source, &mut self.first);
            let first = Rows { samples: &self.first, stride: 3 * along.len(), width: along.len(), height };
            pixels::vertical(self.level, down, first, &mut self.resampled);
        }
    }

    /// Normalises into `pixel_values` `[3, height, width]`.
    fn write(&self, horizontal: &AxisPlan, vertical: &AxisPlan, surroundings: [u8; 3], pixel_values: &mut [f32]) {
        let (height, width) = (self.settings.height as usize, self.settings.width as usize);
        let (num_rows, num_columns) = (vertical.num_touched() as usize, horizontal.num_touched() as usize);
        let (top, left) = (vertical.first_touched() as usize, horizontal.first_touched() as usize);
        let (red, rest) = pixel_values.split_at_mut(height * width);
        let (green, blue) = rest.split_at_mut(height * width);
        let mut planes = [red, green, blue];
        if num_rows < height || num_columns < width {
            for ((plane, normalized), sample) in planes.iter_mut().zip(&self.normalized).zip(surroundings) {
                plane.fill(normalized[usize::from(sample)]);
            }
        }
        let [red, green, blue] = &self.normalized;
        for (row, samples) in self.resampled.chunks_exact(num_columns * 3).enumerate().take(num_rows) {
            let start = (top + row) * width + left;
            let [reds, greens, blues] = planes.each_mut().map(|plane| &mut plane[start..start + num_columns]);
            let values = reds.iter_mut().zip(greens).zip(blues);
            for (((r, g), b), pixel) in values.zip(samples.as_chunks::<3>().0) {
                *r = red[usize::from(pixel[0])];
                *g = green[usize::from(pixel[1])];
                *b = blue[usize::from(pixel[2])];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use recaption_export::Resize;

    use super::*;

    fn settings(geometry: Geometry, height: u32, width: u32) -> Preprocessing {
        let (image_mean, image_std, rescale_factor) = ([0.0; 3], [1.0; 3], 1.0);
        let filter = Filter::Bicubic;
        Preprocessing { geometry, filter, height, width, rescale_factor, image_mean, image_std }
    }

    fn image(width: u32, height: u32) -> RgbImage {
        let pixels = (0..width * height * 3).map(|index| (index * 37 % 251) as u8).collect();
        RgbImage { width, height, pixels, reduction: 1, stored_width: width, stored_height: height }
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
        let white = RgbImage { pixels: vec![255; 3], ..image(1, 1) };
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
                let weights = preprocessor.horizontal.weights.num_bytes() + preprocessor.vertical.weights.num_bytes();
                let num_bytes = preprocessor.first.len() + preprocessor.resampled.len() + weights;
                assert!(num_bytes <= 128 << 20, "{width}x{height} {geometry:?}: {num_bytes} bytes");
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
