//! The kernels from outside: one module for each family.

mod attention;
mod linear;
mod random;
