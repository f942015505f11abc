//! Owns the ragged batch: the rows of all sequences of one forward pass, concatenated and never
//! padded. Knows token ids, positions and block ids; knows no requests, no tensors and no policy.

use std::ops::Range;

use crate::ids::{BLOCK_LEN, BlockId, TokenId};

/// Consecutive rows of one sequence inside a [`RaggedBatch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the batch that belong to this segment.
    pub rows: Range<usize>,
    /// Absolute position of the first row in its sequence.
    pub start: usize,
    /// Where the sequence's block table lies in the batch's block ids. It covers positions
    /// `0 .. start + rows.len()` at least.
    pub blocks: Range<usize>,
    /// Rows of this segment from this offset on produce logits; `rows.len()` means none do.
    pub logits_from: usize,
    /// Whose KV this is. Real models ignore it; the simulator's hash LM mixes it in, so that a
    /// block read by the wrong owner changes the output at once.
    pub owner: u64,
    /// Among whom its KV may be shared. Real models ignore it; the hash LM mixes it in, so that a
    /// block read across tenants changes the output at once.
    pub scope: u64,
}

impl Segment {
    /// Number of rows of this segment that produce logits.
    #[must_use]
    pub fn num_logit_rows(&self) -> usize {
        self.rows.len() - self.logits_from
    }
}

/// What [`RaggedBatch::push`] needs to know about one sequence.
#[derive(Clone, Copy, Debug)]
pub struct SegmentInput<'a> {
    /// Token of each row, `[rows]`, at least one.
    pub tokens: &'a [TokenId],
    /// Absolute position of the first row. Positions before it must have been computed.
    pub start: usize,
    /// The sequence's block ids in order, covering at least `start + tokens.len()` positions.
    pub block_table: &'a [BlockId],
    /// First row that needs logits; `tokens.len()` for none.
    pub logits_from: usize,
    /// See [`Segment::owner`].
    pub owner: u64,
    /// See [`Segment::scope`].
    pub scope: u64,
}

/// The rows of one forward pass. Reused from step to step: [`clear`](Self::clear) keeps capacity.
#[derive(Clone, Debug, Default)]
pub struct RaggedBatch {
    tokens: Vec<TokenId>,
    segments: Vec<Segment>,
    block_ids: Vec<BlockId>,
    num_logit_rows: usize,
}

impl RaggedBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty batch with room for this many block ids, so that contexts that grow from step to
    /// step do not make it grow. The blocks of a pool are enough when nobody shares any.
    #[must_use]
    pub fn with_block_capacity(num_blocks: usize) -> Self {
        Self { block_ids: Vec::with_capacity(num_blocks), ..Self::default() }
    }

    /// Empties the batch for the next step.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.segments.clear();
        self.block_ids.clear();
        self.num_logit_rows = 0;
    }

    /// Appends the rows of one sequence.
    ///
    /// # Panics
    /// When the segment is empty, its block table too short or `logits_from` past its rows: all
    /// three are errors of the caller, not of a client.
    pub fn push(&mut self, input: SegmentInput<'_>) {
        let end = input.start + input.tokens.len();
        assert!(!input.tokens.is_empty(), "a segment has at least one row");
        assert!(input.logits_from <= input.tokens.len(), "logits_from lies past the rows");
        let num_blocks = end.div_ceil(BLOCK_LEN);
        assert!(num_blocks <= input.block_table.len(), "the block table is too short");
        let first_row = self.tokens.len();
        let first_block = self.block_ids.len();
        self.tokens.extend_from_slice(input.tokens);
        self.block_ids.extend_from_slice(&input.block_table[..num_blocks]);
        self.num_logit_rows += input.tokens.len() - input.logits_from;
        self.segments.push(Segment {
            rows: first_row..self.tokens.len(),
            start: input.start,
            blocks: first_block..self.block_ids.len(),
            logits_from: input.logits_from,
            owner: input.owner,
            scope: input.scope,
        });
    }

    /// Tokens of all rows, `[rows]`.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The segments in row order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The block table of one segment.
    #[must_use]
    pub fn block_table(&self, segment: &Segment) -> &[BlockId] {
        &self.block_ids[segment.blocks.clone()]
    }

    /// All rows of the batch.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows that produce logits, over all segments.
    #[must_use]
    pub fn num_logit_rows(&self) -> usize {
        self.num_logit_rows
    }

    /// True when there is nothing to compute.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}
