//! The LLaMA decoder as a graph over a KV cache of slots.
//!
//! Inputs: `input_ids` and `image_index` `[batch, sequence]`, `image_features` `[rows, hidden]`, `seqlens_k` `[batch]`, for
//! ONNX Runtime's attention `total_sequence_length` `[]` and, per layer, `past_key_values.{i}.key|value` `[batch, kv_heads,
//! max_length, head_dim]`. Outputs: `present.{i}.key|value` of the same shape, `logits` `[batch, vocab]` (f32) of each
//! sequence's last token and `next_ids` `[batch]`, their argmax, or -1 when a logit is NaN or infinite. Features and cache
//! have the graph's float type.
//!
//! `image_index` says where a position's embedding comes from: a row of `image_features` (>= 0), the token's row of the
//! embedding table (-1), or nothing, because the position is padding on the right (-2). The id at an image position is
//! looked up but not used: feed any valid one, never an `<image>` id that may lie outside of the table.

mod packed;

use crate::attention::{Attention, cache_head_dim};
use crate::channels::{Channels, DecoderChannels, LayerChannels};
use crate::checkpoint::{Checkpoint, Part};
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::graph::{Attribute, DataType, Dim, GraphBuilder, Value};
use crate::linear::{HeadPadding, Linear, LinearInput, through_float8};
use crate::manifest::Target;
use crate::norm::{rms_norm, skip_rms_norm};
use crate::precision::{GraphFormat, LinearFormat};
use crate::weight::Weight;

const PART: Part = Part::Decoder;

/// `image_index` of a text token.
pub const IMAGE_INDEX_TEXT: i64 = -1;
/// `image_index` of a padded position.
pub const IMAGE_INDEX_PADDING: i64 = -2;

/// Most captions in flight that TensorRT's profiles are made for, and the usual number.
const BATCH_RANGE: (usize, usize, usize) = (1, 8, 64);
/// Tokens of one run: a step of decoding to a long prompt with its image.
const MAX_PROMPT: usize = 2048;

/// Builds the decoder's graph.
///
/// ```text
/// input_ids, image_index, image_features -> embeddings [T, H] -> layers -> last tokens [B, H]
///     -> RMSNorm -> lm_head -> logits -> ArgMax -> next_ids
/// ```
pub(crate) fn build<'c>(
    checkpoint: &'c Checkpoint,
    config: &DecoderConfig,
    format: GraphFormat,
    channels: &DecoderChannels,
) -> Result<GraphBuilder<'c>> {
    let mut decoder = Decoder::new(checkpoint, config, format, channels)?;
    if format.target == Target::Cpu {
        decoder.packed()?;
        return Ok(decoder.graph);
    }
    let mut hidden = decoder.embeddings();
    let weight = decoder.norm_weight("layers.0.input_layernorm", &channels.layer(0).attention_input)?;
    let name = "layers.0.input_layernorm";
    let mut normed = rms_norm(&mut decoder.graph, name, &hidden, &weight, config.rms_norm_eps);
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
    channels: &'v DecoderChannels,
    attention: Attention<'v>,
    /// Rows of the table, in the graph's float type where `embedding` says so.
    embedding_table: Value,
    input_ids: Value,
    image_index: Value,
    image_features: Value,
    /// Width of a head in the cache: `head_dim`, padded.
    padded_head_dim: usize,
    /// `[batch, sequence, -1]` for reshapes from rows of tokens back to sequences.
    sequence_shape: Value,
    /// `[batch, 1]`: index of each sequence's last token within this run's `sequence`.
    last_token: Value,
}

impl<'c, 'v> Decoder<'c, 'v> {
    fn new(
        checkpoint: &'c Checkpoint,
        config: &'v DecoderConfig,
        format: GraphFormat,
        channels: &'v DecoderChannels,
    ) -> Result<Self> {
        let mut graph = GraphBuilder::new("decoder", format);
        let tokens: Vec<Dim> = vec!["batch".into(), "sequence".into()];
        let input_ids = graph.input("input_ids", DataType::I64, tokens.clone());
        let image_index = graph.input("image_index", DataType::I64, tokens);
        let features_shape = vec!["rows".into(), config.hidden_size.into()];
        let image_features = graph.input("image_features", format.float, features_shape);
        let seqlens_k = graph.input("seqlens_k", DataType::I32, vec!["batch".into()]);
        let max_length = config.num_positions();
        let prompt = MAX_PROMPT.min(max_length);
        graph.dim_range("batch", BATCH_RANGE);
        graph.dim_range("sequence", (1, 1, prompt));
        graph.dim_range("rows", (1, 1, BATCH_RANGE.2 * prompt));
        graph.dim_range("max_length", (1, 1024.min(max_length), max_length));

        let table_name = "embed_tokens.weight";
        let table = checkpoint.tensor(PART, table_name, &[config.vocab_size, config.hidden_size])?;
        let embedding_table = graph.float_weight(table_name, Weight::stored(table), format.embedding);

        let ids_shape = graph.node("Shape", "/shape/Shape", &[&input_ids], vec![]);
        let any = graph.shape(&[-1]);
        let sequence_shape =
            graph.node("Concat", "/shape/Concat", &[&ids_shape, &any], vec![("axis", Attribute::Int(0))]);
        let (num_tokens, last_token) = last_token(&mut graph, &image_index);
        let attention = Attention::new(&mut graph, config, seqlens_k, &num_tokens, &input_ids);
        Ok(Self {
            graph,
            checkpoint,
            config,
            channels,
            attention,
            embedding_table,
            input_ids,
            image_index,
            image_features,
            padded_head_dim: cache_head_dim(format.target, config.head_dim),
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
        let format = graph.format();
        let text = graph.cast("/embed", &text, format.embedding, format.float);
        let row = graph.node("Max", "/embed/Max", &[&index, &zero], vec![]);
        let image = graph.node("Gather", "/embed/Gather_1", &[&self.image_features, &row], vec![]);
        let is_image = graph.node("GreaterOrEqual", "/embed/GreaterOrEqual", &[&index, &zero], vec![]);
        let is_image = graph.node("Unsqueeze", "/embed/Unsqueeze", &[&is_image, &flat], vec![]);
        graph.node("Where", "/embed/Where", &[&is_image, &image, &text], vec![])
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
        let LayerChannels { attention_output, mlp_input, mlp_hidden, .. } = self.channels.layer(layer);
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
        let o_proj = self.linear(&name, (attention_size, hidden_size), self.config.attention_bias)?;
        let attended = self.input(&name, &attended, &attention_output);
        let attended = o_proj.for_input(&attention_output).build(&mut self.graph, &attended);
        let norm = format!("{prefix}.post_attention_layernorm");
        let weight = self.norm_weight(&norm, &mlp_input)?;
        let epsilon = self.config.rms_norm_eps;
        let (normed, hidden) = skip_rms_norm(&mut self.graph, &norm, (&attended, &hidden), &weight, epsilon);

        let normed = self.input(&format!("{prefix}.mlp"), &normed, &mlp_input);
        let widened = (hidden_size, intermediate_size);
        let gate = self.linear(&format!("{prefix}.mlp.gate_proj"), widened, mlp_bias)?;
        let gate = gate.for_input(&mlp_input).build(&mut self.graph, &normed);
        let up = self.linear(&format!("{prefix}.mlp.up_proj"), widened, mlp_bias)?;
        let up = up.for_input(&mlp_input).with_divided_output(mlp_hidden.factors.as_deref());
        let (up, up_scale) = up.build_rows(&mut self.graph, &normed);
        let gate = activation.build(&mut self.graph, &format!("/{prefix}/mlp"), &gate);
        let gated = self.graph.node("Mul", &format!("/{prefix}/mlp/Mul"), &[&gate, &up], vec![]);
        let name = format!("{prefix}.mlp.down_proj");
        let down = self.linear(&name, (intermediate_size, hidden_size), mlp_bias)?;
        let gated = self.input(&name, &gated, &mlp_hidden).scaled_by(&mut self.graph, &format!("/{name}"), up_scale);
        let down = down.for_input(&mlp_hidden).build(&mut self.graph, &gated);
        let (next_norm, next_input) = match is_last {
            true => ("norm".to_owned(), Channels::default()),
            false => {
                let next = self.channels.layer(layer + 1);
                (format!("layers.{}.input_layernorm", layer + 1), next.attention_input)
            }
        };
        let weight = self.norm_weight(&next_norm, &next_input)?;
        let (normed, hidden) = skip_rms_norm(&mut self.graph, &next_norm, (&down, &hidden), &weight, epsilon);
        Ok((hidden, normed))
    }

    /// `normed [T, H]` to `[B, S, heads * d]`, keys and values going into the cache.
    fn attention(&mut self, layer: usize, normed: &Value) -> Result<Value> {
        let DecoderConfig { hidden_size, num_heads, num_kv_heads, head_dim, attention_bias, .. } = *self.config;
        let LayerChannels { attention_input, .. } = self.channels.layer(layer);
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
        let format = self.graph.format().attention_input;
        let normed = self.input_in(format, &format!("{prefix}.qkv_proj"), normed, &attention_input);
        let packed = packed.for_input(&attention_input).build_in(&mut self.graph, &normed, format);
        let name = format!("/{prefix}/Reshape");
        let packed = self.graph.node("Reshape", &name, &[&packed, &self.sequence_shape], vec![]); // [B, S, q + k + v]
        Ok(self.attention.build(&mut self.graph, layer, &packed))
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

    /// `normed [B, H]` to `logits [B, vocab]` and `next_ids [B]`.
    ///
    /// ```text
    /// normed -> lm_head -> logits -+-> ArgMax -----------------------------------------------\
    ///                              \-> Mul 0 -> ReduceSum -> GreaterOrEqual 0 (all finite) -+-> Where(…, -1) -> next_ids
    /// ```
    fn head(&mut self, normed: &Value) -> Result<()> {
        let DecoderConfig { hidden_size, vocab_size, .. } = *self.config;
        let is_tied = !self.checkpoint.has(Part::LmHead) && self.config.tie_word_embeddings;
        let format = self.graph.format();
        let graph = &mut self.graph;
        let scores = if is_tied && format.head == LinearFormat::Float && format.embedding == format.float {
            let transposed = vec![("transB", Attribute::Int(1))];
            graph.node("Gemm", "/lm_head/Gemm", &[normed, &self.embedding_table], transposed)
        } else {
            let shape = [vocab_size, hidden_size];
            let table = match is_tied {
                true => self.checkpoint.tensor(PART, "embed_tokens.weight", &shape)?,
                false => self.checkpoint.tensor(Part::LmHead, "weight", &shape)?,
            };
            let input = LinearInput::new(graph, format.head, "/lm_head", normed);
            Linear::of_weight("lm_head", Weight::stored(table)).build_in(graph, &input, format.head)
        };
        let logits = graph.output("logits", DataType::F32, vec!["batch".into(), vocab_size.into()]);
        let next_ids = graph.output("next_ids", DataType::I64, vec!["batch".into()]);
        let to_f32 = vec![("to", Attribute::Int(DataType::F32 as i64))];
        let (op, attributes) = if format.float == DataType::F32 { ("Identity", vec![]) } else { ("Cast", to_f32) };
        graph.node_named("", op, "/lm_head/logits", &[&scores], std::slice::from_ref(&logits), attributes);

        let axis = vec![("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(0))];
        let best = graph.node("ArgMax", "/next/ArgMax", &[&logits], axis);
        let zero = graph.constant_f32("/constants/zero_f32", &[], &[0.0]);
        let minus_one = graph.constant_i64("/constants/minus_one", &[], &[-1]);
        let zeros = graph.node("Mul", "/next/Mul", &[&logits, &zero], vec![]);
        let last_axis = graph.shape(&[-1]);
        let keepdims = vec![("keepdims", Attribute::Int(0))];
        let sum = graph.node("ReduceSum", "/next/ReduceSum", &[&zeros, &last_axis], keepdims);
        // The sum is 0 or NaN, which is not at least 0. (onnxruntime 1.25's CUDA provider has no Equal at this opset; 1.31.1 has.)
        let is_finite = graph.node("GreaterOrEqual", "/next/GreaterOrEqual", &[&sum, &zero], vec![]);
        graph.node_named("", "Where", "/next/Where", &[&is_finite, &best, &minus_one], &[next_ids], vec![]);
        Ok(())
    }

    /// The weight of the norm `name`, whose output is divided as `channels` says.
    fn norm_weight(&mut self, name: &str, channels: &Channels) -> Result<Value> {
        let name = format!("{name}.weight");
        let weight = self.checkpoint.tensor(PART, &name, &[self.config.hidden_size])?;
        let Some(factors) = &channels.factors else { return Ok(self.graph.weight(&name, weight)) };
        let mut values = weight.read_f32()?;
        values.iter_mut().zip(&**factors).for_each(|(value, factor)| *value /= factor);
        Ok(self.graph.weight_values(&name, &[values.len()], &values))
    }

    fn linear(&self, name: &str, features: (usize, usize), has_bias: bool) -> Result<Linear<'c>> {
        Linear::find(self.checkpoint, PART, name, features, has_bias)
    }

    fn input(&mut self, name: &str, x: &Value, channels: &Channels) -> LinearInput {
        let format = self.graph.format().linear;
        self.input_in(format, name, x, channels)
    }

    fn input_in(&mut self, format: LinearFormat, name: &str, x: &Value, channels: &Channels) -> LinearInput {
        let name = format!("/{name}");
        let rounded = channels.float8_scale.map(|scale| through_float8(&mut self.graph, &name, x, scale));
        LinearInput::new(&mut self.graph, format, &name, rounded.as_ref().unwrap_or(x))
    }
}

/// `[B, 1]` each: positions that are not padding, and those less one.
///
/// ```text
/// image_index -> GreaterOrEqual -1 -> Cast i64 -> ReduceSum(axis 1) -> Sub 1
/// ```
fn last_token(graph: &mut GraphBuilder<'_>, image_index: &Value) -> (Value, Value) {
    let text = graph.constant_i64("/constants/text", &[], &[IMAGE_INDEX_TEXT]);
    let one = graph.constant_i64("/constants/one", &[], &[1]);
    let is_token = graph.node("GreaterOrEqual", "/last/GreaterOrEqual", &[image_index, &text], vec![]);
    let to_i64 = vec![("to", Attribute::Int(DataType::I64 as i64))];
    let is_token = graph.node("Cast", "/last/Cast", &[&is_token], to_i64);
    let axis = graph.shape(&[1]);
    let num_tokens =
        graph.node("ReduceSum", "/last/ReduceSum", &[&is_token, &axis], vec![("keepdims", Attribute::Int(1))]);
    let last_token = graph.node("Sub", "/last/Sub", &[&num_tokens, &one], vec![]);
    (num_tokens, last_token)
}
