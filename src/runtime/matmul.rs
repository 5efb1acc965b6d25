//! A matrix product through a provider: whether it computes at all, and how fast. The graph is made here, and takes the way that
//! a model's graphs take, its right side a weight as theirs are.

use std::time::{Duration, Instant};

use half::f16;
use recaption_export::proto::{
    Dimension, DimensionProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use recaption_export::{DataType, Dim, GraphFile, TensorSpec};

use crate::error::{Error, Result};
use crate::runtime::block::Block;
use crate::runtime::provider::Device;
use crate::runtime::session::{Session, SessionOptions};

/// How long products are repeated for.
const DURATION: Duration = Duration::from_millis(300);

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operands {
    /// `MatMul` of f32.
    F32,
    /// `MatMul` of f16.
    F16,
    /// `MatMulInteger` of u8 and s8.
    Int8,
}

impl Operands {
    /// Types of the left side, the weights and the product.
    fn types(self) -> [DataType; 3] {
        match self {
            Self::F32 => [DataType::F32; 3],
            Self::F16 => [DataType::F16; 3],
            Self::Int8 => [DataType::U8, DataType::I8, DataType::I32],
        }
    }

    fn operator(self) -> &'static str {
        match self {
            Self::F32 | Self::F16 => "MatMul",
            Self::Int8 => "MatMulInteger",
        }
    }
}

/// `[rows, inner]` times weights `[inner, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) operands: Operands,
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
}

/// What a product has shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MatmulRate {
    /// Operations per second, two for each multiply-add, the best of the repetitions.
    pub(crate) flops_per_second: f64,
    /// Bytes of weights per second.
    pub(crate) weight_bytes_per_second: f64,
    /// Largest difference from the product computed here, relative to its largest value.
    pub(crate) error: f64,
}

/// Multiplies square matrices on `device`: 768 wide in fp32 on a CPU, 4096 in fp16 on a GPU.
///
/// # Errors
/// [`Error::Provider`] when the device does not work, else ONNX Runtime's.
pub(crate) fn measure(device: Device, num_threads: usize) -> Result<MatmulRate> {
    let (size, operands) = if device == Device::Cpu { (768, Operands::F32) } else { (4096, Operands::F16) };
    rate(device, num_threads, Product { operands, rows: size, inner: size, columns: size })
}

/// How fast `product` is on `device`: the best of many.
///
/// # Errors
/// Those of [`measure`].
pub(crate) fn rate(device: Device, num_threads: usize, product: Product) -> Result<MatmulRate> {
    let Product { operands, rows, inner, columns } = product;
    let [left_type, weight_type, product_type] = operands.types();
    let folder = tempfile::tempdir().map_err(Error::io("create a temporary folder in", &std::env::temp_dir()))?;
    let graph = product.graph_file();
    let path = folder.path().join(&graph.file);
    std::fs::write(&path, product.model()).map_err(Error::io("write", &path))?;
    let mut session = Session::open(&path, &graph, &SessionOptions::new(device, num_threads)?)?;
    let mut inputs = Block::new(&session, &[(left_type, rows * inner)])?;
    let mut output = Block::new(&session, &[(product_type, rows * columns)])?;
    let values = (0..rows * inner).map(|i| product.left(i / inner, i % inner));
    match operands {
        Operands::F32 => inputs.tensor_mut::<f32>(0).iter_mut().zip(values).for_each(|(to, value)| *to = value),
        Operands::F16 => {
            inputs.tensor_mut::<f16>(0).iter_mut().zip(values).for_each(|(to, value)| *to = f16::from_f32(value));
        }
        Operands::Int8 => inputs.tensor_mut::<u8>(0).iter_mut().zip(values).for_each(|(to, value)| *to = value as u8),
    }
    let mut binding = session.binding()?;
    binding.bind_input("a", &inputs.view(0, &[rows, inner])?)?;
    binding.bind_output("product", output.view(0, &[rows, columns])?)?;
    inputs.send(&session)?;
    let mut best = f64::INFINITY;
    let started = Instant::now();
    while best.is_infinite() || started.elapsed() < DURATION {
        let begin = Instant::now();
        session.run(&binding)?;
        session.stream().synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    output.receive_first(&session, rows * columns)?;
    let found = |i: usize| match operands {
        Operands::F32 => output.tensor::<f32>(0)[i],
        Operands::F16 => output.tensor::<f16>(0)[i].to_f32(),
        Operands::Int8 => output.tensor::<i32>(0)[i] as f32,
    };
    let num_weights = (inner * columns) as f64;
    Ok(MatmulRate {
        flops_per_second: 2.0 * rows as f64 * num_weights / best,
        weight_bytes_per_second: num_weights * weight_type.size() as f64 / best,
        error: product.error(found),
    })
}

impl Product {
    /// Small whole numbers, so that products are exact in fp16 as well.
    fn left(self, row: usize, column: usize) -> f32 {
        let value = ((row * 7 + column * 3) % 5) as f32;
        if self.operands == Operands::Int8 { value } else { value - 2.0 }
    }

    /// Largest relative difference over a sample of the product.
    fn error(self, found: impl Fn(usize) -> f32) -> f64 {
        let Self { rows, inner, columns, .. } = self;
        let mut largest = (0.0_f64, 1.0_f64);
        for i in (0..rows * columns).step_by((rows * columns / 97).max(1)) {
            let (row, column) = (i / columns, i % columns);
            let expected: f64 = (0..inner).map(|k| f64::from(self.left(row, k) * weight(k, column))).sum();
            let difference = (f64::from(found(i)) - expected).abs();
            // `max` would drop a NaN.
            largest.0 = if difference.is_nan() { f64::INFINITY } else { largest.0.max(difference) };
            largest.1 = largest.1.max(expected.abs());
        }
        largest.0 / largest.1
    }

    fn graph_file(self) -> GraphFile {
        let [left, _, product] = self.operands.types();
        let spec = |name: &str, dtype, shape: [usize; 2]| TensorSpec {
            name: name.to_owned(),
            dtype,
            shape: shape.map(Dim::Fixed).to_vec(),
        };
        GraphFile {
            file: "matmul.onnx".to_owned(),
            inputs: vec![spec("a", left, [self.rows, self.inner])],
            outputs: vec![spec("product", product, [self.rows, self.columns])],
            profile: Default::default(),
            num_parameters: 0,
        }
    }

    fn model(self) -> Vec<u8> {
        let Self { operands, rows, inner, columns } = self;
        let [left, weights, product] = operands.types();
        let value = |name: &str, data_type: DataType, shape: [usize; 2]| {
            let dim = shape.map(|size| DimensionProto { value: Some(Dimension::Value(size as i64)) }).to_vec();
            let tensor = TensorTypeProto { elem_type: Some(data_type as i32), shape: Some(TensorShapeProto { dim }) };
            ValueInfoProto { name: Some(name.to_owned()), r#type: Some(TypeProto { tensor_type: Some(tensor) }) }
        };
        let values = (0..inner * columns).map(|i| weight(i / columns, i % columns));
        let raw_data = match operands {
            Operands::F32 => values.flat_map(f32::to_le_bytes).collect(),
            Operands::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            Operands::Int8 => values.map(|value| value as i8 as u8).collect(),
        };
        let initializer = TensorProto {
            dims: vec![inner as i64, columns as i64],
            data_type: Some(weights as i32),
            name: Some("b".to_owned()),
            raw_data: Some(raw_data),
            ..TensorProto::default()
        };
        let node = NodeProto {
            input: vec!["a".to_owned(), "b".to_owned()],
            output: vec!["product".to_owned()],
            name: Some("product".to_owned()),
            op_type: Some(operands.operator().to_owned()),
            ..NodeProto::default()
        };
        let graph = GraphProto {
            node: vec![node],
            name: Some("matmul".to_owned()),
            initializer: vec![initializer],
            input: vec![value("a", left, [rows, inner])],
            output: vec![value("product", product, [rows, columns])],
        };
        let opset = OperatorSetIdProto { domain: Some(String::new()), version: Some(17) };
        let model =
            ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
        model.encode_to_vec()
    }
}

/// Element of the weights.
fn weight(row: usize, column: usize) -> f32 {
    ((row * 5 + column * 11) % 7) as f32 - 3.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_floats_and_integers_are_right() {
        for operands in [Operands::F32, Operands::Int8] {
            let rate = rate(Device::Cpu, 1, Product { operands, rows: 12, inner: 40, columns: 24 }).unwrap();
            assert!(rate.error < 1e-6 && rate.flops_per_second > 0.0, "{operands:?}: {rate:?}");
            let bytes = if operands == Operands::F32 { 4.0 } else { 1.0 };
            let expected = rate.flops_per_second / 2.0 / 12.0 * bytes;
            assert!((rate.weight_bytes_per_second / expected - 1.0).abs() < 1e-9);
        }
    }
}
