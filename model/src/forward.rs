//! Owns the seam between engine and networks: a ragged batch goes in, logits come out. Knows no
//! requests and no policy. The transformer implements it; in simulation a hash LM does.

use crate::batch::RaggedBatch;
use crate::ids::BlockId;

/// Why a forward pass could not be computed. The engine treats it as a fault of the whole batch.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A token id is not in the vocabulary.
    #[error("token id {token} at row {row} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The offending id.
        token: u32,
        /// Its row in the batch.
        row: usize,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A block id is not in the pool.
    #[error("block {} is outside the KV pool of {num_blocks} blocks", block.0)]
    BlockOutOfRange {
        /// The offending block.
        block: BlockId,
        /// Size of the pool in blocks.
        num_blocks: usize,
    },
    /// A row lies past the positions the model was loaded for.
    #[error("position {position} lies past the context of {context_len}")]
    PositionOutOfRange {
        /// The offending absolute position.
        position: usize,
        /// Context limit the model was loaded with.
        context_len: usize,
    },
    /// The computation itself failed (simulated failures; later, devices).
    #[error("forward pass failed: {0}")]
    Failed(String),
}

/// Sizes that a caller of [`Forward`] must respect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardLimits {
    /// Columns of a logits row.
    pub vocab_size: usize,
    /// Positions `0 .. context_len` are valid.
    pub context_len: usize,
    /// Blocks in the KV pool that this network owns.
    pub num_blocks: usize,
}

/// Logits of the rows that asked for them, `[logit_rows, vocab]`. Reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    vocab_size: usize,
    data: Vec<f32>,
}

impl Logits {
    /// An empty buffer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `rows` rows of `vocab_size` columns and returns them, to be overwritten: what
    /// is there before is arbitrary.
    pub fn reset(&mut self, rows: usize, vocab_size: usize) -> &mut [f32] {
        self.vocab_size = vocab_size;
        self.data.resize(rows * vocab_size, 0.0);
        &mut self.data
    }

    /// One row, `[vocab]`.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.vocab_size..(row + 1) * self.vocab_size]
    }

    /// One row for writing, `[vocab]`. Fault injection in tests uses it.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.vocab_size..(row + 1) * self.vocab_size]
    }

    /// Number of rows held.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.data.len().checked_div(self.vocab_size).unwrap_or(0)
    }
}

/// A network with its own KV pool.
///
/// Contract (row invariance): the bits of one row's logits depend only on the tokens of its
/// sequence up to that row; never on the other rows, on chunking, on block placement, on what
/// the blocks held before, or on the number of threads.
pub trait Forward: Send {
    /// Sizes to respect.
    fn limits(&self) -> ForwardLimits;

    /// Writes KV for every row and logits for the rows that ask for them, in batch order.
    ///
    /// # Errors
    /// Any [`ForwardError`]; KV of the batch's rows is then undefined.
    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError>;

    /// Copies all keys and values of block `from` to block `to`, so that a sequence can go on in a
    /// block of its own behind a beginning that it shares. Both must lie in the pool.
    fn copy_block(&mut self, from: BlockId, to: BlockId);
}
