//! Whether ONNX Runtime's CUDA provider takes every node of a graph, and where each value lies.

use std::collections::{HashMap, HashSet};

use super::schema::{TABLE, TypedNode, Types, infer};
use super::{Graph, Notes, Problem};
use crate::proto::ModelProto;

/// Operators with subgraphs. CUDA has kernels for them, but a captured graph cannot branch.
const CONTROL_FLOW: &[&str] = &["If", "Loop", "Scan"];
/// Elements of an initialiser that ONNX Runtime takes along when it moves a node to the CPU
/// (`kSmallInitializerThreshold` of onnxruntime/core/framework/fallback_cpu_capability.cc).
const MAX_SMALL_INITIALIZER: i64 = 100;

pub(super) fn version() -> &'static str {
    &TABLE.version
}

/// Where ONNX Runtime puts things when a graph runs on CUDA.
///
/// What is here on the host is shape computation, and no obstacle to a CUDA graph: ONNX Runtime captures when no copies were
/// inserted and every node is CUDA's or the CPU's (`InferenceSession`; it warns of the latter). But a captured graph holds
/// kernels only: the host's part runs at capture, and its results (shapes, and what follows from each of `host_inputs`) are
/// baked in. So one captured graph is good for one shape of the inputs, and a host input must have a value that is right for all
/// replays, such as the cache's length for `total_sequence_length`.
///
/// Compared with onnxruntime-gpu 1.31.1, which logs where it puts nodes: it agrees on the graphs of two of the tests'
/// checkpoints (published-f16, gelu-f16), with no copies, and makes sessions with `enable_cuda_graph` of the 16-bit decoders, the
/// fp16 vision tower and the text tower; for the f32 decoder it reports two copies a layer and refuses. CUDA's own libraries were
/// stand-ins for that: nothing was computed or captured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CudaPlacement {
    /// Inputs of the graph that are read on the host: bind them to host memory.
    pub host_inputs: Vec<String>,
    /// Nodes that go to the CPU although CUDA has kernels, since all they take is on the host (`GetCpuPreferredNodes`).
    pub cpu_nodes: Vec<String>,
}

/// Where ONNX Runtime would put the graph's inputs and nodes; nodes without a kernel are taken for CUDA's.
#[must_use]
pub fn cuda_placement(model: &ModelProto) -> CudaPlacement {
    let graph = Graph::new(model);
    let (types, nodes) = infer(&graph);
    let placed = Placed::new(&graph, &types, &nodes);
    let proto = graph.proto;
    let mut host_inputs = Vec::new();
    for info in &proto.input {
        let name = info.name.as_deref().unwrap_or_default();
        let mut readers = proto.node.iter().enumerate().flat_map(|(at, node)| {
            node.input.iter().enumerate().filter(|(_, value)| *value == name).map(move |(index, _)| (at, index))
        });
        if readers.any(|(at, index)| placed.reads_on_host(at, &nodes[at], index)) {
            host_inputs.push(name.to_owned());
        }
    }
    let names = proto.node.iter().zip(&placed.is_on_cpu).filter(|(_, is_on_cpu)| **is_on_cpu);
    CudaPlacement { host_inputs, cpu_nodes: names.map(|(node, _)| node.name.clone().unwrap_or_default()).collect() }
}

pub(super) fn check(graph: &Graph<'_>) -> Notes {
    let (types, nodes) = infer(graph);
    let mut notes = Notes::default();
    for (node, typed) in graph.proto.node.iter().zip(&nodes) {
        let TypedNode { op, opset, .. } = typed;
        if CONTROL_FLOW.contains(&op.as_str()) {
            notes.at_node(node, Problem::ControlFlow { op: op.clone() });
        } else if let Some(problem) = typed.type_problem() {
            notes.at_node(node, problem);
        } else if !typed.has_kernel() {
            let types = types.of_inputs(node);
            notes.at_node(node, Problem::NoKernel { op: op.clone(), opset: *opset, types });
        }
    }
    note_copies(graph, &types, &nodes, &mut notes);
    notes
}

struct Placed<'g> {
    /// By node.
    is_on_cpu: Vec<bool>,
    /// Values that nodes leave on the host.
    on_host: HashSet<&'g str>,
}

impl<'g> Placed<'g> {
    /// As `GetCpuPreferredNodes` does: a node that reads what another one left on the host goes to the CPU when all it takes
    /// is such, a small initialiser or an input of the graph, is not in 16-bit floats, and is not read on the host anyway.
    fn new(graph: &Graph<'g>, types: &Types<'_>, nodes: &[TypedNode]) -> Self {
        let inputs: HashSet<&str> = graph.proto.input.iter().filter_map(|info| info.name.as_deref()).collect();
        let small = graph.proto.initializer.iter().filter(|tensor| {
            tensor
                .dims
                .iter()
                .try_fold(1_i64, |size, &dim| size.checked_mul(dim))
                .is_some_and(|size| size <= MAX_SMALL_INITIALIZER)
        });
        let small: HashSet<&str> = small.filter_map(|tensor| tensor.name.as_deref()).collect();
        let mut placed = Self { is_on_cpu: Vec::with_capacity(nodes.len()), on_host: HashSet::new() };
        for (node, typed) in graph.proto.node.iter().zip(nodes) {
            let may_move = |(index, value): (usize, &String)| {
                let value = value.as_str();
                let is_at_hand = small.contains(value) || inputs.contains(value);
                let is_left = placed.on_host.contains(value) && !typed.is_host_input(index);
                !types.is_half(value) && (is_at_hand || is_left)
            };
            let reads_host = node.input.iter().any(|value| placed.on_host.contains(value.as_str()));
            let is_on_cpu = reads_host && node.input.iter().enumerate().all(may_move);
            for (index, value) in node.output.iter().enumerate() {
                if is_on_cpu || typed.is_host_output(index) {
                    placed.on_host.insert(value);
                }
            }
            placed.is_on_cpu.push(is_on_cpu);
        }
        placed
    }

    /// Whether node `at` reads its input `index` on the host.
    fn reads_on_host(&self, at: usize, node: &TypedNode, index: usize) -> bool {
        self.is_on_cpu[at] || node.is_host_input(index)
    }
}

/// Notes values that are made on one side and read on the other. Initialisers are put where they are read, on both sides if
/// need be.
fn note_copies(graph: &Graph<'_>, types: &Types<'_>, nodes: &[TypedNode], notes: &mut Notes) {
    let placed = Placed::new(graph, types, nodes);
    let made: HashSet<&str> = graph.proto.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
    let inputs: HashSet<&str> = graph.proto.input.iter().filter_map(|info| info.name.as_deref()).collect();
    // An input of the graph lies where its first reader wants it.
    let mut bound: HashMap<&str, bool> = HashMap::new();
    for (at, node) in graph.proto.node.iter().enumerate() {
        for (index, value) in node.input.iter().enumerate() {
            let reads_on_host = placed.reads_on_host(at, &nodes[at], index);
            let is_on_host = if made.contains(value.as_str()) {
                placed.on_host.contains(value.as_str())
            } else if inputs.contains(value.as_str()) {
                *bound.entry(value).or_insert(reads_on_host)
            } else {
                continue;
            };
            if is_on_host != reads_on_host {
                notes.at_node(node, Problem::Copy { value: value.clone(), to_host: reads_on_host });
            }
        }
    }
}
