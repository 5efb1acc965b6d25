//! The decoder of this project's own operators: five a layer.

use super::{Decoder, PART};
use crate::channels::{Channels, LayerChannels};
use crate::checkpoint::Part;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::graph::{DataType, OWN, Value};
use crate::linear::{Around, Linear, Norm};
use crate::weight::Weight;

impl Decoder<'_, '_> {
    /// Embeddings to `logits` and `next_ids`; `h` is the residual stream.
    ///
    /// ```text
    /// h -> [norm, qkv] -> CachedAttention -> [o_proj, + h] -> h -> [norm, gate and up, SwiGLU] -> [down_proj, + h] -> h
    /// h of last tokens -> [norm, lm_head] -> logits -> GreedyIds -> next_ids
    /// ```
    pub(super) fn packed(&mut self) -> Result<()> {
        let mut hidden = self.embeddings();
        for layer in 0..self.config.num_layers {
            hidden = self.packed_layer(layer, &hidden)?;
        }
        let DecoderConfig { hidden_size, vocab_size, .. } = *self.config;
        let is_tied = !self.checkpoint.has(Part::LmHead) && self.config.tie_word_embeddings;
        let shape = [vocab_size, hidden_size];
        let table = match is_tied {
            true => self.checkpoint.tensor(PART, "embed_tokens.weight", &shape)?,
            false => self.checkpoint.tensor(Part::LmHead, "weight", &shape)?,
        };
        let norm = self.packed_norm("norm", &Channels::default())?;
        let format = self.graph.format().head;
        let logits = self.graph.output("logits", DataType::F32, vec!["batch".into(), vocab_size.into()]);
        let next_ids = self.graph.output("next_ids", DataType::I64, vec!["batch".into()]);
        let around = Around { norm, output: Some(logits.clone()), ..Around::default() };
        Linear::of_weight("lm_head", Weight::stored(table)).build_packed(&mut self.graph, format, &hidden, around);
        self.graph.node_named(OWN, "GreedyIds", "/next/GreedyIds", &[&logits], &[next_ids], vec![]);
        Ok(())
    }

    /// In the last layer everything after attention is computed for each sequence's last token only.
    fn packed_layer(&mut self, layer: usize, hidden: &Value) -> Result<Value> {
        let DecoderConfig {
            hidden_size,
            intermediate_size,
            num_heads,
            num_kv_heads,
            head_dim,
            num_layers,
            attention_bias,
            mlp_bias,
            activation,
            ..
        } = *self.config;
        let prefix = format!("layers.{layer}");
        let format = self.graph.format().linear;
        let LayerChannels { attention_input, attention_output, mlp_input, mlp_hidden } = self.channels.layer(layer);
        let attention = format!("{prefix}.self_attn");
        let project = |decoder: &Self, name: &str, heads: usize| {
            decoder.linear(&format!("{attention}.{name}"), (hidden_size, heads * head_dim), attention_bias)
        };
        let query = project(self, "q_proj", num_heads)?;
        let (key, value) = (project(self, "k_proj", num_kv_heads)?, project(self, "v_proj", num_kv_heads)?);
        let packed = query.then(key, String::new()).then(value, format!("/{attention}.qkv_proj"));
        let packed = packed.for_input(&attention_input);
        let norm = self.packed_norm(&format!("{prefix}.input_layernorm"), &attention_input)?;
        let around = Around { norm, ..Around::default() };
        let packed = packed.build_packed(&mut self.graph, format, hidden, around); // [T, q + k + v]
        let mut attended = self.attention.build(&mut self.graph, layer, &packed); // [T, heads * d]
        let mut hidden = hidden.clone();
        if layer + 1 == num_layers {
            let sequences = |decoder: &mut Self, name: &str, x: &Value| {
                let x =
                    decoder.graph.node("Reshape", &format!("{name}/Reshape"), &[x, &decoder.sequence_shape], vec![]);
                decoder.last_rows(name, &x)
            };
            attended = sequences(self, "/last/attention", &attended);
            hidden = sequences(self, "/last/hidden", &hidden); // [B, H]
        }
        let o_proj =
            self.linear(&format!("{attention}.o_proj"), (num_heads * head_dim, hidden_size), attention_bias)?;
        let around = Around { residual: Some(&hidden), ..Around::default() };
        let hidden = o_proj.for_input(&attention_output).build_packed(&mut self.graph, format, &attended, around);

        let widened = (hidden_size, intermediate_size);
        let gate = self.linear(&format!("{prefix}.mlp.gate_proj"), widened, mlp_bias)?.for_input(&mlp_input);
        let up = self.linear(&format!("{prefix}.mlp.up_proj"), widened, mlp_bias)?;
        let up = up.for_input(&mlp_input).with_divided_output(mlp_hidden.factors.as_deref());
        let norm = self.packed_norm(&format!("{prefix}.post_attention_layernorm"), &mlp_input)?;
        let name = format!("/{prefix}.mlp.gate_up_proj");
        let gated = gate.build_gated(up, &mut self.graph, (format, activation), &hidden, norm, name);
        let down = self.linear(&format!("{prefix}.mlp.down_proj"), (intermediate_size, hidden_size), mlp_bias)?;
        let around = Around { residual: Some(&hidden), ..Around::default() };
        Ok(down.for_input(&mlp_hidden).build_packed(&mut self.graph, format, &gated, around))
    }

    fn packed_norm(&mut self, name: &str, channels: &Channels) -> Result<Norm> {
        let weight = self.norm_weight(name, channels)?;
        Ok(Norm::Rms { weight, epsilon: self.config.rms_norm_eps })
    }
}
