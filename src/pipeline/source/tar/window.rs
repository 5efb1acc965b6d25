//! The samples of a tar that may not be whole yet. Members of a key need not be neighbours: a sample waits for more of
//! them until it has an image, a `.txt` and a `.json`, or until the window is full.

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::pipeline::row::InputColumns;
use crate::pipeline::source::emitter::Emitter;
use crate::pipeline::source::tar::sidecar::{parse_sidecar, take_text};

/// Most samples that wait, and most bytes of them.
const MAX_KEYS: usize = 256;
const MAX_BYTES: usize = 128 << 20;

/// The bytes of an image, or why there are none.
pub(super) type Image = std::result::Result<Bytes, String>;

/// A member of a sample.
pub(super) enum Member {
    Image { image: Image, extension: String },
    Text(String),
    Json(Vec<u8>),
}

impl Member {
    fn num_bytes(&self) -> usize {
        match self {
            Self::Image { image, .. } => image.as_ref().map_or(0, Bytes::len),
            Self::Text(text) => text.len(),
            Self::Json(json) => json.len(),
        }
    }
}

/// The samples that wait, in the order of their first members.
pub(super) struct Window {
    source: String,
    samples: VecDeque<Sample>,
    /// Number of each waiting key's sample; the first sample has number `num_passed`.
    numbers: HashMap<Vec<u8>, usize>,
    num_passed: usize,
    num_bytes: usize,
    /// Hashes of the keys whose images are sent.
    sent: HashSet<[u8; 16]>,
    /// Sidecars that came after their image had left the window.
    num_late: usize,
    max_json_depth: usize,
}

impl Window {
    pub(super) fn new(source: String, max_json_depth: usize) -> Self {
        Self {
            source,
            samples: VecDeque::new(),
            numbers: HashMap::new(),
            num_passed: 0,
            num_bytes: 0,
            sent: HashSet::new(),
            num_late: 0,
            max_json_depth,
        }
    }

    /// Takes a member, and sends the samples in front that wait for nothing more.
    ///
    /// # Errors
    /// As [`Emitter::push`]'s.
    pub(super) fn add(&mut self, key: &[u8], member: Member, emitter: &mut Emitter<'_>) -> Result<()> {
        if !self.numbers.contains_key(key) {
            if self.sent.contains(&hash(key)) {
                return self.add_late(key, member, emitter);
            }
            self.numbers.insert(key.to_owned(), self.num_passed + self.samples.len());
            self.samples.push_back(Sample { key: key.to_owned(), ..Sample::default() });
        }
        self.num_bytes += member.num_bytes();
        let number = self.numbers[key] - self.num_passed;
        self.samples[number].add(member);
        while self.samples.front().is_some_and(Sample::is_whole)
            || self.samples.len() > MAX_KEYS
            || (self.num_bytes > MAX_BYTES && !self.samples.is_empty())
        {
            self.send_first(emitter)?;
        }
        Ok(())
    }

    /// Sends all that is left. Returns how many sidecars came too late for their rows.
    ///
    /// # Errors
    /// As [`Emitter::push`]'s.
    pub(super) fn finish(mut self, emitter: &mut Emitter<'_>) -> Result<usize> {
        while !self.samples.is_empty() && !emitter.is_done() {
            self.send_first(emitter)?;
        }
        Ok(self.num_late)
    }

    fn send_first(&mut self, emitter: &mut Emitter<'_>) -> Result<()> {
        let Some(sample) = self.samples.pop_front() else { return Ok(()) };
        self.num_passed += 1;
        self.num_bytes -= sample.num_bytes;
        self.numbers.remove(&sample.key);
        if sample.images.is_empty() {
            return Ok(());
        }
        self.sent.insert(hash(&sample.key));
        sample.send(&self.source, self.max_json_depth, emitter)
    }

    /// A member whose sample is sent already: another image is a failed row, a sidecar is lost to it.
    fn add_late(&mut self, key: &[u8], member: Member, emitter: &mut Emitter<'_>) -> Result<()> {
        let Member::Image { extension, .. } = member else {
            self.num_late += 1;
            return Ok(());
        };
        let sample = Sample { key: key.to_owned(), images: vec![Err(duplicate(&extension))], ..Sample::default() };
        sample.send(&self.source, self.max_json_depth, emitter)
    }
}

fn duplicate(extension: &str) -> String {
    format!("the key has another image before this .{extension}")
}

fn hash(key: &[u8]) -> [u8; 16] {
    Sha256::digest(key).first_chunk().copied().expect("bug: SHA-256 has 32 bytes")
}

/// The members of one key.
#[derive(Default)]
struct Sample {
    key: Vec<u8>,
    /// Its image, and failures for what claims to be another image of it.
    images: Vec<Image>,
    text: Option<String>,
    json: Option<Vec<u8>>,
    num_bytes: usize,
}

impl Sample {
    /// Of two members of one kind the first counts.
    fn add(&mut self, member: Member) {
        self.num_bytes += member.num_bytes();
        match member {
            Member::Image { extension, .. } if !self.images.is_empty() => self.images.push(Err(duplicate(&extension))),
            Member::Image { image, .. } => self.images.push(image),
            Member::Text(text) => {
                self.text.get_or_insert(text);
            }
            Member::Json(json) => {
                self.json.get_or_insert(json);
            }
        }
    }

    fn is_whole(&self) -> bool {
        !self.images.is_empty() && self.text.is_some() && self.json.is_some()
    }

    /// Sends the rows of the sample.
    fn send(self, source: &str, max_json_depth: usize, emitter: &mut Emitter<'_>) -> Result<()> {
        let key = String::from_utf8_lossy(&self.key).into_owned();
        let mut input = InputColumns { key, source: source.to_owned(), ..InputColumns::default() };
        let mut fields = Map::new();
        match self.json.as_deref().map(|json| parse_sidecar(json, max_json_depth)) {
            Some(Ok(parsed)) => fields = parsed,
            // Unreadable, but not lost.
            Some(Err(text)) => input.metadata = Some(text),
            None => {}
        }
        input.url = take_text(&mut fields, "url");
        input.sha256 = take_text(&mut fields, "sha256");
        input.uid = take_text(&mut fields, "uid");
        input.org_caption = match self.text {
            Some(text) => {
                // A caption that differs from the `.txt` stays in the metadata.
                if fields.get("caption").and_then(Value::as_str) == Some(&text) {
                    fields.shift_remove("caption");
                }
                Some(text)
            }
            None => take_text(&mut fields, "caption"),
        };
        // The key is a column of its own; repeating it in every row says nothing new.
        if fields.get("key").and_then(Value::as_str) == Some(&input.key) {
            fields.shift_remove("key");
        }
        if !fields.is_empty() {
            input.metadata = Some(Value::Object(fields).to_string());
        }
        for image in self.images {
            emitter.push(input.clone(), || image)?;
        }
        Ok(())
    }
}
