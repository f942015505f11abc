//! Owns the reading of `config.json` and `generation_config.json` as transformers 4 and 5 write
//! them. Keys that are known to change numbers and are not implemented are refused by name; keys
//! that nobody here has heard of pass, as the writers add new ones freely. Knows no tensors.

use serde_json::{Map, Value};

use super::limits::{
    MAX_CONTEXT_LEN, MAX_EOS_IDS, MAX_FFN_LEN, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN_LEN, MAX_LAYERS,
    MAX_VOCAB, check_relations,
};
use super::{LoadOptions, ParsedConfig};
use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{LoadError, shown};
use crate::ids::TokenId;
use crate::tokenizer::NamedIds;

/// Default of `rope_theta` in transformers' Llama.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// Default of `rms_norm_eps` in transformers' Llama.
const DEFAULT_NORM_EPS: f64 = 1e-6;
/// Default of `max_position_embeddings` in transformers' Llama.
const DEFAULT_CONTEXT_LEN: usize = 2048;

/// Switches of Llama's relatives. Each must be absent, null, false, or equal to the number that
/// makes it do nothing.
const NEUTRAL: [(&str, Option<f64>); 17] = [
    ("attention_bias", None),
    ("mlp_bias", None),
    ("qkv_bias", None),
    ("use_qk_norm", None),
    ("qk_norm", None),
    ("attention_multiplier", None),
    ("embedding_multiplier", Some(1.0)),
    ("residual_multiplier", Some(1.0)),
    ("logits_scaling", Some(1.0)),
    ("logit_scale", Some(1.0)),
    ("partial_rotary_factor", Some(1.0)),
    ("attn_logit_softcapping", None),
    ("final_logit_softcapping", None),
    ("quantization_config", None),
    ("num_local_experts", Some(0.0)),
    ("no_rope_layers", None),
    ("attention_chunk_size", None),
];

/// Reads the architecture facts. `generation`, when there is one, overrides the ids that end a
/// completion.
pub(super) fn parse(
    config: &[u8],
    generation: Option<&[u8]>,
    options: &LoadOptions,
) -> Result<ParsedConfig, LoadError> {
    let config = Object::parse("config.json", config)?;
    check_architecture(&config)?;
    let num_heads = config.count("num_attention_heads", None, MAX_HEADS)?;
    let hidden_len = config.count("hidden_size", None, MAX_HIDDEN_LEN)?;
    let head_dim = match config.get("head_dim") {
        Some(_) => config.count("head_dim", None, MAX_HEAD_DIM)?,
        None if hidden_len.is_multiple_of(num_heads) => hidden_len / num_heads,
        None => return Err(config.bad("hidden_size", "is no multiple of `num_attention_heads`")),
    };
    let trained_len =
        config.count("max_position_embeddings", Some(DEFAULT_CONTEXT_LEN), MAX_CONTEXT_LEN)?;
    let norm_eps = config.number("rms_norm_eps", Some(DEFAULT_NORM_EPS))?;
    if !(norm_eps > 0.0 && norm_eps < 1.0) {
        return Err(config.bad("rms_norm_eps", "must lie between 0 and 1"));
    }
    let (rope_theta, rope_scaling) = rope(&config)?;
    let named = named_ids(&config, generation)?;
    let llama = LlamaConfig {
        vocab_size: config.count("vocab_size", None, MAX_VOCAB)?,
        hidden_len,
        ffn_len: config.count("intermediate_size", None, MAX_FFN_LEN)?,
        num_layers: config.count("num_hidden_layers", None, MAX_LAYERS)?,
        num_heads,
        num_kv_heads: config.count("num_key_value_heads", Some(num_heads), MAX_HEADS)?,
        head_dim,
        context_len: options.limit_context(trained_len)?,
        norm_eps: norm_eps as f32,
        rope_theta,
        rope_scaling,
        rope_freq_divisors: Vec::new(),
        eos_ids: named.eos.clone(),
    };
    check_relations(&llama)?;
    let is_tied = config.flag("tie_word_embeddings")?;
    Ok(ParsedConfig { llama, is_tied: Some(is_tied), named })
}

fn check_architecture(config: &Object) -> Result<(), LoadError> {
    if config.text("model_type")? != Some("llama") {
        let found = config.get("model_type").map_or_else(|| "absent".to_owned(), Value::to_string);
        return Err(
            config.unsupported("model_type", &format!("{} (wanted \"llama\")", shown(&found)))
        );
    }
    if let Some(architectures) = config.get("architectures")
        && *architectures != Value::from(vec!["LlamaForCausalLM"])
    {
        return Err(config.unsupported("architectures", "only [\"LlamaForCausalLM\"] is"));
    }
    if !matches!(config.text("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(config.unsupported("hidden_act", "only \"silu\" is"));
    }
    for (key, neutral) in NEUTRAL {
        let is_neutral = match config.get(key) {
            None | Some(Value::Bool(false)) => true,
            Some(value) => value.as_f64().is_some_and(|number| Some(number) == neutral),
        };
        if !is_neutral {
            return Err(config.unsupported(key, "the Llama network here has no such part"));
        }
    }
    let uses_window = config.get("use_sliding_window") != Some(&Value::Bool(false));
    if config.get("sliding_window").is_some() && uses_window {
        return Err(config.unsupported("sliding_window", "attention always sees all positions"));
    }
    if let Some(types) = config.get("layer_types") {
        let all_full = types.as_array().is_some_and(|t| t.iter().all(|t| t == "full_attention"));
        if !all_full {
            return Err(config.unsupported("layer_types", "only \"full_attention\" is"));
        }
    }
    Ok(())
}

/// Base and scaling of the rotary embedding: `rope_parameters` (transformers 5) or `rope_theta` and
/// `rope_scaling` (transformers 4).
fn rope(config: &Object) -> Result<(f64, RopeScaling), LoadError> {
    let new_style = config.object("rope_parameters")?;
    let old_style = config.object("rope_scaling")?;
    if new_style.is_some() && old_style.is_some() {
        return Err(config.unsupported("rope_scaling", "together with `rope_parameters`"));
    }
    let Some(rope) = new_style.or(old_style) else {
        return Ok((config.number("rope_theta", Some(DEFAULT_ROPE_THETA))?, RopeScaling::None));
    };
    let outer = config.number("rope_theta", Some(DEFAULT_ROPE_THETA))?;
    let theta = rope.number("rope_theta", Some(outer))?;
    if config.get("rope_theta").is_some() && theta != outer {
        return Err(config.bad("rope_theta", "disagrees with the rotary parameters"));
    }
    let kind = match (rope.text("rope_type")?, rope.text("type")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(rope.bad("rope_type", "disagrees with `type`"));
        }
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => "default",
    };
    let (known, scaling): (&[&str], RopeScaling) = match kind {
        "default" => (&[], RopeScaling::None),
        "linear" => (&["factor"], RopeScaling::Linear { factor: rope.number("factor", None)? }),
        "llama3" => (
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            RopeScaling::Llama3 {
                factor: rope.number("factor", None)?,
                low_freq_factor: rope.number("low_freq_factor", None)?,
                high_freq_factor: rope.number("high_freq_factor", None)?,
                original_context_len: rope.count(
                    "original_max_position_embeddings",
                    None,
                    MAX_CONTEXT_LEN,
                )?,
            },
        ),
        other => {
            let reason = format!("\"{}\"; default, linear and llama3 are", shown(other));
            return Err(rope.unsupported("rope_type", &reason));
        }
    };
    let always = ["rope_type", "type", "rope_theta"];
    match rope.keys().find(|key| !known.contains(key) && !always.contains(key)) {
        Some(key) => Err(rope.unsupported(key, &format!("rotary type \"{kind}\" has no such key"))),
        None => Ok((theta, scaling)),
    }
}

fn named_ids(config: &Object, generation: Option<&[u8]>) -> Result<NamedIds, LoadError> {
    let generation = match generation {
        Some(text) => Some(Object::parse("generation_config.json", text)?),
        None => None,
    };
    let eos = match &generation {
        Some(generation) if generation.get("eos_token_id").is_some() => {
            generation.ids("eos_token_id")?
        }
        _ => config.ids("eos_token_id")?,
    };
    Ok(NamedIds { bos: config.ids("bos_token_id")?.first().copied(), eos })
}

/// A JSON object of a configuration file, with errors that name file and key. A null value counts
/// as absent.
struct Object {
    place: String,
    map: Map<String, Value>,
}

impl Object {
    fn parse(place: &str, text: &[u8]) -> Result<Self, LoadError> {
        let map = serde_json::from_slice(text)
            .map_err(|error| LoadError::malformed(place, shown(&error.to_string())))?;
        Ok(Self { place: place.to_owned(), map })
    }

    fn what(&self, key: &str) -> String {
        format!("{} `{}`", self.place, shown(key))
    }

    fn bad(&self, key: &str, reason: &str) -> LoadError {
        LoadError::malformed(self.what(key), reason)
    }

    fn unsupported(&self, key: &str, reason: &str) -> LoadError {
        LoadError::unsupported(self.what(key), reason)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Keys that have a value.
    fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key.as_str())
    }

    fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.bad(key, "must be a string")),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, LoadError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.bad(key, "must be true or false")),
        }
    }

    /// A whole number of `1 ..= max`.
    fn count(&self, key: &str, default: Option<usize>, max: usize) -> Result<usize, LoadError> {
        let value = match (self.get(key), default) {
            (Some(value), _) => value.as_u64(),
            (None, Some(default)) => return Ok(default),
            (None, None) => return Err(LoadError::missing(self.what(key))),
        };
        match value.and_then(|value| usize::try_from(value).ok()) {
            Some(value) if (1..=max).contains(&value) => Ok(value),
            _ => Err(self.bad(key, &format!("must be a whole number from 1 to {max}"))),
        }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match (self.get(key), default) {
            (Some(value), _) => value.as_f64().ok_or_else(|| self.bad(key, "must be a number")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(LoadError::missing(self.what(key))),
        }
    }

    fn object(&self, key: &str) -> Result<Option<Self>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { place: self.what(key), map: map.clone() })),
            Some(_) => Err(self.bad(key, "must be an object")),
        }
    }

    /// One id, a list of ids, or none.
    fn ids(&self, key: &str) -> Result<Vec<TokenId>, LoadError> {
        let values = match self.get(key) {
            None => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        if values.len() > MAX_EOS_IDS {
            return Err(self.bad(key, &format!("has more than {MAX_EOS_IDS} ids")));
        }
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).map(TokenId);
        values
            .iter()
            .map(|value| {
                id(value).ok_or_else(|| self.bad(key, "must be a token id or a list of them"))
            })
            .collect()
    }
}
