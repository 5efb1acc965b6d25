//! What stands in a graph's `.onnx` file: its operators, their versions, and the types of its weights; checked against the
//! manifest and the target. Takes files that anybody may have written: whatever is in them, the answer is an error or a
//! summary, and memory is bounded by [`MAX_GRAPH_BYTES`].

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use prost::Message;

use crate::bundle_manifest::BundleManifest;
use crate::error::{Error, Result};
use crate::graph::{DataType, Dim};
use crate::lint;
use crate::manifest::{GraphFile, TensorSpec, read_at_most};
use crate::proto::{DataLocation, Dimension, GraphProto, ModelProto, OperatorSetIdProto, TensorProto, ValueInfoProto};

/// Most bytes of an `.onnx` file that are read. The weights lie beside it: an 80-layer decoder has 1.4 MB (16 kB a layer with
/// the standard operators). Not more, since a node of two bytes takes 150 when it is decoded: the worst file of this size takes
/// 0.6 GB (8 MiB of empty nodes, measured).
pub const MAX_GRAPH_BYTES: u64 = 8 << 20;

/// What one graph is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GraphContents {
    /// Version of each operator set, by domain; the standard one is `ai.onnx`.
    pub opsets: BTreeMap<String, i64>,
    /// Nodes.
    pub num_nodes: usize,
    /// How often each operator occurs, with its domain where it is not the standard one.
    pub ops: BTreeMap<String, usize>,
    /// Bytes of the initialisers by element type: weights, their scales, tables and constants.
    pub weight_bytes: BTreeMap<&'static str, u64>,
    /// Bytes of the initialisers that a run reads whole: all but tables of which it looks up single rows.
    pub read_bytes: u64,
    /// Bytes of the `.onnx` file.
    pub onnx_bytes: u64,
    /// Bytes of the `.onnx.data` file, 0 without one.
    pub data_bytes: u64,
}

impl GraphContents {
    /// Reads a graph of the bundle in the folder `bundle`.
    ///
    /// # Errors
    /// [`Error::InvalidGraph`] when it does not decode, when its inputs or outputs are not the manifest's or its weights not
    /// in its data file; [`Error::ForeignOperator`]; [`Error::TooLarge`].
    pub fn read(bundle: &Path, manifest: &BundleManifest, graph: &GraphFile) -> Result<Self> {
        let path = bundle.join(&graph.file);
        let (model, onnx_bytes) = read_model(&path)?;
        let invalid = |reason: String| Error::InvalidGraph { path: path.clone(), reason };
        let Some(proto) = &model.graph else { return Err(invalid("it holds no graph".to_owned())) };
        check_names(&model).map_err(invalid)?;
        lint::check_operators(&graph.file, &proto.node, manifest.header().target)?;
        check_specs("input", &graph.inputs, &proto.input).map_err(invalid)?;
        check_specs("output", &graph.outputs, &proto.output).map_err(invalid)?;

        let data = manifest.file(&format!("{}.data", graph.file));
        let data_bytes = data.map_or(0, |file| file.size);
        let (weight_bytes, read_bytes) =
            weight_bytes(proto, data.map(|file| (file.path.as_str(), file.size))).map_err(invalid)?;
        let opset = |domain: Option<&str>| match domain {
            None | Some("") => "ai.onnx".to_owned(),
            Some(domain) => domain.to_owned(),
        };
        let versions =
            |import: &OperatorSetIdProto| (opset(import.domain.as_deref()), import.version.unwrap_or_default());
        let opsets: BTreeMap<String, i64> = model.opset_import.iter().map(versions).collect();
        if !opsets.contains_key("ai.onnx") {
            return Err(invalid("it is damaged: it names no version of the standard operators".to_owned()));
        }
        Ok(Self {
            opsets,
            num_nodes: proto.node.len(),
            ops: lint::count_ops(&proto.node),
            weight_bytes,
            read_bytes,
            onnx_bytes,
            data_bytes,
        })
    }
}

/// The graph of an `.onnx` file, and its size.
pub(crate) fn read_model(path: &Path) -> Result<(ModelProto, u64)> {
    let bytes = read_at_most(path, MAX_GRAPH_BYTES)?;
    let invalid = |error| Error::InvalidGraph {
        path: path.to_owned(),
        reason: format!("it is damaged or no ONNX graph: {error}"),
    };
    Ok((ModelProto::decode(bytes.as_slice()).map_err(invalid)?, bytes.len() as u64))
}

/// Names are shown to people: none of them may steer a terminal.
fn check_names(model: &ModelProto) -> Result<(), String> {
    let nodes = model.graph.iter().flat_map(|graph| &graph.node);
    let names = nodes
        .flat_map(|node| [&node.name, &node.op_type, &node.domain])
        .chain(model.opset_import.iter().map(|import| &import.domain));
    match names.flatten().find(|name| name.chars().any(char::is_control)) {
        Some(name) => Err(format!("name {name:?}: control characters are not allowed")),
        None => Ok(()),
    }
}

/// # Errors
/// The first input or output that is not as the manifest says.
fn check_specs(kind: &str, expected: &[TensorSpec], found: &[ValueInfoProto]) -> Result<(), String> {
    for (spec, info) in expected.iter().zip(found) {
        let name = info.name.as_deref().unwrap_or_default();
        if name != spec.name {
            return Err(format!("{kind} `{}` of the manifest: got {name:?} in its place", spec.name));
        }
        let shape = shape(info);
        let data_type = info.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.elem_type);
        let data_type = data_type.and_then(DataType::from_onnx);
        if data_type != Some(spec.dtype) || shape.as_ref() != Some(&spec.shape) {
            let found = TensorSpec { name: String::new(), dtype: spec.dtype, shape: shape.unwrap_or_default() };
            return Err(format!(
                "{kind} `{name}`: expected {} {}, got {} {:?}",
                spec.dtype.name(),
                spec.shape_text(),
                data_type.map_or("another type", DataType::name),
                found.shape_text(),
            ));
        }
    }
    match expected.len() == found.len() {
        true => Ok(()),
        false => Err(format!("expected {} {kind}s, got {}", expected.len(), found.len())),
    }
}

fn shape(info: &ValueInfoProto) -> Option<Vec<Dim>> {
    let shape = info.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?;
    let dim = |value: &Dimension| match value {
        Dimension::Value(value) => usize::try_from(*value).ok().map(Dim::Fixed),
        Dimension::Param(name) => Some(Dim::Named(name.clone())),
    };
    shape.dim.iter().map(|proto| proto.value.as_ref().and_then(dim)).collect()
}

/// Sums the initialisers by type, and those of them that are read whole; `data` is the name and size of the file that the large
/// ones are in.
fn weight_bytes(graph: &GraphProto, data: Option<(&str, u64)>) -> Result<(BTreeMap<&'static str, u64>, u64), String> {
    let readers = graph.node.iter().filter(|node| node.op_type.as_deref() != Some("Gather"));
    let read: HashSet<&str> = readers.flat_map(|node| node.input.iter().map(String::as_str)).collect();
    let (mut sums, mut read_bytes) = (BTreeMap::new(), 0_u64);
    for tensor in &graph.initializer {
        let name = tensor.name.as_deref().unwrap_or_default();
        let (data_type, size) =
            check_tensor(tensor, data).map_err(|reason| format!("initialiser {name:?}: {reason}"))?;
        let sum: &mut u64 = sums.entry(data_type.name()).or_default();
        *sum = sum.saturating_add(size);
        if read.contains(name) {
            read_bytes = read_bytes.saturating_add(size);
        }
    }
    Ok((sums, read_bytes))
}

/// An initialiser's type and size in bytes; it must have as many where it says its data is.
fn check_tensor(tensor: &TensorProto, data: Option<(&str, u64)>) -> Result<(DataType, u64), String> {
    let code = tensor.data_type.unwrap_or_default();
    let data_type = DataType::from_onnx(code).ok_or_else(|| format!("element type {code} is not one of ours"))?;
    let size =
        tensor.dims.iter().try_fold(data_type.size() as u64, |size, &dim| size.checked_mul(u64::try_from(dim).ok()?));
    let size = size.ok_or_else(|| format!("shape {:?} is none", tensor.dims))?;
    if tensor.data_location != Some(DataLocation::External as i32) {
        let found = tensor.raw_data.as_ref().map_or(0, Vec::len) as u64;
        return match found == size {
            true => Ok((data_type, size)),
            false => Err(format!("expected {size} bytes, got {found}")),
        };
    }
    let field = |key: &str| {
        let entry = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some(key));
        entry.and_then(|entry| entry.value.as_deref())
    };
    let number = |key: &str| field(key).and_then(|text| text.parse::<u64>().ok());
    let (file, file_size) = data.ok_or("its data is in another file, and the bundle has none for this graph")?;
    if field("location") != Some(file) {
        return Err(format!("expected its data in `{file}`, got {:?}", field("location").unwrap_or_default()));
    }
    let (Some(offset), Some(length)) = (number("offset"), number("length")) else {
        return Err("it does not say where its data is".to_owned());
    };
    if length != size {
        return Err(format!("expected {size} bytes, got {length}"));
    }
    match offset.checked_add(length).is_some_and(|end| end <= file_size) {
        true => Ok((data_type, size)),
        false => Err(format!("{length} bytes from {offset} on are beyond the end of `{file}`")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;

    use super::*;
    use crate::manifest::Target;
    use crate::proto::NodeProto;
    use crate::{ExportOptions, export};

    struct Exported {
        folder: tempfile::TempDir,
        manifest: BundleManifest,
    }

    impl Exported {
        fn graph(&self, wanted: &str) -> &GraphFile {
            let graphs = self.manifest.named_graphs();
            graphs.into_iter().find(|(name, _)| *name == wanted).unwrap().1
        }

        fn num_layers(&self) -> usize {
            let BundleManifest::Llava(manifest) = &self.manifest else { panic!("a captioner") };
            manifest.decoder.num_layers
        }

        fn new(target: Target) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/checkpoints/published-f16");
            let options = ExportOptions { target, ..ExportOptions::default() };
            let manifest = export(&checkpoint, &folder.path().join("bundle"), &options).unwrap();
            Self { folder, manifest }
        }

        fn bundle(&self) -> PathBuf {
            self.folder.path().join("bundle")
        }

        fn read(&self) -> Result<GraphContents> {
            GraphContents::read(&self.bundle(), &self.manifest, self.graph("decoder"))
        }

        /// What is said of the decoder after `edit`.
        fn refusal(&self, edit: impl FnOnce(&mut ModelProto)) -> String {
            let path = self.bundle().join("decoder.onnx");
            let original = std::fs::read(&path).unwrap();
            let mut model = ModelProto::decode(original.as_slice()).unwrap();
            edit(&mut model);
            std::fs::write(&path, model.encode_to_vec()).unwrap();
            let error = self.read().expect_err("refused");
            assert!(error.hint().is_some());
            std::fs::write(&path, original).unwrap();
            error.to_string()
        }
    }

    fn graph(model: &mut ModelProto) -> &mut GraphProto {
        model.graph.as_mut().unwrap()
    }

    #[test]
    fn what_export_writes_passes_and_is_counted() {
        for target in [Target::Ort, Target::TensorRt] {
            let exported = Exported::new(target);
            for (name, graph) in exported.manifest.named_graphs() {
                let contents = GraphContents::read(&exported.bundle(), &exported.manifest, graph).unwrap();
                // What reads images is of standard operators in either target.
                let is_fused = target == Target::Ort && name == "decoder";
                let opset = if is_fused { target.opset() } else { Target::TensorRt.opset() };
                assert_eq!(contents.opsets["ai.onnx"], opset, "{name}");
                assert_eq!(contents.opsets.len(), 1 + usize::from(is_fused), "{name}");
                assert_eq!(contents.ops.keys().any(|op| op.contains('.')), is_fused, "{name}");
                assert_eq!(contents.ops.values().sum::<usize>(), contents.num_nodes, "{name}");
                // fp32: four bytes a parameter, and the constants.
                assert!(contents.weight_bytes["f32"] >= 4 * graph.num_parameters as u64, "{name}");
                let sum: u64 = contents.weight_bytes.values().sum();
                assert!(sum <= contents.data_bytes + contents.onnx_bytes, "{name}");
            }
            let decoder = exported.read().unwrap();
            let num_layers = exported.num_layers();
            let fused = decoder.ops.get("com.microsoft.GroupQueryAttention").copied().unwrap_or_default();
            assert_eq!(fused, if target == Target::Ort { num_layers } else { 0 });
        }
    }

    #[test]
    fn a_foreign_operator_is_refused_by_the_name_of_its_node() {
        let exported = Exported::new(Target::TensorRt);
        let node = NodeProto {
            name: Some("/layers.0/Loop".to_owned()),
            op_type: Some("QuickGelu".to_owned()),
            domain: Some("com.microsoft".to_owned()),
            ..Default::default()
        };
        let message = exported.refusal(|model| graph(model).node.push(node));
        assert_eq!(
            message,
            "`decoder.onnx` node `/layers.0/Loop`: operator `com.microsoft.QuickGelu` is not one of target tensorrt"
        );
    }

    #[test]
    fn a_graph_that_is_not_the_manifests_is_refused() {
        let exported = Exported::new(Target::Ort);
        let check = |edit: &dyn Fn(&mut ModelProto), expected: &str| {
            let message = exported.refusal(edit);
            assert!(message.contains(expected), "expected {expected}: {message}");
        };
        check(&|model| graph(model).input.truncate(3), "inputs, got 3");
        check(
            &|model| graph(model).output.swap(0, 1),
            "output `present.0.key` of the manifest: got \"present.0.value\"",
        );
        let f16 = |model: &mut ModelProto| {
            graph(model).input[2].r#type.as_mut().unwrap().tensor_type.as_mut().unwrap().elem_type = Some(10);
        };
        check(&f16, "input `image_features`: expected f32 [rows, ");
        check(&|model| graph(model).input[2].r#type = None, "got another type \"[]\"");
        check(&|model| model.graph = None, "it holds no graph");
        let steering = |model: &mut ModelProto| {
            model.opset_import.push(OperatorSetIdProto { domain: Some("\u{1b}[2J".to_owned()), version: Some(1) });
        };
        check(&steering, "control characters");
    }

    #[test]
    fn weights_must_be_where_the_graph_says() {
        let exported = Exported::new(Target::Ort);
        let is_external = |tensor: &&mut TensorProto| !tensor.external_data.is_empty();
        let check = |edit: &dyn Fn(&mut TensorProto), expected: &str| {
            let message =
                exported.refusal(|model| edit(graph(model).initializer.iter_mut().find(is_external).unwrap()));
            assert!(message.contains("initialiser") && message.contains(expected), "expected {expected}: {message}");
        };
        let set = |tensor: &mut TensorProto, key: &str, value: &str| {
            let mut entries = tensor.external_data.iter_mut();
            entries.find(|entry| entry.key.as_deref() == Some(key)).unwrap().value = Some(value.to_owned());
        };
        check(&|tensor| set(tensor, "location", "/etc/passwd"), "expected its data in `decoder.onnx.data`");
        check(&|tensor| set(tensor, "offset", "18446744073709551615"), "beyond the end");
        check(&|tensor| set(tensor, "offset", "-1"), "does not say where");
        check(&|tensor| set(tensor, "length", "1"), "got 1");
        check(&|tensor| tensor.dims = vec![i64::MAX, i64::MAX], "shape");
        check(&|tensor| tensor.dims = vec![-1], "shape");
        check(&|tensor| tensor.data_type = Some(99), "element type 99");
        check(&|tensor| tensor.data_location = None, "got 0");
    }

    #[test]
    fn damaged_files_are_errors_whatever_is_in_them() {
        let exported = Exported::new(Target::Ort);
        let path = exported.bundle().join("projector.onnx");
        let original = std::fs::read(&path).unwrap();
        let read = || GraphContents::read(&exported.bundle(), &exported.manifest, exported.graph("projector"));
        for length in 0..original.len() {
            std::fs::write(&path, &original[..length]).unwrap();
            // Cut off before its last field, the version of `com.microsoft`, a file may still be whole.
            if let Ok(contents) = read() {
                assert!(!contents.opsets.contains_key("com.microsoft"), "{length}");
            }
        }
        for position in 0..original.len() {
            let mut damaged = original.clone();
            damaged[position] ^= 0x55;
            std::fs::write(&path, damaged).unwrap();
            let _ = read();
        }
        File::create(&path).unwrap().set_len(MAX_GRAPH_BYTES + 1).unwrap();
        assert!(matches!(read(), Err(Error::TooLarge { .. })));
    }
}
