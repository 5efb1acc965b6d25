//! CLIP's text tower as a graph: `input_ids` `[batch, sequence]` (i64) to `text_embeds` `[batch, projection_dim]` (f32), not
//! normalised. A sequence may be as long as the context or shorter. Attention is causal and the embedding is that of the
//! end of the text, so what stands behind the end, padding, has no influence.

use super::checkpoint::ClipCheckpoint;
use super::config::{ClipConfig, TextConfig};
use super::float_output;
use super::manifest::EosRule;
use super::names::POSITIONS_RES;
use crate::encoder::Encoder;
use crate::error::Result;
use crate::graph::{Attribute, DataType, GraphBuilder, Value};
use crate::linear::float_matmul;
use crate::precision::GraphFormat;
use crate::vision_tower::BATCH_RANGE;
use crate::weight::{Weight, WeightPart};

/// Added to the score of a token that is not to be seen: after Softmax nothing is left of it, and with a score added it is
/// still within fp16's range.
const MASKED: f32 = -32_768.0;

/// Builds the tower's graph.
///
/// ```text
/// input_ids -+-> embeddings [B * S, C] -> encoder layers, causal -> [B, S, C] -\
///            \-> index of the end [B, 1] ---------------------------------------+-> GatherND [B, C]
///                                                             -> LN -> text_projection -> text_embeds
/// ```
pub(super) fn build<'c>(
    checkpoint: &'c ClipCheckpoint,
    config: &ClipConfig,
    format: GraphFormat,
) -> Result<GraphBuilder<'c>> {
    let ClipConfig { text, projection_dim, .. } = config;
    let mut graph = GraphBuilder::new("text_tower", format);
    graph.dim_range("batch", BATCH_RANGE);
    graph.dim_range("sequence", (1, text.context_length, text.context_length));
    let input_ids = graph.input("input_ids", DataType::I64, vec!["batch".into(), "sequence".into()]);
    let ids_shape = graph.node("Shape", "/shape/Shape", &[&input_ids], vec![]);
    let mut with_ids_shape = |name: &str, axes: &[i64]| {
        let axes = graph.shape(axes);
        graph.node("Concat", name, &[&ids_shape, &axes], vec![("axis", Attribute::Int(0))])
    };
    let heads_shape = with_ids_shape("/shape/Concat", &[text.encoder.num_heads as i64, text.encoder.head_dim() as i64]);
    let sequence_shape = with_ids_shape("/shape/Concat_1", &[-1]);
    let mut hidden = embeddings(&mut graph, checkpoint, text, &input_ids)?;
    let mask = causal_mask(&mut graph, &ids_shape);

    let tensors = checkpoint.tower("text_model.");
    let mut encoder = Encoder {
        graph,
        tensors: &tensors,
        config: text.encoder,
        heads_shape,
        num_tokens: text.context_length,
        mask: Some(mask),
    };
    for layer in 0..text.num_layers {
        hidden = encoder.layer(layer, &hidden)?;
    }
    let graph = &mut encoder.graph;
    let end = end_of_text(graph, &input_ids, text.eos);
    let hidden = graph.node("Reshape", "/pool/Reshape", &[&hidden, &sequence_shape], vec![]); // [B, S, C]
    let batch_dims = vec![("batch_dims", Attribute::Int(1))];
    let pooled = graph.node("GatherND", "/pool/GatherND", &[&hidden, &end], batch_dims); // [B, C]
    let pooled = encoder.layer_norm("final_layer_norm", &pooled)?;

    let mut graph = encoder.graph;
    let is_linear = checkpoint.layout.projections_are_linear();
    let (inputs, outputs) = (text.encoder.hidden_size, *projection_dim);
    let shape = if is_linear { [outputs, inputs] } else { [inputs, outputs] };
    let projection = checkpoint.tensor("text_projection.weight", &shape)?;
    let embeds = float_matmul(&mut graph, "text_projection", &pooled, projection, is_linear);
    float_output(&mut graph, "text_embeds", &embeds, outputs);
    Ok(graph)
}

/// Token and position embeddings, as rows `[B * S, C]`.
///
/// ```text
/// input_ids -+-> Gather(token_embedding) -> [B, S, C] -\
///            \-> Shape -> Slice(positions) -> [S, C] ---+-> Add -> Reshape [B * S, C]
/// ```
fn embeddings<'c>(
    graph: &mut GraphBuilder<'c>,
    checkpoint: &'c ClipCheckpoint,
    text: &TextConfig,
    input_ids: &Value,
) -> Result<Value> {
    let hidden_size = text.encoder.hidden_size;
    let format = graph.format();
    let name = "embeddings.token_embedding.weight";
    let table = checkpoint.tensor(&format!("text_model.{name}"), &[text.vocab_size, hidden_size])?;
    let table = graph.float_weight(name, Weight::stored(table), format.embedding);
    let tokens = graph.node("Gather", "/embeddings/Gather", &[&table, input_ids], vec![]);
    let tokens = graph.cast("/embeddings", &tokens, format.embedding, format.float);

    let positions = positions(checkpoint, text)?;
    let positions = graph.float_weight("embeddings.position_embedding.weight", positions, format.float);
    let second_axis = vec![("start", Attribute::Int(1)), ("end", Attribute::Int(2))];
    let sequence = graph.node("Shape", "/embeddings/Shape", &[input_ids], second_axis); // [1]
    let (start, axis) = (graph.shape(&[0]), graph.shape(&[0]));
    let positions = graph.node("Slice", "/embeddings/Slice", &[&positions, &start, &sequence, &axis], vec![]); // [S, C]
    let embedded = graph.node("Add", "/embeddings/Add", &[&tokens, &positions], vec![]);
    let rows = graph.shape(&[-1, hidden_size as i64]);
    Ok(graph.node("Reshape", "/embeddings/Reshape", &[&embedded, &rows], vec![]))
}

/// The table of positions `[context, C]`: Long-CLIP's is the beginning of one table and the rest of another.
fn positions<'c>(checkpoint: &'c ClipCheckpoint, text: &TextConfig) -> Result<Weight<'c>> {
    let shape = [text.context_length, text.encoder.hidden_size];
    let first = checkpoint.tensor("text_model.embeddings.position_embedding.weight", &shape)?;
    let Some(kept) = text.kept_positions else { return Ok(Weight::stored(first)) };
    let second = checkpoint.tensor(POSITIONS_RES, &shape)?;
    let parts = [first.rows(0, kept), second.rows(kept, text.context_length - kept)];
    Ok(Weight::of_parts(parts.map(WeightPart::Stored).into(), &shape[1..]))
}

/// `[S, S]`: 0 where a token (row) sees another (column), else [`MASKED`].
///
/// ```text
/// ids_shape -> Gather 1 -> Range -+-> Unsqueeze [1, S] -\
///                                 \-> Unsqueeze [S, 1] --+-> LessOrEqual -> Where(0, masked)
/// ```
fn causal_mask(graph: &mut GraphBuilder<'_>, ids_shape: &Value) -> Value {
    let zero = graph.constant_i64("/constants/zero", &[], &[0]);
    let one = graph.constant_i64("/constants/one", &[], &[1]);
    let sequence = graph.node("Gather", "/mask/Gather", &[ids_shape, &one], vec![]);
    let tokens = graph.node("Range", "/mask/Range", &[&zero, &sequence, &one], vec![]); // [S]
    let (first, second) = (graph.shape(&[0]), graph.shape(&[1]));
    let columns = graph.node("Unsqueeze", "/mask/Unsqueeze", &[&tokens, &first], vec![]);
    let rows = graph.node("Unsqueeze", "/mask/Unsqueeze_1", &[&tokens, &second], vec![]);
    let is_visible = graph.node("LessOrEqual", "/mask/LessOrEqual", &[&columns, &rows], vec![]);
    let visible = graph.constant_float("/constants/visible", &[], &[0.0]);
    let masked = graph.constant_float("/constants/masked", &[], &[MASKED]);
    graph.node("Where", "/mask/Where", &[&is_visible, &visible, &masked], vec![])
}

/// Index of each text's end, `[B, 1]`. Ids are compared as floats: they are exact up to 2^24.
///
/// ```text
/// input_ids -> (>= eos and <= eos, or the ids themselves) -> Cast f32 -> ArgMax, the first one
/// ```
fn end_of_text(graph: &mut GraphBuilder<'_>, input_ids: &Value, eos: EosRule) -> Value {
    let marks = match eos {
        EosRule::LargestId => input_ids.clone(),
        EosRule::First { token_id } => {
            // onnxruntime 1.25's CUDA provider has no Equal at this opset; 1.31.1 has.
            let token_id = graph.constant_i64("/constants/eos", &[], &[i64::from(token_id)]);
            let is_least = graph.node("GreaterOrEqual", "/pool/GreaterOrEqual", &[input_ids, &token_id], vec![]);
            let is_most = graph.node("LessOrEqual", "/pool/LessOrEqual", &[input_ids, &token_id], vec![]);
            graph.node("And", "/pool/And", &[&is_least, &is_most], vec![])
        }
    };
    let to_f32 = vec![("to", Attribute::Int(DataType::F32 as i64))];
    let marks = graph.node("Cast", "/pool/Cast", &[&marks], to_f32);
    graph.node("ArgMax", "/pool/ArgMax", &[&marks], vec![("axis", Attribute::Int(1)), ("keepdims", Attribute::Int(1))])
}
