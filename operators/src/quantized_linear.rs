//! `QuantizedLinear`: `activation(norm(x) W^T + bias) + residual`, with activations and weights of 8 bits.
//!
//! Inputs: `x` `[rows, k]` (f32, or u8 samples); packed weights, corrections and scales; then, each of them optional, the norm's
//! weight and bias `[k]`, the bias `[W's rows]`, the residual `[rows, columns]`. Output: f32 `[rows, columns]`.

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType::{Float32, Int8, Int32, Uint8};
use ort::value::{TensorElementType, ValueRef};
use recaption_kernels::{
    Activation, Epilogue, Norm, PackSpec, PackedWeights, Quantized, Residual, linear, quantize_rows,
};

use super::{Machine, SCRATCH, attribute, count, dims, elements, input, refuse};

/// For rows of f32, which it quantises.
pub(super) struct OfRows(pub(super) Machine);

/// For the samples of pictures, which count by themselves.
pub(super) struct OfSamples(pub(super) Machine);

const NAME: &str = "QuantizedLinear";

impl Operator for OfRows {
    type Kernel<'a> = RowsKernel;

    fn name(&self) -> &str {
        NAME
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        inputs(Float32)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'a>(&self, kernel: &KernelContext<'a>) -> ort::Result<RowsKernel> {
        RowsKernel::new(self.0, kernel)
    }
}

impl Operator for OfSamples {
    type Kernel<'a> = SamplesKernel;

    fn name(&self) -> &str {
        NAME
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        inputs(Uint8)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'a>(&self, kernel: &KernelContext<'a>) -> ort::Result<SamplesKernel> {
        RowsKernel::new(self.0, kernel).map(SamplesKernel)
    }
}

const X: usize = 0;
const WEIGHTS: usize = 1;
const CORRECTIONS: usize = 2;
const SCALES: usize = 3;
const NORM_WEIGHT: usize = 4;
const NORM_BIAS: usize = 5;
const BIAS: usize = 6;
const RESIDUAL: usize = 7;

fn inputs(x: TensorElementType) -> [OperatorInput; 8] {
    let required = [x, Int8, Int32, Float32].map(OperatorInput::required);
    let optional = [Float32; 4].map(OperatorInput::optional);
    let mut all = required.into_iter().chain(optional);
    std::array::from_fn(|_| all.next().expect("bug: eight inputs"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum NormKind {
    None,
    Rms,
    Layer,
}

pub(super) struct RowsKernel {
    machine: Machine,
    spec: PackSpec,
    activation: Activation,
    norm: NormKind,
    epsilon: f32,
}

pub(super) struct SamplesKernel(RowsKernel);

impl RowsKernel {
    fn new(machine: Machine, kernel: &KernelContext<'_>) -> ort::Result<Self> {
        let activation = match attribute::<String>(kernel, "activation")?.as_str() {
            "identity" => Activation::Identity,
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            "gelu_tanh" => Activation::GeluTanh,
            "swiglu" => Activation::SwiGlu,
            other => return Err(refuse(format!("unknown activation `{other}`"))),
        };
        let norm = match attribute::<String>(kernel, "norm")?.as_str() {
            "none" => NormKind::None,
            "rms" => NormKind::Rms,
            "layer" => NormKind::Layer,
            other => return Err(refuse(format!("unknown norm `{other}`"))),
        };
        let spec = PackSpec {
            columns: count(kernel, "columns")?,
            k: count(kernel, "k")?,
            block: count(kernel, "block")?,
            gated: activation == Activation::SwiGlu,
            // Graphs of before this was promised do not have it.
            bounded: kernel.get::<i64>("bounded") == Some(1),
        };
        spec.check().map_err(refuse)?;
        Ok(Self { machine, spec, activation, norm, epsilon: attribute(kernel, "epsilon")? })
    }

    /// The product of rows that are quantised.
    fn multiply(&self, context: &ComputeContext, x: &Quantized) -> ort::Result<()> {
        let (weights, corrections, scales) =
            (input(context, WEIGHTS)?, input(context, CORRECTIONS)?, input(context, SCALES)?);
        let weights = PackedWeights::new(self.spec, elements(&weights)?, elements(&corrections)?, elements(&scales)?);
        let (bias, residual) = (context.input(BIAS)?, context.input(RESIDUAL)?);
        let epilogue = Epilogue {
            bias: optional(bias.as_ref())?,
            activation: self.activation,
            residual: optional(residual.as_ref())?.map_or(Residual::None, Residual::Add),
        };
        let shape = [x.rows() as i64, self.spec.columns as i64];
        let Some(mut out) = context.output(0, shape)? else { return Ok(()) };
        let out = out.try_extract_tensor_mut::<f32>()?.1;
        let workers = self.machine.workers(context);
        linear(self.machine.level, &workers, x, &weights.map_err(refuse)?, &epilogue, out).map_err(refuse)
    }
}

fn optional<'v>(value: Option<&'v ValueRef<'_>>) -> ort::Result<Option<&'v [f32]>> {
    value.map(elements).transpose()
}

impl Kernel for RowsKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let PackSpec { k, block, .. } = self.spec;
        let x = input(context, X)?;
        let x = elements::<f32>(&x)?;
        let (norm_weight, norm_bias) = (context.input(NORM_WEIGHT)?, context.input(NORM_BIAS)?);
        let (norm_weight, norm_bias) = (optional(norm_weight.as_ref())?, optional(norm_bias.as_ref())?);
        let epsilon = self.epsilon;
        let norm = match (self.norm, norm_weight, norm_bias) {
            (NormKind::None, ..) => Norm::None,
            (NormKind::Rms, Some(weight), _) => Norm::Rms { weight, epsilon },
            (NormKind::Layer, Some(weight), Some(bias)) => Norm::Layer { weight, bias, epsilon },
            _ => return Err(refuse("the norm has no weights")),
        };
        SCRATCH.with_borrow_mut(|quantized| {
            let workers = self.machine.workers(context);
            quantize_rows(self.machine.level, &workers, (x, k), norm, block, quantized).map_err(refuse)?;
            self.multiply(context, quantized)
        })
    }
}

impl Kernel for SamplesKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let PackSpec { k, block, .. } = self.0.spec;
        let x = input(context, X)?;
        let [_, found] = dims(&x)?;
        if found != k || block != 0 {
            return Err(refuse(format!("samples in rows of {found}; weights of k {k}, block {block}")));
        }
        SCRATCH.with_borrow_mut(|samples| {
            samples.set_samples(elements(&x)?, k).map_err(refuse)?;
            self.0.multiply(context, samples)
        })
    }
}
