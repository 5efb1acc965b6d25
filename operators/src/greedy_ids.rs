//! `GreedyIds`: `logits` f32 `[batch, vocab]` to `next_ids` i64 `[batch]`, -1 for rows with NaN or infinity.

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;
use recaption_kernels::greedy_ids;

use super::{Machine, dims, elements, input, refuse};

#[derive(Clone, Copy)]
pub(super) struct GreedyIds(pub(super) Machine);

impl Operator for GreedyIds {
    type Kernel<'a> = Self;

    fn name(&self) -> &str {
        "GreedyIds"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Int64)]
    }

    fn create_kernel<'a>(&self, _kernel: &KernelContext<'a>) -> ort::Result<Self> {
        Ok(*self)
    }
}

impl Kernel for GreedyIds {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let logits = input(context, 0)?;
        let [batch, vocab] = dims(&logits)?;
        let Some(mut ids) = context.output(0, [batch as i64])? else { return Ok(()) };
        let ids = ids.try_extract_tensor_mut::<i64>()?.1;
        greedy_ids(self.0.level, &self.0.workers(context), elements(&logits)?, vocab, ids).map_err(refuse)
    }
}
