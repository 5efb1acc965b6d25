//! Activation functions under transformers' names (`ACT2FN`), and the nodes that compute them.

use crate::error::{Error, Result};
use crate::graph::{Attribute, GraphBuilder, Value};
use crate::manifest::Target;

/// An elementwise activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x * Phi(x)`.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`, OpenAI CLIP's.
    QuickGelu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// # Errors
    /// [`Error::Unsupported`] naming `setting` and the function.
    pub(crate) fn parse(setting: &str, name: &str) -> Result<Self> {
        match name {
            "gelu" => Ok(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Self::GeluTanh),
            "quick_gelu" => Ok(Self::QuickGelu),
            "silu" | "swish" => Ok(Self::Silu),
            "relu" => Ok(Self::Relu),
            other => Err(Error::unsupported(
                setting,
                format!("`{other}`"),
                "supported are gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, silu and relu",
            )),
        }
    }

    /// Its value, for calibration: GELU by its tanh approximation, which is within 1e-3.
    pub(crate) fn apply(self, x: f32) -> f32 {
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        match self {
            Self::Gelu | Self::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
            }
            Self::QuickGelu => x * sigmoid(1.702 * x),
            Self::Silu => x * sigmoid(x),
            Self::Relu => x.max(0.0),
        }
    }

    /// The nodes that compute it.
    pub(crate) fn build(self, graph: &mut GraphBuilder<'_>, name: &str, x: &Value) -> Value {
        match self {
            Self::Gelu => graph.node("Gelu", &format!("{name}/Gelu"), &[x], vec![]),
            Self::GeluTanh => {
                graph.node("Gelu", &format!("{name}/Gelu"), &[x], vec![("approximate", Attribute::Text("tanh"))])
            }
            Self::QuickGelu => quick_gelu(graph, name, x, 1.702),
            Self::Silu => quick_gelu(graph, name, x, 1.0),
            Self::Relu => graph.node("Relu", &format!("{name}/Relu"), &[x], vec![]),
        }
    }
}

/// `x * sigmoid(alpha x)`: one fused operator in ONNX Runtime, for CLIP's alpha and SiLU's alike.
fn quick_gelu(graph: &mut GraphBuilder<'_>, name: &str, x: &Value, alpha: f32) -> Value {
    if graph.format().target == Target::Ort {
        let alpha = vec![("alpha", Attribute::Float(alpha))];
        return graph.contrib_node("QuickGelu", &format!("{name}/QuickGelu"), &[x], alpha);
    }
    let scaled = match alpha == 1.0 {
        true => x.clone(),
        false => {
            let factor =
                graph.once("/constants/alpha", |graph| graph.constant_float("/constants/alpha", &[], &[alpha]));
            graph.node("Mul", &format!("{name}/Mul_alpha"), &[x, &factor], vec![])
        }
    };
    let gate = graph.node("Sigmoid", &format!("{name}/Sigmoid"), &[&scaled], vec![]);
    graph.node("Mul", &format!("{name}/Mul_gate"), &[x, &gate], vec![])
}
