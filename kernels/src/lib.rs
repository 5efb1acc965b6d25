//! The CPU kernels of the int8 path: pure functions over slices, split over a caller's threads.
//!
//! One result everywhere: every kernel gives the same bits at every instruction-set [`Level`], however the work is split and
//! whatever else is in the batch. Integer sums are exact; float operations are IEEE 754 ones in a fixed order (`simd` has
//! them), and functions such as exp are polynomials of our own. Only `simd/`, `dot/` and `pixels/` contain
//! intrinsics.

mod attention;
mod dot;
mod error;
mod greedy;
mod level;
mod linear;
mod math;
mod pack;
pub mod pixels;
mod quantize;
mod simd;
mod workers;

pub use attention::{CausalAttention, HeadDims, KEY_PANEL, Rotary, Sequence, SlotCache, attend_all};
pub use error::Error;
pub use greedy::{NO_ID, greedy_ids};
pub use level::Level;
pub use linear::{Activation, Epilogue, Residual, linear};
pub use pack::{PANEL_COLUMNS, PackSpec, Packed, PackedWeights, ZERO_POINT, pack, pack_panel, quantize_weights};
pub use quantize::{Norm, Quantized, quantize_rows};
pub use workers::{Scoped, Serial, Workers};
