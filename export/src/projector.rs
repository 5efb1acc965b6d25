//! The projector as a graph: `vision_features` `[batch, num_image_tokens, feature_size]` to `image_features`
//! `[rows, hidden]`, one row per image token, images one after the other.

use crate::checkpoint::{Checkpoint, Part};
use crate::config::LlavaConfig;
use crate::error::Result;
use crate::graph::{Attribute, DataType, GraphBuilder};
use crate::linear::{Around, Linear, LinearInput};
use crate::manifest::Target;
use crate::precision::GraphFormat;
use crate::vision_tower::BATCH_RANGE;

/// Builds the projector's graph; `features` is the float type that the decoder takes.
///
/// ```text
/// vision_features -> Reshape [rows, feature_size] -> linear_1 -> act -> linear_2 -> image_features
/// ```
pub(crate) fn build<'c>(
    checkpoint: &'c Checkpoint,
    config: &LlavaConfig,
    format: GraphFormat,
    features: DataType,
) -> Result<GraphBuilder<'c>> {
    let feature_size = config.vision.feature_size();
    let hidden_size = config.decoder.hidden_size;
    let mut graph = GraphBuilder::new("projector", format);
    graph.dim_range("batch", BATCH_RANGE);
    let (min, opt, max) = BATCH_RANGE;
    let num_image_tokens = config.vision.num_image_tokens();
    graph.dim_range("rows", (min * num_image_tokens, opt * num_image_tokens, max * num_image_tokens));
    let find = |name, features| Linear::find(checkpoint, Part::Projector, name, features, config.projector.bias);
    let linear_1 = find("linear_1", (feature_size, hidden_size))?;
    let linear_2 = find("linear_2", (hidden_size, hidden_size))?;

    let shape = vec!["batch".into(), num_image_tokens.into(), feature_size.into()];
    let vision_features = graph.input("vision_features", format.float, shape);
    let rows = graph.shape(&[-1, feature_size as i64]);
    let rows = graph.node("Reshape", "/Reshape", &[&vision_features, &rows], vec![]);
    let output = graph.output("image_features", features, vec!["rows".into(), hidden_size.into()]);
    if format.target == Target::Cpu {
        let around = Around { activation: Some(config.projector.activation), ..Around::default() };
        let activated = linear_1.build_packed(&mut graph, format.linear, &rows, around);
        let around = Around { output: Some(output), ..Around::default() };
        linear_2.build_packed(&mut graph, format.linear, &activated, around);
        return Ok(graph);
    }
    let rows = LinearInput::new(&mut graph, format.linear, "/linear_1", &rows);
    let widened = linear_1.build(&mut graph, &rows);
    let activated = config.projector.activation.build(&mut graph, "/act", &widened);
    let activated = LinearInput::new(&mut graph, format.linear, "/linear_2", &activated);
    let projected = linear_2.build(&mut graph, &activated);
    let to_features = vec![("to", Attribute::Int(features as i64))];
    let (op, attributes) = if features == format.float { ("Identity", vec![]) } else { ("Cast", to_features) };
    graph.node_named("", op, "/image_features", &[&projected], &[output], attributes);
    Ok(graph)
}
