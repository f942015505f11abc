//! Proves that unsound directories of transformers are refused: configurations that would change
//! numbers, tokenizers that a later step would trip over, safetensors files that lie. Every error
//! is typed and names the key or tensor. GGUF files are in `model_files.rs`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use slipstream_model::ids::TokenId;
use slipstream_model::load::{LoadError, LoadOptions, LoadedModel, ModelSource, load};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;
use tempfile::TempDir;

/// Files with random flips that are tried, of each kind.
const NUM_FLIPPED_FILES: u64 = 400;

/// A directory to be spoilt, taken from a fixture.
struct Checkpoint {
    config: Value,
    generation: Option<Value>,
    tokenizer: Value,
    /// Header of the safetensors file.
    header: Value,
    data: Vec<u8>,
}

impl Checkpoint {
    fn sound() -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-gqa");
        let json = |name: &str| serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap();
        let weights = fs::read(dir.join("model.safetensors")).unwrap();
        let (len, rest) = weights.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
        Self {
            config: json("config.json"),
            generation: None,
            tokenizer: json("tokenizer.json"),
            header: serde_json::from_slice(header).unwrap(),
            data: data.to_vec(),
        }
    }

    fn weights(&self) -> Vec<u8> {
        weights_file(&self.header.to_string(), &self.data)
    }

    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.path().join("tokenizer.json"), self.tokenizer.to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), self.weights()).unwrap();
        if let Some(generation) = &self.generation {
            fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        dir
    }
}

fn weights_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn load_dir(dir: &TempDir) -> Result<LoadedModel, LoadError> {
    let source = ModelSource::Path(dir.path().to_owned());
    load(source, &LoadOptions::default(), &mut |_| {})
}

fn expect_refusal(label: &str, parts: &[&str], dir: &TempDir) {
    match load_dir(dir) {
        Ok(_) => panic!("{label}: the directory was accepted"),
        Err(error) => {
            let message = error.to_string();
            let absent: Vec<_> = parts.iter().filter(|part| !message.contains(**part)).collect();
            assert!(absent.is_empty(), "{label}: {absent:?} is not in \"{message}\"");
        }
    }
}

/// Spoils a sound directory and expects an error whose message holds every one of `parts`.
fn refused(label: &str, parts: &[&str], spoil: impl FnOnce(&mut Checkpoint)) {
    let mut checkpoint = Checkpoint::sound();
    spoil(&mut checkpoint);
    expect_refusal(label, parts, &checkpoint.write());
}

#[test]
fn configurations_that_would_change_numbers_are_refused() {
    let cases = [
        ("model_type", json!("mistral")),
        ("model_type", json!(null)),
        ("architectures", json!(["LlamaForSequenceClassification"])),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("sliding_window", json!(4096)),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("quantization_config", json!({"bits": 4})),
        ("logits_scaling", json!(8.0)),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e4, "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "linear", "rope_theta": 1e4})),
        ("rope_parameters", json!({"rope_type": "linear", "type": "llama3", "factor": 2.0})),
        ("rope_parameters", json!([1, 2])),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-64)),
        ("hidden_size", json!("64")),
        ("hidden_size", json!(64.5)),
        ("hidden_size", json!(null)),
        ("num_hidden_layers", json!(1025)),
        ("vocab_size", json!(1u64 << 40)),
        ("max_position_embeddings", json!(1u64 << 60)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!(true)),
        ("tie_word_embeddings", json!("yes")),
        ("eos_token_id", json!(-1)),
        ("eos_token_id", json!(["0"])),
        ("eos_token_id", json!(vec![0; 65])),
    ];
    for (key, value) in cases {
        refused(&format!("{key}: {value}"), &["config.json", key], |c| c.config[key] = value);
    }
    refused("end id", &["end-of-sequence id 320"], |c| c.config["eos_token_id"] = json!([0, 320]));
    refused("heads", &["4 query heads"], |c| c.config["num_key_value_heads"] = json!(3));
    refused("head width", &["head dimension 20"], |c| c.config["head_dim"] = json!(20));
    refused("rotary base", &["rotary base"], |c| {
        c.config["rope_parameters"]["rope_theta"] = json!(0.0);
    });
    refused("rotary order", &["llama3"], |c| {
        c.config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 1e4,
            "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32});
    });
    refused("generation", &["generation_config.json", "eos_token_id"], |c| {
        c.generation = Some(json!({"eos_token_id": "end"}));
    });
    refused("no object", &["config.json"], |c| c.config = json!([]));
}

#[test]
fn several_ends_of_sequence_are_read() {
    let mut checkpoint = Checkpoint::sound();
    checkpoint.config["eos_token_id"] = json!([3, 5]);
    let from_config = load_dir(&checkpoint.write()).unwrap();
    assert_eq!(from_config.config.eos_ids, [TokenId(3), TokenId(5)]);
    checkpoint.generation = Some(json!({"eos_token_id": [7, 0]}));
    checkpoint.config["bos_token_id"] = json!(2);
    let overridden = load_dir(&checkpoint.write()).unwrap();
    assert_eq!(overridden.tokenizer.eos_ids(), [TokenId(7), TokenId(0)]);
    assert_eq!(overridden.tokenizer.bos_id(), Some(TokenId(2)));
}

#[test]
fn unsound_tokenizers_are_refused() {
    let model = |key: &'static str, value: Value| {
        move |c: &mut Checkpoint| c.tokenizer["model"][key] = value
    };
    const PLACE: &str = "tokenizer.json";
    refused("another model", &[PLACE, "Unigram"], model("type", json!("Unigram")));
    refused("dropout", &[PLACE, "dropout"], model("dropout", json!(0.1)));
    refused("suffix", &[PLACE, "suffix"], model("end_of_word_suffix", json!("</w>")));
    refused("no vocabulary", &[PLACE, "expected a map"], model("vocab", json!(null)));
    refused("merges", &[PLACE, "merge 0"], model("merges", json!([["zz", "zz"]])));
    refused("merge text", &[PLACE, "merge 0"], model("merges", json!(["a b c"])));
    let long = "<|endoftext|>".to_owned();
    refused("long merge", &[PLACE, "merge 0"], model("merges", json!([[long, long]])));
    refused("larger than the embedding", &[PLACE, "`more`", "320 rows"], |c| {
        c.tokenizer["model"]["vocab"]["more"] = json!(320);
    });
    refused("far id", &[PLACE, "4294967295"], |c| {
        c.tokenizer["model"]["vocab"]["more"] = json!(u32::MAX);
    });
    refused("two of one id", &[PLACE, "id 5"], |c| {
        c.tokenizer["model"]["vocab"]["more"] = json!(5);
    });
    refused("clash", &[PLACE, "clashes"], |c| c.tokenizer["added_tokens"][0]["id"] = json!(1));
    refused("decoder", &[PLACE, "WordPiece"], |c| {
        c.tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    });
    refused("no decoder", &[PLACE, "decoder"], |c| c.tokenizer["decoder"] = json!(null));
    refused("template", &[PLACE, "id 999"], |c| {
        let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let special = json!({"SpecialToken": {"id": "x", "type_id": 0}});
        c.tokenizer["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [special, text("A")],
            "pair": [text("A"), text("B")],
            "special_tokens": {"x": {"id": "x", "ids": [999], "tokens": ["x"]}}});
    });
    refused("nonsense", &[PLACE], |c| c.tokenizer = json!({"model": {"type": "BPE"}}));
}

#[test]
fn a_tokenizer_never_cuts_or_pads() {
    let mut checkpoint = Checkpoint::sound();
    checkpoint.tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2,
        "strategy": "LongestFirst", "stride": 0});
    checkpoint.tokenizer["padding"] = json!({"strategy": {"Fixed": 50}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let model = load_dir(&checkpoint.write()).unwrap();
    let ids = model.tokenizer.encode("0123456789", true).unwrap();
    assert_eq!(ids.len(), 10);
}

#[test]
fn unsound_safetensors_files_are_refused() {
    const NAME: &str = "model.layers.0.mlp.up_proj.weight";
    let entry =
        |key: &'static str, value: Value| move |c: &mut Checkpoint| c.header[NAME][key] = value;
    refused("type", &[NAME, "I8"], entry("dtype", json!("I8")));
    refused("half the type", &[NAME, "F16"], entry("dtype", json!("F16")));
    refused("shape", &[NAME, "[96, 65]"], entry("shape", json!([96, 65])));
    refused("overflow", &[NAME], entry("shape", json!([1u64 << 62, 1u64 << 62])));
    refused("flat", &[NAME, "[6144]", "[96, 64]"], entry("shape", json!([6144])));
    refused("dimensions", &[NAME, "5 dimensions"], entry("shape", json!([96, 64, 1, 1, 1])));
    refused("outside", &[NAME, "outside"], entry("data_offsets", json!([0, 1u64 << 40])));
    refused("reversed", &[NAME, "outside"], entry("data_offsets", json!([8, 4])));
    refused("overlap", &["overlaps"], entry("data_offsets", json!([4, 24580])));
    refused("negative", &["header"], entry("data_offsets", json!([-4, 4])));
    refused("missing", &[NAME, "missing"], |c| {
        let tensor = c.header[NAME].take();
        c.header.as_object_mut().unwrap().remove(NAME);
        c.header["model.layers.0.mlp.up_proj.bias"] = tensor;
    });
    refused("extra", &["lm_head.weight"], |c| c.config["tie_word_embeddings"] = json!(true));
    refused("not a number", &["not a number"], |c| {
        let at = c.data.len() - 4;
        c.data[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let sound = Checkpoint::sound();
    let dir = sound.write();
    let path = dir.path().join("model.safetensors");
    let header = sound.header.to_string();
    let twice = format!("{{\"{NAME}\":{},{}", sound.header[NAME], &header[1..]);
    fs::write(&path, weights_file(&twice, &sound.data)).unwrap();
    expect_refusal("twice", &[NAME, "twice"], &dir);
    for len in [1u64 << 32, u64::MAX, (16 << 20) + 1] {
        fs::write(&path, [&len.to_le_bytes()[..], b"{}"].concat()).unwrap();
        expect_refusal("header length", &["header", "limit"], &dir);
    }
    fs::write(&path, weights_file(&"[".repeat(100_000), &[])).unwrap();
    expect_refusal("deep header", &["header"], &dir);
    let whole = sound.weights();
    for len in (0..8 + header.len()).step_by(7).chain([8 + header.len(), whole.len() - 1]) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(load_dir(&dir).is_err(), "accepted with {len} of {} bytes", whole.len());
    }
}

#[test]
fn incomplete_directories_are_refused() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let dir = Checkpoint::sound().write();
        fs::remove_file(dir.path().join(name)).unwrap();
        expect_refusal(name, &[name], &dir);
    }
    let sharded = Checkpoint::sound().write();
    let path = sharded.path();
    fs::remove_file(path.join("model.safetensors")).unwrap();
    fs::write(path.join("model.safetensors.index.json"), "{}").unwrap();
    expect_refusal("sharded", &["index.json", "several files"], &sharded);
    let long = Checkpoint::sound().write();
    fs::write(long.path().join("config.json"), " ".repeat(2 << 20)).unwrap();
    expect_refusal("long", &["config.json", "limit is 1048576"], &long);
}

#[test]
fn random_flips_never_panic() {
    let seed = 0x5EED_D1A5;
    let sound = Checkpoint::sound();
    let header_len = 8 + sound.header.to_string().len();
    timed("random flips in checkpoints", 10.0, || {
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            let dir = sound.write();
            let path = dir.path().join(name);
            let bytes = fs::read(&path).unwrap();
            for case in 0..NUM_FLIPPED_FILES {
                let mut rng = Rng::new(seed).fork(case);
                let mut spoilt = bytes.clone();
                for _ in 0..rng.between(1, 3) {
                    let at = rng.below(spoilt.len().min(header_len));
                    spoilt[at] = if rng.one_in(2) { rng.bits() as u8 } else { spoilt[at] ^ 1 };
                }
                fs::write(&path, &spoilt).unwrap();
                let loaded = std::panic::catch_unwind(|| drop(load_dir(&dir)));
                assert!(loaded.is_ok(), "panic: {name}, seed {seed:#x}, case {case}");
            }
        }
    });
}
