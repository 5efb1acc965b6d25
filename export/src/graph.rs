//! `GraphBuilder` collects the nodes, inputs, outputs and initialisers of one ONNX graph and writes it as
//! `NAME.onnx` plus `NAME.onnx.data`.
//!
//! Weights are not held: an initialiser keeps a reference to where its bytes come from, and they stream to the data
//! file block by block when the graph is written, so memory does not grow with the model.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use prost::Message;
use sha2::{Digest, Sha256};

use crate::data_file::DataFile;
use crate::error::{Error, Result};
use crate::lint;
use crate::manifest::{BundleFile, DimRange, GraphFile, Saturation, Target, TensorSpec};
use crate::precision::GraphFormat;
use crate::proto::{
    AttributeProto, AttributeType, DataLocation, Dimension, DimensionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto,
    ValueInfoProto,
};
use crate::quantize::{BlockFormat, Encoded, Encoding, PackedFormat};
use crate::tensor::StoredTensor;
use crate::weight::Weight;

/// Domain of ONNX Runtime's fused operators.
pub(crate) const MICROSOFT: &str = "com.microsoft";
/// Domain of this project's own operators, for its CPU kernels.
pub(crate) const OWN: &str = "recaption";
/// Initialisers up to this size stay inside the `.onnx` file, where shape inference can read them.
const MAX_INLINE_BYTES: usize = 1024;

/// Element type of a tensor, with ONNX's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(i32)]
pub enum DataType {
    /// 32-bit float.
    F32 = 1,
    /// 8-bit unsigned integer.
    U8 = 2,
    /// 8-bit signed integer.
    I8 = 3,
    /// 32-bit signed integer.
    I32 = 6,
    /// 64-bit signed integer.
    I64 = 7,
    /// IEEE 16-bit float.
    F16 = 10,
    /// 16-bit float with the exponent of a 32-bit one.
    BF16 = 16,
    /// 8-bit float of 4 bits of exponent and 3 of mantissa, without infinities: ONNX's FLOAT8E4M3FN.
    F8E4M3 = 17,
}

impl DataType {
    const ALL: [Self; 8] = [Self::F32, Self::U8, Self::I8, Self::I32, Self::I64, Self::F16, Self::BF16, Self::F8E4M3];

    /// The type of ONNX's number `code`, if graphs here use it.
    pub(crate) fn from_onnx(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|&data_type| data_type as i32 == code)
    }

    /// As the manifest spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
        }
    }

    /// Bytes per element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::F8E4M3 => 1,
            Self::F16 | Self::BF16 => 2,
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

impl fmt::Display for Dim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(value) => value.fmt(formatter),
            Self::Named(name) => name.fmt(formatter),
        }
    }
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

/// Where an initialiser's bytes come from.
enum InitializerData<'a> {
    /// Little-endian bytes made by the exporter.
    Bytes(Vec<u8>),
    /// A weight as it is encoded. The encodings that make several tensors (values, scales, zero points) make them in one
    /// go; those after the first are the `further` ones.
    Weight { weight: Weight<'a>, encoding: Encoding, further: Vec<TensorHead> },
}

/// A tensor but for its bytes.
struct TensorHead {
    name: String,
    data_type: DataType,
    dims: Vec<usize>,
}

struct Initializer<'a> {
    head: TensorHead,
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
    format: GraphFormat,
    nodes: Vec<NodeProto>,
    initializers: Vec<Initializer<'a>>,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    profile: BTreeMap<String, DimRange>,
    /// Weights that are constants here: see [`Self::weight_values`].
    num_changed_parameters: usize,
}

impl<'a> GraphBuilder<'a> {
    pub(crate) fn new(name: &'static str, format: GraphFormat) -> Self {
        Self {
            name,
            format,
            nodes: Vec::new(),
            initializers: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            profile: BTreeMap::new(),
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

    /// Sizes that the free dimension `name` takes.
    pub(crate) fn dim_range(&mut self, name: &str, (min, opt, max): (usize, usize, usize)) {
        self.profile.insert(name.to_owned(), DimRange { min, opt, max });
    }

    /// What the graph is made of.
    pub(crate) fn format(&self) -> GraphFormat {
        self.format
    }

    /// A tensor of the checkpoint as an initialiser of the graph's float type.
    pub(crate) fn weight(&mut self, name: &str, tensor: StoredTensor<'a>) -> Value {
        self.float_weight(name, Weight::stored(tensor), self.format.float)
    }

    /// A weight as an initialiser of floats.
    pub(crate) fn float_weight(&mut self, name: &str, weight: Weight<'a>, data_type: DataType) -> Value {
        let head = TensorHead { name: name.to_owned(), data_type, dims: weight.dims() };
        let encoding = Encoding::Float(data_type);
        self.push_initializer(head, InitializerData::Weight { weight, encoding, further: vec![] })
    }

    /// A matrix `[N, K]` as s8 `[N, K]` and one f32 scale per row, `[N]`.
    pub(crate) fn int8_weight(&mut self, name: &str, weight: Weight<'a>, max: u8) -> (Value, Value) {
        let head = TensorHead { name: format!("{name}_quantized"), data_type: DataType::I8, dims: weight.dims() };
        let scales =
            TensorHead { name: format!("{name}_scale"), data_type: DataType::F32, dims: vec![weight.num_rows()] };
        let scales_value = Value(scales.name.clone());
        let encoding = Encoding::Int8Rows { max };
        let values = self.push_initializer(head, InitializerData::Weight { weight, encoding, further: vec![scales] });
        (values, scales_value)
    }

    /// A matrix `[N, K]` as FLOAT8E4M3FN `[N, K]` and one f16 scale, `[]`.
    pub(crate) fn float8_weight(&mut self, name: &str, weight: Weight<'a>) -> (Value, Value) {
        let head = TensorHead { name: format!("{name}_quantized"), data_type: DataType::F8E4M3, dims: weight.dims() };
        let scale = TensorHead { name: format!("{name}_scale"), data_type: DataType::F16, dims: vec![] };
        let scale_value = Value(scale.name.clone());
        let encoding = Encoding::Float8 { scale: None };
        let values = self.push_initializer(head, InitializerData::Weight { weight, encoding, further: vec![scale] });
        (values, scale_value)
    }

    /// A matrix `[N, K]` in the blocks of `MatMulNBits`: values, scales and, where the format has them, zero points.
    pub(crate) fn block_weight(&mut self, name: &str, weight: Weight<'a>, format: BlockFormat) -> Vec<Value> {
        let (num_rows, row_size) = (weight.num_rows(), weight.row_size());
        let num_blocks = format.num_blocks(row_size);
        let head = |suffix: &str, data_type, dims: &[usize]| TensorHead {
            name: format!("{name}_{suffix}"),
            data_type,
            dims: dims.to_vec(),
        };
        let values = head("quantized", DataType::U8, &[num_rows, num_blocks, format.block_bytes()]);
        let mut further = vec![head("scales", format.scale, &[num_rows * num_blocks])];
        if format.has_zero_points() {
            further.push(head("zero_points", DataType::U8, &[num_rows * format.zero_point_bytes(row_size)]));
        }
        let mut outputs = vec![Value(values.name.clone())];
        outputs.extend(further.iter().map(|head| Value(head.name.clone())));
        let encoding = Encoding::Blocks(format);
        self.push_initializer(values, InitializerData::Weight { weight, encoding, further });
        outputs
    }

    /// A matrix in panel order, as [`Weight::in_panels`] has it, packed for this project's kernels: weights, corrections, scales.
    pub(crate) fn packed_weight(&mut self, name: &str, weight: Weight<'a>, format: PackedFormat) -> [Value; 3] {
        let spec = format.spec;
        let head = |suffix: &str, data_type, dims: Vec<usize>| TensorHead {
            name: format!("{name}_{suffix}"),
            data_type,
            dims,
        };
        let values = head("packed", DataType::I8, spec.weight_dims().to_vec());
        let scales = head("scales", DataType::F32, spec.scale_dims().to_vec());
        let corrections = head("corrections", DataType::I32, spec.correction_dims().to_vec());
        let outputs = [&values, &corrections, &scales].map(|head| Value(head.name.clone()));
        let (encoding, further) = (Encoding::Packed(format), vec![scales, corrections]);
        self.push_initializer(values, InitializerData::Weight { weight, encoding, further });
        outputs
    }

    /// Values in the graph's float type.
    pub(crate) fn constant_float(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Value {
        self.constant_of(name, self.format.float, dims, values)
    }

    pub(crate) fn constant_f32(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Value {
        self.constant_of(name, DataType::F32, dims, values)
    }

    /// Values as floats of `data_type`.
    pub(crate) fn constant_of(&mut self, name: &str, data_type: DataType, dims: &[usize], values: &[f32]) -> Value {
        let mut encoded = Encoded::default();
        Encoding::Float(data_type).encode(values, values.len().max(1), None, &mut encoded);
        let head = TensorHead { name: name.to_owned(), data_type, dims: dims.to_vec() };
        self.push_initializer(head, InitializerData::Bytes(encoded.data))
    }

    /// Weights of the checkpoint that were changed on the way, in the graph's float type.
    pub(crate) fn weight_values(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Value {
        self.num_changed_parameters += values.len();
        self.constant_float(name, dims, values)
    }

    pub(crate) fn constant_i64(&mut self, name: &str, dims: &[usize], values: &[i64]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let head = TensorHead { name: name.to_owned(), data_type: DataType::I64, dims: dims.to_vec() };
        self.push_initializer(head, InitializerData::Bytes(bytes))
    }

    /// 8-bit numbers, as their bytes.
    pub(crate) fn constant_bytes(&mut self, name: &str, data_type: DataType, dims: &[usize], bytes: Vec<u8>) -> Value {
        let head = TensorHead { name: name.to_owned(), data_type, dims: dims.to_vec() };
        self.push_initializer(head, InitializerData::Bytes(bytes))
    }

    /// A one-dimensional i64 constant, made once however often it is asked for: shapes and axes.
    pub(crate) fn shape(&mut self, values: &[i64]) -> Value {
        let text: Vec<String> = values.iter().map(ToString::to_string).collect();
        let name = format!("/constants/shape_{}", text.join("_").replace('-', "m"));
        self.once(&name, |graph| graph.constant_i64(&name, &[values.len()], values))
    }

    /// The initialiser `name`, made by `make` when it is not there yet.
    pub(crate) fn once(&mut self, name: &str, make: impl FnOnce(&mut Self) -> Value) -> Value {
        match self.initializers.iter().any(|initializer| initializer.head.name == name) {
            true => Value(name.to_owned()),
            false => make(self),
        }
    }

    fn push_initializer(&mut self, head: TensorHead, data: InitializerData<'a>) -> Value {
        debug_assert!(
            self.initializers.iter().all(|initializer| initializer.head.name != head.name),
            "initialiser `{}` twice",
            head.name
        );
        let value = Value(head.name.clone());
        self.initializers.push(Initializer { head, data });
        value
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

    /// A graph input that is declared elsewhere.
    pub(crate) fn value_named(name: &str) -> Value {
        Value(name.to_owned())
    }

    /// `name/output_{index}`: the outputs of a node that has several.
    pub(crate) fn output_of(name: &str, index: usize) -> Value {
        Value(format!("{name}/output_{index}"))
    }

    /// `x` as another type; itself where it has that type already.
    pub(crate) fn cast(&mut self, name: &str, x: &Value, from: DataType, to: DataType) -> Value {
        match from == to {
            true => x.clone(),
            false => self.node("Cast", &format!("{name}/Cast"), &[x], vec![("to", Attribute::Int(to as i64))]),
        }
    }

    /// # Errors
    /// [`Error::UnfitForGpu`] with the first finding that is no exception, where the graph is for a GPU.
    fn check_for_gpu(&self) -> Result<()> {
        let providers = self.format.gpu_providers();
        if providers.is_empty() {
            return Ok(());
        }
        let further = |data: &InitializerData<'a>| match data {
            InitializerData::Bytes(_) => vec![],
            InitializerData::Weight { further, .. } => further.iter().map(TensorHead::proto).collect(),
        };
        let initializers = self.initializers.iter();
        let graph = GraphProto {
            node: self.nodes.clone(),
            name: Some(self.name.to_owned()),
            initializer: initializers.flat_map(|own| [vec![own.head.proto()], further(&own.data)].concat()).collect(),
            input: self.inputs.iter().map(value_info).collect(),
            output: self.outputs.iter().map(value_info).collect(),
        };
        let model = model(self.format.target, graph);
        let findings = providers.iter().flat_map(|provider| lint::check(*provider, self.name, &model, &self.profile));
        match findings.into_iter().find(|finding| finding.exception().is_none()) {
            None => Ok(()),
            Some(finding) => Err(Error::UnfitForGpu(finding)),
        }
    }

    /// Writes `NAME.onnx` and, where there are weights, `NAME.onnx.data` into `folder`.
    ///
    /// # Errors
    /// The disk's, [`Error::NonFiniteWeight`], [`Error::Cancelled`], or an operator that the target does not have.
    pub(crate) fn write(self, folder: &Path, cancel: &AtomicBool) -> Result<WrittenGraph> {
        lint::check_operators(self.name, &self.nodes, self.format.target)?;
        self.check_for_gpu()?;
        let model_file = format!("{}.onnx", self.name);
        let data_file = format!("{model_file}.data");
        let mut writer = InitializerWriter {
            file: DataFile::create(&folder.join(&data_file), cancel)?,
            location: data_file.clone(),
            num_parameters: self.num_changed_parameters,
            saturated: Vec::new(),
        };
        let mut initializers = Vec::with_capacity(self.initializers.len());
        for initializer in self.initializers {
            writer.append(initializer, &mut initializers)?;
        }
        let InitializerWriter { file, num_parameters, saturated, .. } = writer;
        let mut files = Vec::new();
        if let Some(file) = file.finish(data_file)? {
            files.push(file);
        }

        let model = model(
            self.format.target,
            GraphProto {
                node: self.nodes,
                name: Some(self.name.to_owned()),
                initializer: initializers,
                input: self.inputs.iter().map(value_info).collect(),
                output: self.outputs.iter().map(value_info).collect(),
            },
        );
        let bytes = model.encode_to_vec();
        files.push(write_hashed(folder, &model_file, &bytes)?);
        let graph = GraphFile {
            file: model_file,
            inputs: self.inputs,
            outputs: self.outputs,
            profile: self.profile,
            num_parameters,
        };
        Ok(WrittenGraph { graph, files, saturated })
    }
}

/// What [`GraphBuilder::write`] leaves behind.
pub(crate) struct WrittenGraph {
    pub(crate) graph: GraphFile,
    pub(crate) files: Vec<BundleFile>,
    pub(crate) saturated: Vec<Saturation>,
}

/// Writes initialisers one after the other.
struct InitializerWriter<'a> {
    file: DataFile<'a>,
    /// Name of the data file.
    location: String,
    num_parameters: usize,
    saturated: Vec<Saturation>,
}

impl InitializerWriter<'_> {
    fn append(&mut self, initializer: Initializer<'_>, protos: &mut Vec<TensorProto>) -> Result<()> {
        let Initializer { head, data } = initializer;
        let (weight, encoding, further) = match data {
            InitializerData::Bytes(bytes) => {
                protos.push(self.append_bytes(head, bytes)?);
                return Ok(());
            }
            InitializerData::Weight { weight, encoding, further } => (weight, encoding, further),
        };
        self.num_parameters += weight.num_parameters();
        let row_size = weight.row_size();
        let encoding = encoding.settle(&weight)?;
        let mut encoded = Encoded::default();
        let mut further_bytes = vec![Vec::new(); further.len()];
        if let Encoding::Float8 { scale: Some(scale) } = encoding {
            further_bytes[0].extend(scale.to_le_bytes());
        }
        let mut saturated = Saturation::new(&weight);
        let num_bytes = head.num_bytes();
        let is_inline = num_bytes <= MAX_INLINE_BYTES;
        if !is_inline {
            self.file.align()?;
        }
        let start = self.file.offset();
        let mut inline = Vec::new();
        let mut encode = |rows: &mut [f32]| {
            if encoding.is_f16() {
                saturated.saturate(rows);
            }
            encoding.encode(rows, row_size, weight.importance(), &mut encoded);
            further_bytes.iter_mut().zip([&mut encoded.scales, &mut encoded.zero_points]).for_each(|(all, new)| {
                all.append(new);
            });
            match is_inline {
                true => inline.append(&mut encoded.data),
                false => self.file.write_with(|block| std::mem::swap(block, &mut encoded.data))?,
            }
            Ok(())
        };
        match encoding.group_rows() {
            None => weight.stream(&mut encode)?,
            Some(count) => weight.stream_groups(count, &mut encode)?,
        }
        if saturated.count > 0 {
            self.saturated.push(saturated);
        }
        match is_inline {
            true => protos.push(head.inline(inline)),
            false => {
                debug_assert_eq!(self.file.offset() - start, num_bytes as u64, "`{}`", head.name);
                protos.push(head.external(&self.location, start));
            }
        }
        for (head, bytes) in further.into_iter().zip(further_bytes) {
            protos.push(self.append_bytes(head, bytes)?);
        }
        Ok(())
    }

    /// Few bytes stay in the returned message, where shape inference can read them.
    fn append_bytes(&mut self, head: TensorHead, bytes: Vec<u8>) -> Result<TensorProto> {
        debug_assert_eq!(bytes.len(), head.num_bytes(), "`{}`", head.name);
        if bytes.len() <= MAX_INLINE_BYTES {
            return Ok(head.inline(bytes));
        }
        self.file.align()?;
        let start = self.file.offset();
        self.file.write_with(|block| *block = bytes)?;
        Ok(head.external(&self.location, start))
    }
}

impl TensorHead {
    fn num_bytes(&self) -> usize {
        self.dims.iter().product::<usize>() * self.data_type.size()
    }

    fn proto(&self) -> TensorProto {
        TensorProto {
            dims: self.dims.iter().map(|&dim| dim as i64).collect(),
            data_type: Some(self.data_type as i32),
            name: Some(self.name.clone()),
            ..Default::default()
        }
    }

    fn inline(&self, bytes: Vec<u8>) -> TensorProto {
        TensorProto { raw_data: Some(bytes), ..self.proto() }
    }

    fn external(&self, location: &str, start: u64) -> TensorProto {
        let fields = [
            ("location", location.to_owned()),
            ("offset", start.to_string()),
            ("length", self.num_bytes().to_string()),
        ];
        TensorProto {
            data_location: Some(DataLocation::External as i32),
            external_data: fields
                .into_iter()
                .map(|(key, value)| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) })
                .collect(),
            ..self.proto()
        }
    }
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

/// `graph` with the versions that go with `target`.
fn model(target: Target, graph: GraphProto) -> ModelProto {
    let mut opset_import = vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(target.opset()) }];
    if target == Target::Cpu {
        opset_import.push(OperatorSetIdProto { domain: Some(OWN.to_owned()), version: Some(1) });
    }
    if target == Target::Ort {
        opset_import.push(OperatorSetIdProto { domain: Some(MICROSOFT.to_owned()), version: Some(1) });
    }
    ModelProto {
        ir_version: Some(target.ir_version()),
        producer_name: Some("recaption".to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        graph: Some(graph),
        opset_import,
    }
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
