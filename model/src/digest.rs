//! Owns the identity of a model: one hash over everything its output depends on, taken from what is
//! in memory and not from files. Knows no file format; tensors go by names of our own, so that the
//! same weights have the same hash whatever file they came from.

use std::fmt;

use half::{bf16, f16};

use crate::config::{LlamaConfig, RopeScaling};
use crate::kv_pool::KvType;
use crate::rope;
use crate::tokenizer::Tokenizer;
use crate::weights::{LlamaWeights, Matrix, MatrixData};

/// Separates this use of blake3 from every other; raised when the definition changes.
const DIGEST_CONTEXT: &str = "slipstream model digest v1";
/// Bytes converted at a time while hashing numbers.
const HASH_CHUNK_BYTES: usize = 1 << 16;
/// Hexadecimal digits of the short form.
const SHORT_LEN: usize = 16;

/// blake3 over tensors (sorted name, type, shape, content), architecture facts, tokenizer, type of
/// the KV pool and rotary frequencies. Two models with the same digest (and the same
/// `NUMERICS_VERSION`) give the same output. Displayed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelDigest([u8; 32]);

impl ModelDigest {
    /// Hashes a model that runs with this type of keys and values. `progress` is told bytes done
    /// and bytes in all.
    #[must_use]
    pub fn compute(
        config: &LlamaConfig,
        weights: &LlamaWeights,
        tokenizer: &Tokenizer,
        kv_type: KvType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Self {
        let mut hasher = Record::new();
        hash_config(&mut hasher, config);
        hasher.bytes(&tokenizer.fingerprint());
        hasher.bytes(&tokenizer.content_hash());
        hasher.bytes(kv_type.name().as_bytes());
        let mut tensors = tensors(weights);
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let total = tensors.iter().map(|t| t.content.num_bytes()).sum();
        let mut done = 0;
        hasher.number(tensors.len());
        for tensor in &tensors {
            hasher.bytes(tensor.name.as_bytes());
            hasher.bytes(tensor.content.type_name().as_bytes());
            hasher.numbers(&tensor.shape);
            hasher.bytes(&tensor.content.hash());
            done += tensor.content.num_bytes();
            progress(done, total);
        }
        Self(*hasher.0.finalize().as_bytes())
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 16 hexadecimal digits, for logs and labels.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..SHORT_LEN].to_owned()
    }
}

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelDigest({self})")
    }
}

/// A hash of fields, each preceded by its length, so that no two lists of fields look alike.
struct Record(blake3::Hasher);

impl Record {
    fn new() -> Self {
        Self(blake3::Hasher::new_derive_key(DIGEST_CONTEXT))
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn number(&mut self, number: usize) {
        self.bytes(&(number as u64).to_le_bytes());
    }

    fn numbers(&mut self, numbers: &[usize]) {
        self.number(numbers.len());
        numbers.iter().for_each(|number| self.number(*number));
    }

    fn float(&mut self, number: f64) {
        self.bytes(&number.to_bits().to_le_bytes());
    }
}

fn hash_config(hasher: &mut Record, config: &LlamaConfig) {
    // Named one by one, so that a new field cannot be forgotten here.
    let LlamaConfig {
        vocab_size,
        hidden_len,
        ffn_len,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        context_len,
        norm_eps,
        rope_theta,
        rope_scaling,
        rope_freq_divisors,
        eos_ids,
    } = config;
    hasher.numbers(&[*vocab_size, *hidden_len, *ffn_len, *num_layers]);
    hasher.numbers(&[*num_heads, *num_kv_heads, *head_dim, *context_len]);
    hasher.float(f64::from(*norm_eps));
    hasher.float(*rope_theta);
    match *rope_scaling {
        RopeScaling::None => hasher.bytes(b"none"),
        RopeScaling::Divisors => hasher.bytes(b"divisors"),
        RopeScaling::Linear { factor } => {
            hasher.bytes(b"linear");
            hasher.float(factor);
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_len } => {
            hasher.bytes(b"llama3");
            [factor, low_freq_factor, high_freq_factor].iter().for_each(|x| hasher.float(*x));
            hasher.number(original_context_len);
        }
    }
    hasher.number(rope_freq_divisors.len());
    rope_freq_divisors.iter().for_each(|divisor| hasher.float(f64::from(*divisor)));
    hasher.number(eos_ids.len());
    eos_ids.iter().for_each(|id| hasher.number(id.index()));
    let frequencies = rope::inverse_frequencies(config);
    hasher.number(frequencies.len());
    frequencies.iter().for_each(|frequency| hasher.float(*frequency));
}

enum Content<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Q8_0(&'a [f16], &'a [i8]),
    Q4_0(&'a [f16], &'a [u8]),
}

impl Content<'_> {
    fn type_name(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::F16(_) => "f16",
            Self::Bf16(_) => "bf16",
            Self::Q8_0(..) => "q8_0",
            Self::Q4_0(..) => "q4_0",
        }
    }

    fn num_bytes(&self) -> u64 {
        match self {
            Self::F32(numbers) => numbers.len() as u64 * 4,
            Self::F16(numbers) => numbers.len() as u64 * 2,
            Self::Bf16(numbers) => numbers.len() as u64 * 2,
            Self::Q8_0(scales, quants) => scales.len() as u64 * 2 + quants.len() as u64,
            Self::Q4_0(scales, quants) => scales.len() as u64 * 2 + quants.len() as u64,
        }
    }

    /// blake3 of the numbers in little-endian order: floats, or all scales and then all quants.
    fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        match self {
            Self::F32(numbers) => update(&mut hasher, numbers, |x| x.to_le_bytes()),
            Self::F16(numbers) => update(&mut hasher, numbers, |x| x.to_le_bytes()),
            Self::Bf16(numbers) => update(&mut hasher, numbers, |x| x.to_le_bytes()),
            Self::Q8_0(scales, quants) => {
                update(&mut hasher, scales, |x| x.to_le_bytes());
                update(&mut hasher, quants, |x| x.to_le_bytes());
            }
            Self::Q4_0(scales, quants) => {
                update(&mut hasher, scales, |x| x.to_le_bytes());
                hasher.update(quants);
            }
        }
        *hasher.finalize().as_bytes()
    }
}

fn update<T: Copy, const N: usize>(
    hasher: &mut blake3::Hasher,
    numbers: &[T],
    to_bytes: impl Fn(T) -> [u8; N],
) {
    let mut buffer = Vec::with_capacity(HASH_CHUNK_BYTES);
    for chunk in numbers.chunks(HASH_CHUNK_BYTES / N) {
        buffer.clear();
        chunk.iter().for_each(|number| buffer.extend_from_slice(&to_bytes(*number)));
        hasher.update(&buffer);
    }
}

struct NamedTensor<'a> {
    name: String,
    shape: Vec<usize>,
    content: Content<'a>,
}

fn tensors(weights: &LlamaWeights) -> Vec<NamedTensor<'_>> {
    let LlamaWeights { embedding, layers, output_norm, output } = weights;
    let mut all = vec![matrix("embedding".to_owned(), embedding)];
    all.push(norm("output_norm".to_owned(), output_norm));
    all.extend(output.as_ref().map(|output| matrix("output".to_owned(), output)));
    for (index, layer) in layers.iter().enumerate() {
        let name = |part: &str| format!("layers.{index}.{part}");
        all.extend([
            norm(name("attention_norm"), &layer.attention_norm),
            matrix(name("query"), &layer.query),
            matrix(name("key"), &layer.key),
            matrix(name("value"), &layer.value),
            matrix(name("attention_output"), &layer.attention_output),
            norm(name("ffn_norm"), &layer.ffn_norm),
            matrix(name("gate"), &layer.gate),
            matrix(name("up"), &layer.up),
            matrix(name("down"), &layer.down),
        ]);
    }
    all
}

fn norm(name: String, weights: &[f32]) -> NamedTensor<'_> {
    NamedTensor { name, shape: vec![weights.len()], content: Content::F32(weights) }
}

fn matrix(name: String, matrix: &Matrix) -> NamedTensor<'_> {
    let content = match &matrix.data {
        MatrixData::F32(numbers) => Content::F32(numbers),
        MatrixData::F16(numbers) => Content::F16(numbers),
        MatrixData::Bf16(numbers) => Content::Bf16(numbers),
        MatrixData::Q8_0 { scales, quants } => Content::Q8_0(scales, quants),
        MatrixData::Q4_0 { scales, quants } => Content::Q4_0(scales, quants),
    };
    NamedTensor { name, shape: vec![matrix.out_len, matrix.in_len], content }
}
