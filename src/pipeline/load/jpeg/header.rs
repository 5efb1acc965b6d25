//! The segments of a plain JPEG: one frame of Huffman-coded blocks in one scan, grey or YCbCr.
//!
//! Takes a file's bytes, gives what the scan is to be read with. Whatever is unusual gives `None`, which means: not this way.

use std::ops::Range;

use super::huffman::{HuffmanTable, Steps, steps};
use crate::pipeline::load::probe::next_marker;

/// A component of the frame.
#[derive(Clone, Copy, Default)]
pub(super) struct Component {
    id: u8,
    /// Samples beside and above one another where the picture has `max` of them.
    pub(super) columns: usize,
    pub(super) rows: usize,
    pub(super) quantizer: usize,
    pub(super) dc_table: usize,
    pub(super) ac_table: usize,
}

/// What is said in front of the scan.
#[derive(Default)]
pub(super) struct Frame {
    pub(super) width: usize,
    pub(super) height: usize,
    /// One (grey) or three (YCbCr).
    pub(super) components: Vec<Component>,
    /// MCUs between restarts; zero for none.
    pub(super) restart_interval: usize,
    /// Where the entropy-coded data start.
    pub(super) scan_start: usize,
    pub(super) exif: Option<Range<usize>>,
    pub(super) xmp: Option<Range<usize>>,
}

/// Tables by their number, kept from file to file: most files have the same.
#[derive(Default)]
pub(super) struct Tables {
    dc: [Option<HuffmanTable>; 4],
    ac: [Option<HuffmanTable>; 4],
    steps: [Option<Box<Steps>>; 4],
    /// Whether this file has them.
    has_dc: [bool; 4],
    has_ac: [bool; 4],
}

impl Tables {
    /// The tables of a component: DC, AC, quantiser.
    pub(super) fn of(&self, component: &Component) -> Option<(&HuffmanTable, &HuffmanTable, &Steps)> {
        let Component { quantizer, dc_table, ac_table, .. } = *component;
        let dc = self.dc.get(dc_table)?.as_ref().filter(|_| self.has_dc[dc_table])?;
        let ac = self.ac.get(ac_table)?.as_ref().filter(|_| self.has_ac[ac_table])?;
        Some((dc, ac, self.steps.get(quantizer)?.as_deref()?))
    }

    fn forget(&mut self) {
        (self.has_dc, self.has_ac, self.steps) = ([false; 4], [false; 4], [None, None, None, None]);
    }

    fn read_huffman(&mut self, mut segment: &[u8]) -> Option<()> {
        while let Some((&class_and_number, rest)) = segment.split_first() {
            let (class, number) = (class_and_number >> 4, usize::from(class_and_number & 15));
            let num_symbols: usize = rest.get(..16)?.iter().map(|&count| usize::from(count)).sum();
            let (specification, rest) = rest.split_at_checked(16 + num_symbols)?;
            let is_dc = class == 0;
            let (tables, has) = match class {
                0 => (&mut self.dc, &mut self.has_dc),
                1 => (&mut self.ac, &mut self.has_ac),
                _ => return None,
            };
            let table = tables.get_mut(number)?;
            if !table.as_ref().is_some_and(|table| table.is_of(specification)) {
                *table = Some(HuffmanTable::new(specification, is_dc)?);
            }
            has[number] = true;
            segment = rest;
        }
        Some(())
    }

    fn read_quantizers(&mut self, mut segment: &[u8]) -> Option<()> {
        while let Some((&precision_and_number, rest)) = segment.split_first() {
            let number = usize::from(precision_and_number & 15);
            let is_wide = match precision_and_number >> 4 {
                0 => false,
                1 => true,
                _ => return None,
            };
            let (values, rest) = rest.split_at_checked(if is_wide { 128 } else { 64 })?;
            let quantizer = std::array::from_fn(|i| match is_wide {
                true => u16::from_be_bytes([values[2 * i], values[2 * i + 1]]),
                false => u16::from(values[i]),
            });
            *self.steps.get_mut(number)? = Some(Box::new(steps(quantizer)));
            segment = rest;
        }
        Some(())
    }
}

impl Frame {
    /// Reads all segments up to the scan.
    pub(super) fn read(bytes: &[u8], tables: &mut Tables) -> Option<Self> {
        tables.forget();
        let mut frame = Self::default();
        let (mut has_jfif, mut has_adobe) = (false, false);
        let mut position = 2;
        loop {
            let (marker, start) = next_marker(bytes, position)?;
            let length = usize::from(u16::from_be_bytes(*bytes.get(start..)?.first_chunk()?));
            let content = start + 2..start + length;
            let segment = bytes.get(content.clone())?;
            position = start + length;
            match marker {
                0xc0 | 0xc1 if frame.components.is_empty() => frame.read_frame(segment)?,
                0xc4 => tables.read_huffman(segment)?,
                0xdb => tables.read_quantizers(segment)?,
                0xdd => frame.restart_interval = usize::from(u16::from_be_bytes(segment.try_into().ok()?)),
                0xda => {
                    frame.read_scan(segment)?;
                    frame.scan_start = position;
                    // Without any sign, the names of the components could say that they are red, green and blue.
                    let ids: Vec<u8> = frame.components.iter().map(|component| component.id).collect();
                    let is_ycc = has_jfif || has_adobe || ids == [1, 2, 3];
                    return (ids.len() == 1 || is_ycc && ids != *b"RGB").then_some(frame);
                }
                0xe0 if segment.starts_with(b"JFIF\0") => has_jfif = true,
                0xe1 if segment.starts_with(b"Exif\0\0") => {
                    let is_first = frame.exif.replace(content.start + 6..content.end).is_none();
                    is_first.then_some(())?;
                }
                0xe1 if segment.starts_with(XMP) => {
                    let is_first = frame.xmp.replace(content.start + XMP.len()..content.end).is_none();
                    is_first.then_some(())?;
                }
                0xee if segment.starts_with(b"Adobe") => {
                    // The transform: YCbCr, for three components.
                    (segment.get(11) == Some(&1) || frame.components.len() == 1).then_some(())?;
                    has_adobe = true;
                }
                // Application data, comments.
                0xe0..=0xef | 0xfe => {}
                _ => return None,
            }
        }
    }

    fn read_frame(&mut self, segment: &[u8]) -> Option<()> {
        let (&[precision, h1, h0, w1, w0, num_components], components) = segment.split_first_chunk()?;
        self.height = usize::from(u16::from_be_bytes([h1, h0]));
        self.width = usize::from(u16::from_be_bytes([w1, w0]));
        let is_plain = precision == 8 && self.width > 0 && self.height > 0 && matches!(num_components, 1 | 3);
        if !is_plain || components.len() != 3 * usize::from(num_components) {
            return None;
        }
        for &[id, factors, quantizer] in components.as_chunks().0 {
            let (columns, rows) = (usize::from(factors >> 4), usize::from(factors & 15));
            self.components.push(Component { id, columns, rows, quantizer: quantizer.into(), ..Component::default() });
        }
        match &mut self.components[..] {
            // The only component of a scan has one block in each MCU, whatever its factors.
            [grey] => (grey.columns, grey.rows) = (1, 1),
            [luma, chroma @ ..] => {
                let has_known_factors = matches!((luma.columns, luma.rows), (1, 1) | (2, 1) | (2, 2));
                let has_whole_chroma = chroma.iter().all(|component| (component.columns, component.rows) == (1, 1));
                (has_known_factors && has_whole_chroma).then_some(())?;
            }
            [] => return None,
        }
        Some(())
    }

    fn read_scan(&mut self, segment: &[u8]) -> Option<()> {
        let (&num_components, rest) = segment.split_first()?;
        let (selectors, spectral) = rest.split_at_checked(2 * usize::from(num_components))?;
        if usize::from(num_components) != self.components.len() || spectral != [0, 63, 0] {
            return None;
        }
        for (component, &[id, tables]) in self.components.iter_mut().zip(selectors.as_chunks().0) {
            (component.id == id).then_some(())?;
            (component.dc_table, component.ac_table) = (usize::from(tables >> 4), usize::from(tables & 15));
        }
        Some(())
    }
}

const XMP: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
