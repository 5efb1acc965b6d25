//! A matrix product through a provider: whether it computes at all, and about how fast. The graph is made here, and takes
//! the way that a model's graphs take.

use std::time::{Duration, Instant};

use half::f16;
use recaption_export::proto::{
    Dimension, DimensionProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto,
};
use recaption_export::{DataType, Dim, GraphFile, TensorSpec};

use crate::error::{Error, Result};
use crate::runtime::block::Block;
use crate::runtime::provider::Device;
use crate::runtime::session::{Session, SessionOptions};

/// How long products are repeated for.
const DURATION: Duration = Duration::from_millis(300);

/// What a product has shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MatmulRate {
    /// Floating-point operations per second, the best of the repetitions.
    pub(crate) flops_per_second: f64,
    /// Largest difference from the product computed here, relative to its largest value.
    pub(crate) error: f64,
}

/// Multiplies square matrices on `device`: 768 wide in fp32 on a CPU, 4096 in fp16 on a GPU.
///
/// # Errors
/// [`Error::Provider`] when the device does not work, else ONNX Runtime's.
pub(crate) fn measure(device: Device, num_threads: usize) -> Result<MatmulRate> {
    let (size, data_type) = if device == Device::Cpu { (768, DataType::F32) } else { (4096, DataType::F16) };
    let folder = tempfile::tempdir().map_err(Error::io("create a temporary folder in", &std::env::temp_dir()))?;
    let graph = graph_file(size, data_type);
    let path = folder.path().join(&graph.file);
    std::fs::write(&path, model(size, data_type)).map_err(Error::io("write", &path))?;
    let mut session = Session::open(&path, &graph, &SessionOptions::new(device, num_threads)?)?;
    let mut inputs = Block::new(&session, &[(data_type, size * size), (data_type, size * size)])?;
    let mut product = Block::new(&session, &[(data_type, size * size)])?;
    for (index, value) in [(0, left as fn(usize, usize) -> f32), (1, right)] {
        let values = (0..size * size).map(|i| value(i / size, i % size));
        match data_type {
            DataType::F16 => {
                inputs
                    .tensor_mut::<f16>(index)
                    .iter_mut()
                    .zip(values)
                    .for_each(|(to, value)| *to = f16::from_f32(value));
            }
            _ => inputs.tensor_mut::<f32>(index).iter_mut().zip(values).for_each(|(to, value)| *to = value),
        }
    }
    let mut binding = session.binding()?;
    binding.bind_input("a", &inputs.view(0, &[size, size])?)?;
    binding.bind_input("b", &inputs.view(1, &[size, size])?)?;
    binding.bind_output("product", product.view(0, &[size, size])?)?;
    inputs.send(&session)?;
    let mut best = f64::INFINITY;
    let started = Instant::now();
    while best.is_infinite() || started.elapsed() < DURATION {
        let begin = Instant::now();
        session.run(&binding)?;
        session.stream().synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    product.receive_first(&session, size * size)?;
    let found = |i: usize| match data_type {
        DataType::F16 => product.tensor::<f16>(0)[i].to_f32(),
        _ => product.tensor::<f32>(0)[i],
    };
    Ok(MatmulRate { flops_per_second: 2.0 * (size as f64).powi(3) / best, error: error(size, found) })
}

/// Small whole numbers, so that products are exact in fp16 as well.
fn left(row: usize, column: usize) -> f32 {
    ((row * 7 + column * 3) % 5) as f32 - 2.0
}

fn right(row: usize, column: usize) -> f32 {
    ((row * 5 + column * 11) % 7) as f32 - 3.0
}

/// Largest relative difference over a sample of the product.
fn error(size: usize, found: impl Fn(usize) -> f32) -> f64 {
    let mut largest = (0.0_f64, 1.0_f64);
    for i in (0..size * size).step_by(size * size / 97) {
        let (row, column) = (i / size, i % size);
        let expected: f64 = (0..size).map(|k| f64::from(left(row, k) * right(k, column))).sum();
        let difference = (f64::from(found(i)) - expected).abs();
        // `max` would drop a NaN.
        largest.0 = if difference.is_nan() { f64::INFINITY } else { largest.0.max(difference) };
        largest.1 = largest.1.max(expected.abs());
    }
    largest.0 / largest.1
}

fn graph_file(size: usize, data_type: DataType) -> GraphFile {
    let spec = |name: &str| TensorSpec { name: name.to_owned(), dtype: data_type, shape: vec![Dim::Fixed(size); 2] };
    GraphFile {
        file: "matmul.onnx".to_owned(),
        inputs: vec![spec("a"), spec("b")],
        outputs: vec![spec("product")],
        profile: Default::default(),
        num_parameters: 0,
    }
}

fn model(size: usize, data_type: DataType) -> Vec<u8> {
    // onnx.proto's TensorProto.DataType.
    let elem_type = Some(if data_type == DataType::F16 { 10 } else { 1 });
    let dim = DimensionProto { value: Some(Dimension::Value(size as i64)) };
    let shape = Some(TensorShapeProto { dim: vec![dim.clone(), dim] });
    let value = |name: &str| ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { tensor_type: Some(TensorTypeProto { elem_type, shape: shape.clone() }) }),
    };
    let node = NodeProto {
        input: vec!["a".to_owned(), "b".to_owned()],
        output: vec!["product".to_owned()],
        name: Some("product".to_owned()),
        op_type: Some("MatMul".to_owned()),
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: vec![node],
        name: Some("matmul".to_owned()),
        input: vec![value("a"), value("b")],
        output: vec![value("product")],
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { domain: Some(String::new()), version: Some(17) };
    let model =
        ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
    model.encode_to_vec()
}
