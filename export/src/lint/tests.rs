use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use prost::Message;

use super::*;
use crate::graph::{Attribute, DataType, GraphBuilder, MICROSOFT};
use crate::precision::GraphFormat;
use crate::proto::{
    AttributeProto, Dimension, DimensionProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto,
};
use crate::{ExportOptions, Rounding, export};

/// Dense and grouped heads, heads that need padding, biases, several feature layers.
const CHECKPOINTS: &[&str] = &[
    "checkpoints/published-f16",
    "checkpoints/biases-bf16",
    "checkpoints/head24-llama3-rope-bf16",
    "checkpoints/memory4-wide-heads-f16",
    "checkpoints/full-features-bf16",
];
const CLIPS: &[&str] = &[
    "clip/gelu-f16",
    "clip/legacy-eos-f32",
    "clip/openai-f16/model.safetensors",
    "clip/openai-long-f16/model.safetensors",
];

fn test_data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

fn findings(checkpoint: &Path, options: &ExportOptions) -> Vec<Finding> {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    let manifest = export(checkpoint, &bundle, options).unwrap();
    let found = check_bundle(&bundle, &manifest).unwrap();
    assert_eq!(found.iter().find_map(Finding::exception), cuda_exception(manifest.header()));
    found
}

/// Every format that the CUDA and TensorRT providers are to take, and whether it is one whose decoder has f32 attention.
fn formats() -> Vec<(ExportOptions, bool)> {
    let of = |target, precision, activations, rounding| ExportOptions {
        target,
        precision,
        activations,
        rounding,
        ..ExportOptions::default()
    };
    let (ort, trt, rounding) = (Target::Ort, Target::TensorRt, Rounding::Nearest);
    let half = Some(Precision::Fp16);
    vec![
        (of(ort, Precision::Fp32, None, rounding), true),
        (of(ort, Precision::Fp16, None, rounding), false),
        (of(ort, Precision::Bf16, None, rounding), false),
        (of(ort, Precision::Int8Block, None, rounding), true),
        (of(ort, Precision::Int8Block, half, rounding), false),
        (of(ort, Precision::Int4, None, rounding), true),
        (of(ort, Precision::Int4, half, rounding), false),
        (of(ort, Precision::Int4, half, Rounding::Search), false),
        (of(trt, Precision::Fp32, None, rounding), false),
        (of(trt, Precision::Fp16, None, rounding), false),
        (of(trt, Precision::Bf16, None, rounding), false),
        (of(trt, Precision::Fp8, None, rounding), false),
    ]
}

#[test]
fn bundles_for_a_gpu_run_on_it_whole_but_for_f32_attention() {
    for name in CHECKPOINTS {
        for (options, has_f32_attention) in formats() {
            let found = findings(&test_data(name), &options);
            let what = format!("{name} {} {}", options.target.name(), options.precision.name());
            let faults: Vec<String> =
                found.iter().filter(|finding| finding.exception().is_none()).map(ToString::to_string).collect();
            assert_eq!(faults, [""; 0], "{what}");
            assert_eq!(!found.is_empty(), has_f32_attention, "{what}");
            assert!(found.iter().all(|finding| finding.graph == "decoder.onnx"), "{what}");
        }
    }
}

#[test]
fn a_clip_for_a_gpu_runs_on_it_whole() {
    for name in CLIPS {
        for (options, _) in formats().into_iter().filter(|(options, _)| options.precision != Precision::Fp8) {
            let options = ExportOptions { tokenizer: Some(test_data(CLIPS[0])), ..options };
            let found = findings(&test_data(name), &options);
            let what = format!("{name} {} {}", options.target.name(), options.precision.name());
            assert_eq!(found, [], "{what}");
        }
    }
}

/// A vision tower of floats goes to TensorRT beside a decoder on CUDA.
#[test]
fn vision_graphs_of_ort_bundles_are_checked_against_tensorrt_too() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    let options = ExportOptions { precision: Precision::Fp16, ..ExportOptions::default() };
    let manifest = export(&test_data(CHECKPOINTS[0]), &bundle, &options).unwrap();
    for (graph, expected) in [("vision_tower.onnx", &[GpuProvider::TensorRt][..]), ("decoder.onnx", &[])] {
        let path = bundle.join(graph);
        let (mut model, _) = read_model(&path).unwrap();
        // CUDA has a kernel for it; TensorRT's table does not know it.
        let last = model.graph.as_mut().unwrap().node.iter_mut().rfind(|node| op_name(node) == "Add");
        if let Some(node) = last {
            node.op_type = Some("Abs".to_owned());
            node.input.truncate(1);
        }
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        let found = check_bundle(&bundle, &manifest).unwrap();
        let of_graph = found.iter().filter(|finding| finding.graph == graph);
        assert_eq!(of_graph.map(|finding| finding.provider).collect::<Vec<_>>(), expected, "{graph}");
    }
}

#[test]
fn int8_is_for_the_cpu() {
    let options = ExportOptions { precision: Precision::Int8, ..ExportOptions::default() };
    assert_eq!(findings(&test_data(CHECKPOINTS[0]), &options), []);
    let is_for_gpu = |target, precision| GpuProvider::of(target, precision).is_some();
    assert!(!is_for_gpu(Target::Ort, Precision::Int8) && is_for_gpu(Target::Ort, Precision::Int4));
}

/// As onnxruntime-gpu 1.31.1 places them, by its log: see [`CudaPlacement`].
#[test]
fn shapes_alone_are_computed_on_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let options = ExportOptions { precision: Precision::Fp16, ..ExportOptions::default() };
    let placement = |checkpoint: &str, graph: &str| {
        let bundle = folder.path().join(checkpoint);
        if !bundle.exists() {
            export(&test_data(checkpoint), &bundle, &options).unwrap();
        }
        let (model, _) = read_model(&bundle.join(graph)).unwrap();
        let CudaPlacement { host_inputs, cpu_nodes } = cuda_placement(&model);
        (host_inputs.join(" "), cpu_nodes.join(" "))
    };
    let expected = |host_inputs: &str, cpu_nodes: &str| (host_inputs.to_owned(), cpu_nodes.to_owned());
    let (llava, clip) = (CHECKPOINTS[0], CLIPS[0]);
    assert_eq!(placement(llava, "decoder.onnx"), expected("total_sequence_length", "/shape/Concat"));
    assert_eq!(placement(llava, "vision_tower.onnx"), expected("", "/embeddings/Concat"));
    assert_eq!(placement(llava, "projector.onnx"), expected("", ""));
    assert_eq!(placement(clip, "image_tower.onnx"), expected("", "/embeddings/Concat"));
    assert_eq!(placement(clip, "text_tower.onnx"), expected("", "/shape/Concat /shape/Concat_1 /mask/Gather"));
}

const FLOAT: i32 = 1;
const UINT8: i32 = 2;
const INT8: i32 = 3;
const INT64: i32 = 7;
const BFLOAT16: i32 = 16;
const FLOAT8E4M3FN: i32 = 17;

fn node(op: &str, inputs: &[&str], attributes: &[(&str, i64)]) -> NodeProto {
    let (domain, op_type) = op.rsplit_once('.').unwrap_or(("", op));
    let attribute = |(name, value): &(&str, i64)| AttributeProto {
        name: Some((*name).to_owned()),
        i: Some(*value),
        ..Default::default()
    };
    NodeProto {
        name: Some(format!("/{op_type}")),
        op_type: Some(op_type.to_owned()),
        domain: Some(domain.to_owned()),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: vec![format!("{op_type}_out")],
        attribute: attributes.iter().map(attribute).collect(),
    }
}

fn value(name: &str, elem_type: i32, shape: &[Option<Dimension>]) -> ValueInfoProto {
    let dim = shape.iter().map(|value| DimensionProto { value: value.clone() }).collect();
    let tensor_type = TensorTypeProto { elem_type: Some(elem_type), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}

/// A graph of inputs of 4 elements each.
fn model(inputs: &[(&str, i32)], nodes: Vec<NodeProto>) -> ModelProto {
    let import = |domain: &str, version| OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(version) };
    let axes =
        TensorProto { dims: vec![1], data_type: Some(INT64), name: Some("one".to_owned()), ..Default::default() };
    let input = inputs.iter().map(|(name, elem_type)| value(name, *elem_type, &[Some(Dimension::Value(4))])).collect();
    let graph = GraphProto { node: nodes, initializer: vec![axes], input, ..Default::default() };
    ModelProto { graph: Some(graph), opset_import: vec![import("", 20), import(MICROSOFT, 1)], ..Default::default() }
}

fn messages(provider: GpuProvider, model: &ModelProto) -> Vec<String> {
    let found = check(provider, "graph", model, &BTreeMap::new());
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn what_has_no_kernel_is_named_with_its_types() {
    let cuda = |inputs: &[(&str, i32)], nodes| messages(GpuProvider::Cuda, &model(inputs, nodes));
    let argmax = || vec![node("ArgMax", &["x"], &[("axis", -1)])];
    assert_eq!(cuda(&[("x", FLOAT)], argmax()), [""; 0]);
    assert_eq!(
        cuda(&[("x", BFLOAT16)], argmax()),
        ["`graph` `/ArgMax`: no kernel for operator `ArgMax` of opset 20 with bfloat16 (onnxruntime-gpu 1.31.1)"]
    );
    let product = vec![node("MatMulInteger", &["x", "w"], &[])];
    assert_eq!(
        cuda(&[("x", UINT8), ("w", INT8)], product),
        ["`graph` `/MatMulInteger`: no kernel for operator `MatMulInteger` of opset 20 with uint8, int8 \
          (onnxruntime-gpu 1.31.1)"]
    );
    // Conv takes bf16 from opset 22 on.
    let conv = || vec![node("Conv", &["x", "x"], &[])];
    assert_eq!(cuda(&[("x", BFLOAT16)], conv()).len(), 1);
    let mut newer = model(&[("x", BFLOAT16)], conv());
    newer.opset_import[0].version = Some(23);
    assert_eq!(messages(GpuProvider::Cuda, &newer), [""; 0]);
    newer.opset_import[0].version = Some(24);
    assert!(messages(GpuProvider::Cuda, &newer)[0].contains("of opset 24"), "a version that the table does not know");
    for foreign in ["Det", "com.microsoft.Attention", "evil.Add"] {
        let found = cuda(&[("x", FLOAT)], vec![node(foreign, &["x"], &[])]);
        assert!(found.len() == 1 && found[0].contains(&format!("operator `{foreign}`")), "{found:?}");
    }
    let mixed = cuda(&[("x", FLOAT), ("y", BFLOAT16)], vec![node("Add", &["x", "y"], &[])]);
    assert_eq!(mixed, ["`graph` `/Add`: input `y`: expected float, got bfloat16 (onnxruntime-gpu 1.31.1)"]);
}

#[test]
fn only_attention_of_f32_is_an_exception() {
    let inputs = ["x", "", "", "x", "x", "n", "n"];
    let graph =
        |elem_type| model(&[("x", elem_type), ("n", 6)], vec![node("com.microsoft.GroupQueryAttention", &inputs, &[])]);
    let no_copy = |model: &ModelProto| {
        let found = check(GpuProvider::Cuda, "decoder", model, &BTreeMap::new());
        found.into_iter().filter(|finding| !matches!(finding.problem, Problem::Copy { .. })).collect::<Vec<_>>()
    };
    let found = no_copy(&graph(FLOAT));
    assert_eq!(found.len(), 1);
    assert!(found[0].exception().is_some_and(|why| why.contains("f16 and bf16 only")));
    assert_eq!(no_copy(&graph(BFLOAT16)), []);
    assert!(no_copy(&graph(11))[0].exception().is_none());
    let on_tensorrt = check(GpuProvider::TensorRt, "decoder", &graph(FLOAT), &BTreeMap::new());
    assert!(on_tensorrt.iter().all(|finding| finding.exception().is_none()) && !on_tensorrt.is_empty());
}

#[test]
fn control_flow_and_copies_between_host_and_gpu_are_named() {
    let branch = model(&[("x", 9)], vec![node("If", &["x"], &[])]);
    let control = "`graph` `/If`: `If` is control flow (onnxruntime-gpu 1.31.1)";
    assert_eq!(messages(GpuProvider::Cuda, &branch), [control]);
    // A length that the GPU computes decides a shape on the host.
    let shape = vec![node("ReduceSum", &["n", "one"], &[]), node("Range", &["n", "ReduceSum_out", "n"], &[])];
    let found = messages(GpuProvider::Cuda, &model(&[("n", INT64)], shape));
    let copied = "`graph` `/Range`: `ReduceSum_out` must be copied from GPU to host (onnxruntime-gpu 1.31.1)";
    assert!(found.iter().any(|message| message == copied), "{found:?}");
    // What Shape leaves on the host is read with a large tensor, which is on the GPU.
    let wide =
        vec![node("Shape", &["x"], &[]), node("Relu", &["y"], &[]), node("Gather", &["Relu_out", "Shape_out"], &[])];
    let found = messages(GpuProvider::Cuda, &model(&[("x", FLOAT), ("y", FLOAT)], wide));
    assert_eq!(found, ["`graph` `/Gather`: `Shape_out` must be copied from host to GPU (onnxruntime-gpu 1.31.1)"]);
    // Shape computation alone stays on the host.
    let small = vec![node("Shape", &["x"], &[]), node("Concat", &["Shape_out", "one"], &[("axis", 0)])];
    let small = model(&[("x", FLOAT)], small);
    assert_eq!(messages(GpuProvider::Cuda, &small), [""; 0]);
    assert_eq!(cuda_placement(&small), CudaPlacement { host_inputs: vec![], cpu_nodes: vec!["/Concat".to_owned()] });
}

#[test]
fn what_tensorrt_does_not_take_is_named() {
    let trt = |inputs: &[(&str, i32)], nodes| messages(GpuProvider::TensorRt, &model(inputs, nodes));
    let by = "(TensorRT 10.1 (onnx-tensorrt 10.1-GA))";
    assert_eq!(
        trt(&[("x", FLOAT)], vec![node("Softmax", &["x"], &[]), node("ReduceSum", &["x", "one"], &[])]),
        [""; 0]
    );
    assert_eq!(
        trt(&[("x", UINT8), ("w", INT8)], vec![node("MatMulInteger", &["x", "w"], &[])]),
        [format!("`graph` `/MatMulInteger`: no kernel for operator `MatMulInteger` of opset 20 with uint8, int8 {by}")]
    );
    assert_eq!(
        trt(&[("x", INT64)], vec![node("Softmax", &["x"], &[])]),
        [format!("`graph` `/Softmax`: no kernel for operator `Softmax` of opset 20 with int64 {by}")]
    );
    let quick = trt(&[("x", FLOAT)], vec![node("com.microsoft.QuickGelu", &["x"], &[])]);
    assert!(quick.len() == 1 && quick[0].contains("com.microsoft.QuickGelu"), "{quick:?}");
    let axes = trt(&[("x", FLOAT), ("a", INT64)], vec![node("Unsqueeze", &["x", "a"], &[])]);
    assert!(axes.contains(&format!("`graph` `/Unsqueeze`: input `a` of `Unsqueeze` must be an initialiser {by}")));
    let mut norm = node("LayerNormalization", &["x", "x", "x"], &[]);
    norm.output.push("mean".to_owned());
    let norm = trt(&[("x", FLOAT)], vec![norm]);
    assert_eq!(
        norm,
        [format!("`graph` `/LayerNormalization`: an output of `LayerNormalization` that is not supported {by}")]
    );
    // Scales and zero points are initialisers, and zero points zero.
    let mut rounded = model(
        &[("x", FLOAT), ("s", FLOAT)],
        vec![
            node("QuantizeLinear", &["x", "s", "zero"], &[]),
            node("DequantizeLinear", &["QuantizeLinear_out", "s", "zero"], &[]),
        ],
    );
    let zero = |byte: u8, elem_type| TensorProto {
        data_type: Some(elem_type),
        name: Some("zero".to_owned()),
        raw_data: Some(vec![byte]),
        ..Default::default()
    };
    let scale = TensorProto { data_type: Some(FLOAT), name: Some("s".to_owned()), ..Default::default() };
    rounded.graph.as_mut().unwrap().initializer = vec![scale.clone(), zero(0, FLOAT8E4M3FN)];
    assert_eq!(messages(GpuProvider::TensorRt, &rounded), [""; 0]);
    rounded.graph.as_mut().unwrap().initializer = vec![zero(0, FLOAT8E4M3FN)];
    let dynamic = format!("`graph` `/QuantizeLinear`: input `s` of `QuantizeLinear` must be an initialiser {by}");
    assert_eq!(messages(GpuProvider::TensorRt, &rounded)[0], dynamic);
    rounded.graph.as_mut().unwrap().initializer = vec![scale.clone(), zero(1, FLOAT8E4M3FN)];
    let shifted = format!("`graph` `/QuantizeLinear`: input `zero` of `QuantizeLinear` must be zero {by}");
    assert_eq!(messages(GpuProvider::TensorRt, &rounded)[0], shifted);
    rounded.graph.as_mut().unwrap().initializer = vec![scale, zero(0, UINT8)];
    assert!(messages(GpuProvider::TensorRt, &rounded)[0].contains("with float, float, uint8"));
    let mut newer = model(&[("x", FLOAT)], vec![node("Relu", &["x"], &[])]);
    newer.opset_import[0].version = Some(23);
    assert!(messages(GpuProvider::TensorRt, &newer)[0].contains("of opset 23"));
}

#[test]
fn dimensions_are_numbers_or_names_with_a_range_and_shapes_do_not_depend_on_data() {
    let named = |name: &str| Some(Dimension::Param(name.to_owned()));
    let mut graph = model(&[], vec![]);
    let shape = [named("batch"), Some(Dimension::Value(3)), None, named("rows"), named(""), Some(Dimension::Value(-1))];
    graph.graph.as_mut().unwrap().input = vec![value("x", FLOAT, &shape)];
    graph.graph.as_mut().unwrap().output = vec![ValueInfoProto { name: Some("y".to_owned()), r#type: None }];
    let profile = BTreeMap::from([("batch".to_owned(), DimRange { min: 1, opt: 1, max: 8 })]);
    let problems = |model: &ModelProto| -> Vec<(String, String)> {
        let found = check(GpuProvider::TensorRt, "graph", model, &profile);
        found.into_iter().map(|finding| (finding.place, finding.problem.to_string())).collect()
    };
    let expected = [
        ("x", "dimension 2 is neither a number nor a name"),
        ("x", "dimension `rows` has no range in the profile"),
        ("x", "dimension 4 is neither a number nor a name"),
        ("x", "dimension 5 is neither a number nor a name"),
        ("y", "dimension 0 is neither a number nor a name"),
    ];
    assert_eq!(problems(&graph), expected.map(|(place, problem)| (place.to_owned(), problem.to_owned())));

    let depends = |nodes| -> BTreeSet<String> {
        let found = problems(&model(&[("x", FLOAT), ("n", INT64)], nodes));
        found.into_iter().map(|(_, problem)| problem).filter(|problem| problem.contains("depends")).collect()
    };
    let of = |text: &str| BTreeSet::from([text.to_owned()]);
    assert_eq!(depends(vec![node("NonZero", &["x"], &[])]), of("the shape of what `NonZero` gives depends on data"));
    let reshape = vec![node("Add", &["n", "n"], &[]), node("Reshape", &["x", "Add_out"], &[])];
    assert_eq!(depends(reshape), of("the shape of what `Reshape` gives depends on the data in `Add_out`"));
    let reshape = vec![
        node("Shape", &["x"], &[]),
        node("Concat", &["Shape_out", "one"], &[]),
        node("Reshape", &["x", "Concat_out"], &[]),
    ];
    assert_eq!(depends(reshape), BTreeSet::new());
}

#[test]
fn a_graph_that_is_wrong_everywhere_is_not_told_at_length() {
    let nodes = vec![node("If", &["x", "nowhere"], &[]); 5000];
    assert_eq!(messages(GpuProvider::Cuda, &model(&[("x", 9)], nodes)).len(), MAX_FINDINGS);
    assert_eq!(messages(GpuProvider::Cuda, &ModelProto::default()), [""; 0]);
}

#[test]
fn export_refuses_a_graph_that_its_gpu_could_not_run_whole() {
    let format = GraphFormat::of(&ExportOptions { precision: Precision::Bf16, ..ExportOptions::default() }).unwrap();
    let write = |graph: GraphBuilder<'_>| {
        let folder = tempfile::tempdir().unwrap();
        let result = graph.write(folder.path(), &AtomicBool::new(false));
        let is_empty = std::fs::read_dir(folder.path()).unwrap().next().is_none();
        result.map(|_| ()).map_err(|error| (error.to_string(), error.hint().is_some(), is_empty))
    };
    let build = |dim: &str| {
        let mut graph = GraphBuilder::new("decoder", format);
        graph.dim_range("batch", (1, 1, 8));
        let logits = graph.input("logits", DataType::BF16, vec![dim.into(), 4.into()]);
        (graph, logits)
    };
    let (mut graph, logits) = build("batch");
    graph.node("ArgMax", "/ArgMax", &[&logits], vec![("axis", Attribute::Int(-1))]);
    let message =
        "`decoder` `/ArgMax`: no kernel for operator `ArgMax` of opset 23 with bfloat16 (onnxruntime-gpu 1.31.1)";
    assert_eq!(write(graph), Err((message.to_owned(), true, true)));
    let (graph, _) = build("rows");
    let message = "`decoder` `logits`: dimension `rows` has no range in the profile (onnxruntime-gpu 1.31.1)";
    assert_eq!(write(graph), Err((message.to_owned(), true, true)));
    let (mut graph, logits) = build("batch");
    graph.node("Softmax", "/Softmax", &[&logits], vec![]);
    assert_eq!(write(graph), Ok(()));
}
