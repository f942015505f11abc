//! Proves that files are read right and that the networks compute what they say: logits of tiny
//! random Llama checkpoints, and of the pairs in this repository, against those that `transformers`
//! computed in float32 on the same weights (scripts in `training/` wrote them). Tied and untied,
//! grouped queries, rotary scalings, f32, f16, bf16 and Q8_0, both spellings of `config.json`, both
//! file formats.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::config::RopeScaling;
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{
    LoadOptions, LoadStage, LoadedModel, ModelSource, WeightFormat, dequantize_q8_0, load, widen,
};
use slipstream_model::packed::PackedLlama;
use slipstream_model::reference::ReferenceModel;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_model::weights::{Matrix, MatrixData};
use slipstream_tests::gguf_builder::{GgufBuilder, Value};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::report;
use tempfile::TempDir;

/// Most that logits may differ, relative to the largest logit, on 32-bit weights.
const F32_TOLERANCE: f64 = 1e-4;

/// The same for the fast network on Q8_0 weights. It rounds activations to 8 bits too, each by up
/// to 1/254 of the largest in its block; the random checkpoints, whose attention is peaked, amplify
/// that far more than trained ones do (3.6e-2 and 1.2e-2 were measured).
const Q8_0_TOLERANCE: f64 = 6e-2;

/// The same on 32-bit weights with keys and values in half precision, 2^-11 of each at most.
const HALF_KV_TOLERANCE: f64 = 1e-2;

/// Tokens of the long sequences. Attention splits at 256 positions, so that they need three parts.
const LONG_LEN: usize = 600;

/// A vocabulary of one token, for checkpoints that come without a tokenizer.
const ONE_TOKEN: &str = r#"{"version":"1.0","added_tokens":[],"normalizer":null,
    "pre_tokenizer":null,"post_processor":null,
    "decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
    "model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn load_path(path: &Path, format: Option<WeightFormat>) -> LoadedModel {
    let options = LoadOptions { format, ..LoadOptions::default() };
    load(ModelSource::Path(path.to_owned()), &options, &mut |_| {})
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A fixture as a directory of its own, described by `config` and with a tokenizer.
fn directory(name: &str, config: &str) -> TempDir {
    let from = fixture(name);
    let dir = tempfile::tempdir().unwrap();
    fs::copy(from.join(config), dir.path().join("config.json")).unwrap();
    fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let tokenizer = fs::read_to_string(from.join("tokenizer.json")).unwrap_or(ONE_TOKEN.to_owned());
    fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    dir
}

struct Golden {
    tokens: Vec<TokenId>,
    /// Positions whose logits there are.
    rows: Vec<usize>,
    /// `[rows, vocab]`.
    logits: Vec<f32>,
}

impl Golden {
    /// With the logits of all positions.
    fn whole(tokens: Vec<TokenId>, logits: Vec<f32>) -> Self {
        Self { rows: (0..tokens.len()).collect(), tokens, logits }
    }

    /// How far the logits of all positions are from these.
    fn distance(&self, computed: &[f32]) -> f64 {
        let vocab_size = computed.len() / self.tokens.len();
        let rows: Vec<&[f32]> = computed.chunks(vocab_size).collect();
        let picked: Vec<f32> = self.rows.iter().flat_map(|row| rows[*row]).copied().collect();
        distance(&picked, &self.logits)
    }
}

fn golden(name: &str, file: &str) -> Golden {
    golden_file(&fixture(name).join(file), "logits")
}

/// A golden whose logits have this name in the file: of the rows at `positions`, or of all.
fn golden_file(path: &Path, logits: &str) -> Golden {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let whole_numbers = |name: &str| -> Option<Vec<u32>> {
        let tensor = tensors.tensor(name).ok()?;
        let numbers = tensor.data().as_chunks().0.iter().map(|x| i64::from_le_bytes(*x));
        Some(numbers.map(|x| u32::try_from(x).unwrap()).collect())
    };
    let tokens: Vec<TokenId> =
        whole_numbers("input_ids").unwrap().into_iter().map(TokenId).collect();
    let logits = tensors.tensor(logits).unwrap();
    let logits = logits.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    match whole_numbers("positions") {
        Some(rows) => Golden { tokens, rows: rows.iter().map(|r| *r as usize).collect(), logits },
        None => Golden::whole(tokens, logits),
    }
}

/// max |a - b| / max |b|.
fn distance(computed: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(computed.len(), wanted.len());
    let largest = wanted.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let difference = computed.iter().zip(wanted).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(computed.iter().all(|x| x.is_finite()) && largest > 0.0);
    f64::from(difference) / f64::from(largest)
}

fn check(label: &str, model: &LoadedModel, golden: &Golden) {
    let reference = ReferenceModel::new(&model.config, &model.weights).unwrap();
    let found = golden.distance(&reference.logits(&golden.tokens).unwrap());
    assert!(found < F32_TOLERANCE, "{label}: reference is off by {found:.2e}");
    check_transformer(label, model, golden);
}

fn check_transformer(label: &str, model: &LoadedModel, golden: &Golden) {
    check_rounded(label, model, golden, 0.0);
}

/// The same where the golden is of other weights, which were rounded to those of the model: that
/// alone puts its logits `rounding` away.
fn check_rounded(label: &str, model: &LoadedModel, golden: &Golden, rounding: f64) {
    let tolerance = match model.weights.embedding.data {
        MatrixData::F32(_) | MatrixData::F16(_) | MatrixData::Bf16(_) => F32_TOLERANCE,
        MatrixData::Q8_0 { .. } | MatrixData::Q4_0 { .. } => Q8_0_TOLERANCE,
    };
    for isa in Isa::available() {
        let found = golden.distance(&transformer_logits(model, isa, &golden.tokens));
        assert!(
            found < rounding + tolerance,
            "{label}: {} network is off by {found:.2e}, by {rounding:.2e} because of its weights",
            isa.name()
        );
    }
}

/// Logits of the fast network after every token, `[tokens, vocab]`.
fn transformer_logits(model: &LoadedModel, isa: Isa, tokens: &[TokenId]) -> Vec<f32> {
    let num_blocks = tokens.len().div_ceil(BLOCK_LEN);
    let packed = PackedLlama::pack(model.config.clone(), model.weights.clone()).unwrap();
    let options = TransformerOptions { num_blocks, threads: 1, isa, kv_type: model.kv_type };
    let mut network = Transformer::new(Arc::new(packed), options).unwrap();
    let block_table: Vec<BlockId> = (0..num_blocks as u32).map(BlockId).collect();
    let mut batch = RaggedBatch::new();
    batch.push(SegmentInput {
        tokens,
        start: 0,
        block_table: &block_table,
        logits_from: 0,
        owner: 0,
        scope: 0,
    });
    let mut logits = Logits::new();
    network.forward(&batch, &mut logits).unwrap();
    (0..tokens.len()).flat_map(|row| logits.row(row)).copied().collect()
}

#[test]
fn checkpoints_of_transformers_give_its_logits() {
    let cases = [
        ("llama-tied", "config.json"),
        ("llama-tied", "config.v4.json"),
        ("llama-untied", "config.json"),
        ("llama-gqa", "config.json"),
        ("llama-llama3", "config.json"),
        ("llama-llama3", "config.v4.json"),
        ("llama-linear", "config.json"),
        ("llama-linear", "config.v4.json"),
        ("llama-f16", "config.json"),
        ("llama-bf16", "config.json"),
    ];
    for (name, config) in cases {
        let dir = directory(name, config);
        let model = load_path(dir.path(), None);
        check(&format!("{name}/{config}"), &model, &golden(name, "golden.safetensors"));
    }
}

#[test]
fn keys_and_values_in_half_precision_give_nearly_the_logits() {
    for name in ["llama-gqa", "llama-tied"] {
        let options = LoadOptions { kv_type: KvType::F16, ..LoadOptions::default() };
        let dir = directory(name, "config.json");
        let model = load(ModelSource::Path(dir.path().to_owned()), &options, &mut |_| {}).unwrap();
        let golden = golden(name, "golden.safetensors");
        for isa in Isa::available() {
            let found = golden.distance(&transformer_logits(&model, isa, &golden.tokens));
            assert!(found < HALF_KV_TOLERANCE, "{name}: {} is off by {found:.2e}", isa.name());
            assert!(found > 1e-6, "{name}: {} rounds nothing", isa.name());
        }
    }
}

#[test]
fn gguf_files_give_the_logits_of_their_weights() {
    let f32_file = load_path(&fixture("llama-gqa/model-f32.gguf"), None);
    check("f32", &f32_file, &golden("llama-gqa", "golden.safetensors"));
    // These goldens were computed on the dequantised weights, so only the reader is compared.
    let wanted = golden("llama-gqa", "golden-q8_0.safetensors");
    for format in [None, Some(WeightFormat::F32)] {
        let q8_0_file = load_path(&fixture("llama-gqa/model-q8_0.gguf"), format);
        check(&format!("q8_0 as {format:?}"), &q8_0_file, &wanted);
    }
}

#[test]
fn twins_in_both_formats_hold_the_same_weights() {
    let dir = load_path(&fixture("llama-gqa"), None);
    let gguf = load_path(&fixture("llama-gqa/model-f32.gguf"), None);
    assert_eq!(dir.weights, gguf.weights);
    assert_eq!(dir.config, gguf.config);
    assert_eq!(dir.tokenizer.fingerprint(), gguf.tokenizer.fingerprint());
    // Quantising while loading is what the writer of the Q8_0 file did.
    let quantised = load_path(&fixture("llama-gqa"), Some(WeightFormat::Q8_0));
    let q8_0_file = load_path(&fixture("llama-gqa/model-q8_0.gguf"), None);
    assert_eq!(quantised.weights, q8_0_file.weights);
    let MatrixData::Q8_0 { scales, quants } = &q8_0_file.weights.embedding.data else {
        panic!("the file's own format is kept");
    };
    let widened = load_path(&fixture("llama-gqa/model-q8_0.gguf"), Some(WeightFormat::F32));
    assert_eq!(widened.weights.embedding.data, MatrixData::F32(dequantize_q8_0(scales, quants)));
}

#[test]
fn both_spellings_of_a_configuration_mean_the_same() {
    for name in ["llama-tied", "llama-llama3", "llama-linear"] {
        let (v5, v4) = (directory(name, "config.json"), directory(name, "config.v4.json"));
        let (v5, v4) = (load_path(v5.path(), None), load_path(v4.path(), None));
        assert_eq!(v5.config, v4.config, "{name}");
        assert_eq!(v5.digest, v4.digest, "{name}");
    }
    let scaled = load_path(directory("llama-llama3", "config.json").path(), None);
    assert!(matches!(scaled.config.rope_scaling, RopeScaling::Llama3 { .. }));
}

#[test]
fn digests_follow_what_output_depends_on() {
    let path = fixture("llama-gqa");
    let base = load_path(&path, None);
    assert_eq!(base.digest, load_path(&path, None).digest, "loading twice");
    assert_ne!(base.digest, load_path(&path, Some(WeightFormat::Q8_0)).digest, "format");
    let half = LoadOptions { kv_type: KvType::F16, ..LoadOptions::default() };
    let half = load(ModelSource::Path(path.clone()), &half, &mut |_| {}).unwrap();
    assert_eq!((base.kv_type, half.kv_type), (KvType::F32, KvType::F16));
    assert_ne!(base.digest, half.digest, "type of keys and values");
    let limited = LoadOptions { context_limit: Some(100), ..LoadOptions::default() };
    let limited = load(ModelSource::Path(path), &limited, &mut |_| {}).unwrap();
    assert_eq!(limited.config.context_len, 100);
    assert_ne!(base.digest, limited.digest, "context");
    let changed = directory("llama-gqa", "config.json");
    let weights = changed.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_ne!(base.digest, load_path(changed.path(), None).digest, "one bit of one weight");
    let shown = base.digest.to_string();
    assert_eq!((shown.len(), &shown[..16]), (64, base.digest.short().as_str()));
}

#[test]
fn progress_counts_each_stage_to_its_end() {
    let mut reports = Vec::new();
    let source = ModelSource::Path(fixture("llama-gqa/model-q8_0.gguf"));
    let model = load(source, &LoadOptions::default(), &mut |report| reports.push(report)).unwrap();
    assert_eq!(model.name, "model-q8_0");
    for stage in [LoadStage::Weights, LoadStage::Digest] {
        let of_stage: Vec<_> = reports.iter().filter(|report| report.stage == stage).collect();
        assert!(of_stage.is_sorted_by_key(|report| report.done_bytes), "{stage:?}");
        let last = of_stage.last().unwrap_or_else(|| panic!("{stage:?} reports nothing"));
        assert_eq!(last.done_bytes, last.total_bytes, "{stage:?}");
    }
}

/// The rows of query or key as GGUF files have them: pairs that turn together stand together.
fn interleaved(rows: &[f32], in_len: usize, head_dim: usize) -> Vec<f32> {
    let row = |index: usize| &rows[index * in_len..(index + 1) * in_len];
    let from = |index: usize| {
        let (head, at) = (index / head_dim, index % head_dim);
        head * head_dim + (at % 2) * (head_dim / 2) + at / 2
    };
    (0..rows.len() / in_len).flat_map(|index| row(from(index))).copied().collect()
}

/// A model in memory as a GGUF file, without any rotary scaling.
fn as_gguf(model: &LoadedModel) -> GgufBuilder {
    let config = &model.config;
    let mut file = GgufBuilder::tiny();
    file.tensors.clear();
    for (key, value) in [
        ("llama.embedding_length", config.hidden_len),
        ("llama.block_count", config.num_layers),
        ("llama.feed_forward_length", config.ffn_len),
        ("llama.attention.head_count", config.num_heads),
        ("llama.attention.head_count_kv", config.num_kv_heads),
        ("llama.rope.dimension_count", config.head_dim),
    ] {
        file.set(key, Value::U32(u32::try_from(value).unwrap()));
    }
    let mut put = |name: &str, dims: &[usize], numbers: &[f32]| {
        let dims: Vec<u64> = dims.iter().map(|dim| *dim as u64).collect();
        file.tensor(name, &dims);
        file.tensor_mut(name).bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    };
    let mut put_matrix = |name: &str, matrix: &Matrix, is_rotated: bool| {
        let mut rows = widen(&matrix.data);
        if is_rotated {
            rows = interleaved(&rows, matrix.in_len, config.head_dim);
        }
        put(name, &[matrix.in_len, matrix.out_len], &rows);
    };
    put_matrix("token_embd.weight", &model.weights.embedding, false);
    for (index, layer) in model.weights.layers.iter().enumerate() {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        put_matrix(&name("attn_q"), &layer.query, true);
        put_matrix(&name("attn_k"), &layer.key, true);
        put_matrix(&name("attn_v"), &layer.value, false);
        put_matrix(&name("attn_output"), &layer.attention_output, false);
        put_matrix(&name("ffn_gate"), &layer.gate, false);
        put_matrix(&name("ffn_up"), &layer.up, false);
        put_matrix(&name("ffn_down"), &layer.down, false);
    }
    put("output_norm.weight", &[config.hidden_len], &model.weights.output_norm);
    for (index, layer) in model.weights.layers.iter().enumerate() {
        let norms = [("attn_norm", &layer.attention_norm), ("ffn_norm", &layer.ffn_norm)];
        for (part, norm) in norms {
            put(&format!("blk.{index}.{part}.weight"), &[config.hidden_len], norm);
        }
    }
    file
}

#[test]
fn rotary_scalings_of_gguf_files_give_the_logits_of_transformers() {
    let load_built = |file: &GgufBuilder| {
        let bytes = Box::leak(file.build().into_boxed_slice());
        load(ModelSource::GgufBytes(bytes), &LoadOptions::default(), &mut |_| {}).unwrap()
    };
    let linear = load_path(directory("llama-linear", "config.json").path(), None);
    let mut file = as_gguf(&linear);
    file.set("llama.rope.scaling.type", Value::Text("linear".to_owned()));
    file.set("llama.rope.scaling.factor", Value::F32(4.0));
    let wanted = golden("llama-linear", "golden.safetensors");
    check("linear", &load_built(&file), &wanted);

    let llama3 = load_path(directory("llama-llama3", "config.json").path(), None);
    let mut file = as_gguf(&llama3);
    let wanted = golden("llama-llama3", "golden.safetensors");
    let unscaled = load_built(&file);
    let reference = ReferenceModel::new(&unscaled.config, &unscaled.weights).unwrap();
    let without = distance(&reference.logits(&wanted.tokens).unwrap(), &wanted.logits);
    assert!(without > 100.0 * F32_TOLERANCE, "the scaling makes no difference: {without:.1e}");
    // Wave lengths grow by sqrt(10) from 2 pi. Under 32 / 4 they are kept, over 32 / 1 stretched
    // eightfold, and the one between (19.87) is blended: 0.2035 kept, the rest stretched.
    let kept = (32.0 / 19.869_176_5 - 1.0) / 3.0;
    let blended = (1.0 / (kept + (1.0 - kept) / 8.0)) as f32;
    let divisors = [1.0, blended, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0];
    file.tensor("rope_freqs.weight", &[8]);
    file.tensor_mut("rope_freqs.weight").bytes =
        divisors.iter().flat_map(|divisor: &f32| divisor.to_le_bytes()).collect();
    let scaled = load_built(&file);
    assert_eq!(scaled.config.rope_scaling, RopeScaling::Divisors);
    check("divisors", &scaled, &wanted);
}

#[test]
fn sequences_that_attention_splits_agree_with_the_reference() {
    for name in ["llama-gqa", "llama-tied", "llama-untied", "llama-llama3"] {
        let mut model = load_path(directory(name, "config.json").path(), None);
        model.config.context_len = LONG_LEN;
        let mut rng = Rng::new(600);
        let mut tokens: Vec<TokenId> =
            (0..LONG_LEN).map(|_| TokenId(rng.below(model.config.vocab_size) as u32)).collect();
        let reference = ReferenceModel::new(&model.config, &model.weights).unwrap();
        let logits = reference.logits(&tokens).unwrap();
        let golden = Golden::whole(tokens.clone(), logits);
        check_transformer(name, &model, &golden);
        // The last row sees every part, or losing one would not show.
        let last_row = (LONG_LEN - 1) * model.config.vocab_size;
        for part in [0..256, 256..512, 512..LONG_LEN - 1] {
            let kept = tokens[part.clone()].to_vec();
            tokens[part.clone()].reverse();
            let other = reference.logits(&tokens).unwrap();
            let found = distance(&other[last_row..], &golden.logits[last_row..]);
            assert!(found > 50.0 * F32_TOLERANCE, "{name}: {part:?} matters by {found:.1e} only");
            tokens[part].copy_from_slice(&kept);
        }
    }
}

#[test]
fn the_micro_pair_gives_the_logits_of_its_goldens() {
    for name in ["verifier", "draft"] {
        let path = fixture("../../models/micro").join(format!("{name}.gguf"));
        let wanted = golden_file(&fixture(&format!("micro-{name}-golden.safetensors")), "logits");
        for format in [None, Some(WeightFormat::F32)] {
            check(&format!("{name} as {format:?}"), &load_path(&path, format), &wanted);
        }
    }
}

#[test]
fn rounded_models_compute_what_their_weights_say() {
    let formats = [WeightFormat::F32, WeightFormat::Q8_0, WeightFormat::Q4_0].map(Some);
    for name in ["llama-f16", "llama-bf16", "llama-gqa", "llama-gqa/model-q8_0.gguf"] {
        let wanted = golden(name.split('/').next().unwrap(), "golden.safetensors");
        for format in formats.into_iter().chain([None]) {
            let model = match name.contains('/') {
                true => load_path(&fixture(name), format),
                false => load_path(directory(name, "config.json").path(), format),
            };
            let reference = ReferenceModel::new(&model.config, &model.weights).unwrap();
            let logits = reference.logits(&wanted.tokens).unwrap();
            let rounding = distance(&logits, &wanted.logits);
            report(&format!("  {name} as {format:?}: {rounding:.2e} off the original"));
            let of_weights = Golden::whole(wanted.tokens.clone(), logits);
            check(&format!("{name} as {format:?}"), &model, &of_weights);
        }
    }
}

#[test]
fn the_embedded_pair_gives_the_logits_of_its_goldens() {
    for name in ["verifier", "draft"] {
        let path = fixture("../../models/rust").join(format!("{name}.gguf"));
        let file = fixture(&format!("rust-{name}-golden.safetensors"));
        let stored = golden_file(&file, "stored");
        let original = golden_file(&file, "original");
        let rounding = distance(&stored.logits, &original.logits);
        report(&format!("  {name}: quantisation puts its logits {rounding:.2e} off the original"));
        for format in [None, Some(WeightFormat::F32)] {
            let model = load_path(&path, format);
            check(&format!("{name} as {format:?}"), &model, &stored);
            check_rounded(&format!("{name} as {format:?}, original"), &model, &original, rounding);
        }
    }
}

#[test]
fn pairs_compute_what_their_weights_say() {
    let source = fs::read_to_string(fixture("text-timing.txt")).unwrap();
    for name in ["micro/verifier.gguf", "micro/draft.gguf", "rust/verifier.gguf", "rust/draft.gguf"]
    {
        let path = fixture("../../models").join(name);
        let model = load_path(&path, None);
        let tokens = model.tokenizer.encode(&source, true).unwrap();
        let reference = ReferenceModel::new(&model.config, &model.weights).unwrap();
        let logits = reference.logits(&tokens).unwrap();
        let wanted = Golden::whole(tokens, logits);
        check(name, &model, &wanted);
        check(name, &load_path(&path, Some(WeightFormat::F32)), &wanted);
        let computed = transformer_logits(&model, Isa::detect(), &wanted.tokens);
        let rows = |logits: &[f32]| -> Vec<usize> {
            let best = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
            logits.chunks(model.config.vocab_size).filter_map(best).collect()
        };
        let (a, b) = (rows(&computed), rows(&wanted.logits));
        let num_equal = a.iter().zip(&b).filter(|(a, b)| a == b).count();
        assert!(num_equal * 20 > a.len() * 19, "{name}: {num_equal} of {} choices agree", a.len());
    }
}

#[test]
fn sizes_count_every_weight_once() {
    // As the model cards say; the draft of the other pair may be exchanged.
    let sizes =
        [("micro/verifier", 967_808), ("micro/draft", 96_448), ("rust/verifier", 5_475_584)];
    for (name, num_weights) in sizes {
        let path = fixture("../../models").join(format!("{name}.gguf"));
        let stored = load_path(&path, None).weights;
        let widened = load_path(&path, Some(WeightFormat::F32)).weights;
        assert_eq!(stored.num_weights(), num_weights, "{name}");
        assert_eq!(widened.num_bytes(), 4 * num_weights, "{name}");
        // 34 bytes for 32 weights of a matrix, and 4 for each of the few in norms.
        let per_weight = stored.num_bytes() as f64 / num_weights as f64;
        assert!((34.0 / 32.0..1.1).contains(&per_weight), "{name}: {per_weight} bytes");
    }
}
