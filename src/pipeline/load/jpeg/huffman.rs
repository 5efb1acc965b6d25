//! Huffman codes of JPEG (ITU-R T.81, annexes C and F): tables that give a short code and the number behind it in one look-up,
//! and the bits that they are looked up with.

/// Bits that one look-up sees: codes of common symbols and the numbers behind them fit.
const LOOKAHEAD: u32 = 10;
/// Bits that are there at least after a refill.
const READY: u32 = 56;
/// Longest code.
const MAX_CODE: usize = 16;

/// A table of codes for DC differences or AC coefficients.
pub(super) struct HuffmanTable {
    /// By the next [`LOOKAHEAD`] bits. Low byte: the bits of code and number, zero where they do not fit. Where they do, the
    /// number is in the high half and the run of zeros in the second byte (the end of a block has number and run zero). Else
    /// the symbol is in the high half and the length of its code in the second byte; zero where that does not fit either.
    fast: Box<[u32; 1 << LOOKAHEAD]>,
    /// By length: the codes of that length, as 16 bits, are below.
    limits: [u32; MAX_CODE + 1],
    /// By length: what makes a code its symbol's index.
    offsets: [i32; MAX_CODE + 1],
    symbols: [u8; 256],
    /// The segment's bytes that made it.
    specification: Vec<u8>,
}

impl HuffmanTable {
    /// `specification` holds the number of codes of each length from 1 to 16, then their symbols. `None` where it is no table.
    pub(super) fn new(specification: &[u8], is_dc: bool) -> Option<Self> {
        let (counts, listed) = specification.split_at_checked(MAX_CODE)?;
        let mut table = Self {
            fast: Box::new([0; 1 << LOOKAHEAD]),
            limits: [0; MAX_CODE + 1],
            offsets: [0; MAX_CODE + 1],
            symbols: [0; 256],
            specification: specification.to_owned(),
        };
        table.symbols.get_mut(..listed.len())?.copy_from_slice(listed);
        let (mut code, mut index) = (0_u32, 0);
        for (length, &count) in (1..).zip(counts) {
            table.offsets[length as usize] = index as i32 - code as i32;
            for _ in 0..count {
                let &symbol = listed.get(index)?;
                // The code of ones only is no code.
                if code + 1 >= 1 << length || is_dc && symbol > 15 {
                    return None;
                }
                if length <= LOOKAHEAD {
                    table.fill(symbol, (code, length), is_dc);
                }
                code += 1;
                index += 1;
            }
            table.limits[length as usize] = code << (MAX_CODE as u32 - length);
            code <<= 1;
        }
        (index == listed.len()).then_some(table)
    }

    /// Whether the same bytes would make the same table.
    pub(super) fn is_of(&self, specification: &[u8]) -> bool {
        self.specification == specification
    }

    fn fill(&mut self, symbol: u8, (code, length): (u32, u32), is_dc: bool) {
        let rest = LOOKAHEAD - length;
        let (run, size) = if is_dc { (0, u32::from(symbol)) } else { (u32::from(symbol >> 4), u32::from(symbol & 15)) };
        let is_end = !is_dc && symbol == 0;
        for suffix in 0..1 << rest {
            let is_whole = size <= rest && (size > 0 || is_dc || is_end);
            self.fast[(code << rest | suffix) as usize] = if is_whole {
                let number = extended(suffix >> (rest - size), size);
                (number as u32) << 16 | run << 8 | (length + size)
            } else {
                u32::from(symbol) << 16 | length << 8
            };
        }
    }

    /// The symbol of the next code, where the look-up did not do.
    #[inline(always)]
    fn symbol(&self, entry: u32, bits: &mut Bits<'_>) -> Option<u8> {
        let (length, symbol) = match entry >> 8 & 0xff {
            0 => self.long_symbol(bits.peek(MAX_CODE as u32) as u32)?,
            length => (length, (entry >> 16) as u8),
        };
        bits.consume(length);
        Some(symbol)
    }

    /// Length and symbol of a code that is longer than the look-up. (It takes and gives values, not the bits themselves, so that
    /// those stay in registers.)
    #[cold]
    fn long_symbol(&self, next: u32) -> Option<(u32, u8)> {
        let length = (LOOKAHEAD as usize + 1..=MAX_CODE).find(|&length| next < self.limits[length])?;
        let code = next >> (MAX_CODE - length);
        let index = usize::try_from(code as i32 + self.offsets[length]).ok()?;
        Some((length as u32, *self.symbols.get(index)?))
    }
}

/// T.81's EXTEND: `size` bits as a number whose first bit says its sign.
#[inline(always)]
fn extended(bits: u32, size: u32) -> i32 {
    let is_negative = size > 0 && bits >> (size - 1) == 0;
    bits as i32 - if is_negative { (1 << size) - 1 } else { 0 }
}

/// Reads bits from the most significant one on. Behind the end there are zeros; [`Self::consumed`] tells.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    position: usize,
    /// The next bits, at the top.
    buffer: u64,
    /// How many of them there are.
    count: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0, buffer: 0, count: 0 }
    }

    /// Makes at least [`READY`] bits ready.
    #[inline(always)]
    fn refill(&mut self) {
        if let Some(next) = self.bytes.get(self.position..).and_then(<[u8]>::first_chunk) {
            // Bits beyond `count` are the ones that follow: reading them again changes nothing.
            self.buffer |= u64::from_be_bytes(*next) >> self.count;
            self.position += (63 - self.count as usize) >> 3;
            self.count |= 56;
        } else {
            (self.position, self.buffer, self.count) =
                refilled_at_end(self.bytes, self.position, self.buffer, self.count);
        }
    }

    #[inline(always)]
    fn peek(&self, num_bits: u32) -> usize {
        (self.buffer >> (64 - num_bits)) as usize
    }

    #[inline(always)]
    fn consume(&mut self, num_bits: u32) {
        self.buffer <<= num_bits;
        self.count -= num_bits;
    }

    /// A number of `size` bits, at most 15.
    #[inline(always)]
    fn receive(&mut self, size: u32) -> i32 {
        let number = extended((self.buffer >> 1 >> (63 - size)) as u32, size);
        self.consume(size);
        number
    }

    /// Bits that were read.
    pub(super) fn consumed(&self) -> usize {
        8 * self.position - self.count as usize
    }
}

/// [`Bits::refill`] byte by byte.
#[cold]
fn refilled_at_end(bytes: &[u8], mut position: usize, mut buffer: u64, mut count: u32) -> (usize, u64, u32) {
    while count <= 56 {
        let byte = bytes.get(position).copied().unwrap_or(0);
        buffer |= u64::from(byte) << (56 - count);
        position += 1;
        count += 8;
    }
    (position, buffer, count)
}

/// Zigzag position to position in rows, with 16 more for runs that leave a damaged block.
const NATURAL: [u8; 80] = {
    let mut order = [63; 80];
    let (mut x, mut y, mut i) = (0_u8, 0_u8, 0);
    while i < 64 {
        order[i] = 8 * y + x;
        // Up and to the right on even diagonals, down and to the left on odd ones.
        if (x + y) % 2 == 0 {
            if x == 7 {
                y += 1;
            } else if y == 0 {
                x += 1;
            } else {
                x += 1;
                y -= 1;
            }
        } else if y == 7 {
            x += 1;
        } else if x == 0 {
            y += 1;
        } else {
            x -= 1;
            y += 1;
        }
        i += 1;
    }
    order
};

/// By zigzag position: the quantiser's step in the high 16 bits, the position in rows in the low byte.
pub(super) type Steps = [u32; 128];

/// Steps in zigzag order, as a file has them.
pub(super) fn steps(quantizer: [u16; 64]) -> Steps {
    let mut steps = [0; 128];
    for (i, step) in steps.iter_mut().enumerate() {
        let natural = NATURAL.get(i).copied().unwrap_or(63);
        *step = u32::from(quantizer.get(i).copied().unwrap_or(0)) << 16 | u32::from(natural);
    }
    steps
}

/// Reads a block (T.81, F.2.2) into zeros: coefficients times their steps; the position of the last that is not zero.
///
/// `None` where the bits are no block.
#[inline(always)]
pub(super) fn read_block(
    bits: &mut Bits<'_>,
    (dc, ac): (&HuffmanTable, &HuffmanTable),
    steps: &Steps,
    prediction: &mut i32,
    block: &mut [i16; 64],
) -> Option<u8> {
    bits.refill();
    let entry = dc.fast[bits.peek(LOOKAHEAD)];
    let difference = if entry & 0xff != 0 {
        bits.consume(entry & 0xff);
        entry as i32 >> 16
    } else {
        let size = dc.symbol(entry, bits)?;
        bits.receive(u32::from(size & 15))
    };
    *prediction = prediction.wrapping_add(difference);
    block[0] = prediction.wrapping_mul((steps[0] >> 16) as i32) as i16;
    let (mut k, mut last) = (1, 0);
    'block: while k < 64 {
        bits.refill();
        // As many look-ups as the bits are sure to last for.
        for _ in 0..READY / LOOKAHEAD {
            let entry = ac.fast[bits.peek(LOOKAHEAD)];
            let is_whole = entry & 0xff != 0;
            let value = if is_whole {
                bits.consume(entry & 0xff);
                k += (entry >> 8 & 15) as usize;
                entry as i32 >> 16
            } else {
                bits.refill();
                let symbol = ac.symbol(entry, bits)?;
                if symbol & 15 == 0 && symbol != 0 {
                    // Sixteen zeros; of the other runs without a number none has a meaning.
                    (symbol == 0xf0).then_some(())?;
                    k += 16;
                    continue 'block;
                }
                k += usize::from(symbol >> 4);
                bits.receive(u32::from(symbol & 15))
            };
            if value == 0 {
                break 'block;
            }
            let step = steps[k & 127];
            block[(step & 63) as usize] = value.wrapping_mul((step >> 16) as i32) as i16;
            last = k;
            k += 1;
            if k >= 64 || !is_whole {
                continue 'block;
            }
        }
    }
    (k <= 64).then_some(last as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zigzag_visits_every_coefficient() {
        assert_eq!(NATURAL[..10], [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]);
        let mut sorted = NATURAL[..64].to_owned();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..64));
    }

    #[test]
    fn short_and_long_codes_are_read() {
        // Codes 0, 10, 110, … of 1 to 12 bits, for sizes 1 to 12 without a run; the end of a block is the code of 13 bits.
        let mut specification = vec![0; 16];
        specification[..13].fill(1);
        specification.extend(1..=12);
        specification.push(0);
        let ac = HuffmanTable::new(&specification, false).unwrap();
        let mut dc = vec![0; 16];
        dc[..1].fill(1);
        dc.push(0);
        let dc = HuffmanTable::new(&dc, true).unwrap();
        // A difference of nothing, then sizes 1, 12 and 6 with their numbers, then the end.
        let text = ["0", "0", "1", "111111111110", "000000000000", "111110", "100001", "1111111111110"].concat();
        let mut bytes: Vec<u8> = text
            .as_bytes()
            .chunks(8)
            .map(|bits| bits.iter().enumerate().fold(0, |byte, (i, bit)| byte | (bit - b'0') << (7 - i)))
            .collect();
        bytes.extend([0; 3]);
        let (mut bits, mut block, mut prediction) = (Bits::new(&bytes), [0; 64], 5);
        let last = read_block(&mut bits, (&dc, &ac), &steps([2; 64]), &mut prediction, &mut block);
        assert_eq!((last, prediction, bits.consumed()), (Some(3), 5, text.len()));
        assert_eq!([block[0], block[1], block[8], block[16]], [10, 2, -8190, 66]);
    }

    #[test]
    fn tables_that_are_none_are_refused() {
        let mut too_many = vec![0; 16];
        too_many[0] = 2;
        too_many.extend([1, 2]);
        assert!(HuffmanTable::new(&too_many, false).is_none());
        assert!(HuffmanTable::new(&[1; 20], false).is_none());
        assert!(HuffmanTable::new(&[0; 5], false).is_none());
    }
}
