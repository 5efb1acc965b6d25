//! The layouts that CLIP checkpoints come in, as a table from transformers' names to stored ones.

/// How a checkpoint names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClipLayout {
    /// `CLIPModel` of transformers.
    Transformers,
    /// OpenAI's own code, and Long-CLIP's, which is made from it.
    OpenAi,
}

/// Where a tensor lies in the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredName {
    pub(crate) name: String,
    /// Which third of the stored rows it is, where query, key and value projections are stored as one.
    pub(crate) third: Option<usize>,
}

/// Long-CLIP's second table of positions. transformers has no name for it; this is this project's.
pub(crate) const POSITIONS_RES: &str = "text_model.embeddings.position_embedding_res.weight";

/// transformers' names and OpenAI's, whole or up to a dot.
const OPENAI: [(&str, &str); 14] = [
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    (POSITIONS_RES, "positional_embedding_res"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    ("logit_scale", "logit_scale"),
];

/// The same within a layer, after its number.
const OPENAI_LAYER: [(&str, &str); 5] = [
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
];

/// The order of the rows of `in_proj`.
const IN_PROJ: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

impl ClipLayout {
    /// As the manifest says it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Transformers => "transformers-clip",
            Self::OpenAi => "openai-clip",
        }
    }

    /// Whether the projections are stored as `[embeddings, width]`, as a linear layer is, or as `[width, embeddings]`.
    pub(crate) fn projections_are_linear(self) -> bool {
        self == Self::Transformers
    }

    /// Where the tensor lies that transformers calls `name`.
    pub(crate) fn stored(self, name: &str) -> StoredName {
        let whole = |name| StoredName { name, third: None };
        if self == Self::Transformers {
            return whole(name.to_owned());
        }
        let Some((layers, rest)) = replace_start(&OPENAI, name) else { return whole(name.to_owned()) };
        let Some((layer, rest)) = rest.strip_prefix('.').and_then(|rest| rest.split_once('.')) else {
            return whole(format!("{layers}{rest}"));
        };
        if let Some((projection, kind)) = rest.strip_prefix("self_attn.").and_then(|rest| rest.split_once('.'))
            && let Some(third) = IN_PROJ.iter().position(|known| *known == projection)
        {
            return StoredName { name: format!("{layers}.{layer}.attn.in_proj_{kind}"), third: Some(third) };
        }
        whole(match replace_start(&OPENAI_LAYER, rest) {
            Some((start, rest)) => format!("{layers}.{layer}.{start}{rest}"),
            None => format!("{layers}.{layer}.{rest}"),
        })
    }
}

/// The replacement for the beginning of `name`, and what is left of it.
fn replace_start<'a>(table: &[(&str, &'static str)], name: &'a str) -> Option<(&'static str, &'a str)> {
    table.iter().find_map(|(from, to)| {
        let rest = name.strip_prefix(from).filter(|rest| rest.is_empty() || rest.starts_with('.'))?;
        Some((*to, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openai_names_are_found_for_those_of_transformers() {
        let cases = [
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
            ("vision_model.encoder.layers.11.layer_norm1.weight", "visual.transformer.resblocks.11.ln_1.weight"),
            (
                "vision_model.encoder.layers.0.self_attn.out_proj.bias",
                "visual.transformer.resblocks.0.attn.out_proj.bias",
            ),
            ("visual_projection.weight", "visual.proj"),
            ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            (POSITIONS_RES, "positional_embedding_res"),
            ("text_model.encoder.layers.3.mlp.fc2.weight", "transformer.resblocks.3.mlp.c_proj.weight"),
            ("text_model.final_layer_norm.weight", "ln_final.weight"),
            ("text_projection.weight", "text_projection"),
            ("logit_scale", "logit_scale"),
        ];
        for (name, stored) in cases {
            let expected = StoredName { name: stored.to_owned(), third: None };
            assert_eq!(ClipLayout::OpenAi.stored(name), expected, "{name}");
            assert_eq!(ClipLayout::Transformers.stored(name).name, name);
        }
    }

    #[test]
    fn projections_to_heads_are_thirds_of_one_tensor() {
        for (third, projection) in IN_PROJ.iter().enumerate() {
            for kind in ["weight", "bias"] {
                let name = format!("text_model.encoder.layers.7.self_attn.{projection}.{kind}");
                let stored = format!("transformer.resblocks.7.attn.in_proj_{kind}");
                assert_eq!(ClipLayout::OpenAi.stored(&name), StoredName { name: stored, third: Some(third) });
            }
        }
    }
}
