//! RMS and layer norms, for either target.

use crate::graph::{Attribute, DataType, GraphBuilder, MICROSOFT, Value};
use crate::manifest::Target;

/// `x / sqrt(mean(x^2) + epsilon) * weight` over the last axis.
pub(crate) fn rms_norm(graph: &mut GraphBuilder<'_>, name: &str, x: &Value, weight: &Value, epsilon: f32) -> Value {
    let format = graph.format();
    match format.target {
        Target::Ort => graph.node(
            "RMSNormalization",
            &format!("/{name}/RMSNormalization"),
            &[x, weight],
            vec![("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(epsilon))],
        ),
        Target::TensorRt | Target::Cpu => standard_rms_norm(graph, name, x, weight, epsilon),
    }
}

/// In f32 whatever the graph's type: squares overflow in fp16.
///
/// ```text
/// x -> Cast f32 -+-> Mul -> ReduceMean -> Add epsilon -> Sqrt -\
///                \----------------------------------------------+-> Div -> Cast -> Mul weight
/// ```
fn standard_rms_norm(graph: &mut GraphBuilder<'_>, name: &str, x: &Value, weight: &Value, epsilon: f32) -> Value {
    let float = graph.format().float;
    let last_axis = graph.shape(&[-1]);
    let epsilon_name = "/constants/rms_norm_eps";
    let epsilon = graph.once(epsilon_name, |graph| graph.constant_f32(epsilon_name, &[], &[epsilon]));
    let x = graph.cast(&format!("/{name}/to_f32"), x, float, DataType::F32);
    let squares = graph.node("Mul", &format!("/{name}/Mul"), &[&x, &x], vec![]);
    let mean = graph.node("ReduceMean", &format!("/{name}/ReduceMean"), &[&squares, &last_axis], vec![]);
    let mean = graph.node("Add", &format!("/{name}/Add"), &[&mean, &epsilon], vec![]);
    let root = graph.node("Sqrt", &format!("/{name}/Sqrt"), &[&mean], vec![]);
    let normed = graph.node("Div", &format!("/{name}/Div"), &[&x, &root], vec![]);
    let normed = graph.cast(&format!("/{name}/from_f32"), &normed, DataType::F32, float);
    graph.node("Mul", &format!("/{name}/Mul_1"), &[&normed, weight], vec![])
}

/// `x + skip` and its RMS norm: `(normed, sum)`.
pub(crate) fn skip_rms_norm(
    graph: &mut GraphBuilder<'_>,
    name: &str,
    (x, skip): (&Value, &Value),
    weight: &Value,
    epsilon: f32,
) -> (Value, Value) {
    if graph.format().target == Target::TensorRt {
        let sum = graph.node("Add", &format!("/{name}/Add_skip"), &[x, skip], vec![]);
        return (rms_norm(graph, name, &sum, weight, epsilon), sum);
    }
    let node = format!("/{name}/SkipSimplifiedLayerNormalization");
    let (normed, sum) = (GraphBuilder::output_of(&node, 0), GraphBuilder::output_of(&node, 3));
    let none = Value::none();
    graph.node_named(
        MICROSOFT,
        "SkipSimplifiedLayerNormalization",
        &node,
        &[x, skip, weight],
        &[normed.clone(), none.clone(), none, sum.clone()],
        vec![("epsilon", Attribute::Float(epsilon))],
    );
    (normed, sum)
}

/// Layer norm over the last axis. It is computed in f32 whatever the graph's type: that is the operator's `stash_type` unless it
/// says another, and TensorRT's parser hands it on (onnx-tensorrt 10.1, `setComputePrecision`).
pub(crate) fn layer_norm(
    graph: &mut GraphBuilder<'_>,
    name: &str,
    x: &Value,
    (weight, bias): (&Value, &Value),
    epsilon: f32,
) -> Value {
    let attributes = vec![("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(epsilon))];
    let node = format!("/{name}/LayerNormalization");
    graph.node("LayerNormalization", &node, &[x, weight, bias], attributes)
}
