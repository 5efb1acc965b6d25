//! What came out: how well captions fit their images.

#[doc(hidden)]
pub mod clip;
