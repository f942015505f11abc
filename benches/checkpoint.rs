//! Owns random checkpoints in the shapes of published models, as GGUF files with a vocabulary of
//! placeholders, for figures that depend on the size of a model and not on what it says. Other
//! readers of the format load them, too. Knows no engine.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use clap::ValueEnum;
use slipstream_model::config::{LlamaConfig, RopeScaling};
use slipstream_model::ids::TokenId;
use slipstream_model::write::{MatrixFormat, Metadata, MetadataValue, NetworkFile, random_model};

/// Entries of the vocabulary, as Llama 2's has.
pub const VOCAB_SIZE: usize = 32_000;
/// Name of the token that begins and ends texts.
const END: &str = "<|endoftext|>";
/// Bytes that stand for themselves in byte-level vocabularies; the others are moved behind 255.
const PLAIN_BYTES: [std::ops::RangeInclusive<u32>; 3] = [33..=126, 161..=172, 174..=255];

/// Shapes of published models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 1.1 billion weights: 22 layers, hidden size 2048.
    #[value(name = "tinyllama")]
    TinyLlama,
    /// 68 million weights, a draft for the former: 2 layers, hidden size 768.
    #[value(name = "llama-68m")]
    Llama68M,
}

/// How matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// 8-bit integers with a half-precision scale per 32 weights.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit integers with a half-precision scale per 32 weights.
    #[value(name = "q4_0")]
    Q4_0,
}

impl Shape {
    /// The architecture.
    #[must_use]
    pub fn config(self) -> LlamaConfig {
        let sizes = |num_layers, hidden_len, ffn_len, num_heads, num_kv_heads| LlamaConfig {
            vocab_size: VOCAB_SIZE,
            hidden_len,
            ffn_len,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim: 64,
            context_len: 2048,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            rope_freq_divisors: Vec::new(),
            eos_ids: vec![TokenId(0)],
        };
        match self {
            Self::TinyLlama => sizes(22, 2048, 5632, 32, 4),
            Self::Llama68M => sizes(2, 768, 3072, 12, 12),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::TinyLlama => "random, TinyLlama's shape",
            Self::Llama68M => "random, 68 million weights",
        }
    }
}

/// A random checkpoint, not yet written. The output projection is not tied to the embedding.
#[must_use]
pub fn checkpoint(shape: Shape, format: Format) -> NetworkFile<'static> {
    let format = match format {
        Format::Q8_0 => MatrixFormat::Q8_0,
        Format::Q4_0 => MatrixFormat::Q4_0,
    };
    let mut keys = vocabulary();
    keys.push(("general.name".to_owned(), MetadataValue::String(shape.name().to_owned())));
    random_model(shape.config(), false, format, keys, 0)
}

/// Writes a checkpoint.
///
/// # Errors
/// When there is such a file already, or it cannot be written.
pub fn write(file: NetworkFile<'_>, path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let mut out = File::create_new(path).with_context(|| format!("cannot create {shown}"))?;
    let written = file.write(&mut out, &mut |_| ControlFlow::Continue(()));
    if written.is_err() {
        let _ = std::fs::remove_file(path); // what is wrong is told below
    }
    written.with_context(|| format!("cannot write {shown}; nothing is left of it"))
}

/// A byte-level vocabulary: the end token, all bytes, then words of lower-case letters in order of
/// length and alphabet, each made of the word before its last letter and that letter.
fn vocabulary() -> Metadata {
    let mut tokens = vec![END.to_owned()];
    tokens.extend(byte_letters().map(String::from));
    let mut merges = Vec::new();
    let mut last: Vec<String> = ('a'..='z').map(String::from).collect();
    while tokens.len() < VOCAB_SIZE {
        let mut words = Vec::new();
        for (start, letter) in last.iter().flat_map(|word| ('a'..='z').map(move |l| (word, l))) {
            if tokens.len() == VOCAB_SIZE {
                break;
            }
            merges.push(format!("{start} {letter}"));
            words.push(format!("{start}{letter}"));
            tokens.push(format!("{start}{letter}"));
        }
        last = words;
    }
    let kinds = (0..VOCAB_SIZE).map(|id| MetadataValue::I32(if id == 0 { 3 } else { 1 }));
    let texts = |texts: Vec<String>| {
        MetadataValue::Array(texts.into_iter().map(MetadataValue::String).collect())
    };
    let text = |text: &str| MetadataValue::String(text.to_owned());
    let keys = [
        ("model", text("gpt2")),
        ("pre", text("gpt-2")),
        ("token_type", MetadataValue::Array(kinds.collect())),
        ("tokens", texts(tokens)),
        ("merges", texts(merges)),
        ("bos_token_id", MetadataValue::U32(0)),
        ("eos_token_id", MetadataValue::U32(0)),
        ("add_bos_token", MetadataValue::Bool(false)),
    ];
    keys.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).into()
}

/// What each byte is written as in a byte-level vocabulary (GPT-2's `bytes_to_unicode`).
fn byte_letters() -> impl Iterator<Item = char> {
    let is_plain = |byte: &u32| PLAIN_BYTES.iter().any(|range| range.contains(byte));
    let mut num_moved = 0;
    (0..=255).map(move |byte| {
        let code = if is_plain(&byte) {
            byte
        } else {
            num_moved += 1;
            255 + num_moved
        };
        char::from_u32(code).expect("a code below 512 is a letter")
    })
}

#[cfg(test)]
mod tests {
    use slipstream_model::load::{LoadOptions, ModelSource, load};
    use slipstream_model::write::shape::num_weights;

    use super::{Format, Shape, VOCAB_SIZE, checkpoint, write};

    #[test]
    fn shapes_have_the_sizes_they_are_named_after() {
        assert_eq!(num_weights(&Shape::TinyLlama.config(), false), 1_100_048_384);
        assert_eq!(num_weights(&Shape::Llama68M.config(), false), 68_030_208);
        let sizes = [Format::Q8_0, Format::Q4_0].map(|format| {
            let file = checkpoint(Shape::Llama68M, format);
            file.num_bytes() as f64 / file.num_weights() as f64
        });
        assert!((sizes[0] - 34.0 / 32.0).abs() < 0.03, "{sizes:?}");
        assert!((sizes[1] - 18.0 / 32.0).abs() < 0.03, "{sizes:?}");
    }

    #[test]
    fn a_checkpoint_is_loaded_with_its_vocabulary() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("draft.gguf");
        write(checkpoint(Shape::Llama68M, Format::Q8_0), &path).expect("it is written");
        let again = write(checkpoint(Shape::Llama68M, Format::Q8_0), &path);
        assert!(again.unwrap_err().to_string().contains("cannot create"));
        let model = load(ModelSource::Path(path), &LoadOptions::default(), &mut |_| {});
        let model = model.expect("it loads");
        assert_eq!(model.config, Shape::Llama68M.config());
        assert_eq!(model.tokenizer.vocab_size(), VOCAB_SIZE);
        let text = "fn main() {\n\tlet ü = \"abcd\"; }";
        let ids = model.tokenizer.encode(text, true).expect("every byte has a token");
        assert!(ids.len() < text.len(), "words are merged");
        let bytes = model.tokenizer.token_bytes();
        let back: Vec<u8> = ids.iter().flat_map(|id| bytes.get(*id).to_vec()).collect();
        assert_eq!(back, text.as_bytes());
    }
}
