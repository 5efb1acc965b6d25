//! Attention over the slots of a KV cache, and of whole sequences to themselves.
//!
//! A row of the result depends on its query and on the keys and values it sees, in the order of their positions, and on
//! nothing else: not on what is computed beside it, nor on how many tokens went through the cache at a time. Scores are one
//! chain of fused multiply-adds over the head's width; blocks of [`BLOCK`] keys, which begin at multiples of that, go one after
//! the other into a softmax that is rescaled when a larger score turns up; values are one chain over the keys. What a row does
//! not see is left out: a weight of 0 would still make NaN of values that are not finite.
//!
//! Keys lie in panels of 16 positions, `[max_len / 16][head_dim][16]`, so that a vector has the scores of 16 keys; values lie
//! row by row, `[max_len][head_dim]`. Both are f16.

use std::cell::RefCell;
use std::ops::Range;

use half::f16;

use crate::error::check_len;
use crate::level::Work;
use crate::math::exp2;
use crate::simd::{LANES, Simd};
use crate::workers::{Shared, Workers};
use crate::{Error, Level};

/// Positions whose keys lie together: a cache's length is a multiple of it.
pub const KEY_PANEL: usize = LANES;

/// Keys that go into the softmax at a time.
const BLOCK: usize = 128;
/// Rows of queries for which a block of keys and values is made ready.
const TASK_ROWS: usize = 192;

/// Number and width of the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadDims {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl HeadDims {
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of a row of queries, keys and values.
    fn packed(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn check(self) -> Result<(), Error> {
        const MAX: usize = 1 << 16;
        let Self { heads, kv_heads, head_dim } = self;
        let is_right = (1..=MAX).contains(&heads) && (1..=MAX).contains(&kv_heads) && (1..=MAX).contains(&head_dim);
        if is_right && heads.is_multiple_of(kv_heads) {
            return Ok(());
        }
        Err(Error::Shape(format!("attention: {heads} heads over {kv_heads} of width {head_dim}")))
    }
}

/// Rotary position embedding: element `i` of a head turns with element `i + rotary_dim / 2`; those behind stay.
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// `[positions, rotary_dim / 2]`
    pub cos: &'a [f32],
    /// `[positions, rotary_dim / 2]`
    pub sin: &'a [f32],
    /// Even, at most the head's width.
    pub rotary_dim: usize,
}

/// One sequence of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its slot of the cache, which no other sequence of the run has.
    pub slot: usize,
    /// Tokens in the cache before the run.
    pub past: usize,
    /// Tokens that the run adds.
    pub new: usize,
    /// Row of the first of them.
    pub first_row: usize,
}

/// Keys and values of all slots, `[slots, kv_heads, max_len, head_dim]` each.
#[derive(Debug)]
pub struct SlotCache<'a> {
    /// In panels.
    pub keys: &'a mut [f16],
    /// Row by row.
    pub values: &'a mut [f16],
    /// A multiple of [`KEY_PANEL`].
    pub max_len: usize,
}

/// A decoder's attention.
#[derive(Clone, Copy, Debug)]
pub struct CausalAttention<'a> {
    /// Heads.
    pub dims: HeadDims,
    /// How queries and keys turn with their position, if they do.
    pub rotary: Option<Rotary<'a>>,
    /// Factor of the scores.
    pub scale: f32,
}

impl CausalAttention<'_> {
    /// Puts the keys and values of `packed` `[rows, (heads + 2 kv_heads) head_dim]` (queries, keys, values) into the cache and gives
    /// `out` `[rows, heads head_dim]`, each token seeing those of its sequence up to itself. Rows of no sequence stay as they are.
    pub fn run(
        &self,
        level: Level,
        workers: &dyn Workers,
        packed: &[f32],
        sequences: &[Sequence],
        cache: SlotCache<'_>,
        out: &mut [f32],
    ) -> Result<(), Error> {
        self.check(packed, sequences, &cache, out)?;
        let HeadDims { kv_heads, head_dim, .. } = self.dims;
        let (attention, max_len) = (*self, cache.max_len);
        let (keys, values, out) = (Shared::new(cache.keys), Shared::new(cache.values), Shared::new(out));
        let head_size = max_len * head_dim;
        workers.for_each(sequences.len() * kv_heads, &|task| {
            let (sequence, kv_head) = (sequences[task / kv_heads], task % kv_heads);
            let start = (sequence.slot * kv_heads + kv_head) * head_size;
            // SAFETY: a task has one head of one slot, and no two sequences have one slot (checked).
            let (keys, values) = unsafe { (keys.part(start, head_size), values.part(start, head_size)) };
            level.dispatch(Store { attention, packed, sequence, kv_head, keys, values });
        });
        let tokens_of_task = (TASK_ROWS / self.dims.group()).max(1);
        let longest = sequences.iter().map(|sequence| sequence.new.div_ceil(tokens_of_task)).max().unwrap_or(0);
        let chunks = longest.max(1);
        workers.for_each(sequences.len() * kv_heads * chunks, &|task| {
            let (chunk, task) = (task % chunks, task / chunks);
            let (sequence, kv_head) = (sequences[task / kv_heads], task % kv_heads);
            let tokens = chunk * tokens_of_task..sequence.new.min((chunk + 1) * tokens_of_task);
            if tokens.is_empty() {
                return;
            }
            let start = (sequence.slot * kv_heads + kv_head) * head_size;
            // SAFETY: the tasks that wrote are over; these read.
            let (keys, values) = unsafe { (keys.shared_part(start, head_size), values.shared_part(start, head_size)) };
            level.dispatch(Attend { attention, packed, sequence, kv_head, tokens, keys, values, out: &out });
        });
        Ok(())
    }

    fn check(&self, packed: &[f32], sequences: &[Sequence], cache: &SlotCache<'_>, out: &[f32]) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::Shape(format!("attention: {reason}")));
        self.dims.check()?;
        let HeadDims { heads, kv_heads, head_dim } = self.dims;
        let (width, max_len) = (self.dims.packed(), cache.max_len);
        let rows = packed.len() / width;
        check_len("packed", rows * width, packed.len())?;
        check_len("out", rows * heads * head_dim, out.len())?;
        let slot = kv_heads.checked_mul(head_dim).and_then(|size| size.checked_mul(max_len)).unwrap_or(0);
        if slot == 0 || !max_len.is_multiple_of(KEY_PANEL) || !cache.keys.len().is_multiple_of(slot) {
            return refuse(format!("a cache of {} for {kv_heads} x {max_len} x {head_dim}", cache.keys.len()));
        }
        check_len("values", cache.keys.len(), cache.values.len())?;
        let mut positions = usize::MAX;
        if let Some(Rotary { cos, sin, rotary_dim }) = self.rotary {
            if rotary_dim == 0 || rotary_dim % 2 != 0 || rotary_dim > head_dim {
                return refuse(format!("rotation of {rotary_dim} of {head_dim}"));
            }
            positions = cos.len() / (rotary_dim / 2);
            check_len("sines", cos.len(), sin.len())?;
        }
        let mut slots: Vec<usize> = sequences.iter().map(|sequence| sequence.slot).collect();
        slots.sort_unstable();
        let is_twice = slots.windows(2).any(|pair| pair[0] == pair[1]);
        if is_twice || slots.last().is_some_and(|&last| last >= cache.keys.len() / slot) {
            return refuse(format!("slots {slots:?} of {}", cache.keys.len() / slot));
        }
        for &Sequence { past, new, first_row, .. } in sequences {
            let end = past.saturating_add(new);
            if end > max_len.min(positions) || first_row.saturating_add(new) > rows {
                return refuse(format!("{past} + {new} tokens of {max_len}, rows from {first_row} of {rows}"));
            }
        }
        // Rows of two sequences may not be the same: tasks write them.
        let mut ranges: Vec<_> =
            sequences.iter().filter(|s| s.new > 0).map(|s| (s.first_row, s.first_row + s.new)).collect();
        ranges.sort_unstable();
        match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => refuse(format!("rows {pair:?} overlap")),
            None => Ok(()),
        }
    }

    /// The head at `from` of `row`, rotated to `position`, times `factor`, into `to`.
    #[inline(always)]
    fn rotated<S: Simd>(&self, s: S, head: &[f32], position: usize, factor: f32, to: &mut [f32]) {
        let by = s.splat(factor);
        let copied = match self.rotary {
            None => 0,
            Some(Rotary { cos, sin, rotary_dim }) => {
                let half = rotary_dim / 2;
                let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
                let (first, second) = (&head[..half], &head[half..rotary_dim]);
                let (to_first, to_second) = to[..rotary_dim].split_at_mut(half);
                for at in (0..half).step_by(LANES) {
                    let end = half.min(at + LANES);
                    let (a, b) = (s.load_part(&first[at..end]), s.load_part(&second[at..end]));
                    let (cos, sin) = (s.load_part(&cos[at..end]), s.load_part(&sin[at..end]));
                    let turned = s.sub(s.mul(a, cos), s.mul(b, sin));
                    s.store_part(s.mul(turned, by), &mut to_first[at..end]);
                    let turned = s.add(s.mul(b, cos), s.mul(a, sin));
                    s.store_part(s.mul(turned, by), &mut to_second[at..end]);
                }
                rotary_dim
            }
        };
        for at in (copied..head.len()).step_by(LANES) {
            let end = head.len().min(at + LANES);
            s.store_part(s.mul(s.load_part(&head[at..end]), by), &mut to[at..end]);
        }
    }
}

/// Puts a sequence's new keys and values of one head into the cache.
struct Store<'a> {
    attention: CausalAttention<'a>,
    packed: &'a [f32],
    sequence: Sequence,
    kv_head: usize,
    keys: &'a mut [f16],
    values: &'a mut [f16],
}

impl Work for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { attention, packed, sequence, kv_head, keys, values } = self;
        let HeadDims { heads, kv_heads, head_dim } = attention.dims;
        let width = attention.dims.packed();
        let mut scratch = SCRATCH.take();
        let Scratch { queries: turned, .. } = &mut scratch;
        let padded = head_dim.next_multiple_of(LANES);
        let turned = grown(turned, padded);
        for token in 0..sequence.new {
            let position = sequence.past + token;
            let row = &packed[(sequence.first_row + token) * width..][..width];
            let key = &row[(heads + kv_head) * head_dim..][..head_dim];
            attention.rotated(s, key, position, 1.0, turned);
            let panel = &mut keys[position / LANES * LANES * head_dim..][..LANES * head_dim];
            let lane = position % LANES;
            let columns = panel.as_chunks_mut::<LANES>().0;
            for (vector, columns) in turned.as_chunks::<LANES>().0.iter().zip(columns.chunks_mut(LANES)) {
                let mut halves = [f16::ZERO; LANES];
                s.store_f16(s.load(vector), &mut halves);
                columns.iter_mut().zip(halves).for_each(|(column, half)| column[lane] = half);
            }
            let value = &row[(heads + kv_heads + kv_head) * head_dim..][..head_dim];
            let to = &mut values[position * head_dim..][..head_dim];
            for (value, to) in value.chunks(LANES).zip(to.chunks_mut(LANES)) {
                let mut halves = [f16::ZERO; LANES];
                s.store_f16(s.load_part(value), &mut halves);
                to.copy_from_slice(&halves[..to.len()]);
            }
        }
        SCRATCH.set(scratch);
    }
}

/// Some tokens' rows of one head's group.
struct Attend<'a> {
    attention: CausalAttention<'a>,
    packed: &'a [f32],
    sequence: Sequence,
    kv_head: usize,
    tokens: Range<usize>,
    keys: &'a [f16],
    values: &'a [f16],
    out: &'a Shared<'a, f32>,
}

impl Work for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { attention, packed, sequence, kv_head, tokens, keys, values, out } = self;
        let HeadDims { heads, head_dim, .. } = attention.dims;
        let (width, group) = (attention.dims.packed(), attention.dims.group());
        let num_rows = tokens.len() * group;
        let token_of = |row: usize| tokens.start + row / group;
        let seen = |row: usize| sequence.past + token_of(row) + 1;
        let mut scratch = SCRATCH.take();
        let Scratch { queries, turned, keys: key_block, values: value_block, state } = &mut scratch;
        let turned = grown(turned, head_dim.next_multiple_of(LANES));
        let queries = grown(queries, num_rows * head_dim);
        let factor = attention.scale * std::f32::consts::LOG2_E;
        fill_queries::<S>(queries, num_rows, head_dim, turned, |row, turned| {
            let token = token_of(row);
            let head = (kv_head * group + row % group) * head_dim;
            let query = &packed[(sequence.first_row + token) * width + head..][..head_dim];
            prefetch_ahead(s, query, TOKENS_AHEAD * width);
            attention.rotated(s, query, sequence.past + token, factor, turned);
        });
        state.start(num_rows, head_dim);
        let last = seen(num_rows - 1);
        let is_direct = num_rows <= most_rows::<S>() && head_dim.is_multiple_of(LANES);
        for start in (0..last).step_by(BLOCK) {
            let count = BLOCK.min(last - start);
            let seen = |row: usize| seen(row).saturating_sub(start).min(BLOCK);
            let panels = &keys[start * head_dim..][..count.next_multiple_of(LANES) * head_dim];
            let rows = &values[start * head_dim..][..count * head_dim];
            let panels = panels.as_chunks::<LANES>().0;
            if is_direct {
                state.add_block(s, queries, panels, rows.as_chunks::<LANES>().0, head_dim, seen);
                continue;
            }
            let wide = grown(key_block, LANES * panels.len()).as_chunks_mut::<LANES>().0;
            wide.iter_mut().zip(panels).for_each(|(to, from)| s.store(s.load_f16(from), to));
            let padded = head_dim.next_multiple_of(LANES);
            let wide_values = grown(value_block, count * padded);
            for (to, from) in wide_values.chunks_exact_mut(padded).zip(rows.chunks_exact(head_dim)) {
                let (to, (whole, tail)) = (to.as_chunks_mut::<LANES>().0, from.as_chunks::<LANES>());
                to.iter_mut().zip(whole).for_each(|(to, from)| s.store(s.load_f16(from), to));
                if !tail.is_empty() {
                    let mut lanes = [f16::ZERO; LANES];
                    lanes[..tail.len()].copy_from_slice(tail);
                    s.store(s.load_f16(&lanes), &mut to[whole.len()]);
                }
            }
            state.add_block(s, queries, wide, wide_values.as_chunks::<LANES>().0, head_dim, seen);
        }
        for row in 0..num_rows {
            let at = (sequence.first_row + token_of(row)) * heads * head_dim;
            let head = (kv_head * group + row % group) * head_dim;
            // SAFETY: a task has these rows of these heads to itself.
            state.finish(s, row, unsafe { out.part(at + head, head_dim) });
        }
        SCRATCH.set(scratch);
    }
}

/// Attention of every row of `packed` `[batch * tokens, (heads + 2 kv_heads) head_dim]` to all rows of its own sequence, into `out`
/// `[batch * tokens, heads head_dim]`.
#[expect(clippy::too_many_arguments, reason = "the shape, and where it runs")]
pub fn attend_all(
    level: Level,
    workers: &dyn Workers,
    dims: HeadDims,
    scale: f32,
    packed: &[f32],
    batch: usize,
    tokens: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    dims.check()?;
    let rows = batch.checked_mul(tokens).ok_or_else(|| Error::Shape(format!("attention: {batch} x {tokens} rows")))?;
    check_len("packed", rows.saturating_mul(dims.packed()), packed.len())?;
    check_len("out", rows * dims.heads * dims.head_dim, out.len())?;
    if rows == 0 {
        return Ok(());
    }
    let out = Shared::new(out);
    workers.for_each(batch * dims.kv_heads, &|task| {
        let (sequence, kv_head) = (task / dims.kv_heads, task % dims.kv_heads);
        let packed = &packed[sequence * tokens * dims.packed()..][..tokens * dims.packed()];
        level.dispatch(AttendAll { dims, scale, packed, tokens, first_row: sequence * tokens, kv_head, out: &out });
    });
    Ok(())
}

/// One head's group of one sequence.
struct AttendAll<'a> {
    dims: HeadDims,
    scale: f32,
    packed: &'a [f32],
    tokens: usize,
    first_row: usize,
    kv_head: usize,
    out: &'a Shared<'a, f32>,
}

impl Work for AttendAll<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { dims, scale, packed, tokens, first_row, kv_head, out } = self;
        let HeadDims { heads, kv_heads, head_dim } = dims;
        let (width, group, padded) = (dims.packed(), dims.group(), head_dim.next_multiple_of(LANES));
        let mut scratch = SCRATCH.take();
        let Scratch { queries, turned, keys, values, state } = &mut scratch;
        let num_panels = tokens.div_ceil(LANES);
        let keys = grown(keys, num_panels * LANES * head_dim);
        let values = grown(values, tokens * padded);
        for (panel, columns) in keys.chunks_exact_mut(LANES * head_dim).enumerate() {
            for (at, columns) in columns.as_chunks_mut::<LANES>().0.chunks_mut(LANES).enumerate() {
                let mut rows = [s.splat(0.0); LANES];
                for (lane, row) in rows.iter_mut().enumerate() {
                    // Behind the end the last row again: it is not seen.
                    let token = (panel * LANES + lane).min(tokens - 1);
                    let start = token * width + (heads + kv_head) * head_dim + at * LANES;
                    let key = &packed[start..][..columns.len()];
                    prefetch_ahead(s, key, TOKENS_AHEAD * width);
                    *row = s.load_part(key);
                }
                let rows = s.transpose(rows);
                for (column, row) in columns.iter_mut().zip(rows) {
                    s.store(row, column);
                }
            }
        }
        for (token, to) in values.chunks_exact_mut(padded).enumerate() {
            let value = &packed[token * width + (heads + kv_heads + kv_head) * head_dim..][..head_dim];
            prefetch_ahead(s, value, TOKENS_AHEAD * width);
            for (value, to) in value.chunks(LANES).zip(to.as_chunks_mut::<LANES>().0) {
                s.store(s.load_part(value), to);
            }
        }
        let (keys, values) = (keys.as_chunks::<LANES>().0, values.as_chunks::<LANES>().0);
        let all_rows = tokens * group;
        let turned = grown(turned, padded);
        for first in (0..all_rows).step_by(TASK_ROWS) {
            let num_rows = TASK_ROWS.min(all_rows - first);
            let queries = grown(queries, num_rows * head_dim);
            let factor = s.splat(scale * std::f32::consts::LOG2_E);
            let head_of = |row: usize| (kv_head * group + (first + row) % group) * head_dim;
            fill_queries::<S>(queries, num_rows, head_dim, turned, |row, turned| {
                let query = &packed[(first + row) / group * width + head_of(row)..][..head_dim];
                prefetch_ahead(s, query, TOKENS_AHEAD * width);
                for (x, to) in query.chunks(LANES).zip(turned.chunks_mut(LANES)) {
                    s.store_part(s.mul(s.load_part(x), factor), &mut to[..x.len()]);
                }
            });
            state.start(num_rows, head_dim);
            for start in (0..tokens).step_by(BLOCK) {
                let count = BLOCK.min(tokens - start);
                let panels = &keys[start / LANES * head_dim..][..count.div_ceil(LANES) * head_dim];
                let rows = &values[start * padded / LANES..][..count * padded / LANES];
                state.add_block(s, queries, panels, rows, head_dim, |_| count);
            }
            for row in 0..num_rows {
                let at = (first_row + (first + row) / group) * heads * head_dim;
                // SAFETY: a task has these heads of its sequence's rows to itself.
                state.finish(s, row, unsafe { out.part(at + head_of(row), head_dim) });
            }
        }
        SCRATCH.set(scratch);
    }
}

/// Memory of a task, kept by its thread.
#[derive(Default)]
struct Scratch {
    /// Scaled queries in tiles: of each tile `[head_dim][rows]`.
    queries: Vec<f32>,
    turned: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    state: State,
}

thread_local! {
    // Taken out while it is used: a closure around a task would be compiled without the instruction set's features.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `len` elements; what is in them is left from before.
fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Whether a tile of the most rows leaves registers for two columns.
#[inline(always)]
fn is_wide<S: Simd>() -> bool {
    S::ACCUMULATORS >= 16
}

/// Rows of the largest tile.
#[inline(always)]
fn most_rows<S: Simd>() -> usize {
    if is_wide::<S>() { S::ACCUMULATORS / 2 } else { S::ACCUMULATORS }
}

/// Rows of the next tile, where `left` are left.
#[inline(always)]
fn tile_rows<S: Simd>(left: usize) -> usize {
    let most = left.min(most_rows::<S>());
    [12, 8, 6, 4, 3, 2, 1].into_iter().find(|&rows| rows <= most).expect("bug: one row is a tile")
}

/// Calls `$body` with the constants `$rows` and `$columns` that go with `$count` rows: more columns where rows are few and
/// registers many, so that enough sums are under way.
macro_rules! with_tile {
    ($simd:ty, $count:expr, $rows:ident, $columns:ident, $body:expr) => {
        match ($count, is_wide::<$simd>()) {
            (1, _) => with_tile!(@ 1, 4, $rows, $columns, $body),
            (2, true) => with_tile!(@ 2, 4, $rows, $columns, $body),
            (3, true) => with_tile!(@ 3, 4, $rows, $columns, $body),
            (4, true) => with_tile!(@ 4, 4, $rows, $columns, $body),
            (6, true) => with_tile!(@ 6, 2, $rows, $columns, $body),
            (8, true) => with_tile!(@ 8, 2, $rows, $columns, $body),
            (12, true) => with_tile!(@ 12, 2, $rows, $columns, $body),
            (2, false) => with_tile!(@ 2, 2, $rows, $columns, $body),
            (3, false) => with_tile!(@ 3, 2, $rows, $columns, $body),
            (4, false) => with_tile!(@ 4, 1, $rows, $columns, $body),
            (6, false) => with_tile!(@ 6, 1, $rows, $columns, $body),
            (rows, _) => unreachable!("bug: a tile of {rows} rows"),
        }
    };
    (@ $r:literal, $c:literal, $rows:ident, $columns:ident, $body:expr) => {{
        const $rows: usize = $r;
        const $columns: usize = $c;
        $body
    }};
}

/// Writes the queries in tiles; `make(row, to)` computes one.
#[inline(always)]
fn fill_queries<S: Simd>(
    queries: &mut [f32],
    num_rows: usize,
    head_dim: usize,
    turned: &mut [f32],
    make: impl Fn(usize, &mut [f32]),
) {
    let mut first = 0;
    while first < num_rows {
        let rows = tile_rows::<S>(num_rows - first);
        let tile = &mut queries[first * head_dim..][..rows * head_dim];
        for row in 0..rows {
            make(first + row, turned);
            with_tile!(S, rows, R, _C, {
                for (to, &x) in tile.as_chunks_mut::<R>().0.iter_mut().zip(&*turned) {
                    to[row] = x;
                }
            });
        }
        first += rows;
    }
}

/// Tokens between the one whose row is read and the one whose row is fetched meanwhile: rows are far from each other.
const TOKENS_AHEAD: usize = 16;

/// Rows between the values that are read and those that are fetched meanwhile.
const ROWS_AHEAD: usize = 32;

/// Hints that what lies `distance` elements behind `elements`, or nothing, is going to be read.
#[inline(always)]
fn prefetch_ahead<S: Simd, T>(s: S, elements: &[T], distance: usize) {
    let per_line = 64 / size_of::<T>();
    for at in (0..elements.len()).step_by(per_line) {
        s.prefetch(elements.as_ptr().wrapping_add(at + distance));
    }
}

/// Elements that widen to f32.
trait Element: Copy {
    /// Whether they come from the cache, which is in memory, and not from where they were just made ready.
    const IS_FAR: bool;
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F;
}

impl Element for f32 {
    const IS_FAR: bool = false;

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load(from)
    }
}

impl Element for f16 {
    const IS_FAR: bool = true;

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load_f16(from)
    }
}

/// Rows of a block's scores, then of its weights.
type Scores = [[f32; BLOCK]; 12];

/// The softmax of some rows so far.
#[derive(Default)]
struct State {
    /// `[rows][padded head_dim]`: values weighted so far.
    sums: Vec<f32>,
    /// Largest score, sum of the weights.
    rows: Vec<(f32, f32)>,
    padded: usize,
}

impl State {
    fn start(&mut self, num_rows: usize, head_dim: usize) {
        self.padded = head_dim.next_multiple_of(LANES);
        self.rows.clear();
        self.rows.resize(num_rows, (f32::NEG_INFINITY, 0.0));
        grown(&mut self.sums, num_rows * self.padded).fill(0.0);
    }

    /// Adds a block of keys, in panels, with its values, in rows of the padded width. `seen(row)`: how many of them a row sees.
    #[inline(always)]
    fn add_block<S: Simd, T: Element>(
        &mut self,
        s: S,
        queries: &[f32],
        panels: &[[T; LANES]],
        values: &[[T; LANES]],
        head_dim: usize,
        seen: impl Fn(usize) -> usize,
    ) {
        let mut scores: Scores = [[0.0; BLOCK]; 12];
        let num_rows = self.rows.len();
        let mut first = 0;
        while first < num_rows {
            let rows = tile_rows::<S>(num_rows - first);
            // The last row sees most.
            let count = seen(first + rows - 1);
            if count > 0 {
                let queries = &queries[first * head_dim..][..rows * head_dim];
                with_tile!(S, rows, R, C, {
                    let queries = queries.as_chunks::<R>().0;
                    let num_panels = count.div_ceil(LANES);
                    for panel in (0..num_panels / C * C).step_by(C) {
                        products::<S, T, R, C>(s, queries, &panels[panel * head_dim..], &mut scores, panel, values);
                    }
                    for panel in num_panels / C * C..num_panels {
                        products::<S, T, R, 1>(s, queries, &panels[panel * head_dim..], &mut scores, panel, values);
                    }
                });
                let (mut factors, mut seen_of) = ([1.0; 12], [0; 12]);
                for row in 0..rows {
                    seen_of[row] = seen(first + row);
                    factors[row] = softmax(s, &mut scores[row], count, seen_of[row], &mut self.rows[first + row]);
                }
                let width = self.padded / LANES;
                let sums = &mut self.sums[first * self.padded..][..rows * self.padded];
                let sums = sums.as_chunks_mut::<LANES>().0;
                let values = &values[..count * width];
                with_tile!(S, rows, R, C, {
                    for column in (0..width / C * C).step_by(C) {
                        weigh::<S, T, R, C>(s, &scores, (&factors, &seen_of), (values, sums), width, column);
                    }
                    for column in width / C * C..width {
                        weigh::<S, T, R, 1>(s, &scores, (&factors, &seen_of), (values, sums), width, column);
                    }
                });
            }
            first += rows;
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, row: usize, out: &mut [f32]) {
        let total = s.splat(self.rows[row].1);
        let sums = self.sums[row * self.padded..][..self.padded].as_chunks::<LANES>().0;
        for (sums, out) in sums.iter().zip(out.chunks_mut(LANES)) {
            s.store_part(s.div(s.load(sums), total), out);
        }
    }
}

/// Scores of R rows with C panels, the first of which is number `panel` of the block.
#[inline(always)]
fn products<S: Simd, T: Element, const R: usize, const C: usize>(
    s: S,
    queries: &[[f32; R]],
    panels: &[[T; LANES]],
    scores: &mut Scores,
    panel: usize,
    values: &[[T; LANES]],
) {
    let head_dim = queries.len();
    let mut sums = [[s.splat(0.0); C]; R];
    let mut of_panels = [panels; C];
    for (c, of_panel) in of_panels.iter_mut().enumerate() {
        *of_panel = &panels[c * head_dim..][..head_dim];
    }
    for (d, query) in queries.iter().enumerate() {
        if T::IS_FAR {
            // The next C panels, behind these: a vector takes half a line.
            for c in (d % 2..C).step_by(2) {
                s.prefetch(of_panels[c][d].as_ptr().wrapping_add(C * head_dim * LANES));
            }
            if panel == 0 {
                s.prefetch(values.as_ptr().wrapping_add(2 * d));
            }
        }
        let mut keys = [s.splat(0.0); C];
        for c in 0..C {
            keys[c] = T::load(s, &of_panels[c][d]);
        }
        for r in 0..R {
            let x = s.splat(query[r]);
            for c in 0..C {
                sums[r][c] = s.fma(x, keys[c], sums[r][c]);
            }
        }
    }
    for r in 0..R {
        let row = scores[r].as_chunks_mut::<LANES>().0;
        for c in 0..C {
            s.store(sums[r][c], &mut row[panel + c]);
        }
    }
}

/// Turns a row's scores into weights, those from `seen` to `count` into zeros, and gives the factor for what was summed before.
#[inline(always)]
fn softmax<S: Simd>(
    s: S,
    scores: &mut [f32; BLOCK],
    count: usize,
    seen: usize,
    (largest, total): &mut (f32, f32),
) -> f32 {
    let vectors = &mut scores.as_chunks_mut::<LANES>().0[..count.div_ceil(LANES)];
    let (whole, others) = vectors.split_at_mut(seen / LANES);
    let (part, unseen) = others.split_at_mut((seen % LANES).min(1));
    unseen.fill([0.0; LANES]);
    if seen == 0 {
        return 1.0;
    }
    let least = s.splat(f32::NEG_INFINITY);
    let mut most = least;
    for vector in &*whole {
        most = s.max(s.load(vector), most);
    }
    for vector in &*part {
        most = s.max(s.first(seen % LANES, s.load(vector), least), most);
    }
    let most = s.largest(most);
    let before = *largest;
    if most > before {
        *largest = most;
    }
    let (middle, zero) = (s.splat(*largest), s.splat(0.0));
    let mut sum = zero;
    for vector in whole {
        let weight = exp2(s, s.sub(s.load(vector), middle));
        sum = s.add(sum, weight);
        s.store(weight, vector);
    }
    for vector in part {
        let weight = s.first(seen % LANES, exp2(s, s.sub(s.load(vector), middle)), zero);
        sum = s.add(sum, weight);
        s.store(weight, vector);
    }
    let mut factor = [0.0; LANES];
    s.store(exp2(s, s.splat(before - *largest)), &mut factor);
    *total = *total * factor[0] + s.sum(sum);
    factor[0]
}

/// Adds the block's values, weighted, to C columns of R rows, after these are multiplied by their factors. A row gets those that
/// it sees; the first row sees fewest.
#[inline(always)]
fn weigh<S: Simd, T: Element, const R: usize, const C: usize>(
    s: S,
    weights: &Scores,
    (factors, seen): (&[f32; 12], &[usize; 12]),
    (values, sums): (&[[T; LANES]], &mut [[f32; LANES]]),
    width: usize,
    column: usize,
) {
    let mut acc = [[s.splat(0.0); C]; R];
    for r in 0..R {
        let factor = s.splat(factors[r]);
        for c in 0..C {
            acc[r][c] = s.mul(s.load(&sums[r * width + column + c]), factor);
        }
    }
    let (of_all, of_some) = values.split_at(seen[0] * width);
    for (j, row) in of_all.chunks_exact(width).take(BLOCK).enumerate() {
        let row = &row[column..][..C];
        if T::IS_FAR {
            prefetch_ahead(s, row.as_flattened(), ROWS_AHEAD * width * LANES);
        }
        let mut value = [s.splat(0.0); C];
        for c in 0..C {
            value[c] = T::load(s, &row[c]);
        }
        for r in 0..R {
            let weight = s.splat(weights[r][j % BLOCK]);
            for c in 0..C {
                acc[r][c] = s.fma(weight, value[c], acc[r][c]);
            }
        }
    }
    for (j, row) in (seen[0]..BLOCK).zip(of_some.chunks_exact(width)) {
        let row = &row[column..][..C];
        for r in 0..R {
            if j < seen[r] {
                let weight = s.splat(weights[r][j]);
                for c in 0..C {
                    acc[r][c] = s.fma(weight, T::load(s, &row[c]), acc[r][c]);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            s.store(acc[r][c], &mut sums[r * width + column + c]);
        }
    }
}
