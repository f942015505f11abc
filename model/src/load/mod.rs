//! Owns the way from files to a model in memory: Hugging Face directories and GGUF files. All of
//! them are untrusted: every size is checked before it is believed, nothing is mapped into memory,
//! and every error names the key or tensor. Knows nothing of kernels, requests or drafts.
//!
//! Read `load` below, then `network.rs` (which tensors a network has) and `convert.rs` (how their
//! numbers get into memory); the other files read formats.

mod convert;
mod gguf;
mod gguf_header;
mod gguf_tokenizer;
mod hf_config;
pub mod limits;
mod network;
mod quantize;
mod safetensors;
mod source;
mod stored;
mod tokenizer_json;
mod tokenizer_keys;

use std::fmt;
use std::path::{Path, PathBuf};

pub use limits::DEFAULT_MEMORY_BUDGET_BYTES;
pub use quantize::{
    Q4Blocks, Q8Blocks, dequantize_q8_0, quantize_q4_0, quantize_q8_0, unpack_q4_0, widen,
};

use self::gguf::GgufFile;
use self::limits::{MAX_CONFIG_JSON_BYTES, MAX_TOKENIZER_JSON_BYTES};
pub(crate) use self::network::{Role, slots};
use self::source::{Source, read_small};
pub use self::tokenizer_keys::tokenizer_keys;
use crate::config::LlamaConfig;
use crate::digest::ModelDigest;
pub use crate::error::LoadError;
use crate::kv_pool::KvType;
use crate::tokenizer::{NamedIds, Tokenizer};
use crate::weights::LlamaWeights;

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
    /// 4-bit integers with a half-precision scale per 32 weights.
    Q4_0,
}

/// What the operator decides about loading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions to offer at most; `None` leaves it to the model.
    pub context_limit: Option<usize>,
    /// Format of all matrices in memory, the embedding and the output projection among them; `None`
    /// keeps the file's. Of the formats that are not computed with, `None` turns Q4_K into Q4_0,
    /// and Q4_1, Q5_0, Q5_1, Q5_K and Q6_K into Q8_0.
    pub format: Option<WeightFormat>,
    /// Type of keys and values that the network will run with: part of the model's identity.
    pub kv_type: KvType,
    /// Most memory that loading may take at its peak.
    pub memory_budget_bytes: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            context_limit: None,
            format: None,
            kv_type: KvType::default(),
            memory_budget_bytes: DEFAULT_MEMORY_BUDGET_BYTES,
        }
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
    /// Reading and converting tensors.
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

/// Matrices that have not the format that the file has them in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Type in the file, for example `q4_k`.
    pub from: &'static str,
    /// Format in memory, for example `q4_0`.
    pub to: &'static str,
    /// How many matrices were converted so.
    pub num_matrices: usize,
}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, num_matrices } = self;
        write!(f, "{num_matrices} matrices from {from} to {to}")
    }
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
    /// What of them has another format than in the file.
    pub converted: Vec<Converted>,
    /// The tokenizer that came with them.
    pub tokenizer: Tokenizer,
    /// Type of keys and values to run it with.
    pub kv_type: KvType,
    /// Identity of all of the above, the name excepted.
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
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            load_gguf(Source::open(&path)?, name, options, progress)
        }
        ModelSource::GgufBytes(bytes) => load_gguf(Source::Bytes(bytes), None, options, progress),
    }
}

fn load_directory(
    dir: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel, LoadError> {
    let config = read_small(&dir.join("config.json"), MAX_CONFIG_JSON_BYTES)?;
    let generation_path = dir.join("generation_config.json");
    let generation = match generation_path.exists() {
        true => Some(read_small(&generation_path, MAX_CONFIG_JSON_BYTES)?),
        false => None,
    };
    let parsed = hf_config::parse(&config, generation.as_deref(), options)?;
    let json = read_small(&dir.join("tokenizer.json"), MAX_TOKENIZER_JSON_BYTES)?;
    let vocab_size = parsed.llama.vocab_size;
    let tokenizer =
        tokenizer_json::build(&json, "tokenizer.json", vocab_size, parsed.named.clone())?;
    let weights_path = dir.join("model.safetensors");
    if !weights_path.exists() && dir.join("model.safetensors.index.json").exists() {
        let reason = "weights split over several files are not read yet; merge them into one";
        return Err(LoadError::unsupported("model.safetensors.index.json", reason));
    }
    let file = safetensors::open(Source::open(&weights_path)?)?;
    let weights = network::read(&file, &parsed, options, progress)?;
    let name = dir
        .canonicalize()
        .ok()
        .and_then(|dir| dir.file_name().map(|name| name.to_string_lossy().into_owned()));
    Ok(finish(name, parsed.llama, (weights, tokenizer), options.kv_type, progress))
}

fn load_gguf(
    source: Source<'_>,
    name: Option<String>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel, LoadError> {
    let file = GgufFile::open(source)?;
    let parsed = file.config(options)?;
    let tokenizer = gguf_tokenizer::read(file.metadata(), parsed.llama.vocab_size, &parsed.named)?;
    let inner_name = file.metadata().text("general.name")?.map(str::to_owned);
    let weights = network::read(&file.into_tensors(), &parsed, options, progress)?;
    let name = name.or(inner_name);
    Ok(finish(name, parsed.llama, (weights, tokenizer), options.kv_type, progress))
}

fn finish(
    name: Option<String>,
    config: LlamaConfig,
    ((weights, converted), tokenizer): ((LlamaWeights, Vec<Converted>), Tokenizer),
    kv_type: KvType,
    progress: &mut dyn FnMut(LoadProgress),
) -> LoadedModel {
    let digest =
        ModelDigest::compute(&config, &weights, &tokenizer, kv_type, &mut |done, total| {
            progress(LoadProgress {
                stage: LoadStage::Digest,
                done_bytes: done,
                total_bytes: total,
            });
        });
    let name: String =
        name.unwrap_or_default().chars().filter(|c| !c.is_control()).take(MAX_NAME_CHARS).collect();
    let name = if name.is_empty() { UNNAMED.to_owned() } else { name };
    LoadedModel { name, config, weights, converted, tokenizer, kv_type, digest }
}
