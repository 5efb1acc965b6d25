//! The CLIP vision tower as a graph: `pixel_values` to `vision_features` `[batch, num_image_tokens, feature_size]`. Layers
//! above the selected hidden state are left out.
//!
//! `pixel_values` are f32 `[batch, 3, side, side]`, normalised, or with int8 weights the picture's own u8 samples in patches
//! `[batch, 1 + patches, 3 * patch * patch]`: then the first product is an integer one and the normalisation is in its
//! weights. Row 0 of those stands for the class token and is filled with [`PATCH_ZERO_POINT`].

use std::rc::Rc;

use crate::checkpoint::{Checkpoint, Part};
use crate::config::VisionConfig;
use crate::encoder::{Encoder, TowerTensors};
use crate::error::Result;
use crate::graph::{Attribute, DataType, Dim, GraphBuilder, Value};
use crate::linear::{Linear, q_gemm};
use crate::manifest::Target;
use crate::precision::{GraphFormat, LinearFormat};
use crate::processor_config::Preprocessing;
use crate::tensor::StoredTensor;
use crate::weight::Weight;

/// The sample that counts as zero in u8 patches: near the mean, so that the integers' rounding weighs least.
pub const PATCH_ZERO_POINT: u8 = 120;
/// Images of one run that TensorRT's profiles are made for, and the usual number.
pub(crate) const BATCH_RANGE: (usize, usize, usize) = (1, 8, 64);

/// Builds the tower's graph.
///
/// ```text
/// pixel_values -> patches + class token + positions [B * tokens, C] -> LayerNorm
///              -> encoder layers -> hidden states selected -> class token dropped -> vision_features
/// ```
pub(crate) fn build<'c>(
    checkpoint: &'c Checkpoint,
    config: &VisionConfig,
    preprocessing: &Preprocessing,
    format: GraphFormat,
) -> Result<GraphBuilder<'c>> {
    let tensors = LlavaTower(checkpoint);
    let mut tower = Tower::new("vision_tower", &tensors, config, format);
    let mut hidden = tower.embed(preprocessing)?;
    let mut states = vec![hidden.clone()];
    for layer in 0..config.num_layers() {
        hidden = tower.encoder.layer(layer, &hidden)?;
        states.push(hidden.clone());
    }
    let selected: Vec<Value> = config.feature_layers.iter().map(|&layer| states[layer].clone()).collect();
    tower.select(&selected);
    Ok(tower.encoder.graph)
}

/// The tower inside of a LLaVA.
struct LlavaTower<'c>(&'c Checkpoint);

impl<'c> TowerTensors<'c> for LlavaTower<'c> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'c>> {
        self.0.tensor(Part::VisionTower, name, shape)
    }
}

/// A vision tower's graph while it is built.
pub(crate) struct Tower<'c, 'v> {
    pub(crate) encoder: Encoder<'c, 'v>,
    config: &'v VisionConfig,
}

impl<'c, 'v> Tower<'c, 'v> {
    pub(crate) fn new(
        name: &'static str,
        tensors: &'v dyn TowerTensors<'c>,
        config: &'v VisionConfig,
        format: GraphFormat,
    ) -> Self {
        let mut graph = GraphBuilder::new(name, format);
        graph.dim_range("batch", BATCH_RANGE);
        let num_tokens = config.num_patches() as i64 + 1;
        let encoder = config.encoder();
        let heads_shape = graph.shape(&[-1, num_tokens, encoder.num_heads as i64, encoder.head_dim() as i64]);
        Self {
            encoder: Encoder {
                graph,
                tensors,
                config: encoder,
                heads_shape,
                num_tokens: num_tokens as usize,
                mask: None,
            },
            config,
        }
    }

    /// `pixel_values` to the first layer's input, `[batch * tokens, hidden]`.
    pub(crate) fn embed(&mut self, preprocessing: &Preprocessing) -> Result<Value> {
        match self.encoder.graph.format().linear {
            LinearFormat::Int8 { .. } | LinearFormat::Packed { .. } => self.patch_embeddings(preprocessing),
            LinearFormat::Float | LinearFormat::Float8 | LinearFormat::Blocks(_) => self.embeddings(),
        }
    }

    /// Pixels to the encoder's input, `[batch * tokens, hidden]`.
    ///
    /// ```text
    /// pixel_values -+-> Conv -> [B, C, N] -> Transpose -> [B, N, C] ------------\
    ///               \-> Shape -> [B, 1, 1] -> Expand(class token) -> [B, 1, C] --+-> Concat -> + positions -> LN
    /// ```
    fn embeddings(&mut self) -> Result<Value> {
        let VisionConfig { hidden_size, image_size, patch_size, .. } = *self.config;
        let num_tokens = self.config.num_patches() + 1;
        let graph = &mut self.encoder.graph;
        let float = graph.format().float;
        let side = Dim::from(image_size);
        let pixels = graph.input("pixel_values", DataType::F32, vec!["batch".into(), 3.into(), side.clone(), side]);

        let name = "embeddings.patch_embedding.weight";
        let kernel = self.encoder.tensors.tensor(name, &[hidden_size, 3, patch_size, patch_size])?;
        // Conv takes bf16 from opset 22 on.
        let conv_float = match graph.format().target {
            Target::TensorRt if float == DataType::BF16 => DataType::F32,
            Target::TensorRt | Target::Ort | Target::Cpu => float,
        };
        let kernel = graph.float_weight(name, Weight::stored(kernel), conv_float);
        let patch = patch_size as i64;
        let samples = graph.cast("/embeddings/pixel_values", &pixels, DataType::F32, conv_float);
        let patches = graph.node(
            "Conv",
            "/embeddings/patch_embedding/Conv",
            &[&samples, &kernel],
            vec![("kernel_shape", Attribute::Ints(vec![patch; 2])), ("strides", Attribute::Ints(vec![patch; 2]))],
        );
        let patches = graph.cast("/embeddings/patches", &patches, conv_float, float);
        let flat = graph.shape(&[0, hidden_size as i64, self.config.num_patches() as i64]);
        let patches = graph.node("Reshape", "/embeddings/Reshape", &[&patches, &flat], vec![]); // [B, C, N]
        let patches = graph.node(
            "Transpose",
            "/embeddings/Transpose",
            &[&patches],
            vec![("perm", Attribute::Ints(vec![0, 2, 1]))],
        );
        let class = self.encoder.tensors.tensor("embeddings.class_embedding", &[hidden_size])?.read_f32()?;
        let class = graph.weight_values("embeddings.class_embedding", &[1, 1, hidden_size], &class);
        let bounds = vec![("start", Attribute::Int(0)), ("end", Attribute::Int(1))];
        let batch = graph.node("Shape", "/embeddings/Shape", &[&pixels], bounds);
        let ones = graph.shape(&[1, 1]);
        let first_axis = vec![("axis", Attribute::Int(0))];
        let class_shape = graph.node("Concat", "/embeddings/Concat", &[&batch, &ones], first_axis);
        let class = graph.node("Expand", "/embeddings/Expand", &[&class, &class_shape], vec![]);
        let token_axis = vec![("axis", Attribute::Int(1))];
        let tokens = graph.node("Concat", "/embeddings/Concat_1", &[&class, &patches], token_axis); // [B, 1 + N, C]

        let name = "embeddings.position_embedding.weight";
        let positions = self.encoder.tensors.tensor(name, &[num_tokens, hidden_size])?;
        let positions = graph.weight(name, positions);
        let embedded = graph.node("Add", "/embeddings/Add", &[&tokens, &positions], vec![]);
        let rows = graph.shape(&[-1, hidden_size as i64]);
        let embedded = graph.node("Reshape", "/embeddings/Reshape_1", &[&embedded, &rows], vec![]);
        // The misspelling is the checkpoint's.
        self.encoder.layer_norm("pre_layrnorm", &embedded)
    }

    /// u8 patches to the encoder's input. With `v` the samples, `z` the zero point, `a v + b` the normalisation of a channel
    /// and `W` the kernel, `W (a v + b) = (W a) (v - z) + W (a z + b)`: an integer product, and a constant that joins the
    /// positions. Row 0 is all `z`, so that only its class token and position are left.
    ///
    /// ```text
    /// pixel_values -> Reshape [rows, 3pp] -> QGemm -> Reshape [B, tokens, C] -> + class, positions, constant -> LN
    /// ```
    fn patch_embeddings(&mut self, preprocessing: &Preprocessing) -> Result<Value> {
        let VisionConfig { hidden_size, patch_size, .. } = *self.config;
        let (num_tokens, patch_area) = (self.config.num_patches() + 1, patch_size * patch_size);
        let channels = |value: &dyn Fn(usize) -> f32| -> Vec<f32> {
            (0..3).flat_map(|channel| std::iter::repeat_n(value(channel), patch_area)).collect()
        };
        let Preprocessing { rescale_factor, image_mean, image_std, .. } = preprocessing;
        let zero = f32::from(PATCH_ZERO_POINT);
        let factors: Rc<[f32]> = channels(&|channel| rescale_factor / image_std[channel]).into();
        let offsets = channels(&|channel| (rescale_factor * zero - image_mean[channel]) / image_std[channel]);

        let name = "embeddings.patch_embedding.weight";
        let kernel = self.encoder.tensors.tensor(name, &[hidden_size, 3, patch_size, patch_size])?;
        let kernel = Weight::stored(kernel).flat();
        let values = kernel.read_f32()?;
        let rows = values.chunks_exact(offsets.len());
        let constant: Vec<f32> =
            rows.map(|row| row.iter().zip(&offsets).map(|(weight, offset)| weight * offset).sum()).collect();
        let class = self.encoder.tensors.tensor("embeddings.class_embedding", &[hidden_size])?.read_f32()?;
        let positions_name = "embeddings.position_embedding.weight";
        let positions = self.encoder.tensors.tensor(positions_name, &[num_tokens, hidden_size])?;
        let mut positions = positions.read_f32()?;
        for (token, row) in positions.chunks_exact_mut(hidden_size).enumerate() {
            let added = if token == 0 { &class } else { &constant };
            row.iter_mut().zip(added).for_each(|(position, added)| *position += added);
        }

        let graph = &mut self.encoder.graph;
        let patch_size = 3 * patch_area;
        let shape = vec!["batch".into(), num_tokens.into(), patch_size.into()];
        let pixels = graph.input("pixel_values", DataType::U8, shape);
        let rows = graph.shape(&[-1, patch_size as i64]);
        let patches = graph.node("Reshape", "/embeddings/Reshape", &[&pixels, &rows], vec![]);
        let kernel = kernel.scale_columns(&factors);
        let layer = "/embeddings/patch_embedding";
        let embedded = match graph.format().linear {
            LinearFormat::Int8 { max_weight } => q_gemm(graph, layer, &patches, PATCH_ZERO_POINT, kernel, max_weight),
            _ => Linear::of_weight(&layer[1..], kernel).build_of_samples(graph, &patches, PATCH_ZERO_POINT),
        };
        let batched = graph.shape(&[-1, num_tokens as i64, hidden_size as i64]);
        let embedded = graph.node("Reshape", "/embeddings/Reshape_1", &[&embedded, &batched], vec![]);
        let dims = [num_tokens, hidden_size];
        let positions = graph.weight_values("embeddings.class_and_position", &dims, &positions);
        let embedded = graph.node("Add", "/embeddings/Add", &[&embedded, &positions], vec![]);
        let rows = graph.shape(&[-1, hidden_size as i64]);
        let embedded = graph.node("Reshape", "/embeddings/Reshape_2", &[&embedded, &rows], vec![]);
        self.encoder.layer_norm("pre_layrnorm", &embedded)
    }

    /// Concatenates the selected hidden states, drops the class token unless asked to keep it.
    fn select(&mut self, states: &[Value]) {
        let num_tokens = self.config.num_patches() + 1;
        let feature_size = self.config.feature_size();
        let graph = &mut self.encoder.graph;
        let joined = match states {
            [state] => state.clone(),
            several => {
                let inputs: Vec<&Value> = several.iter().collect();
                graph.node("Concat", "/select/Concat", &inputs, vec![("axis", Attribute::Int(-1))])
            }
        };
        let shape = vec!["batch".into(), self.config.num_image_tokens().into(), feature_size.into()];
        let float = graph.format().float;
        let output = graph.output("vision_features", float, shape);
        let batched = graph.shape(&[-1, num_tokens as i64, feature_size as i64]);
        if self.config.keep_class_token {
            graph.node_named("", "Reshape", "/select/Reshape", &[&joined, &batched], &[output], vec![]);
            return;
        }
        let joined = graph.node("Reshape", "/select/Reshape", &[&joined, &batched], vec![]);
        let (start, end, axis) = (graph.shape(&[1]), graph.shape(&[num_tokens as i64]), graph.shape(&[1]));
        graph.node_named("", "Slice", "/select/Slice", &[&joined, &start, &end, &axis], &[output], vec![]);
    }
}
