//! Opens a checkpoint folder: `config.json` plus safetensors shards, and finds the model's tensors in them whatever
//! their naming.
//!
//! Shards are mapped, never read whole: a tensor streams out in blocks and its pages are released afterwards.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::graph::hex;
use crate::tensor::StoredTensor;

/// A part of the model, whose tensors share a prefix in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    VisionTower,
    Projector,
    Decoder,
    LmHead,
}

impl Part {
    const ALL: [Self; 4] = [Self::VisionTower, Self::Projector, Self::Decoder, Self::LmHead];

    /// Prefixes met in the wild, and a tensor that every such part has.
    fn prefixes(self) -> (&'static [&'static str], &'static str) {
        match self {
            Self::VisionTower => (
                &[
                    "vision_tower.vision_model.",
                    "vision_tower.",
                    "model.vision_tower.vision_model.",
                    "model.vision_tower.",
                ],
                "embeddings.class_embedding",
            ),
            Self::Projector => (&["multi_modal_projector.", "model.multi_modal_projector."], "linear_1.weight"),
            Self::Decoder => (
                &["language_model.model.", "model.language_model.", "model.language_model.model.", "language_model."],
                "embed_tokens.weight",
            ),
            Self::LmHead => (&["lm_head.", "language_model.lm_head.", "model.language_model.lm_head."], "weight"),
        }
    }
}

/// A tensor's place: which shard, and where in it.
struct Location {
    shard: usize,
    entry: Entry,
}

/// A mapped file of weights.
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) map: Mmap,
}

/// A tensor in a [`Shard`].
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range within the file.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Shard {
    /// Maps `path` and reads what tensors it holds; no weight is touched.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Entry>)> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the mapping is read-only; the checkpoint is not expected to change while it is exported, and its
        // header is checked against the file's length below.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|reason| Error::InvalidSafetensors { path: path.to_owned(), reason: reason.to_string() })?;
        let data_start = header_bytes + size_of::<u64>();
        let entry = |(name, info): (String, &TensorInfo)| Entry {
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            start: data_start + info.data_offsets.0,
            end: data_start + info.data_offsets.1,
        };
        let mut entries: Vec<Entry> = metadata.tensors().into_iter().map(entry).collect();
        // One order, for the fingerprint.
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok((Self { path: path.to_owned(), map }, entries))
    }
}

impl Entry {
    /// Name, type, shape and place go into a checkpoint's fingerprint.
    pub(crate) fn add_to(&self, fingerprint: &mut Sha256) {
        let Self { name, dtype, shape, start, end } = self;
        fingerprint.update(format!("{name:?} {dtype:?} {shape:?} {start}..{end}\n"));
    }

    /// The tensor itself, in the shard that it was found in.
    pub(crate) fn stored<'a>(&self, shard: &'a Shard) -> Result<StoredTensor<'a>> {
        let Self { name, dtype, shape, start, end } = self.clone();
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::UnsupportedDtype { name, found: format!("{dtype:?}").to_lowercase() });
        }
        Ok(StoredTensor { name, dtype, shape, start, end, shard })
    }
}

/// A checkpoint folder, opened.
pub(crate) struct Checkpoint {
    pub(crate) folder: PathBuf,
    pub(crate) config: Value,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Location>,
    prefixes: Vec<(Part, String)>,
    used: RefCell<BTreeSet<String>>,
    fingerprint: String,
}

impl Checkpoint {
    /// Reads the configuration and the shards' headers; no weight is touched.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let config_path = folder.join("config.json");
        if !config_path.is_file() {
            return Err(Error::MissingFile {
                checkpoint: folder.to_owned(),
                what: "config.json",
                hint: "give the folder of a transformers checkpoint: config.json, *.safetensors, tokenizer.json",
            });
        }
        let config_bytes = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
        let config = parse_json(&config_path, &config_bytes)?;
        let mut fingerprint = Sha256::new();
        fingerprint.update(&config_bytes);

        let files = weight_files(folder)?;
        if files.is_empty() {
            return Err(Error::MissingFile {
                checkpoint: folder.to_owned(),
                what: "model.safetensors or model.safetensors.index.json",
                hint: "only safetensors checkpoints export; convert others with transformers' `save_pretrained`",
            });
        }
        let mut shards: Vec<Shard> = Vec::new();
        let mut tensors: BTreeMap<String, Location> = BTreeMap::new();
        for path in files {
            let (shard, entries) = Shard::open(&path)?;
            shards.push(shard);
            for entry in entries {
                entry.add_to(&mut fingerprint);
                let name = entry.name.clone();
                let location = Location { shard: shards.len() - 1, entry };
                if let Some(first) = tensors.insert(name.clone(), location) {
                    return Err(Error::DuplicateTensor { name, first: shards[first.shard].path.clone(), second: path });
                }
            }
        }
        let prefixes = Part::ALL
            .into_iter()
            .filter_map(|part| {
                let (prefixes, probe) = part.prefixes();
                let prefix = prefixes.iter().find(|prefix| tensors.contains_key(&format!("{prefix}{probe}")))?;
                Some((part, (*prefix).to_owned()))
            })
            .collect();
        Ok(Self {
            folder: folder.to_owned(),
            config,
            shards,
            tensors,
            prefixes,
            used: RefCell::default(),
            fingerprint: hex(&fingerprint.finalize()),
        })
    }

    /// SHA-256 over the configuration and the shards' headers: names, types, shapes and places of all tensors.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(crate) fn has(&self, part: Part) -> bool {
        self.prefixes.iter().any(|(known, _)| *known == part)
    }

    /// Full name of `name` within `part`, as this checkpoint spells it.
    fn full_name(&self, part: Part, name: &str) -> String {
        match self.prefixes.iter().find(|(known, _)| *known == part) {
            Some((_, prefix)) => format!("{prefix}{name}"),
            None => format!("{}{name}", part.prefixes().0[0]),
        }
    }

    /// The tensor `name` of `part`, checked against the shape that the configuration implies.
    pub(crate) fn tensor(&self, part: Part, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let name = self.full_name(part, name);
        let Some(location) = self.tensors.get(&name) else { return Err(Error::MissingTensor { name }) };
        let entry = &location.entry;
        if entry.shape != shape {
            return Err(Error::ShapeMismatch { name, expected: shape.to_vec(), found: entry.shape.clone() });
        }
        let tensor = entry.stored(&self.shards[location.shard])?;
        self.used.borrow_mut().insert(name);
        Ok(tensor)
    }

    /// Fails when the checkpoint holds tensors that nothing asked for, other than those a LLaVA is known to carry
    /// unused: tower layers past the selected one, the tower's last norm, buffers of old versions, a tied head.
    pub(crate) fn refuse_unused(&self, unused_tower_layers: std::ops::Range<usize>) -> Result<()> {
        let used = self.used.borrow();
        let tower = self.full_name(Part::VisionTower, "");
        let is_unused_layer = |name: &str| {
            let layer = name.strip_prefix("encoder.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
            layer.is_some_and(|layer| unused_tower_layers.contains(&layer))
        };
        let is_known = |name: &str| {
            name.strip_prefix(&tower).is_some_and(|rest| {
                rest.starts_with("post_layernorm.") || is_unused_layer(rest) || rest.ends_with("position_ids")
            }) || name.ends_with("rotary_emb.inv_freq")
                || name == self.full_name(Part::LmHead, "weight")
        };
        let unused: Vec<&str> =
            self.tensors.keys().map(String::as_str).filter(|name| !used.contains(*name) && !is_known(name)).collect();
        Error::refuse_tensors(&unused)
    }

    /// A JSON file of the checkpoint, if it is there.
    pub(crate) fn json(&self, name: &str) -> Result<Option<Value>> {
        let path = self.folder.join(name);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        parse_json(&path, &bytes).map(Some)
    }
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes)
        .map_err(|reason| Error::InvalidConfig { path: path.to_owned(), reason: reason.to_string() })
}

/// The files that hold the weights of the model in `folder`: those that an index names, or the one file. Empty when there
/// are none.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        let bytes = std::fs::read(&index).map_err(Error::io("read", &index))?;
        let json = parse_json(&index, &bytes)?;
        let invalid = |reason: String| Error::InvalidConfig { path: index.clone(), reason };
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| invalid("expected an object `weight_map`".to_owned()))?;
        let mut names = BTreeSet::new();
        for file in map.values() {
            let name = file.as_str().unwrap_or_default();
            if name.is_empty() || name.contains(['/', '\\']) {
                return Err(invalid(format!("expected the name of a file in this folder, got {file}")));
            }
            names.insert(name);
        }
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    Ok(vec![])
}
