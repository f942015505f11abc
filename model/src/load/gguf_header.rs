//! Owns the check that a GGUF file keeps within its own bounds, made before candle's reader sees a
//! byte of it: every count and length is compared with what the file can hold before anything is
//! allocated. Knows the container only; keys and tensors mean nothing here.

use std::collections::{BTreeMap, BTreeSet};

use super::limits::{
    MAX_GGUF_ARRAY_ELEMENTS, MAX_GGUF_HEADER_BYTES, MAX_GGUF_KEYS, MAX_GGUF_NAME_BYTES,
    MAX_GGUF_STRING_BYTES, MAX_TENSOR_DIMS, MAX_TENSORS,
};
use super::stored::{StoredTensor, StoredType};
use crate::error::{LoadError, shown, tensor};

/// How messages call the part before the tensor data.
const PLACE: &str = "GGUF header";
const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// Alignments of the tensor data that are accepted: powers of two in this range.
const ALIGNMENTS: std::ops::RangeInclusive<usize> = 8..=1 << 16;

/// What was learnt on the way.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GgufHeader {
    /// By name.
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    /// Where tensor data begins in the file.
    pub(super) data_start: usize,
}

/// Types of metadata values, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueKind {
    /// A number of this many bytes.
    Number(usize),
    Bool,
    Text,
    Array,
}

impl ValueKind {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 | 1 => Self::Number(1),
            2 | 3 => Self::Number(2),
            4..=6 => Self::Number(4),
            7 => Self::Bool,
            8 => Self::Text,
            9 => Self::Array,
            10..=12 => Self::Number(8),
            _ => return None,
        })
    }

    /// Fewest bytes that one value takes.
    fn min_bytes(self) -> u64 {
        match self {
            Self::Number(bytes) => bytes as u64,
            Self::Bool => 1,
            Self::Text => 8,
            Self::Array => 12,
        }
    }
}

/// Number of a `u32` value in the file format.
const CODE_U32: u32 = 4;

/// The names under which other tensor types are known.
fn type_name(code: u32) -> String {
    let name = match code {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        28 => "F64",
        _ => return format!("number {code}"),
    };
    name.to_owned()
}

/// Reads forward through the header; every step is checked against the file's end.
struct Cursor<'a> {
    /// What has been read of the file.
    bytes: &'a [u8],
    /// Length of the whole file.
    file_len: u64,
    position: usize,
    /// Array elements still allowed, over all arrays.
    elements_left: u64,
    /// Something lay behind `bytes`, but inside the file.
    wants_more: bool,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> u64 {
        self.file_len - self.position as u64
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], LoadError> {
        if len > self.remaining() {
            let reason = format!("the file ends inside {what}");
            return Err(LoadError::malformed(PLACE, reason));
        }
        let end = self.position as u64 + len;
        if end > MAX_GGUF_HEADER_BYTES as u64 {
            return Err(LoadError::TooLarge {
                what: PLACE.to_owned(),
                size: end,
                unit: "bytes",
                limit: MAX_GGUF_HEADER_BYTES as u64,
            });
        }
        // Fits: it is at most the limit above.
        let range = self.position..end as usize;
        let Some(taken) = self.bytes.get(range) else {
            self.wants_more = true;
            return Err(LoadError::malformed(PLACE, format!("{what} is not read yet")));
        };
        self.position = end as usize;
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        let mut number = [0; 4];
        number.copy_from_slice(self.take(4, what)?);
        Ok(u32::from_le_bytes(number))
    }

    fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        let mut number = [0; 8];
        number.copy_from_slice(self.take(8, what)?);
        Ok(u64::from_le_bytes(number))
    }

    /// A count of things that take at least `min_bytes` each.
    fn count(&mut self, what: &str, limit: u64, min_bytes: u64) -> Result<u64, LoadError> {
        let size = self.u64(what)?;
        if size > limit {
            let what = format!("{PLACE}: {what}");
            return Err(LoadError::TooLarge { what, size, unit: "entries", limit });
        }
        if size.saturating_mul(min_bytes) > self.remaining() {
            let reason = format!("{what} is {size}, more than the file has room for");
            return Err(LoadError::malformed(PLACE, reason));
        }
        Ok(size)
    }

    fn text(&mut self, what: &str, limit: u64) -> Result<&'a str, LoadError> {
        let len = self.u64(what)?;
        if len > limit && len <= self.remaining() {
            let what = format!("{PLACE}: {what}");
            return Err(LoadError::TooLarge { what, size: len, unit: "bytes", limit });
        }
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| LoadError::malformed(format!("{PLACE}: {what}"), "it is not UTF-8"))
    }

    /// A key or tensor name: short, not empty and without control characters.
    fn name(&mut self, what: &str) -> Result<&'a str, LoadError> {
        let name = self.text(what, MAX_GGUF_NAME_BYTES)?;
        if name.is_empty() || name.chars().any(char::is_control) {
            let reason = "it is empty or holds control characters";
            return Err(LoadError::malformed(format!("{PLACE}: {what}"), reason));
        }
        Ok(name)
    }
}

/// Checks a file of `file_len` bytes that begins with `bytes`, without allocating more than its own
/// sound parts justify. `None` when the header goes on behind them.
pub(super) fn check(bytes: &[u8], file_len: u64) -> Result<Option<GgufHeader>, LoadError> {
    let elements_left = MAX_GGUF_ARRAY_ELEMENTS;
    let mut cursor = Cursor { bytes, file_len, position: 0, elements_left, wants_more: false };
    let header = read(&mut cursor);
    if cursor.wants_more { Ok(None) } else { header.map(Some) }
}

fn read(cursor: &mut Cursor<'_>) -> Result<GgufHeader, LoadError> {
    if cursor.take(4, "its first four bytes")? != MAGIC {
        return Err(LoadError::malformed(PLACE, "the file does not begin with `GGUF`"));
    }
    let version = cursor.u32("the version")?;
    if !matches!(version, 2 | 3) {
        let what = format!("GGUF version {version}");
        return Err(LoadError::unsupported(what, "versions 2 and 3 in little-endian order are"));
    }
    // A tensor takes a name, a count of dimensions, one dimension, a type and an offset at least.
    let num_tensors = cursor.count("the number of tensors", MAX_TENSORS, 33)?;
    let num_keys = cursor.count("the number of metadata keys", MAX_GGUF_KEYS, 14)?;
    let alignment = check_metadata(cursor, num_keys)?;
    let mut extents = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..num_tensors {
        let extent = read_extent(cursor, alignment)?;
        if !names.insert(extent.name) {
            return Err(LoadError::malformed(tensor(extent.name), "the header lists it twice"));
        }
        extents.push(extent);
    }
    let data_start = cursor.position.next_multiple_of(alignment);
    check_extents(&mut extents, data_start as u64, cursor.file_len)?;
    let tensors = extents.into_iter().map(|extent| extent.stored(data_start as u64)).collect();
    Ok(GgufHeader { tensors, data_start })
}

/// Walks over all metadata and returns the alignment of tensor data.
fn check_metadata(cursor: &mut Cursor<'_>, num_keys: u64) -> Result<usize, LoadError> {
    let mut keys = BTreeSet::new();
    let mut alignment = DEFAULT_ALIGNMENT;
    for _ in 0..num_keys {
        let key = cursor.name("a metadata key")?;
        if !keys.insert(key) {
            return Err(LoadError::malformed(key_name(key), "it occurs twice"));
        }
        let code = cursor.u32(&key_name(key))?;
        if key == ALIGNMENT_KEY {
            let value = cursor.u32(&key_name(key))? as usize;
            if code != CODE_U32 || !value.is_power_of_two() || !ALIGNMENTS.contains(&value) {
                let reason = "it must be a 32-bit power of two from 8 to 65536";
                return Err(LoadError::malformed(key_name(key), reason));
            }
            alignment = value;
        } else {
            skip_value(cursor, key, code)?;
        }
    }
    Ok(alignment)
}

/// How messages call a metadata key.
pub(super) fn key_name(key: &str) -> String {
    format!("GGUF key `{}`", shown(key))
}

fn value_kind(key: &str, code: u32) -> Result<ValueKind, LoadError> {
    ValueKind::from_code(code)
        .ok_or_else(|| LoadError::malformed(key_name(key), format!("no value has type {code}")))
}

fn skip_value(cursor: &mut Cursor<'_>, key: &str, code: u32) -> Result<(), LoadError> {
    let kind = value_kind(key, code)?;
    if kind != ValueKind::Array {
        return skip_scalar(cursor, key, kind);
    }
    let element = value_kind(key, cursor.u32(&key_name(key))?)?;
    if element == ValueKind::Array {
        return Err(LoadError::unsupported(key_name(key), "arrays of arrays are not read"));
    }
    let limit = cursor.elements_left;
    let len = cursor.count(&key_name(key), limit, element.min_bytes())?;
    cursor.elements_left -= len;
    match element {
        ValueKind::Number(bytes) => {
            // No overflow: the count was compared with the file's length.
            cursor.take(len * bytes as u64, &key_name(key))?;
            Ok(())
        }
        ValueKind::Bool | ValueKind::Text | ValueKind::Array => {
            (0..len).try_for_each(|_| skip_scalar(cursor, key, element))
        }
    }
}

fn skip_scalar(cursor: &mut Cursor<'_>, key: &str, kind: ValueKind) -> Result<(), LoadError> {
    match kind {
        ValueKind::Number(bytes) => cursor.take(bytes as u64, &key_name(key)).map(drop),
        ValueKind::Bool if cursor.take(1, &key_name(key))?[0] > 1 => {
            Err(LoadError::malformed(key_name(key), "a truth value is neither 0 nor 1"))
        }
        ValueKind::Bool => Ok(()),
        ValueKind::Text => cursor.text(&key_name(key), MAX_GGUF_STRING_BYTES).map(drop),
        ValueKind::Array => Err(LoadError::malformed(key_name(key), "an array inside an array")),
    }
}

/// Where a tensor lies, relative to the start of tensor data.
struct Extent<'a> {
    start: u64,
    len: u64,
    name: &'a str,
    stored_type: StoredType,
    /// Outermost dimension first.
    shape: Vec<usize>,
}

impl Extent<'_> {
    /// Its bytes were found to end inside the file: the sum cannot overflow.
    fn stored(self, data_start: u64) -> (String, StoredTensor) {
        let Self { start, name, stored_type, shape, .. } = self;
        (name.to_owned(), StoredTensor { stored_type, shape, start: data_start + start })
    }
}

fn read_extent<'a>(cursor: &mut Cursor<'a>, alignment: usize) -> Result<Extent<'a>, LoadError> {
    let name = cursor.name("a tensor's name")?;
    let bad = |reason: String| LoadError::malformed(tensor(name), reason);
    let num_dims = cursor.u32(&tensor(name))?;
    if num_dims == 0 || num_dims as usize > MAX_TENSOR_DIMS {
        return Err(bad(format!("it has {num_dims} dimensions")));
    }
    let mut elements = Some(1u64);
    let mut shape = Vec::new();
    for _ in 0..num_dims {
        let len = cursor.u64(&tensor(name))?;
        elements = elements.and_then(|n| n.checked_mul(len)).filter(|n| *n > 0);
        // Too long a dimension makes the product too large as well.
        shape.insert(0, usize::try_from(len).unwrap_or(usize::MAX));
    }
    let row_len = shape[shape.len() - 1];
    let code = cursor.u32(&tensor(name))?;
    let Some(stored_type) = StoredType::from_gguf(code) else {
        let reason = format!("type {}; {} are", type_name(code), StoredType::GGUF_NAMES);
        return Err(LoadError::unsupported(tensor(name), reason));
    };
    let block_len = stored_type.block_len();
    if !row_len.is_multiple_of(block_len) {
        return Err(bad(format!("rows of {row_len} end inside a block of {block_len}")));
    }
    let start = cursor.u64(&tensor(name))?;
    if start % alignment as u64 != 0 {
        return Err(bad(format!("offset {start} is no multiple of {alignment}")));
    }
    let blocks = elements.map(|n| n / block_len as u64);
    match blocks.and_then(|n| n.checked_mul(stored_type.block_bytes() as u64)) {
        Some(len) => Ok(Extent { start, len, name, stored_type, shape }),
        None => Err(bad("its dimensions are zero or beyond all bounds".to_owned())),
    }
}

fn check_extents(extents: &mut [Extent<'_>], data_start: u64, len: u64) -> Result<(), LoadError> {
    extents.sort_by_key(|extent| extent.start);
    let mut previous: Option<(&str, u64)> = None;
    for extent in extents.iter() {
        let bad = |reason: String| LoadError::malformed(tensor(extent.name), reason);
        let end = extent.start.checked_add(extent.len);
        let is_inside = end.and_then(|e| e.checked_add(data_start)).is_some_and(|e| e <= len);
        let Some(end) = end.filter(|_| is_inside) else {
            return Err(bad(format!("its {} bytes reach past the end of the file", extent.len)));
        };
        match previous {
            Some((other, other_end)) if extent.start < other_end => {
                return Err(bad(format!("it overlaps `{}`", shown(other))));
            }
            Some(_) | None => previous = Some((extent.name, end)),
        }
    }
    Ok(())
}
