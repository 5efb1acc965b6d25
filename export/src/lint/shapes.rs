//! Whether all shapes of a graph follow from the named dimensions of its inputs, and whether those are known ranges.

use std::collections::{BTreeMap, HashSet};

use super::schema::Schema;
use super::{Graph, Problem, op_name};
use crate::manifest::DimRange;
use crate::proto::{Dimension, ValueInfoProto};

/// Operators that give as many elements as they find.
const DATA_DEPENDENT: &[&str] =
    &["Compress", "NonMaxSuppression", "NonZero", "SequenceAt", "SplitToSequence", "StringSplit", "Unique"];
/// Operators with an input that is their output's shape, or decides it: that must be made of shapes and initialisers.
const SHAPED_BY_INPUT: &[&str] =
    &["Expand", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Unsqueeze"];

pub(super) fn check(graph: &Graph<'_>, profile: &BTreeMap<String, DimRange>) -> Vec<(String, Problem)> {
    let proto = graph.proto;
    let infos = proto.input.iter().chain(&proto.output);
    let mut found: Vec<_> = infos.flat_map(|info| dimensions(info, profile)).collect();
    let mut shapes: HashSet<&str> = proto.initializer.iter().filter_map(|tensor| tensor.name.as_deref()).collect();
    for node in &proto.node {
        let op = op_name(node);
        let place = node.name.clone().unwrap_or_default();
        if DATA_DEPENDENT.contains(&op.as_str()) {
            found.push((place, Problem::DataDependentShape { op, input: None }));
            continue;
        }
        let is_shape = |value: &String| value.is_empty() || shapes.contains(value.as_str());
        if SHAPED_BY_INPUT.contains(&op.as_str()) {
            let schema = Schema::find(&op, graph.opset(&op));
            let deciding = schema.map_or(&[][..], |schema| &schema.host_inputs);
            let deciding = node.input.iter().enumerate().filter(|(index, _)| deciding.contains(index));
            for (_, value) in deciding.filter(|(_, value)| !is_shape(value)) {
                let problem = Problem::DataDependentShape { op: op.clone(), input: Some(value.clone()) };
                found.push((place.clone(), problem));
            }
        }
        if op == "Shape" || node.input.iter().all(is_shape) {
            shapes.extend(node.output.iter().map(String::as_str));
        }
    }
    found
}

fn dimensions(info: &ValueInfoProto, profile: &BTreeMap<String, DimRange>) -> Vec<(String, Problem)> {
    let name = info.name.clone().unwrap_or_default();
    let shape = info.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.shape.as_ref());
    let Some(shape) = shape else { return vec![(name, Problem::UnnamedDimension { axis: 0 })] };
    let problem = |(axis, value): (usize, &Option<Dimension>)| match value {
        Some(Dimension::Value(size)) if *size >= 0 => None,
        Some(Dimension::Param(dim)) if profile.contains_key(dim) => None,
        Some(Dimension::Param(dim)) if !dim.is_empty() => Some(Problem::NoRange { dim: dim.clone() }),
        _ => Some(Problem::UnnamedDimension { axis }),
    };
    let problems = shape.dim.iter().map(|dim| &dim.value).enumerate().filter_map(problem);
    problems.map(|problem| (name.clone(), problem)).collect()
}
