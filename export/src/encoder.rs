//! The layers of a CLIP transformer, which its vision tower and its text tower share: rows of tokens in, rows of tokens out.
//! Names are transformers'; where a checkpoint has others, [`TowerTensors`] translates.

use crate::activation::Activation;
use crate::error::Result;
use crate::graph::{Attribute, GraphBuilder, OWN, Value};
use crate::linear::{Around, Linear, LinearInput, Norm};
use crate::manifest::Target;
use crate::norm::layer_norm;
use crate::tensor::StoredTensor;

/// The stored tensors of one tower.
pub(crate) trait TowerTensors<'c> {
    /// The tensor that transformers calls `name` within the tower, checked against the shape that the configuration implies.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'c>>;
}

/// Dimensions and options of the layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncoderConfig {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_heads: usize,
    pub(crate) activation: Activation,
    pub(crate) layer_norm_eps: f32,
}

impl EncoderConfig {
    pub(crate) fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }
}

/// A tower's graph while its layers are built.
pub(crate) struct Encoder<'c, 'v> {
    pub(crate) graph: GraphBuilder<'c>,
    pub(crate) tensors: &'v dyn TowerTensors<'c>,
    pub(crate) config: EncoderConfig,
    /// `[batch, tokens, heads, head_dim]`: the shape that rows of tokens take for attention; -1 for the batch where the
    /// number of tokens is known.
    pub(crate) heads_shape: Value,
    /// Tokens of a sequence, or of the longest where they vary.
    pub(crate) num_tokens: usize,
    /// Added to the scores, `[tokens, tokens]`.
    pub(crate) mask: Option<Value>,
}

impl<'c> Encoder<'c, '_> {
    /// Layer `layer`, rows `[batch * tokens, hidden]` in and out.
    ///
    /// ```text
    /// x -> LN -> q, k, v -> softmax(q k^T / sqrt(d) + mask) v -> out_proj -> + -> LN -> fc1 -> act -> fc2 -> + -> y
    ///  \______________________________________________________________________/ \____________________________/
    /// ```
    pub(crate) fn layer(&mut self, layer: usize, x: &Value) -> Result<Value> {
        if self.graph.format().target == Target::Cpu {
            return self.packed_layer(layer, x);
        }
        let EncoderConfig { hidden_size, intermediate_size, activation, .. } = self.config;
        let prefix = format!("encoder.layers.{layer}");
        let normed = self.layer_norm(&format!("{prefix}.layer_norm1"), x)?;
        let attended = self.attention(&format!("{prefix}.self_attn"), &normed)?;
        let x = self.graph.node("Add", &format!("/{prefix}/Add"), &[x, &attended], vec![]);

        let normed = self.layer_norm(&format!("{prefix}.layer_norm2"), &x)?;
        let normed = self.input(&format!("{prefix}.mlp.fc1"), &normed);
        let widened = self.linear(&format!("{prefix}.mlp.fc1"), (hidden_size, intermediate_size), &normed)?;
        let activated = activation.build(&mut self.graph, &format!("/{prefix}/mlp"), &widened);
        let activated = self.input(&format!("{prefix}.mlp.fc2"), &activated);
        let narrowed = self.linear(&format!("{prefix}.mlp.fc2"), (intermediate_size, hidden_size), &activated)?;
        Ok(self.graph.node("Add", &format!("/{prefix}/Add_1"), &[&x, &narrowed], vec![]))
    }

    /// The same in this project's own operators, for sequences of one length that see all of themselves.
    ///
    /// ```text
    /// x -> [LN, q and k and v] -> Attention -> [out_proj, + x] -> x -> [LN, fc1, act] -> [fc2, + x] -> y
    /// ```
    fn packed_layer(&mut self, layer: usize, x: &Value) -> Result<Value> {
        let EncoderConfig { hidden_size, intermediate_size, num_heads, activation, .. } = self.config;
        assert!(self.mask.is_none(), "bug: only towers without a mask have target cpu");
        let format = self.graph.format().linear;
        let prefix = format!("encoder.layers.{layer}");
        let attention = format!("{prefix}.self_attn");
        let square = (hidden_size, hidden_size);
        let query = self.stored(&format!("{attention}.q_proj"), square)?;
        let key = self.stored(&format!("{attention}.k_proj"), square)?;
        let value = self.stored(&format!("{attention}.v_proj"), square)?;
        let packed = query.then(key, String::new()).then(value, format!("/{attention}.qkv_proj"));
        let around = Around { norm: self.packed_norm(&format!("{prefix}.layer_norm1"))?, ..Around::default() };
        let packed = packed.build_packed(&mut self.graph, format, x, around);
        let name = format!("/{attention}/Attention");
        let attended = GraphBuilder::output_of(&name, 0);
        let attributes = vec![
            ("num_heads", Attribute::Int(num_heads as i64)),
            ("num_tokens", Attribute::Int(self.num_tokens as i64)),
            ("scale", Attribute::Float(1.0 / (self.config.head_dim() as f32).sqrt())),
        ];
        self.graph.node_named(OWN, "Attention", &name, &[&packed], std::slice::from_ref(&attended), attributes);
        let around = Around { residual: Some(x), ..Around::default() };
        let out_proj = self.stored(&format!("{attention}.out_proj"), square)?;
        let x = out_proj.build_packed(&mut self.graph, format, &attended, around);

        let norm = self.packed_norm(&format!("{prefix}.layer_norm2"))?;
        let around = Around { norm, activation: Some(activation), ..Around::default() };
        let fc1 = self.stored(&format!("{prefix}.mlp.fc1"), (hidden_size, intermediate_size))?;
        let widened = fc1.build_packed(&mut self.graph, format, &x, around);
        let around = Around { residual: Some(&x), ..Around::default() };
        let fc2 = self.stored(&format!("{prefix}.mlp.fc2"), (intermediate_size, hidden_size))?;
        Ok(fc2.build_packed(&mut self.graph, format, &widened, around))
    }

    fn packed_norm(&mut self, name: &str) -> Result<Norm> {
        let (weight, bias) = self.norm_weights(name)?;
        Ok(Norm::Layer { weight, bias, epsilon: self.config.layer_norm_eps })
    }

    fn attention(&mut self, prefix: &str, x: &Value) -> Result<Value> {
        let EncoderConfig { hidden_size, .. } = self.config;
        let mut heads = Vec::with_capacity(3);
        let x = self.input(prefix, x);
        for projection in ["q_proj", "k_proj", "v_proj"] {
            let name = format!("{prefix}.{projection}");
            let flat = self.linear(&name, (hidden_size, hidden_size), &x)?;
            let split = self.graph.node("Reshape", &format!("/{name}/Reshape"), &[&flat, &self.heads_shape], vec![]);
            let perm = vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))];
            heads.push(self.graph.node("Transpose", &format!("/{name}/Transpose"), &[&split], perm)); // [B, h, T, d]
        }
        let [query, key, value] = &heads[..] else { unreachable!("three projections") };
        let graph = &mut self.graph;
        let scale = 1.0 / (self.config.head_dim() as f32).sqrt();
        let mut scores = scaled_products(graph, prefix, query, key, scale); // [B, h, T, T]
        if let Some(mask) = &self.mask {
            scores = graph.node("Add", &format!("/{prefix}/Add_mask"), &[&scores, mask], vec![]);
        }
        let weights =
            graph.node("Softmax", &format!("/{prefix}/Softmax"), &[&scores], vec![("axis", Attribute::Int(-1))]);
        let mixed = graph.node("MatMul", &format!("/{prefix}/MatMul"), &[&weights, value], vec![]);
        let perm = vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))];
        let mixed = graph.node("Transpose", &format!("/{prefix}/Transpose"), &[&mixed], perm);
        let rows = graph.shape(&[-1, hidden_size as i64]);
        let mixed = graph.node("Reshape", &format!("/{prefix}/Reshape"), &[&mixed, &rows], vec![]);
        let mixed = self.input(&format!("{prefix}.out_proj"), &mixed);
        self.linear(&format!("{prefix}.out_proj"), (hidden_size, hidden_size), &mixed)
    }

    pub(crate) fn layer_norm(&mut self, name: &str, x: &Value) -> Result<Value> {
        let (weight, bias) = self.norm_weights(name)?;
        Ok(layer_norm(&mut self.graph, name, x, (&weight, &bias), self.config.layer_norm_eps))
    }

    fn norm_weights(&mut self, name: &str) -> Result<(Value, Value)> {
        let shape = [self.config.hidden_size];
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let weight = self.tensors.tensor(&weight_name, &shape)?;
        let bias = self.tensors.tensor(&bias_name, &shape)?;
        let weight = self.graph.weight(&weight_name, weight);
        let bias = self.graph.weight(&bias_name, bias);
        Ok((weight, bias))
    }

    fn linear(&mut self, name: &str, features: (usize, usize), x: &LinearInput) -> Result<Value> {
        Ok(self.stored(name, features)?.build(&mut self.graph, x))
    }

    fn stored(&self, name: &str, (inputs, outputs): (usize, usize)) -> Result<Linear<'c>> {
        let weight = self.tensors.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.tensors.tensor(&format!("{name}.bias"), &[outputs])?;
        Ok(Linear::of_tensors(name, weight, bias))
    }

    fn input(&mut self, name: &str, x: &Value) -> LinearInput {
        let format = self.graph.format().linear;
        LinearInput::new(&mut self.graph, format, &format!("/{name}"), x)
    }
}

/// `query key^T * scale`, both `[B, heads, tokens, d]`. Without the fused operator the scale goes to the query, which is what
/// TensorRT fuses.
fn scaled_products(graph: &mut GraphBuilder<'_>, prefix: &str, query: &Value, key: &Value, scale: f32) -> Value {
    if graph.format().target == Target::Ort {
        let attributes = vec![("alpha", Attribute::Float(scale)), ("transB", Attribute::Int(1))];
        return graph.contrib_node("FusedMatMul", &format!("/{prefix}/FusedMatMul"), &[query, key], attributes);
    }
    let scale = graph
        .once("/constants/attention_scale", |graph| graph.constant_float("/constants/attention_scale", &[], &[scale]));
    let query = graph.node("Mul", &format!("/{prefix}/Mul"), &[query, &scale], vec![]);
    let perm = vec![("perm", Attribute::Ints(vec![0, 1, 3, 2]))];
    let key = graph.node("Transpose", &format!("/{prefix}/Transpose_1"), &[key], perm);
    graph.node("MatMul", &format!("/{prefix}/MatMul_1"), &[&query, &key], vec![])
}
