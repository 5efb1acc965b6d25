//! A pickle machine that knows plain tensors and nothing else: it builds descriptions, and calls, imports or constructs
//! nothing. Any other class, function or opcode is refused by name.
//!
//! Objects live in flat lists and refer to each other by index, so neither a cycle nor a deep nest can hurt. Strings
//! stay slices of the file. Every opcode adds at most one object, one value and one memo entry, so memory is bounded by
//! the pickle's length, which is bounded too. Opcodes are those of Python's `pickletools`, protocols 2 to 5.

use std::collections::HashMap;
use std::path::Path;

use super::error::{TorchFileError, shown};
use super::objects::{Global, Pickle, Storage, Tensor, Value};
use super::pickle_bytes::{Reader, opcode_name};

/// The opcode that every pickle of protocol 2 or later begins with.
pub(super) const PROTO: u8 = 0x80;

/// Reads the pickle that `bytes` begin with.
pub(super) fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<Pickle<'a>, TorchFileError> {
    let mut machine = Machine {
        path,
        reader: Reader::new(bytes, path),
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
    if bytes.first() != Some(&PROTO) {
        return Err(machine.damaged("expected a pickle of protocol 2 to 5"));
    }
    while machine.step()? {}
    machine.pickle.root = machine.pop()?;
    machine.pickle.end = machine.reader.at;
    Ok(machine.pickle)
}

struct Machine<'a, 'p> {
    path: &'p Path,
    reader: Reader<'a, 'p>,
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
        let opcode_at = self.reader.at;
        let [opcode] = self.reader.take()?;
        match opcode {
            PROTO => {
                let [protocol] = self.reader.take()?;
                if !(2..=5).contains(&protocol) {
                    return Err(self.damaged(format!("expected pickle protocol 2 to 5, got {protocol}")));
                }
            }
            // FRAME: a hint for readers of streams.
            0x95 => {
                self.reader.take::<8>()?;
            }
            b'.' => return Ok(false),

            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => {
                let [value] = self.reader.take()?;
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.reader.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'J' => {
                let value = i32::from_le_bytes(self.reader.take()?);
                self.stack.push(Value::Int(value.into()));
            }
            // LONG1, LONG4
            0x8a | 0x8b => {
                let value = if opcode == 0x8a { self.reader.integer::<1>() } else { self.reader.integer::<4>() }?;
                self.stack.push(value);
            }
            b'G' => {
                self.reader.take::<8>()?;
                self.stack.push(Value::Opaque);
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8; BINSTRING, SHORT_BINSTRING of Python 2
            b'X' | b'T' | 0x8c | b'U' | 0x8d => {
                let string = match opcode {
                    b'X' | b'T' => self.reader.string::<4>(),
                    0x8c | b'U' => self.reader.string::<1>(),
                    _ => self.reader.string::<8>(),
                }?;
                self.stack.push(string);
            }
            // BINBYTES, SHORT_BINBYTES, BINBYTES8
            b'B' | b'C' | 0x8e => {
                match opcode {
                    b'B' => self.reader.take_counted::<4>(),
                    b'C' => self.reader.take_counted::<1>(),
                    _ => self.reader.take_counted::<8>(),
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
                let [index] = self.reader.take()?;
                self.memo.insert(index.into(), self.top()?);
            }
            b'r' => {
                let index = u32::from_le_bytes(self.reader.take()?);
                self.memo.insert(index, self.top()?);
            }
            // MEMOIZE: the pickle's length bounds the memo's.
            0x94 => {
                self.memo.insert(self.memo.len() as u32, self.top()?);
            }
            b'h' => {
                let [index] = self.reader.take()?;
                self.push_memo(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.reader.take()?);
                self.push_memo(index)?;
            }

            b'c' => {
                let (module, name) = (self.reader.line()?, self.reader.line()?);
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
                let is_lazy = match rest {
                    [] | [Value::None] => false,
                    [Value::Dict(metadata)] => !self.pickle.dicts[*metadata].is_empty(),
                    _ => true,
                };
                let (storage, shape, strides) = (*storage, *shape, *strides);
                let Ok(offset) = usize::try_from(*offset) else {
                    return Err(self.damaged("a tensor's offset is negative"));
                };
                self.stack.push(Value::Tensor(self.pickle.tensors.len()));
                self.pickle.tensors.push(Tensor { storage, offset, shape, strides, is_lazy });
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

    fn damaged(&self, reason: impl Into<String>) -> TorchFileError {
        self.reader.damaged(reason)
    }
}
