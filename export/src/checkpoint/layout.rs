//! The layouts that checkpoints come in, as tables from stored names to the exporter's: a [`Part`] and a name within it.
//! A name that no table holds belongs to another architecture.

use serde_json::Value;

/// A part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    VisionTower,
    Projector,
    Decoder,
    LmHead,
}

impl Part {
    /// What the names of its tensors begin with, after the layout's prefix.
    fn roots(self) -> &'static [&'static str] {
        match self {
            Self::VisionTower => &["embeddings", "pre_layrnorm", "encoder", "post_layernorm"],
            Self::Projector => &["linear_1", "linear_2"],
            Self::Decoder => &["embed_tokens", "layers", "norm"],
            Self::LmHead => &["weight"],
        }
    }
}

/// A tensor's name, whatever the layout: `layers.0.mlp.up_proj.weight` of [`Part::Decoder`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TensorName {
    pub(crate) part: Part,
    pub(crate) name: String,
}

impl TensorName {
    pub(crate) fn new(part: Part, name: &str) -> Self {
        Self { part, name: name.to_owned() }
    }
}

/// How a checkpoint names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `LlavaForConditionalGeneration` of transformers, whatever its version.
    Transformers,
    /// `LlavaLlamaForCausalLM` of the LLaVA repository.
    Original,
    /// `CLIPModel` or `CLIPVisionModel` of transformers: a vision tower of its own.
    ClipTower,
}

/// The names of one part: `{prefix}{root}…`, roots in the order of [`Part::roots`].
struct Names {
    part: Part,
    prefixes: &'static [&'static str],
    roots: &'static [&'static str],
}

/// 4.x files, 5.x files, the modules of 4.52 and later, the modules of 5.x.
const TRANSFORMERS: [Names; 4] = [
    Names {
        part: Part::VisionTower,
        prefixes: &[
            "vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.vision_model.",
            "model.vision_tower.",
        ],
        roots: &["embeddings", "pre_layrnorm", "encoder", "post_layernorm"],
    },
    Names {
        part: Part::Projector,
        prefixes: &["multi_modal_projector.", "model.multi_modal_projector."],
        roots: &["linear_1", "linear_2"],
    },
    Names {
        part: Part::Decoder,
        prefixes: &["language_model.model.", "language_model.", "model.language_model.model.", "model.language_model."],
        roots: &["embed_tokens", "layers", "norm"],
    },
    Names {
        part: Part::LmHead,
        prefixes: &["language_model.lm_head.", "lm_head.", "model.language_model.lm_head."],
        roots: &["weight"],
    },
];

/// LLaVA's own modules around CLIP's and LLaMA's. The second tower prefix is transformers 5.x's CLIP.
const ORIGINAL: [Names; 4] = [
    Names {
        part: Part::VisionTower,
        prefixes: &["model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower."],
        roots: &["embeddings", "pre_layrnorm", "encoder", "post_layernorm"],
    },
    // An `nn.Sequential` of Linear, GELU, Linear.
    Names { part: Part::Projector, prefixes: &["model.mm_projector."], roots: &["0", "2"] },
    Names { part: Part::Decoder, prefixes: &["model."], roots: &["embed_tokens", "layers", "norm"] },
    Names { part: Part::LmHead, prefixes: &["lm_head."], roots: &["weight"] },
];

/// 4.x files and 5.x's modules. The text tower of a `CLIPModel` is in no table.
const CLIP_TOWER: [Names; 1] = [Names {
    part: Part::VisionTower,
    prefixes: &["vision_model.", ""],
    roots: &["embeddings", "pre_layrnorm", "encoder", "post_layernorm"],
}];

impl Layout {
    /// From config.json: only the original layout has `mm_` settings.
    pub(crate) fn of(config: &Value) -> Self {
        let has = |key| config.get(key).is_some();
        let is_llava_llama = config.get("model_type").and_then(Value::as_str) == Some("llava_llama");
        if is_llava_llama || has("mm_vision_tower") || has("mm_projector_type") {
            Self::Original
        } else {
            Self::Transformers
        }
    }

    /// As the manifest says it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Transformers => "transformers-llava",
            Self::Original => "original-llava",
            Self::ClipTower => "clip",
        }
    }

    fn table(self) -> &'static [Names] {
        match self {
            Self::Transformers => &TRANSFORMERS,
            Self::Original => &ORIGINAL,
            Self::ClipTower => &CLIP_TOWER,
        }
    }

    /// What a stored name stands for; none when it is of no part of a LLaVA.
    pub(crate) fn parse(self, stored: &str) -> Option<TensorName> {
        self.table().iter().find_map(|names| {
            names.prefixes.iter().find_map(|prefix| {
                let rest = stored.strip_prefix(prefix)?;
                let root = rest.split('.').next()?;
                let index = names.roots.iter().position(|known| *known == root)?;
                let name = format!("{}{}", names.part.roots()[index], &rest[root.len()..]);
                Some(TensorName { part: names.part, name })
            })
        })
    }

    /// How the layout spells `name`: for messages about tensors that are not there. `neighbour` is a stored name of the
    /// same part, whose prefix is taken.
    pub(crate) fn spell(self, name: &TensorName, neighbour: Option<&str>) -> String {
        let Some(names) = self.table().iter().find(|names| names.part == name.part) else { return name.name.clone() };
        let prefix = names.prefixes.iter().find(|prefix| {
            let rest = neighbour.and_then(|neighbour| neighbour.strip_prefix(**prefix));
            rest.is_some_and(|rest| names.roots.contains(&rest.split('.').next().unwrap_or_default()))
        });
        let prefix = prefix.unwrap_or(&names.prefixes[0]);
        let root = name.name.split('.').next().unwrap_or_default();
        let stored =
            names.part.roots().iter().position(|known| *known == root).map_or(root, |index| names.roots[index]);
        format!("{prefix}{stored}{}", &name.name[root.len()..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_naming_of_a_tensor_is_the_same_tensor() {
        let up = TensorName::new(Part::Decoder, "layers.0.mlp.up_proj.weight");
        for prefix in
            ["language_model.model.", "language_model.", "model.language_model.", "model.language_model.model."]
        {
            let stored = format!("{prefix}layers.0.mlp.up_proj.weight");
            assert_eq!(Layout::Transformers.parse(&stored).as_ref(), Some(&up));
            assert_eq!(Layout::Transformers.spell(&up, Some(&format!("{prefix}norm.weight"))), stored);
        }
        assert_eq!(Layout::Original.parse("model.layers.0.mlp.up_proj.weight"), Some(up));
        let linear_2 = TensorName::new(Part::Projector, "linear_2.bias");
        assert_eq!(Layout::Original.parse("model.mm_projector.2.bias").as_ref(), Some(&linear_2));
        assert_eq!(Layout::Original.spell(&linear_2, None), "model.mm_projector.2.bias");
        let class = TensorName::new(Part::VisionTower, "embeddings.class_embedding");
        for (layout, prefix) in [
            (Layout::Original, "model.vision_tower.vision_tower.vision_model."),
            (Layout::ClipTower, "vision_model."),
            (Layout::ClipTower, ""),
        ] {
            assert_eq!(layout.parse(&format!("{prefix}embeddings.class_embedding")), Some(class.clone()));
        }
    }

    #[test]
    fn what_belongs_to_no_part_has_no_name() {
        for stored in ["model.image_newline", "image_newline", "model.mm_projector.4.weight", "lm_head.bias"] {
            assert_eq!(Layout::Original.parse(stored), None, "{stored}");
            assert_eq!(Layout::Transformers.parse(stored), None, "{stored}");
        }
        assert_eq!(Layout::ClipTower.parse("text_model.embeddings.token_embedding.weight"), None);
    }
}
