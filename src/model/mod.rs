//! What the model is: the bundle, its prompt and tokenizer, a caption in the making, the cache it lives in. No threads.

pub(crate) mod batch_steps;
pub mod bundle;
pub(crate) mod kv_cache;
pub(crate) mod memory_plan;
pub mod prompt;
pub mod sequence;
pub mod tokenizer;

pub use bundle::Bundle;
pub use prompt::{Prompt, TemplateChoice};
pub use sequence::{FinishReason, Sequence};
pub use tokenizer::Tokenizer;
