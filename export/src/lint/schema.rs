//! Operators' parameters and CUDA's kernels for them, from `data/cuda_kernels.json`, and with them the types of a graph's
//! values: each node's from those before it.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use serde::Deserialize;

use super::{Graph, Problem, op_name};
use crate::proto::NodeProto;

/// Type variables of an operator, and parameters that kernels constrain by name, with the types they have in a node.
pub(super) type Bindings = BTreeMap<&'static str, &'static str>;

#[derive(Deserialize)]
pub(super) struct Table {
    pub(super) version: String,
    operators: Vec<Schema>,
}

/// One operator in the versions from `since` on.
#[derive(Deserialize)]
pub(super) struct Schema {
    op: String,
    /// Version that it was last changed in.
    since: i64,
    /// Last version of the operator set with it; none for the last one known.
    until: Option<i64>,
    inputs: Vec<Parameter>,
    outputs: Vec<Parameter>,
    /// The last input may be there several times.
    variadic: bool,
    /// Inputs that CUDA's kernels read on the host.
    pub(super) host_inputs: Vec<usize>,
    /// Outputs that they write there.
    pub(super) host_outputs: Vec<usize>,
    /// Types that each kernel takes, by variable or by the name of a parameter.
    pub(super) kernels: Vec<BTreeMap<String, Vec<String>>>,
}

/// An input or output: of a variable's type or of a fixed one.
#[derive(Deserialize)]
struct Parameter {
    name: String,
    variable: Option<String>,
    r#type: Option<String>,
}

/// The last version of the standard operators that the table knows.
const MAX_OPSET: i64 = 23;

pub(super) static TABLE: LazyLock<Table> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../data/cuda_kernels.json")).expect("bug: data/cuda_kernels.json is damaged")
});

impl Schema {
    pub(super) fn find(op: &str, opset: i64) -> Option<&'static Self> {
        let is_current = |schema: &&Self| schema.since <= opset && opset <= schema.until.unwrap_or(MAX_OPSET);
        TABLE.operators.iter().filter(|schema| schema.op == op).find(is_current)
    }

    fn input(&'static self, index: usize) -> Option<&'static Parameter> {
        let last = if self.variadic { self.inputs.last() } else { None };
        self.inputs.get(index).or(last)
    }

    /// The types of a node's variables.
    ///
    /// # Errors
    /// Two types for one variable, or one that is not the parameter's.
    fn bind(&'static self, node: &NodeProto, types: &Types<'_>) -> Result<Bindings, String> {
        let mut bindings = Bindings::new();
        for (index, value) in node.input.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
            let found = types.of(value).ok_or_else(|| format!("the type of `{value}` is not known"))?;
            let parameter = self.input(index).ok_or_else(|| format!("`{value}` is one input too many"))?;
            bindings.insert(&parameter.name, found);
            let expected = match (&parameter.r#type, &parameter.variable) {
                (Some(fixed), _) => fixed,
                (None, Some(variable)) => *bindings.entry(variable).or_insert(found),
                (None, None) => found,
            };
            if found != expected {
                return Err(format!("input `{value}`: expected {expected}, got {found}"));
            }
        }
        Ok(bindings)
    }

    /// The type of output `index`. What no input tells is an attribute of `Cast`, else the only type that kernels have.
    fn output_type(&'static self, index: usize, node: &NodeProto, bindings: &Bindings) -> Option<&'static str> {
        let parameter = self.outputs.get(index)?;
        if let Some(fixed) = &parameter.r#type {
            return Some(fixed);
        }
        let variable = parameter.variable.as_deref()?;
        if let Some(bound) = bindings.get(variable) {
            return Some(bound);
        }
        if let Some(to) = node.attribute.iter().find(|attribute| attribute.name.as_deref() == Some("to")) {
            return type_name(i32::try_from(to.i?).ok()?);
        }
        let mut allowed = self.kernels.iter().filter_map(|kernel| kernel.get(variable)).flatten();
        let first = allowed.next()?;
        allowed.all(|other| other == first).then_some(first)
    }

    /// Whether a kernel takes these types.
    fn has_kernel(&'static self, bindings: &Bindings) -> bool {
        let takes = |kernel: &BTreeMap<String, Vec<String>>| {
            let fits = |(name, types): (&String, &Vec<String>)| {
                bindings.get(name.as_str()).is_none_or(|bound| types.iter().any(|found| found == bound))
            };
            kernel.iter().all(fits)
        };
        self.kernels.iter().any(takes)
    }
}

/// Types of a graph's values, by ONNX's names.
pub(super) struct Types<'g>(HashMap<&'g str, &'static str>);

impl<'g> Types<'g> {
    fn of(&self, value: &str) -> Option<&'static str> {
        self.0.get(value).copied()
    }

    /// Those of a node's inputs that are there; `?` for one that is not known.
    pub(super) fn of_inputs(&self, node: &NodeProto) -> Vec<String> {
        let values = node.input.iter().filter(|value| !value.is_empty());
        values.map(|value| self.of(value).unwrap_or("?").to_owned()).collect()
    }

    pub(super) fn is_half(&self, value: &str) -> bool {
        matches!(self.of(value), Some("float16" | "bfloat16"))
    }
}

/// What is known of a node.
pub(super) struct TypedNode {
    pub(super) op: String,
    pub(super) opset: i64,
    pub(super) schema: Option<&'static Schema>,
    /// Types of its variables, or why there are none.
    bindings: Result<Bindings, String>,
}

impl TypedNode {
    /// What is wrong with its types, if anything.
    pub(super) fn type_problem(&self) -> Option<Problem> {
        let reason = self.bindings.as_ref().err()?;
        Some(Problem::Types { reason: reason.clone() })
    }

    pub(super) fn has_kernel(&self) -> bool {
        match (self.schema, &self.bindings) {
            (Some(schema), Ok(bindings)) => schema.has_kernel(bindings),
            _ => false,
        }
    }

    pub(super) fn is_host_input(&self, index: usize) -> bool {
        self.schema.is_some_and(|schema| schema.host_inputs.contains(&index))
    }

    pub(super) fn is_host_output(&self, index: usize) -> bool {
        self.schema.is_some_and(|schema| schema.host_outputs.contains(&index))
    }
}

/// The types of all values, and what is known of each node, in the graph's order.
pub(super) fn infer<'g>(graph: &Graph<'g>) -> (Types<'g>, Vec<TypedNode>) {
    let mut types = Types(HashMap::new());
    for info in &graph.proto.input {
        let code = info.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.elem_type);
        if let (Some(name), Some(found)) = (&info.name, code.and_then(type_name)) {
            types.0.insert(name, found);
        }
    }
    for tensor in &graph.proto.initializer {
        if let (Some(name), Some(found)) = (&tensor.name, tensor.data_type.and_then(type_name)) {
            types.0.insert(name, found);
        }
    }
    let mut nodes = Vec::with_capacity(graph.proto.node.len());
    for node in &graph.proto.node {
        let op = op_name(node);
        let opset = graph.opset(&op);
        let schema = Schema::find(&op, opset);
        let bindings = schema.map_or_else(|| Ok(Bindings::new()), |schema| schema.bind(node, &types));
        if let (Some(schema), Ok(bindings)) = (schema, &bindings) {
            for (index, value) in node.output.iter().enumerate() {
                if let Some(found) = schema.output_type(index, node, bindings) {
                    types.0.insert(value, found);
                }
            }
        }
        nodes.push(TypedNode { op, opset, schema, bindings });
    }
    (types, nodes)
}

/// ONNX's name of its element type number `code`, for the types that the tables name.
fn type_name(code: i32) -> Option<&'static str> {
    Some(match code {
        1 => "float",
        2 => "uint8",
        3 => "int8",
        4 => "uint16",
        5 => "int16",
        6 => "int32",
        7 => "int64",
        9 => "bool",
        10 => "float16",
        11 => "double",
        12 => "uint32",
        13 => "uint64",
        16 => "bfloat16",
        17 => "float8e4m3fn",
        _ => return None,
    })
}
