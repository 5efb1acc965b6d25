//! The one place that decides how a linear layer is spelled. In fp32 it is `Gemm` with `transB`: the weight keeps its
//! `[out, in]` layout, so its bytes stream from the checkpoint unchanged and fused layers are plain concatenations.
//! ONNX Runtime prepacks it as it would a `MatMul`; both ran at the same speed for 1 to 640 rows.

use crate::checkpoint::{Checkpoint, Part, StoredTensor};
use crate::error::Result;
use crate::graph::{Attribute, GraphBuilder, Value};

/// A linear layer of the checkpoint: `{name}.weight` `[out_features, in_features]` and, if any, `{name}.bias`.
pub(crate) struct Linear<'c> {
    pub(crate) name: String,
    weight: Vec<StoredTensor<'c>>,
    bias: Vec<StoredTensor<'c>>,
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
        let weight = vec![checkpoint.tensor(part, &format!("{name}.weight"), &[out_features, in_features])?];
        let bias = match has_bias {
            true => vec![checkpoint.tensor(part, &format!("{name}.bias"), &[out_features])?],
            false => vec![],
        };
        Ok(Self { name: format!("/{}", name.replace("model.", "")), weight, bias })
    }

    /// Appends the outputs of another layer with the same input.
    pub(crate) fn then(mut self, other: Self, fused_name: String) -> Self {
        self.weight.extend(other.weight);
        self.bias.extend(other.bias);
        self.name = fused_name;
        self
    }

    /// `x [rows, in_features]` to `[rows, out_features]`.
    pub(crate) fn build(self, graph: &mut GraphBuilder<'c>, x: &Value) -> Value {
        let name = self.name.trim_start_matches('/').replace('/', ".");
        let weight = graph.weight(&format!("{name}.weight"), self.weight);
        let mut inputs = vec![x.clone(), weight];
        if !self.bias.is_empty() {
            inputs.push(graph.weight(&format!("{name}.bias"), self.bias));
        }
        let inputs: Vec<&Value> = inputs.iter().collect();
        graph.node("Gemm", &format!("{}/Gemm", self.name), &inputs, vec![("transB", Attribute::Int(1))])
    }
}
