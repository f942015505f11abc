//! Proves that unsound GGUF files are refused: every one by a typed error that names the key or
//! tensor, never by a panic, and without believing a size before checking it. Directories of
//! transformers are in `checkpoint_files.rs`.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use slipstream_model::load::{LoadError, LoadOptions, LoadedModel, ModelSource, load};
use slipstream_tests::gguf_builder::{FFN, GgufBuilder, HIDDEN, TYPE_Q8_0, Value, texts};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;
use tempfile::NamedTempFile;

/// Files with random flips that are tried.
const NUM_FLIPPED_FILES: u64 = 3000;
/// Attempts at being fast: other processes may have the machine in one of them.
const NUM_ATTEMPTS: usize = 20;
/// Set in the child process that measures its own memory.
const ALONE: &str = "SLIPSTREAM_TEST_ALONE";

fn load_bytes(bytes: &[u8]) -> Result<LoadedModel, LoadError> {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    load(ModelSource::Path(file.path().to_owned()), &LoadOptions::default(), &mut |_| {})
}

/// Loads a spoilt tiny file and expects an error whose message holds every one of `parts`.
fn refused(label: &str, parts: &[&str], spoil: impl FnOnce(&mut GgufBuilder)) {
    let mut file = GgufBuilder::tiny();
    spoil(&mut file);
    match load_bytes(&file.build()) {
        Ok(_) => panic!("{label}: the file was accepted"),
        Err(error) => {
            let message = error.to_string();
            let absent: Vec<_> = parts.iter().filter(|part| !message.contains(**part)).collect();
            assert!(absent.is_empty(), "{label}: {absent:?} is not in \"{message}\"");
        }
    }
}

#[test]
fn the_tiny_file_itself_is_sound() {
    let model = load_bytes(&GgufBuilder::tiny().build()).unwrap();
    assert_eq!((model.config.num_layers, model.config.head_dim), (1, 16));
    assert!(model.weights.output.is_none());
    assert_eq!(model.tokenizer.vocab_size(), 12);
}

#[test]
fn unsound_containers_are_refused() {
    refused("magic", &["does not begin with `GGUF`"], |f| f.magic = *b"GGML");
    refused("version", &["GGUF version 1"], |f| f.version = 1);
    refused("big endian", &["GGUF version 50331648"], |f| f.version = 3u32.swap_bytes());
    for count in [1 << 15, 1 << 32, u64::MAX] {
        refused("tensor count", &["number of tensors"], |f| f.num_tensors = Some(count));
        refused("key count", &["number of metadata keys"], |f| f.num_keys = Some(count));
    }
    refused("one tensor more", &["GGUF header"], |f| f.num_tensors = Some(12));
    refused("one key more", &["GGUF header"], |f| f.num_keys = Some(f.keys.len() as u64 + 1));
    refused("key twice", &["llama.block_count", "twice"], |f| {
        f.keys.push(("llama.block_count".to_owned(), Value::U32(1)));
    });
    refused("key with a NUL", &["metadata key"], |f| f.keys[1].0.push('\0'));
    refused("long key", &["metadata key", "limit is 256"], |f| f.keys[1].0 = "k".repeat(300));
    let long = |len: u64| Value::Raw(8, len.to_le_bytes().to_vec());
    for len in [1 << 20, 1 << 32, u64::MAX] {
        refused("string length", &["general.name", "ends inside"], |f| {
            f.set("general.name", long(len));
        });
    }
    refused("huge string", &["general.name", "limit is 4194304"], |f| {
        f.set("general.name", Value::Text("n".repeat(5 << 20)));
    });
    refused("string of no text", &["general.name", "not UTF-8"], |f| {
        let bytes = [&2u64.to_le_bytes()[..], &[0xC3, 0x28]].concat();
        f.set("general.name", Value::Raw(8, bytes));
    });
    refused("unknown value type", &["general.name", "type 99"], |f| {
        f.set("general.name", Value::Raw(99, vec![0; 8]));
    });
    refused("truth of 2", &["general.name", "neither 0 nor 1"], |f| {
        f.set("general.name", Value::Raw(7, vec![2]));
    });
    let array =
        |code: u32, len: u64| Value::Raw(9, [&code.to_le_bytes()[..], &len.to_le_bytes()].concat());
    for len in [1 << 22, 1 << 32, 1 << 61, u64::MAX] {
        refused("array length", &["general.name"], |f| {
            f.set("general.name", array(4, len));
        });
    }
    refused("array of arrays", &["general.name", "arrays of arrays"], |f| {
        f.set("general.name", array(9, 1));
    });
}

#[test]
fn unsound_tensor_tables_are_refused() {
    const KEY: &str = "blk.0.attn_k.weight";
    refused("tensor twice", &[KEY, "twice"], |f| f.tensors.push(f.tensors[3].clone()));
    refused("dimensions", &[KEY, "5 dimensions"], |f| f.tensor_mut(KEY).dims = vec![1; 5]);
    refused("no dimensions", &[KEY, "0 dimensions"], |f| f.tensor_mut(KEY).dims.clear());
    for dims in [vec![0, 16], vec![1 << 40, 1 << 40], vec![u64::MAX, 32]] {
        refused("sizes", &[KEY], |f| f.tensor_mut(KEY).dims = dims);
    }
    refused("past the end", &[KEY, "past the end"], |f| f.tensor_mut(KEY).dims[1] = 1 << 30);
    refused("offset past the end", &[KEY, "past the end"], |f| {
        f.tensor_mut(KEY).offset = Some(1 << 40);
    });
    refused("offset overflow", &[KEY, "past the end"], |f| {
        f.tensor_mut(KEY).offset = Some(u64::MAX - 31);
    });
    refused("crooked offset", &[KEY, "multiple of 32"], |f| f.tensor_mut(KEY).offset = Some(33));
    refused("overlap", &["overlaps"], |f| f.tensor_mut(KEY).offset = Some(0));
    refused("type Q2_K", &[KEY, "Q2_K", "Q4_0"], |f| f.tensor_mut(KEY).code = 10);
    refused("type 77", &[KEY, "number 77"], |f| f.tensor_mut(KEY).code = 77);
    refused("crooked block", &[KEY, "block of 32"], |f| {
        let tensor = f.tensor_mut(KEY);
        (tensor.code, tensor.dims) = (TYPE_Q8_0, vec![16, 32]);
    });
    for alignment in [0, 1, 7, 48, 1 << 20] {
        refused("alignment", &["general.alignment"], |f| {
            f.set("general.alignment", Value::U32(alignment));
        });
    }
    refused("alignment type", &["general.alignment"], |f| {
        f.set("general.alignment", Value::F32(32.0));
    });
}

#[test]
fn tensors_that_do_not_make_the_network_are_refused() {
    refused("missing", &["blk.0.ffn_up.weight", "missing"], |f| {
        f.tensors.retain(|tensor| tensor.name != "blk.0.ffn_up.weight");
    });
    refused("extra", &["blk.0.attn_q.bias", "no part"], |f| {
        f.tensor("blk.0.attn_q.bias", &[HIDDEN]);
    });
    refused("extra layer", &["blk.1.attn_norm.weight", "no part"], |f| {
        f.tensor("blk.1.attn_norm.weight", &[HIDDEN]);
    });
    refused("transposed", &["blk.0.ffn_up.weight", "[32, 64]", "[64, 32]"], |f| {
        f.tensor_mut("blk.0.ffn_up.weight").dims.reverse();
    });
    refused("flat", &["blk.0.ffn_up.weight", "[2048]"], |f| {
        f.tensor_mut("blk.0.ffn_up.weight").dims = vec![2048];
    });
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused("not finite", &["output_norm.weight", "not a number"], |f| {
            f.tensor_mut("output_norm.weight").bytes[64..68].copy_from_slice(&number.to_le_bytes());
        });
    }
    let q8_0 = |scale: [u8; 2], quant: u8| {
        move |f: &mut GgufBuilder| {
            let tensor = f.tensor_mut("blk.0.attn_k.weight");
            let block = [&scale[..], &[quant; 32]].concat();
            (tensor.code, tensor.bytes) = (TYPE_Q8_0, block.repeat(16));
        }
    };
    refused("infinite scale", &["blk.0.attn_k", "not a number"], q8_0([0x00, 0x7C], 1));
    refused("wide divisors", &["rotary divisors"], |f| {
        f.tensor("rope_freqs.weight", &[16]);
    });
    refused("negative divisors", &["rotary divisors"], |f| {
        f.tensor("rope_freqs.weight", &[8]);
    });
}

#[test]
fn keys_that_do_not_describe_a_llama_are_refused() {
    let mut cases = vec![("general.architecture", Value::Text("qwen2".to_owned()))];
    for key in ["context_length", "embedding_length", "block_count", "feed_forward_length"] {
        for value in [Value::U32(0), Value::U32(u32::MAX), Value::F32(1.0), texts(&["1"])] {
            cases.push((Box::leak(format!("llama.{key}").into_boxed_str()), value));
        }
    }
    for eps in [0.0, -1.0, 2.0, f32::NAN] {
        cases.push(("llama.attention.layer_norm_rms_epsilon", Value::F32(eps)));
    }
    cases.extend([
        ("llama.attention.sliding_window", Value::U32(512)),
        ("llama.expert_count", Value::U32(8)),
        ("llama.attention.value_length", Value::U32(8)),
        ("llama.rope.dimension_count", Value::U32(8)),
        ("llama.rope.scaling.type", Value::Text("yarn".to_owned())),
        ("llama.vocab_size", Value::U32(13)),
        ("tokenizer.ggml.model", Value::Text("bert".to_owned())),
        ("tokenizer.ggml.pre", Value::Text("unheard-of".to_owned())),
        ("tokenizer.ggml.token_type", Value::I32s(vec![1; 3])),
        ("tokenizer.ggml.token_type", Value::I32s(vec![9; 12])),
        ("tokenizer.ggml.merges", texts(&["ab"])),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.ggml.tokens", Value::U32(12)),
    ]);
    for (key, value) in cases {
        refused(&format!("{key} {value:?}"), &[key], |f| {
            f.set(key, value);
        });
    }
    for key in ["general.architecture", "llama.block_count", "llama.context_length"] {
        refused("absent", &[key, "missing"], |f| {
            f.remove(key);
        });
    }
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        refused("absent", &[key, "missing"], |f| {
            f.remove(key);
        });
    }
    refused("heads", &["2 query heads"], |f| {
        f.set("llama.attention.head_count_kv", Value::U32(3));
    });
    refused("head width", &["head dimension 4"], |f| {
        f.set("llama.attention.head_count", Value::U32(8));
        f.remove("llama.rope.dimension_count");
    });
    refused("rotary base", &["rotary base"], |f| {
        f.set("llama.rope.freq_base", Value::F32(f32::NAN));
    });
}

#[test]
fn unsound_tokenizers_are_refused() {
    let tokens = |edit: fn(&mut Vec<String>)| {
        move |f: &mut GgufBuilder| {
            let list = f.keys.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens");
            let Some((_, Value::Texts(list))) = list else { panic!("tokens are texts") };
            edit(list);
            let kinds = vec![1; list.len()];
            f.set("tokenizer.ggml.token_type", Value::I32s(kinds));
        }
    };
    let more = |list: &mut Vec<String>| list.push("more".to_owned());
    refused("larger than the embedding", &["tokens", "13", "12 rows"], tokens(more));
    let same = |list: &mut Vec<String>| list[3] = "b".to_owned();
    refused("two alike", &["tokenizer.ggml.tokens", "`b`"], tokens(same));
    let long = |list: &mut Vec<String>| list[3] = "c".repeat(1025);
    refused("long token", &["tokenizer.ggml.tokens", "1024"], tokens(long));
    let empty = |list: &mut Vec<String>| list[3].clear();
    refused("empty token", &["token 3 is empty"], tokens(empty));
    refused("no tokens", &["tokenizer.ggml.tokens", "0 tokens"], tokens(Vec::clear));
    refused("merge of strangers", &["merge 0"], |f| {
        f.set("tokenizer.ggml.merges", texts(&["c c"]));
    });
    // What it makes is longer than any token: the tokenizers crate would index past its buffer.
    refused("merge past the buffer", &["merge 0"], |f| {
        f.set("tokenizer.ggml.merges", texts(&["<end> <end>"]));
    });
    refused("end id", &["end-of-sequence id 12"], |f| {
        f.set("tokenizer.ggml.eos_token_id", Value::U32(12));
    });
}

#[test]
fn every_truncation_is_refused() {
    let file = GgufBuilder::tiny();
    let bytes = file.build();
    let header_len = file.header_len();
    let in_data = (header_len..bytes.len()).step_by(97);
    for len in (0..header_len).chain(in_data) {
        assert!(load_bytes(&bytes[..len]).is_err(), "accepted with {len} of {} bytes", bytes.len());
    }
}

#[test]
fn random_flips_never_panic() {
    let seed = 0x5EED_F11E;
    let file = GgufBuilder::tiny();
    let (bytes, header_len) = (file.build(), file.header_len());
    timed("random flips in model files", 10.0, || {
        for case in 0..NUM_FLIPPED_FILES {
            let mut rng = Rng::new(seed).fork(case);
            let mut spoilt = bytes.clone();
            for _ in 0..rng.between(1, 4) {
                // Seven of eight flips hit the header, where the decisions are.
                let end = if rng.one_in(8) { spoilt.len() } else { header_len };
                let at = rng.below(end);
                spoilt[at] = if rng.one_in(2) { rng.bits() as u8 } else { spoilt[at] ^ 1 };
            }
            let loaded = std::panic::catch_unwind(|| drop(load_bytes(&spoilt)));
            assert!(loaded.is_ok(), "panic: seed {seed:#x}, case {case}");
        }
    });
}

/// Runs itself once more in a process of its own, whose memory nothing else changes.
#[test]
fn small_lying_files_cost_neither_time_nor_memory() {
    let name = "model_files::small_lying_files_cost_neither_time_nor_memory";
    if std::env::vars_os().all(|(key, _)| key != ALONE) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads", "1", "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        let ran = child.status.success() && output.contains("1 passed");
        assert!(ran, "{output}{}", String::from_utf8_lossy(&child.stderr));
        return;
    }
    let gguf = |tensors: u64, keys: u64, rest: &[u8]| {
        let head = [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes(), rest];
        let mut bytes = head.concat();
        bytes.resize(64, 0);
        bytes
    };
    let lying_array =
        [&1u64.to_le_bytes()[..], b"k", &9u32.to_le_bytes(), &8u32.to_le_bytes(), &[0xFF; 8]];
    let files = [
        gguf(1 << 32, 1 << 32, &[]),
        gguf(0, 1, &(1u64 << 32).to_le_bytes()),
        gguf(0, 1, &lying_array.concat()),
        gguf(1, 0, &(1u64 << 40).to_le_bytes()),
        vec![0xFF; 64],
    ];
    let _ = load_bytes(&files[0]);
    let before = peak_bytes();
    for file in &files {
        let mut attempts = (0..NUM_ATTEMPTS).map(|_| {
            let start = Instant::now();
            assert!(load_bytes(file).is_err());
            start.elapsed()
        });
        let is_fast = attempts.any(|elapsed| elapsed < Duration::from_millis(10));
        assert!(is_fast, "{NUM_ATTEMPTS} attempts took 10 ms or more each for 64 bytes");
    }
    let grown = peak_bytes() - before;
    assert!(grown < 1 << 20, "{grown} bytes of memory for 64 bytes");
}

/// The most address space this process has had.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[test]
fn files_that_are_no_files_and_budgets_are_refused() {
    let options = LoadOptions { memory_budget_bytes: 30_000, ..LoadOptions::default() };
    let refused_with = |path: &Path| {
        load(ModelSource::Path(path.to_owned()), &options, &mut |_| {}).unwrap_err().to_string()
    };
    let absent = refused_with(Path::new("no/such/model.gguf"));
    assert!(absent.contains("no/such/model.gguf"), "{absent}");
    let device = refused_with(Path::new("/dev/zero"));
    assert!(device.contains("not a regular file"), "{device}");
    let mut tiny = NamedTempFile::new().unwrap();
    tiny.write_all(&GgufBuilder::tiny().build()).unwrap();
    let load_within = |memory_budget_bytes: u64| {
        let options = LoadOptions { memory_budget_bytes, ..LoadOptions::default() };
        load(ModelSource::Path(tiny.path().to_owned()), &options, &mut |_| {})
    };
    let Err(LoadError::OverBudget { needed_bytes, .. }) = load_within(4096) else {
        panic!("4096 bytes are enough");
    };
    let error = load_within(needed_bytes - 1);
    assert!(matches!(error, Err(LoadError::OverBudget { .. })), "{error:?}");
    let model = load_within(needed_bytes).unwrap();
    // The weights, the largest matrix again, its conversion, and 64 rows of rotary tables.
    let num_bytes = model.weights.num_bytes() as u64;
    let largest = HIDDEN * FFN;
    assert_eq!(needed_bytes, num_bytes + largest * 4 + largest * 16 + 64 * 16 * 4);
}

#[test]
fn headers_longer_than_what_is_read_at_first_are_read() {
    let mut file = GgufBuilder::tiny();
    for (index, len) in [1 << 20, 3 << 20, 4 << 20, 4 << 20].into_iter().enumerate() {
        file.set(&format!("general.text{index}"), Value::Text("x".repeat(len)));
    }
    let long = load_bytes(&file.build()).unwrap();
    let short = load_bytes(&GgufBuilder::tiny().build()).unwrap();
    assert_eq!(long.digest, short.digest);
    let bytes = file.build();
    for len in [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 8 << 20, (8 << 20) + 1, 12 << 20] {
        assert!(load_bytes(&bytes[..len]).is_err(), "accepted with {len} bytes");
    }
}
