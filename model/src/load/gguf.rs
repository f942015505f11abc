//! Owns the header of one GGUF file, read by candle after `gguf_header.rs` has checked it:
//! architecture facts from its keys, where its tensors lie. Knows nothing of the tokenizer inside
//! beyond the ids it names.

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;

use candle_core::quantized::gguf_file::{Content, Value};

use super::convert;
use super::gguf_header::{self, GgufHeader, key_name};
use super::limits::{
    MAX_CONTEXT_LEN, MAX_FFN_LEN, MAX_GGUF_HEADER_BYTES, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN_LEN,
    MAX_LAYERS, MAX_VOCAB, check_relations,
};
use super::network::{Dialect, TensorFile};
use super::source::Source;
use super::stored::StoredTensor;
use super::{LoadOptions, ParsedConfig};
use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{LoadError, shown, tensor};
use crate::ids::TokenId;
use crate::tokenizer::NamedIds;

/// The embedding's name; its rows are the vocabulary.
const EMBEDDING: &str = "token_embd.weight";
/// The divisors of the rotary frequencies.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";
/// Base of the rotary frequencies where the file names none.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// Bytes of a file that are read for its header at first, and how many times as many are when it
/// goes on behind them.
const HEADER_READ: (usize, usize) = (1 << 20, 8);

/// Keys under `llama.` that are read, or that mean nothing to the computation. Any other is
/// refused: it could change numbers.
const LLAMA_KEYS: [&str; 20] = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
];

/// A checked and parsed file.
pub(super) struct GgufFile<'a> {
    source: Source<'a>,
    metadata: HashMap<String, Value>,
    tensors: BTreeMap<String, StoredTensor>,
}

impl<'a> GgufFile<'a> {
    /// Checks and parses the header.
    pub(super) fn open(source: Source<'a>) -> Result<Self, LoadError> {
        let (mut len, growth) = HEADER_READ;
        loop {
            let bytes = source.prefix(len)?;
            if let Some(header) = gguf_header::check(&bytes, source.num_bytes())? {
                let metadata = parse(&bytes, &header)?;
                drop(bytes);
                return Ok(Self { source, metadata, tensors: header.tensors });
            }
            // Ends: nothing lies behind the whole file, and the header's length has a limit.
            len = len.saturating_mul(growth).min(MAX_GGUF_HEADER_BYTES + 1);
        }
    }

    pub(super) fn metadata(&self) -> Metadata<'_> {
        Metadata { map: &self.metadata }
    }

    /// All keys and values.
    pub(super) fn into_keys(self) -> HashMap<String, Value> {
        self.metadata
    }

    /// The tensors, without the rest.
    pub(super) fn into_tensors(self) -> TensorFile<'a> {
        TensorFile { source: self.source, tensors: self.tensors, dialect: Dialect::Gguf }
    }

    /// Outermost dimension first: `[out, in]`.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Architecture facts, with the tokenizer's ids that end a completion.
    pub(super) fn config(&self, options: &LoadOptions) -> Result<ParsedConfig, LoadError> {
        let metadata = self.metadata();
        metadata.check_keys()?;
        let hidden_len = metadata.count("llama.embedding_length", None, MAX_HIDDEN_LEN)?;
        let num_heads = metadata.count("llama.attention.head_count", None, MAX_HEADS)?;
        let head_dim = metadata.head_dim(hidden_len, num_heads)?;
        let trained_len = metadata.count("llama.context_length", None, MAX_CONTEXT_LEN)?;
        let norm_eps = metadata.number("llama.attention.layer_norm_rms_epsilon", None)?;
        if !(norm_eps > 0.0 && norm_eps < 1.0) {
            let what = key_name("llama.attention.layer_norm_rms_epsilon");
            return Err(LoadError::malformed(what, "must lie between 0 and 1"));
        }
        let divisors = self.rope_divisors()?;
        let named = metadata.named_ids()?;
        let llama = LlamaConfig {
            vocab_size: self.vocab_size()?,
            hidden_len,
            ffn_len: metadata.count("llama.feed_forward_length", None, MAX_FFN_LEN)?,
            num_layers: metadata.count("llama.block_count", None, MAX_LAYERS)?,
            num_heads,
            num_kv_heads: metadata.count(
                "llama.attention.head_count_kv",
                Some(num_heads),
                MAX_HEADS,
            )?,
            head_dim,
            context_len: options.limit_context(trained_len)?,
            norm_eps: norm_eps as f32,
            rope_theta: metadata.number("llama.rope.freq_base", Some(DEFAULT_ROPE_THETA))?,
            rope_scaling: metadata.rope_scaling(!divisors.is_empty())?,
            rope_freq_divisors: divisors,
            eos_ids: named.eos.clone(),
        };
        check_relations(&llama)?;
        Ok(ParsedConfig { llama, is_tied: None, named })
    }

    /// Rows of the embedding.
    fn vocab_size(&self) -> Result<usize, LoadError> {
        let Some(shape) = self.shape(EMBEDDING) else {
            return Err(LoadError::missing(tensor(EMBEDDING)));
        };
        let rows = shape[0];
        if shape.len() != 2 || rows > MAX_VOCAB {
            let reason = format!("shape {shape:?}; at most {MAX_VOCAB} rows are accepted");
            return Err(LoadError::unsupported(tensor(EMBEDDING), reason));
        }
        match self.metadata().count("llama.vocab_size", Some(rows), MAX_VOCAB)? {
            stated if stated == rows => Ok(rows),
            stated => Err(LoadError::mismatch(
                key_name("llama.vocab_size"),
                format!("it is {stated}, the embedding has {rows} rows"),
            )),
        }
    }

    fn rope_divisors(&self) -> Result<Vec<f32>, LoadError> {
        let Some(stored) = self.tensors.get(ROPE_DIVISORS) else {
            return Ok(Vec::new());
        };
        if stored.stored_type.block_len() != 1 || stored.num_weights() > MAX_HEAD_DIM {
            let reason = "it must hold one float per pair of head dimensions";
            return Err(LoadError::unsupported(tensor(ROPE_DIVISORS), reason));
        }
        let Self { source, .. } = self;
        convert::Conversion { source, name: ROPE_DIVISORS, tensor: stored }.finite_floats()
    }
}

/// What candle reads from a header that was found sound.
fn parse(bytes: &[u8], header: &GgufHeader) -> Result<HashMap<String, Value>, LoadError> {
    let content = Content::read(&mut Cursor::new(bytes))
        .map_err(|error| LoadError::malformed("GGUF file", shown(&error.to_string())))?;
    let agrees = content.tensor_data_offset == header.data_start as u64
        && content.tensor_infos.len() == header.tensors.len()
        && content.tensor_infos.iter().all(|(name, theirs)| {
            header.tensors.get(name).is_some_and(|ours| {
                ours.shape == theirs.shape.dims()
                    && ours.start == content.tensor_data_offset + theirs.offset
                    && ours.stored_type.in_candle() == theirs.ggml_dtype
            })
        });
    if !agrees {
        return Err(LoadError::malformed("GGUF header", "two readings of it disagree"));
    }
    Ok(content.metadata)
}

/// Typed access to the metadata, with errors that name the key.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    map: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    pub(super) fn text(self, key: &str) -> Result<Option<&'a str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(LoadError::malformed(key_name(key), "must be a string")),
        }
    }

    pub(super) fn flag(self, key: &str, default: bool) -> Result<bool, LoadError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(LoadError::malformed(key_name(key), "must be true or false")),
        }
    }

    pub(super) fn array(self, key: &str) -> Result<Option<&'a [Value]>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(_) => Err(LoadError::malformed(key_name(key), "must be an array")),
        }
    }

    /// A token id.
    pub(super) fn id(self, key: &str) -> Result<Option<TokenId>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match whole(value).and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Ok(Some(TokenId(id))),
                None => Err(LoadError::malformed(key_name(key), "must be a token id")),
            },
        }
    }

    /// A whole number of `1 ..= max`.
    fn count(self, key: &str, default: Option<usize>, max: usize) -> Result<usize, LoadError> {
        let value = match (self.get(key), default) {
            (Some(value), _) => whole(value).and_then(|value| usize::try_from(value).ok()),
            (None, Some(default)) => return Ok(default),
            (None, None) => return Err(LoadError::missing(key_name(key))),
        };
        match value {
            Some(value) if (1..=max).contains(&value) => Ok(value),
            _ => {
                let reason = format!("must be a whole number from 1 to {max}");
                Err(LoadError::malformed(key_name(key), reason))
            }
        }
    }

    fn number(self, key: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match (self.get(key), default) {
            (Some(Value::F32(value)), _) => Ok(f64::from(*value)),
            (Some(Value::F64(value)), _) => Ok(*value),
            (Some(_), _) => Err(LoadError::malformed(key_name(key), "must be a float")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(LoadError::missing(key_name(key))),
        }
    }

    /// Architecture, and no key that would have to be ignored.
    fn check_keys(self) -> Result<(), LoadError> {
        match self.text("general.architecture")? {
            Some("llama") => {}
            Some(other) => {
                let what = format!("{} = \"{}\"", key_name("general.architecture"), shown(other));
                return Err(LoadError::unsupported(what, "only \"llama\" is"));
            }
            None => return Err(LoadError::missing(key_name("general.architecture"))),
        }
        let mut unknown: Vec<&str> = self
            .map
            .keys()
            .filter(|key| key.strip_prefix("llama.").is_some_and(|k| !LLAMA_KEYS.contains(&k)))
            .map(String::as_str)
            .collect();
        unknown.sort_unstable();
        if let Some(key) = unknown.first() {
            return Err(LoadError::unsupported(key_name(key), "it could change the computation"));
        }
        for key in ["llama.expert_count", "llama.expert_used_count"] {
            if self.get(key).is_some_and(|value| whole(value) != Some(0)) {
                return Err(LoadError::unsupported(key_name(key), "mixtures of experts are not"));
            }
        }
        Ok(())
    }

    fn head_dim(self, hidden_len: usize, num_heads: usize) -> Result<usize, LoadError> {
        let default = hidden_len / num_heads;
        if self.get("llama.attention.key_length").is_none()
            && (default == 0 || !hidden_len.is_multiple_of(num_heads))
        {
            let reason = "it is no multiple of the number of heads";
            return Err(LoadError::malformed(key_name("llama.embedding_length"), reason));
        }
        let head_dim = self.count("llama.attention.key_length", Some(default), MAX_HEAD_DIM)?;
        for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
            let other = self.count(key, Some(head_dim), MAX_HEAD_DIM)?;
            if other != head_dim {
                let reason = format!("it is {other}; only the head dimension, {head_dim}, is");
                return Err(LoadError::unsupported(key_name(key), reason));
            }
        }
        Ok(head_dim)
    }

    fn rope_scaling(self, has_divisors: bool) -> Result<RopeScaling, LoadError> {
        // The format's readers take a factor without a type for linear scaling, and know an older
        // key for it.
        let named = self.text("llama.rope.scaling.type")?;
        let keys = ["llama.rope.scaling.factor", "llama.rope.scale_linear"];
        let factor_key = keys.into_iter().find(|key| self.get(key).is_some());
        let scaling = match (named, factor_key) {
            (Some("none"), _) | (None, None) => RopeScaling::None,
            (None | Some("linear"), factor_key) => {
                RopeScaling::Linear { factor: self.number(factor_key.unwrap_or(keys[0]), None)? }
            }
            (Some(other), _) => {
                let what =
                    format!("{} = \"{}\"", key_name("llama.rope.scaling.type"), shown(other));
                return Err(LoadError::unsupported(what, "none and linear are"));
            }
        };
        match (scaling, has_divisors) {
            (scaling, false) => Ok(scaling),
            (RopeScaling::None, true) => Ok(RopeScaling::Divisors),
            _ => Err(LoadError::unsupported(
                tensor(ROPE_DIVISORS),
                "together with another rotary scaling",
            )),
        }
    }

    fn named_ids(self) -> Result<NamedIds, LoadError> {
        let mut eos = Vec::new();
        for name in ["eos", "eot", "eom"] {
            if let Some(id) = self.id(&format!("tokenizer.ggml.{name}_token_id"))?
                && !eos.contains(&id)
            {
                eos.push(id);
            }
        }
        Ok(NamedIds { bos: self.id("tokenizer.ggml.bos_token_id")?, eos })
    }
}

/// The value as a whole number, if it is one and not negative.
fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::U8(n) => Some(u64::from(*n)),
        Value::U16(n) => Some(u64::from(*n)),
        Value::U32(n) => Some(u64::from(*n)),
        Value::U64(n) => Some(*n),
        Value::I8(n) => u64::try_from(*n).ok(),
        Value::I16(n) => u64::try_from(*n).ok(),
        Value::I32(n) => u64::try_from(*n).ok(),
        Value::I64(n) => u64::try_from(*n).ok(),
        Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
    }
}
