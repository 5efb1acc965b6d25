//! The journal of a shard in progress: an append-only file of finished rows, so that a killed run loses only what was in
//! flight. It is also where the rows wait for their shard to be whole, so that they take no memory.
//!
//! ```text
//! file   = record(header JSON) record(row)*
//! record = length u32, crc32 u32 of the payload, payload        (little endian)
//! row    = length u32 of the JSON, JSON {index, row, token_ids}, image bytes (for webdataset files only)
//! ```
//!
//! A record that is cut off or damaged ends the journal: it and what follows are dropped, and those images are done again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pipeline::write::fault::{self, Operation};
use crate::pipeline::write::written_row::{Counts, WrittenRow};

/// Version of the file's format.
const FORMAT: u32 = 1;
/// Longest record: a damaged length must not be taken for a reason to read on.
const MAX_RECORD_BYTES: u64 = 1 << 31;
/// Rows of a shard that a journal can keep: a damaged index must not be taken for a reason to set memory aside.
const MAX_ROWS: usize = 1 << 26;
const PREFIX_BYTES: u64 = 8;

/// What a journal says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// [`FORMAT`], under a name that tells a journal from other JSON.
    recaption_journal: u32,
    pub(crate) shard: String,
    /// Fingerprint of the settings that the captions depend on.
    pub(crate) settings: String,
    /// Tells the shard's input from another of the same name, where that is known before it is read.
    pub(crate) identity: Option<String>,
    /// Fingerprint of the shard's file that this journal will replace, when failed rows are done again.
    pub(crate) replaces: Option<String>,
}

impl Header {
    pub(crate) fn new(shard: &str, settings: &str, identity: Option<&str>, replaces: Option<String>) -> Self {
        let (shard, settings) = (shard.to_owned(), settings.to_owned());
        Self { recaption_journal: FORMAT, shard, settings, identity: identity.map(str::to_owned), replaces }
    }
}

/// Hash of a key, to compare it with the input's.
pub(crate) fn key_hash(key: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

/// A finished row as the journal holds it.
pub(crate) struct Entry {
    pub(crate) row: WrittenRow,
    /// The image as read, for webdataset files; else empty.
    pub(crate) image: Vec<u8>,
}

#[derive(Serialize)]
struct EntryOut<'a> {
    index: usize,
    row: &'a WrittenRow,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [i64]>,
}

#[derive(Deserialize)]
struct EntryIn {
    index: usize,
    row: WrittenRow,
    token_ids: Option<Vec<i64>>,
}

/// An open journal.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    /// Payload of each row's record by index: offset and length, 0 where there is no row.
    places: Vec<(u64, u32)>,
    num_rows: usize,
    /// Of its rows, but for the prompt tokens.
    counts: Counts,
    is_dirty: bool,
    buffer: Vec<u8>,
}

/// A journal that an earlier run left.
pub(crate) struct Replayed {
    pub(crate) journal: Journal,
    pub(crate) header: Header,
    /// Hash of each row's key, by index.
    pub(crate) kept: HashMap<usize, u64>,
    /// Bytes of a torn or damaged tail, which are cut off.
    pub(crate) num_dropped_bytes: u64,
}

impl Journal {
    /// Starts a journal.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn create(path: &Path, header: &Header) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        let file = loop {
            match options.open(path) {
                // A process that ends deletes the folder of journals when it is empty. Not the output's own: one that is
                // gone stays gone.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    super::create_folder(path.parent().unwrap_or(path))?;
                }
                result => break result.map_err(Error::io("create", path))?,
            }
        };
        file.set_len(0).map_err(Error::io("write", path))?;
        let mut journal = Self::at(path, file);
        let payload = serde_json::to_vec(header).expect("bug: a header serialises");
        journal.append_record(&payload)?;
        journal.sync()?;
        super::sync_folder(path)?;
        Ok(journal)
    }

    fn at(path: &Path, file: File) -> Self {
        let path = path.to_owned();
        Self {
            path,
            file,
            length: 0,
            places: Vec::new(),
            num_rows: 0,
            counts: Counts::default(),
            is_dirty: false,
            buffer: Vec::new(),
        }
    }

    /// Opens the journal that an earlier run left; `None` when there is none, or one without a whole header.
    ///
    /// # Errors
    /// [`Error::Output`] when another version wrote it; the disk's.
    pub(crate) fn replay(path: &Path) -> Result<Option<Replayed>> {
        let file = match OpenOptions::new().read(true).append(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let file_length = file.metadata().map_err(Error::io("read", path))?.len();
        let mut journal = Self::at(path, file);
        let clone = journal.file.try_clone().map_err(Error::io("read", path))?;
        let mut reader = BufReader::with_capacity(1 << 18, clone);
        let mut payload = Vec::new();
        let mut header = None;
        let mut kept = HashMap::new();
        while read_record(&mut reader, file_length - journal.length, &mut payload).map_err(Error::io("read", path))? {
            let place = (journal.length + PREFIX_BYTES, payload.len() as u32);
            if header.is_none() {
                let Ok(parsed) = serde_json::from_slice::<serde_json::Value>(&payload) else { break };
                header = Some(parse_header(path, parsed)?);
            } else {
                let Some((entry, _)) = parse_entry(&payload) else { break };
                if kept.contains_key(&entry.index) || entry.index >= MAX_ROWS {
                    break;
                }
                kept.insert(entry.index, key_hash(&entry.row.key));
                journal.note(entry.index, place, &entry.row);
            }
            journal.length += PREFIX_BYTES + payload.len() as u64;
        }
        let Some(header) = header else { return Ok(None) };
        let num_dropped_bytes = file_length - journal.length;
        if num_dropped_bytes > 0 {
            journal.file.set_len(journal.length).map_err(Error::io("write", path))?;
        }
        Ok(Some(Replayed { journal, header, kept, num_dropped_bytes }))
    }

    fn note(&mut self, index: usize, place: (u64, u32), row: &WrittenRow) {
        if self.places.len() <= index {
            self.places.resize(index + 1, (0, 0));
        }
        // A row comes once: the engines give back what they have not sent.
        debug_assert_eq!(self.places[index].1, 0, "row {index} of `{}` comes twice", self.path.display());
        self.num_rows += 1;
        self.counts.add_row(row);
        self.places[index] = place;
    }

    /// Counts of its rows, but for the prompt tokens.
    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Rows that it holds.
    pub(crate) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Adds a finished row; it survives the process from here on.
    ///
    /// # Errors
    /// The disk's; the rows before are kept.
    pub(crate) fn append(&mut self, index: usize, row: &WrittenRow, image: Option<&[u8]>) -> Result<()> {
        let entry = EntryOut { index, row, token_ids: row.token_ids.as_deref() };
        let json = serde_json::to_vec(&entry).expect("bug: a row serialises");
        let image = image.unwrap_or_default();
        let mut payload = std::mem::take(&mut self.buffer);
        payload.clear();
        payload.extend((json.len() as u32).to_le_bytes());
        payload.extend(&json);
        payload.extend(image);
        let place = (self.length + PREFIX_BYTES, payload.len() as u32);
        let result = self.append_record(&payload);
        self.buffer = payload;
        result?;
        self.note(index, place, row);
        Ok(())
    }

    fn append_record(&mut self, payload: &[u8]) -> Result<()> {
        if payload.len() as u64 > MAX_RECORD_BYTES {
            let reason = format!("a row of {} bytes is over the journal's limit", payload.len());
            let hint = "lower --max-image-bytes";
            return Err(Error::Output { path: self.path.clone(), reason, hint: hint.to_owned() });
        }
        let mut record = Vec::with_capacity(payload.len() + PREFIX_BYTES as usize);
        record.extend((payload.len() as u32).to_le_bytes());
        record.extend(crc32fast::hash(payload).to_le_bytes());
        record.extend(payload);
        fault::check(Operation::JournalWrite)
            .and_then(|()| self.file.write_all(&record))
            .map_err(Error::io("write", &self.path))?;
        self.length += record.len() as u64;
        self.is_dirty = true;
        Ok(())
    }

    /// Brings what was added to the disk: it survives a power loss from here on.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if std::mem::take(&mut self.is_dirty) {
            fault::check(Operation::JournalSync)
                .and_then(|()| self.file.sync_data())
                .map_err(Error::io("sync", &self.path))?;
        }
        Ok(())
    }

    /// Reads a row back.
    ///
    /// # Errors
    /// The disk's, also when what comes back is not what was written.
    pub(crate) fn read(&mut self, index: usize) -> Result<Entry> {
        let (offset, length) = self.places.get(index).copied().filter(|place| place.1 > 0).expect("bug: no such row");
        let mut record = vec![0; PREFIX_BYTES as usize + length as usize];
        self.file
            .seek(SeekFrom::Start(offset - PREFIX_BYTES))
            .and_then(|_| self.file.read_exact(&mut record))
            .map_err(Error::io("read", &self.path))?;
        let payload = &record[PREFIX_BYTES as usize..];
        let entry = (record[4..8] == crc32fast::hash(payload).to_le_bytes()).then(|| parse_entry(payload)).flatten();
        let (entry, image_start) = entry.ok_or_else(|| Error::Output {
            path: self.path.clone(),
            reason: format!("row {index} comes back from the disk with other bytes than were written"),
            hint: "the disk is failing: run the same command again, which does the damaged rows anew".to_owned(),
        })?;
        let row = WrittenRow { token_ids: entry.token_ids, ..entry.row };
        record.drain(..PREFIX_BYTES as usize + image_start);
        Ok(Entry { row, image: record })
    }

    /// Deletes it.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn remove(self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("delete", &self.path)(error)),
            _ => Ok(()),
        }
    }

    /// Puts a journal that was made elsewhere in the place of `path`.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn move_to(mut self, path: &Path) -> Result<Self> {
        self.sync()?;
        std::fs::rename(&self.path, path).map_err(Error::io("rename to", path))?;
        super::sync_folder(path)?;
        self.path = path.to_owned();
        Ok(self)
    }
}

/// Reads one record into `payload`, if a whole and undamaged one follows within `left` bytes.
fn read_record(reader: &mut impl Read, left: u64, payload: &mut Vec<u8>) -> std::io::Result<bool> {
    if left < PREFIX_BYTES {
        return Ok(false);
    }
    let mut prefix = [0; PREFIX_BYTES as usize];
    reader.read_exact(&mut prefix)?;
    let [a, b, c, d, crc @ ..] = prefix;
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    // Zeros, as a power loss may leave them, are no record.
    if length == 0 || length > MAX_RECORD_BYTES || length > left - PREFIX_BYTES {
        return Ok(false);
    }
    payload.clear();
    reader.take(length).read_to_end(payload)?;
    Ok(payload.len() as u64 == length && crc32fast::hash(payload).to_le_bytes() == crc)
}

fn parse_header(path: &Path, header: serde_json::Value) -> Result<Header> {
    let format = header["recaption_journal"].as_u64();
    match serde_json::from_value(header) {
        Ok(header) if format == Some(FORMAT.into()) => Ok(header),
        _ => Err(Error::Output {
            path: path.to_owned(),
            reason: "the journal is of another version of recaption".to_owned(),
            hint: "finish the run with that version, or delete the journal: its shard is then done anew".to_owned(),
        }),
    }
}

/// The row in a payload, and where its image starts.
fn parse_entry(payload: &[u8]) -> Option<(EntryIn, usize)> {
    let (length, rest) = payload.split_first_chunk::<4>()?;
    let json = rest.get(..u32::from_le_bytes(*length) as usize)?;
    Some((serde_json::from_slice(json).ok()?, 4 + json.len()))
}
