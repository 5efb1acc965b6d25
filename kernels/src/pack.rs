//! s8 weights as the integer products read them: made at export, mapped from the file at run time.
//!
//! Version 1, little endian, every section a multiple of 128 bytes long (so 64-byte aligned when the start is):
//!
//! ```text
//! header       128 bytes: "RCAPPACK", version u32, flags u32, columns u64, k u64, block u64, zeros
//! panels       i8  [P][K/4][32][4]   P = panels of 32 columns, K padded to a multiple of 4, zeros in the padding
//! corrections  i32 [P][B][32]        -128 x the column's sum over block b: takes the activations' offset away
//! scales       f32 [P][B or 1][32]   B = ceil(k / block), or 1 where block is 0
//! ```
//! Gated weights (SwiGLU) hold 16 gate and 16 up columns a panel, `columns` counts the pairs.

use crate::Error;
use crate::dot::{COLUMNS, Step};

const MAGIC: &[u8; 8] = b"RCAPPACK";
const VERSION: u32 = 1;
const HEADER: usize = 128;
const GATED: u32 = 1;
const BLOCK_SCALES: u32 = 2;

/// Largest k: an exact sum of 127 x 127 x k fits in 31 bits.
const MAX_K: usize = 131_072;

/// What a packed matrix is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackSpec {
    /// Columns of the product; for gated weights of its output, which is half the rows of the weights.
    pub columns: usize,
    /// Length of the inner products.
    pub k: usize,
    /// Elements of k that share a scale (a multiple of 4), or 0: neither activations nor weights have block scales.
    pub block: usize,
    /// Whether weights have a scale for each block, too, not only for each column.
    pub block_scales: bool,
    /// Whether the rows are `columns` gate rows and then `columns` up rows.
    pub gated: bool,
}

impl PackSpec {
    /// Rows of the weights, `[rows, k]` in torch's layout.
    pub fn rows(&self) -> usize {
        if self.gated { 2 * self.columns } else { self.columns }
    }

    /// Scales for each row of the weights.
    pub fn scales_per_row(&self) -> usize {
        if self.block_scales { self.num_blocks() } else { 1 }
    }

    /// Blocks along k.
    pub fn num_blocks(&self) -> usize {
        if self.block == 0 { 1 } else { self.k.div_ceil(self.block) }
    }

    /// Length of the packed form.
    pub fn num_bytes(&self) -> usize {
        self.scales_at() + self.num_panels() * self.scales_per_row() * 4 * COLUMNS
    }

    /// Output columns of a panel.
    pub(crate) fn panel_columns(&self) -> usize {
        if self.gated { COLUMNS / 2 } else { COLUMNS }
    }

    pub(crate) fn num_panels(&self) -> usize {
        self.columns.div_ceil(self.panel_columns())
    }

    /// Steps of four k.
    pub(crate) fn num_steps(&self) -> usize {
        self.k.div_ceil(4)
    }

    fn corrections_at(&self) -> usize {
        HEADER + self.num_panels() * self.num_steps() * 4 * COLUMNS
    }

    fn scales_at(&self) -> usize {
        self.corrections_at() + self.num_panels() * self.num_blocks() * 4 * COLUMNS
    }

    fn check(&self) -> Result<(), Error> {
        if self.k == 0 || self.k > MAX_K {
            return Err(Error::Shape(format!("k: expected 1 to {MAX_K}, got {}", self.k)));
        }
        if !self.block.is_multiple_of(4) || (self.block == 0 && self.block_scales) {
            return Err(Error::Shape(format!("block: expected a multiple of 4, got {}", self.block)));
        }
        if self.columns > 1 << 31 {
            return Err(Error::Shape(format!("columns: expected at most 2^31, got {}", self.columns)));
        }
        Ok(())
    }

    /// The row of the weights that is a panel's column, if it is not padding.
    pub(crate) fn row_of(&self, panel: usize, column: usize) -> Option<usize> {
        let each = self.panel_columns();
        let index = panel * each + column % each;
        (index < self.columns).then_some(index + if column < each { 0 } else { self.columns })
    }
}

/// Packs weights `[rows, k]` with scales `[rows, scales_per_row]`.
pub fn pack(spec: &PackSpec, weights: &[i8], scales: &[f32]) -> Result<Vec<u8>, Error> {
    spec.check()?;
    crate::error::check_len("weights", spec.rows() * spec.k, weights.len())?;
    crate::error::check_len("weight scales", spec.rows() * spec.scales_per_row(), scales.len())?;
    let mut bytes = vec![0; spec.num_bytes()];
    let (header, rest) = bytes.split_at_mut(HEADER);
    write_header(spec, header);
    let (panels, rest) = rest.split_at_mut(spec.corrections_at() - HEADER);
    let (corrections, packed_scales) = rest.split_at_mut(spec.scales_at() - spec.corrections_at());
    let block = if spec.block == 0 { spec.k } else { spec.block };
    for panel in 0..spec.num_panels() {
        for (column, row) in (0..COLUMNS).filter_map(|column| Some((column, spec.row_of(panel, column)?))) {
            let row_weights = &weights[row * spec.k..][..spec.k];
            for (k, &weight) in row_weights.iter().enumerate() {
                panels[((panel * spec.num_steps() + k / 4) * COLUMNS + column) * 4 + k % 4] = weight as u8;
            }
            for (b, weights) in row_weights.chunks(block).enumerate() {
                let correction = -128 * weights.iter().map(|&w| i32::from(w)).sum::<i32>();
                let at = 4 * ((panel * spec.num_blocks() + b) * COLUMNS + column);
                corrections[at..at + 4].copy_from_slice(&correction.to_le_bytes());
            }
            for (b, scale) in scales[row * spec.scales_per_row()..][..spec.scales_per_row()].iter().enumerate() {
                let at = 4 * ((panel * spec.scales_per_row() + b) * COLUMNS + column);
                packed_scales[at..at + 4].copy_from_slice(&scale.to_le_bytes());
            }
        }
    }
    Ok(bytes)
}

fn write_header(spec: &PackSpec, header: &mut [u8]) {
    let flags = u32::from(spec.gated) * GATED + u32::from(spec.block_scales) * BLOCK_SCALES;
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&flags.to_le_bytes());
    for (i, value) in [spec.columns, spec.k, spec.block].into_iter().enumerate() {
        header[16 + 8 * i..24 + 8 * i].copy_from_slice(&(value as u64).to_le_bytes());
    }
}

/// Packed weights in somebody's memory, checked.
#[derive(Clone, Copy)]
pub struct PackedWeights<'a> {
    spec: PackSpec,
    panels: &'a [Step],
    corrections: &'a [[i32; COLUMNS]],
    scales: &'a [[f32; COLUMNS]],
}

impl<'a> PackedWeights<'a> {
    /// Views bytes that [`pack`] made. They must begin at a multiple of 4, and should at one of 64.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, Error> {
        let refuse = |why: String| Err(Error::Packed(why));
        if cfg!(target_endian = "big") {
            return refuse("made for little-endian processors".to_owned());
        }
        if bytes.len() < HEADER || &bytes[..8] != MAGIC {
            return refuse("no header".to_owned());
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(8) != VERSION {
            return refuse(format!("expected version {VERSION}, got {}", word(8)));
        }
        let size = |at: usize| match (word(at), word(at + 4)) {
            (low, 0) => Ok(low as usize),
            _ => Err(Error::Packed("a size beyond 32 bits".to_owned())),
        };
        let flags = word(12);
        if flags & !(GATED | BLOCK_SCALES) != 0 {
            return refuse(format!("unknown flags {flags:#x}"));
        }
        let spec = PackSpec {
            columns: size(16)?,
            k: size(24)?,
            block: size(32)?,
            block_scales: flags & BLOCK_SCALES != 0,
            gated: flags & GATED != 0,
        };
        spec.check()?;
        if bytes.len() != spec.num_bytes() {
            return refuse(format!("expected {} bytes, got {}", spec.num_bytes(), bytes.len()));
        }
        if !bytes.as_ptr().cast::<u32>().is_aligned() {
            return refuse("not aligned to 4 bytes".to_owned());
        }
        let (panels, rest) = bytes[HEADER..].split_at(spec.corrections_at() - HEADER);
        let (corrections, scales) = rest.split_at(spec.scales_at() - spec.corrections_at());
        // SAFETY: i8, i32 and f32 take any bits, the start is aligned for them and each section begins at a multiple of
        // 128 bytes from it; lengths are whole numbers of elements, so `align_to` leaves no ends.
        let (panels, corrections, scales) =
            unsafe { (panels.align_to::<Step>().1, corrections.align_to().1, scales.align_to().1) };
        Ok(Self { spec, panels, corrections, scales })
    }

    /// What they are like.
    pub fn spec(&self) -> PackSpec {
        self.spec
    }

    pub(crate) fn panel(&self, panel: usize) -> &'a [Step] {
        let steps = self.spec.num_steps();
        &self.panels[panel * steps..(panel + 1) * steps]
    }

    /// One for each block.
    pub(crate) fn corrections(&self, panel: usize) -> &'a [[i32; COLUMNS]] {
        let blocks = self.spec.num_blocks();
        &self.corrections[panel * blocks..(panel + 1) * blocks]
    }

    /// One for each block, or one.
    pub(crate) fn scales(&self, panel: usize) -> &'a [[f32; COLUMNS]] {
        let each = self.spec.scales_per_row();
        &self.scales[panel * each..(panel + 1) * each]
    }
}
