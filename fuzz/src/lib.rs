//! What the fuzz targets do with their input. `tests/it/fuzz_seeds.rs` has the same files.

#[cfg(feature = "export")]
pub mod export;
pub mod kernels;
#[cfg(feature = "run")]
pub mod run;
