//! How graphs run: the only place that knows `ort`. Sessions, the buffers they read and write, and the bindings
//! between the two. No threads, no model.

pub(crate) mod buffer;
pub(crate) mod library;
pub mod provider;
pub(crate) mod session;

pub use library::{Library, load_library};
pub use provider::{Device, ProviderChoice};
