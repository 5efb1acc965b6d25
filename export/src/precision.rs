//! Which precision goes with which target, and what that means for each graph.

use crate::ExportOptions;
use crate::error::{Error, Result};
use crate::graph::DataType;
use crate::lint::GpuProvider;
use crate::manifest::{Precision, Target};
use crate::quantize::{BlockFormat, Rounding};

/// Values per block of `int8-block`.
const INT8_BLOCK: usize = 128;
/// Values per block of `int8` with target cpu: activations and weights.
const PACKED_BLOCK: usize = 128;
/// Values per block of `int4`.
const INT4_BLOCK: usize = 32;

/// What one graph is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GraphFormat {
    /// Whose operators the graph is made of.
    pub(crate) target: Target,
    /// What the bundle is for.
    bundle: Target,
    /// Type of activations, norms, and what is not quantised.
    pub(crate) float: DataType,
    /// Linear layers.
    pub(crate) linear: LinearFormat,
    /// The decoder's projections to queries, keys and values: a tenth of an 8B's weights, and the most sensitive.
    pub(crate) attention_input: LinearFormat,
    /// The logits head.
    pub(crate) head: LinearFormat,
    /// Type of the embedding table.
    pub(crate) embedding: DataType,
}

/// How a linear layer stores its weights and multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum LinearFormat {
    /// In the graph's float type.
    Float,
    /// FLOAT8E4M3FN activations and weights through `QuantizeLinear` and `DequantizeLinear`, each tensor with one scale.
    Float8,
    /// u8 activations with a scale per row, s8 weights with a scale per column, exact integer sums.
    Int8 {
        /// Largest weight: 127, or 63 for processors whose u8 x s8 sums saturate.
        max_weight: u8,
    },
    /// `MatMulNBits`.
    Blocks(BlockFormat),
    /// `recaption.QuantizedLinear`: u8 activations, s8 weights, each with a scale per block along a row, or one for the row.
    Packed {
        /// Values that share a scale; 0 for whole rows.
        block: usize,
        /// Whether the weights are [`PackSpec::bounded`](recaption_kernels::PackSpec::bounded).
        bounded: bool,
    },
}

impl LinearFormat {
    pub(crate) fn has_4_bits(self) -> bool {
        matches!(self, Self::Blocks(BlockFormat { bits: 4, .. }))
    }
}

impl GraphFormat {
    /// The format of what reads tokens.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a precision that the target or the activations do not go with.
    pub(crate) fn of(options: &ExportOptions) -> Result<Self> {
        Self::with(options, options.precision, false)
    }

    /// The format of a graph whose weights have `precision`, which for what reads images has a flag of its own.
    fn with(options: &ExportOptions, precision: Precision, is_vision: bool) -> Result<Self> {
        let flag = if is_vision { "--vision-precision" } else { "--precision" };
        let ExportOptions { target, activations, rounding, reduce_range, .. } = *options;
        let float = match (precision, activations) {
            (Precision::Fp32 | Precision::Int8, None | Some(Precision::Fp32)) => DataType::F32,
            (Precision::Fp16 | Precision::Fp8, None | Some(Precision::Fp16)) => DataType::F16,
            (Precision::Bf16, None | Some(Precision::Bf16)) => DataType::BF16,
            (Precision::Int8Block | Precision::Int4, None | Some(Precision::Fp32)) => DataType::F32,
            (Precision::Int8Block | Precision::Int4, Some(Precision::Fp16)) => DataType::F16,
            (_, Some(activations)) => {
                let hint = "int8-block and int4 take fp32 or fp16; the other precisions fix their activations";
                return Err(Error::unsupported(
                    &format!("--activations {}", activations.name()),
                    format!("with {flag} {}", precision.name()),
                    hint,
                ));
            }
        };
        let refusal = match (target, precision) {
            (Target::TensorRt, Precision::Int8 | Precision::Int8Block | Precision::Int4) => {
                Some("TensorRT takes fp32, fp16, bf16 and fp8 bundles; or export with --target ort")
            }
            (Target::Ort, Precision::Fp8) => Some("only TensorRT runs fp8: add --target tensorrt"),
            (Target::Cpu, Precision::Int8) => None,
            (Target::Cpu, _) if is_vision => {
                Some("leave it out: this project's CPU operators take int8 alone; or export with --target ort")
            }
            (Target::Cpu, _) => {
                Some("add --precision int8: this project's CPU operators take no other; or export with --target ort")
            }
            _ => None,
        };
        if let Some(hint) = refusal {
            let flag = format!("{flag} {}", precision.name());
            return Err(Error::unsupported(&flag, format!("with --target {}", target.name()), hint));
        }
        let blocks = |bits, block_size| LinearFormat::Blocks(BlockFormat { bits, block_size, scale: float, rounding });
        let int8_block = blocks(8, INT8_BLOCK);
        let (linear, head, embedding) = match precision {
            Precision::Fp32 | Precision::Fp16 | Precision::Bf16 => (LinearFormat::Float, LinearFormat::Float, float),
            Precision::Int8 if target == Target::Cpu => {
                let packed = LinearFormat::Packed { block: PACKED_BLOCK, bounded: reduce_range };
                (packed, packed, DataType::F16)
            }
            Precision::Fp8 => (LinearFormat::Float8, LinearFormat::Float, float),
            Precision::Int8 => {
                let max_weight = if reduce_range { 63 } else { 127 };
                (LinearFormat::Int8 { max_weight }, int8_block, DataType::F16)
            }
            Precision::Int8Block => (int8_block, int8_block, DataType::F16),
            Precision::Int4 => (blocks(4, INT4_BLOCK), int8_block, DataType::F16),
        };
        let has_wider_attention = precision == Precision::Int4 && rounding == Rounding::Search;
        let attention_input = if has_wider_attention { int8_block } else { linear };
        Ok(Self { target, bundle: target, float, linear, attention_input, head, embedding })
    }

    /// As [`Self::of`], for what reads images. A tower of floats has standard operators in every bundle, so that TensorRT takes it
    /// beside a decoder of ONNX Runtime's operators, which CUDA takes. ONNX Runtime fuses them when it loads the graph: CLIP-L's
    /// then has the same nodes as one written with fused operators, gives the same bits and takes the same time (1.31.1 on a CPU).
    ///
    /// # Errors
    /// Those of [`Self::of`].
    pub(crate) fn of_vision(options: &ExportOptions, precision: Precision) -> Result<Self> {
        let format = Self::with(options, precision, true)?;
        match format.linear {
            LinearFormat::Float => Ok(Self { target: Target::TensorRt, ..format }),
            // Its activations have few outliers: one scale for a row does.
            LinearFormat::Packed { bounded, .. } => {
                Ok(Self { linear: LinearFormat::Packed { block: 0, bounded }, ..format })
            }
            _ => Ok(format),
        }
    }
}

impl GraphFormat {
    /// Type of the KV cache's elements.
    pub(crate) fn cache(self) -> DataType {
        match self.target {
            Target::Cpu => DataType::F16,
            Target::Ort | Target::TensorRt => self.float,
        }
    }

    /// The GPU providers that a graph of this format is for: int8 has kernels on the CPU only.
    pub(crate) fn gpu_providers(self) -> &'static [GpuProvider] {
        match (self.bundle, self.target, self.linear) {
            (Target::TensorRt, ..) => &[GpuProvider::TensorRt],
            (Target::Ort, Target::TensorRt, _) => &[GpuProvider::Cuda, GpuProvider::TensorRt],
            (
                Target::Ort,
                Target::Ort,
                LinearFormat::Int8 { .. } | LinearFormat::Float8 | LinearFormat::Packed { .. },
            ) => &[],
            (Target::Cpu, ..) | (_, Target::Cpu, _) => &[],
            (Target::Ort, Target::Ort, LinearFormat::Float | LinearFormat::Blocks(_)) => &[GpuProvider::Cuda],
        }
    }
}

impl Precision {
    /// The vision tower's precision beside a decoder of this one: weights of 4 bits cost the small tower more quality than
    /// they save, and what fp8 takes of its activations was not learned.
    pub(crate) fn default_for_vision(self) -> Self {
        match self {
            Self::Int4 => Self::Int8Block,
            Self::Fp8 => Self::Fp16,
            other => other,
        }
    }
}
