//! Owns the GGUF container on the way out: types of tensors, the header with its keys, offsets and
//! padding. Knows no networks.

use candle_core::quantized::gguf_file::Value;

/// Version of the format.
const VERSION: u32 = 3;
/// Alignment of every tensor, the format's default.
const ALIGNMENT: u64 = 32;
/// Weights that share a scale.
const BLOCK_LEN: usize = 32;
/// Number of the type of 32-bit floats.
const CODE_F32: u32 = 0;

/// How the matrices of a file are stored. Norms are always 32-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixFormat {
    /// 8-bit integers with a half-precision scale per 32 weights.
    Q8_0,
    /// 4-bit integers with a half-precision scale per 32 weights.
    Q4_0,
}

impl MatrixFormat {
    /// Number of the type in the file.
    fn code(self) -> u32 {
        match self {
            Self::Q8_0 => 8,
            Self::Q4_0 => 2,
        }
    }

    /// Number by which readers call a file of such matrices.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::Q8_0 => 7,
            Self::Q4_0 => 2,
        }
    }

    fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 2 + BLOCK_LEN,
            Self::Q4_0 => 2 + BLOCK_LEN / 2,
        }
    }
}

/// A tensor as the header describes it.
pub(super) struct Tensor {
    name: String,
    /// `[out, in]`, or `[1, len]` of a vector.
    shape: [usize; 2],
    /// `None` for 32-bit floats.
    format: Option<MatrixFormat>,
}

impl Tensor {
    /// A vector of 32-bit floats.
    pub(super) fn floats(name: String, len: usize) -> Self {
        Self { name, shape: [1, len], format: None }
    }

    /// A matrix, `[out, in]`.
    pub(super) fn matrix(name: String, format: MatrixFormat, shape: [usize; 2]) -> Self {
        assert!(shape[1].is_multiple_of(BLOCK_LEN), "rows are whole blocks");
        Self { name, shape, format: Some(format) }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.shape[0]
    }

    pub(super) fn num_weights(&self) -> u64 {
        self.shape[0] as u64 * self.shape[1] as u64
    }

    pub(super) fn num_bytes(&self) -> u64 {
        let row = match self.format {
            None => 4 * self.shape[1],
            Some(format) => self.shape[1] / BLOCK_LEN * format.block_bytes(),
        };
        self.shape[0] as u64 * row as u64
    }

    /// With the padding behind it.
    pub(super) fn padded_bytes(&self) -> u64 {
        self.num_bytes().next_multiple_of(ALIGNMENT)
    }

    /// Its entry in the header.
    fn describe(&self, offset: u64, header: &mut Vec<u8>) {
        put_text(&self.name, header);
        // Innermost dimension first.
        let dims = match self.format {
            None => &[self.shape[1]][..],
            Some(_) => &[self.shape[1], self.shape[0]],
        };
        header.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
        header.extend(self.format.map_or(CODE_F32, MatrixFormat::code).to_le_bytes());
        header.extend(offset.to_le_bytes());
    }
}

/// Everything before the tensor data, padding included.
pub(super) fn header<'a>(
    keys: &[(String, Value)],
    tensors: impl ExactSizeIterator<Item = &'a Tensor>,
) -> Vec<u8> {
    let mut header = b"GGUF".to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_text(key, &mut header);
        header.extend(code(value).to_le_bytes());
        put_value(value, &mut header);
    }
    let mut offset = 0;
    for tensor in tensors {
        tensor.describe(offset, &mut header);
        offset += tensor.padded_bytes();
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    header
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Number of a value's type in the file.
fn code(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn put_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::U8(n) => out.push(*n),
        Value::I8(n) => out.extend(n.to_le_bytes()),
        Value::U16(n) => out.extend(n.to_le_bytes()),
        Value::I16(n) => out.extend(n.to_le_bytes()),
        Value::U32(n) => out.extend(n.to_le_bytes()),
        Value::I32(n) => out.extend(n.to_le_bytes()),
        Value::U64(n) => out.extend(n.to_le_bytes()),
        Value::I64(n) => out.extend(n.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
        Value::Bool(flag) => out.push(u8::from(*flag)),
        Value::String(text) => put_text(text, out),
        Value::Array(values) => {
            // An empty array has the type of texts: nothing else is ever empty.
            let element = values.first().map_or(8, code);
            out.extend(element.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| put_value(value, out));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use candle_core::quantized::gguf_file::{Content, Value};

    use super::{MatrixFormat, Tensor, header};

    /// One value of every type.
    fn values() -> Vec<(String, Value)> {
        let texts =
            Value::Array(vec![Value::String("a".to_owned()), Value::String("é".to_owned())]);
        let floats = Value::Array(vec![Value::F32(0.5), Value::F32(-1.0)]);
        let values = vec![
            Value::U8(250),
            Value::I8(-3),
            Value::U16(65_000),
            Value::I16(-300),
            Value::U32(4_000_000_000),
            Value::I32(-70_000),
            Value::U64(1 << 40),
            Value::I64(-(1 << 40)),
            Value::F32(1.5),
            Value::F64(0.1),
            Value::Bool(true),
            Value::String("text".to_owned()),
            texts,
            floats,
            Value::Array(Vec::new()),
        ];
        values.into_iter().enumerate().map(|(at, value)| (format!("key.{at}"), value)).collect()
    }

    #[test]
    fn another_reader_finds_every_key_and_tensor() {
        let tensors = [
            Tensor::floats("norm".to_owned(), 5),
            Tensor::matrix("eight".to_owned(), MatrixFormat::Q8_0, [3, 64]),
            Tensor::matrix("four".to_owned(), MatrixFormat::Q4_0, [2, 32]),
        ];
        let mut file = header(&values(), tensors.iter());
        let data_start = file.len();
        let bytes: Vec<u64> = tensors.iter().map(Tensor::num_bytes).collect();
        assert_eq!(bytes, [20, 3 * 2 * 34, 2 * 18]);
        file.resize(data_start + tensors.iter().map(Tensor::padded_bytes).sum::<u64>() as usize, 0);
        let content = Content::read(&mut Cursor::new(&file)).expect("a sound header");
        assert_eq!(content.tensor_data_offset as usize, data_start);
        assert_eq!(content.metadata.len(), values().len());
        for (key, value) in values() {
            // The reader's values cannot be compared; their descriptions can.
            assert_eq!(format!("{:?}", content.metadata[&key]), format!("{value:?}"), "{key}");
        }
        let found = |name: &str| {
            let info = &content.tensor_infos[name];
            (info.shape.dims().to_vec(), format!("{:?}", info.ggml_dtype), info.offset)
        };
        assert_eq!(found("norm"), (vec![5], "F32".to_owned(), 0));
        assert_eq!(found("eight"), (vec![3, 64], "Q8_0".to_owned(), 32));
        assert_eq!(found("four"), (vec![2, 32], "Q4_0".to_owned(), 32 + 224));
    }
}
