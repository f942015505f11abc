//! Owns handing a model's tokenizer on to a GGUF file: the keys of a GGUF file as they are, those
//! of a Hugging Face directory made from its `tokenizer.json` where the format can say the same.
//! What was made is read back and compared before it is believed.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as Key;
use serde_json::Value;

use super::gguf::GgufFile;
use super::limits::MAX_TOKENIZER_JSON_BYTES;
use super::source::{Source, read_small};
use super::{ModelSource, gguf_tokenizer};
use crate::error::{LoadError, shown};
use crate::tokenizer::{NamedIds, Tokenizer};
use crate::write::{Metadata, header_of};

/// How messages call the tokenizer of a directory.
const PLACE: &str = "tokenizer.json";
/// Keys that go with a tokenizer.
const PREFIX: &str = "tokenizer.";
/// Terms of use go with what they are about.
const LICENSE_KEY: &str = "general.license";
/// The keys that can name ids which end a completion.
const END_KEYS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];
/// Numbers of the kinds of tokens.
const KIND_NORMAL: i32 = 1;
const KIND_CONTROL: i32 = 3;
const KIND_USER_DEFINED: i32 = 4;
/// Text of many kinds, tokenised by both to see that they split alike.
const PROBE_TEXT: &str = concat!(
    "fn main() {\n\tlet x1 = vec![10, 2345678];\r\n\n    // I'LL don't   say: \u{fc}\u{a0}",
    "\u{6f22} \u{1f980}!!\n}  \n  <|endoftext|> \u{3000}x",
);

/// Keys and values of the tokenizer of `source`, with the licence if there is one, sorted.
/// `tokenizer` is what was loaded from there.
///
/// # Errors
/// [`LoadError`] names what is wrong with the file, or what of it no GGUF file can say.
pub fn tokenizer_keys(source: &ModelSource, tokenizer: &Tokenizer) -> Result<Metadata, LoadError> {
    let mut keys = match source {
        ModelSource::GgufBytes(bytes) => copied(Source::Bytes(bytes))?,
        ModelSource::Path(path) if path.is_dir() => made(path, tokenizer)?,
        ModelSource::Path(path) => copied(Source::open(path)?)?,
    };
    keys.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(keys)
}

fn copied(source: Source<'_>) -> Result<Metadata, LoadError> {
    let keys = GgufFile::open(source)?.into_keys();
    let is_kept = |key: &String| key.starts_with(PREFIX) || key == LICENSE_KEY;
    Ok(keys.into_iter().filter(|(key, _)| is_kept(key)).collect())
}

fn made(dir: &Path, tokenizer: &Tokenizer) -> Result<Metadata, LoadError> {
    let json = read_small(&dir.join(PLACE), MAX_TOKENIZER_JSON_BYTES)?;
    let json: Value = serde_json::from_slice(&json)
        .map_err(|error| LoadError::malformed(PLACE, shown(&error.to_string())))?;
    let other = |what: &str| {
        let reason = "GGUF files can say byte-level BPE split as gpt-2, llama-bpe, qwen2 or smollm \
                      do it; convert the model to GGUF with other tools";
        LoadError::unsupported(format!("{PLACE}: {what}"), reason)
    };
    if json["normalizer"] != Value::Null || json["decoder"]["type"] != "ByteLevel" {
        return Err(other("its normaliser or decoder"));
    }
    let Some(split) = split_name(&json["pre_tokenizer"]) else {
        return Err(other("its pre-tokeniser"));
    };
    let Some(mut keys) = vocabulary(&json) else { return Err(other("its vocabulary")) };
    let ends = tokenizer.eos_ids();
    if ends.len() > END_KEYS.len() {
        return Err(other("its number of end tokens"));
    }
    keys.push(("model", Key::String("gpt2".to_owned())));
    keys.push(("pre", Key::String(split.to_owned())));
    keys.extend(END_KEYS.into_iter().zip(ends.iter().map(|id| Key::U32(id.0))));
    keys.extend(tokenizer.bos_id().map(|id| ("bos_token_id", Key::U32(id.0))));
    let empty = tokenizer.encode("", true).unwrap_or_default();
    let adds_bos = !empty.is_empty() && empty.first().copied() == tokenizer.bos_id();
    keys.push(("add_bos_token", Key::Bool(adds_bos)));
    let keys = keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
    let keys = keys.collect();
    if !means_the_same(&keys, tokenizer)? {
        return Err(other("what it does"));
    }
    Ok(keys)
}

/// The name of a way to split text before merging.
fn split_name(pre_tokenizer: &Value) -> Option<&'static str> {
    let steps = match pre_tokenizer["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![pre_tokenizer],
    };
    let (last, before) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let splits_too = last["use_regex"] != false;
    match (before, splits_too) {
        ([], true) => Some("gpt-2"),
        ([digits], true) if digits["type"] == "Digits" && digits["individual_digits"] == true => {
            Some("smollm")
        }
        ([split], false) if split["type"] == "Split" && split["behavior"] == "Isolated" => {
            gguf_tokenizer::split_name(split["pattern"]["Regex"].as_str()?)
        }
        _ => None,
    }
}

/// Tokens, their kinds and merges; `None` where ids are missing or merges are no pairs.
fn vocabulary(json: &Value) -> Option<Vec<(&'static str, Key)>> {
    let mut tokens = std::collections::BTreeMap::new();
    for (token, id) in json["model"]["vocab"].as_object()? {
        tokens.insert(id.as_u64()?, (token.as_str(), KIND_NORMAL));
    }
    for added in json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice) {
        let kind = if added["special"] == true { KIND_CONTROL } else { KIND_USER_DEFINED };
        tokens.insert(added["id"].as_u64()?, (added["content"].as_str()?, kind));
    }
    let has_all = tokens.keys().zip(0..).all(|(id, at)| *id == at);
    let merge = |merge: &Value| match merge.as_array().map(Vec::as_slice) {
        Some([left, right]) => Some(Key::String(format!("{} {}", left.as_str()?, right.as_str()?))),
        Some(_) => None,
        None => Some(Key::String(merge.as_str()?.to_owned())),
    };
    let merges = json["model"]["merges"].as_array()?.iter().map(merge).collect::<Option<_>>()?;
    let kinds = tokens.values().map(|(_, kind)| Key::I32(*kind)).collect();
    let tokens = tokens.values().map(|(token, _)| Key::String((*token).to_owned())).collect();
    has_all.then(|| {
        let keys = [("tokens", tokens), ("token_type", kinds), ("merges", merges)];
        keys.map(|(key, values)| (key, Key::Array(values))).into()
    })
}

/// Whether the keys, read back, give the same vocabulary and the same tokens.
fn means_the_same(keys: &Metadata, tokenizer: &Tokenizer) -> Result<bool, LoadError> {
    let header = header_of(keys);
    let file = GgufFile::open(Source::Bytes(&header))?;
    let named = NamedIds { bos: tokenizer.bos_id(), eos: tokenizer.eos_ids().to_vec() };
    let again = gguf_tokenizer::read(file.metadata(), tokenizer.vocab_size(), &named)?;
    let tokens = |tokenizer: &Tokenizer| tokenizer.encode(PROBE_TEXT, true).ok();
    Ok(again.fingerprint() == tokenizer.fingerprint() && tokens(&again) == tokens(tokenizer))
}
