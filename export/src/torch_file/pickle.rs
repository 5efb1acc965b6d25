//! A pickle machine that knows plain tensors and nothing else: it builds descriptions, and calls, imports or constructs
//! nothing. Any other class, function or opcode is refused by name.
//!
//! Objects live in flat lists and refer to each other by index, so neither a cycle nor a deep nest can hurt. Strings
//! stay slices of the file. Every opcode adds at most one object, one value and one memo entry, so memory is bounded by
//! the pickle's length, which is bounded too. Opcodes are those of Python's `pickletools`, protocols 2 to 5.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;

use super::error::{TorchFileError, shown};

/// The opcode that every pickle of protocol 2 or later begins with.
pub(super) const PROTO: u8 = 0x80;

/// A tensor takes some 250 bytes, so a LLaVA-13B takes a quarter of a megabyte. At up to a hundred bytes of memory per
/// byte, a hostile pickle costs less than half a gigabyte.
pub(super) const MAX_BYTES: usize = 4 << 20;

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
    fn named(module: &str, name: &str) -> Option<Self> {
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

/// Reads the pickle that `bytes` begin with.
pub(super) fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<Pickle<'a>, TorchFileError> {
    let mut machine = Machine {
        path,
        bytes: bytes.get(..MAX_BYTES).unwrap_or(bytes),
        is_cut: bytes.len() > MAX_BYTES,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        storage_by_key: HashMap::new(),
        pickle: Pickle {
            root: Value::None,
            end: 0,
            sequences: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        },
    };
    if machine.bytes.first() != Some(&PROTO) {
        return Err(machine.damaged("expected a pickle of protocol 2 to 5"));
    }
    while machine.step()? {}
    machine.pickle.root = machine.pop()?;
    machine.pickle.end = machine.at;
    Ok(machine.pickle)
}

struct Machine<'a, 'p> {
    path: &'p Path,
    bytes: &'a [u8],
    /// More bytes follow than a pickle may have.
    is_cut: bool,
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    storage_by_key: HashMap<&'a str, usize>,
    pickle: Pickle<'a>,
}

impl<'a> Machine<'a, '_> {
    /// Runs one opcode; false after the last.
    fn step(&mut self) -> Result<bool, TorchFileError> {
        let opcode_at = self.at;
        let [opcode] = self.take()?;
        match opcode {
            PROTO => {
                let [protocol] = self.take()?;
                if !(2..=5).contains(&protocol) {
                    return Err(self.damaged(format!("expected pickle protocol 2 to 5, got {protocol}")));
                }
            }
            // FRAME: a hint for readers of streams.
            0x95 => {
                self.take::<8>()?;
            }
            b'.' => return Ok(false),

            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => {
                let [value] = self.take()?;
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'J' => {
                let value = i32::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            // LONG1, LONG4
            0x8a | 0x8b => {
                let bytes = if opcode == 0x8a { self.take_counted::<1>() } else { self.take_counted::<4>() }?;
                self.stack.push(integer(bytes));
            }
            b'G' => {
                self.take::<8>()?;
                self.stack.push(Value::Opaque);
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8; BINSTRING, SHORT_BINSTRING of Python 2
            b'X' | b'T' => self.string::<4>()?,
            0x8c | b'U' => self.string::<1>()?,
            0x8d => self.string::<8>()?,
            // BINBYTES, SHORT_BINBYTES, BINBYTES8
            b'B' | b'C' | 0x8e => {
                match opcode {
                    b'B' => self.take_counted::<4>(),
                    b'C' => self.take_counted::<1>(),
                    _ => self.take_counted::<8>(),
                }?;
                self.stack.push(Value::Opaque);
            }

            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_to_mark()?;
            }
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b')' => self.push_tuple(Vec::new()),
            0x85..=0x87 => {
                let start = self.height(usize::from(opcode - 0x84))?;
                let items = self.stack.split_off(start);
                self.push_tuple(items);
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items);
            }
            b']' => {
                self.stack.push(Value::List(self.pickle.sequences.len()));
                self.pickle.sequences.push(Vec::new());
            }
            b'a' | b'e' => {
                let items = if opcode == b'a' { vec![self.pop()?] } else { self.pop_to_mark()? };
                let Value::List(list) = self.top()? else { return Err(self.damaged("expected a list to append to")) };
                self.pickle.sequences[list].extend(items);
            }
            b'}' => self.push_dict(),
            b's' | b'u' => {
                let items = if opcode == b's' {
                    let start = self.height(2)?;
                    self.stack.split_off(start)
                } else {
                    self.pop_to_mark()?
                };
                let Value::Dict(dict) = self.top()? else {
                    return Err(self.damaged("expected a dict to set items in"));
                };
                let (pairs, rest) = items.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(self.damaged("expected a value for each key of a dict"));
                }
                self.pickle.dicts[dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
            }

            b'q' => {
                let [index] = self.take()?;
                self.memo.insert(index.into(), self.top()?);
            }
            b'r' => {
                let index = u32::from_le_bytes(self.take()?);
                self.memo.insert(index, self.top()?);
            }
            // MEMOIZE: the pickle's length bounds the memo's.
            0x94 => {
                self.memo.insert(self.memo.len() as u32, self.top()?);
            }
            b'h' => {
                let [index] = self.take()?;
                self.push_memo(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.take()?);
                self.push_memo(index)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Str(module), Value::Str(name)) = (module, name) else {
                    return Err(self.damaged("expected the name of a class or function"));
                };
                self.push_global(module, name)?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.stack.push(storage);
            }
            b'R' => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.reduce(callable, arguments)?;
            }
            // BUILD: a state dict carries the versions of its modules as the attribute `_metadata`.
            b'b' => {
                self.pop()?;
                if !matches!(self.top()?, Value::Dict(_)) {
                    return Err(self.damaged("expected attributes of an OrderedDict only"));
                }
            }
            _ => {
                let (path, name) = (self.path.to_owned(), opcode_name(opcode));
                return Err(TorchFileError::ForbiddenOpcode { path, opcode, name, at: opcode_at });
            }
        }
        Ok(true)
    }

    /// Describes what the call would give. Only the allowed functions can stand on the stack.
    fn reduce(&mut self, callable: Value<'a>, arguments: Value<'a>) -> Result<(), TorchFileError> {
        let (Value::Global(global), Value::Tuple(arguments)) = (callable, arguments) else {
            return Err(self.damaged("expected a call of a function with a tuple"));
        };
        let arguments = self.pickle.sequences[arguments].as_slice();
        match (global, arguments) {
            (Global::OrderedDict, []) => self.push_dict(),
            (Global::Size, [Value::Tuple(sizes) | Value::List(sizes)]) => {
                let size = Value::Tuple(*sizes);
                self.stack.push(size);
            }
            // The trailing arguments are requires_grad and backward hooks.
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), _, _]) => {
                let tensor = *tensor;
                self.stack.push(tensor);
            }
            (
                Global::RebuildTensor,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(shape),
                    Value::Tuple(strides),
                    _,
                    _,
                    rest @ ..,
                ],
            ) => {
                // A seventh argument marks lazy negation or conjugation: the bytes are not the values then.
                let is_plain = match rest {
                    [] | [Value::None] => true,
                    [Value::Dict(metadata)] => self.pickle.dicts[*metadata].is_empty(),
                    _ => false,
                };
                let offset = usize::try_from(*offset).ok().filter(|_| is_plain);
                let (storage, shape, strides) = (*storage, *shape, *strides);
                let offset = offset.ok_or_else(|| self.damaged("a tensor's offset or metadata is not supported"))?;
                self.stack.push(Value::Tensor(self.pickle.tensors.len()));
                self.pickle.tensors.push(Tensor { storage, offset, shape, strides });
            }
            _ => return Err(self.damaged(format!("unexpected arguments of {global:?}"))),
        }
        Ok(())
    }

    /// The storage that a persistent id names: ("storage", type, key, device, length), and None in legacy files.
    fn storage(&mut self, id: Value<'a>) -> Result<Value<'a>, TorchFileError> {
        let id = if let Value::Tuple(id) = id { self.pickle.sequences[id].as_slice() } else { &[] };
        let [
            Value::Str("storage"),
            Value::Global(Global::StorageType(dtype)),
            Value::Str(key),
            Value::Str(_device),
            Value::Int(num_elements),
            ..,
        ] = id
        else {
            return Err(self.damaged("expected the persistent id of a storage"));
        };
        if !matches!(&id[5..], [] | [Value::None]) {
            return Err(self.damaged("a storage is a view of another, as only torch before 0.4 wrote it"));
        }
        let Ok(num_elements) = usize::try_from(*num_elements) else {
            return Err(self.damaged(format!("storage `{}` has a negative length", shown(key))));
        };
        let storage = Storage { dtype: *dtype, key, num_elements };
        let index = *self.storage_by_key.entry(storage.key).or_insert(self.pickle.storages.len());
        match self.pickle.storages.get(index) {
            None => self.pickle.storages.push(storage),
            Some(known) if *known == storage => {}
            Some(_) => return Err(self.damaged(format!("storage `{}` has two types or lengths", shown(key)))),
        }
        Ok(Value::Storage(index))
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<(), TorchFileError> {
        let Some(global) = Global::named(module, name) else {
            let global = shown(&format!("{module}.{name}"));
            return Err(TorchFileError::ForbiddenGlobal { path: self.path.to_owned(), global });
        };
        self.stack.push(Value::Global(global));
        Ok(())
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) {
        self.stack.push(Value::Tuple(self.pickle.sequences.len()));
        self.pickle.sequences.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.pickle.dicts.len()));
        self.pickle.dicts.push(Vec::new());
    }

    fn push_memo(&mut self, index: u32) -> Result<(), TorchFileError> {
        let Some(value) = self.memo.get(&index) else { return Err(self.damaged(format!("no memo {index}"))) };
        self.stack.push(*value);
        Ok(())
    }

    /// Height of the stack below its top `count` values, which must lie above the last mark.
    fn height(&self, count: usize) -> Result<usize, TorchFileError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let height = self.stack.len().checked_sub(count).filter(|height| *height >= floor);
        height.ok_or_else(|| self.damaged("the stack is empty"))
    }

    fn top(&self) -> Result<Value<'a>, TorchFileError> {
        Ok(self.stack[self.height(1)?])
    }

    fn pop(&mut self) -> Result<Value<'a>, TorchFileError> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>, TorchFileError> {
        let Some(mark) = self.marks.pop() else { return Err(self.damaged("no mark on the stack")) };
        Ok(self.stack.split_off(mark))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], TorchFileError> {
        let Some(taken) = self.bytes[self.at..].first_chunk() else { return Err(self.ends_early()) };
        self.at += N;
        Ok(*taken)
    }

    /// Bytes that follow their own count, which has `N` bytes.
    fn take_counted<const N: usize>(&mut self) -> Result<&'a [u8], TorchFileError> {
        let mut count = [0; 8];
        count[..N].copy_from_slice(&self.take::<N>()?);
        let count = usize::try_from(u64::from_le_bytes(count)).ok();
        let rest = &self.bytes[self.at..];
        let Some(taken) = count.and_then(|count| rest.get(..count)) else { return Err(self.ends_early()) };
        self.at += taken.len();
        Ok(taken)
    }

    fn string<const N: usize>(&mut self) -> Result<(), TorchFileError> {
        let bytes = self.take_counted::<N>()?;
        let string = std::str::from_utf8(bytes).map_err(|_| self.damaged("a string is not UTF-8"))?;
        self.stack.push(Value::Str(string));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, TorchFileError> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.iter().position(|byte| *byte == b'\n') else { return Err(self.ends_early()) };
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| self.damaged("a name is not UTF-8"))
    }

    fn ends_early(&self) -> TorchFileError {
        if self.is_cut {
            return TorchFileError::PickleTooLong { path: self.path.to_owned(), max: MAX_BYTES };
        }
        self.damaged("it ends early")
    }

    fn damaged(&self, reason: impl Into<String>) -> TorchFileError {
        let reason = format!("at byte {} of the pickle: {}", self.at, reason.into());
        TorchFileError::Damaged { path: self.path.to_owned(), reason }
    }
}

/// An integer of any length, little-endian two's complement.
fn integer(bytes: &[u8]) -> Value<'_> {
    if bytes.len() > 8 {
        return Value::LongInt(bytes);
    }
    let is_negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut value = [if is_negative { 0xff } else { 0 }; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(value))
}

/// Names of the opcodes that are refused, as `pickletools` spells them.
fn opcode_name(opcode: u8) -> &'static str {
    match opcode {
        b'F' => "FLOAT",
        b'I' => "INT",
        b'L' => "LONG",
        b'P' => "PERSID",
        b'S' => "STRING",
        b'V' => "UNICODE",
        b'd' => "DICT",
        b'g' => "GET",
        b'i' => "INST",
        b'l' => "LIST",
        b'o' => "OBJ",
        b'p' => "PUT",
        0x81 => "NEWOBJ",
        0x82 => "EXT1",
        0x83 => "EXT2",
        0x84 => "EXT4",
        0x8f => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        0x92 => "NEWOBJ_EX",
        0x96 => "BYTEARRAY8",
        0x97 => "NEXT_BUFFER",
        0x98 => "READONLY_BUFFER",
        _ => "unknown",
    }
}
