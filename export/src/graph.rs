//! `GraphBuilder` collects the nodes, inputs, outputs and initialisers of one ONNX graph and writes it as
//! `NAME.onnx` plus `NAME.onnx.data`.
//!
//! Weights are not held: an initialiser keeps a reference to where its bytes come from, and they stream to the data
//! file block by block when the graph is written, so memory does not grow with the model.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use prost::Message;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::manifest::{BundleFile, GraphFile, TensorSpec};
use crate::proto::{
    AttributeProto, AttributeType, DataLocation, Dimension, DimensionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto,
    ValueInfoProto,
};
use crate::tensor::StoredTensor;

/// ONNX IR version that goes with [`OPSET`].
const IR_VERSION: i64 = 11;
/// Version of the standard operator set: the first with `RMSNormalization`.
const OPSET: i64 = 23;
/// Domain of ONNX Runtime's fused operators.
pub(crate) const MICROSOFT: &str = "com.microsoft";
/// External tensors start at multiples of this, so that the data file can be mapped page by page.
const EXTERNAL_ALIGNMENT: u64 = 4096;
/// Initialisers up to this size stay inside the `.onnx` file, where shape inference can read them.
const MAX_INLINE_BYTES: usize = 1024;

/// Element type of a tensor, with ONNX's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(i32)]
pub enum DataType {
    /// 32-bit float.
    F32 = 1,
    /// 32-bit signed integer.
    I32 = 6,
    /// 64-bit signed integer.
    I64 = 7,
}

impl DataType {
    /// Bytes per element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

/// A dimension of a graph input or output: known, or named and free.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// Known when the graph is written.
    Fixed(usize),
    /// Chosen by the caller of each run.
    Named(String),
}

impl From<usize> for Dim {
    fn from(value: usize) -> Self {
        Self::Fixed(value)
    }
}

impl From<&str> for Dim {
    fn from(value: &str) -> Self {
        Self::Named(value.to_owned())
    }
}

/// The name of a tensor inside a graph.
#[derive(Clone, Debug)]
pub(crate) struct Value(String);

impl Value {
    /// Stands for an optional input that is left out.
    pub(crate) fn none() -> Self {
        Self(String::new())
    }
}

/// A piece of a weight.
pub(crate) enum WeightPart<'a> {
    /// A tensor of the checkpoint, or some of its rows.
    Stored(StoredTensor<'a>),
    /// So many rows of zeros.
    ZeroRows(usize),
}

/// Where an initialiser's bytes come from.
enum InitializerData<'a> {
    /// Parts one after the other along the first axis, converted to f32.
    Parts(Vec<WeightPart<'a>>),
    /// Little-endian bytes made by the exporter.
    Bytes(Vec<u8>),
}

struct Initializer<'a> {
    name: String,
    data_type: DataType,
    dims: Vec<usize>,
    data: InitializerData<'a>,
}

/// A node attribute.
pub(crate) enum Attribute {
    Int(i64),
    Float(f32),
    Ints(Vec<i64>),
    Text(&'static str),
}

impl Attribute {
    fn into_proto(self, name: &str) -> AttributeProto {
        let mut proto = AttributeProto { name: Some(name.to_owned()), ..Default::default() };
        let kind = match self {
            Self::Int(value) => {
                proto.i = Some(value);
                AttributeType::Int
            }
            Self::Float(value) => {
                proto.f = Some(value);
                AttributeType::Float
            }
            Self::Ints(values) => {
                proto.ints = values;
                AttributeType::Ints
            }
            Self::Text(value) => {
                proto.s = Some(value.as_bytes().to_vec());
                AttributeType::String
            }
        };
        proto.r#type = Some(kind as i32);
        proto
    }
}

/// Builds one graph. Names look like `/layers.0/self_attn/q_proj/Gemm`; a node's single output is
/// `{name}/output_0`.
pub(crate) struct GraphBuilder<'a> {
    name: &'static str,
    nodes: Vec<NodeProto>,
    initializers: Vec<Initializer<'a>>,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    /// Weights that are constants here: see [`Self::weight_values`].
    num_changed_parameters: usize,
}

impl<'a> GraphBuilder<'a> {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            nodes: Vec::new(),
            initializers: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            num_changed_parameters: 0,
        }
    }

    pub(crate) fn input(&mut self, name: &str, data_type: DataType, shape: Vec<Dim>) -> Value {
        self.inputs.push(TensorSpec { name: name.to_owned(), dtype: data_type, shape });
        Value(name.to_owned())
    }

    /// Declares `name` as a graph output; a node must produce it through [`Self::node_named`].
    pub(crate) fn output(&mut self, name: &str, data_type: DataType, shape: Vec<Dim>) -> Value {
        self.outputs.push(TensorSpec { name: name.to_owned(), dtype: data_type, shape });
        Value(name.to_owned())
    }

    /// A tensor of the checkpoint as an f32 initialiser.
    pub(crate) fn weight(&mut self, name: &str, tensor: StoredTensor<'a>) -> Value {
        let row_shape = tensor.shape()[1..].to_vec();
        self.weight_of_parts(name, vec![WeightPart::Stored(tensor)], &row_shape)
    }

    /// Parts with rows of `row_shape`, concatenated along the first axis, as one f32 initialiser.
    pub(crate) fn weight_of_parts(&mut self, name: &str, parts: Vec<WeightPart<'a>>, row_shape: &[usize]) -> Value {
        let num_rows = parts.iter().map(|part| match part {
            WeightPart::Stored(tensor) => tensor.shape()[0],
            WeightPart::ZeroRows(count) => *count,
        });
        let dims = [&[num_rows.sum()], row_shape].concat();
        self.push_initializer(name, DataType::F32, dims, InitializerData::Parts(parts))
    }

    pub(crate) fn constant_f32(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push_initializer(name, DataType::F32, dims.to_vec(), InitializerData::Bytes(bytes))
    }

    /// Weights of the checkpoint that were changed on the way.
    pub(crate) fn weight_values(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Value {
        self.num_changed_parameters += values.len();
        self.constant_f32(name, dims, values)
    }

    pub(crate) fn constant_i64(&mut self, name: &str, dims: &[usize], values: &[i64]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push_initializer(name, DataType::I64, dims.to_vec(), InitializerData::Bytes(bytes))
    }

    /// A one-dimensional i64 constant, made once however often it is asked for: shapes and axes.
    pub(crate) fn shape(&mut self, values: &[i64]) -> Value {
        let text: Vec<String> = values.iter().map(ToString::to_string).collect();
        let name = format!("/constants/shape_{}", text.join("_").replace('-', "m"));
        if self.initializers.iter().any(|initializer| initializer.name == name) {
            return Value(name);
        }
        self.constant_i64(&name, &[values.len()], values)
    }

    fn push_initializer(
        &mut self,
        name: &str,
        data_type: DataType,
        dims: Vec<usize>,
        data: InitializerData<'a>,
    ) -> Value {
        debug_assert!(
            self.initializers.iter().all(|initializer| initializer.name != name),
            "initialiser `{name}` twice"
        );
        self.initializers.push(Initializer { name: name.to_owned(), data_type, dims, data });
        Value(name.to_owned())
    }

    /// A node of the standard operator set with one output.
    pub(crate) fn node(
        &mut self,
        op_type: &str,
        name: &str,
        inputs: &[&Value],
        attributes: Vec<(&str, Attribute)>,
    ) -> Value {
        let output = Value(format!("{name}/output_0"));
        self.node_named("", op_type, name, inputs, std::slice::from_ref(&output), attributes);
        output
    }

    /// A node of ONNX Runtime's own operator set with one output.
    pub(crate) fn contrib_node(
        &mut self,
        op_type: &str,
        name: &str,
        inputs: &[&Value],
        attributes: Vec<(&str, Attribute)>,
    ) -> Value {
        let output = Value(format!("{name}/output_0"));
        self.node_named(MICROSOFT, op_type, name, inputs, std::slice::from_ref(&output), attributes);
        output
    }

    /// A node whose outputs are named by the caller: several outputs, or a graph output.
    pub(crate) fn node_named(
        &mut self,
        domain: &str,
        op_type: &str,
        name: &str,
        inputs: &[&Value],
        outputs: &[Value],
        attributes: Vec<(&str, Attribute)>,
    ) {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|value| value.0.clone()).collect(),
            output: outputs.iter().map(|value| value.0.clone()).collect(),
            name: Some(name.to_owned()),
            op_type: Some(op_type.to_owned()),
            attribute: attributes.into_iter().map(|(name, attribute)| attribute.into_proto(name)).collect(),
            domain: Some(domain.to_owned()),
        });
    }

    /// `name/output_{index}`: the outputs of a node that has several.
    pub(crate) fn output_of(name: &str, index: usize) -> Value {
        Value(format!("{name}/output_{index}"))
    }

    /// Writes `NAME.onnx` and, where there are weights, `NAME.onnx.data` into `folder`.
    ///
    /// # Errors
    /// The disk's, [`Error::NonFiniteWeight`], or [`Error::Cancelled`].
    pub(crate) fn write(self, folder: &Path, cancel: &AtomicBool) -> Result<WrittenGraph> {
        let model_file = format!("{}.onnx", self.name);
        let data_file = format!("{model_file}.data");
        let mut data = DataFile::create(&folder.join(&data_file), cancel)?;
        let mut initializers = Vec::with_capacity(self.initializers.len());
        let mut num_parameters = self.num_changed_parameters;
        for initializer in &self.initializers {
            num_parameters += initializer.num_parameters();
            initializers.push(data.append(initializer, &data_file)?);
        }
        let mut files = Vec::new();
        if let Some(file) = data.finish(data_file)? {
            files.push(file);
        }

        let model = ModelProto {
            ir_version: Some(IR_VERSION),
            producer_name: Some("recaption".to_owned()),
            producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            graph: Some(GraphProto {
                node: self.nodes,
                name: Some(self.name.to_owned()),
                initializer: initializers,
                input: self.inputs.iter().map(value_info).collect(),
                output: self.outputs.iter().map(value_info).collect(),
            }),
            opset_import: vec![
                OperatorSetIdProto { domain: Some(String::new()), version: Some(OPSET) },
                OperatorSetIdProto { domain: Some(MICROSOFT.to_owned()), version: Some(1) },
            ],
        };
        let bytes = model.encode_to_vec();
        files.push(write_hashed(folder, &model_file, &bytes)?);
        Ok(WrittenGraph {
            graph: GraphFile { file: model_file, inputs: self.inputs, outputs: self.outputs, num_parameters },
            files,
        })
    }
}

/// What [`GraphBuilder::write`] leaves behind.
pub(crate) struct WrittenGraph {
    pub(crate) graph: GraphFile,
    pub(crate) files: Vec<BundleFile>,
}

/// Writes `bytes` to `folder/name` and returns its entry for the manifest.
pub(crate) fn write_hashed(folder: &Path, name: &str, bytes: &[u8]) -> Result<BundleFile> {
    let path = folder.join(name);
    let mut file = File::create(&path).map_err(Error::io("create", &path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", &path))?;
    Ok(BundleFile { path: name.to_owned(), size: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) })
}

/// Lower-case hexadecimal of a hash.
#[must_use]
pub fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn value_info(spec: &TensorSpec) -> ValueInfoProto {
    let dim = spec
        .shape
        .iter()
        .map(|dim| DimensionProto {
            value: Some(match dim {
                Dim::Fixed(value) => Dimension::Value(*value as i64),
                Dim::Named(name) => Dimension::Param(name.clone()),
            }),
        })
        .collect();
    ValueInfoProto {
        name: Some(spec.name.clone()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: Some(spec.dtype as i32),
                shape: Some(TensorShapeProto { dim }),
            }),
        }),
    }
}

/// The `.onnx.data` file, hashed while it is written.
struct DataFile<'a> {
    cancel: &'a AtomicBool,
    path: std::path::PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    offset: u64,
}

impl<'a> DataFile<'a> {
    fn create(path: &Path, cancel: &'a AtomicBool) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Self {
            cancel,
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            hasher: Sha256::new(),
            offset: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))?;
        self.hasher.update(bytes);
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Appends one initialiser's bytes, or leaves them in the returned message when they are few.
    fn append(&mut self, initializer: &Initializer<'_>, location: &str) -> Result<TensorProto> {
        let num_bytes = initializer.dims.iter().product::<usize>() * initializer.data_type.size();
        let mut proto = TensorProto {
            dims: initializer.dims.iter().map(|&dim| dim as i64).collect(),
            data_type: Some(initializer.data_type as i32),
            name: Some(initializer.name.clone()),
            ..Default::default()
        };
        if num_bytes <= MAX_INLINE_BYTES {
            let mut bytes = Vec::with_capacity(num_bytes);
            initializer.stream(&mut |block| {
                bytes.extend_from_slice(block);
                Ok(())
            })?;
            proto.raw_data = Some(bytes);
            return Ok(proto);
        }
        let padding = self.offset.next_multiple_of(EXTERNAL_ALIGNMENT) - self.offset;
        self.write(&vec![0; padding as usize])?;
        let start = self.offset;
        initializer.stream(&mut |block| self.write(block))?;
        debug_assert_eq!(self.offset - start, num_bytes as u64, "`{}`", initializer.name);
        proto.data_location = Some(DataLocation::External as i32);
        proto.external_data =
            [("location", location.to_owned()), ("offset", start.to_string()), ("length", num_bytes.to_string())]
                .into_iter()
                .map(|(key, value)| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) })
                .collect();
        Ok(proto)
    }

    /// Syncs the file; removes it again when nothing went into it.
    fn finish(mut self, name: String) -> Result<Option<BundleFile>> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(Error::io("write", &self.path))?;
        if self.offset == 0 {
            std::fs::remove_file(&self.path).map_err(Error::io("remove", &self.path))?;
            return Ok(None);
        }
        Ok(Some(BundleFile { path: name, size: self.offset, sha256: hex(&self.hasher.finalize()) }))
    }
}

impl Initializer<'_> {
    /// Weights of the checkpoint in it.
    fn num_parameters(&self) -> usize {
        let InitializerData::Parts(parts) = &self.data else { return 0 };
        let stored = parts.iter().map(|part| match part {
            WeightPart::Stored(tensor) => tensor.num_elements(),
            WeightPart::ZeroRows(_) => 0,
        });
        stored.sum()
    }

    fn stream(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let parts = match &self.data {
            InitializerData::Bytes(bytes) => return sink(bytes),
            InitializerData::Parts(parts) => parts,
        };
        let row_size: usize = self.dims[1..].iter().product();
        parts.iter().try_for_each(|part| match part {
            WeightPart::Stored(tensor) => tensor.stream_f32(sink),
            WeightPart::ZeroRows(count) => sink(&vec![0; count * row_size * self.data_type.size()]),
        })
    }
}
