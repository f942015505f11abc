//! Owns the table model: a tiny [`Forward`] whose next-token distribution is a function written
//! down by the test, so that every answer is known exactly. Reads its history back through the
//! block table, like every other model. Knows nothing of the engine.

use std::sync::Arc;

use slipstream_model::batch::RaggedBatch;
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};

/// Probabilities of the next token, `[vocab]`, after a history.
pub type Law = Arc<dyn Fn(&[TokenId]) -> Vec<f64> + Send + Sync>;

/// A model whose logits are the logarithms of a law.
pub struct TableLm {
    limits: ForwardLimits,
    law: Law,
    slots: Vec<TokenId>,
    history: Vec<TokenId>,
}

impl TableLm {
    /// A model of this law.
    #[must_use]
    pub fn new(limits: ForwardLimits, law: Law) -> Self {
        let slots = vec![TokenId(u32::MAX); limits.num_blocks * BLOCK_LEN];
        Self { limits, law, slots, history: Vec::new() }
    }
}

/// The logits, `[vocab]`, that stand for `probabilities`.
#[must_use]
pub fn logits_of(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|probability| probability.ln() as f32).collect()
}

/// The probabilities, `[vocab]`, that `logits` really mean after their rounding to `f32`, at a
/// temperature.
#[must_use]
pub fn probabilities_of(logits: &[f32], temperature: f64) -> Vec<f64> {
    let weights: Vec<f64> =
        logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

impl Forward for TableLm {
    fn limits(&self) -> ForwardLimits {
        self.limits
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        let at = |table: &[BlockId], position: usize| {
            table[position / BLOCK_LEN].index() * BLOCK_LEN + position % BLOCK_LEN
        };
        for segment in batch.segments() {
            for (offset, &token) in batch.tokens()[segment.rows.clone()].iter().enumerate() {
                self.slots[at(batch.block_table(segment), segment.start + offset)] = token;
            }
        }
        logits.reset(batch.num_logit_rows(), self.limits.vocab_size);
        let mut next_row = 0;
        for segment in batch.segments() {
            self.history.clear();
            for position in 0..segment.start + segment.rows.len() {
                self.history.push(self.slots[at(batch.block_table(segment), position)]);
                if position >= segment.start + segment.logits_from {
                    let row = logits_of(&(self.law)(&self.history));
                    logits.row_mut(next_row).copy_from_slice(&row);
                    next_row += 1;
                }
            }
        }
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let start = from.index() * BLOCK_LEN;
        self.slots.copy_within(start..start + BLOCK_LEN, to.index() * BLOCK_LEN);
    }
}
