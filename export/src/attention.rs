//! Attention of the decoder over its KV cache, for either target.

use crate::config::DecoderConfig;
use crate::graph::{Attribute, DataType, Dim, GraphBuilder, MICROSOFT, OWN, Value};
use crate::manifest::Target;
use crate::rope::cos_sin_tables;

/// ONNX Runtime's GroupQueryAttention rotates only heads whose width is a multiple of this; others are padded.
const HEAD_DIM_MULTIPLE: usize = 16;

/// Width of a head in the cache.
pub(crate) fn cache_head_dim(target: Target, head_dim: usize) -> usize {
    match target {
        Target::Ort => head_dim.next_multiple_of(HEAD_DIM_MULTIPLE),
        Target::TensorRt | Target::Cpu => head_dim,
    }
}

/// What the layers share.
pub(crate) struct Attention<'v> {
    config: &'v DecoderConfig,
    cache_head_dim: usize,
    /// `[max_positions, cache_head_dim / 2]`
    cos_table: Value,
    sin_table: Value,
    form: Form,
}

enum Form {
    Fused { seqlens_k: Value, total_sequence_length: Value },
    Standard(Positions),
    Own { seqlens_k: Value, num_tokens: Value },
}

/// Which rows of the cache belong to which token, as the standard operators need it.
struct Positions {
    /// `[B, S, 1, head_dim / 2]`: each token's angles.
    cos: Value,
    sin: Value,
    /// `[B, T, 1]`: the token of this run that belongs to a cache row, clipped to the run.
    token_of_row: Value,
    /// `[B, 1, T, 1]`: whether a cache row gets a token of this run.
    is_new: Value,
    /// `[B, 1, T, 1]`: whether a cache row was filled before.
    is_old: Value,
    /// `[B, 1, 1, S, T]`: whether a token sees a cache row.
    is_visible: Value,
}

impl<'v> Attention<'v> {
    /// `num_tokens` `[B, 1]`: tokens of each sequence in this run, padding not counted; `input_ids` `[B, S]`.
    pub(crate) fn new(
        graph: &mut GraphBuilder<'_>,
        config: &'v DecoderConfig,
        seqlens_k: Value,
        num_tokens: &Value,
        input_ids: &Value,
    ) -> Self {
        let target = graph.format().target;
        let cache_head_dim = cache_head_dim(target, config.head_dim);
        let max_positions = config.num_positions();
        let (cos, sin) = cos_sin_tables(&config.rope, config.head_dim, cache_head_dim, max_positions);
        let dims = [max_positions, cache_head_dim / 2];
        let cos_table = graph.constant_float("rotary.cos_cache", &dims, &cos);
        let sin_table = graph.constant_float("rotary.sin_cache", &dims, &sin);
        let form = match target {
            Target::Ort => {
                let total_sequence_length = graph.input("total_sequence_length", DataType::I32, vec![]);
                Form::Fused { seqlens_k, total_sequence_length }
            }
            Target::Cpu => Form::Own { seqlens_k, num_tokens: num_tokens.clone() },
            Target::TensorRt => {
                let tables = [&cos_table, &sin_table];
                Form::Standard(Positions::new(graph, max_positions, tables, [&seqlens_k, num_tokens, input_ids]))
            }
        };
        Self { config, cache_head_dim, cos_table, sin_table, form }
    }

    /// `packed [B, S, q + k + v]` to `[B, S, heads * cache_head_dim]`, in this project's own operator rows to rows; keys and values
    /// go into the layer's cache.
    pub(crate) fn build(&self, graph: &mut GraphBuilder<'_>, layer: usize, packed: &Value) -> Value {
        let cache = graph.format().cache();
        let num_kv_heads = self.config.num_kv_heads;
        let shape: Vec<Dim> =
            vec!["batch".into(), num_kv_heads.into(), "max_length".into(), self.cache_head_dim.into()];
        let past =
            ["key", "value"].map(|kind| graph.input(&format!("past_key_values.{layer}.{kind}"), cache, shape.clone()));
        let present =
            ["key", "value"].map(|kind| graph.output(&format!("present.{layer}.{kind}"), cache, shape.clone()));
        match &self.form {
            Form::Fused { seqlens_k, total_sequence_length } => {
                self.fused(graph, layer, packed, [seqlens_k, total_sequence_length], (past, present))
            }
            Form::Own { seqlens_k, num_tokens } => {
                self.own(graph, layer, packed, [seqlens_k, num_tokens], (past, present))
            }
            Form::Standard(positions) => self.standard(graph, layer, packed, positions, (past, present)),
        }
    }

    fn fused(
        &self,
        graph: &mut GraphBuilder<'_>,
        layer: usize,
        packed: &Value,
        [seqlens_k, total_sequence_length]: [&Value; 2],
        (past, present): ([Value; 2], [Value; 2]),
    ) -> Value {
        let name = format!("/layers.{layer}.self_attn/GroupQueryAttention");
        let attended = GraphBuilder::output_of(&name, 0);
        let none = Value::none();
        let [past_key, past_value] = &past;
        let [present_key, present_value] = present;
        graph.node_named(
            MICROSOFT,
            "GroupQueryAttention",
            &name,
            &[
                packed,
                &none,
                &none,
                past_key,
                past_value,
                seqlens_k,
                total_sequence_length,
                &self.cos_table,
                &self.sin_table,
            ],
            &[attended.clone(), present_key, present_value],
            vec![
                ("num_heads", Attribute::Int(self.config.num_heads as i64)),
                ("kv_num_heads", Attribute::Int(self.config.num_kv_heads as i64)),
                ("scale", Attribute::Float(self.scale())),
                ("do_rotary", Attribute::Int(1)),
                ("rotary_interleaved", Attribute::Int(0)),
            ],
        );
        attended
    }

    /// Rotation, the cache's update and attention in one operator; rows of padding become zeros.
    fn own(
        &self,
        graph: &mut GraphBuilder<'_>,
        layer: usize,
        packed: &Value,
        [seqlens_k, num_tokens]: [&Value; 2],
        ([past_key, past_value], [present_key, present_value]): ([Value; 2], [Value; 2]),
    ) -> Value {
        let name = format!("/layers.{layer}.self_attn/CachedAttention");
        let attended = GraphBuilder::output_of(&name, 0);
        graph.node_named(
            OWN,
            "CachedAttention",
            &name,
            &[packed, &past_key, &past_value, seqlens_k, num_tokens, &self.cos_table, &self.sin_table],
            &[attended.clone(), present_key, present_value],
            vec![
                ("num_heads", Attribute::Int(self.config.num_heads as i64)),
                ("num_kv_heads", Attribute::Int(self.config.num_kv_heads as i64)),
                ("scale", Attribute::Float(self.scale())),
            ],
        );
        attended
    }

    fn scale(&self) -> f32 {
        1.0 / (self.config.head_dim as f32).sqrt()
    }

    /// Attention from standard operators. `d` is the head's width, `g` the query heads of one key/value head.
    ///
    /// ```text
    /// packed -+-> q -> rotate -> * scale -> [B, kv, g * S, d] -> MatMul(present key^T) -> Where(visible) -> Softmax -\
    ///         +-> k -> rotate -> row by row into the cache -> present key                                            |
    ///         \-> v -----------> row by row into the cache -> present value ------------------------------> MatMul <-/
    /// ```
    fn standard(
        &self,
        graph: &mut GraphBuilder<'_>,
        layer: usize,
        packed: &Value,
        positions: &Positions,
        ([past_key, past_value], [present_key, present_value]): ([Value; 2], [Value; 2]),
    ) -> Value {
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = *self.config;
        let (heads, kv, d) = (num_heads as i64, num_kv_heads as i64, head_dim as i64);
        let group = heads / kv;
        let name = format!("/layers.{layer}.self_attn");
        let slice = |graph: &mut GraphBuilder<'_>, what: &str, start: i64, count: i64| {
            let (from, to, axis) = (graph.shape(&[start * d]), graph.shape(&[(start + count) * d]), graph.shape(&[2]));
            let part = graph.node("Slice", &format!("{name}/{what}/Slice"), &[packed, &from, &to, &axis], vec![]);
            let split = graph.shape(&[0, 0, count, d]);
            graph.node("Reshape", &format!("{name}/{what}/Reshape"), &[&part, &split], vec![]) // [B, S, heads, d]
        };
        let query = slice(graph, "query", 0, heads);
        let key = slice(graph, "key", heads, kv);
        let value = slice(graph, "value", heads + kv, kv);
        let query = positions.rotate(graph, &format!("{name}/query"), &query, d);
        let key = positions.rotate(graph, &format!("{name}/key"), &key, d);
        positions.store(graph, &format!("{name}/key"), &key, (&past_key, &present_key));
        positions.store(graph, &format!("{name}/value"), &value, (&past_value, &present_value));

        // TensorRT fuses attention whose scale is applied before the product.
        let scale = graph.once("/constants/attention_scale", |graph| {
            graph.constant_float("/constants/attention_scale", &[], &[self.scale()])
        });
        let query = graph.node("Mul", &format!("{name}/Mul"), &[&query, &scale], vec![]);
        let grouped = graph.shape(&[0, 0, kv, group, d]);
        let query = graph.node("Reshape", &format!("{name}/grouped/Reshape"), &[&query, &grouped], vec![]);
        let perm = |axes: &[i64]| vec![("perm", Attribute::Ints(axes.to_vec()))];
        let query = graph.node("Transpose", &format!("{name}/grouped/Transpose"), &[&query], perm(&[0, 2, 3, 1, 4])); // [B, kv, g, S, d]
        let one = graph.shape(&[2]);
        let keys = graph.node("Unsqueeze", &format!("{name}/key/Unsqueeze"), &[&present_key, &one], vec![]);
        let keys = graph.node("Transpose", &format!("{name}/key/Transpose"), &[&keys], perm(&[0, 1, 2, 4, 3]));
        let scores = graph.node("MatMul", &format!("{name}/MatMul"), &[&query, &keys], vec![]); // [B, kv, g, S, T]
        // The least fp16: after Softmax it is zero.
        let masked =
            graph.once("/constants/masked", |graph| graph.constant_float("/constants/masked", &[], &[-65_504.0]));
        let scores = graph.node("Where", &format!("{name}/Where"), &[&positions.is_visible, &scores, &masked], vec![]);
        let weights = graph.node("Softmax", &format!("{name}/Softmax"), &[&scores], vec![("axis", Attribute::Int(-1))]);
        let values = graph.node("Unsqueeze", &format!("{name}/value/Unsqueeze"), &[&present_value, &one], vec![]);
        let mixed = graph.node("MatMul", &format!("{name}/MatMul_1"), &[&weights, &values], vec![]); // [B, kv, g, S, d]
        let mixed = graph.node("Transpose", &format!("{name}/Transpose"), &[&mixed], perm(&[0, 3, 1, 2, 4]));
        let flat = graph.shape(&[0, 0, heads * d]);
        graph.node("Reshape", &format!("{name}/mixed/Reshape"), &[&mixed, &flat], vec![])
    }
}

impl Positions {
    /// ```text
    /// seqlens_k + 1 - num_tokens -> start [B, 1] -+-> + Range(S) -> position [B, S] -> Gather(cos), Gather(sin)
    ///                                             \-> Range(T) - start -> token [B, T] -> comparisons
    /// ```
    fn new(
        graph: &mut GraphBuilder<'_>,
        max_positions: usize,
        tables: [&Value; 2],
        [seqlens_k, num_tokens, input_ids]: [&Value; 3],
    ) -> Self {
        let scalar = |graph: &mut GraphBuilder<'_>, value: i64| {
            let name = format!("/constants/i64_{value}");
            graph.once(&name, |graph| graph.constant_i64(&name, &[], &[value]))
        };
        let to_i64 = || vec![("to", Attribute::Int(DataType::I64 as i64))];
        let (zero, one) = (scalar(graph, 0), scalar(graph, 1));
        let axis = |graph: &mut GraphBuilder<'_>, axes: &[i64]| graph.shape(axes);
        let size_of = |graph: &mut GraphBuilder<'_>, name: &str, x: &Value, dim: i64| {
            let shape = graph.node("Shape", &format!("{name}/Shape"), &[x], vec![]);
            let index = scalar(graph, dim);
            graph.node("Gather", &format!("{name}/Gather"), &[&shape, &index], vec![])
        };

        let lengths = graph.node("Cast", "/positions/Cast", &[seqlens_k], to_i64());
        let last_axis = axis(graph, &[-1]);
        let lengths = graph.node("Unsqueeze", "/positions/Unsqueeze", &[&lengths, &last_axis], vec![]); // [B, 1]
        let total = graph.node("Add", "/positions/Add", &[&lengths, &one], vec![]);
        let start = graph.node("Sub", "/positions/Sub", &[&total, num_tokens], vec![]);

        let sequence = size_of(graph, "/positions/sequence", input_ids, 1);
        let tokens = graph.node("Range", "/positions/Range", &[&zero, &sequence, &one], vec![]); // [S]
        let position = graph.node("Add", "/positions/Add_1", &[&start, &tokens], vec![]); // [B, S]
        let last_position = scalar(graph, max_positions as i64 - 1);
        let row = graph.node("Min", "/positions/Min", &[&position, &last_position], vec![]);
        let heads_axis = axis(graph, &[2]);
        let [cos, sin] = [("cos", tables[0]), ("sin", tables[1])].map(|(name, table)| {
            let rows = graph.node("Gather", &format!("/positions/{name}/Gather"), &[table, &row], vec![]);
            graph.node("Unsqueeze", &format!("/positions/{name}/Unsqueeze"), &[&rows, &heads_axis], vec![])
        });

        // The cache of layer 0 stands for all: its input is declared when that layer is built.
        let cache = GraphBuilder::value_named("past_key_values.0.key");
        let max_length = size_of(graph, "/positions/max_length", &cache, 2);
        let rows = graph.node("Range", "/positions/Range_1", &[&zero, &max_length, &one], vec![]); // [T]
        let token = graph.node("Sub", "/positions/Sub_1", &[&rows, &start], vec![]); // [B, T]
        let is_at_or_after = graph.node("GreaterOrEqual", "/positions/GreaterOrEqual", &[&token, &zero], vec![]);
        let is_before_end = graph.node("Less", "/positions/Less", &[&token, num_tokens], vec![]);
        let is_new = graph.node("And", "/positions/And", &[&is_at_or_after, &is_before_end], vec![]);
        let is_old = graph.node("Less", "/positions/Less_1", &[&token, &zero], vec![]);
        let cache_axes = axis(graph, &[1, 3]);
        let is_new = graph.node("Unsqueeze", "/positions/Unsqueeze_1", &[&is_new, &cache_axes], vec![]);
        let is_old = graph.node("Unsqueeze", "/positions/Unsqueeze_2", &[&is_old, &cache_axes], vec![]);
        let last_token = graph.node("Sub", "/positions/Sub_2", &[&sequence, &one], vec![]);
        let token = graph.node("Max", "/positions/Max", &[&token, &zero], vec![]);
        let token = graph.node("Min", "/positions/Min_1", &[&token, &last_token], vec![]);
        let token_of_row = graph.node("Unsqueeze", "/positions/Unsqueeze_3", &[&token, &last_axis], vec![]);

        let row_axes = axis(graph, &[0, 1]);
        let rows = graph.node("Unsqueeze", "/positions/Unsqueeze_4", &[&rows, &row_axes], vec![]); // [1, 1, T]
        let position = graph.node("Unsqueeze", "/positions/Unsqueeze_5", &[&position, &heads_axis], vec![]); // [B, S, 1]
        let is_visible = graph.node("LessOrEqual", "/positions/LessOrEqual", &[&rows, &position], vec![]); // [B, S, T]
        let score_axes = axis(graph, &[1, 2]);
        let is_visible = graph.node("Unsqueeze", "/positions/Unsqueeze_6", &[&is_visible, &score_axes], vec![]);
        Self { cos, sin, token_of_row, is_new, is_old, is_visible }
    }

    /// `x [B, S, heads, d]`, halves rotated: `[a cos - b sin, b cos + a sin]`.
    fn rotate(&self, graph: &mut GraphBuilder<'_>, name: &str, x: &Value, head_dim: i64) -> Value {
        let axis = graph.shape(&[3]);
        let half = |graph: &mut GraphBuilder<'_>, index: i64| {
            let (from, to) = (graph.shape(&[index * head_dim / 2]), graph.shape(&[(index + 1) * head_dim / 2]));
            graph.node("Slice", &format!("{name}/rotate/Slice_{index}"), &[x, &from, &to, &axis], vec![])
        };
        let (a, b) = (half(graph, 0), half(graph, 1));
        let mut mul = |what: &str, x: &Value, angle: &Value| {
            graph.node("Mul", &format!("{name}/rotate/{what}"), &[x, angle], vec![])
        };
        let (a_cos, b_sin) = (mul("Mul", &a, &self.cos), mul("Mul_1", &b, &self.sin));
        let (b_cos, a_sin) = (mul("Mul_2", &b, &self.cos), mul("Mul_3", &a, &self.sin));
        let first = graph.node("Sub", &format!("{name}/rotate/Sub"), &[&a_cos, &b_sin], vec![]);
        let second = graph.node("Add", &format!("{name}/rotate/Add"), &[&b_cos, &a_sin], vec![]);
        let last_axis = vec![("axis", Attribute::Int(-1))];
        graph.node("Concat", &format!("{name}/rotate/Concat"), &[&first, &second], last_axis)
    }

    /// `present` is `past` with the rows of this run's tokens taken from `new` `[B, S, kv, d]`, and zeros behind them, so
    /// that what an earlier caption left there (NaN, if it failed) meets no zero weight.
    fn store(&self, graph: &mut GraphBuilder<'_>, name: &str, new: &Value, (past, present): (&Value, &Value)) {
        let batch_dims = vec![("batch_dims", Attribute::Int(1))];
        let rows = graph.node("GatherND", &format!("{name}/store/GatherND"), &[new, &self.token_of_row], batch_dims); // [B, T, kv, d]
        let perm = vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))];
        let rows = graph.node("Transpose", &format!("{name}/store/Transpose"), &[&rows], perm);
        let zero =
            graph.once("/constants/zero_float", |graph| graph.constant_float("/constants/zero_float", &[], &[0.0]));
        let old = graph.node("Where", &format!("{name}/store/Where"), &[&self.is_old, past, &zero], vec![]);
        let inputs = [&self.is_new, &rows, &old];
        let where_name = format!("{name}/store/Where_1");
        graph.node_named("", "Where", &where_name, &inputs, std::slice::from_ref(present), vec![]);
    }
}
