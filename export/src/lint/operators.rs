//! The operators that a target has: what a graph uses is checked against the list before it is written, and again by
//! `recaption inspect` on what stands on the disk.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::graph::MICROSOFT;
use crate::manifest::Target;
use crate::proto::NodeProto;

/// Standard operators of both targets, all of them in the tables of CUDA's kernels and of TensorRT's ONNX parser.
const STANDARD: &[&str] = &[
    "Add",
    "And",
    "ArgMax",
    "Cast",
    "Concat",
    "Conv",
    "DequantizeLinear",
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
    "QuantizeLinear",
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
    "RMSNormalization",
    "ReduceMax",
    "com.microsoft.FusedMatMul",
    "com.microsoft.GroupQueryAttention",
    "com.microsoft.MatMulNBits",
    "com.microsoft.QGemm",
    "com.microsoft.QuickGelu",
    "com.microsoft.SkipSimplifiedLayerNormalization",
];

/// This project's own.
const OWN_ONLY: &[&str] =
    &["recaption.Attention", "recaption.CachedAttention", "recaption.GreedyIds", "recaption.QuantizedLinear"];

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
    let further = match target {
        Target::Ort => ORT_ONLY,
        Target::Cpu => OWN_ONLY,
        Target::TensorRt => &[],
    };
    let has = |op: &str| STANDARD.contains(&op) || further.contains(&op);
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

#[cfg(test)]
mod tests {
    use super::super::schema::Schema;
    use super::super::tensorrt;
    use super::*;

    fn node(domain: &str, op_type: &str) -> NodeProto {
        NodeProto {
            name: Some(format!("/{op_type}")),
            op_type: Some(op_type.to_owned()),
            domain: Some(domain.to_owned()),
            ..Default::default()
        }
    }

    #[test]
    fn the_tables_know_what_is_allowed() {
        for op in STANDARD {
            assert!(Schema::find(op, Target::Ort.opset()).is_some_and(|schema| !schema.kernels.is_empty()), "{op}");
            assert!(Schema::find(op, Target::TensorRt.opset()).is_some() && tensorrt::has(op), "{op}");
        }
        for op in ORT_ONLY {
            let opset = if op.contains('.') { 1 } else { Target::Ort.opset() };
            assert!(Schema::find(op, opset).is_some(), "{op}");
        }
    }

    #[test]
    fn operators_count_by_domain() {
        let nodes = [node("", "Add"), node("ai.onnx", "Add"), node(MICROSOFT, "Add"), NodeProto::default()];
        let counts = count_ops(&nodes);
        assert_eq!(counts, [("Add", 2), ("com.microsoft.Add", 1), ("", 1)].map(|(op, n)| (op.to_owned(), n)).into());
    }

    #[test]
    fn a_target_has_its_own_operators_only() {
        let fused = [node("", "Add"), node(MICROSOFT, "GroupQueryAttention")];
        assert!(check("decoder", &fused, Target::Ort).is_ok());
        let error = check("decoder", &fused, Target::TensorRt).expect_err("not TensorRT's");
        let expected = "`decoder` node `/GroupQueryAttention`: operator `com.microsoft.GroupQueryAttention` is not one of \
                        target tensorrt";
        assert_eq!(error.to_string(), expected);
        let own = node("recaption", "QuantizedLinear");
        assert!(check("decoder", std::slice::from_ref(&own), Target::Cpu).is_ok());
        assert!(check("decoder", std::slice::from_ref(&own), Target::Ort).is_err());
        assert!(check("decoder", &fused, Target::Cpu).is_err());
        // A standard name in another domain is another operator, and so is one with a subgraph.
        for foreign in [node(MICROSOFT, "Add"), node("", "If"), node("evil", "Add"), NodeProto::default()] {
            assert!(check("decoder", std::slice::from_ref(&foreign), Target::Ort).is_err(), "{foreign:?}");
        }
    }
}
