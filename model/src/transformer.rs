//! Owns the Llama forward pass: a ragged batch and a KV pool in, logits out. Knows the network's
//! shape and the order of its operations; arithmetic is in `kernels/`, KV slots in `kv_pool.rs`.
//!
//! Row invariance comes from how this is put together: every operation below works on a row of
//! its own or reads KV through `attention.rs`, and every kernel fixes the order of its sums by the
//! model's lengths alone.

use std::sync::Arc;

use crate::attention::{Attention, AttentionScratch, RowPlace};
use crate::batch::RaggedBatch;
use crate::compute::{Compute, InputRows};
use crate::forward::{Forward, ForwardError, ForwardLimits, Logits};
use crate::ids::BlockId;
use crate::kernels::{self, Isa};
use crate::kv_pool::{KvPool, KvPoolOptions, KvType, Slot};
use crate::linear::{Product, multiply};
use crate::packed::{ModelError, PackedLayer, PackedLlama};
use crate::stage_times::{Stage, StageTimes};

/// How a [`Transformer`] runs. Nothing here can change an output bit, the type of keys and values
/// excepted.
#[derive(Clone, Copy, Debug)]
pub struct TransformerOptions {
    /// Blocks of the KV pool.
    pub num_blocks: usize,
    /// Threads of the kernel team, the caller included; 1 to 256, others are taken for the nearer.
    pub threads: usize,
    /// Implementation of the kernels; [`Isa::detect`] unless a test wants another.
    pub isa: Isa,
    /// Type of keys and values in the pool.
    pub kv_type: KvType,
}

/// A Llama network (RMSNorm, rotary embeddings, grouped-query attention, SwiGLU) with its KV pool.
#[derive(Debug)]
pub struct Transformer {
    model: Arc<PackedLlama>,
    pool: KvPool,
    compute: Compute,
    scratch: Scratch,
    times: StageTimes,
}

/// Room for the rows of a step, kept from step to step.
#[derive(Debug, Default)]
struct Scratch {
    places: Vec<RowPlace>,
    /// Residual stream, `[rows, hidden]`.
    hidden: Vec<f32>,
    /// What the next products read, `[rows, _]`.
    input: InputRows,
    /// What the down projection reads, `[rows, ffn]`.
    gated: InputRows,
    /// `[rows, num_heads, head_dim]`.
    queries: Vec<f32>,
    /// `[rows, num_kv_heads, head_dim]`.
    keys: Vec<f32>,
    /// `[rows, num_kv_heads, head_dim]`.
    values: Vec<f32>,
    /// Rows whose logits are asked for.
    wanted: Vec<usize>,
    attention: AttentionScratch,
}

impl Transformer {
    /// A network on shared weights with a KV pool and threads of its own.
    ///
    /// # Errors
    /// When the pool does not fit into memory or the system refuses a thread.
    pub fn new(model: Arc<PackedLlama>, options: TransformerOptions) -> Result<Self, ModelError> {
        let TransformerOptions { num_blocks, threads, isa, kv_type } = options;
        let pool = KvPool::new(model.config(), KvPoolOptions { num_blocks, kv_type, isa })
            .map_err(|bytes| ModelError::OutOfMemory { what: "the KV pool".to_owned(), bytes })?;
        let compute = Compute::new(isa, threads)?;
        let (scratch, times) = (Scratch::default(), StageTimes::default());
        Ok(Self { model, pool, compute, scratch, times })
    }

    /// See [`Compute::share_products_from`].
    pub fn share_products_from(&mut self, macs: usize) {
        self.compute.share_products_from(macs);
    }

    /// Threads of its team, the caller included.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.compute.num_threads()
    }

    /// See [`AttentionScratch::share_from`].
    pub fn share_attention_from(&mut self, macs: usize, partial_floats: usize) {
        self.scratch.attention.share_from(macs, partial_floats);
    }

    /// Forgets the times of stages and collects them from now on, or no more. For measurements.
    pub fn collect_stage_times(&mut self, is_on: bool) {
        self.times = StageTimes::new(is_on);
    }

    /// Times of the stages of all passes since collecting began.
    #[must_use]
    pub fn stage_times(&self) -> &StageTimes {
        &self.times
    }

    /// The weights it runs on.
    #[must_use]
    pub fn model(&self) -> &Arc<PackedLlama> {
        &self.model
    }

    /// Refuses a batch before anything is touched.
    fn check(&self, batch: &RaggedBatch) -> Result<(), ForwardError> {
        let ForwardLimits { vocab_size, context_len, num_blocks } = self.limits();
        for (row, &token) in batch.tokens().iter().enumerate() {
            if token.index() >= vocab_size {
                return Err(ForwardError::TokenOutOfRange { token: token.0, row, vocab_size });
            }
        }
        for segment in batch.segments() {
            let position = segment.start + segment.rows.len() - 1;
            if position >= context_len {
                return Err(ForwardError::PositionOutOfRange { position, context_len });
            }
            for &block in batch.block_table(segment) {
                if block.index() >= num_blocks {
                    return Err(ForwardError::BlockOutOfRange { block, num_blocks });
                }
            }
        }
        Ok(())
    }

    /// Looks tokens up and notes where every row stands and which rows want logits.
    fn begin(&mut self, batch: &RaggedBatch) {
        let hidden_len = self.model.config().hidden_len;
        let Scratch { places, hidden, wanted, .. } = &mut self.scratch;
        self.times.start();
        hidden.resize(batch.num_rows() * hidden_len, 0.0);
        for (&token, hidden) in batch.tokens().iter().zip(hidden.chunks_mut(hidden_len)) {
            self.model.embedding.read_row(token.index(), hidden);
        }
        self.times.end(Stage::Embedding);
        places.clear();
        wanted.clear();
        for (segment, part) in batch.segments().iter().enumerate() {
            let positions = part.start..part.start + part.rows.len();
            places.extend(positions.map(|position| RowPlace { segment, position }));
            wanted.extend(part.rows.start + part.logits_from..part.rows.end);
        }
    }

    /// Normalises all rows, projects them, rotates, and stores the KV of one layer.
    fn write_kv(&mut self, batch: &RaggedBatch, index: usize, layer: &PackedLayer) {
        let config = self.model.config();
        let Scratch { places, hidden, input, queries, keys, values, .. } = &mut self.scratch;
        let compute = &mut self.compute;
        let num_rows = places.len();
        self.times.start();
        norm_rows(compute, hidden, &layer.attention_norm, config.norm_eps, input);
        self.times.end(Stage::AttentionNorm);
        let (query_len, kv_len) = (config.query_len(), config.kv_len());
        queries.resize(num_rows * query_len, 0.0);
        keys.resize(num_rows * kv_len, 0.0);
        values.resize(num_rows * kv_len, 0.0);
        let products = [
            Product::store(&layer.query, queries),
            Product::store(&layer.key, keys),
            Product::store(&layer.value, values),
        ];
        multiply(compute, input, products);
        self.times.end(Stage::QueryKeyValue);
        for (row, place) in places.iter().enumerate() {
            let keys = &mut keys[row * kv_len..(row + 1) * kv_len];
            self.model.rope.rotate(place.position, &mut queries[row * query_len..][..query_len]);
            self.model.rope.rotate(place.position, keys);
            let table = batch.block_table(&batch.segments()[place.segment]);
            let values = &values[row * kv_len..(row + 1) * kv_len];
            self.pool.write(index, Slot::of(place.position, table), keys, values);
        }
        self.times.end(Stage::RopeAndKv);
    }

    /// Drops the rows that want no logits: behind the last layer's KV nobody reads them.
    fn keep_wanted(&mut self) {
        let config = self.model.config();
        let Scratch { places, hidden, queries, wanted, .. } = &mut self.scratch;
        for (to, &from) in wanted.iter().enumerate() {
            places[to] = places[from];
        }
        places.truncate(wanted.len());
        keep_rows(hidden, config.hidden_len, wanted);
        keep_rows(queries, config.query_len(), wanted);
    }

    /// The rest of a layer: attention and the feed-forward block.
    fn finish_layer(&mut self, batch: &RaggedBatch, index: usize, layer: &PackedLayer) {
        let config = self.model.config();
        let Scratch { places, hidden, input, gated, queries, attention, .. } = &mut self.scratch;
        let compute = &mut self.compute;
        let num_rows = places.len();
        let attention = Attention {
            isa: compute.isa(),
            pool: &self.pool,
            layer: index,
            batch,
            places,
            queries,
            head_dim: config.head_dim,
            group_len: config.group_len(),
            scratch: attention,
        };
        self.times.start();
        attention.run(compute.team(), input.write(num_rows, config.query_len()));
        self.times.end(Stage::Attention);
        multiply(compute, input, [Product::add(&layer.attention_output, hidden)]);
        self.times.end(Stage::AttentionOutput);
        norm_rows(compute, hidden, &layer.ffn_norm, config.norm_eps, input);
        self.times.end(Stage::FfnNorm);
        let out = gated.write(num_rows, config.ffn_len);
        multiply(compute, input, [Product::swiglu(&layer.gate, &layer.up, out)]);
        self.times.end(Stage::GateUp);
        multiply(compute, gated, [Product::add(&layer.down, hidden)]);
        self.times.end(Stage::Down);
    }

    /// Logits of the rows that are left.
    fn head(&mut self, logits: &mut Logits) {
        let config = self.model.config();
        let Scratch { places, hidden, input, wanted, .. } = &mut self.scratch;
        assert_eq!(places.len(), wanted.len(), "only rows that want logits are left");
        let out = logits.reset(places.len(), config.vocab_size);
        let compute = &mut self.compute;
        self.times.start();
        norm_rows(compute, hidden, &self.model.output_norm, config.norm_eps, input);
        self.times.end(Stage::OutputNorm);
        multiply(compute, input, [Product::store(self.model.output(), out)]);
        self.times.end(Stage::Head);
    }
}

impl Forward for Transformer {
    fn limits(&self) -> ForwardLimits {
        let config = self.model.config();
        ForwardLimits {
            vocab_size: config.vocab_size,
            context_len: config.context_len,
            num_blocks: self.pool.num_blocks(),
        }
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        self.check(batch)?;
        self.begin(batch);
        let model = Arc::clone(&self.model);
        for (index, layer) in model.layers.iter().enumerate() {
            self.write_kv(batch, index, layer);
            if index + 1 == model.layers.len() {
                self.keep_wanted();
            }
            if self.scratch.places.is_empty() {
                break; // the last layer, and nobody asked for logits
            }
            self.finish_layer(batch, index, layer);
        }
        self.head(logits);
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.pool.copy_block(from, to);
    }
}

/// RMSNorm of every row. `x` is `[rows, n]`, `weight` is `[n]`.
fn norm_rows(compute: &mut Compute, x: &[f32], weight: &[f32], eps: f32, out: &mut InputRows) {
    let (len, isa) = (weight.len(), compute.isa());
    let out = out.write(x.len() / len, len);
    compute.rows(out, len, len, |row, out| {
        kernels::rms_norm(isa, &x[row * len..(row + 1) * len], weight, eps, out);
    });
}

/// Moves the listed rows, in ascending order, to the front and drops the others.
fn keep_rows(data: &mut Vec<f32>, row_len: usize, rows: &[usize]) {
    for (to, &from) in rows.iter().enumerate() {
        data.copy_within(from * row_len..(from + 1) * row_len, to * row_len);
    }
    data.truncate(rows.len() * row_len);
}
