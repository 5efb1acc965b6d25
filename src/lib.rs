//! Exports vision-language captioners to ONNX and re-captions web images by the billion.
//!
//! [`export`] turns a LLaVA checkpoint into a bundle of ONNX graphs; [`pipeline::load_model`] and
//! [`pipeline::LoadedRun::run`] turn images into rows with captions. `pipeline/` reads in the order of the data:
//! source, load, preprocess, vision, generate, write.

pub mod analysis;
pub mod cli;
pub mod commands;
pub mod console;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod live;
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod profile;
pub mod runtime;
pub mod stage;
pub mod storage;

pub use error::{Error, Result};
pub use recaption_export as export;
pub use stage::Stage;
