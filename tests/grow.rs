//! Proves that growing changes nothing but the cost: a model that grew in every direction has the
//! bits of its source, in logits and over the wire, with speculation and without; `slipstream grow`
//! writes such files whole or not at all, and says what it cannot do. And that networks of random
//! numbers can be read back.

use std::fs;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::config::RopeScaling;
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{
    LoadOptions, LoadedModel, ModelSource, WeightFormat, load, tokenizer_keys,
};
use slipstream_model::packed::PackedLlama;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_model::write::grow::grown;
use slipstream_model::write::shape::{GrowError, Growth};
use slipstream_model::write::{MatrixFormat, Metadata, NetworkFile, random_model};
use slipstream_proto::v1;
use slipstream_proto::v1::speculation::Mode;
use slipstream_tests::client::{block_on, client, greedy, sampled, speculation, start, stream};
use slipstream_tests::micro_pair;
use slipstream_tests::timing::timed;

use crate::program::{printed, run, slipstream};

const TEXT: &str = "impl fmt::Display for Error {\n    fn fmt(&self, f: &mut Formatter) -> Result";
const PROMPTS: [&str; 3] = ["fn main() {\n    let mut ", "use std::", "/// Returns the number of "];
/// Growth of the micro pair's verifier in every direction: its heads come to lie between others.
const EVERYWHERE: Growth = Growth {
    hidden_factor: 4,
    num_layers: Some(6),
    ffn_len: Some(512),
    num_heads: Some(9),
    num_kv_heads: Some(3),
};

fn source() -> ModelSource {
    ModelSource::Path(PathBuf::from(micro_pair::VERIFIER))
}

/// Everything of the source's file but its architecture.
fn keys() -> Metadata {
    tokenizer_keys(&source(), &loaded(source()).tokenizer).unwrap()
}

fn loaded(source: ModelSource) -> LoadedModel {
    let options = LoadOptions { format: Some(WeightFormat::Q8_0), ..LoadOptions::default() };
    load(source, &options, &mut |_| {}).expect("the model loads")
}

fn write(file: NetworkFile<'_>, path: &Path) {
    let num_bytes = file.num_bytes();
    let mut out = fs::File::create(path).unwrap();
    file.write(&mut out, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(out.metadata().unwrap().len(), num_bytes, "the size is known before");
}

/// Writes the micro pair's verifier, grown.
fn grow(growth: &Growth, path: &Path) {
    write(grown(&loaded(source()), growth, keys(), 1).unwrap(), path);
}

/// Logits of every token of a text, as bits.
fn logits(model: LoadedModel) -> Vec<u32> {
    let tokens = model.tokenizer.encode(TEXT, true).unwrap();
    let table: Vec<BlockId> = (0..tokens.len().div_ceil(BLOCK_LEN) as u32).map(BlockId).collect();
    let packed = Arc::new(PackedLlama::pack(model.config, model.weights).unwrap());
    let options = TransformerOptions {
        num_blocks: table.len(),
        threads: 1,
        isa: Isa::detect(),
        kv_type: KvType::F32,
    };
    let mut network = Transformer::new(packed, options).unwrap();
    let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
    let (tokens, block_table) = (&tokens[..], &table[..]);
    batch.push(SegmentInput { tokens, start: 0, block_table, logits_from: 0, owner: 1, scope: 0 });
    network.forward(&batch, &mut logits).unwrap();
    (0..logits.num_rows()).flat_map(|row| logits.row(row)).map(|logit| logit.to_bits()).collect()
}

#[test]
fn growing_in_any_direction_keeps_every_bit_of_the_logits() {
    timed("grow: logits", 5.0, || {
        let folder = tempfile::tempdir().unwrap();
        let expected = logits(loaded(source()));
        let none = Growth::NONE;
        let growths = [
            none,
            Growth { hidden_factor: 4, ..none },
            Growth { hidden_factor: 16, ..none },
            Growth { num_layers: Some(7), ..none },
            Growth { ffn_len: Some(480), ..none },
            // More groups of heads, larger groups, both.
            Growth { num_heads: Some(8), num_kv_heads: Some(4), ..none },
            Growth { num_heads: Some(10), ..none },
            Growth { num_heads: Some(15), num_kv_heads: Some(5), ..none },
            EVERYWHERE,
        ];
        for (index, growth) in growths.iter().enumerate() {
            let path = folder.path().join(format!("{index}.gguf"));
            grow(growth, &path);
            let model = loaded(ModelSource::Path(path));
            assert_eq!(model.config, growth.apply(&loaded(source()).config).unwrap());
            assert_eq!(model.tokenizer.fingerprint(), loaded(source()).tokenizer.fingerprint());
            assert!(logits(model) == expected, "{growth:?} changed a bit");
        }
        // Not grown at all, the file holds the very same model.
        let same = loaded(ModelSource::Path(folder.path().join("0.gguf")));
        assert_eq!(same.digest, loaded(source()).digest);
    });
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let keys = keys();
    let model = loaded(source());
    let bytes = |seed: u64, name: &str| {
        let path = folder.path().join(name);
        write(grown(&model, &EVERYWHERE, keys.clone(), seed).unwrap(), &path);
        fs::read(path).unwrap()
    };
    let first = bytes(1, "a");
    assert!(first == bytes(1, "b"));
    assert!(first != bytes(2, "c"), "what is new is random");
}

#[test]
fn completions_of_a_grown_verifier_are_those_of_its_source() {
    timed("grow: completions", 10.0, || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grown.gguf");
        grow(&EVERYWHERE, &path);
        let asked = || PROMPTS.iter().flat_map(|p| [greedy(p, 40), sampled(p, 40, 7)]);
        block_on(async {
            let small = start(|_| ()).await;
            let large = start(|flags| flags.model = path.to_str().map(str::to_owned)).await;
            let mut num_accepted = 0;
            for request in asked() {
                let with = |mode, draft_len| {
                    let speculation = speculation(mode, draft_len);
                    v1::GenerateRequest { speculation, ..request.clone() }
                };
                let plain = with(Mode::Off, None);
                let expected = stream(&client(&small), plain.clone()).await.unwrap();
                for asked in [plain, with(Mode::Fixed, Some(1)), with(Mode::Fixed, Some(4))] {
                    let answer = stream(&client(&large), asked.clone()).await.unwrap();
                    assert_eq!(answer.bytes(), expected.bytes(), "{asked:?}");
                    num_accepted += answer.speculation().accepted;
                }
            }
            assert!(num_accepted > 100, "the draft knows the grown verifier: {num_accepted}");
            small.stop().await.unwrap();
            large.stop().await.unwrap();
        });
    });
}

#[test]
fn only_q8_0_is_grown() {
    let options = LoadOptions { format: Some(WeightFormat::F32), ..LoadOptions::default() };
    let model = load(source(), &options, &mut |_| {}).unwrap();
    let refused = grown(&model, &EVERYWHERE, Vec::new(), 1).err();
    assert_eq!(refused, Some(GrowError::Format("token_embd.weight".to_owned())));
}

/// Takes so many bytes and no more.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.checked_sub(bytes.len()) {
            Some(left) => self.0 = left,
            None => return Err(io::ErrorKind::StorageFull.into()),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn writing_ends_when_it_must() {
    let model = loaded(source());
    let file = || grown(&model, &EVERYWHERE, Vec::new(), 1).unwrap();
    let full = file().write(&mut Full(3 << 20), &mut |_| ControlFlow::Continue(()));
    assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
    let mut reported = Vec::new();
    let stopped = file().write(&mut io::sink(), &mut |bytes| {
        reported.push(bytes);
        if reported.len() < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    assert_eq!(stopped.unwrap_err().kind(), io::ErrorKind::Interrupted);
    assert!(reported.is_sorted() && reported.len() == 3, "{reported:?}");
}

#[test]
fn rotary_scaling_and_untied_outputs_go_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = loaded(source());
    model.config.rope_scaling = RopeScaling::Linear { factor: 2.0 };
    model.weights.output = Some(model.weights.embedding.clone());
    let keys = keys();
    let path = folder.path().join("linear.gguf");
    write(grown(&model, &EVERYWHERE, keys.clone(), 1).unwrap(), &path);
    let linear = loaded(ModelSource::Path(path));
    assert_eq!(linear.config.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    assert!(linear.weights.output.is_some());
    assert!(logits(linear) == logits(model));
    let mut model = loaded(source());
    model.config.rope_scaling = RopeScaling::Divisors;
    let divisors = (0..model.config.head_dim / 2).map(|pair| 1.0 + pair as f32 / 4.0);
    model.config.rope_freq_divisors = divisors.collect();
    let path = folder.path().join("divisors.gguf");
    write(grown(&model, &EVERYWHERE, keys.clone(), 1).unwrap(), &path);
    assert!(logits(loaded(ModelSource::Path(path))) == logits(model));
    // The format has no keys for Llama 3's scaling; its divisors say the same, rounded.
    let mut model = loaded(source());
    model.config.rope_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_len: 64,
    };
    let path = folder.path().join("llama3.gguf");
    write(grown(&model, &EVERYWHERE, keys, 1).unwrap(), &path);
    let rounded = logits(loaded(ModelSource::Path(path)));
    let float = |bits: &u32| f32::from_bits(*bits);
    let pairs = rounded.iter().zip(logits(model));
    let largest = pairs.map(|(a, b)| (float(a) - float(&b)).abs()).fold(0.0, f32::max);
    assert!(largest < 0.2, "logits differ by {largest}");
}

#[test]
fn directories_grow_with_their_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama-gqa");
    let path = folder.path().join("grown.gguf");
    let args = ["grow", "--model", dir.to_str().unwrap(), "--hidden-factor", "4"];
    printed(&[&args[..], &["--layers", "3", "--out", path.to_str().unwrap()]].concat());
    let (small, large) = (loaded(ModelSource::Path(dir.clone())), loaded(ModelSource::Path(path)));
    assert_eq!(large.tokenizer.fingerprint(), small.tokenizer.fingerprint());
    assert_eq!(large.config.eos_ids, small.config.eos_ids);
    let tokens = |model: &LoadedModel| model.tokenizer.encode(TEXT, true).unwrap();
    assert_eq!(tokens(&large), tokens(&small));
    assert!(logits(large) == logits(small));
    // The micro pair's tokenizer comes in both forms.
    for name in ["config.json", "model.safetensors"] {
        fs::copy(dir.join(name), folder.path().join(name)).unwrap();
    }
    let json = Path::new(micro_pair::VERIFIER).with_file_name("tokenizer.json");
    let text = fs::read_to_string(json).unwrap();
    let other = folder.path().join("tokenizer.json");
    let keys_of = |text: &str| {
        fs::write(&other, text).unwrap();
        let source = ModelSource::Path(folder.path().to_owned());
        tokenizer_keys(&source, &loaded(self::source()).tokenizer)
    };
    let made = keys_of(&text).unwrap();
    for (key, value) in keys().iter().filter(|(key, _)| !key.ends_with("add_space_prefix")) {
        let found = made.iter().find(|(name, _)| name == key).map(|(_, value)| value);
        if key != "general.license" {
            assert_eq!(format!("{found:?}"), format!("{:?}", Some(value)), "{key}");
        }
    }
    let splits = |other: &str| text.replacen("\"use_regex\":", other, 1);
    assert!(text.contains("\"use_regex\":"), "the test changes what it thinks");
    let refused = keys_of(&splits("\"add_prefix_space\": true, \"use_regex\":")).unwrap_err();
    assert!(refused.to_string().contains("pre-tokeniser"), "{refused}");
}

#[test]
fn random_networks_are_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let keys = keys();
    for is_tied in [true, false] {
        let config = loaded(source()).config;
        let file = random_model(config.clone(), is_tied, MatrixFormat::Q8_0, keys.clone(), 5);
        let num_weights = file.num_weights();
        let path = folder.path().join(format!("{is_tied}.gguf"));
        write(file, &path);
        let model = loaded(ModelSource::Path(path));
        assert_eq!((&model.config, model.weights.output.is_none()), (&config, is_tied));
        assert_eq!(model.weights.num_weights() as u64, num_weights);
        let logits = logits(model);
        let logits: Vec<f32> = logits.into_iter().map(f32::from_bits).collect();
        let square = logits.iter().map(|logit| logit * logit).sum::<f32>() / logits.len() as f32;
        assert!((0.3..3.0).contains(&square.sqrt()), "logits are {} large", square.sqrt());
    }
}

#[test]
fn the_command_writes_a_file_that_its_check_accepts() {
    timed("grow: command", 10.0, || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grown.gguf");
        let out = path.to_str().unwrap();
        let model = ["--model", micro_pair::VERIFIER];
        let text = printed(&[&["grow", "--out", out, "--params", "14m"], &model[..]].concat());
        assert!(text.contains("hidden 128 -> 512"), "{text}");
        let check = ["grow", "--check", out, "--tokens", "700"];
        let text = printed(&[&check, &model[..]].concat());
        assert!(text.contains("PASS") && text.contains("bits of logits:  100.000 %"), "{text}");
        // Compared with what it was not grown from, it fails.
        let other = folder.path().join("other.gguf");
        let mut config = loaded(source()).config;
        config.num_layers = 1;
        write(random_model(config, true, MatrixFormat::Q8_0, keys(), 5), &other);
        let output = run(&["grow", "--check", out, "--model", other.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("same next token"), "{errors}");
    });
}

#[test]
fn what_cannot_be_grown_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("grown.gguf");
    let out = path.to_str().unwrap();
    let huge = ["--hidden-factor", "16", "--layers", "1000", "--ffn", "524288"];
    let cases: [(&[&str], i32, &str); 9] = [
        (&["--hidden-factor", "8"], 1, "by 1, 4 or 16"),
        (&["--layers", "2"], 1, "layers cannot shrink from 4 to 2"),
        (&["--ffn", "417"], 1, "multiple of 32"),
        (&["--heads", "5"], 1, "no whole groups"),
        (&["--params", "1k"], 1, "no network"),
        (&["--params", "many"], 2, "1.1b"),
        (&huge, 1, "has room for"),
        (&["--model", "no/such/model"], 1, "no/such/model"),
        (&["--check", "x"], 2, "--check"),
    ];
    for (args, code, message) in cases {
        let model: &[&str] =
            if args.contains(&"--model") { &[] } else { &["--model", micro_pair::VERIFIER] };
        let output = run(&[&["grow", "--out", out], model, args].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.contains(message), "{args:?}: {errors}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{args:?} left something");
    }
    fs::write(&path, "mine").unwrap();
    let output = run(&["grow", "--out", out, "--model", micro_pair::VERIFIER]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && errors.contains("exists already"), "{errors}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    let output = run(&["grow", "--out", "no/such/folder/x", "--model", micro_pair::VERIFIER]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && errors.contains("no/such/folder"), "{errors}");
}

#[test]
fn ctrl_c_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("grown.gguf");
    let out = path.to_str().unwrap();
    // Large enough not to be done before it is interrupted.
    let args = ["grow", "--out", out, "--params", "1b", "--model", micro_pair::VERIFIER];
    let child = slipstream(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while fs::read_dir(folder.path()).unwrap().count() == 0 {
        std::thread::yield_now();
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
