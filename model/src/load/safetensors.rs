//! Owns the header of one safetensors file: where its tensors lie, checked against the file's
//! length before anything is believed. Knows no tensor's meaning and reads none.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::limits::{MAX_SAFETENSORS_HEADER_BYTES, MAX_TENSOR_DIMS, MAX_TENSORS};
use super::network::{Dialect, TensorFile};
use super::source::Source;
use super::stored::{StoredTensor, StoredType};
use crate::error::{LoadError, shown, tensor};

/// How messages call the file.
const PLACE: &str = "model.safetensors";
/// The header is preceded by its length.
const LEN_BYTES: usize = 8;
/// The one entry of the header that is no tensor.
const METADATA_KEY: &str = "__metadata__";

/// Checks the header: inside the file, types that can be read, sizes equal to shape times type,
/// tensors one behind the other from the beginning of the data to its end.
pub(super) fn open(source: Source<'_>) -> Result<TensorFile<'_>, LoadError> {
    let (header, data_start) = header(&source)?;
    let data_len = source.num_bytes() - data_start;
    let mut extents = Vec::new();
    let mut tensors = BTreeMap::new();
    for (name, entry) in header.0 {
        let (stored_type, start, end) = check_entry(&name, &entry, data_len)?;
        extents.push((start, end, name.clone()));
        let stored = StoredTensor { stored_type, shape: entry.shape, start: data_start + start };
        if tensors.insert(name.clone(), stored).is_some() {
            return Err(LoadError::malformed(tensor(&name), "the header lists it twice"));
        }
    }
    extents.sort();
    let mut covered = 0;
    let mut previous = "";
    for (start, end, name) in &extents {
        if *start < covered {
            let reason = format!("it overlaps `{}`", shown(previous));
            return Err(LoadError::malformed(tensor(name), reason));
        }
        if *start > covered {
            let reason = format!("bytes {covered}..{start} of the data belong to no tensor");
            return Err(LoadError::malformed(PLACE, reason));
        }
        (covered, previous) = (*end, name);
    }
    if covered != data_len {
        let reason = format!("bytes {covered}..{data_len} of the data belong to no tensor");
        return Err(LoadError::malformed(PLACE, reason));
    }
    Ok(TensorFile { source, tensors, dialect: Dialect::HuggingFace })
}

/// The parsed header and where the data behind it begins.
fn header(source: &Source<'_>) -> Result<(Header, u64), LoadError> {
    let len = source.prefix(LEN_BYTES)?;
    let Some(len) = len.first_chunk::<LEN_BYTES>() else {
        return Err(LoadError::malformed(PLACE, "it ends inside the header's length"));
    };
    let header_len = u64::from_le_bytes(*len);
    if header_len > MAX_SAFETENSORS_HEADER_BYTES {
        return Err(LoadError::TooLarge {
            what: format!("header of {PLACE}"),
            size: header_len,
            unit: "bytes",
            limit: MAX_SAFETENSORS_HEADER_BYTES,
        });
    }
    // Fits: the limit is small.
    let data_start = LEN_BYTES + header_len as usize;
    let bytes = source.prefix(data_start)?;
    let Some(header) = bytes.get(LEN_BYTES..data_start) else {
        let reason = format!("it ends inside its header of {header_len} bytes");
        return Err(LoadError::malformed(PLACE, reason));
    };
    let header = serde_json::from_slice(header).map_err(|error| {
        LoadError::malformed(format!("header of {PLACE}"), shown(&error.to_string()))
    })?;
    Ok((header, data_start as u64))
}

/// A tensor's type, and where its bytes start and end in the data.
fn check_entry(
    name: &str,
    entry: &Entry,
    data_len: u64,
) -> Result<(StoredType, u64, u64), LoadError> {
    let bad = |reason: String| LoadError::malformed(tensor(name), reason);
    let Some(stored_type) = StoredType::from_safetensors(&entry.dtype) else {
        let reason = format!("type {}; F32, F16 and BF16 are", shown(&entry.dtype));
        return Err(LoadError::unsupported(tensor(name), reason));
    };
    if entry.shape.len() > MAX_TENSOR_DIMS {
        return Err(bad(format!("it has {} dimensions", entry.shape.len())));
    }
    let (start, end) = entry.data_offsets;
    if start > end || end > data_len {
        return Err(bad(format!("its bytes {start}..{end} lie outside the {data_len} of data")));
    }
    let element_bytes = stored_type.block_bytes() as u64;
    let wanted =
        entry.shape.iter().try_fold(element_bytes, |size: u64, dim| size.checked_mul(*dim as u64));
    if wanted != Some(end - start) {
        let reason =
            format!("shape {:?} of {} is not {} bytes", entry.shape, entry.dtype, end - start);
        return Err(bad(reason));
    }
    Ok((stored_type, start, end))
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header's entries in file order. A map would swallow names that occur twice.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if entries.len() as u64 == MAX_TENSORS {
                let message = format!("more than {MAX_TENSORS} tensors");
                return Err(serde::de::Error::custom(message));
            }
            entries.push((name, map.next_value()?));
        }
        Ok(Header(entries))
    }
}
