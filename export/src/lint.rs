//! The operators that a target has: what a graph uses is checked against the list before it is written, and again by
//! `recaption inspect` on what stands on the disk.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::graph::MICROSOFT;
use crate::manifest::Target;
use crate::proto::NodeProto;

/// Standard operators of both targets. All of them are on the list of TensorRT's ONNX parser (onnx-tensorrt,
/// docs/operators.md, 10.0 and later) for the types used here.
const STANDARD: &[&str] = &[
    "Add",
    "And",
    "ArgMax",
    "Cast",
    "Concat",
    "Conv",
    "Div",
    "Expand",
    "Gather",
    "GatherND",
    "Gelu",
    "Gemm",
    "GreaterOrEqual",
    "Identity",
    "LayerNormalization",
    "Less",
    "LessOrEqual",
    "MatMul",
    "Max",
    "Min",
    "Mul",
    "Range",
    "ReduceMean",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Shape",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Sqrt",
    "Sub",
    "Transpose",
    "Unsqueeze",
    "Where",
];

/// Operators of ONNX Runtime's CPU and CUDA providers beside those.
const ORT_ONLY: &[&str] = &[
    "Abs",
    "QuantizeLinear",
    "RMSNormalization",
    "ReduceMax",
    "com.microsoft.FusedMatMul",
    "com.microsoft.GroupQueryAttention",
    "com.microsoft.MatMulNBits",
    "com.microsoft.QGemm",
    "com.microsoft.QuickGelu",
    "com.microsoft.SkipSimplifiedLayerNormalization",
];

/// A node's operator, with its domain where it is not the standard one.
pub(crate) fn op_name(node: &NodeProto) -> String {
    let op_type = node.op_type.as_deref().unwrap_or_default();
    match node.domain.as_deref() {
        None | Some("" | "ai.onnx") => op_type.to_owned(),
        Some(domain) => format!("{domain}.{op_type}"),
    }
}

/// How often each operator occurs.
pub(crate) fn count_ops(nodes: &[NodeProto]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    nodes.iter().for_each(|node| *counts.entry(op_name(node)).or_default() += 1);
    counts
}

/// # Errors
/// [`Error::ForeignOperator`] naming the first node whose operator `target` does not have.
pub(crate) fn check(graph: &str, nodes: &[NodeProto], target: Target) -> Result<()> {
    let has = |op: &str| STANDARD.contains(&op) || (target == Target::Ort && ORT_ONLY.contains(&op));
    match nodes.iter().find(|node| !has(&op_name(node))) {
        None => Ok(()),
        Some(node) => Err(Error::ForeignOperator {
            graph: graph.to_owned(),
            node: node.name.clone().unwrap_or_default(),
            op: op_name(node),
            target: target.name(),
        }),
    }
}

const _: () = assert!(MICROSOFT.len() == 13, "the names above spell the domain out");
