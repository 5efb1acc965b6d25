//! A limit on pages: the library sets memory aside for as many bytes as a page's header says that it inflates to.

use std::io::{Error, Read, Result};

use bytes::Bytes;
use parquet::errors::Result as ParquetResult;
use parquet::file::reader::{ChunkReader, Length};

use crate::storage::{RangeCursor, RangeReader};

/// Looks at every page's header before the library does.
#[derive(Clone)]
pub(super) struct LimitedPages {
    pub(super) reader: RangeReader,
    pub(super) max_page_bytes: u64,
}

impl Length for LimitedPages {
    fn len(&self) -> u64 {
        self.reader.len()
    }
}

impl ChunkReader for LimitedPages {
    type T = PageCursor;

    /// At the beginning of a page's header, if it is read from at all.
    fn get_read(&self, start: u64) -> ParquetResult<PageCursor> {
        let cursor = self.reader.get_read(start)?;
        Ok(PageCursor { cursor, beginning: None, position: 0, max_page_bytes: self.max_page_bytes })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        self.reader.get_bytes(start, length)
    }
}

/// Reads a page's header, if the page is not too large.
pub(super) struct PageCursor {
    cursor: RangeCursor,
    /// The first bytes, once they are read and found good, and how many of them are passed on.
    beginning: Option<Vec<u8>>,
    position: usize,
    max_page_bytes: u64,
}

/// A header's first two fields and the type bytes before them.
const BEGINNING_BYTES: u64 = 16;

impl Read for PageCursor {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let beginning = match &mut self.beginning {
            Some(beginning) => beginning,
            none => {
                let mut bytes = Vec::new();
                self.cursor.by_ref().take(BEGINNING_BYTES).read_to_end(&mut bytes)?;
                let size = inflated_bytes(&bytes).ok_or_else(|| Error::other("a page has no header"))?;
                if size > self.max_page_bytes {
                    let limit = self.max_page_bytes;
                    let reason =
                        format!("a page of {size} bytes is over the limit of {limit} (--max-parquet-page-bytes)");
                    return Err(Error::other(reason));
                }
                none.insert(bytes)
            }
        };
        let mut rest = &beginning[self.position..];
        if rest.is_empty() {
            return self.cursor.read(buffer);
        }
        let length = rest.read(buffer)?;
        self.position += length;
        Ok(length)
    }
}

/// `uncompressed_page_size` of a header in Thrift's compact protocol: its second field, after `type`, both 32-bit integers.
fn inflated_bytes(header: &[u8]) -> Option<u64> {
    const NEXT_FIELD_I32: u8 = 0x15;
    let mut bytes = header.iter().copied();
    let mut field = || -> Option<u64> {
        if bytes.next()? != NEXT_FIELD_I32 {
            return None;
        }
        let mut value = 0;
        for shift in (0..35).step_by(7) {
            let byte = bytes.next()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                // Zigzag: negative sizes become odd numbers, and the library refuses them.
                return Some(value >> 1);
            }
        }
        None
    };
    field()?;
    field()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_from_the_second_field() {
        assert_eq!(inflated_bytes(&[0x15, 0x00, 0x15, 0xc8, 0x01, 0x15, 0x10]), Some(100));
        assert_eq!(inflated_bytes(&[0x15, 0x00, 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f]), Some(i32::MAX as u64));
        assert_eq!(inflated_bytes(&[0x15, 0x00, 0x25, 0x02]), None);
        assert_eq!(inflated_bytes(&[0x15, 0x00, 0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), None);
        assert_eq!(inflated_bytes(&[0x15]), None);
    }
}
