//! `CachedAttention` over the slots of a KV cache, and `Attention` of whole sequences to themselves.

use half::f16;
use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType::{Float16, Float32, Int32, Int64};
use recaption_kernels::{CausalAttention, HeadDims, Rotary, Sequence, SlotCache, attend_all};

use super::{Machine, attribute, count, dims, elements, input, refuse};

/// Every row of `packed` f32 `[batch * num_tokens, 3 * heads * d]` to every row of its own sequence; gives `[…, heads * d]`.
pub(super) struct Attention(pub(super) Machine);

pub(super) struct AttentionKernel {
    machine: Machine,
    num_heads: usize,
    num_tokens: usize,
    scale: f32,
}

impl Operator for Attention {
    type Kernel<'a> = AttentionKernel;

    fn name(&self) -> &str {
        "Attention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'a>(&self, kernel: &KernelContext<'a>) -> ort::Result<AttentionKernel> {
        Ok(AttentionKernel {
            machine: self.0,
            num_heads: count(kernel, "num_heads")?.max(1),
            num_tokens: count(kernel, "num_tokens")?.max(1),
            scale: attribute(kernel, "scale")?,
        })
    }
}

impl Kernel for AttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let Self { machine, num_heads, num_tokens, scale } = *self;
        let packed = input(context, 0)?;
        let [rows, width] = dims(&packed)?;
        let heads = HeadDims { heads: num_heads, kv_heads: num_heads, head_dim: width / (3 * num_heads) };
        let Some(mut out) = context.output(0, [rows as i64, (width / 3) as i64])? else { return Ok(()) };
        let out = out.try_extract_tensor_mut::<f32>()?.1;
        let (packed, batch) = (elements(&packed)?, rows / num_tokens);
        let workers = machine.workers(context);
        attend_all(machine.level, &workers, heads, scale, packed, batch, num_tokens, out).map_err(refuse)
    }
}

/// Causal attention that first writes this run's keys and values into the cache.
///
/// Inputs: `packed` f32 `[batch * sequence, (heads + 2 kv_heads) * d]`, not rotated; `past_key` and `past_value` f16 `[batch,
/// kv_heads, max_length, d]`, whose inner layout is the kernel's own; `seqlens_k` i32 `[batch]` (tokens after this run, less one);
/// `num_tokens` i64 `[batch, 1]` (tokens of this run, padding on the right not counted); tables of cosines and sines f32
/// `[positions, d / 2]`. Outputs: f32 `[batch * sequence, heads * d]`, zeros where there is padding, and the cache after the run,
/// which is updated in place where past and present are one buffer.
pub(super) struct CachedAttention(pub(super) Machine);

pub(super) struct CachedAttentionKernel {
    machine: Machine,
    num_heads: usize,
    num_kv_heads: usize,
    scale: f32,
    sequences: Vec<Sequence>,
}

impl Operator for CachedAttention {
    type Kernel<'a> = CachedAttentionKernel;

    fn name(&self) -> &str {
        "CachedAttention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32, Float16, Float16, Int32, Int64, Float32, Float32].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [Float32, Float16, Float16].map(OperatorOutput::required)
    }

    fn create_kernel<'a>(&self, kernel: &KernelContext<'a>) -> ort::Result<CachedAttentionKernel> {
        Ok(CachedAttentionKernel {
            machine: self.0,
            num_heads: count(kernel, "num_heads")?,
            num_kv_heads: count(kernel, "num_kv_heads")?,
            scale: attribute(kernel, "scale")?,
            sequences: Vec::new(),
        })
    }
}

impl Kernel for CachedAttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let packed = input(context, 0)?;
        let past = [input(context, 1)?, input(context, 2)?];
        let [slots, kv_heads, max_len, head_dim] = dims(&past[0])?;
        if dims(&past[1])? != [slots, kv_heads, max_len, head_dim] {
            return Err(refuse("keys and values of the cache have other dimensions"));
        }
        let [rows, width] = dims(&packed)?;
        let heads = HeadDims { heads: self.num_heads, kv_heads: self.num_kv_heads, head_dim };
        let out_width = self.num_heads * head_dim;
        if kv_heads != self.num_kv_heads || width != out_width + 2 * kv_heads * head_dim {
            return Err(refuse(format!("rows of {width} with {kv_heads} heads of {head_dim} in the cache")));
        }
        let (lengths, new) = (input(context, 3)?, input(context, 4)?);
        self.set_sequences(rows, slots, elements(&lengths)?, elements(&new)?)?;
        let (cos, sin) = (input(context, 5)?, input(context, 6)?);
        let [_, half] = dims(&cos)?;
        let rotary = Rotary { cos: elements(&cos)?, sin: elements(&sin)?, rotary_dim: 2 * half };

        let shape = [slots, kv_heads, max_len, head_dim].map(|dim| dim as i64);
        let (Some(mut out), Some(mut keys), Some(mut values)) =
            (context.output(0, [rows as i64, out_width as i64])?, context.output(1, shape)?, context.output(2, shape)?)
        else {
            return Err(refuse("attention and both halves of the cache are wanted together"));
        };
        let [keys, values] = [(&mut keys, &past[0]), (&mut values, &past[1])].map(|(present, past)| {
            let past_start = elements::<f16>(past)?.as_ptr();
            let present = present.try_extract_tensor_mut::<f16>()?.1;
            if present.as_ptr() != past_start {
                present.copy_from_slice(elements(past)?);
            }
            Ok::<_, ort::Error>(present)
        });
        let cache = SlotCache { keys: keys?, values: values?, max_len };
        let out = out.try_extract_tensor_mut::<f32>()?.1;
        for (sequence, rows) in self.sequences.iter().zip(out.chunks_exact_mut(rows / slots * out_width)) {
            rows[sequence.new * out_width..].fill(0.0);
        }
        let Self { machine, scale, ref sequences, .. } = *self;
        let workers = machine.workers(context);
        let attention = CausalAttention { dims: heads, rotary: Some(rotary), scale };
        attention.run(machine.level, &workers, elements(&packed)?, sequences, cache, out).map_err(refuse)
    }
}

impl CachedAttentionKernel {
    /// Which rows of this run go where: slot `i` of the cache has row `i` of the batch.
    fn set_sequences(&mut self, rows: usize, slots: usize, lengths: &[i32], new: &[i64]) -> ort::Result<()> {
        if slots == 0 || rows == 0 || !rows.is_multiple_of(slots) || lengths.len() != slots || new.len() != slots {
            let (lengths, new) = (lengths.len(), new.len());
            return Err(refuse(format!("{rows} rows, {lengths} lengths and {new} counts for {slots} slots")));
        }
        let each = rows / slots;
        self.sequences.clear();
        for (slot, (&length, &new)) in lengths.iter().zip(new).enumerate() {
            let new = usize::try_from(new).ok().filter(|&new| new <= each);
            let past = new.and_then(|new| usize::try_from(i64::from(length) + 1 - new as i64).ok());
            let (Some(new), Some(past)) = (new, past) else {
                return Err(refuse(format!("slot {slot}: {new:?} tokens of {each}, length {length} + 1")));
            };
            self.sequences.push(Sequence { slot, past, new, first_row: slot * each });
        }
        Ok(())
    }
}
