//! Owns the tokenizer inside a GGUF file: its metadata is rewritten as `tokenizer.json` text, so
//! that one path makes and checks all tokenizers. Knows no tensors.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value as GgufValue;
use serde_json::{Value, json};

use super::gguf::Metadata;
use super::gguf_header::key_name;
use super::limits::{MAX_GGUF_ARRAY_ELEMENTS, MAX_TOKEN_BYTES, MAX_VOCAB};
use super::tokenizer_json;
use crate::error::{LoadError, shown};
use crate::ids::TokenId;
use crate::tokenizer::{NamedIds, Tokenizer};

/// How messages call the tokenizer of a GGUF file.
const PLACE: &str = "GGUF tokenizer";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const KINDS_KEY: &str = "tokenizer.ggml.token_type";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
const SCORES_KEY: &str = "tokenizer.ggml.scores";
/// SentencePiece's mark for a space.
const SPACE_MARK: &str = "\u{2581}";

/// GPT-2's way of splitting text before merging.
const SPLIT_GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
/// Llama 3's.
const SPLIT_LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Qwen 2's: Llama 3's with digits one by one. No key asks for a normal form, so there is none.
const SPLIT_QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// What files without a more exact name are split by, one rule after the other.
const SPLIT_DEFAULT: [&str; 4] =
    [r"[\p{P}\$\+<=>\^~\|]+", SPLIT_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// The name of a way to split text with one rule, where the format has one.
pub(super) fn split_name(regex: &str) -> Option<&'static str> {
    let known = [(SPLIT_GPT2, "gpt-2"), (SPLIT_LLAMA3, "llama-bpe"), (SPLIT_QWEN2, "qwen2")];
    known.into_iter().find(|(rule, _)| *rule == regex).map(|(_, name)| name)
}

/// What a token is for, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenKind {
    fn from_code(code: i64) -> Option<Self> {
        Some(match code {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The vocabulary in id order, without the padding at its end.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<TokenKind>,
    id_of: BTreeMap<&'a str, u32>,
}

/// Reads the tokenizer; ids must lie below `vocab_size`, the rows of the embedding.
pub(super) fn read(
    metadata: Metadata<'_>,
    vocab_size: usize,
    named: &NamedIds,
) -> Result<Tokenizer, LoadError> {
    let vocabulary = Vocabulary::read(metadata, named)?;
    if vocabulary.tokens.len() > vocab_size {
        let reason = format!(
            "it has {} tokens, the embedding has {vocab_size} rows",
            vocabulary.tokens.len()
        );
        return Err(LoadError::mismatch(key_name(TOKENS_KEY), reason));
    }
    let parts = match metadata.text("tokenizer.ggml.model")? {
        Some("gpt2") => byte_level_parts(metadata, &vocabulary)?,
        Some("llama") => sentence_piece_parts(metadata, &vocabulary)?,
        Some(other) => {
            let what = format!("{} = \"{}\"", key_name("tokenizer.ggml.model"), shown(other));
            return Err(LoadError::unsupported(what, "gpt2 and llama are"));
        }
        None => return Err(LoadError::missing(key_name("tokenizer.ggml.model"))),
    };
    let text = serde_json::to_vec(&json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": template(metadata, &vocabulary, named, parts.adds_bos)?,
        "decoder": parts.decoder,
        "model": parts.model,
    }))
    .map_err(|error| LoadError::malformed(PLACE, shown(&error.to_string())))?;
    tokenizer_json::build(&text, PLACE, vocab_size, named.clone())
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: Metadata<'a>, named: &NamedIds) -> Result<Self, LoadError> {
        let bad = |reason: String| LoadError::malformed(key_name(TOKENS_KEY), reason);
        let Some(values) = metadata.array(TOKENS_KEY)? else {
            return Err(LoadError::missing(key_name(TOKENS_KEY)));
        };
        if values.is_empty() || values.len() > MAX_VOCAB {
            return Err(bad(format!("it has {} tokens, 1 to {MAX_VOCAB} are", values.len())));
        }
        let mut tokens = texts(values, TOKENS_KEY)?;
        let mut kinds = kinds(metadata, tokens.len())?;
        for id in named.bos.iter().chain(&named.eos) {
            match kinds.get_mut(id.index()) {
                // Older files mark nothing; these are never text.
                Some(kind) if matches!(kind, TokenKind::Normal | TokenKind::Unused) => {
                    *kind = TokenKind::Control;
                }
                Some(_) => {}
                None => return Err(bad(format!("id {id} is named, but there is no such token"))),
            }
        }
        let used = kinds.iter().rposition(|kind| *kind != TokenKind::Unused).map_or(0, |i| i + 1);
        tokens.truncate(used);
        kinds.truncate(used);
        let mut id_of = BTreeMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if token.len() > MAX_TOKEN_BYTES {
                return Err(bad(format!("token {id} is longer than {MAX_TOKEN_BYTES} bytes")));
            }
            if let Some(other) = id_of.insert(*token, id as u32) {
                let name = shown(token);
                return Err(bad(format!("`{name}` is both token {other} and token {id}")));
            }
        }
        Ok(Self { tokens, kinds, id_of })
    }

    /// Tokens that are found in text before it is split: special and user-defined ones.
    fn added_tokens(&self) -> Vec<Value> {
        let entry = |(id, (content, kind)): (usize, (&&str, &TokenKind))| {
            let is_special = match kind {
                TokenKind::Unknown | TokenKind::Control => true,
                TokenKind::UserDefined => false,
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
            };
            Some(json!({
                "id": id, "content": content, "special": is_special, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            }))
        };
        self.tokens.iter().zip(&self.kinds).enumerate().filter_map(entry).collect()
    }
}

fn texts<'a>(values: &'a [GgufValue], key: &str) -> Result<Vec<&'a str>, LoadError> {
    let text = |value: &'a GgufValue| match value {
        GgufValue::String(text) => Ok(text.as_str()),
        _ => Err(LoadError::malformed(key_name(key), "must hold strings")),
    };
    values.iter().map(text).collect()
}

fn kinds(metadata: Metadata<'_>, len: usize) -> Result<Vec<TokenKind>, LoadError> {
    let Some(values) = metadata.array(KINDS_KEY)? else { return Ok(vec![TokenKind::Normal; len]) };
    let bad = |reason: &str| LoadError::malformed(key_name(KINDS_KEY), reason);
    if values.len() != len {
        return Err(bad("it must have one entry per token"));
    }
    let kind = |value: &GgufValue| match value {
        GgufValue::I32(code) => TokenKind::from_code(i64::from(*code)),
        GgufValue::U32(code) => TokenKind::from_code(i64::from(*code)),
        _ => None,
    };
    values
        .iter()
        .map(|v| kind(v).ok_or_else(|| bad("each must be 1 to 6, as a 32-bit number")))
        .collect()
}

/// The parts of `tokenizer.json` that depend on the tokenizer's model.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether a text begins with the begin-of-sequence token unless the file says otherwise.
    adds_bos: bool,
}

/// Byte-level BPE, `tokenizer.ggml.model = gpt2`.
fn byte_level_parts(metadata: Metadata<'_>, vocab: &Vocabulary<'_>) -> Result<Parts, LoadError> {
    let Some(merges) = metadata.array(MERGES_KEY)? else {
        return Err(LoadError::missing(key_name(MERGES_KEY)));
    };
    let merges: Vec<(&str, &str)> = texts(merges, MERGES_KEY)?
        .into_iter()
        .enumerate()
        .map(|(rank, merge)| {
            merge.split_once(' ').ok_or_else(|| {
                LoadError::malformed(key_name(MERGES_KEY), format!("merge {rank} is no pair"))
            })
        })
        .collect::<Result<_, _>>()?;
    let name = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let is_llama3 = matches!(name, "llama-bpe" | "llama3" | "llama-v3");
    let splits: &[&str] = match name {
        "gpt-2" => &[SPLIT_GPT2],
        "default" => &SPLIT_DEFAULT,
        "qwen2" => &[SPLIT_QWEN2],
        "smollm" | "starcoder" | "refact" | "codeshell" => &[r"\p{N}", SPLIT_GPT2],
        _ if is_llama3 => &[SPLIT_LLAMA3],
        other => {
            let what = format!("{} = \"{}\"", key_name("tokenizer.ggml.pre"), shown(other));
            let reason = "gpt-2, default, llama-bpe, qwen2 and smollm are";
            return Err(LoadError::unsupported(what, reason));
        }
    };
    let mut steps: Vec<Value> = splits
        .iter()
        .map(|regex| {
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                   "invert": false})
        })
        .collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                      "use_regex": false}));
    Ok(Parts {
        normalizer: Value::Null,
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                        "use_regex": true}),
        model: bpe(&vocab.id_of, &merges, None, is_llama3),
        adds_bos: is_llama3,
    })
}

fn bpe(
    id_of: &BTreeMap<&str, u32>,
    merges: &[(&str, &str)],
    unknown: Option<&str>,
    ignore_merges: bool,
) -> Value {
    json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": unknown.is_some(),
        "byte_fallback": unknown.is_some(), "ignore_merges": ignore_merges,
        "vocab": id_of, "merges": merges,
    })
}

/// SentencePiece's BPE, `tokenizer.ggml.model = llama`: pieces with scores instead of merges.
fn sentence_piece_parts(
    metadata: Metadata<'_>,
    vocab: &Vocabulary<'_>,
) -> Result<Parts, LoadError> {
    for key in ["tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"] {
        let is_neutral = match metadata.get(key) {
            None | Some(GgufValue::Bool(false)) => true,
            Some(GgufValue::Array(values)) => values.is_empty(),
            Some(_) => false,
        };
        if !is_neutral {
            return Err(LoadError::unsupported(key_name(key), "text is taken as it is"));
        }
    }
    let Some(unknown) = vocab.kinds.iter().position(|kind| *kind == TokenKind::Unknown) else {
        return Err(LoadError::missing("GGUF tokenizer: a token of kind unknown"));
    };
    let merges = merges_by_score(&scores(metadata, vocab.tokens.len())?, vocab)?;
    let mut normalizers = Vec::new();
    if metadata.flag("tokenizer.ggml.add_space_prefix", true)? {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE_MARK}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}));
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]}),
        model: bpe(&vocab.id_of, &merges, Some(vocab.tokens[unknown]), false),
        adds_bos: true,
    })
}

fn scores(metadata: Metadata<'_>, num_tokens: usize) -> Result<Vec<f32>, LoadError> {
    let Some(values) = metadata.array(SCORES_KEY)? else {
        return Err(LoadError::missing(key_name(SCORES_KEY)));
    };
    if values.len() < num_tokens {
        return Err(LoadError::malformed(key_name(SCORES_KEY), "it must have one entry per token"));
    }
    let score = |value: &GgufValue| match value {
        GgufValue::F32(score) if !score.is_nan() => Ok(*score),
        _ => Err(LoadError::malformed(key_name(SCORES_KEY), "each must be a 32-bit number")),
    };
    values.iter().map(score).collect()
}

/// Merges that do what scores do: every way to make a piece of two others, best piece first. Ways
/// to make the same piece follow the ids of their sides, as the published conversion of Llama's
/// tokenizer to BPE has it. Their number is bounded: pieces made of one letter have as many ways as
/// letters each.
fn merges_by_score<'a>(
    scores: &[f32],
    vocab: &Vocabulary<'a>,
) -> Result<Vec<(&'a str, &'a str)>, LoadError> {
    let mut merges = Vec::new();
    for ((token, kind), score) in vocab.tokens.iter().zip(&vocab.kinds).zip(scores) {
        if *kind != TokenKind::Normal {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (vocab.id_of.get(left), vocab.id_of.get(right)) {
                merges.push((*score, *l, *r, left, right));
            }
            if merges.len() as u64 > MAX_GGUF_ARRAY_ELEMENTS {
                let reason = format!("it implies more than {MAX_GGUF_ARRAY_ELEMENTS} merges");
                return Err(LoadError::malformed(key_name(SCORES_KEY), reason));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(merges.into_iter().map(|(_, _, _, left, right)| (left, right)).collect())
}

/// The template that adds the begin- and end-of-sequence tokens which the file asks for.
fn template(
    metadata: Metadata<'_>,
    vocab: &Vocabulary<'_>,
    named: &NamedIds,
    adds_bos: bool,
) -> Result<Value, LoadError> {
    let bos = wanted(metadata, "tokenizer.ggml.add_bos_token", adds_bos, named.bos)?;
    let eos_id = metadata.id("tokenizer.ggml.eos_token_id")?;
    let eos = wanted(metadata, "tokenizer.ggml.add_eos_token", false, eos_id)?;
    let mut special = BTreeMap::new();
    let mut piece = |id: TokenId| {
        let name = vocab.tokens[id.index()];
        special.insert(name, json!({"id": name, "ids": [id.0], "tokens": [name]}));
        json!({"SpecialToken": {"id": name, "type_id": 0}})
    };
    let before: Vec<Value> = bos.into_iter().map(&mut piece).collect();
    let after: Vec<Value> = eos.into_iter().map(&mut piece).collect();
    if before.is_empty() && after.is_empty() {
        return Ok(Value::Null);
    }
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let around = |middle: Vec<Value>| [before.clone(), middle, after.clone()].concat();
    let single = around(vec![text("A")]);
    let pair = around(vec![text("A"), text("B")]);
    Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair,
              "special_tokens": special}))
}

/// The token that a flag asks for. Asked for by the file itself, it must exist.
fn wanted(
    metadata: Metadata<'_>,
    flag: &str,
    default: bool,
    id: Option<TokenId>,
) -> Result<Option<TokenId>, LoadError> {
    match (metadata.flag(flag, default)?, id) {
        (false, _) => Ok(None),
        (true, Some(id)) => Ok(Some(id)),
        (true, None) if metadata.get(flag).is_none() => Ok(None),
        (true, None) => Err(LoadError::mismatch(key_name(flag), "the file names no such token")),
    }
}
