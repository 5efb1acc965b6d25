//! Linear layers: the one place that decides how they are spelled, one builder per [`LinearFormat`].
//!
//! Weights keep the checkpoint's `[out, in]` layout in every format, so they stream from it as they are and fused layers are
//! plain concatenations: `Gemm` and `QGemm` with `transB`, `MatMulNBits` by its definition. ONNX Runtime's CPU provider runs
//! `Gemm` as fast as `MatMul` and `QGemm` as fast as `MatMulIntegerToFloat` (measured for 1 to 640 rows).

mod packed;

use half::f16;

pub(crate) use self::packed::{Around, Norm};
use crate::channels::Channels;
use crate::checkpoint::{Checkpoint, Part};
use crate::error::Result;
use crate::graph::{Attribute, DataType, GraphBuilder, Value};
use crate::precision::LinearFormat;
use crate::quantize::BlockFormat;
use crate::tensor::StoredTensor;
use crate::weight::{Weight, WeightPart};

/// Stands for zero in quantised activations.
const ACTIVATION_ZERO_POINT: u8 = 128;

/// A linear layer of the checkpoint: `{name}.weight` `[out_features, in_features]` and, if any, `{name}.bias`.
pub(crate) struct Linear<'c> {
    name: String,
    weight: Weight<'c>,
    bias: Option<Weight<'c>>,
}

/// How the rows of a projection to attention heads are laid out anew, so that each head is wider.
#[derive(Clone, Copy)]
pub(crate) struct HeadPadding {
    pub(crate) num_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) padded_head_dim: usize,
    /// Rotary embedding pairs row `i` with row `i + head_dim / 2`: each half is padded, so that the pairs stay pairs.
    pub(crate) is_rotary: bool,
}

impl HeadPadding {
    /// `tensor`'s rows with rows of zeros between them.
    fn apply<'c>(self, tensor: &StoredTensor<'c>) -> Vec<WeightPart<'c>> {
        let pieces = if self.is_rotary { 2 } else { 1 };
        let (size, padded) = (self.head_dim / pieces, self.padded_head_dim / pieces);
        (0..self.num_heads * pieces)
            .flat_map(|piece| {
                [WeightPart::Stored(tensor.rows(piece * size, size)), WeightPart::ZeroRows(padded - size)]
            })
            .collect()
    }
}

/// An activation `[rows, in_features]`, made ready once for all the layers that take it.
pub(crate) struct LinearInput {
    x: Value,
    /// `x` as u8 `[rows, in_features]` around [`ACTIVATION_ZERO_POINT`], and the scale of each row `[rows, 1]`.
    quantized: Option<(Value, Value)>,
}

impl LinearInput {
    /// Prepares `x` for layers of `format`; `name` prefixes the nodes.
    pub(crate) fn new(graph: &mut GraphBuilder<'_>, format: LinearFormat, name: &str, x: &Value) -> Self {
        let quantized = matches!(format, LinearFormat::Int8 { .. }).then(|| quantize_rows(graph, name, x));
        Self { x: x.clone(), quantized }
    }

    /// Says that the true activation is this one with each row multiplied by `scale` `[rows, 1]`.
    pub(crate) fn scaled_by(mut self, graph: &mut GraphBuilder<'_>, name: &str, scale: Option<Value>) -> Self {
        if let (Some((_, own)), Some(scale)) = (&mut self.quantized, scale) {
            *own = graph.node("Mul", &format!("{name}/quantize/Mul_1"), &[own, &scale], vec![]);
        }
        self
    }
}

/// `x [rows, K]` to u8 `[rows, K]` and f32 `[rows, 1]`: each row has its own scale, so that a row's error, or its NaN, stays
/// in that row, and its result does not depend on its neighbours.
///
/// ```text
/// x -> Abs -> ReduceMax -> Max 1e-20 -> Mul 1/127 -> scale -> Unsqueeze -> [rows, 1]
///  \-> QuantizeLinear(axis 0, scale, zero point 128 expanded to the scale's shape) -> u8
/// ```
fn quantize_rows(graph: &mut GraphBuilder<'_>, name: &str, x: &Value) -> (Value, Value) {
    let last_axis = graph.shape(&[-1]);
    let smallest = constant_once(graph, "/constants/smallest", 1e-20);
    let step = constant_once(graph, "/constants/1_127", 1.0 / 127.0);
    let zero_point = graph.once("/constants/u8_128", |graph| {
        graph.constant_bytes("/constants/u8_128", DataType::U8, &[], vec![ACTIVATION_ZERO_POINT])
    });
    let magnitude = graph.node("Abs", &format!("{name}/quantize/Abs"), &[x], vec![]);
    let keepdims = vec![("keepdims", Attribute::Int(0))];
    let largest = graph.node("ReduceMax", &format!("{name}/quantize/ReduceMax"), &[&magnitude, &last_axis], keepdims);
    let largest = graph.node("Max", &format!("{name}/quantize/Max"), &[&largest, &smallest], vec![]);
    let scale = graph.node("Mul", &format!("{name}/quantize/Mul"), &[&largest, &step], vec![]);
    let shape = graph.node("Shape", &format!("{name}/quantize/Shape"), &[&scale], vec![]);
    let zero_points = graph.node("Expand", &format!("{name}/quantize/Expand"), &[&zero_point, &shape], vec![]);
    let quantized = graph.node(
        "QuantizeLinear",
        &format!("{name}/quantize/QuantizeLinear"),
        &[x, &scale, &zero_points],
        vec![("axis", Attribute::Int(0))],
    );
    let scale = graph.node("Unsqueeze", &format!("{name}/quantize/Unsqueeze"), &[&scale, &last_axis], vec![]);
    (quantized, scale)
}

fn constant_once(graph: &mut GraphBuilder<'_>, name: &str, value: f32) -> Value {
    graph.once(name, |graph| graph.constant_f32(name, &[], &[value]))
}

impl<'c> Linear<'c> {
    /// Finds the layer `name` of `part` in the checkpoint.
    pub(crate) fn find(
        checkpoint: &'c Checkpoint,
        part: Part,
        name: &str,
        (in_features, out_features): (usize, usize),
        has_bias: bool,
    ) -> Result<Self> {
        Self::find_padded(checkpoint, part, name, (in_features, out_features), has_bias, None)
    }

    /// As [`Self::find`], with the heads that it projects to made wider.
    pub(crate) fn find_padded(
        checkpoint: &'c Checkpoint,
        part: Part,
        name: &str,
        (in_features, out_features): (usize, usize),
        has_bias: bool,
        padding: Option<HeadPadding>,
    ) -> Result<Self> {
        let parts = |tensor: StoredTensor<'c>, row_shape: &[usize]| match padding {
            Some(padding) => Weight::of_parts(padding.apply(&tensor), row_shape),
            None => Weight::stored(tensor),
        };
        let weight = checkpoint.tensor(part, &format!("{name}.weight"), &[out_features, in_features])?;
        let bias = match has_bias {
            true => Some(parts(checkpoint.tensor(part, &format!("{name}.bias"), &[out_features])?, &[])),
            false => None,
        };
        Ok(Self { name: format!("/{name}"), weight: parts(weight, &[in_features]), bias })
    }

    /// A layer made of a stored weight `[out_features, in_features]` and bias `[out_features]`; `name` as in the checkpoint.
    pub(crate) fn of_tensors(name: &str, weight: StoredTensor<'c>, bias: StoredTensor<'c>) -> Self {
        Self { name: format!("/{name}"), weight: Weight::stored(weight), bias: Some(Weight::stored(bias)) }
    }

    /// A layer without a bias, made of a weight `[out_features, in_features]`; `name` as in the checkpoint.
    pub(crate) fn of_weight(name: &str, weight: Weight<'c>) -> Self {
        Self { name: format!("/{name}"), weight, bias: None }
    }

    /// Appends the outputs of another layer with the same input.
    pub(crate) fn then(mut self, other: Self, fused_name: String) -> Self {
        self.weight = self.weight.then(other.weight);
        self.bias = self.bias.zip(other.bias).map(|(bias, other)| bias.then(other));
        self.name = fused_name;
        self
    }

    /// Takes an input that is divided, and weighs, as `channels` says.
    pub(crate) fn for_input(mut self, channels: &Channels) -> Self {
        if let Some(factors) = &channels.factors {
            self.weight = self.weight.scale_columns(factors);
        }
        self.weight = self.weight.with_importance(channels.importance.clone());
        self
    }

    /// Gives an output whose element `i` is divided by `factors[i]`.
    pub(crate) fn with_divided_output(mut self, factors: Option<&[f32]>) -> Self {
        if let Some(factors) = factors {
            let inverse: Vec<f32> = factors.iter().map(|factor| factor.recip()).collect();
            self.weight = self.weight.scale_rows(&inverse);
            self.bias = self.bias.map(|bias| bias.scale_rows(&inverse));
        }
        self
    }

    /// `[rows, in_features]` to `[rows, out_features]`.
    pub(crate) fn build(self, graph: &mut GraphBuilder<'c>, x: &LinearInput) -> Value {
        let (y, scale) = self.build_unscaled(graph, x);
        y.finish(graph, scale)
    }

    /// As [`Self::build`], with the rows of the result yet to be multiplied by the scale returned, if there is one: whoever
    /// quantises the rows again need not.
    pub(crate) fn build_rows(self, graph: &mut GraphBuilder<'c>, x: &LinearInput) -> (Value, Option<Value>) {
        match self.bias.is_some() {
            true => (self.build(graph, x), None),
            false => {
                let (y, scale) = self.build_unscaled(graph, x);
                (y.value, scale)
            }
        }
    }

    fn build_unscaled(self, graph: &mut GraphBuilder<'c>, x: &LinearInput) -> (Product, Option<Value>) {
        let format = graph.format().linear;
        self.build_as(graph, x, format)
    }

    /// As [`Self::build`], in another format than the graph's other layers; `x` must have been prepared for it.
    pub(crate) fn build_in(self, graph: &mut GraphBuilder<'c>, x: &LinearInput, format: LinearFormat) -> Value {
        let (y, scale) = self.build_as(graph, x, format);
        y.finish(graph, scale)
    }

    fn build_as(self, graph: &mut GraphBuilder<'c>, x: &LinearInput, format: LinearFormat) -> (Product, Option<Value>) {
        let Self { name, weight, bias } = self;
        let bias = bias.map(|bias| float_bias(graph, &name, bias));
        match format {
            LinearFormat::Packed { .. } => unreachable!("bug: a packed layer takes its surroundings in"),
            LinearFormat::Float => (Product { value: gemm(graph, &name, &x.x, weight, bias), name, bias: None }, None),
            LinearFormat::Float8 => {
                (Product { value: float8_gemm(graph, &name, &x.x, weight, bias), name, bias: None }, None)
            }
            LinearFormat::Blocks(blocks) => {
                (Product { value: matmul_n_bits(graph, &name, &x.x, weight, blocks), name, bias }, None)
            }
            LinearFormat::Int8 { max_weight } => {
                let (quantized, scale) = x.quantized.as_ref().expect("bug: the input was prepared for floats");
                let value = q_gemm(graph, &name, quantized, ACTIVATION_ZERO_POINT, weight, max_weight);
                (Product { value, name, bias }, Some(scale.clone()))
            }
        }
    }
}

/// A product without its row scale and bias.
struct Product {
    value: Value,
    name: String,
    bias: Option<Value>,
}

impl Product {
    fn finish(self, graph: &mut GraphBuilder<'_>, scale: Option<Value>) -> Value {
        let Self { mut value, name, bias } = self;
        if let Some(scale) = scale {
            value = graph.node("Mul", &format!("{name}/Mul"), &[&value, &scale], vec![]);
        }
        if let Some(bias) = bias {
            value = graph.node("Add", &format!("{name}/Add"), &[&value, &bias], vec![]);
        }
        value
    }
}

/// `x W`, or with `is_transposed` `x W^T`, in the graph's float type whatever its format: for matrices too small to be worth
/// quantising, which some checkpoints store as `[in, out]`.
pub(crate) fn float_matmul<'c>(
    graph: &mut GraphBuilder<'c>,
    name: &str,
    x: &Value,
    weight: StoredTensor<'c>,
    is_transposed: bool,
) -> Value {
    let weight = graph.weight(&format!("{name}.weight"), weight);
    let attributes = vec![("transB", Attribute::Int(i64::from(is_transposed)))];
    graph.node("Gemm", &format!("/{name}/Gemm"), &[x, &weight], attributes)
}

fn float_bias<'c>(graph: &mut GraphBuilder<'c>, name: &str, bias: Weight<'c>) -> Value {
    let float = graph.format().float;
    graph.float_weight(&format!("{}.bias", name.trim_start_matches('/')), bias, float)
}

fn gemm<'c>(graph: &mut GraphBuilder<'c>, name: &str, x: &Value, weight: Weight<'c>, bias: Option<Value>) -> Value {
    let float = graph.format().float;
    let weight = graph.float_weight(&format!("{}.weight", name.trim_start_matches('/')), weight, float);
    let inputs: Vec<&Value> = [x, &weight].into_iter().chain(&bias).collect();
    graph.node("Gemm", &format!("{name}/Gemm"), &inputs, vec![("transB", Attribute::Int(1))])
}

/// `x W^T + bias` with an `x` that [`through_float8`] has rounded: what TensorRT multiplies in fp8.
///
/// ```text
/// weight (FLOAT8E4M3FN), scale -> DequantizeLinear -> f16 -\
/// x (f16, of DequantizeLinear) ------------------------------> Gemm(transB) -> y
/// ```
///
/// One scale for the whole weight: that is what TensorRT's own quantiser writes (ModelOpt's `FP8_DEFAULT_CFG`: 4 bits of exponent
/// and 3 of mantissa, `axis` none, for weights and inputs) and what its guide defines FP8 with (Working with Quantized Types: a
/// scalar scale). Its ONNX parser takes one per row as well (onnx-tensorrt 10.1, `QuantDequantLinearHelper`), which these floats
/// gain little from: they keep their digits over five decimal orders.
fn float8_gemm<'c>(
    graph: &mut GraphBuilder<'c>,
    name: &str,
    x: &Value,
    weight: Weight<'c>,
    bias: Option<Value>,
) -> Value {
    let (weight, scale) = graph.float8_weight(&format!("{}.weight", name.trim_start_matches('/')), weight);
    let weight = dequantize_float8(graph, &format!("{name}/weight"), &weight, &scale);
    let inputs: Vec<&Value> = [x, &weight].into_iter().chain(&bias).collect();
    graph.node("Gemm", &format!("{name}/Gemm"), &inputs, vec![("transB", Attribute::Int(1))])
}

/// `x` (f16) as FLOAT8E4M3FN makes of it: divided by `scale`, rounded, what is beyond 448 brought to it, multiplied again.
///
/// ```text
/// x -> QuantizeLinear(scale, zero point 0) -> FLOAT8E4M3FN -> DequantizeLinear(scale, zero point 0) -> f16
/// ```
pub(crate) fn through_float8(graph: &mut GraphBuilder<'_>, name: &str, x: &Value, scale: f16) -> Value {
    let scale_name = format!("{}.input_scale", name.trim_start_matches('/'));
    let scale = graph.constant_float(&scale_name, &[], &[scale.to_f32()]);
    let zero = float8_zero(graph);
    let quantized = graph.node("QuantizeLinear", &format!("{name}/QuantizeLinear"), &[x, &scale, &zero], vec![]);
    dequantize_float8(graph, name, &quantized, &scale)
}

fn dequantize_float8(graph: &mut GraphBuilder<'_>, name: &str, x: &Value, scale: &Value) -> Value {
    let zero = float8_zero(graph);
    graph.node("DequantizeLinear", &format!("{name}/DequantizeLinear"), &[x, scale, &zero], vec![])
}

/// The zero point says the type: without it TensorRT's parser takes int8 (onnx-tensorrt 10.1), ONNX u8.
fn float8_zero(graph: &mut GraphBuilder<'_>) -> Value {
    let name = "/constants/f8e4m3_zero";
    graph.once(name, |graph| graph.constant_bytes(name, DataType::F8E4M3, &[], vec![0]))
}

/// CUDA's provider (1.31.1) has kernels for our forms, 8 bits in blocks of 128 and 4 bits in blocks of 32 with packed u8 zero
/// points, in f32, f16 and bf16 with scales of the same type. By its source (a copy of unknown date; the wheel's kernels fit it) a
/// fused kernel, which reads the integers once, runs where N and K are multiples of 8: for up to 16 rows with 4 bits, for up to 5
/// rows with 8 bits, where K must be whole blocks. With more rows all weights become floats in a scratch buffer, in every run, and
/// cuBLAS multiplies. Not measured.
fn matmul_n_bits<'c>(
    graph: &mut GraphBuilder<'c>,
    name: &str,
    x: &Value,
    weight: Weight<'c>,
    format: BlockFormat,
) -> Value {
    let (num_rows, row_size) = (weight.num_rows() as i64, weight.row_size() as i64);
    let weights = graph.block_weight(&format!("{}.weight", name.trim_start_matches('/')), weight, format);
    let inputs: Vec<&Value> = std::iter::once(x).chain(&weights).collect();
    graph.contrib_node(
        "MatMulNBits",
        &format!("{name}/MatMulNBits"),
        &inputs,
        vec![
            ("K", Attribute::Int(row_size)),
            ("N", Attribute::Int(num_rows)),
            ("bits", Attribute::Int(i64::from(format.bits))),
            ("block_size", Attribute::Int(format.block_size as i64)),
            // Activations in int8, a scale per block: without it 8-bit decoding is two orders of magnitude slower.
            ("accuracy_level", Attribute::Int(4)),
        ],
    )
}

/// `(x - zero_point) W^T * weight scales`, u8 `[rows, K]` to f32 `[rows, N]`; the integer sums are exact.
pub(crate) fn q_gemm<'c>(
    graph: &mut GraphBuilder<'c>,
    name: &str,
    x: &Value,
    zero_point: u8,
    weight: Weight<'c>,
    max_weight: u8,
) -> Value {
    let num_rows = weight.num_rows();
    let (weight, weight_scale) =
        graph.int8_weight(&format!("{}.weight", name.trim_start_matches('/')), weight, max_weight);
    let one = constant_once(graph, "/constants/one_f32", 1.0);
    let zero_point_name = format!("/constants/u8_{zero_point}");
    let zero_point = graph
        .once(&zero_point_name, |graph| graph.constant_bytes(&zero_point_name, DataType::U8, &[], vec![zero_point]));
    let zeros_name = format!("/constants/s8_zeros_{num_rows}");
    let zeros = graph
        .once(&zeros_name, |graph| graph.constant_bytes(&zeros_name, DataType::I8, &[num_rows], vec![0; num_rows]));
    graph.contrib_node(
        "QGemm",
        &format!("{name}/QGemm"),
        &[x, &one, &zero_point, &weight, &weight_scale, &zeros],
        vec![("transB", Attribute::Int(1))],
    )
}
