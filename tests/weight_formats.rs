//! Proves that weights become in memory what files and settings say: formats that are computed with
//! are kept bit for bit, the others rounded within a stated error and counted, every setting does
//! what it says to every type of file, and nothing is rounded that does not fit. What is compared
//! with is candle's own reading of the same blocks.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use slipstream_model::load::{
    Converted, LoadError, LoadOptions, LoadedModel, ModelSource, WeightFormat, load, quantize_q4_0,
    quantize_q8_0, widen,
};
use slipstream_model::weights::MatrixData;
use slipstream_tests::gguf_builder::{
    GgufBuilder, TYPE_BF16, TYPE_F16, TYPE_F32, TYPE_Q4_0, TYPE_Q4_K, TYPE_Q8_0,
};
use slipstream_tests::random::Rng;
use tempfile::{NamedTempFile, TempDir};

/// Widths of the network: whole blocks of every type.
const HIDDEN: u64 = 256;
const FFN: u64 = 512;
/// Matrices of the network.
const NUM_MATRICES: usize = 8;
/// A matrix whose rows are stored in the order that they have in memory.
const UP: &str = "blk.0.ffn_up.weight";
/// Set in the child process that measures its own memory.
const ALONE: &str = "SLIPSTREAM_TEST_FORMATS_ALONE";

/// Types of files by number, what they are called, what they become unless asked for otherwise.
const TYPES: [(u32, GgmlDType, &str, &str); 11] = [
    (TYPE_F32, GgmlDType::F32, "f32", "f32"),
    (TYPE_F16, GgmlDType::F16, "f16", "f16"),
    (TYPE_BF16, GgmlDType::BF16, "bf16", "bf16"),
    (TYPE_Q4_0, GgmlDType::Q4_0, "q4_0", "q4_0"),
    (3, GgmlDType::Q4_1, "q4_1", "q8_0"),
    (6, GgmlDType::Q5_0, "q5_0", "q8_0"),
    (7, GgmlDType::Q5_1, "q5_1", "q8_0"),
    (TYPE_Q8_0, GgmlDType::Q8_0, "q8_0", "q8_0"),
    (TYPE_Q4_K, GgmlDType::Q4K, "q4_k", "q4_0"),
    (13, GgmlDType::Q5K, "q5_k", "q8_0"),
    (14, GgmlDType::Q6K, "q6_k", "q8_0"),
];

/// Settings and what every matrix becomes by them.
const FORMATS: [(Option<WeightFormat>, Option<&str>); 4] = [
    (None, None),
    (Some(WeightFormat::F32), Some("f32")),
    (Some(WeightFormat::Q8_0), Some("q8_0")),
    (Some(WeightFormat::Q4_0), Some("q4_0")),
];

fn load_bytes(bytes: &[u8], format: Option<WeightFormat>) -> Result<LoadedModel, LoadError> {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    load_path(file.path(), format)
}

fn load_path(path: &Path, format: Option<WeightFormat>) -> Result<LoadedModel, LoadError> {
    let options = LoadOptions { format, ..LoadOptions::default() };
    load(ModelSource::Path(path.to_owned()), &options, &mut |_| {})
}

/// Blocks of a type, by candle.
fn blocks(weights: &[f32], dtype: GgmlDType) -> QTensor {
    let weights = Tensor::from_slice(weights, weights.len(), &Device::Cpu).unwrap();
    QTensor::quantize(&weights, dtype).unwrap()
}

fn values(blocks: &QTensor) -> Vec<f32> {
    blocks.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
}

/// About normally distributed, as weights are.
fn weights(rng: &mut Rng, len: usize) -> Vec<f32> {
    let mut one = || (0..6).map(|_| rng.unit()).sum::<f64>() - 3.0;
    (0..len).map(|_| (one() * 0.03) as f32).collect()
}

/// A network whose matrices have this type, and candle's reading of [`UP`].
fn network(code: u32, dtype: GgmlDType) -> (GgufBuilder, Vec<f32>) {
    let mut file = GgufBuilder::network(HIDDEN, FFN);
    let mut rng = Rng::new(0x0F0_12A7);
    let mut of_up = Vec::new();
    for tensor in file.tensors.iter_mut().filter(|tensor| tensor.dims.len() == 2) {
        let len = tensor.dims.iter().product::<u64>() as usize;
        let blocks = blocks(&weights(&mut rng, len), dtype);
        (tensor.code, tensor.bytes) = (code, blocks.data().unwrap().into_owned());
        if tensor.name == UP {
            of_up = values(&blocks);
        }
    }
    (file, of_up)
}

/// A matrix as a GGUF file has it.
fn file_bytes(data: &MatrixData) -> Vec<u8> {
    match data {
        MatrixData::F32(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        MatrixData::F16(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        MatrixData::Bf16(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        MatrixData::Q8_0 { scales, quants } => {
            let quants: Vec<u8> = quants.iter().map(|q| *q as u8).collect();
            let blocks = scales.iter().zip(quants.as_chunks::<32>().0);
            blocks.flat_map(|(d, q)| [&d.to_le_bytes()[..], q].concat()).collect()
        }
        MatrixData::Q4_0 { scales, quants } => {
            let blocks = scales.iter().zip(quants.as_chunks::<16>().0);
            blocks.flat_map(|(d, q)| [&d.to_le_bytes()[..], q].concat()).collect()
        }
    }
}

/// Root of the mean squared error, relative to that of the weights themselves.
fn relative_error(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = found.iter().zip(wanted).map(|(a, b)| square(a - b)).sum();
    (error / wanted.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

/// Most that rounding to a format may lose of normally distributed weights: half a step in 8 bits
/// is 0.4 % of the largest of a block, in 4 bits 7 %.
fn error_max(format: &str) -> f64 {
    match format {
        "q8_0" => 0.007,
        "q4_0" => 0.09,
        _ => 0.0,
    }
}

#[test]
fn every_type_loads_in_every_format() {
    for (code, dtype, stored, by_default) in TYPES {
        let (file, of_up) = network(code, dtype);
        let bytes = file.build();
        for (format, chosen) in FORMATS {
            let held = chosen.unwrap_or(by_default);
            let label = format!("{stored} as {held}");
            let model = load_bytes(&bytes, format).unwrap_or_else(|e| panic!("{label}: {e}"));
            let layer = &model.weights.layers[0];
            let matrices = [&model.weights.embedding, &layer.query, &layer.up, &layer.down];
            let names = matrices.map(|matrix| matrix.data.type_name());
            assert_eq!(names, [held; 4], "{label}");
            let is_exact = held == stored || held == "f32" || (stored, held) == ("q4_0", "q8_0");
            let error = relative_error(&widen(&layer.up.data), &of_up);
            let error_max = if is_exact { 0.0 } else { error_max(held) };
            assert!(error <= error_max, "{label}: {error} of {error_max}");
            let stored_up = &file.tensors.iter().find(|tensor| tensor.name == UP).unwrap().bytes;
            assert_eq!(file_bytes(&layer.up.data) == *stored_up, held == stored, "{label}");
            let converted = Converted { from: stored, to: held, num_matrices: NUM_MATRICES };
            let expected = if held == stored { vec![] } else { vec![converted] };
            assert_eq!(model.converted, expected, "{label}");
            let by_type = model.weights.bytes_by_type();
            assert_eq!(by_type.values().sum::<usize>(), model.weights.num_bytes(), "{label}");
            let norms = 3 * HIDDEN as usize * 4;
            assert!(held == "f32" || by_type["f32"] == norms, "{label}: {by_type:?}");
        }
    }
}

/// Blocks whose byte `i` is `73 i + 41`, but for their half-precision numbers, as the `gguf`
/// package of llama.cpp reads them: type, where those numbers (0.25, then 0.125) are, some weights,
/// and the sum of all weights times their place, counted from 1.
type KnownBlock = (u32, &'static [usize], [(usize, f32); 3], f64);
const KNOWN_BLOCKS: [KnownBlock; 8] = [
    (TYPE_Q4_0, &[0], [(0, 0.75), (16, 0.75), (31, -2.0)], -199.75),
    (3, &[0, 2], [(1, 1.625), (16, 1.125), (31, 2.375)], 932.5),
    (6, &[0], [(1, 2.0), (16, 3.25), (31, 0.5)], -296.25),
    (7, &[0, 2], [(15, 6.125), (16, 5.875), (31, 2.875)], 2078.0),
    (TYPE_Q8_0, &[0], [(0, -17.25), (16, 18.75), (31, -27.5)], -172.0),
    (TYPE_Q4_K, &[0, 2], [(0, 23.125), (33, -7.25), (130, 54.625)], 1_842_342.0),
    (13, &[0, 2], [(0, 75.125), (33, 91.75), (255, -2.875)], 3_726_126.0),
    (14, &[208], [(0, 40.25), (95, -688.0), (255, 72.0)], -407_032.0),
];

#[test]
fn blocks_mean_what_they_mean_to_llama_cpp() {
    for (code, halves, wanted, sum) in KNOWN_BLOCKS {
        let (_, dtype, stored, _) = TYPES.into_iter().find(|known| known.0 == code).unwrap();
        let (mut file, _) = network(code, dtype);
        let block = &mut file.tensor_mut(UP).bytes[..dtype.type_size()];
        block.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 73 + 41) as u8);
        for (at, half) in halves.iter().zip([0.25, 0.125]) {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(half).to_le_bytes());
        }
        let model = load_bytes(&file.build(), Some(WeightFormat::F32)).unwrap();
        let weights = widen(&model.weights.layers[0].up.data);
        let found = wanted.map(|(index, _)| (index, weights[index]));
        assert_eq!(found, wanted, "{stored}");
        let terms = weights[..dtype.block_size()].iter().zip(1..);
        let found: f64 = terms.map(|(x, place)| f64::from(*x) * f64::from(place)).sum();
        assert_eq!(found, sum, "{stored}");
    }
}

#[test]
fn rows_of_queries_and_keys_are_untangled_in_every_format() {
    for (code, dtype, stored, held) in TYPES {
        if stored != held {
            continue;
        }
        let bytes = network(code, dtype).0.build();
        let kept = load_bytes(&bytes, None).unwrap();
        let widened = load_bytes(&bytes, Some(WeightFormat::F32)).unwrap();
        let (kept, widened) = (&kept.weights.layers[0], &widened.weights.layers[0]);
        for (kept, widened) in [(&kept.query, &widened.query), (&kept.key, &widened.key)] {
            assert_eq!(MatrixData::F32(widen(&kept.data)), widened.data, "{stored}");
        }
    }
}

#[test]
fn a_file_may_mix_types() {
    // As a "Q4_K_M" file does: most matrices in Q4_K, a few in Q6_K, norms in F32.
    let mut file = network(TYPE_Q4_K, GgmlDType::Q4K).0;
    let sixth = network(14, GgmlDType::Q6K).0;
    for name in ["token_embd.weight", "blk.0.ffn_down.weight", "blk.0.attn_v.weight"] {
        let tensor = sixth.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        file.retype(name, 14, tensor.bytes.clone());
    }
    let model = load_bytes(&file.build(), None).unwrap();
    let said: Vec<_> = model.converted.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["5 matrices from q4_k to q4_0", "3 matrices from q6_k to q8_0"]);
    assert_eq!(model.weights.embedding.data.type_name(), "q8_0");
    let model = load_bytes(&file.build(), Some(WeightFormat::Q4_0)).unwrap();
    assert_eq!(model.converted.len(), 2);
    assert_eq!(model.weights.bytes_by_type().len(), 2);
}

#[test]
fn digests_tell_formats_apart() {
    let mut digests = BTreeSet::new();
    let bytes = network(TYPE_Q4_0, GgmlDType::Q4_0).0.build();
    // The same numbers three times; only what they are held in differs.
    for format in [None, Some(WeightFormat::Q8_0), Some(WeightFormat::F32)] {
        digests.insert(*load_bytes(&bytes, format).unwrap().digest.as_bytes());
    }
    let again = load_bytes(&bytes, Some(WeightFormat::Q4_0)).unwrap();
    assert!(digests.contains(again.digest.as_bytes()), "asking for what the file has");
    for (code, dtype) in [(TYPE_F16, GgmlDType::F16), (TYPE_BF16, GgmlDType::BF16)] {
        let bytes = network(code, dtype).0.build();
        digests.insert(*load_bytes(&bytes, None).unwrap().digest.as_bytes());
    }
    assert_eq!(digests.len(), 5);
    // One bit of one nibble.
    let mut file = network(TYPE_Q4_0, GgmlDType::Q4_0).0;
    file.tensor_mut(UP).bytes[2] ^= 1;
    let changed = load_bytes(&file.build(), None).unwrap();
    assert!(digests.insert(*changed.digest.as_bytes()));
}

/// A fixture with a tokenizer of one token.
fn directory(name: &str) -> TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    let tokenizer = r#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
        "post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,
        "trim_offsets":true,"use_regex":true},"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
    fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    dir
}

#[test]
fn directories_keep_half_precision_unless_told_otherwise() {
    for (name, held) in [("llama-f16", "f16"), ("llama-bf16", "bf16"), ("llama-gqa", "f32")] {
        let dir = directory(name);
        let model = load_path(dir.path(), None).unwrap();
        assert!(model.converted.is_empty(), "{name}");
        let up = &model.weights.layers[0].up;
        assert_eq!(up.data.type_name(), held);
        let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let stored = tensors.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
        assert_eq!(file_bytes(&up.data), stored.data(), "{name}");
        let exact = widen(&up.data);
        let (q8_0, q4_0) = (quantize_q8_0(&exact).unwrap(), quantize_q4_0(&exact).unwrap());
        let cases = [
            (WeightFormat::F32, MatrixData::F32(exact)),
            (WeightFormat::Q8_0, MatrixData::Q8_0 { scales: q8_0.0, quants: q8_0.1 }),
            (WeightFormat::Q4_0, MatrixData::Q4_0 { scales: q4_0.0, quants: q4_0.1 }),
        ];
        for (format, wanted) in cases {
            let model = load_path(dir.path(), Some(format)).unwrap();
            assert!(model.weights.layers[0].up.data == wanted, "{name} as {format:?}");
            assert_eq!(model.converted.is_empty(), wanted.type_name() == held, "{name}");
        }
    }
}

/// Expects an error whose message holds every one of `parts`.
fn refused(label: &str, parts: &[&str], file: &GgufBuilder, format: Option<WeightFormat>) {
    let error = load_bytes(&file.build(), format).expect_err(label).to_string();
    let absent: Vec<_> = parts.iter().filter(|part| !error.contains(**part)).collect();
    assert!(absent.is_empty(), "{label}: {absent:?} is not in \"{error}\"");
}

#[test]
fn what_cannot_be_held_is_refused_by_name() {
    const EMBEDDING: &str = "token_embd.weight";
    let narrow = GgufBuilder::network(48, 64);
    assert!(load_bytes(&narrow.build(), None).is_ok());
    for (format, name) in [(WeightFormat::Q8_0, "q8_0"), (WeightFormat::Q4_0, "q4_0")] {
        let parts = [EMBEDDING, "rows of 48", "multiple of 32", name];
        refused("rows", &parts, &narrow, Some(format));
        let mut large = GgufBuilder::tiny();
        large.tensor_mut(UP).bytes[..4].copy_from_slice(&1e30f32.to_le_bytes());
        assert!(load_bytes(&large.build(), None).is_ok());
        refused("range", &[UP, "too large", name], &large, Some(format));
        for odd in [f32::NAN, f32::INFINITY] {
            large.tensor_mut(UP).bytes[..4].copy_from_slice(&odd.to_le_bytes());
            refused("odd float", &[UP, "not a number"], &large, Some(format));
        }
    }
    let odd_f16 = (TYPE_F16, GgmlDType::F16, f16::NAN.to_le_bytes());
    let odd_bf16 = (TYPE_BF16, GgmlDType::BF16, bf16::INFINITY.to_le_bytes());
    let odd_scale = |code, dtype| (code, dtype, f16::INFINITY.to_le_bytes());
    let (q4_0, q8_0) = (GgmlDType::Q4_0, GgmlDType::Q8_0);
    let q4_k = odd_scale(TYPE_Q4_K, GgmlDType::Q4K);
    for (code, dtype, odd) in
        [odd_f16, odd_bf16, odd_scale(TYPE_Q4_0, q4_0), odd_scale(TYPE_Q8_0, q8_0), q4_k]
    {
        let (mut file, _) = network(code, dtype);
        file.tensor_mut(UP).bytes[..2].copy_from_slice(&odd);
        for (format, _) in FORMATS {
            refused("odd number", &[UP, "not a number"], &file, format);
        }
    }
}

#[test]
fn tensors_of_wrong_lengths_and_types_are_refused_by_name() {
    const DOWN: &str = "blk.0.ffn_down.weight";
    for (code, dtype, stored, _) in TYPES {
        let sound = network(code, dtype).0;
        let mut short = sound.clone();
        short.tensors.retain(|tensor| tensor.name != UP);
        let mut last = sound.tensors.iter().find(|tensor| tensor.name == UP).unwrap().clone();
        last.bytes.truncate(last.bytes.len() - 64);
        short.tensors.push(last);
        refused(stored, &[UP, "past the end"], &short, None);
        let mut crooked = sound.clone();
        crooked.tensor_mut(DOWN).dims = vec![FFN / 2 - 1, HIDDEN * 2];
        let block = if matches!(stored, "f32" | "f16" | "bf16") { "shape" } else { "block" };
        refused(stored, &[DOWN, block], &crooked, None);
        let mut norm = sound;
        norm.tensor_mut("output_norm.weight").dims = vec![HIDDEN - 1];
        refused(stored, &["output_norm.weight", "shape"], &norm, None);
    }
    for (code, name) in [(9, "Q8_1"), (10, "Q2_K"), (11, "Q3_K"), (15, "Q8_K"), (20, "number 20")] {
        let mut file = GgufBuilder::network(HIDDEN, FFN);
        file.tensor_mut(DOWN).code = code;
        refused(name, &[DOWN, name, "Q6_K"], &file, None);
    }
}

/// Runs itself once more in a process of its own, which does nothing but load.
#[test]
fn files_are_never_in_memory_as_a_whole() {
    let name = "weight_formats::files_are_never_in_memory_as_a_whole";
    if let Some(path) = std::env::var_os(ALONE) {
        loads_in_less_memory_than(Path::new(&path));
        return;
    }
    // 12 million weights: 48 MiB of floats.
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&GgufBuilder::network(HIDDEN, 1 << 14).build()).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--test-threads", "1", "--nocapture"])
        .env(ALONE, file.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    let ran = child.status.success() && output.contains("1 passed");
    assert!(ran, "{output}{}", String::from_utf8_lossy(&child.stderr));
}

fn loads_in_less_memory_than(path: &Path) {
    let file_mib = path.metadata().unwrap().len() >> 20;
    let before = peak_mib();
    let model = load_path(path, Some(WeightFormat::Q4_0)).unwrap();
    let weights_mib = model.weights.num_bytes() as u64 >> 20;
    let grown = peak_mib() - before;
    assert!(file_mib >= 48 && weights_mib >= 6, "{file_mib} MiB of file, {weights_mib} of weights");
    assert!(grown < weights_mib + 24, "{grown} MiB to load {weights_mib} MiB from {file_mib} MiB");
}

/// The most memory that this process has had.
fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).unwrap_or(0)
        / 1024
}
