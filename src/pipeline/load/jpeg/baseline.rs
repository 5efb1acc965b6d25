//! Plain JPEGs, which nearly all web images are: decoded to the samples of libjpeg-turbo, or to a half, a quarter or an eighth
//! of them a side, with the inverse DCT, upsampling and colours of `recaption_kernels::pixels`.
//!
//! Takes a file's bytes and memory that is kept, gives RGB rows. Must never accept a file that has anything unusual, damaged
//! or missing: what `None` stands for is decided elsewhere.

use std::ops::Range;

use memchr::memchr;
use recaption_kernels::Level;
use recaption_kernels::pixels::{self, Block};

use super::header::{Frame, Tables};
use super::huffman::{Bits, read_block};

/// Memory that is kept from picture to picture.
#[derive(Default)]
pub(super) struct Scratch {
    tables: Tables,
    /// The scan without stuffed zeros and restart markers, and where its segments lie in it.
    scan: Vec<u8>,
    segments: Vec<Range<usize>>,
    planes: [Plane; 3],
    /// Rows of upsampled chroma.
    chroma: [Vec<u8>; 2],
    sums: Vec<u16>,
}

/// The samples of one component in a row of MCUs, and the last row of the MCUs above in front of them.
#[derive(Default)]
struct Plane {
    /// Blocks and samples beside and above one another in an MCU's row.
    columns: usize,
    rows: usize,
    blocks: Vec<Block>,
    last: Vec<u8>,
    samples: Vec<u8>,
    stride: usize,
    /// Rows of samples in a row of MCUs.
    num_lines: usize,
    prediction: i32,
    /// Samples beside and above one another that become one.
    by: [usize; 2],
}

/// Most bytes of a scan that are kept from picture to picture.
const MAX_KEPT_SCAN: usize = 16 << 20;

/// Reads what stands in front of the scan.
pub(super) fn read_frame(bytes: &[u8], scratch: &mut Scratch) -> Option<Frame> {
    Frame::read(bytes, &mut scratch.tables)
}

/// Decodes the scan into `pixels`, `[height / reduction, width / reduction, 3]` (rounded up). `reduction` is 1, 2, 4 or 8.
pub(super) fn decode(
    bytes: &[u8],
    frame: &Frame,
    reduction: usize,
    scratch: &mut Scratch,
    pixels: &mut Vec<u8>,
) -> Option<()> {
    let is_decoded = scratch.decode(bytes, frame, reduction, pixels);
    if scratch.scan.capacity() > MAX_KEPT_SCAN {
        scratch.scan = Vec::new();
    }
    is_decoded
}

impl Scratch {
    fn decode(&mut self, bytes: &[u8], frame: &Frame, reduction: usize, pixels: &mut Vec<u8>) -> Option<()> {
        // What masks instructions is validated where the model is loaded.
        let level = Level::current().unwrap_or(Level::PORTABLE);
        let luma = frame.components.first()?;
        let [mcu_columns, mcu_rows] = [luma.columns, luma.rows];
        let num_columns = frame.width.div_ceil(8 * mcu_columns);
        let num_rows = frame.height.div_ceil(8 * mcu_rows);
        // So narrow that libjpeg upsamples it otherwise.
        if mcu_columns == 2 && frame.width.div_ceil(2) <= 2 {
            return None;
        }
        let num_mcus = num_columns * num_rows;
        let num_segments = match frame.restart_interval {
            0 => 1,
            interval => num_mcus.div_ceil(interval),
        };
        self.unstuff(bytes, frame.scan_start, num_segments)?;
        for (plane, component) in self.planes.iter_mut().zip(&frame.components) {
            let by = [mcu_columns / component.columns, mcu_rows / component.rows].map(|by| (reduction / by).max(1));
            plane.prepare([component.columns, component.rows], num_columns, by);
        }
        let layout = Layout {
            level,
            width: frame.width.div_ceil(reduction),
            height: frame.height.div_ceil(reduction),
            num_lines: self.planes[0].num_lines,
            num_rows,
            is_grey: frame.components.len() == 1,
            // At a reduced size chroma has as many samples as luma.
            is_half_wide: mcu_columns == 2 && reduction == 1,
            is_half_high: mcu_rows == 2 && reduction == 1,
        };
        for chroma in &mut self.chroma {
            chroma.resize(2 * layout.width.div_ceil(2), 0);
        }
        self.sums.resize(layout.width.div_ceil(2), 0);
        pixels.resize(3 * layout.width * layout.height, 0);

        let Self { tables, scan, segments, planes, chroma, sums } = self;
        let mut segments = segments.iter();
        let mut segment = segments.next()?.clone();
        let mut bits = Bits::new(&scan[segment.start..]);
        let mut until_restart = frame.restart_interval;
        let tables = match &frame.components[..] {
            [grey] => [tables.of(grey)?; 3],
            [y, cb, cr, ..] => [tables.of(y)?, tables.of(cb)?, tables.of(cr)?],
            _ => return None,
        };
        let num_components = frame.components.len();
        for row in 0..num_rows {
            for mcu in 0..num_columns {
                if frame.restart_interval > 0 {
                    if until_restart == 0 {
                        is_at_end(&bits, &segment)?;
                        segment = segments.next()?.clone();
                        bits = Bits::new(&scan[segment.start..]);
                        planes.iter_mut().for_each(|plane| plane.prediction = 0);
                        until_restart = frame.restart_interval;
                    }
                    until_restart -= 1;
                }
                for (plane, &(dc, ac, steps)) in planes.iter_mut().zip(&tables).take(num_components) {
                    for block_row in 0..plane.rows {
                        let first = (block_row * num_columns + mcu) * plane.columns;
                        for index in first..first + plane.columns {
                            let block = &mut plane.blocks[index];
                            plane.last[index] = read_block(&mut bits, (dc, ac), steps, &mut plane.prediction, block)?;
                        }
                    }
                }
            }
            for plane in planes.iter_mut().take(num_components) {
                plane.transform(level);
            }
            emit(&layout, row, planes, (&mut *chroma, &mut *sums), pixels);
            for plane in planes.iter_mut().take(num_components) {
                let last = plane.num_lines * plane.stride;
                plane.samples.copy_within(last..last + plane.stride, 0);
            }
        }
        is_at_end(&bits, &segment)
    }

    /// Copies the scan without what is stuffed in. `None` where it does not consist of `num_segments` segments, in the order of
    /// their markers, with the end of the image behind them.
    fn unstuff(&mut self, bytes: &[u8], start: usize, num_segments: usize) -> Option<()> {
        self.scan.clear();
        self.segments.clear();
        let mut segment_start = 0;
        let mut rest = bytes.get(start..)?;
        loop {
            let length = memchr(0xff, rest)?;
            self.scan.extend_from_slice(&rest[..length]);
            let marker = *rest.get(length + 1)?;
            rest = &rest[length + 2..];
            match marker {
                0 => self.scan.push(0xff),
                0xd0..=0xd7 | 0xd9 => {
                    let is_in_order = marker == 0xd9 || usize::from(marker - 0xd0) == self.segments.len() % 8;
                    self.segments.push(segment_start..self.scan.len());
                    segment_start = self.scan.len();
                    if marker == 0xd9 {
                        return (self.segments.len() == num_segments).then_some(());
                    }
                    (is_in_order && self.segments.len() < num_segments).then_some(())?;
                }
                _ => return None,
            }
        }
    }
}

/// Sizes that all rows have in common.
struct Layout {
    level: Level,
    /// Of the result.
    width: usize,
    height: usize,
    /// Rows of the result in a row of MCUs.
    num_lines: usize,
    /// Rows of MCUs.
    num_rows: usize,
    is_grey: bool,
    is_half_wide: bool,
    is_half_high: bool,
}

impl Plane {
    /// For `num_columns` MCUs beside one another, reduced `by` horizontally and vertically.
    fn prepare(&mut self, [columns, rows]: [usize; 2], num_columns: usize, by: [usize; 2]) {
        let num_blocks = num_columns * columns * rows;
        (self.columns, self.rows, self.by, self.prediction) = (columns, rows, by, 0);
        self.blocks.clear();
        self.blocks.resize(num_blocks, [0; 64]);
        self.last.resize(num_blocks, 0);
        self.stride = num_columns * columns * (8 / by[0]);
        self.num_lines = rows * (8 / by[1]);
        self.samples.resize((self.num_lines + 1) * self.stride, 0);
    }

    /// Blocks become samples.
    fn transform(&mut self, level: Level) {
        let blocks_per_row = self.blocks.len() / self.rows;
        let lines_per_block = self.num_lines / self.rows;
        let rows = self.blocks.chunks_exact_mut(blocks_per_row).zip(self.last.chunks_exact(blocks_per_row));
        for (i, (blocks, last)) in rows.enumerate() {
            let samples = &mut self.samples[(1 + i * lines_per_block) * self.stride..];
            match self.by {
                [1, 1] => pixels::inverse_dct(level, blocks, last, samples, self.stride),
                by => pixels::inverse_dct_means(level, by, blocks, last, samples, self.stride),
            }
        }
    }
}

/// Writes the rows that are complete after row `row` of MCUs.
fn emit(
    layout: &Layout,
    row: usize,
    [luma, planes @ ..]: &[Plane; 3],
    (upsampled, sums): (&mut [Vec<u8>; 2], &mut [u16]),
    pixels: &mut [u8],
) {
    let Layout { level, width, height, num_lines, .. } = *layout;
    let start = row * num_lines;
    // The last row needs chroma of the MCUs below.
    let (first, end) = match layout.is_half_high {
        true if row + 1 == layout.num_rows => (start.saturating_sub(1), height),
        true => (start.saturating_sub(1), (start + num_lines - 1).min(height)),
        false => (start, (start + num_lines).min(height)),
    };
    for y in first..end {
        // The row above the MCUs is kept in front of them.
        let luma = &luma.samples[(y + 1 - start) * luma.stride..][..width];
        let out = &mut pixels[3 * width * y..][..3 * width];
        if layout.is_grey {
            pixels::grey_to_rgb(luma, out);
            continue;
        }
        let mut rows: [&[u8]; 2] = [&[]; 2];
        for ((plane, upsampled), chroma) in planes.iter().zip(&mut *upsampled).zip(&mut rows) {
            let num_samples = if layout.is_half_wide { width.div_ceil(2) } else { width };
            let line = |line: usize| &plane.samples[line * plane.stride..][..num_samples];
            if layout.is_half_high {
                let (above, num_samples_high) = (start / 2, height.div_ceil(2));
                let near = y / 2;
                let far = match y % 2 {
                    0 => near.saturating_sub(1),
                    _ => (near + 1).min(num_samples_high - 1),
                };
                let [near, far] = [near, far].map(|y| line(y + 1 - above));
                pixels::upsample_columns_and_rows(level, near, far, sums, upsampled);
                *chroma = upsampled;
            } else if layout.is_half_wide {
                pixels::upsample_columns(level, line(y + 1 - start), upsampled);
                *chroma = upsampled;
            } else {
                *chroma = line(y + 1 - start);
            }
        }
        let [cb, cr] = rows;
        pixels::ycc_to_rgb(level, luma, &cb[..width], &cr[..width], out);
    }
}

/// Whether a segment was read to its last byte and not beyond.
fn is_at_end(bits: &Bits<'_>, segment: &Range<usize>) -> Option<()> {
    let num_bits = 8 * segment.len();
    (num_bits.saturating_sub(7)..=num_bits).contains(&bits.consumed()).then_some(())
}
