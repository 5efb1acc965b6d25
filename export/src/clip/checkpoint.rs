//! Opens a CLIP checkpoint, a folder or a file of weights, and finds its tensors under transformers' names.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::names::{ClipLayout, StoredName};
use crate::checkpoint::{Entry, Shard, parse_json, weight_files};
use crate::encoder::TowerTensors;
use crate::error::{Error, Result};
use crate::graph::hex;
use crate::tensor::StoredTensor;

/// A tensor that only OpenAI's layout has.
const OPENAI_PROBE: &str = "visual.conv1.weight";
/// What OpenAI's code stores beside the weights.
const OPENAI_SETTINGS: [&str; 3] = ["input_resolution", "context_length", "vocab_size"];

/// A CLIP checkpoint, opened.
pub(crate) struct ClipCheckpoint {
    /// The folder or the file.
    pub(crate) path: PathBuf,
    pub(crate) layout: ClipLayout,
    /// `config.json`; null in OpenAI's layout, which has none.
    pub(crate) config: Value,
    shards: Vec<Shard>,
    /// By their stored names.
    tensors: BTreeMap<String, (usize, Entry)>,
    used: RefCell<BTreeSet<String>>,
    fingerprint: Sha256,
}

impl ClipCheckpoint {
    /// Opens `path` if it is a CLIP: a folder whose config.json says so, or weights under OpenAI's names, in a folder
    /// without config.json or in a file given by itself. No weight is touched.
    pub(crate) fn find(path: &Path) -> Result<Option<Self>> {
        if path.is_file() {
            if path.extension().is_some_and(|extension| extension == "json") {
                let hint = "give the folder that it is in";
                return Err(Error::unsupported("a checkpoint that is one file", format!("`{}`", path.display()), hint));
            }
            let clip = Self::open(path, ClipLayout::OpenAi, Value::Null, Sha256::new(), vec![path.to_owned()])?;
            return match clip.tensors.contains_key(OPENAI_PROBE) {
                true => Ok(Some(clip)),
                false => Err(Error::unsupported(
                    "a checkpoint that is one file",
                    format!("`{}` has no `{OPENAI_PROBE}`", path.display()),
                    "only CLIPs under OpenAI's names export from a file; give the folder of any other checkpoint",
                )),
            };
        }
        let config_path = path.join("config.json");
        if config_path.is_file() {
            let bytes = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
            let config = parse_json(&config_path, &bytes)?;
            if config.get("model_type").and_then(Value::as_str) != Some("clip") {
                return Ok(None);
            }
            let files = weight_files(path)?;
            if files.is_empty() {
                return Err(Error::MissingFile {
                    checkpoint: path.to_owned(),
                    what: "model.safetensors, pytorch_model.bin or an index of such",
                    hint: "give the folder of a transformers checkpoint, with all of its weights",
                });
            }
            let fingerprint = Sha256::new_with_prefix(&bytes);
            return Self::open(path, ClipLayout::Transformers, config, fingerprint, files).map(Some);
        }
        let clip = Self::open(path, ClipLayout::OpenAi, Value::Null, Sha256::new(), weight_files(path)?)?;
        if !clip.tensors.contains_key(OPENAI_PROBE) {
            return Ok(None);
        }
        if path.join("open_clip_config.json").is_file() {
            return Err(Error::unsupported(
                "open_clip_config.json",
                format!("`{}`", path.display()),
                "open_clip's models share names, not settings, with OpenAI's; export the CLIPModel of transformers",
            ));
        }
        Ok(Some(clip))
    }

    fn open(
        path: &Path,
        layout: ClipLayout,
        config: Value,
        mut fingerprint: Sha256,
        files: Vec<PathBuf>,
    ) -> Result<Self> {
        let mut shards: Vec<Shard> = Vec::new();
        let mut tensors: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        for file in files {
            let (shard, entries) = Shard::open(&file)?;
            for entry in entries {
                entry.add_to(&mut fingerprint);
                let name = entry.name.clone();
                if let Some((first, _)) = tensors.insert(name.clone(), (shards.len(), entry)) {
                    let first = shards.get(first).map_or(&file, |shard| &shard.path).clone();
                    return Err(Error::DuplicateTensor { name, first, second: file });
                }
            }
            shards.push(shard);
        }
        Ok(Self { path: path.to_owned(), layout, config, shards, tensors, used: RefCell::default(), fingerprint })
    }

    /// SHA-256 over the configuration and the shards' headers.
    pub(crate) fn fingerprint(&self) -> String {
        hex(&self.fingerprint.clone().finalize())
    }

    /// Whether a tensor is stored that transformers calls `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(&self.layout.stored(name).name)
    }

    fn find_entry(&self, name: &StoredName) -> Result<(&Shard, &Entry)> {
        match self.tensors.get(&name.name) {
            Some((shard, entry)) => Ok((&self.shards[*shard], entry)),
            None => Err(Error::MissingTensor { name: name.name.clone() }),
        }
    }

    /// The shape as stored of the tensor that transformers calls `name`, which must have `N` axes.
    pub(crate) fn shape<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let (_, entry) = self.find_entry(&self.layout.stored(name))?;
        <[usize; N]>::try_from(entry.shape.as_slice()).map_err(|_| Error::InvalidConfig {
            path: self.path.clone(),
            reason: format!("tensor `{}`: expected {N} axes, got shape {:?}", entry.name, entry.shape),
        })
    }

    /// The tensor that transformers calls `name`, of this shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let name = self.layout.stored(name);
        let (shard, entry) = self.find_entry(&name)?;
        let mut stored_shape = shape.to_vec();
        if name.third.is_some() {
            stored_shape[0] *= 3;
        }
        if entry.shape != stored_shape {
            let StoredName { name, .. } = name;
            return Err(Error::ShapeMismatch { name, expected: stored_shape, found: entry.shape.clone() });
        }
        let tensor = entry.stored(shard)?;
        self.used.borrow_mut().insert(name.name);
        Ok(match name.third {
            Some(third) => tensor.rows(third * shape[0], shape[0]),
            None => tensor,
        })
    }

    /// The one value of the tensor `name`, of shape `[]` or `[1]`.
    pub(crate) fn scalar(&self, name: &str) -> Result<f32> {
        let (shard, entry) = self.find_entry(&self.layout.stored(name))?;
        if entry.shape.iter().product::<usize>() != 1 {
            let (name, found) = (entry.name.clone(), entry.shape.clone());
            return Err(Error::ShapeMismatch { name, expected: vec![], found });
        }
        let mut tensor = entry.stored(shard)?;
        tensor.shape = vec![1];
        self.used.borrow_mut().insert(entry.name.clone());
        Ok(tensor.read_f32()?[0])
    }

    /// Fails when the checkpoint holds tensors that nothing asked for, other than buffers of old versions and OpenAI's
    /// settings.
    pub(crate) fn refuse_unused(&self) -> Result<()> {
        let used = self.used.borrow();
        let is_known = |name: &str| name.ends_with("position_ids") || OPENAI_SETTINGS.contains(&name);
        let names = self.tensors.keys().map(String::as_str);
        let unused: Vec<&str> = names.filter(|name| !used.contains(*name) && !is_known(name)).collect();
        Error::refuse_tensors(&unused)
    }

    /// The tensors of one of the two towers.
    pub(crate) fn tower(&self, prefix: &'static str) -> ClipTower<'_> {
        ClipTower { checkpoint: self, prefix }
    }
}

/// One tower of a CLIP: `vision_model.` or `text_model.`.
pub(crate) struct ClipTower<'c> {
    checkpoint: &'c ClipCheckpoint,
    prefix: &'static str,
}

impl<'c> TowerTensors<'c> for ClipTower<'c> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'c>> {
        self.checkpoint.tensor(&format!("{}{name}", self.prefix), shape)
    }
}
