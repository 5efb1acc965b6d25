//! Opens a checkpoint folder: `config.json` plus shards of weights, and finds the model's tensors in them whatever the
//! layout. A vision tower from a folder of its own and a LoRA adapter join in here, so that nothing after this knows
//! where a tensor came from.
//!
//! Shards are mapped, never read whole: a tensor streams out in blocks and its pages are released afterwards.

mod layout;
mod lora;
mod low_rank;
mod shard;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

pub(crate) use self::layout::{Layout, Part};
pub(crate) use self::low_rank::LowRank;
pub(crate) use self::shard::{Entry, Shard, entries, weight_files};

use self::layout::TensorName;
use self::lora::{AdapterConfig, Role};
use crate::error::{Error, Result};
use crate::graph::hex;
use crate::manifest::FILE_NAME as MANIFEST_FILE;
use crate::tensor::StoredTensor;

/// A tensor's place: which shard, and where in it.
#[derive(Clone)]
struct Location {
    shard: usize,
    entry: Entry,
}

/// A checkpoint folder, opened.
pub(crate) struct Checkpoint {
    pub(crate) folder: PathBuf,
    pub(crate) config: Value,
    /// Where `config` was read.
    pub(crate) config_path: PathBuf,
    pub(crate) layout: Layout,
    /// The folder that `--vision-tower` names.
    pub(crate) tower: Option<TowerFolder>,
    shards: Vec<Shard>,
    tensors: BTreeMap<TensorName, Location>,
    /// What a LoRA adapter adds to a tensor.
    updates: BTreeMap<TensorName, Update>,
    /// Stored names that are of no part of a LLaVA.
    strangers: Vec<String>,
    used: RefCell<BTreeSet<TensorName>>,
    fingerprint: Sha256,
}

/// A LoRA update of one tensor: see [`LowRank`].
struct Update {
    left: Location,
    right: Location,
    is_transposed: bool,
    scale: f32,
}

/// A CLIP checkpoint folder.
pub(crate) struct TowerFolder {
    pub(crate) folder: PathBuf,
    pub(crate) config: Value,
}

impl Checkpoint {
    /// Reads the configuration and the shards' headers; no weight is touched. `vision_tower` is the folder of a CLIP
    /// checkpoint, `lora` that of an adapter.
    pub(crate) fn open(folder: &Path, vision_tower: Option<&Path>, lora: Option<&Path>) -> Result<Self> {
        let hint = "give the folder of a LLaVA checkpoint: config.json, *.safetensors, tokenizer.json";
        let (mut config_path, mut config_bytes) = read_config(folder, hint)?;
        let mut config = parse_json(&config_path, &config_bytes)?;
        // LLaVA's LoRA training writes the LLaVA's config.json beside the adapter; the base may be a bare LLaMA.
        if let Some(lora) = lora.filter(|lora| lora.join("config.json").is_file()) {
            let (path, bytes) = read_config(lora, hint)?;
            let json = parse_json(&path, &bytes)?;
            if Layout::of(&json) == Layout::Original {
                (config_path, config_bytes, config) = (path, bytes, json);
            }
        }
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            layout: Layout::of(&config),
            config,
            config_path,
            tower: None,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            updates: BTreeMap::new(),
            strangers: Vec::new(),
            used: RefCell::default(),
            fingerprint: Sha256::new_with_prefix(&config_bytes),
        };
        let files = weight_files(folder)?;
        if files.is_empty() {
            return Err(Error::MissingFile {
                checkpoint: folder.to_owned(),
                what: "model.safetensors, pytorch_model.bin or an index of such",
                hint: "give the folder of a transformers checkpoint, with all of its weights",
            });
        }
        for file in files {
            checkpoint.add_shard(&file, checkpoint.layout)?;
        }
        checkpoint.add_tower(vision_tower)?;
        if let Some(lora) = lora {
            checkpoint.add_adapter(lora)?;
        }
        Ok(checkpoint)
    }

    /// Maps a file and takes its tensors in.
    fn add_shard(&mut self, path: &Path, layout: Layout) -> Result<()> {
        for location in self.map_shard(path)? {
            let Some(name) = layout.parse(&location.entry.name) else {
                self.strangers.push(location.entry.name);
                continue;
            };
            let stored = location.entry.name.clone();
            if let Some(first) = self.tensors.insert(name, location) {
                let first = self.shards[first.shard].path.clone();
                return Err(Error::DuplicateTensor { name: stored, first, second: path.to_owned() });
            }
        }
        Ok(())
    }

    /// Maps a file; its tensors go into the fingerprint.
    fn map_shard(&mut self, path: &Path) -> Result<Vec<Location>> {
        let (shard, entries) = Shard::open(path)?;
        entries.iter().for_each(|entry| entry.add_to(&mut self.fingerprint));
        self.shards.push(shard);
        let shard = self.shards.len() - 1;
        Ok(entries.into_iter().map(|entry| Location { shard, entry }).collect())
    }

    /// Takes in the tower that `--vision-tower` names. Where the checkpoint embeds a tower, as the original layout may, its
    /// weights stay and the folder's config.json says what shapes cannot.
    fn add_tower(&mut self, folder: Option<&Path>) -> Result<()> {
        let is_embedded = self.has(Part::VisionTower);
        let Some(folder) = folder else {
            if !is_embedded && self.layout == Layout::Original {
                let tower = self.config.get("mm_vision_tower").and_then(Value::as_str).unwrap_or("unnamed").to_owned();
                return Err(Error::MissingVisionTower { checkpoint: self.folder.clone(), tower });
            }
            return Ok(());
        };
        if self.layout == Layout::Transformers {
            let found = "a checkpoint in the transformers layout, which has its own tower";
            return Err(Error::unsupported("--vision-tower", found, "leave --vision-tower out"));
        }
        let (path, bytes) =
            read_config(folder, "--vision-tower takes the folder of a CLIP checkpoint of transformers")?;
        self.fingerprint.update(&bytes);
        self.tower = Some(TowerFolder { folder: folder.to_owned(), config: parse_json(&path, &bytes)? });
        if is_embedded {
            return Ok(());
        }
        let files = weight_files(folder)?;
        if files.is_empty() {
            return Err(Error::MissingFile {
                checkpoint: folder.to_owned(),
                what: "model.safetensors, pytorch_model.bin or an index of such",
                hint: "--vision-tower takes the folder of a CLIP checkpoint of transformers",
            });
        }
        // The rest of a CLIP model, its text side, is of no use here.
        let strangers = self.strangers.len();
        for file in files {
            self.add_shard(&file, Layout::ClipTower)?;
        }
        self.strangers.truncate(strangers);
        Ok(())
    }

    /// Takes in the adapter in `folder`.
    fn add_adapter(&mut self, folder: &Path) -> Result<()> {
        let (config, json) = AdapterConfig::read(folder)?;
        self.fingerprint.update(json.to_string());
        let mut pairs: BTreeMap<String, [Option<Location>; 2]> = BTreeMap::new();
        for file in lora::weight_files(folder)? {
            for location in self.map_shard(&file)? {
                let (name, role) = lora::parse(&location.entry.name)?;
                match role {
                    Role::Whole => self.replace(&name, location)?,
                    Role::A | Role::EmbeddingA => pairs.entry(name).or_default()[0] = Some(location),
                    Role::B | Role::EmbeddingB => pairs.entry(name).or_default()[1] = Some(location),
                }
            }
        }
        for (module, pair) in pairs {
            self.update(&module, pair, &config)?;
        }
        // peft updates a table in place, and the head that is tied to it with it.
        let (table, head) =
            (TensorName::new(Part::Decoder, "embed_tokens.weight"), TensorName::new(Part::LmHead, "weight"));
        let tie = |config: Option<&Value>| config.and_then(|config| config.get("tie_word_embeddings")?.as_bool());
        let is_tied = [tie(Some(&self.config)), tie(self.config.get("text_config"))].contains(&Some(true));
        if is_tied && self.updates.contains_key(&table) && !self.updates.contains_key(&head) {
            self.tensors.remove(&head);
        }
        Ok(())
    }

    /// A tensor that the adapter holds whole takes the place of the checkpoint's.
    fn replace(&mut self, name: &str, location: Location) -> Result<()> {
        let Some(name) = self.layout.parse(name) else {
            return Err(Error::UnmatchedAdapter {
                name: location.entry.name,
                reason: format!("the model has no `{name}`"),
            });
        };
        self.tensors.insert(name, location);
        Ok(())
    }

    /// The update of the weight of `module` by the pair A, B.
    fn update(&mut self, module: &str, pair: [Option<Location>; 2], config: &AdapterConfig) -> Result<()> {
        let [a, b] = match pair {
            [Some(a), Some(b)] => [a, b],
            [a, b] => {
                let name = a.or(b).map(|location| location.entry.name).unwrap_or_default();
                let reason = "the other tensor of its pair, `lora_A` or `lora_B`, is missing".to_owned();
                return Err(Error::UnmatchedAdapter { name, reason });
            }
        };
        let weight = format!("{module}.weight");
        let known = self.layout.parse(&weight).filter(|name| self.tensors.contains_key(name));
        let Some((name, base)) = known.and_then(|name| self.tensors.get(&name).map(|base| (name.clone(), base))) else {
            let reason = format!("the checkpoint has no tensor `{weight}`");
            return Err(Error::UnmatchedAdapter { name: a.entry.name, reason });
        };
        let (rank, scale) = config.rank_and_scale(module)?;
        let &[num_rows, num_columns] = base.entry.shape.as_slice() else {
            let reason = format!("`{weight}` is not a matrix");
            return Err(Error::UnmatchedAdapter { name: a.entry.name, reason });
        };
        let is_transposed = a.entry.name.contains("lora_embedding_A");
        let expected = match is_transposed {
            false => [(&a, [rank, num_columns]), (&b, [num_rows, rank])],
            true => [(&a, [rank, num_rows]), (&b, [num_columns, rank])],
        };
        if let Some((location, expected)) = expected.into_iter().find(|(location, shape)| location.entry.shape != shape)
        {
            let Entry { name, shape: found, .. } = location.entry.clone();
            return Err(Error::ShapeMismatch { name, expected: expected.to_vec(), found });
        }
        let (left, right) = if is_transposed { (a, b) } else { (b, a) };
        self.updates.insert(name, Update { left, right, is_transposed, scale });
        Ok(())
    }

    /// SHA-256 over the configuration and the shards' headers: names, types, shapes and places of all tensors.
    pub(crate) fn fingerprint(&self) -> String {
        hex(&self.fingerprint.clone().finalize())
    }

    /// Whether any tensor of `part` is stored.
    pub(crate) fn has(&self, part: Part) -> bool {
        self.tensors.keys().any(|name| name.part == part)
    }

    /// Names of the tensors of `part`.
    pub(crate) fn names(&self, part: Part) -> impl Iterator<Item = &str> {
        self.tensors.keys().filter(move |name| name.part == part).map(|name| name.name.as_str())
    }

    /// Shape of the tensor `name` of `part`, as stored.
    pub(crate) fn shape(&self, part: Part, name: &str) -> Result<&[usize]> {
        Ok(&self.find(&TensorName::new(part, name))?.entry.shape)
    }

    fn find(&self, name: &TensorName) -> Result<&Location> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: self.spell(name) })
    }

    /// The tensor `name` of `part`, checked against the shape that the configuration implies.
    pub(crate) fn tensor(&self, part: Part, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let name = TensorName::new(part, name);
        let location = self.find(&name)?;
        let entry = &location.entry;
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape.clone());
            return Err(Error::ShapeMismatch { name: entry.name.clone(), expected, found });
        }
        let mut tensor = self.stored(location)?;
        if let Some(Update { left, right, is_transposed, scale }) = self.updates.get(&name) {
            let (left, right, is_transposed, scale) = (self.stored(left)?, self.stored(right)?, *is_transposed, *scale);
            tensor.update = Some(Box::new(LowRank { left, right, is_transposed, scale, first_row: 0 }));
        }
        self.used.borrow_mut().insert(name);
        Ok(tensor)
    }

    fn stored(&self, location: &Location) -> Result<StoredTensor<'_>> {
        location.entry.stored(&self.shards[location.shard])
    }

    /// How this checkpoint would spell a tensor that is not there.
    fn spell(&self, name: &TensorName) -> String {
        let neighbour = self.tensors.iter().find(|(known, _)| known.part == name.part);
        let neighbour = neighbour.map(|(_, location)| location.entry.name.as_str());
        let is_own = neighbour.is_none_or(|neighbour| self.layout.parse(neighbour).is_some());
        if is_own { self.layout } else { Layout::ClipTower }.spell(name, neighbour)
    }

    /// Fails when the checkpoint holds tensors that nothing asked for, other than those a LLaVA is known to carry
    /// unused: tower layers past the selected one, the tower's last norm, buffers of old versions, a tied head.
    pub(crate) fn refuse_unused(&self, unused_tower_layers: std::ops::Range<usize>) -> Result<()> {
        let used = self.used.borrow();
        let is_unused_layer = |name: &str| {
            let layer = name.strip_prefix("encoder.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
            layer.is_some_and(|layer| unused_tower_layers.contains(&layer))
        };
        let is_known = |TensorName { part, name }: &TensorName| match part {
            Part::VisionTower => {
                name.starts_with("post_layernorm.") || is_unused_layer(name) || name.ends_with("position_ids")
            }
            Part::LmHead => name == "weight",
            Part::Projector | Part::Decoder => false,
        };
        let parts = self.tensors.iter().filter(|(name, _)| !used.contains(*name) && !is_known(name));
        let parts = parts.map(|(_, location)| location.entry.name.as_str());
        let unused: Vec<&str> = parts
            .chain(self.strangers.iter().map(String::as_str))
            .filter(|name| !name.ends_with("rotary_emb.inv_freq"))
            .collect();
        if let Some(name) = unused.iter().find(|name| name.ends_with("image_newline")) {
            return Err(Error::llava_next(&format!("tensor `{name}`"), "stored"));
        }
        Error::refuse_tensors(&unused)
    }

    /// A JSON file of the checkpoint, if it is there.
    pub(crate) fn json(&self, name: &str) -> Result<Option<Value>> {
        read_json(&self.folder.join(name))
    }
}

/// `config.json` of `folder`: its path and bytes.
fn read_config(folder: &Path, hint: &'static str) -> Result<(PathBuf, Vec<u8>)> {
    let path = folder.join("config.json");
    if !path.is_file() {
        let (what, hint) = match (folder.is_dir(), folder.join(MANIFEST_FILE).is_file()) {
            (true, true) => {
                ("config.json", "it is a bundle, exported already: give the checkpoint that it was made of")
            }
            (true, false) => ("config.json", hint),
            (false, _) => (
                "config.json: there is no such folder",
                "check the path; nothing is downloaded: fetch a model first, as by `hf download NAME --local-dir FOLDER`",
            ),
        };
        return Err(Error::MissingFile { checkpoint: folder.to_owned(), what, hint });
    }
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    Ok((path, bytes))
}

/// A JSON file, if it is there.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    parse_json(path, &bytes).map(Some)
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes)
        .map_err(|reason| Error::InvalidConfig { path: path.to_owned(), reason: reason.to_string() })
}
