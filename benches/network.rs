//! Owns networks without an engine for benches of forward passes: which ones, loading them, the
//! batches they are given, and what a batch costs at least. Knows no tables.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kernels::peak::Mix;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, WeightFormat, load};
use slipstream_model::packed::PackedLlama;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_model::weights::{LlamaWeights, Matrix, MatrixData};
use slipstream_server::config::Quantize;

use crate::RUST_VERIFIER;
use crate::checkpoint::{Format, Shape, checkpoint, write};
use crate::roofline::Roofline;

/// Positions before the rows of every batch.
pub const CONTEXT_LEN: usize = 64;
/// Most rows of one sequence.
pub const ROWS_MAX: usize = 512;
/// Most sequences.
pub const SEQUENCES_MAX: usize = 16;

/// Blocks of the first sequence, which has as many rows as there may be.
const FIRST_BLOCKS: usize = (CONTEXT_LEN + ROWS_MAX).div_ceil(BLOCK_LEN);
/// Blocks of each other one, which has one row.
const OTHER_BLOCKS: usize = (CONTEXT_LEN + 1).div_ceil(BLOCK_LEN);

/// Which networks are measured, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct NetworkArgs {
    /// A GGUF file or directory, may be repeated [default: the embedded verifier, and random ones
    /// in TinyLlama's shape in Q8_0 and 4-bit]
    #[arg(long, value_name = "PATH")]
    pub model: Vec<PathBuf>,
    /// Format of the weights in memory
    #[arg(long, value_enum, default_value = "none")]
    pub quantize: Quantize,
    /// Threads [default: all cores]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Rounds; each runs every setting once
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// A short run: 3 rounds, and random networks of 68 million weights
    #[arg(long)]
    pub quick: bool,
}

impl NetworkArgs {
    /// Threads of the networks.
    #[must_use]
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores)
    }

    /// Rounds to measure.
    #[must_use]
    pub fn rounds(&self) -> usize {
        if self.quick { self.rounds.min(3) } else { self.rounds }
    }

    /// Calls `measure` with one network after the other; memory holds one at a time.
    ///
    /// # Errors
    /// When one cannot be made or loaded, and what `measure` returns.
    pub fn for_each(
        &self,
        mut measure: impl FnMut(Network) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for path in &self.model {
            measure(Network::load(path, self)?)?;
        }
        if !self.model.is_empty() {
            return Ok(());
        }
        measure(Network::load(Path::new(RUST_VERIFIER), self)?)?;
        let shape = if self.quick { Shape::Llama68M } else { Shape::TinyLlama };
        for format in [Format::Q8_0, Format::Q4_0] {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("random.gguf");
            write(checkpoint(shape, format), &path)?;
            let network = Network::load(&path, self)?;
            drop(folder);
            measure(network)?;
        }
        Ok(())
    }
}

/// A matrix as a pass uses it.
#[derive(Clone, Copy, Debug)]
struct Used {
    bytes: f64,
    macs_per_row: f64,
    mix: Mix,
    /// Whether only rows that want logits are multiplied with it.
    only_wanted: bool,
}

/// A network with KV of every sequence up to [`CONTEXT_LEN`].
pub struct Network {
    /// Name and size for headings.
    pub description: String,
    /// The network.
    pub transformer: Transformer,
    used: Vec<Used>,
    logits: Logits,
}

impl Network {
    fn load(path: &Path, args: &NetworkArgs) -> anyhow::Result<Self> {
        let format = match args.quantize {
            Quantize::None => None,
            Quantize::Q8_0 => Some(WeightFormat::Q8_0),
            Quantize::Q4 => Some(WeightFormat::Q4_0),
        };
        let options = LoadOptions { format, ..LoadOptions::default() };
        let model = load(ModelSource::Path(path.to_owned()), &options, &mut |_| {});
        let model = model.with_context(|| format!("cannot load {}", path.display()))?;
        let LoadedModel { name, config, weights, .. } = model;
        ensure!(
            config.context_len >= CONTEXT_LEN + SEQUENCES_MAX,
            "{name} has a context of {} only",
            config.context_len
        );
        let types: Vec<&str> = weights.bytes_by_type().into_keys().collect();
        let description = format!(
            "{name}: {:.1} million weights, {:.1} MiB in {}",
            weights.num_weights() as f64 / 1e6,
            weights.num_bytes() as f64 / 1_048_576.0,
            types.join(", ")
        );
        let used = used(&weights);
        let options = TransformerOptions {
            num_blocks: FIRST_BLOCKS + (SEQUENCES_MAX - 1) * OTHER_BLOCKS,
            threads: args.threads(),
            isa: Isa::detect(),
            kv_type: KvType::F32,
        };
        let packed = Arc::new(PackedLlama::pack(config, weights)?);
        let mut transformer = Transformer::new(packed, options)?;
        transformer.choose_sharing();
        let mut network = Self { description, transformer, used, logits: Logits::new() };
        network.pass(&network.context_batch())?;
        Ok(network)
    }

    /// All sequences up to where the batches begin.
    fn context_batch(&self) -> RaggedBatch {
        let mut batch = RaggedBatch::new();
        for sequence in 0..SEQUENCES_MAX {
            self.push(&mut batch, sequence, 0..CONTEXT_LEN, CONTEXT_LEN);
        }
        batch
    }

    /// Appends positions of one sequence; rows before `logits_from` want no logits.
    fn push(
        &self,
        batch: &mut RaggedBatch,
        sequence: usize,
        positions: std::ops::Range<usize>,
        logits_from: usize,
    ) {
        let vocab_size = self.transformer.limits().vocab_size;
        let token = |position| TokenId(((position * 40_503 + sequence * 7) % vocab_size) as u32);
        let tokens: Vec<TokenId> = positions.clone().map(token).collect();
        let blocks = match sequence {
            0 => 0..FIRST_BLOCKS,
            _ => {
                let first = FIRST_BLOCKS + (sequence - 1) * OTHER_BLOCKS;
                first..first + OTHER_BLOCKS
            }
        };
        let blocks: Vec<BlockId> = blocks.map(|block| BlockId(block as u32)).collect();
        let owner = sequence as u64;
        let (tokens, block_table) = (&tokens, &blocks);
        let start = positions.start;
        batch.push(SegmentInput { tokens, start, block_table, logits_from, owner, scope: 0 });
    }

    /// A batch of such rows; `None` when the network's context is too short for it.
    #[must_use]
    pub fn batch(&self, rows: Rows) -> Option<RaggedBatch> {
        let mut batch = RaggedBatch::new();
        let positions = |num: usize| CONTEXT_LEN..CONTEXT_LEN + num;
        match rows {
            Rows::One(num) => self.push(&mut batch, 0, positions(num), 0),
            Rows::Prompt(num) => self.push(&mut batch, 0, positions(num), num - 1),
            Rows::Each(num) => {
                for sequence in 0..num {
                    self.push(&mut batch, sequence, positions(1), 0);
                }
            }
        }
        let end = batch.segments().iter().map(|segment| segment.start + segment.rows.len()).max();
        end.is_some_and(|end| end <= self.transformer.limits().context_len).then_some(batch)
    }

    /// One pass; its milliseconds.
    ///
    /// # Errors
    /// When the network refuses the batch.
    pub fn pass(&mut self, batch: &RaggedBatch) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.transformer.forward(batch, &mut self.logits)?;
        Ok(start.elapsed().as_nanos() as f64 / 1e6)
    }

    /// Logits of the last pass.
    #[must_use]
    pub fn logits(&self) -> &Logits {
        &self.logits
    }

    /// Least milliseconds to read the weights, and to multiply a batch with them. Attention is not
    /// counted: its share is small at [`CONTEXT_LEN`].
    ///
    /// # Errors
    /// When the implementation of the kernels has no measured peak.
    pub fn least_ms(&self, roofline: &Roofline, batch: &RaggedBatch) -> anyhow::Result<[f64; 2]> {
        let bytes: f64 = self.used.iter().map(|used| used.bytes).sum();
        let mut macs_ms = 0.0;
        for Used { macs_per_row, mix, only_wanted, .. } in &self.used {
            let rows = if *only_wanted { batch.num_logit_rows() } else { batch.num_rows() };
            macs_ms += roofline.macs_ms(Isa::detect(), *mix, macs_per_row * rows as f64)?;
        }
        Ok([roofline.read_ms(bytes), macs_ms])
    }
}

/// The matrices that a pass multiplies with: all but an embedding that is no output projection.
fn used(weights: &LlamaWeights) -> Vec<Used> {
    let one = |matrix: &Matrix, only_wanted: bool| Used {
        bytes: matrix.data.num_bytes() as f64,
        macs_per_row: (matrix.in_len * matrix.out_len) as f64,
        mix: match &matrix.data {
            MatrixData::Q8_0 { .. } => Mix::Q8_0,
            MatrixData::Q4_0 { .. } => Mix::Q4_0,
            MatrixData::F32(_) | MatrixData::F16(_) | MatrixData::Bf16(_) => Mix::Floats,
        },
        only_wanted,
    };
    let mut all = vec![one(weights.output.as_ref().unwrap_or(&weights.embedding), true)];
    for (index, layer) in weights.layers.iter().enumerate() {
        let is_last = index + 1 == weights.layers.len();
        all.extend([&layer.query, &layer.key, &layer.value].map(|matrix| one(matrix, false)));
        let behind = [&layer.attention_output, &layer.gate, &layer.up, &layer.down];
        all.extend(behind.map(|matrix| one(matrix, is_last)));
    }
    all
}

/// What a batch holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// So many rows of one sequence; each wants logits: a token and its proposals.
    One(usize),
    /// One row of each of so many sequences, at most [`SEQUENCES_MAX`].
    Each(usize),
    /// So many rows of one sequence; the last one wants logits.
    Prompt(usize),
}

impl Rows {
    /// What tables call it.
    #[must_use]
    pub fn label(self) -> String {
        match self {
            Self::One(num) => format!("{num} of one"),
            Self::Each(num) => format!("1 of each of {num}"),
            Self::Prompt(num) => format!("prompt of {num}"),
        }
    }
}
