//! Owns the Llama forward pass: a ragged batch and a KV pool in, logits out. Knows the network's
//! shape and the order of its operations; arithmetic is in `kernels/`, KV slots in `kv_pool.rs`.
//!
//! Row invariance comes from how this is put together: every operation below works on a row of
//! its own or reads KV through `attention.rs`, and every kernel fixes the order of its sums by the
//! model's lengths alone.

use std::sync::Arc;

use crate::attention::{Attention, AttentionScratch, RowPlace};
use crate::batch::RaggedBatch;
use crate::forward::{Forward, ForwardError, ForwardLimits, Logits};
use crate::kernels::{self, Isa};
use crate::kv_pool::{KvPool, KvPoolOptions, KvType, Slot};
use crate::linear::{Compute, InputRows, Linear};
use crate::packed::{ModelError, PackedLayer, PackedLlama};

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
}

/// Room for the rows of a step, kept from step to step.
#[derive(Debug, Default)]
struct Scratch {
    places: Vec<RowPlace>,
    /// Residual stream, `[rows, hidden]`.
    hidden: Vec<f32>,
    /// What the next products read, `[rows, _]`.
    input: InputRows,
    /// `[rows, num_heads, head_dim]`.
    queries: Vec<f32>,
    /// `[rows, num_kv_heads, head_dim]`.
    keys: Vec<f32>,
    /// `[rows, num_kv_heads, head_dim]`.
    values: Vec<f32>,
    /// `[rows, ffn]`.
    gate: Vec<f32>,
    /// `[rows, ffn]`.
    up: Vec<f32>,
    /// What a block adds to the residual stream, `[rows, hidden]`.
    update: Vec<f32>,
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
        Ok(Self { model, pool, compute, scratch: Scratch::default() })
    }

    /// See [`Compute::share_products_from`].
    pub fn share_products_from(&mut self, macs: usize) {
        self.compute.share_products_from(macs);
    }

    /// See [`AttentionScratch::share_from`].
    pub fn share_attention_from(&mut self, macs: usize, partial_floats: usize) {
        self.scratch.attention.share_from(macs, partial_floats);
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

    /// Looks tokens up and notes where every row stands.
    fn begin(&mut self, batch: &RaggedBatch) {
        let hidden_len = self.model.config().hidden_len;
        let scratch = &mut self.scratch;
        scratch.hidden.resize(batch.num_rows() * hidden_len, 0.0);
        for (&token, hidden) in batch.tokens().iter().zip(scratch.hidden.chunks_mut(hidden_len)) {
            self.model.embedding.read_row(token.index(), hidden);
        }
        scratch.places.clear();
        for (segment, part) in batch.segments().iter().enumerate() {
            let positions = part.start..part.start + part.rows.len();
            let places = positions.map(|position| RowPlace { segment, position });
            scratch.places.extend(places);
        }
    }

    /// Attention block of one layer: normalises, projects, rotates, stores KV of all rows, attends.
    fn attend(&mut self, batch: &RaggedBatch, index: usize, layer: &PackedLayer) {
        let config = self.model.config();
        let num_rows = batch.num_rows();
        let Scratch { places, hidden, input, queries, keys, values, update, attention, .. } =
            &mut self.scratch;
        let compute = &mut self.compute;
        let eps = config.norm_eps;
        let normed = input.write(num_rows, config.hidden_len);
        norm_rows(compute.isa, hidden, &layer.attention_norm, eps, normed);
        project(compute, &layer.query, input, queries, num_rows);
        project(compute, &layer.key, input, keys, num_rows);
        project(compute, &layer.value, input, values, num_rows);
        let (query_len, kv_len) = (config.query_len(), config.kv_len());
        for (row, place) in places.iter().enumerate() {
            let keys = &mut keys[row * kv_len..(row + 1) * kv_len];
            self.model.rope.rotate(place.position, &mut queries[row * query_len..][..query_len]);
            self.model.rope.rotate(place.position, keys);
            let table = batch.block_table(&batch.segments()[place.segment]);
            let values = &values[row * kv_len..(row + 1) * kv_len];
            self.pool.write(index, Slot::of(place.position, table), keys, values);
        }
        let attention = Attention {
            isa: compute.isa,
            pool: &self.pool,
            layer: index,
            batch,
            places,
            queries,
            head_dim: config.head_dim,
            group_len: config.group_len(),
            scratch: attention,
        };
        attention.run(&mut compute.team, input.write(num_rows, query_len));
        project(compute, &layer.attention_output, input, update, num_rows);
        add(hidden, update);
    }

    /// Feed-forward block of one layer.
    fn feed_forward(&mut self, num_rows: usize, layer: &PackedLayer) {
        let config = self.model.config();
        let Scratch { hidden, input, gate, up, update, .. } = &mut self.scratch;
        let compute = &mut self.compute;
        let normed = input.write(num_rows, config.hidden_len);
        norm_rows(compute.isa, hidden, &layer.ffn_norm, config.norm_eps, normed);
        project(compute, &layer.gate, input, gate, num_rows);
        project(compute, &layer.up, input, up, num_rows);
        kernels::swiglu(compute.isa, gate, up);
        input.write(num_rows, config.ffn_len).copy_from_slice(gate);
        project(compute, &layer.down, input, update, num_rows);
        add(hidden, update);
    }

    /// Logits of the rows that ask for them.
    fn head(&mut self, batch: &RaggedBatch, logits: &mut Logits) {
        let config = self.model.config();
        let num_rows = batch.num_logit_rows();
        let out = logits.reset(num_rows, config.vocab_size);
        let hidden_len = config.hidden_len;
        let wanted = batch.segments().iter();
        let mut rows =
            wanted.flat_map(|segment| segment.rows.start + segment.logits_from..segment.rows.end);
        let input = &mut self.scratch.input;
        let isa = self.compute.isa;
        for normed in input.write(num_rows, hidden_len).chunks_exact_mut(hidden_len) {
            let row = rows.next().expect("the batch counts the rows it lists");
            let hidden = &self.scratch.hidden[row * hidden_len..(row + 1) * hidden_len];
            kernels::rms_norm(isa, hidden, &self.model.output_norm, config.norm_eps, normed);
        }
        self.model.output().apply(&mut self.compute, input, out);
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
            self.attend(batch, index, layer);
            self.feed_forward(batch.num_rows(), layer);
        }
        self.head(batch, logits);
        Ok(())
    }
}

/// `out = matrix * input`, with `out` resized to `[rows, out_len]`.
fn project(
    compute: &mut Compute,
    matrix: &Linear,
    input: &mut InputRows,
    out: &mut Vec<f32>,
    num_rows: usize,
) {
    out.resize(num_rows * matrix.out_len(), 0.0);
    matrix.apply(compute, input, out);
}

/// RMSNorm of every row. `x` and `out` are `[rows, n]`, `weight` is `[n]`.
fn norm_rows(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        kernels::rms_norm(isa, x, weight, eps, out);
    }
}

/// Adds to the residual stream; both `[rows, hidden]`.
fn add(hidden: &mut [f32], update: &[f32]) {
    for (hidden, update) in hidden.iter_mut().zip(update) {
        *hidden += update;
    }
}
