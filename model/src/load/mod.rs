//! Owns the way from files to a model in memory: Hugging Face directories and GGUF files. All of
//! them are untrusted: every size is checked before it is believed, nothing is mapped into memory,
//! and every error names the key or tensor. Knows nothing of kernels, requests or drafts.
//!
//! Read `load` below, then `network.rs` (which tensors a network has); the other files read
//! formats.

mod gguf;
mod gguf_header;
mod gguf_tokenizer;
mod hf_config;
pub mod limits;
mod network;
mod quantize;
mod safetensors;
mod tokenizer_json;
mod tokenizer_keys;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use limits::DEFAULT_MEMORY_BUDGET_BYTES;
pub use quantize::{Q8Blocks, dequantize_q8_0, quantize_q8_0};

use self::gguf::GgufFile;
use self::limits::{MAX_CONFIG_JSON_BYTES, MAX_TOKENIZER_JSON_BYTES};
use self::network::TensorFile;
pub(crate) use self::network::{Role, slots};
use self::safetensors::SafetensorsFile;
pub use self::tokenizer_keys::tokenizer_keys;
use crate::config::LlamaConfig;
use crate::digest::ModelDigest;
use crate::error;
pub use crate::error::LoadError;
use crate::tokenizer::{NamedIds, Tokenizer};
use crate::weights::LlamaWeights;

/// Bytes read between two reports of progress.
const READ_CHUNK_BYTES: u64 = 16 << 20;
/// Longest model name taken from a file, in characters.
const MAX_NAME_CHARS: usize = 64;
/// What a model is called that nothing names.
const UNNAMED: &str = "unnamed";

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A Hugging Face directory (`config.json`, `tokenizer.json`, `model.safetensors`) or a GGUF
    /// file.
    Path(PathBuf),
    /// A GGUF file inside this program.
    GgufBytes(&'static [u8]),
}

/// How matrices are held in memory. Norms are always 32-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// 32-bit floats.
    F32,
    /// 8-bit integers with a half-precision scale per 32 weights.
    Q8_0,
}

/// What the operator decides about loading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions to offer at most; `None` leaves it to the model.
    pub context_limit: Option<usize>,
    /// Format in memory; `None` keeps the file's (f16 and bf16 become f32).
    pub format: Option<WeightFormat>,
    /// Most memory that loading may take at its peak, the file's own bytes included.
    pub memory_budget_bytes: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { context_limit: None, format: None, memory_budget_bytes: DEFAULT_MEMORY_BUDGET_BYTES }
    }
}

impl LoadOptions {
    fn limit_context(&self, trained_len: usize) -> Result<usize, LoadError> {
        match self.context_limit {
            None => Ok(trained_len),
            Some(0) => Err(LoadError::unsupported("a context limit of 0", "it must be at least 1")),
            Some(limit) => Ok(trained_len.min(limit)),
        }
    }
}

/// What loading is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadStage {
    /// Reading the weights file into memory.
    Read,
    /// Converting tensors.
    Weights,
    /// Computing the digest.
    Digest,
}

/// A report while loading. Each stage counts from 0 to its own total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// What is being done.
    pub stage: LoadStage,
    /// Bytes of it that are done.
    pub done_bytes: u64,
    /// Bytes of it in all.
    pub total_bytes: u64,
}

/// A model in memory.
#[derive(Debug)]
pub struct LoadedModel {
    /// What the model is called: the directory's or file's name, or the name inside embedded bytes.
    pub name: String,
    /// Architecture facts.
    pub config: LlamaConfig,
    /// Weights as they leave the file, or in the format asked for.
    pub weights: LlamaWeights,
    /// The tokenizer that came with them.
    pub tokenizer: Tokenizer,
    /// Identity of all of the above.
    pub digest: ModelDigest,
}

/// What the configuration of either format says.
struct ParsedConfig {
    llama: LlamaConfig,
    /// Whether the output projection is the embedding; `None` where its absence says so.
    is_tied: Option<bool>,
    named: NamedIds,
}

/// Loads a model. `progress` is called from this thread while the long parts go on.
///
/// # Errors
/// [`LoadError`] names what is wrong with the files, or what they would need. The memory taken so
/// far is released.
pub fn load(
    source: ModelSource,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel, LoadError> {
    match source {
        ModelSource::Path(path) if path.is_dir() => load_directory(&path, options, progress),
        ModelSource::Path(path) => {
            let bytes = read_weights(&path, options, progress)?;
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            load_gguf(&bytes, bytes.len() as u64, name, options, progress)
        }
        ModelSource::GgufBytes(bytes) => load_gguf(bytes, 0, None, options, progress),
    }
}

fn load_directory(
    dir: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel, LoadError> {
    let config = read_file(&dir.join("config.json"), MAX_CONFIG_JSON_BYTES, &mut |_, _| {})?;
    let generation_path = dir.join("generation_config.json");
    let generation = match generation_path.exists() {
        true => Some(read_file(&generation_path, MAX_CONFIG_JSON_BYTES, &mut |_, _| {})?),
        false => None,
    };
    let parsed = hf_config::parse(&config, generation.as_deref(), options)?;
    let json = read_file(&dir.join("tokenizer.json"), MAX_TOKENIZER_JSON_BYTES, &mut |_, _| {})?;
    let vocab_size = parsed.llama.vocab_size;
    let tokenizer =
        tokenizer_json::build(&json, "tokenizer.json", vocab_size, parsed.named.clone())?;
    let weights_path = dir.join("model.safetensors");
    if !weights_path.exists() && dir.join("model.safetensors.index.json").exists() {
        let reason = "weights split over several files are not read yet; merge them into one";
        return Err(LoadError::unsupported("model.safetensors.index.json", reason));
    }
    let bytes = read_weights(&weights_path, options, progress)?;
    let file = TensorFile::Safetensors(SafetensorsFile::open(&bytes)?);
    let weights = network::read(&file, &parsed, options, bytes.len() as u64, progress)?;
    let name = dir
        .canonicalize()
        .ok()
        .and_then(|dir| dir.file_name().map(|name| name.to_string_lossy().into_owned()));
    Ok(finish(name, parsed, weights, tokenizer, progress))
}

/// `owned_bytes` is what the file's bytes add to this process: nothing when they are part of it.
fn load_gguf(
    bytes: &[u8],
    owned_bytes: u64,
    name: Option<String>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel, LoadError> {
    let file = GgufFile::open(bytes)?;
    let parsed = file.config(options)?;
    let tokenizer = gguf_tokenizer::read(file.metadata(), parsed.llama.vocab_size, &parsed.named)?;
    let inner_name = file.metadata().text("general.name")?.map(str::to_owned);
    let file = TensorFile::Gguf(file);
    let weights = network::read(&file, &parsed, options, owned_bytes, progress)?;
    Ok(finish(name.or(inner_name), parsed, weights, tokenizer, progress))
}

fn finish(
    name: Option<String>,
    parsed: ParsedConfig,
    weights: LlamaWeights,
    tokenizer: Tokenizer,
    progress: &mut dyn FnMut(LoadProgress),
) -> LoadedModel {
    let config = parsed.llama;
    let digest = ModelDigest::compute(&config, &weights, &tokenizer, &mut |done, total| {
        progress(LoadProgress { stage: LoadStage::Digest, done_bytes: done, total_bytes: total });
    });
    let name: String =
        name.unwrap_or_default().chars().filter(|c| !c.is_control()).take(MAX_NAME_CHARS).collect();
    let name = if name.is_empty() { UNNAMED.to_owned() } else { name };
    LoadedModel { name, config, weights, tokenizer, digest }
}

fn read_weights(
    path: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<u8>, LoadError> {
    read_file(path, options.memory_budget_bytes, &mut |done_bytes, total_bytes| {
        progress(LoadProgress { stage: LoadStage::Read, done_bytes, total_bytes });
    })
}

/// Reads a regular file of at most `limit` bytes into memory. It is copied, never mapped: whoever
/// replaces the file later must not change a running model.
fn read_file(
    path: &Path,
    limit: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<u8>, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    // Asked before opening: opening a pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(io)?;
    let what = || error::shown(&path.display().to_string());
    if !metadata.is_file() {
        return Err(LoadError::unsupported(what(), "it is not a regular file"));
    }
    let len = metadata.len();
    if len > limit {
        return Err(LoadError::TooLarge { what: what(), size: len, unit: "bytes", limit });
    }
    let mut bytes = Vec::new();
    let capacity = usize::try_from(len).unwrap_or(usize::MAX);
    bytes.try_reserve_exact(capacity).map_err(|_| LoadError::OverBudget {
        what: what(),
        needed_bytes: len,
        budget_bytes: limit,
    })?;
    let mut file = File::open(path).map_err(io)?;
    progress(0, len);
    loop {
        let left = len - bytes.len() as u64;
        let chunk = left.min(READ_CHUNK_BYTES);
        let read = file.by_ref().take(chunk).read_to_end(&mut bytes).map_err(io)?;
        progress(bytes.len() as u64, len);
        if read == 0 || bytes.len() as u64 == len {
            break;
        }
    }
    if bytes.len() as u64 != len {
        return Err(LoadError::malformed(what(), "it became shorter while it was read"));
    }
    Ok(bytes)
}
