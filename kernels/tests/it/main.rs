//! The kernels from outside: one module for each family.

mod linear;
mod random;
