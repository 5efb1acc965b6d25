//! The LLaMA decoder as a graph over a KV cache of slots.
//!
//! Inputs: `input_ids` and `image_index` `[batch, sequence]`, `image_features` `[rows, hidden]`, `seqlens_k` `[batch]`,
//! `total_sequence_length` `[]` and, per layer, `past_key_values.{i}.key|value` `[batch, kv_heads, max_length, head_dim]`.
//! Outputs: `present.{i}.key|value` of the same shape (bind both to one buffer), `logits` `[batch, vocab]` of each
//! sequence's last token and `next_ids` `[batch]`, their argmax, or -1 when a logit is NaN or infinite.
//!
//! `image_index` says where a position's embedding comes from: a row of `image_features` (>= 0), the token's row of the
//! embedding table (-1), or nothing, because the position is padding on the right (-2). The id at an image position is
//! looked up but not used: feed any valid one, never an `<image>` id that may lie outside of the table.

use crate::checkpoint::{Checkpoint, Part};
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::graph::{Attribute, DataType, Dim, GraphBuilder, MICROSOFT, Value};
use crate::linear::{HeadPadding, Linear};
use crate::rope::cos_sin_tables;

const PART: Part = Part::Decoder;

/// `image_index` of a text token.
pub const IMAGE_INDEX_TEXT: i64 = -1;
/// `image_index` of a padded position.
pub const IMAGE_INDEX_PADDING: i64 = -2;

/// ONNX Runtime's GroupQueryAttention rotates only heads whose width is a multiple of this; others are padded.
const HEAD_DIM_MULTIPLE: usize = 16;

/// Builds the decoder's graph.
///
/// ```text
/// input_ids, image_index, image_features -> embeddings [T, H] -> layers -> last tokens [B, H]
///     -> RMSNorm -> lm_head -> logits -> ArgMax -> next_ids
/// ```
pub(crate) fn build<'c>(checkpoint: &'c Checkpoint, config: &DecoderConfig) -> Result<GraphBuilder<'c>> {
    let mut decoder = Decoder::new(checkpoint, config)?;
    let mut hidden = decoder.embeddings();
    let mut normed = decoder.first_norm(&hidden)?;
    for layer in 0..config.num_layers {
        (hidden, normed) = decoder.layer(layer, &hidden, &normed)?;
    }
    decoder.head(&normed)?;
    Ok(decoder.graph)
}

struct Decoder<'c, 'v> {
    graph: GraphBuilder<'c>,
    checkpoint: &'c Checkpoint,
    config: &'v DecoderConfig,
    embedding_table: Value,
    input_ids: Value,
    image_index: Value,
    image_features: Value,
    seqlens_k: Value,
    total_sequence_length: Value,
    cos_cache: Value,
    sin_cache: Value,
    /// Width of a head in the cache: `head_dim`, padded.
    padded_head_dim: usize,
    /// `[batch, sequence, -1]` for reshapes from rows of tokens back to sequences.
    sequence_shape: Value,
    /// `[batch, 1]`: index of each sequence's last token within this run's `sequence`.
    last_token: Value,
}

impl<'c, 'v> Decoder<'c, 'v> {
    fn new(checkpoint: &'c Checkpoint, config: &'v DecoderConfig) -> Result<Self> {
        let mut graph = GraphBuilder::new("decoder");
        let tokens: Vec<Dim> = vec!["batch".into(), "sequence".into()];
        let input_ids = graph.input("input_ids", DataType::I64, tokens.clone());
        let image_index = graph.input("image_index", DataType::I64, tokens);
        let features_shape = vec!["rows".into(), config.hidden_size.into()];
        let image_features = graph.input("image_features", DataType::F32, features_shape);
        let seqlens_k = graph.input("seqlens_k", DataType::I32, vec!["batch".into()]);
        let total_sequence_length = graph.input("total_sequence_length", DataType::I32, vec![]);

        let table_name = "embed_tokens.weight";
        let table = checkpoint.tensor(PART, table_name, &[config.vocab_size, config.hidden_size])?;
        let embedding_table = graph.weight(table_name, table);
        let padded_head_dim = config.head_dim.next_multiple_of(HEAD_DIM_MULTIPLE);
        let max_positions = config.num_positions();
        let (cos, sin) = cos_sin_tables(&config.rope, config.head_dim, padded_head_dim, max_positions);
        let rope_dims = [max_positions, padded_head_dim / 2];
        let cos_cache = graph.constant_f32("rotary.cos_cache", &rope_dims, &cos);
        let sin_cache = graph.constant_f32("rotary.sin_cache", &rope_dims, &sin);

        let ids_shape = graph.node("Shape", "/shape/Shape", &[&input_ids], vec![]);
        let any = graph.shape(&[-1]);
        let sequence_shape =
            graph.node("Concat", "/shape/Concat", &[&ids_shape, &any], vec![("axis", Attribute::Int(0))]);
        let last_token = last_token(&mut graph, &image_index);
        Ok(Self {
            graph,
            checkpoint,
            config,
            embedding_table,
            input_ids,
            image_index,
            image_features,
            seqlens_k,
            total_sequence_length,
            cos_cache,
            sin_cache,
            padded_head_dim,
            sequence_shape,
            last_token,
        })
    }

    /// `where(image_index >= 0, image_features[image_index], embed_tokens[input_ids])`, as rows `[T, H]`.
    ///
    /// ```text
    /// input_ids   -> Reshape [T] -> Gather(embed_tokens) ----------------------------\
    /// image_index -> Reshape [T] -+-> Max 0 -> Gather(image_features) ----------------+-> Where -> [T, H]
    ///                             \-> GreaterOrEqual 0 -> Unsqueeze [T, 1] -----------/
    /// ```
    fn embeddings(&mut self) -> Value {
        let graph = &mut self.graph;
        let flat = graph.shape(&[-1]);
        let zero = graph.constant_i64("/constants/zero", &[], &[0]);
        let ids = graph.node("Reshape", "/embed/Reshape", &[&self.input_ids, &flat], vec![]);
        let index = graph.node("Reshape", "/embed/Reshape_1", &[&self.image_index, &flat], vec![]);
        let text = graph.node("Gather", "/embed/Gather", &[&self.embedding_table, &ids], vec![]);
        let row = graph.node("Max", "/embed/Max", &[&index, &zero], vec![]);
        let image = graph.node("Gather", "/embed/Gather_1", &[&self.image_features, &row], vec![]);
        let is_image = graph.node("GreaterOrEqual", "/embed/GreaterOrEqual", &[&index, &zero], vec![]);
        let is_image = graph.node("Unsqueeze", "/embed/Unsqueeze", &[&is_image, &flat], vec![]);
        graph.node("Where", "/embed/Where", &[&is_image, &image, &text], vec![])
    }

    fn first_norm(&mut self, x: &Value) -> Result<Value> {
        let weight = self.norm_weight("layers.0.input_layernorm.weight")?;
        Ok(self.graph.node(
            "RMSNormalization",
            "/layers.0/input_layernorm/RMSNormalization",
            &[x, &weight],
            vec![("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(self.config.rms_norm_eps))],
        ))
    }

    /// One decoder layer: residual stream and its norm in, residual stream and the next layer's norm out.
    ///
    /// ```text
    /// hidden ----------------------------------+-> SkipNorm -> gate, up -> act * -> down -> SkipNorm -> normed'
    /// normed -> qkv -> GroupQueryAttention -> o_proj     \__________ hidden _________________/   \-> hidden'
    /// ```
    ///
    /// In the last layer everything after attention is computed for each sequence's last token only.
    fn layer(&mut self, layer: usize, hidden: &Value, normed: &Value) -> Result<(Value, Value)> {
        let DecoderConfig { hidden_size, intermediate_size, num_layers, mlp_bias, activation, .. } = *self.config;
        let prefix = format!("layers.{layer}");
        let is_last = layer + 1 == num_layers;
        let attended = self.attention(layer, normed)?; // [B, S, heads * d]
        let (attended, hidden) = if is_last {
            let hidden = self.graph.node("Reshape", "/last/Reshape", &[hidden, &self.sequence_shape], vec![]);
            (self.last_rows("/last/attention", &attended), self.last_rows("/last/hidden", &hidden)) // [B, …]
        } else {
            let rows = self.graph.shape(&[-1, (self.config.num_heads * self.padded_head_dim) as i64]);
            let name = format!("/{prefix}/self_attn/Reshape_1");
            (self.graph.node("Reshape", &name, &[&attended, &rows], vec![]), hidden.clone())
        };
        let attended = self.without_padding(&format!("/{prefix}/self_attn"), attended);
        let attention_size = self.config.num_heads * self.config.head_dim;
        let name = format!("{prefix}.self_attn.o_proj");
        let attended = self
            .linear(&name, (attention_size, hidden_size), self.config.attention_bias)?
            .build(&mut self.graph, &attended);
        let (normed, hidden) =
            self.skip_norm(&format!("{prefix}.post_attention_layernorm"), &attended, &hidden, false)?;

        let gate = self.linear(&format!("{prefix}.mlp.gate_proj"), (hidden_size, intermediate_size), mlp_bias)?;
        let gate = gate.build(&mut self.graph, &normed);
        let up = self.linear(&format!("{prefix}.mlp.up_proj"), (hidden_size, intermediate_size), mlp_bias)?;
        let up = up.build(&mut self.graph, &normed);
        let gate = activation.build(&mut self.graph, &format!("/{prefix}/mlp"), &gate);
        let gated = self.graph.node("Mul", &format!("/{prefix}/mlp/Mul"), &[&gate, &up], vec![]);
        let down = self.linear(&format!("{prefix}.mlp.down_proj"), (intermediate_size, hidden_size), mlp_bias)?;
        let down = down.build(&mut self.graph, &gated);
        let next_norm = if is_last { "norm".to_owned() } else { format!("layers.{}.input_layernorm", layer + 1) };
        let (normed, hidden) = self.skip_norm(&next_norm, &down, &hidden, is_last)?;
        Ok((hidden, normed))
    }

    /// `normed [T, H]` to `[B, S, heads * d]`, keys and values going into the cache.
    fn attention(&mut self, layer: usize, normed: &Value) -> Result<Value> {
        let DecoderConfig { hidden_size, num_heads, num_kv_heads, head_dim, attention_bias, .. } = *self.config;
        let prefix = format!("layers.{layer}.self_attn");
        let padded_head_dim = self.padded_head_dim;
        let find = |name: &str, num_heads: usize, is_rotary: bool| {
            let padding = HeadPadding { num_heads, head_dim, padded_head_dim, is_rotary };
            let padding = (padded_head_dim != head_dim).then_some(padding);
            let features = (hidden_size, num_heads * head_dim);
            Linear::find_padded(self.checkpoint, PART, &format!("{prefix}.{name}"), features, attention_bias, padding)
        };
        let query = find("q_proj", num_heads, true)?;
        let key = find("k_proj", num_kv_heads, true)?;
        let value = find("v_proj", num_kv_heads, false)?;
        let packed = query.then(key, String::new()).then(value, format!("/{prefix}.qkv_proj"));
        let packed = packed.build(&mut self.graph, normed);
        let name = format!("/{prefix}/Reshape");
        let packed = self.graph.node("Reshape", &name, &[&packed, &self.sequence_shape], vec![]); // [B, S, q + k + v]

        let cache: Vec<Dim> = vec!["batch".into(), num_kv_heads.into(), "max_length".into(), padded_head_dim.into()];
        let past_key = self.graph.input(&format!("past_key_values.{layer}.key"), DataType::F32, cache.clone());
        let past_value = self.graph.input(&format!("past_key_values.{layer}.value"), DataType::F32, cache.clone());
        let present_key = self.graph.output(&format!("present.{layer}.key"), DataType::F32, cache.clone());
        let present_value = self.graph.output(&format!("present.{layer}.value"), DataType::F32, cache);
        let name = format!("/{prefix}/GroupQueryAttention");
        let attended = GraphBuilder::output_of(&name, 0);
        let none = Value::none();
        self.graph.node_named(
            MICROSOFT,
            "GroupQueryAttention",
            &name,
            &[
                &packed,
                &none,
                &none,
                &past_key,
                &past_value,
                &self.seqlens_k,
                &self.total_sequence_length,
                &self.cos_cache,
                &self.sin_cache,
            ],
            &[attended.clone(), present_key, present_value],
            vec![
                ("num_heads", Attribute::Int(num_heads as i64)),
                ("kv_num_heads", Attribute::Int(num_kv_heads as i64)),
                ("scale", Attribute::Float(1.0 / (head_dim as f32).sqrt())),
                ("do_rotary", Attribute::Int(1)),
                ("rotary_interleaved", Attribute::Int(0)),
            ],
        );
        Ok(attended)
    }

    /// `[rows, heads * padded]` to `[rows, heads * head_dim]`.
    fn without_padding(&mut self, name: &str, x: Value) -> Value {
        let (num_heads, head_dim) = (self.config.num_heads as i64, self.config.head_dim as i64);
        if self.padded_head_dim == self.config.head_dim {
            return x;
        }
        let graph = &mut self.graph;
        let heads = graph.shape(&[-1, num_heads, self.padded_head_dim as i64]);
        let x = graph.node("Reshape", &format!("{name}/Reshape_2"), &[&x, &heads], vec![]);
        let (start, end, axis) = (graph.shape(&[0]), graph.shape(&[head_dim]), graph.shape(&[2]));
        let x = graph.node("Slice", &format!("{name}/Slice"), &[&x, &start, &end, &axis], vec![]);
        let rows = graph.shape(&[-1, num_heads * head_dim]);
        graph.node("Reshape", &format!("{name}/Reshape_3"), &[&x, &rows], vec![])
    }

    /// Rows of each sequence's last token: `[B, S, n]` to `[B, n]`.
    fn last_rows(&mut self, name: &str, x: &Value) -> Value {
        let batch_dims = vec![("batch_dims", Attribute::Int(1))];
        self.graph.node("GatherND", &format!("{name}/GatherND"), &[x, &self.last_token], batch_dims)
    }

    /// `x + skip` and its RMS norm in one operator: `(normed, sum)`.
    fn skip_norm(&mut self, name: &str, x: &Value, skip: &Value, is_final: bool) -> Result<(Value, Value)> {
        let weight = self.norm_weight(&format!("{name}.weight"))?;
        let node = format!("/{name}/SkipSimplifiedLayerNormalization");
        let (normed, sum) = (GraphBuilder::output_of(&node, 0), GraphBuilder::output_of(&node, 3));
        let none = Value::none();
        let all = [normed.clone(), none.clone(), none, sum.clone()];
        let outputs = if is_final { &all[..1] } else { &all[..] };
        self.graph.node_named(
            MICROSOFT,
            "SkipSimplifiedLayerNormalization",
            &node,
            &[x, skip, &weight],
            outputs,
            vec![("epsilon", Attribute::Float(self.config.rms_norm_eps))],
        );
        Ok((normed, sum))
    }

    /// `normed [B, H]` to `logits [B, vocab]` and `next_ids [B]`.
    ///
    /// ```text
    /// normed -> lm_head -> logits -+-> ArgMax ------------------------------------\
    ///                              \-> Mul 0 -> ReduceSum -> Equal 0 (all finite) -+-> Where(…, -1) -> next_ids
    /// ```
    fn head(&mut self, normed: &Value) -> Result<()> {
        let DecoderConfig { hidden_size, vocab_size, .. } = *self.config;
        let is_tied = !self.checkpoint.has(Part::LmHead) && self.config.tie_word_embeddings;
        let table = if is_tied {
            self.embedding_table.clone()
        } else {
            let weight = self.checkpoint.tensor(Part::LmHead, "weight", &[vocab_size, hidden_size])?;
            self.graph.weight("lm_head.weight", weight)
        };
        let graph = &mut self.graph;
        let logits = graph.output("logits", DataType::F32, vec!["batch".into(), vocab_size.into()]);
        let next_ids = graph.output("next_ids", DataType::I64, vec!["batch".into()]);
        let transposed = vec![("transB", Attribute::Int(1))];
        graph.node_named("", "Gemm", "/lm_head/Gemm", &[normed, &table], std::slice::from_ref(&logits), transposed);

        let axis = vec![("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(0))];
        let best = graph.node("ArgMax", "/next/ArgMax", &[&logits], axis);
        let zero = graph.constant_f32("/constants/zero_f32", &[], &[0.0]);
        let minus_one = graph.constant_i64("/constants/minus_one", &[], &[-1]);
        let zeros = graph.node("Mul", "/next/Mul", &[&logits, &zero], vec![]);
        let last_axis = graph.shape(&[-1]);
        let keepdims = vec![("keepdims", Attribute::Int(0))];
        let sum = graph.node("ReduceSum", "/next/ReduceSum", &[&zeros, &last_axis], keepdims);
        let is_finite = graph.node("Equal", "/next/Equal", &[&sum, &zero], vec![]);
        graph.node_named("", "Where", "/next/Where", &[&is_finite, &best, &minus_one], &[next_ids], vec![]);
        Ok(())
    }

    fn norm_weight(&mut self, name: &str) -> Result<Value> {
        let weight = self.checkpoint.tensor(PART, name, &[self.config.hidden_size])?;
        Ok(self.graph.weight(name, weight))
    }

    fn linear(&self, name: &str, features: (usize, usize), has_bias: bool) -> Result<Linear<'c>> {
        Linear::find(self.checkpoint, PART, name, features, has_bias)
    }
}

/// `[B, 1]`: positions that are not padding, less one.
///
/// ```text
/// image_index -> GreaterOrEqual -1 -> Cast i64 -> ReduceSum(axis 1) -> Sub 1
/// ```
fn last_token(graph: &mut GraphBuilder<'_>, image_index: &Value) -> Value {
    let text = graph.constant_i64("/constants/text", &[], &[IMAGE_INDEX_TEXT]);
    let one = graph.constant_i64("/constants/one", &[], &[1]);
    let is_token = graph.node("GreaterOrEqual", "/last/GreaterOrEqual", &[image_index, &text], vec![]);
    let to_i64 = vec![("to", Attribute::Int(DataType::I64 as i64))];
    let is_token = graph.node("Cast", "/last/Cast", &[&is_token], to_i64);
    let axis = graph.shape(&[1]);
    let num_tokens =
        graph.node("ReduceSum", "/last/ReduceSum", &[&is_token, &axis], vec![("keepdims", Attribute::Int(1))]);
    graph.node("Sub", "/last/Sub", &[&num_tokens, &one], vec![])
}
