//! Whether all shapes of a graph follow from the named dimensions of its inputs, and whether those are known ranges.

use std::collections::{BTreeMap, HashSet};

use super::schema::Schema;
use super::{Graph, Notes, Problem, op_name};
use crate::manifest::DimRange;
use crate::proto::{Dimension, ValueInfoProto};

/// Operators that give as many elements as they find.
const DATA_DEPENDENT: &[&str] =
    &["Compress", "NonMaxSuppression", "NonZero", "SequenceAt", "SplitToSequence", "StringSplit", "Unique"];
/// Operators with an input that is their output's shape, or decides it: that must be made of shapes and initialisers.
const SHAPED_BY_INPUT: &[&str] =
    &["Expand", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Unsqueeze"];

pub(super) fn check(graph: &Graph<'_>, profile: &BTreeMap<String, DimRange>) -> Notes {
    let proto = graph.proto;
    let mut notes = Notes::default();
    proto.input.iter().chain(&proto.output).for_each(|info| note_dimensions(info, profile, &mut notes));
    let mut shapes: HashSet<&str> = proto.initializer.iter().filter_map(|tensor| tensor.name.as_deref()).collect();
    for node in &proto.node {
        let op = op_name(node);
        let is_shape = |value: &String| value.is_empty() || shapes.contains(value.as_str());
        if DATA_DEPENDENT.contains(&op.as_str()) {
            notes.at_node(node, Problem::DataDependentShape { op: op.clone(), input: None });
        } else if SHAPED_BY_INPUT.contains(&op.as_str()) {
            let schema = Schema::find(&op, graph.opset(&op));
            let deciding = schema.map_or(&[][..], |schema| &schema.host_inputs);
            let deciding = deciding.iter().filter_map(|&index| node.input.get(index));
            for value in deciding.filter(|value| !is_shape(value)) {
                let problem = Problem::DataDependentShape { op: op.clone(), input: Some(value.clone()) };
                notes.at_node(node, problem);
            }
        }
        if op == "Shape" || node.input.iter().all(is_shape) {
            shapes.extend(node.output.iter().map(String::as_str));
        }
    }
    notes
}

fn note_dimensions(info: &ValueInfoProto, profile: &BTreeMap<String, DimRange>, notes: &mut Notes) {
    let name = info.name.as_deref().unwrap_or_default();
    let shape = info.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.shape.as_ref());
    let Some(shape) = shape else { return notes.at(name, Problem::UnnamedDimension { axis: 0 }) };
    for (axis, dim) in shape.dim.iter().enumerate() {
        match &dim.value {
            Some(Dimension::Value(size)) if *size >= 0 => (),
            Some(Dimension::Param(dim)) if profile.contains_key(dim) => (),
            Some(Dimension::Param(dim)) if !dim.is_empty() => notes.at(name, Problem::NoRange { dim: dim.clone() }),
            _ => notes.at(name, Problem::UnnamedDimension { axis }),
        }
    }
}
