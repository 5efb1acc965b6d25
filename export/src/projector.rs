//! The projector as a graph: `vision_features` `[batch, num_image_tokens, feature_size]` to `image_features`
//! `[rows, hidden]`, one row per image token, images one after the other.

use crate::checkpoint::{Checkpoint, Part};
use crate::config::LlavaConfig;
use crate::error::Result;
use crate::graph::{Attribute, DataType, GraphBuilder};
use crate::linear::Linear;

/// Builds the projector's graph.
///
/// ```text
/// vision_features -> Reshape [rows, feature_size] -> linear_1 -> act -> linear_2 -> image_features
/// ```
pub(crate) fn build<'c>(checkpoint: &'c Checkpoint, config: &LlavaConfig) -> Result<GraphBuilder<'c>> {
    let feature_size = config.vision.feature_size();
    let hidden_size = config.decoder.hidden_size;
    let mut graph = GraphBuilder::new("projector");
    let find = |name, features| Linear::find(checkpoint, Part::Projector, name, features, config.projector.bias);
    let linear_1 = find("linear_1", (feature_size, hidden_size))?;
    let linear_2 = find("linear_2", (hidden_size, hidden_size))?;

    let shape = vec!["batch".into(), config.vision.num_image_tokens().into(), feature_size.into()];
    let features = graph.input("vision_features", DataType::F32, shape);
    let rows = graph.shape(&[-1, feature_size as i64]);
    let rows = graph.node("Reshape", "/Reshape", &[&features, &rows], vec![]);
    let widened = linear_1.build(&mut graph, &rows);
    let activated = config.projector.activation.build(&mut graph, "/act", &widened);
    let projected = linear_2.build(&mut graph, &activated);
    let output = graph.output("image_features", DataType::F32, vec!["rows".into(), hidden_size.into()]);
    graph.node_named("", "Identity", "/Identity", &[&projected], &[output], Vec::<(&str, Attribute)>::new());
    Ok(graph)
}
