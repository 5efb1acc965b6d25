//! Resampling of one axis at a time, by `fast_image_resize`: the axis' needed part is laid on a canvas where it is padded,
//! then the touched output pixels are computed from it.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeError, ResizeOptions, Resizer};
use recaption_export::Filter;

use crate::pipeline::preprocess::axis::AxisPlan;

/// Samples of a picture: `[height, width, 3]`.
#[derive(Clone, Copy)]
pub(super) struct Pixels<'a> {
    pub(super) samples: &'a [u8],
    pub(super) width: u32,
    pub(super) height: u32,
}

/// A part of a picture, in pixels.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

/// What both passes share.
pub(super) struct Passes<'a> {
    pub(super) resizer: &'a mut Resizer,
    pub(super) canvas: &'a mut Vec<u8>,
    pub(super) options: ResizeOptions,
    /// Colour of the padding.
    pub(super) surroundings: [u8; 3],
}

impl Passes<'_> {
    /// The columns of `part` become the touched output columns; its rows stay.
    pub(super) fn horizontal<'t>(
        &mut self,
        source: Pixels<'_>,
        part: Region,
        axis: &AxisPlan,
        target: &'t mut Vec<u8>,
    ) -> Result<Pixels<'t>, ResizeError> {
        let (start, length) = axis.needed_box();
        let size = (axis.num_touched(), part.height);
        if axis.is_padded() {
            let canvas = (axis.needed_canvas(), part.height);
            let source = lay_on_canvas(
                self.canvas,
                self.surroundings,
                source,
                part,
                canvas,
                (axis.source_in_needed_canvas(), 0),
            );
            let crop = self.options.crop(start, 0.0, length, f64::from(part.height));
            return resize_into(self.resizer, source, target, size, &crop);
        }
        let crop = self.options.crop(f64::from(part.x) + start, f64::from(part.y), length, f64::from(part.height));
        resize_into(self.resizer, source, target, size, &crop)
    }

    /// The rows of `part` become the touched output rows; its columns stay.
    pub(super) fn vertical<'t>(
        &mut self,
        source: Pixels<'_>,
        part: Region,
        axis: &AxisPlan,
        target: &'t mut Vec<u8>,
    ) -> Result<Pixels<'t>, ResizeError> {
        let (start, length) = axis.needed_box();
        let size = (part.width, axis.num_touched());
        if axis.is_padded() {
            let canvas = (part.width, axis.needed_canvas());
            let source = lay_on_canvas(
                self.canvas,
                self.surroundings,
                source,
                part,
                canvas,
                (0, axis.source_in_needed_canvas()),
            );
            let crop = self.options.crop(0.0, start, f64::from(part.width), length);
            return resize_into(self.resizer, source, target, size, &crop);
        }
        let crop = self.options.crop(f64::from(part.x), f64::from(part.y) + start, f64::from(part.width), length);
        resize_into(self.resizer, source, target, size, &crop)
    }
}

/// Copies `part` of `source` to `(x, y)` of a canvas of `surroundings`.
fn lay_on_canvas<'c>(
    canvas: &'c mut Vec<u8>,
    surroundings: [u8; 3],
    source: Pixels<'_>,
    part: Region,
    (width, height): (u32, u32),
    (x, y): (u32, u32),
) -> Pixels<'c> {
    canvas.resize(3 * width as usize * height as usize, 0);
    canvas.as_chunks_mut::<3>().0.fill(surroundings);
    let rows = source.samples.chunks_exact(3 * source.width as usize).skip(part.y as usize);
    let targets = canvas.chunks_exact_mut(3 * width as usize).skip(y as usize);
    for (row, target) in rows.zip(targets).take(part.height as usize) {
        let (from, to, length) = (3 * part.x as usize, 3 * x as usize, 3 * part.width as usize);
        target[to..to + length].copy_from_slice(&row[from..from + length]);
    }
    Pixels { samples: canvas, width, height }
}

/// Resizes the options' crop box of `source` into `target`.
fn resize_into<'t>(
    resizer: &mut Resizer,
    source: Pixels<'_>,
    target: &'t mut Vec<u8>,
    (width, height): (u32, u32),
    options: &ResizeOptions,
) -> Result<Pixels<'t>, ResizeError> {
    let source = ImageRef::new(source.width, source.height, source.samples, PixelType::U8x3).expect("bug: lengths fit");
    target.resize(3 * width as usize * height as usize, 0);
    let mut image = Image::from_slice_u8(width, height, target, PixelType::U8x3).expect("bug: resized to fit");
    resizer.resize(&source, &mut image, options)?;
    Ok(Pixels { samples: target, width, height })
}

/// Pillow's filters under this library's names; its bicubic is Catmull-Rom (a = -0.5).
pub(super) fn algorithm(filter: Filter) -> ResizeAlg {
    match filter {
        Filter::Nearest => ResizeAlg::Nearest,
        Filter::Box => ResizeAlg::Convolution(FilterType::Box),
        Filter::Bilinear => ResizeAlg::Convolution(FilterType::Bilinear),
        Filter::Hamming => ResizeAlg::Convolution(FilterType::Hamming),
        Filter::Bicubic => ResizeAlg::Convolution(FilterType::CatmullRom),
        Filter::Lanczos => ResizeAlg::Convolution(FilterType::Lanczos3),
    }
}
