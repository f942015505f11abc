//! Owns the reading of one safetensors file held in memory: our own check of its header first, then
//! candle for the tensors. Knows no tensor's meaning.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::safetensors::SliceSafetensors;
use candle_core::{DType, Device};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::limits::{MAX_SAFETENSORS_HEADER_BYTES, MAX_TENSOR_DIMS, MAX_TENSORS};
use crate::error::{LoadError, shown, tensor};

/// How messages call the file.
const PLACE: &str = "model.safetensors";
/// The header is preceded by its length.
const LEN_BYTES: usize = 8;
/// The one entry of the header that is no tensor.
const METADATA_KEY: &str = "__metadata__";

/// A checked file.
pub(super) struct SafetensorsFile<'a> {
    tensors: BTreeMap<String, Vec<usize>>,
    stored_bytes: BTreeMap<String, u64>,
    inner: SliceSafetensors<'a>,
}

impl<'a> SafetensorsFile<'a> {
    /// Checks a whole file: header inside the file, extents inside the data and without overlap,
    /// sizes equal to shape times type, types that can be read.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, LoadError> {
        let (header, data_len) = split(bytes)?;
        let mut extents = Vec::new();
        let mut tensors = BTreeMap::new();
        let mut stored_bytes = BTreeMap::new();
        for (name, entry) in header.0 {
            let (start, end) = check_entry(&name, &entry, data_len)?;
            extents.push((start, end, name.clone()));
            stored_bytes.insert(name.clone(), end - start);
            if tensors.insert(name.clone(), entry.shape).is_some() {
                return Err(LoadError::malformed(tensor(&name), "the header lists it twice"));
            }
        }
        extents.sort();
        for pair in extents.windows(2) {
            if pair[1].0 < pair[0].1 {
                let reason = format!("it overlaps `{}`", shown(&pair[0].2));
                return Err(LoadError::malformed(tensor(&pair[1].2), reason));
            }
        }
        let inner = SliceSafetensors::new(bytes)
            .map_err(|error| LoadError::malformed(PLACE, shown(&error.to_string())))?;
        Ok(Self { tensors, stored_bytes, inner })
    }

    /// Names in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    pub(super) fn stored_bytes(&self, name: &str) -> u64 {
        self.stored_bytes.get(name).copied().unwrap_or(0)
    }

    /// The numbers of one tensor as 32-bit floats, row-major.
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        self.inner
            .load(name, &Device::Cpu)
            .and_then(|stored| stored.to_dtype(DType::F32)?.flatten_all()?.to_vec1())
            .map_err(|error| LoadError::candle(name, &error))
    }
}

/// The parsed header and the length of the data behind it.
fn split(bytes: &[u8]) -> Result<(Header, u64), LoadError> {
    let Some((len, rest)) = bytes.split_first_chunk::<LEN_BYTES>() else {
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
    let header = usize::try_from(header_len).ok().and_then(|len| rest.split_at_checked(len));
    let Some((header, data)) = header else {
        let reason = format!("it ends inside its header of {header_len} bytes");
        return Err(LoadError::malformed(PLACE, reason));
    };
    let header = serde_json::from_slice(header).map_err(|error| {
        LoadError::malformed(format!("header of {PLACE}"), shown(&error.to_string()))
    })?;
    Ok((header, data.len() as u64))
}

/// Where a tensor's bytes start and end in the data.
fn check_entry(name: &str, entry: &Entry, data_len: u64) -> Result<(u64, u64), LoadError> {
    let bad = |reason: String| LoadError::malformed(tensor(name), reason);
    let element_bytes = match entry.dtype.as_str() {
        "F32" => 4,
        "F16" | "BF16" => 2,
        other => {
            let reason = format!("type {}; F32, F16 and BF16 are", shown(other));
            return Err(LoadError::unsupported(tensor(name), reason));
        }
    };
    if entry.shape.len() > MAX_TENSOR_DIMS {
        return Err(bad(format!("it has {} dimensions", entry.shape.len())));
    }
    let (start, end) = entry.data_offsets;
    if start > end || end > data_len {
        return Err(bad(format!("its bytes {start}..{end} lie outside the {data_len} of data")));
    }
    let wanted =
        entry.shape.iter().try_fold(element_bytes, |size: u64, dim| size.checked_mul(*dim as u64));
    if wanted != Some(end - start) {
        let reason =
            format!("shape {:?} of {} is not {} bytes", entry.shape, entry.dtype, end - start);
        return Err(bad(reason));
    }
    Ok((start, end))
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
