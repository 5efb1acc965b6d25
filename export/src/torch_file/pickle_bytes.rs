//! The bytes of a pickle, opcode by opcode and argument by argument. Counts are believed only where that many bytes
//! follow, and strings stay slices of the file.

use std::path::Path;

use super::error::TorchFileError;
use super::objects::Value;

/// A tensor takes some 250 bytes, so a LLaVA-13B takes a quarter of a megabyte. The costliest pickle of this length
/// (MEMOIZE over and over) was measured to take 400 MB of memory.
pub(super) const MAX_BYTES: usize = 4 << 20;

pub(super) struct Reader<'a, 'p> {
    path: &'p Path,
    bytes: &'a [u8],
    /// More bytes follow than a pickle may have.
    is_cut: bool,
    /// Bytes read so far.
    pub(super) at: usize,
}

impl<'a, 'p> Reader<'a, 'p> {
    pub(super) fn new(bytes: &'a [u8], path: &'p Path) -> Self {
        Self { path, bytes: bytes.get(..MAX_BYTES).unwrap_or(bytes), is_cut: bytes.len() > MAX_BYTES, at: 0 }
    }

    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], TorchFileError> {
        let Some(taken) = self.bytes[self.at..].first_chunk() else { return Err(self.ends_early()) };
        self.at += N;
        Ok(*taken)
    }

    /// Bytes that follow their own count, which has `N` bytes.
    pub(super) fn take_counted<const N: usize>(&mut self) -> Result<&'a [u8], TorchFileError> {
        let mut count = [0; 8];
        count[..N].copy_from_slice(&self.take::<N>()?);
        let count = usize::try_from(u64::from_le_bytes(count)).ok();
        let rest = &self.bytes[self.at..];
        let Some(taken) = count.and_then(|count| rest.get(..count)) else { return Err(self.ends_early()) };
        self.at += taken.len();
        Ok(taken)
    }

    pub(super) fn string<const N: usize>(&mut self) -> Result<Value<'a>, TorchFileError> {
        let bytes = self.take_counted::<N>()?;
        let string = std::str::from_utf8(bytes).map_err(|_| self.damaged("a string is not UTF-8"))?;
        Ok(Value::Str(string))
    }

    /// An integer of any length, in little-endian two's complement after its count.
    pub(super) fn integer<const N: usize>(&mut self) -> Result<Value<'a>, TorchFileError> {
        let bytes = self.take_counted::<N>()?;
        if bytes.len() > 8 {
            return Ok(Value::LongInt(bytes));
        }
        let is_negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut value = [if is_negative { 0xff } else { 0 }; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(value)))
    }

    /// A line without its end.
    pub(super) fn line(&mut self) -> Result<&'a str, TorchFileError> {
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

    pub(super) fn damaged(&self, reason: impl Into<String>) -> TorchFileError {
        let reason = format!("at byte {} of the pickle: {}", self.at, reason.into());
        TorchFileError::Damaged { path: self.path.to_owned(), reason }
    }
}

/// Names of the opcodes that are refused, as `pickletools` spells them.
pub(super) fn opcode_name(opcode: u8) -> &'static str {
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
