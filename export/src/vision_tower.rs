//! The CLIP vision tower as a graph: `pixel_values` `[batch, 3, side, side]` to `vision_features`
//! `[batch, num_image_tokens, feature_size]`. Layers above the selected hidden state are left out.

use crate::checkpoint::{Checkpoint, Part};
use crate::config::VisionConfig;
use crate::error::Result;
use crate::graph::{Attribute, DataType, Dim, GraphBuilder, Value};
use crate::linear::Linear;

const PART: Part = Part::VisionTower;

/// Builds the tower's graph.
///
/// ```text
/// pixel_values -> Conv -> patches [B, N, C] -> Pad (row 0) -> + position (row 0: + class token) -> LayerNorm
///              -> encoder layers -> hidden states selected -> class token dropped -> vision_features
/// ```
pub(crate) fn build<'c>(checkpoint: &'c Checkpoint, config: &VisionConfig) -> Result<GraphBuilder<'c>> {
    let mut tower = Tower { graph: GraphBuilder::new("vision_tower"), checkpoint, config };
    let mut hidden = tower.embeddings()?;
    let mut states = vec![hidden.clone()];
    for layer in 0..config.num_layers() {
        hidden = tower.encoder_layer(layer, &hidden)?;
        states.push(hidden.clone());
    }
    let selected: Vec<Value> = config.feature_layers.iter().map(|&layer| states[layer].clone()).collect();
    tower.select(&selected);
    Ok(tower.graph)
}

struct Tower<'c, 'v> {
    graph: GraphBuilder<'c>,
    checkpoint: &'c Checkpoint,
    config: &'v VisionConfig,
}

impl Tower<'_, '_> {
    /// Pixels to the encoder's input, `[batch * tokens, hidden]`.
    ///
    /// The class token is added to row 0 of the position table here, so that one `Pad` (a zero row before the
    /// patches) and one `Add` make the sequence without any computed shape.
    fn embeddings(&mut self) -> Result<Value> {
        let VisionConfig { hidden_size, image_size, patch_size, .. } = *self.config;
        let num_tokens = self.config.num_patches() + 1;
        let graph = &mut self.graph;
        let side = Dim::from(image_size);
        let pixels = graph.input("pixel_values", DataType::F32, vec!["batch".into(), 3.into(), side.clone(), side]);

        let name = "embeddings.patch_embedding.weight";
        let kernel = self.checkpoint.tensor(PART, name, &[hidden_size, 3, patch_size, patch_size])?;
        let kernel = graph.weight(name, kernel);
        let patch = patch_size as i64;
        let patches = graph.node(
            "Conv",
            "/embeddings/patch_embedding/Conv",
            &[&pixels, &kernel],
            vec![("kernel_shape", Attribute::Ints(vec![patch; 2])), ("strides", Attribute::Ints(vec![patch; 2]))],
        );
        let flat = graph.shape(&[0, hidden_size as i64, self.config.num_patches() as i64]);
        let patches = graph.node("Reshape", "/embeddings/Reshape", &[&patches, &flat], vec![]); // [B, C, N]
        let patches = graph.node(
            "Transpose",
            "/embeddings/Transpose",
            &[&patches],
            vec![("perm", Attribute::Ints(vec![0, 2, 1]))],
        );
        let pads = graph.shape(&[0, 1, 0, 0, 0, 0]);
        let padded = graph.node("Pad", "/embeddings/Pad", &[&patches, &pads], vec![]); // [B, 1 + N, C]

        let class = self.checkpoint.tensor(PART, "embeddings.class_embedding", &[hidden_size])?.read_f32()?;
        let name = "embeddings.position_embedding.weight";
        let mut positions = self.checkpoint.tensor(PART, name, &[num_tokens, hidden_size])?.read_f32()?;
        positions.iter_mut().zip(class).for_each(|(position, class)| *position += class);
        let positions = graph.weight_values("embeddings.class_and_position", &[num_tokens, hidden_size], &positions);
        let embedded = graph.node("Add", "/embeddings/Add", &[&padded, &positions], vec![]);
        let rows = graph.shape(&[-1, hidden_size as i64]);
        let embedded = graph.node("Reshape", "/embeddings/Reshape_1", &[&embedded, &rows], vec![]);
        // The misspelling is the checkpoint's.
        self.layer_norm("pre_layrnorm", &embedded)
    }

    /// ```text
    /// x -> LN -> q, k, v -> softmax(q k^T / sqrt(d)) v -> out_proj -> + -> LN -> fc1 -> act -> fc2 -> + -> y
    ///  \_______________________________________________________________/ \____________________________/
    /// ```
    fn encoder_layer(&mut self, layer: usize, x: &Value) -> Result<Value> {
        let VisionConfig { hidden_size, intermediate_size, activation, .. } = *self.config;
        let prefix = format!("encoder.layers.{layer}");
        let normed = self.layer_norm(&format!("{prefix}.layer_norm1"), x)?;
        let attended = self.attention(&format!("{prefix}.self_attn"), &normed)?;
        let x = self.graph.node("Add", &format!("/{prefix}/Add"), &[x, &attended], vec![]);

        let normed = self.layer_norm(&format!("{prefix}.layer_norm2"), &x)?;
        let widened = self.linear(&format!("{prefix}.mlp.fc1"), (hidden_size, intermediate_size), &normed)?;
        let activated = activation.build(&mut self.graph, &format!("/{prefix}/mlp"), &widened);
        let narrowed = self.linear(&format!("{prefix}.mlp.fc2"), (intermediate_size, hidden_size), &activated)?;
        Ok(self.graph.node("Add", &format!("/{prefix}/Add_1"), &[&x, &narrowed], vec![]))
    }

    fn attention(&mut self, prefix: &str, x: &Value) -> Result<Value> {
        let VisionConfig { hidden_size, num_heads, .. } = *self.config;
        let head_dim = hidden_size / num_heads;
        let num_tokens = self.config.num_patches() + 1;
        let mut heads = Vec::with_capacity(3);
        for projection in ["q_proj", "k_proj", "v_proj"] {
            let name = format!("{prefix}.{projection}");
            let flat = self.linear(&name, (hidden_size, hidden_size), x)?;
            let shape = self.graph.shape(&[-1, num_tokens as i64, num_heads as i64, head_dim as i64]);
            let split = self.graph.node("Reshape", &format!("/{name}/Reshape"), &[&flat, &shape], vec![]);
            let perm = vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))];
            heads.push(self.graph.node("Transpose", &format!("/{name}/Transpose"), &[&split], perm)); // [B, h, T, d]
        }
        let [query, key, value] = &heads[..] else { unreachable!("three projections") };
        let graph = &mut self.graph;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let scores = graph.contrib_node(
            "FusedMatMul",
            &format!("/{prefix}/FusedMatMul"),
            &[query, key],
            vec![("alpha", Attribute::Float(scale)), ("transB", Attribute::Int(1))],
        );
        let weights =
            graph.node("Softmax", &format!("/{prefix}/Softmax"), &[&scores], vec![("axis", Attribute::Int(-1))]);
        let mixed = graph.node("MatMul", &format!("/{prefix}/MatMul"), &[&weights, value], vec![]);
        let perm = vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))];
        let mixed = graph.node("Transpose", &format!("/{prefix}/Transpose"), &[&mixed], perm);
        let rows = graph.shape(&[-1, hidden_size as i64]);
        let mixed = graph.node("Reshape", &format!("/{prefix}/Reshape"), &[&mixed, &rows], vec![]);
        self.linear(&format!("{prefix}.out_proj"), (hidden_size, hidden_size), &mixed)
    }

    /// Concatenates the selected hidden states, drops the class token unless asked to keep it.
    fn select(&mut self, states: &[Value]) {
        let num_tokens = self.config.num_patches() + 1;
        let feature_size = self.config.feature_size();
        let graph = &mut self.graph;
        let joined = match states {
            [state] => state.clone(),
            several => {
                let inputs: Vec<&Value> = several.iter().collect();
                graph.node("Concat", "/select/Concat", &inputs, vec![("axis", Attribute::Int(-1))])
            }
        };
        let shape = vec!["batch".into(), self.config.num_image_tokens().into(), feature_size.into()];
        let output = graph.output("vision_features", DataType::F32, shape);
        let batched = graph.shape(&[-1, num_tokens as i64, feature_size as i64]);
        if self.config.keep_class_token {
            graph.node_named("", "Reshape", "/select/Reshape", &[&joined, &batched], &[output], vec![]);
            return;
        }
        let joined = graph.node("Reshape", "/select/Reshape", &[&joined, &batched], vec![]);
        let (start, end, axis) = (graph.shape(&[1]), graph.shape(&[num_tokens as i64]), graph.shape(&[1]));
        graph.node_named("", "Slice", "/select/Slice", &[&joined, &start, &end, &axis], &[output], vec![]);
    }

    fn layer_norm(&mut self, name: &str, x: &Value) -> Result<Value> {
        let size = self.config.hidden_size;
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let weight = self.checkpoint.tensor(PART, &weight_name, &[size])?;
        let bias = self.checkpoint.tensor(PART, &bias_name, &[size])?;
        let weight = self.graph.weight(&weight_name, weight);
        let bias = self.graph.weight(&bias_name, bias);
        Ok(self.graph.node(
            "LayerNormalization",
            &format!("/{name}/LayerNormalization"),
            &[x, &weight, &bias],
            vec![("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(self.config.layer_norm_eps))],
        ))
    }

    fn linear(&mut self, name: &str, features: (usize, usize), x: &Value) -> Result<Value> {
        Ok(Linear::find(self.checkpoint, PART, name, features, true)?.build(&mut self.graph, x))
    }
}
