//! Proves that text and bytes survive tokenising: what the ids' bytes join to is the text, on Rust
//! sources and on random characters; that tokenizers out of GGUF metadata give the ids that the
//! original `tokenizer.json` gives; and that SentencePiece vocabularies merge by score.

use std::fs;
use std::path::{Path, PathBuf};

use slipstream_model::ids::TokenId;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, load};
use slipstream_tests::gguf_builder::{GgufBuilder, VOCAB, Value, texts};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

/// Pairs in this repository, one for each way of splitting that matters here: GPT-2's and Qwen 2's.
const PAIRS: [&str; 2] = ["models/micro", "models/rust"];

/// What splitting rules could disagree about: contractions, digits of several scripts,
/// indentation, line ends of every kind, odd spaces, characters of several parts, half a special
/// token.
const ODD_TEXTS: [&str; 9] = [
    "I'LL say it's DON'T, we've, I'm, you'd, they're, 'tis, x'S",
    "0x1F_600 1234567890 1e-9 v0.12.345 ١٢٣ ½ ⅷ a1b22c333",
    "fn f() {\r\n\tlet x = 1;\r\n\r\n        x\r\n}\r\n",
    "\t\tif a {\n            b();   \n\n\n    } \n  ",
    "a\r\rb\n\rc \r\n d\u{85}e\u{2028}f\u{b}g\u{c}",
    "a\u{a0}b\u{3000}c\u{200b}d  \u{a0} e",
    "e\u{301} \u{e9} Ω Ω ﬁ が か\u{3099} नमस्ते 漢字 👩\u{200d}👩\u{200d}👧 🇩🇪",
    "::<Vec<_>>()?; // -->\n//! ```rust\n#![allow(x)]\n...\n",
    "<|endoftext|\n <||> < |endoftext|>",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn load_path(path: &Path) -> LoadedModel {
    load(ModelSource::Path(path.to_owned()), &LoadOptions::default(), &mut |_| {}).unwrap()
}

fn load_built(file: &GgufBuilder) -> LoadedModel {
    let bytes = Box::leak(file.build().into_boxed_slice());
    load(ModelSource::GgufBytes(bytes), &LoadOptions::default(), &mut |_| {}).unwrap()
}

/// The sources of the model crate.
fn rust_texts() -> Vec<String> {
    let mut paths: Vec<PathBuf> = fs::read_dir(root().join("model/src"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    paths.sort();
    paths.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// Random bytes read as text, and random characters of all planes.
fn random_text(rng: &mut Rng) -> String {
    let len = rng.between(0, 60);
    if rng.one_in(2) {
        let bytes: Vec<u8> = (0..len).map(|_| rng.bits() as u8).collect();
        return String::from_utf8_lossy(&bytes).into_owned();
    }
    let ranges = [0x80, 0x80, 0x800, 0x3000, 0x1_0000, 0x11_0000];
    let code = |rng: &mut Rng| {
        let end = *rng.pick(&ranges);
        rng.below(end) as u32
    };
    (0..len).filter_map(|_| char::from_u32(code(rng))).collect()
}

#[test]
fn bytes_of_ids_join_to_the_text() {
    timed("tokenizer round trips", 10.0, || PAIRS.into_iter().for_each(check_round_trips));
}

/// A pair's files and its `tokenizer.json` give the same ids, and ids give the text.
fn check_round_trips(pair: &str) {
    let model = load_path(&root().join(pair).join("verifier.gguf"));
    let original = tokenizers::Tokenizer::from_file(root().join(pair).join("tokenizer.json"));
    let original = original.unwrap();
    let table = model.tokenizer.token_bytes();
    let seed = 0x70_6B_E2;
    let mut rng = Rng::new(seed);
    let random = (0..2000).map(|_| random_text(&mut rng));
    let crlf = rust_texts().into_iter().map(|text| text.replace('\n', "\r\n"));
    let odd = ODD_TEXTS.map(str::to_owned);
    let texts = rust_texts().into_iter().chain(crlf).chain(odd).chain(random);
    for (index, text) in texts.enumerate() {
        let ids = model.tokenizer.encode(&text, true).unwrap();
        let at = format!("{pair}, text {index}, seed {seed:#x}: {text:?}");
        assert_eq!(table.join(&ids), text.as_bytes(), "{at}");
        let plain: Vec<u32> = ids.iter().map(|id| id.0).collect();
        assert_eq!(original.encode(text.as_str(), true).unwrap().get_ids(), plain, "{at}");
        assert_eq!(original.decode(&plain, false).unwrap(), text, "{at}");
    }
}

#[test]
fn a_pair_shares_one_vocabulary() {
    PAIRS.into_iter().for_each(check_vocabulary);
}

fn check_vocabulary(pair: &str) {
    let verifier = load_path(&root().join(pair).join("verifier.gguf"));
    let draft = load_path(&root().join(pair).join("draft.gguf"));
    assert_eq!(verifier.tokenizer.fingerprint(), draft.tokenizer.fingerprint());
    assert_eq!(verifier.tokenizer.vocab_size(), verifier.config.vocab_size);
    assert_ne!(verifier.digest, draft.digest);
    let other = load_path(&root().join("tests/fixtures/llama-gqa"));
    assert_ne!(verifier.tokenizer.fingerprint(), other.tokenizer.fingerprint());
    let end = verifier.config.eos_ids[0];
    assert!(verifier.tokenizer.is_special(end));
    assert_eq!(verifier.tokenizer.token_bytes().get(end), b"");
    assert_eq!(verifier.tokenizer.encode("a<|endoftext|>", false).unwrap()[1], end);
    assert!(!verifier.tokenizer.is_special(TokenId(u32::MAX)));
}

#[test]
fn padding_does_not_change_the_fingerprint() {
    let plain = load_built(&GgufBuilder::tiny());
    // Padded embedding; then padding named in the vocabulary as well, marked as unused.
    let mut padded = GgufBuilder::tiny();
    let embedding = padded.tensor_mut("token_embd.weight");
    embedding.dims[1] = VOCAB + 4;
    let longer = embedding.bytes.repeat(2)[..embedding.bytes.len() / 12 * 16].to_vec();
    embedding.bytes = longer;
    let once = load_built(&padded);
    let tokens = ["<end>", "a", "b", "c", "Ġ", "Ċ", "ab", "Ġa", "1", "2", "!", "Ã", "[PAD12]"];
    padded.set("tokenizer.ggml.tokens", texts(&tokens));
    padded.set("tokenizer.ggml.token_type", Value::I32s([vec![3], vec![1; 11], vec![5]].concat()));
    let twice = load_built(&padded);
    for model in [&once, &twice] {
        assert_eq!(model.config.vocab_size, 16);
        assert_eq!(model.tokenizer.vocab_size(), 12);
        assert_eq!(model.tokenizer.fingerprint(), plain.tokenizer.fingerprint());
        assert_eq!(model.tokenizer.token_bytes().get(TokenId(14)), b"");
    }
}

#[test]
fn named_splittings_split_as_named() {
    // With merges for every pair of digits, runs of digits show where a splitting cuts.
    let ids = |pre: &str, text: &str| {
        let mut file = GgufBuilder::tiny();
        let tokens = ["<end>", "1", "11", "111", "1111", "a", "Ġ", "Ġ1", "!", "!!", "Ċ", "ĊĊ"];
        file.set("tokenizer.ggml.tokens", texts(&tokens));
        let merges = ["1 1", "11 1", "11 11", "Ġ 1", "! !", "Ċ Ċ"];
        file.set("tokenizer.ggml.merges", texts(&merges));
        file.set("tokenizer.ggml.pre", Value::Text(pre.to_owned()));
        let model = load_built(&file);
        let ids = model.tokenizer.encode(text, false).unwrap();
        assert_eq!(model.tokenizer.token_bytes().join(&ids), text.as_bytes());
        ids.iter().map(|id| tokens[id.index()]).collect::<Vec<_>>().join("|")
    };
    assert_eq!(ids("gpt-2", "a1111 1"), "a|1111|Ġ1");
    assert_eq!(ids("smollm", "a1111 1"), "a|1|1|1|1|Ġ|1");
    assert_eq!(ids("llama-bpe", "a1111 1"), "a|111|1|Ġ|1");
    assert_eq!(ids("default", "a1111 1"), "a|111|1|Ġ|1");
    assert_eq!(ids("llama-bpe", "!!\n\na"), "!!|ĊĊ|a");
    assert_eq!(ids("gpt-2", "\n\na"), "Ċ|Ċ|a");
    assert_eq!(ids("qwen2", "a1111 1"), "a|1|1|1|1|Ġ|1");
    assert_eq!(ids("qwen2", "!!\n\na"), "!!|ĊĊ|a");
    assert_eq!(ids("qwen2", "\n\na"), "ĊĊ|a");
}

/// A tiny file with a SentencePiece vocabulary of twelve pieces.
fn sentence_piece_file() -> GgufBuilder {
    let mut file = GgufBuilder::tiny();
    let tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "c", "ab", "bc", "▁a", "<x>"];
    // `bc` is worth more than `ab`: "abc" is a|bc although `ab` comes first in the text.
    let scores = [0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -4.0, 0.0];
    file.set("tokenizer.ggml.model", Value::Text("llama".to_owned()));
    file.set("tokenizer.ggml.tokens", texts(&tokens));
    file.set("tokenizer.ggml.scores", Value::F32s(scores.to_vec()));
    file.set("tokenizer.ggml.token_type", Value::I32s(vec![2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 4]));
    file.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    file.remove("tokenizer.ggml.pre").remove("tokenizer.ggml.merges");
    file
}

#[test]
fn sentence_piece_vocabularies_merge_by_score() {
    let model = load_built(&sentence_piece_file());
    let ids = |text: &str, add_special| -> Vec<u32> {
        model.tokenizer.encode(text, add_special).unwrap().iter().map(|id| id.0).collect()
    };
    assert_eq!(ids("abc", false), [10, 9]);
    assert_eq!(ids("babc", true), [1, 4, 6, 5, 9]);
    assert_eq!(ids("a\nab", false), [10, 3, 8]);
    assert_eq!(ids("a</s>", false), [10, 2]);
    let table = model.tokenizer.token_bytes();
    let join = |text: &str| table.join(&model.tokenizer.encode(text, true).unwrap());
    // The piece that opens a text carries the space that SentencePiece puts before it.
    assert_eq!(join("ab\nc b"), b" ab\nc b");
    assert_eq!(table.get(TokenId(11)), b"<x>");
    assert_eq!(table.get(TokenId(0)), b"");
    let mut plain = sentence_piece_file();
    plain.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    plain.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    let plain = load_built(&plain);
    assert_eq!(plain.tokenizer.encode("abc", true).unwrap(), [TokenId(5), TokenId(9)]);
}

#[test]
fn unsound_sentence_piece_vocabularies_are_refused() {
    let refused = |part: &str, spoil: fn(&mut GgufBuilder)| {
        let mut file = sentence_piece_file();
        spoil(&mut file);
        let bytes = Box::leak(file.build().into_boxed_slice());
        let error = load(ModelSource::GgufBytes(bytes), &LoadOptions::default(), &mut |_| {});
        let message = error.unwrap_err().to_string();
        assert!(message.contains(part), "{part} is not in \"{message}\"");
    };
    refused("tokenizer.ggml.scores", |f| {
        f.remove("tokenizer.ggml.scores");
    });
    refused("tokenizer.ggml.scores", |f| {
        f.set("tokenizer.ggml.scores", Value::F32s(vec![f32::NAN; 12]));
    });
    refused("tokenizer.ggml.scores", |f| {
        f.set("tokenizer.ggml.scores", Value::F32s(vec![0.0; 11]));
    });
    refused("unknown", |f| {
        f.set("tokenizer.ggml.token_type", Value::I32s(vec![1; 12]));
    });
    refused("remove_extra_whitespaces", |f| {
        f.set("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(true));
    });
}

#[test]
fn hostile_text_costs_no_more_than_its_length() {
    PAIRS.into_iter().for_each(check_hostile_text);
}

fn check_hostile_text(pair: &str) {
    let model = load_path(&root().join(pair).join("verifier.gguf"));
    let table = model.tokenizer.token_bytes();
    let units = [" ", "\n", "a", "1", "!", "'", "e\u{301}", "\u{200d}", "\0", "🦀", " a", "\r\n "];
    timed(&format!("hostile text, {pair}"), 5.0, || {
        for unit in units {
            let text = unit.repeat((1 << 18) / unit.len());
            let ids = model.tokenizer.encode(&text, true).unwrap();
            assert_eq!(table.join(&ids), text.as_bytes(), "{pair}: {unit:?}");
        }
    });
}
