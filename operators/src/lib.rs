//! The operators of target cpu: what the graphs of domain `recaption` compute, by the kernels of `recaption-kernels`.
//!
//! As a shared library it gives the operators to other programs that run ONNX Runtime (see [`library`]). Each session
//! has the domain of its own, since an operator has to know how many threads ONNX Runtime gives it. Kernels write into
//! the outputs alone; the KV cache, past and present bound to one buffer, is such an output.

mod attention;
mod greedy_ids;
pub mod helping;
pub mod library;
mod quantized_linear;

use std::cell::RefCell;

use ort::operator::{ComputeContext, KernelContext, OperatorDomain};
use ort::value::{PrimitiveTensorElementType, ValueRef};

pub use recaption_kernels::Level;
use recaption_kernels::{Quantized, Workers};

/// Name of the domain, as the exporter writes it.
const DOMAIN: &str = "recaption";

/// The operators for a session of `num_threads` threads.
///
/// # Errors
/// ONNX Runtime's.
pub fn domain(level: Level, num_threads: usize) -> ort::Result<OperatorDomain> {
    let machine = Machine { level, num_threads };
    OperatorDomain::new(DOMAIN)?
        .add(quantized_linear::OfRows(machine))?
        .add(quantized_linear::OfSamples(machine))?
        .add(attention::Attention(machine))?
        .add(attention::CachedAttention(machine))?
        .add(greedy_ids::GreedyIds(machine))
}

/// What the kernels run on.
#[derive(Clone, Copy)]
struct Machine {
    level: Level,
    num_threads: usize,
}

impl Machine {
    fn workers(self, context: &ComputeContext) -> SessionThreads<'_> {
        SessionThreads { context, num_threads: self.num_threads }
    }
}

/// The session's threads, the calling one among them; where that is the only one, also those that help it.
struct SessionThreads<'c> {
    context: &'c ComputeContext,
    num_threads: usize,
}

// SAFETY: `ParallelFor` and `helping::for_each` call the function once for each index and return when all calls have.
unsafe impl Workers for SessionThreads<'_> {
    fn num_threads(&self) -> usize {
        if self.num_threads == 1 { 1 + helping::num_helpers() } else { self.num_threads }
    }

    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.num_threads == 1 {
            return helping::for_each(num_tasks, task);
        }
        if num_tasks < 2 {
            return (0..num_tasks).for_each(task);
        }
        // A batch for each task: they are large, and unequal.
        self.context.par_for(num_tasks, num_tasks, task).expect("bug: a kernel without a context");
    }
}

thread_local! {
    /// Quantised activations between a norm and its product: one for each thread that runs sessions, so that it is in the cache
    /// and does not grow with the number of layers.
    static SCRATCH: RefCell<Quantized> = RefCell::default();
}

fn refuse(reason: impl std::fmt::Display) -> ort::Error {
    ort::Error::new(reason.to_string())
}

/// An attribute that the graph must have.
fn attribute<'a, T: ort::operator::FromKernelContext<'a>>(kernel: &KernelContext<'a>, name: &str) -> ort::Result<T> {
    kernel.get(name).ok_or_else(|| refuse(format!("attribute `{name}` is missing")))
}

/// An attribute that is a count.
fn count(kernel: &KernelContext<'_>, name: &str) -> ort::Result<usize> {
    let value: i64 = attribute(kernel, name)?;
    // Within 32 bits, so that sizes made of two counts need no further care.
    u32::try_from(value).map(|value| value as usize).map_err(|_| refuse(format!("attribute `{name}`: {value}")))
}

/// An input that the graph must have.
fn input<'c>(context: &'c ComputeContext, index: usize) -> ort::Result<ValueRef<'c>> {
    context.input(index)?.ok_or_else(|| refuse(format!("input {index} is missing")))
}

/// Elements of an input.
fn elements<'v, T: PrimitiveTensorElementType>(value: &'v ValueRef<'_>) -> ort::Result<&'v [T]> {
    Ok(value.try_extract_tensor::<T>()?.1)
}

/// Dimensions of an input.
fn dims<const N: usize>(value: &ValueRef<'_>) -> ort::Result<[usize; N]> {
    let shape = value.shape();
    let sizes: Vec<usize> = shape.iter().filter_map(|&dim| usize::try_from(dim).ok()).collect();
    sizes.try_into().map_err(|_| refuse(format!("expected {N} dimensions, got {shape:?}")))
}
