//! Whether TensorRT's ONNX parser takes every node of a graph, by the table of `data/tensorrt_operators.json`: the oldest
//! version that graphs are for, so that later ones take them too.

use std::collections::HashSet;
use std::sync::LazyLock;

use serde::Deserialize;

use super::schema::infer;
use super::{Graph, Problem};

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
    max_outputs: Option<usize>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let text = include_str!("../../data/tensorrt_operators.json");
    serde_json::from_str(text).expect("bug: data/tensorrt_operators.json is damaged")
});

pub(super) fn version() -> &'static str {
    &TABLE.version
}

pub(super) fn check(graph: &Graph<'_>) -> Vec<(String, Problem)> {
    let (types, nodes) = infer(graph);
    let constants: HashSet<&str> = graph.proto.initializer.iter().filter_map(|tensor| tensor.name.as_deref()).collect();
    let [first, last] = TABLE.opsets;
    let mut found = Vec::new();
    for (node, typed) in graph.proto.node.iter().zip(&nodes) {
        let mut note = |problem| found.push((node.name.clone().unwrap_or_default(), problem));
        let (op, input_types) = (&typed.op, types.of_inputs(node));
        let known = TABLE.operators.iter().find(|known| known.op == *op);
        let known = known.filter(|known| input_types.iter().all(|found| known.types.contains(found)));
        let Some(known) = known.filter(|_| (first..=last).contains(&typed.opset)) else {
            note(typed.type_problem().filter(|_| known.is_some()).unwrap_or_else(|| Problem::NoKernel {
                op: op.clone(),
                opset: typed.opset,
                types: input_types,
            }));
            continue;
        };
        if let Some(problem) = typed.type_problem() {
            note(problem);
        }
        for &index in &known.constant_inputs {
            if let Some(value) = node.input.get(index).filter(|value| !constants.contains(value.as_str())) {
                note(Problem::NotConstant { op: op.clone(), input: value.clone() });
            }
        }
        if known.max_outputs.is_some_and(|max| node.output.len() > max) {
            note(Problem::ExtraOutput { op: op.clone() });
        }
    }
    found
}
