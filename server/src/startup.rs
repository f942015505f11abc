//! Owns the way from settings to a running engine: load, check that draft and verifier belong
//! together, start the thread. Knows no network; what the KV pools take is in `kv_budget.rs`.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_draft::proposer::Proposer;
use slipstream_model::clock::Clock;
use slipstream_model::config::LlamaConfig;
use slipstream_model::forward::{Forward, ForwardError};
use slipstream_model::ids::{BLOCK_LEN, DraftEpoch};
use slipstream_model::kernels::{Isa, NUMERICS_VERSION};
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{
    LoadError, LoadOptions, LoadProgress, LoadStage, LoadedModel, ModelSource, WeightFormat, load,
};
use slipstream_model::packed::{ModelError, PackedLlama};
use slipstream_model::tokenizer::Tokenizer;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_model::weights::LlamaWeights;

use crate::backend::Backend;
use crate::config::{
    Config, ConfigError, EdgeConfig, KvPrecision, ModelChoice, ModelConfig, ModelFlags, Quantize,
};
use crate::embedded;
use crate::engine::runner::{self, EngineThread};
use crate::engine::{Engine, EngineParts};
use crate::grpc::served::{ServedDraft, ServedModel};
use crate::handle::EngineHandle;
use crate::kv_budget::KvBudget;
use crate::metrics::Metrics;
use crate::metrics::process::ProcessReading;
use crate::stage;

/// Epoch of the draft that the server starts with.
const FIRST_EPOCH: DraftEpoch = DraftEpoch(1);
/// What messages call the models.
const VERIFIER: &str = "verifier";
/// What messages call the models.
const DRAFT: &str = "draft";
/// How often loading reports.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// A model could not be loaded.
    #[error("cannot load the {role} from {from}: {source} (chosen by --{flag})")]
    Load {
        /// Verifier or draft.
        role: &'static str,
        /// The flag that chooses it.
        flag: &'static str,
        /// The path, or that it is the embedded one.
        from: String,
        /// What is wrong.
        source: LoadError,
    },
    /// Draft and verifier mean different things by the same ids.
    #[error(
        "the draft {draft:?} has another vocabulary than the verifier {verifier:?} (fingerprints \
         {draft_fingerprint} and {verifier_fingerprint}): choose a draft with the verifier's \
         tokenizer, or --draft-model none"
    )]
    Vocabulary {
        /// The draft's name.
        draft: String,
        /// The verifier's name.
        verifier: String,
        /// Identity of the draft's vocabulary.
        draft_fingerprint: String,
        /// Identity of the verifier's vocabulary.
        verifier_fingerprint: String,
    },
    /// The KV pools would hold next to nothing, or more than there are ids for.
    #[error(
        "the KV pools would have {blocks} blocks, each {block_bytes} bytes for verifier and draft \
         together; they need 1 to {limit}: change --kv-memory or --kv-blocks"
    )]
    KvPool {
        /// Blocks that the settings give.
        blocks: u64,
        /// Memory of one block in both.
        block_bytes: u64,
        /// Most blocks.
        limit: u64,
    },
    /// A loaded model cannot be computed.
    #[error("the {role} cannot be computed: {source}")]
    Model {
        /// Verifier or draft.
        role: &'static str,
        /// What is wrong.
        source: ModelError,
    },
    /// The verifier cannot compute a row.
    #[error("the verifier fails at its first rows: {0}")]
    Rehearsal(#[source] ForwardError),
    /// The operating system gives no random numbers.
    #[error("the operating system gives no random numbers")]
    NoRandomness,
    /// The engine thread could not be started.
    #[error("cannot start the engine thread: {0}")]
    Thread(#[from] io::Error),
}

/// A loaded pair with its engine, on no thread yet. Benches drive the engine directly.
pub struct Assembly {
    /// The engine.
    pub engine: Engine,
    /// What the edge knows of the verifier.
    served: ServedModel,
    /// The verifier's, then the draft's if there is one.
    sizes: Vec<ModelSize>,
}

/// How large a loaded model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSize {
    /// The model's own name.
    pub name: String,
    /// Numbers altogether.
    pub num_weights: usize,
    /// Their memory in the format they are computed in.
    pub weight_bytes: usize,
}

impl ModelSize {
    fn of(model: &LoadedModel) -> Self {
        let weights = &model.weights;
        Self {
            name: model.name.clone(),
            num_weights: weights.num_weights(),
            weight_bytes: weights.num_bytes(),
        }
    }
}

impl Assembly {
    /// How large the models are: the verifier, then the draft if there is one.
    #[must_use]
    pub fn sizes(&self) -> &[ModelSize] {
        &self.sizes
    }

    /// The verifier's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.served.tokenizer
    }

    /// Starts the engine on a thread of its own, counted as in a server, with no network. For
    /// benches that compare with one. `clock` and `requests_max` as it was assembled with.
    ///
    /// # Errors
    /// When the operating system refuses the thread.
    pub fn spawn(
        self,
        clock: &Arc<dyn Clock>,
        requests_max: usize,
    ) -> io::Result<(EngineHandle, EngineThread)> {
        let (_stage, stages) = stage::channel();
        let recorder = Metrics::new(clock, stages).engine_starts(self.served.to_name());
        runner::spawn(self.engine, requests_max, recorder)
    }
}

/// What is put around the verifier before the engine gets it. Servers put nothing there; tests let
/// it fail.
pub type Around = Box<dyn FnOnce(Box<dyn Forward>) -> Box<dyn Forward> + Send>;

/// Loads the models and starts the engine. Takes as long as reading the files does.
///
/// # Errors
/// [`StartupError`] says what to change.
pub(crate) fn start(
    config: &Config,
    clock: Arc<dyn Clock>,
    metrics: &Metrics,
    around: Around,
) -> Result<(Backend, EngineThread), StartupError> {
    let assembly = assemble_around(config, Arc::clone(&clock), around)?;
    let Assembly { engine, served, sizes: _ } = assembly;
    let recorder = metrics.engine_starts(served.to_name());
    let (engine, thread) = runner::spawn(engine, config.requests_max(), recorder)?;
    Ok((Backend { model: Arc::new(served), engine, clock }, thread))
}

/// Loads the models and builds the engine.
///
/// # Errors
/// [`StartupError`] says what to change.
pub fn assemble(config: &Config, clock: Arc<dyn Clock>) -> Result<Assembly, StartupError> {
    assemble_around(config, clock, Box::new(|verifier| verifier))
}

fn assemble_around(
    config: &Config,
    clock: Arc<dyn Clock>,
    around: Around,
) -> Result<Assembly, StartupError> {
    let models = &config.models;
    let begun = Instant::now();
    let verifier = load_model(VERIFIER, &models.verifier, models)?;
    let draft = match &models.draft {
        Some(choice) => Some(load_model(DRAFT, choice, models)?),
        None => None,
    };
    if let Some(draft) = &draft {
        check_vocabulary(draft, &verifier)?;
    }
    let kv = KvBudget::new(models.kv, &verifier, draft.as_ref(), config.engine.max_running)?;
    let num_blocks = kv.num_blocks;
    log_sizes(&verifier, draft.as_ref());
    kv.log();
    let sizes = std::iter::once(&verifier).chain(&draft).map(ModelSize::of).collect();
    let options = ModelProposerOptions {
        target_vocab_size: verifier.config.vocab_size,
        ..ModelProposerOptions::default()
    };
    let served_draft =
        draft.as_ref().map(|draft| ServedDraft { name: draft.name.clone(), epoch: FIRST_EPOCH });
    let proposer = match draft {
        Some(draft) => Some(proposer(draft, num_blocks, models.threads, options)?),
        None => None,
    };
    let (mut served, transformer) = served(config, verifier, num_blocks)?;
    served.draft = served_draft;
    let mut engine = Engine::new(EngineParts {
        config: config.engine,
        verifier: around(Box::new(transformer)),
        proposer,
        token_bytes: served.tokenizer.token_bytes(),
        clock,
        cache_key: cache_key()?,
    });
    engine.rehearse().map_err(StartupError::Rehearsal)?;
    log_ready(begun.elapsed());
    Ok(Assembly { engine, served, sizes })
}

/// A secret from the operating system.
fn cache_key() -> Result<[u8; 32], StartupError> {
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|_| StartupError::NoRandomness)?;
    Ok(key)
}

/// The verifier, split into what the edge and what the engine needs.
fn served(
    config: &Config,
    model: LoadedModel,
    num_blocks: usize,
) -> Result<(ServedModel, Transformer), StartupError> {
    let LoadedModel { name, config: facts, weights, converted: _, tokenizer, kv_type, digest } =
        model;
    let served = ServedModel {
        name: config.models.name.clone().unwrap_or(name),
        fingerprint: format!("n{NUMERICS_VERSION}-{digest}"),
        vocabulary_fingerprint: short_hex(&tokenizer.fingerprint()),
        tokenizer,
        vocab_size: facts.vocab_size,
        context_len: facts.context_len.min(num_blocks * BLOCK_LEN),
        model_context_len: facts.context_len,
        eos_ids: facts.eos_ids.clone(),
        draft_len_max: config.engine.draft_len_max,
        draft: None,
    };
    let threads = config.models.threads;
    let options = TransformerOptions { num_blocks, threads, isa: Isa::detect(), kv_type };
    let transformer = transformer(VERIFIER, facts, weights, options)
        .map_err(|source| StartupError::Model { role: VERIFIER, source })?;
    Ok((served, transformer))
}

fn proposer(
    model: LoadedModel,
    num_blocks: usize,
    threads: usize,
    options: ModelProposerOptions,
) -> Result<Box<dyn Proposer>, StartupError> {
    let run =
        TransformerOptions { num_blocks, threads, isa: Isa::detect(), kv_type: model.kv_type };
    let transformer = transformer(DRAFT, model.config, model.weights, run)
        .map_err(|source| StartupError::Model { role: DRAFT, source })?;
    Ok(Box::new(ModelProposer::new(Box::new(transformer), FIRST_EPOCH, options)))
}

fn transformer(
    role: &'static str,
    config: LlamaConfig,
    weights: LlamaWeights,
    options: TransformerOptions,
) -> Result<Transformer, ModelError> {
    let packed = Arc::new(PackedLlama::pack(config, weights)?);
    let mut transformer = Transformer::new(packed, options)?;
    let sharing = transformer.choose_sharing();
    tracing::debug!(role, ?sharing, "chose which products the threads share");
    Ok(transformer)
}

fn load_model(
    role: &'static str,
    choice: &ModelChoice,
    config: &ModelConfig,
) -> Result<LoadedModel, StartupError> {
    let quantize = if role == DRAFT { config.draft_quantize } else { config.quantize };
    let bytes = if role == DRAFT { embedded::DRAFT } else { embedded::VERIFIER };
    let (source, from) = source_of(choice, bytes);
    let options = LoadOptions {
        context_limit: config.context_limit,
        format: match quantize {
            Quantize::None => None,
            Quantize::Q8_0 => Some(WeightFormat::Q8_0),
            Quantize::Q4 => Some(WeightFormat::Q4_0),
        },
        kv_type: match config.kv_type {
            KvPrecision::F32 => KvType::F32,
            KvPrecision::F16 => KvType::F16,
        },
        memory_budget_bytes: config.load_memory_bytes,
    };
    tracing::info!(role, from, "loading");
    let flag = if role == DRAFT { "draft-model" } else { "model" };
    let begun = Instant::now();
    let mut reporter = Reporter { role, last: begun };
    let model = load(source, &options, &mut |progress| reporter.report(progress))
        .map_err(|source| StartupError::Load { role, flag, from, source })?;
    log_loaded(role, &model, begun.elapsed());
    Ok(model)
}

/// Where the model of `choice` is read from, and what messages call it.
fn source_of(choice: &ModelChoice, embedded: &'static [u8]) -> (ModelSource, String) {
    match choice {
        ModelChoice::Path(path) => (ModelSource::Path(path.clone()), path.display().to_string()),
        ModelChoice::Embedded => (ModelSource::GgufBytes(embedded), "this binary".to_owned()),
    }
}

/// Where the verifier of these flags is read from, and what messages call it.
///
/// # Errors
/// [`ConfigError`] for flags that cannot be used.
pub(crate) fn model_source(flags: &ModelFlags) -> Result<(ModelSource, String), ConfigError> {
    let config = Config::new(flags, EdgeConfig::default())?;
    Ok(source_of(&config.models.verifier, embedded::VERIFIER))
}

/// Tells the log how far loading is, now and then.
struct Reporter {
    role: &'static str,
    last: Instant,
}

impl Reporter {
    fn report(&mut self, progress: LoadProgress) {
        if self.last.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        self.last = Instant::now();
        let stage = match progress.stage {
            LoadStage::Weights => "reading",
            LoadStage::Digest => "hashing",
        };
        let percent = progress.done_bytes * 100 / progress.total_bytes.max(1);
        tracing::info!(
            target: "slipstream_progress",
            role = self.role,
            percent,
            "{stage}"
        );
    }
}

fn check_vocabulary(draft: &LoadedModel, verifier: &LoadedModel) -> Result<(), StartupError> {
    let (ours, theirs) = (verifier.tokenizer.fingerprint(), draft.tokenizer.fingerprint());
    if ours == theirs {
        return Ok(());
    }
    Err(StartupError::Vocabulary {
        draft: draft.name.clone(),
        verifier: verifier.name.clone(),
        draft_fingerprint: short_hex(&theirs),
        verifier_fingerprint: short_hex(&ours),
    })
}

/// The first eight bytes in hexadecimal: enough to tell two apart.
fn short_hex(bytes: &[u8; 32]) -> String {
    bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What one model has become in memory: how much of each format, and what was converted to it.
fn log_loaded(role: &'static str, model: &LoadedModel, took: Duration) {
    let of_type = |(name, bytes): (&str, usize)| format!("{name} {:.1} MiB", mib(bytes as u64));
    let weights: Vec<_> = model.weights.bytes_by_type().into_iter().map(of_type).collect();
    let converted: Vec<_> = model.converted.iter().map(ToString::to_string).collect();
    let converted = if converted.is_empty() { "nothing".to_owned() } else { converted.join(", ") };
    tracing::info!(
        role,
        model = model.name,
        weights = weights.join(", "),
        converted,
        load_ms = took.as_millis() as u64,
        "loaded"
    );
}

/// What all of it took, packing for the kernels and the KV pool included.
fn log_ready(took: Duration) {
    let resident = ProcessReading::take().resident_bytes;
    tracing::info!(
        ready_ms = took.as_millis() as u64,
        resident_mib = resident.map(|bytes| bytes >> 20),
        "models in memory"
    );
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn log_sizes(verifier: &LoadedModel, draft: Option<&LoadedModel>) {
    tracing::info!(
        verifier = verifier.name,
        draft = draft.map_or("none", |draft| draft.name.as_str()),
        vocab = verifier.config.vocab_size,
        context_positions = verifier.config.context_len,
        isa = Isa::detect().name(),
        kv_type = verifier.kv_type.name(),
        digest = %verifier.digest,
        "models loaded"
    );
}
