//! Owns a pair of models whose draft is constructed: loading both, and the engine that runs them.
//! Knows no tables.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_model::clock::Clock;
use slipstream_model::ids::{BLOCK_LEN, DraftEpoch, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, WeightFormat, load};
use slipstream_model::packed::PackedLlama;
use slipstream_model::tokenizer::Tokenizer;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};

use crate::constructed_draft::{Overruled, Script};

/// How a pair runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairOptions {
    /// Threads of each network.
    pub threads: usize,
    /// Positions of the KV pools, over all sequences.
    pub positions: usize,
    /// Format of the weights in memory; `None` as in the files.
    pub format: Option<WeightFormat>,
}

impl Default for PairOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, positions: 8192, format: None }
    }
}

/// A loaded model.
struct Loaded {
    name: String,
    num_weights: usize,
    weight_bytes: usize,
    network: Arc<PackedLlama>,
    tokenizer: Tokenizer,
}

/// A verifier and the network that a constructed draft runs.
pub struct Pair {
    verifier: Loaded,
    draft: Loaded,
}

impl Loaded {
    fn load(path: &Path, options: &PairOptions) -> anyhow::Result<Self> {
        let load_options = LoadOptions { format: options.format, ..LoadOptions::default() };
        let model = load(ModelSource::Path(path.to_owned()), &load_options, &mut |_| {});
        let model = model.with_context(|| format!("cannot load {}", path.display()))?;
        let LoadedModel { name, config, weights, tokenizer, .. } = model;
        let (num_weights, weight_bytes) = (weights.num_weights(), weights.num_bytes());
        let network = Arc::new(PackedLlama::pack(config, weights)?);
        Ok(Self { name, num_weights, weight_bytes, network, tokenizer })
    }

    fn transformer(&self, options: &PairOptions) -> anyhow::Result<Box<Transformer>> {
        let options = TransformerOptions {
            num_blocks: options.positions.div_ceil(BLOCK_LEN),
            threads: options.threads,
            isa: Isa::detect(),
            kv_type: KvType::F32,
        };
        let mut transformer = Transformer::new(Arc::clone(&self.network), options)?;
        transformer.choose_sharing();
        Ok(Box::new(transformer))
    }

    fn describe(&self) -> String {
        let (millions, mib) =
            (self.num_weights as f64 / 1e6, self.weight_bytes as f64 / 1_048_576.0);
        format!("{}, {millions:.1} million weights, {mib:.1} MiB", self.name)
    }
}

impl Pair {
    /// Loads both.
    ///
    /// # Errors
    /// When a file cannot be loaded or the vocabularies differ.
    pub fn load(verifier: &Path, draft: &Path, options: &PairOptions) -> anyhow::Result<Self> {
        let verifier = Loaded::load(verifier, options)?;
        let draft = Loaded::load(draft, options)?;
        let same = verifier.tokenizer.fingerprint() == draft.tokenizer.fingerprint();
        ensure!(same, "{} and {} have different vocabularies", verifier.name, draft.name);
        Ok(Self { verifier, draft })
    }

    /// Name and size of the verifier, then of the draft.
    #[must_use]
    pub fn describe(&self) -> [String; 2] {
        [self.verifier.describe(), self.draft.describe()]
    }

    /// Texts as tokens.
    ///
    /// # Errors
    /// When the vocabulary cannot spell one.
    pub fn prompts(&self, texts: &[&str]) -> anyhow::Result<Vec<Vec<TokenId>>> {
        let encode = |text: &&str| self.verifier.tokenizer.encode(text, true);
        texts.iter().map(encode).collect::<Result<_, _>>().context("tokenising a prompt")
    }

    /// An engine on both, whose draft does what `script` says.
    ///
    /// # Errors
    /// When the KV pools do not fit into memory or a thread is refused.
    pub fn engine(
        &self,
        options: &PairOptions,
        script: &Script,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Engine> {
        let draft = Overruled::new(self.draft.transformer(options)?, script.clone());
        let proposer_options = ModelProposerOptions {
            target_vocab_size: self.verifier.network.config().vocab_size,
            ..ModelProposerOptions::default()
        };
        let proposer = ModelProposer::new(Box::new(draft), DraftEpoch(1), proposer_options);
        Ok(Engine::new(EngineParts {
            config: EngineConfig::default(),
            verifier: self.verifier.transformer(options)?,
            proposer: Some(Box::new(proposer)),
            token_bytes: self.verifier.tokenizer.token_bytes(),
            clock,
            cache_key: [7; 32],
        }))
    }
}
