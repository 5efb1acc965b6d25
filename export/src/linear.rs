//! The one place that decides how a linear layer is spelled. In fp32 it is `Gemm` with `transB`: the weight keeps its
//! `[out, in]` layout, so its bytes stream from the checkpoint unchanged and fused layers are plain concatenations.
//! ONNX Runtime prepacks it as it would a `MatMul`; both ran at the same speed for 1 to 640 rows.

use crate::checkpoint::{Checkpoint, Part};
use crate::error::Result;
use crate::graph::{Attribute, GraphBuilder, Value, WeightPart};
use crate::tensor::StoredTensor;

/// A linear layer of the checkpoint: `{name}.weight` `[out_features, in_features]` and, if any, `{name}.bias`.
pub(crate) struct Linear<'c> {
    pub(crate) name: String,
    in_features: usize,
    weight: Vec<WeightPart<'c>>,
    bias: Vec<WeightPart<'c>>,
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
        let parts = |tensor: StoredTensor<'c>| match padding {
            Some(padding) => padding.apply(&tensor),
            None => vec![WeightPart::Stored(tensor)],
        };
        let weight = parts(checkpoint.tensor(part, &format!("{name}.weight"), &[out_features, in_features])?);
        let bias = match has_bias {
            true => parts(checkpoint.tensor(part, &format!("{name}.bias"), &[out_features])?),
            false => vec![],
        };
        Ok(Self { name: format!("/{name}"), in_features, weight, bias })
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
        let name = self.name.trim_start_matches('/');
        let weight = graph.weight_of_parts(&format!("{name}.weight"), self.weight, &[self.in_features]);
        let mut inputs = vec![x.clone(), weight];
        if !self.bias.is_empty() {
            inputs.push(graph.weight_of_parts(&format!("{name}.bias"), self.bias, &[]));
        }
        let inputs: Vec<&Value> = inputs.iter().collect();
        graph.node("Gemm", &format!("{}/Gemm", self.name), &inputs, vec![("transB", Attribute::Int(1))])
    }
}
