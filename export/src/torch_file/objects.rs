//! What a pickle may describe: scalars, containers, and tensors as views of storages.

use safetensors::Dtype;

/// A value: a scalar, or an index into the lists of [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// Little-endian two's complement of more than 64 bits.
    LongInt(&'a [u8]),
    /// A float or a byte string: neither matters to a state dict.
    Opaque,
    Str(&'a str),
    Global(Global),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
}

/// The only classes and functions that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Size,
    RebuildTensor,
    RebuildParameter,
    StorageType(Dtype),
}

impl Global {
    pub(super) fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch", "Size") => Self::Size,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "FloatStorage") => Self::StorageType(Dtype::F32),
            ("torch", "HalfStorage") => Self::StorageType(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::StorageType(Dtype::BF16),
            ("torch", "DoubleStorage") => Self::StorageType(Dtype::F64),
            ("torch", "LongStorage") => Self::StorageType(Dtype::I64),
            ("torch", "IntStorage") => Self::StorageType(Dtype::I32),
            ("torch", "ShortStorage") => Self::StorageType(Dtype::I16),
            ("torch", "CharStorage") => Self::StorageType(Dtype::I8),
            ("torch", "ByteStorage") => Self::StorageType(Dtype::U8),
            ("torch", "BoolStorage") => Self::StorageType(Dtype::BOOL),
            ("torch", "ComplexFloatStorage") => Self::StorageType(Dtype::C64),
            _ => return None,
        })
    }
}

/// A run of elements that tensors are views of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    pub(super) dtype: Dtype,
    pub(super) key: &'a str,
    pub(super) num_elements: usize,
}

/// A view of a storage, as the pickle states it: nothing of it has been checked against the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor {
    /// Index into [`Pickle::storages`].
    pub(super) storage: usize,
    pub(super) offset: usize,
    /// Indices into [`Pickle::sequences`].
    pub(super) shape: usize,
    pub(super) strides: usize,
    /// Negated or conjugated when read.
    pub(super) is_lazy: bool,
}

/// What a pickle describes. All indices held by values are valid in these lists.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub(super) root: Value<'a>,
    /// Length in bytes: what follows is not part of it.
    pub(super) end: usize,
    /// Tuples and lists.
    pub(super) sequences: Vec<Vec<Value<'a>>>,
    /// In the order of insertion; a key may stand in one twice.
    pub(super) dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    /// Each key once.
    pub(super) storages: Vec<Storage<'a>>,
    pub(super) tensors: Vec<Tensor>,
}
