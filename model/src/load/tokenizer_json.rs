//! Owns the making of a [`Tokenizer`] from `tokenizer.json` text, whether a file holds it or it was
//! written from GGUF metadata. Everything the `tokenizers` crate takes on trust is checked before
//! the crate sees the text. Knows no model beyond the size of its vocabulary.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;

use super::limits::MAX_TOKEN_BYTES;
use crate::error::{LoadError, shown};
use crate::token_bytes::Spelling;
use crate::tokenizer::{NamedIds, TokenEntry, Tokenizer};

/// Text encoded once at load, so that a template naming ids outside the vocabulary is found there.
const PROBE_TEXT: &str = "a";

/// What is read first, so that other kinds of model get an error of their own.
#[derive(Deserialize)]
struct FileKind {
    model: ModelKind,
}

#[derive(Deserialize)]
struct ModelKind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// The parts that are checked; the rest goes to the `tokenizers` crate unread.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    decoder: Option<Value>,
    model: BpeModel,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct BpeModel {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Two neighbours that become one token: a pair, or in older files one text with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    fn sides(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Text(text) => text.split_once(' ').filter(|(_, right)| !right.contains(' ')),
        }
    }
}

/// Makes a tokenizer from JSON text. `place` is how errors call it; ids must lie below
/// `vocab_size`, the rows of the model's embedding.
pub(super) fn build(
    text: &[u8],
    place: &str,
    vocab_size: usize,
    named: NamedIds,
) -> Result<Tokenizer, LoadError> {
    let file = parse(text, place)?;
    check_model(&file.model, place, vocab_size)?;
    check_added_tokens(&file, place, vocab_size)?;
    let spelling = spelling(file.decoder.as_ref(), place)?;
    let entries = entries(&file, spelling);
    let inner = hand_over(text, place)?;
    check_agreement(&inner, &file, place)?;
    let tokenizer = Tokenizer::new(inner, &entries, named, text);
    let probe = tokenizer
        .encode(PROBE_TEXT, true)
        .map_err(|error| LoadError::malformed(place, shown(&error.to_string())))?;
    match probe.iter().find(|id| id.index() >= entries.len()) {
        Some(id) => Err(LoadError::mismatch(
            place,
            format!("its template adds id {id}; the vocabulary has {} entries", entries.len()),
        )),
        None => Ok(tokenizer),
    }
}

fn parse(text: &[u8], place: &str) -> Result<TokenizerFile, LoadError> {
    let bad = |error: serde_json::Error| LoadError::malformed(place, shown(&error.to_string()));
    let kind = serde_json::from_slice::<FileKind>(text).map_err(bad)?.model.kind;
    if let Some(kind) = kind.filter(|kind| kind != "BPE") {
        let what = format!("{place}: model type `{}`", shown(&kind));
        return Err(LoadError::unsupported(what, "only BPE is"));
    }
    serde_json::from_slice(text).map_err(bad)
}

fn check_model(model: &BpeModel, place: &str, vocab_size: usize) -> Result<(), LoadError> {
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        let what = format!("{place}: dropout");
        return Err(LoadError::unsupported(what, "the same text must always give the same ids"));
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        let what = format!("{place}: continuing_subword_prefix or end_of_word_suffix");
        return Err(LoadError::unsupported(what, "it must be empty"));
    }
    let mut taken = vec![false; vocab_size];
    for (token, id) in &model.vocab {
        check_token(token, *id, place, vocab_size)?;
        if std::mem::replace(&mut taken[*id as usize], true) {
            return Err(LoadError::malformed(place, format!("two tokens have id {id}")));
        }
    }
    for (rank, merge) in model.merges.iter().enumerate() {
        let known = merge.sides().is_some_and(|(left, right)| {
            model.vocab.contains_key(left)
                && model.vocab.contains_key(right)
                && model.vocab.contains_key(&format!("{left}{right}"))
        });
        if !known {
            let reason =
                format!("merge {rank} joins or makes tokens that are not in the vocabulary");
            return Err(LoadError::malformed(place, reason));
        }
    }
    Ok(())
}

fn check_token(token: &str, id: u32, place: &str, vocab_size: usize) -> Result<(), LoadError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(LoadError::TooLarge {
            what: format!("{place}: token {id}"),
            size: token.len() as u64,
            unit: "bytes",
            limit: MAX_TOKEN_BYTES as u64,
        });
    }
    if token.is_empty() {
        return Err(LoadError::malformed(place, format!("token {id} is empty")));
    }
    if id as usize >= vocab_size {
        let what = format!("{place}: token `{}`", shown(token));
        let reason = format!("its id {id} lies outside the embedding of {vocab_size} rows");
        return Err(LoadError::mismatch(what, reason));
    }
    Ok(())
}

fn check_added_tokens(
    file: &TokenizerFile,
    place: &str,
    vocab_size: usize,
) -> Result<(), LoadError> {
    let mut content_of: BTreeMap<u32, &str> =
        file.model.vocab.iter().map(|(token, id)| (*id, token.as_str())).collect();
    let mut seen = BTreeMap::new();
    for added in &file.added_tokens {
        check_token(&added.content, added.id, place, vocab_size)?;
        let by_id = content_of.insert(added.id, &added.content);
        let by_content = file.model.vocab.get(&added.content).copied();
        let conflict = by_id.is_some_and(|content| content != added.content)
            || by_content.is_some_and(|id| id != added.id)
            || seen.insert(added.content.as_str(), added.id).is_some();
        if conflict {
            let name = shown(&added.content);
            let reason = format!("added token `{name}` (id {}) clashes with another", added.id);
            return Err(LoadError::malformed(place, reason));
        }
    }
    Ok(())
}

/// The byte spelling that a decoder implies. A closed list: a decoder we do not know could change
/// text in ways that a table of bytes cannot follow.
fn spelling(decoder: Option<&Value>, place: &str) -> Result<Spelling, LoadError> {
    let steps: Vec<&Value> = match decoder {
        Some(one) if one["type"] == "Sequence" => {
            one["decoders"].as_array().map(|steps| steps.iter().collect()).unwrap_or_default()
        }
        Some(one) => vec![one],
        None => Vec::new(),
    };
    let kinds: Vec<&str> = steps.iter().map(|step| step["type"].as_str().unwrap_or("?")).collect();
    let is_piece_step = |step: &&Value| match step["type"].as_str() {
        Some("Replace") => step["pattern"]["String"] == "\u{2581}" && step["content"] == " ",
        Some("Metaspace") => step["replacement"] == "\u{2581}",
        Some("Strip") => step["content"] == " ",
        Some("ByteFallback" | "Fuse") => true,
        _ => false,
    };
    let has_spaces = kinds.contains(&"Replace") || kinds.contains(&"Metaspace");
    if kinds == ["ByteLevel"] {
        Ok(Spelling::ByteLevel)
    } else if has_spaces && steps.iter().all(is_piece_step) {
        Ok(Spelling::SentencePiece { byte_tokens: kinds.contains(&"ByteFallback") })
    } else {
        let what = format!("{place}: decoder [{}]", shown(&kinds.join(", ")));
        Err(LoadError::unsupported(what, "byte-level and SentencePiece decoders are"))
    }
}

/// What the vocabulary has at each id up to the highest.
fn entries(file: &TokenizerFile, spelling: Spelling) -> Vec<TokenEntry> {
    let added_ids = file.added_tokens.iter().map(|added| added.id);
    let highest = file.model.vocab.values().copied().chain(added_ids).max();
    let mut entries = vec![TokenEntry::Hole; highest.map_or(0, |id| id as usize + 1)];
    for (token, id) in &file.model.vocab {
        entries[*id as usize] = TokenEntry::Text(spelling.bytes_of(token));
    }
    for added in &file.added_tokens {
        entries[added.id as usize] = if added.special {
            TokenEntry::Special(added.content.clone())
        } else {
            TokenEntry::Text(added.content.clone().into_bytes())
        };
    }
    entries
}

/// Lets the `tokenizers` crate read the text. It was written for trusted files, so a panic inside
/// is an error like any other here.
fn hand_over(text: &[u8], place: &str) -> Result<tokenizers::Tokenizer, LoadError> {
    let made = catch_unwind(AssertUnwindSafe(|| {
        let mut made = tokenizers::Tokenizer::from_bytes(text)?;
        // Cutting or padding prompts behind the client's back is not a tokenizer's business.
        made.with_truncation(None)?;
        made.with_padding(None);
        Ok::<_, tokenizers::Error>(made)
    }));
    match made {
        Ok(Ok(made)) => Ok(made),
        Ok(Err(error)) => Err(LoadError::malformed(place, shown(&error.to_string()))),
        Err(_) => Err(LoadError::malformed(place, "the tokenizers crate gave up on it")),
    }
}

/// The crate numbers added tokens itself; it must have come to the ids that the file states.
fn check_agreement(
    inner: &tokenizers::Tokenizer,
    file: &TokenizerFile,
    place: &str,
) -> Result<(), LoadError> {
    for added in &file.added_tokens {
        if inner.token_to_id(&added.content) != Some(added.id) {
            let name = shown(&added.content);
            let reason =
                format!("added token `{name}` does not follow the vocabulary at {}", added.id);
            return Err(LoadError::malformed(place, reason));
        }
    }
    Ok(())
}
