//! Linear layers as `recaption.QuantizedLinear`: what comes before a product (a norm, quantisation) and after it (bias,
//! activation, residual) is in the one operator, so that rows of f32 are all that goes from layer to layer.
//!
//! Inputs: `x` f32 (or the samples of pictures, u8) `[rows, k]`, the packed weights' three tensors, then, where there
//! are such, the norm's weight and bias, the layer's bias and the residual `[rows, columns]`. Output: f32
//! `[rows, columns]`.

use recaption_kernels::{PackSpec, ZERO_POINT};

use super::{Linear, float_bias};
use crate::activation::Activation;
use crate::graph::{Attribute, GraphBuilder, OWN, Value};
use crate::precision::LinearFormat;
use crate::quantize::PackedFormat;

/// What becomes of the rows before they are quantised.
#[derive(Clone)]
pub(crate) enum Norm {
    None,
    Rms { weight: Value, epsilon: f32 },
    Layer { weight: Value, bias: Value, epsilon: f32 },
}

/// What surrounds a product.
pub(crate) struct Around<'v> {
    pub(crate) norm: Norm,
    pub(crate) activation: Option<Activation>,
    pub(crate) residual: Option<&'v Value>,
    /// The output's name, where it is a graph output.
    pub(crate) output: Option<Value>,
}

impl Default for Around<'_> {
    fn default() -> Self {
        Self { norm: Norm::None, activation: None, residual: None, output: None }
    }
}

/// The operator's name for an activation that it has.
fn fused_name(activation: Activation) -> Option<&'static str> {
    match activation {
        Activation::Gelu => Some("gelu"),
        Activation::GeluTanh => Some("gelu_tanh"),
        Activation::QuickGelu => Some("quick_gelu"),
        Activation::Silu | Activation::Relu => None,
    }
}

impl<'c> Linear<'c> {
    /// `[rows, in_features]` to `[rows, out_features]`.
    pub(crate) fn build_packed(
        self,
        graph: &mut GraphBuilder<'c>,
        format: LinearFormat,
        x: &Value,
        around: Around<'_>,
    ) -> Value {
        let name = self.name.clone();
        let fused = around.activation.and_then(fused_name);
        let value = self.node(graph, (format, ZERO_POINT), x, fused.unwrap_or("identity"), &around);
        match around.activation {
            Some(activation) if fused.is_none() => activation.build(graph, &name, &value),
            _ => value,
        }
    }

    /// The samples of pictures, u8 around `zero_point`, by this layer.
    pub(crate) fn build_of_samples(self, graph: &mut GraphBuilder<'c>, x: &Value, zero_point: u8) -> Value {
        let format = graph.format().linear;
        self.node(graph, (format, zero_point), x, "identity", &Around::default())
    }

    /// `activation(gate) * up`, both of one input.
    pub(crate) fn build_gated(
        self,
        up: Self,
        graph: &mut GraphBuilder<'c>,
        (format, activation): (LinearFormat, Activation),
        x: &Value,
        norm: Norm,
        name: String,
    ) -> Value {
        if activation == Activation::Silu {
            let around = Around { norm, ..Around::default() };
            return self.then(up, name).node(graph, (format, ZERO_POINT), x, "swiglu", &around);
        }
        let of = |activation| Around { norm: norm.clone(), activation, ..Around::default() };
        let gate = self.build_packed(graph, format, x, of(Some(activation)));
        let up = up.build_packed(graph, format, x, of(None));
        graph.node("Mul", &format!("{name}/Mul"), &[&gate, &up], vec![])
    }

    fn node(
        self,
        graph: &mut GraphBuilder<'c>,
        (format, zero_point): (LinearFormat, u8),
        x: &Value,
        activation: &'static str,
        around: &Around<'_>,
    ) -> Value {
        let Self { name, weight, bias } = self;
        let LinearFormat::Packed { block, bounded } = format else {
            unreachable!("bug: a packed layer of another format")
        };
        let gated = activation == "swiglu";
        let columns = if gated { weight.num_rows() / 2 } else { weight.num_rows() };
        let spec = PackSpec { columns, k: weight.row_size(), block, gated, bounded };
        let weight = if gated { weight.in_gated_panels() } else { weight.in_panels() };
        let weight_name = format!("{}.weight", name.trim_start_matches('/'));
        let weights = graph.packed_weight(&weight_name, weight, PackedFormat { spec, zero_point });
        let bias = bias.map_or_else(Value::none, |bias| float_bias(graph, &name, bias));
        let (norm, norm_weight, norm_bias, epsilon) = match &around.norm {
            Norm::None => ("none", Value::none(), Value::none(), 0.0),
            Norm::Rms { weight, epsilon } => ("rms", weight.clone(), Value::none(), *epsilon),
            Norm::Layer { weight, bias, epsilon } => ("layer", weight.clone(), bias.clone(), *epsilon),
        };
        let residual = around.residual.cloned().unwrap_or_else(Value::none);
        let node = format!("{name}/QuantizedLinear");
        let output = around.output.clone().unwrap_or_else(|| GraphBuilder::output_of(&node, 0));
        let [values, corrections, scales] = &weights;
        graph.node_named(
            OWN,
            "QuantizedLinear",
            &node,
            &[x, values, corrections, scales, &norm_weight, &norm_bias, &bias, &residual],
            std::slice::from_ref(&output),
            vec![
                ("columns", Attribute::Int(columns as i64)),
                ("k", Attribute::Int(spec.k as i64)),
                ("block", Attribute::Int(block as i64)),
                ("bounded", Attribute::Int(spec.bounded.into())),
                ("norm", Attribute::Text(norm)),
                ("epsilon", Attribute::Float(epsilon)),
                ("activation", Attribute::Text(activation)),
            ],
        );
        output
    }
}
