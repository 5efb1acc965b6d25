//! CLIP's image tower as a graph: `pixel_values`, as the vision tower of a captioner takes them, to `image_embeds`
//! `[batch, projection_dim]` (f32), not normalised.

use super::checkpoint::ClipCheckpoint;
use super::config::ClipConfig;
use super::float_output;
use crate::error::Result;
use crate::graph::{Attribute, GraphBuilder};
use crate::linear::float_matmul;
use crate::precision::GraphFormat;
use crate::processor_config::Preprocessing;
use crate::vision_tower::Tower;

/// Builds the tower's graph.
///
/// ```text
/// pixel_values -> vision tower [B * tokens, C] -> class tokens [B, C] -> LN -> visual_projection -> image_embeds
/// ```
pub(super) fn build<'c>(
    checkpoint: &'c ClipCheckpoint,
    config: &ClipConfig,
    preprocessing: &Preprocessing,
    format: GraphFormat,
) -> Result<GraphBuilder<'c>> {
    let tensors = checkpoint.tower("vision_model.");
    let mut tower = Tower::new("image_tower", &tensors, &config.vision, format);
    let mut hidden = tower.embed(preprocessing)?;
    for layer in 0..config.vision.num_layers() {
        hidden = tower.encoder.layer(layer, &hidden)?;
    }
    let (num_tokens, hidden_size) = (config.vision.num_patches() as i64 + 1, config.vision.hidden_size);
    let mut encoder = tower.encoder;
    let graph = &mut encoder.graph;
    let batched = graph.shape(&[-1, num_tokens, hidden_size as i64]);
    let hidden = graph.node("Reshape", "/pool/Reshape", &[&hidden, &batched], vec![]);
    let first = graph.constant_i64("/constants/first", &[], &[0]);
    let class = graph.node("Gather", "/pool/Gather", &[&hidden, &first], vec![("axis", Attribute::Int(1))]); // [B, C]
    let class = encoder.layer_norm("post_layernorm", &class)?;

    let mut graph = encoder.graph;
    let is_linear = checkpoint.layout.projections_are_linear();
    let (inputs, outputs) = (hidden_size, config.projection_dim);
    let shape = if is_linear { [outputs, inputs] } else { [inputs, outputs] };
    let projection = checkpoint.tensor("visual_projection.weight", &shape)?;
    let embeds = float_matmul(&mut graph, "visual_projection", &class, projection, is_linear);
    float_output(&mut graph, "image_embeds", &embeds, outputs);
    Ok(graph)
}
