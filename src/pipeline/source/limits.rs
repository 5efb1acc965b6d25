//! What an input may cost before any of its pictures is decoded, and the readers that hold it to that.
//!
//! Archives come from anybody: a gzip stream of a kilobyte can inflate to a gigabyte, a tar header can announce a name of
//! a gigabyte, a sidecar can nest a million brackets. Each has a bound here, and what passes it is an error by name.

use std::io::{BufRead, Error, Read, Result, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

/// Bounds of what is read from the inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLimits {
    /// Largest image: a file, a tar's member or a parquet's cell.
    pub max_image_bytes: u64,
    /// Largest `.txt` or `.json` beside an image; a larger one is passed over.
    pub max_sidecar_bytes: u64,
    /// Most brackets open at once in a sidecar's JSON; a deeper one is kept as text, unread.
    pub max_json_depth: usize,
    /// Largest page of a parquet file, uncompressed.
    pub max_parquet_page_bytes: u64,
    /// Most bytes that a byte of a gzip-compressed tar may become, over the whole of it.
    pub max_gzip_ratio: u64,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            max_image_bytes: 256 << 20,
            max_sidecar_bytes: 16 << 20,
            max_json_depth: 64,
            max_parquet_page_bytes: 1 << 30,
            max_gzip_ratio: 100,
        }
    }
}

/// Bytes that names and PAX records before one member of a tar may take: Linux ends paths at 4 KiB.
pub(crate) const MAX_TAR_HEADER_BYTES: u64 = 1 << 20;
/// Bytes that gzip may give beyond the ratio: small archives of text compress well.
const GZIP_SLACK_BYTES: u64 = 64 << 20;

/// Whether more than `max_depth` brackets are open at once in `json`, strings left aside.
pub(crate) fn is_deeper_than(json: &[u8], max_depth: usize) -> bool {
    let (mut depth, mut is_in_string, mut is_escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_in_string => is_escaped = true,
            b'"' => is_in_string = !is_in_string,
            b'[' | b'{' if !is_in_string => {
                depth += 1;
                if depth > max_depth {
                    return true;
                }
            }
            b']' | b'}' if !is_in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// A gzip stream that may not swell beyond a ratio.
pub(crate) struct BoundedGzip<R> {
    decoder: MultiGzDecoder<Counted<R>>,
    num_compressed: Arc<AtomicU64>,
    num_inflated: u64,
    max_ratio: u64,
}

impl<R: BufRead> BoundedGzip<R> {
    pub(crate) fn new(compressed: R, max_ratio: u64) -> Self {
        let num_compressed = Arc::default();
        let decoder = MultiGzDecoder::new(Counted { inner: compressed, count: Arc::clone(&num_compressed) });
        Self { decoder, num_compressed, num_inflated: 0, max_ratio }
    }
}

impl<R: BufRead> Read for BoundedGzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let num_read = self.decoder.read(buffer)?;
        self.num_inflated += num_read as u64;
        let (max_ratio, num_compressed) = (self.max_ratio, self.num_compressed.load(Ordering::Relaxed));
        if self.num_inflated > num_compressed.saturating_mul(max_ratio).saturating_add(GZIP_SLACK_BYTES) {
            return Err(Error::other(format!(
                "{num_compressed} bytes of gzip became {}, more than {max_ratio} times as many (--max-gzip-ratio)",
                self.num_inflated
            )));
        }
        Ok(num_read)
    }
}

/// Counts what is consumed.
struct Counted<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let num_read = self.inner.read(buffer)?;
        self.count.fetch_add(num_read as u64, Ordering::Relaxed);
        Ok(num_read)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, num_bytes: usize) {
        self.count.fetch_add(num_bytes as u64, Ordering::Relaxed);
        self.inner.consume(num_bytes);
    }
}

/// Tells a tar's reader how much may be read until the next member: the content of the present one, and
/// [`MAX_TAR_HEADER_BYTES`]. The tar crate reads the names in long-name and PAX records whole, however long they are.
#[derive(Clone)]
pub(crate) struct HeaderBudget(Arc<AtomicU64>);

impl HeaderBudget {
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicU64::new(MAX_TAR_HEADER_BYTES)))
    }

    /// The reader that keeps to it.
    pub(crate) fn reader<R: Read>(&self, inner: R) -> BudgetedReader<R> {
        BudgetedReader { inner, budget: self.clone() }
    }

    /// At a member: `num_bytes` are its content as it lies in the tar.
    pub(crate) fn start(&self, num_bytes: u64) {
        self.0.store(num_bytes.saturating_add(MAX_TAR_HEADER_BYTES), Ordering::Relaxed);
    }
}

/// See [`HeaderBudget`].
pub(crate) struct BudgetedReader<R> {
    inner: R,
    budget: HeaderBudget,
}

impl<R: Read> Read for BudgetedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let left = self.budget.0.load(Ordering::Relaxed);
        let num_wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if num_wanted == 0 && !buffer.is_empty() {
            return Err(Error::other(format!("a member's names are longer than {MAX_TAR_HEADER_BYTES} bytes")));
        }
        let num_read = self.inner.read(&mut buffer[..num_wanted])?;
        self.budget.0.store(left - num_read as u64, Ordering::Relaxed);
        Ok(num_read)
    }
}

/// What is passed over by seeking is not read.
impl<R: Seek> Seek for BudgetedReader<R> {
    fn seek(&mut self, position: SeekFrom) -> Result<u64> {
        self.inner.seek(position)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    #[test]
    fn depth_counts_open_brackets_outside_of_strings() {
        assert!(!is_deeper_than(br#"{"a": [1, {"b": "[[[[[\"{{{{"}], "c": []}"#, 3));
        assert!(is_deeper_than(br#"{"a": [1, {"b": 2}]}"#, 2));
        assert!(!is_deeper_than(b"[][][][]]]]]", 1));
        assert!(is_deeper_than(&[b'['; 1_000_000], 64));
    }

    #[test]
    fn gzip_inflates_up_to_the_ratio_and_no_further() {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        for _ in 0..80 {
            encoder.write_all(&vec![0; 1 << 20]).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        assert!(bomb.len() < 100_000);
        let inflate = |max_ratio| std::io::copy(&mut BoundedGzip::new(&bomb[..], max_ratio), &mut std::io::sink());
        assert_eq!(inflate(2000).unwrap(), 80 << 20);
        assert!(inflate(100).unwrap_err().to_string().contains("--max-gzip-ratio"));
    }

    #[test]
    fn a_budget_lets_a_member_pass_and_ends_an_endless_name() {
        let budget = HeaderBudget::new();
        let mut reader = budget.reader(std::io::repeat(0));
        let mut buffer = vec![0; 1 << 16];
        budget.start(5 << 20);
        for _ in 0..6 << 4 {
            reader.read_exact(&mut buffer).unwrap();
        }
        assert!(reader.read(&mut buffer).is_err());
        budget.start(0);
        reader.read_exact(&mut buffer).unwrap();
    }
}
