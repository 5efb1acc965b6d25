//! What a caller can get wrong.

/// Why a kernel refused to run. Nothing has been written when one of these comes back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A slice does not have the length that the shapes ask for.
    #[error("`{what}`: expected {expected} elements, got {got}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements wanted.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// Two shapes that must agree do not, or a size is one that the kernel does not take.
    #[error("{0}")]
    Shape(String),
    /// `RECAPTION_CPU` names no instruction set.
    #[error("`RECAPTION_CPU`: expected portable, avx2, avxvnni or avx512, got `{0}`")]
    UnknownLevel(String),
}

/// Checks one slice's length.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}
