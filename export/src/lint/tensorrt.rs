//! Whether TensorRT's ONNX parser takes every node of a graph, by the table of `data/tensorrt_operators.json`: the oldest
//! version that graphs are for, so that later ones take them too.

use std::collections::HashSet;
use std::sync::LazyLock;

use serde::Deserialize;

use super::schema::infer;
use super::{Graph, Notes, Problem};
use crate::proto::TensorProto;

#[derive(Deserialize)]
struct Table {
    version: String,
    /// First and last version of the standard operators.
    opsets: [i64; 2],
    operators: Vec<Operator>,
}

#[derive(Deserialize)]
struct Operator {
    op: String,
    types: Vec<String>,
    /// Inputs that must be initialisers.
    #[serde(default)]
    constant_inputs: Vec<usize>,
    /// Inputs of which all bytes must be zero.
    #[serde(default)]
    zero_inputs: Vec<usize>,
    max_outputs: Option<usize>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let text = include_str!("../../data/tensorrt_operators.json");
    serde_json::from_str(text).expect("bug: data/tensorrt_operators.json is damaged")
});

pub(super) fn version() -> &'static str {
    &TABLE.version
}

#[cfg(test)]
pub(super) fn has(op: &str) -> bool {
    TABLE.operators.iter().any(|known| known.op == op)
}

pub(super) fn check(graph: &Graph<'_>) -> Notes {
    let (types, nodes) = infer(graph);
    let constants: HashSet<&str> = graph.proto.initializer.iter().filter_map(|tensor| tensor.name.as_deref()).collect();
    // What lies in the data file is not known here, and too large for a zero point of ours.
    let is_not_zero = |tensor: &&TensorProto| tensor.raw_data.iter().flatten().any(|byte| *byte != 0);
    let not_zero = graph.proto.initializer.iter().filter(is_not_zero);
    let not_zero: HashSet<&str> = not_zero.filter_map(|tensor| tensor.name.as_deref()).collect();
    let [first, last] = TABLE.opsets;
    let mut notes = Notes::default();
    for (node, typed) in graph.proto.node.iter().zip(&nodes) {
        let op = &typed.op;
        if let Some(problem) = typed.type_problem() {
            notes.at_node(node, problem);
            continue;
        }
        let types = types.of_inputs(node);
        let takes = |known: &&Operator| known.op == *op && types.iter().all(|found| known.types.contains(found));
        let known = TABLE.operators.iter().find(takes).filter(|_| (first..=last).contains(&typed.opset));
        let Some(known) = known else {
            notes.at_node(node, Problem::NoKernel { op: op.clone(), opset: typed.opset, types });
            continue;
        };
        let constant_inputs = known.constant_inputs.iter().filter_map(|&index| node.input.get(index));
        for value in constant_inputs.filter(|value| !constants.contains(value.as_str())) {
            notes.at_node(node, Problem::NotConstant { op: op.clone(), input: value.clone() });
        }
        let zero_inputs = known.zero_inputs.iter().filter_map(|&index| node.input.get(index));
        for value in zero_inputs.filter(|value| not_zero.contains(value.as_str())) {
            notes.at_node(node, Problem::NotZero { op: op.clone(), input: value.clone() });
        }
        if known.max_outputs.is_some_and(|max| node.output.len() > max) {
            notes.at_node(node, Problem::ExtraOutput { op: op.clone() });
        }
    }
    notes
}
