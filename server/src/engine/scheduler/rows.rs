//! Owns the rows of sequences whose output runs: one for the last token of each, and proposals
//! behind it.

use slipstream_model::clock::Micros;

use super::Planner;
use crate::engine::step_costs::StepShape;

impl Planner<'_> {
    /// One row for every running sequence that only lacks its last token, in the order of rank.
    pub(super) fn plan_decode_rows(&mut self) {
        for index in 0..self.running.len() {
            if self.rows_left == 0 {
                return;
            }
            let candidate = self.running[index];
            if candidate.is_runnable() && candidate.pending_len() == 1 {
                self.running[index].is_seen = true;
                self.plan_rows(index, 1);
            }
        }
    }

    /// Plans `chunk_len` rows of a running sequence if blocks can be had. Returns whether they
    /// could.
    pub(super) fn plan_rows(&mut self, index: usize, chunk_len: usize) -> bool {
        let candidate = self.running[index];
        let needed = candidate.blocks_for(candidate.computed_len + chunk_len);
        if !self.give_blocks(index, needed) {
            return false;
        }
        self.rows_left -= chunk_len;
        self.shape = self.shape.with(candidate.computed_len, chunk_len);
        self.running[index].chunk_len = chunk_len;
        true
    }

    /// How long this step may take, and how many rows of it are set aside for proposals when
    /// prompts wait: they may take half of what is left beside the decode rows.
    pub(super) fn limits(&self, has_prompts: bool) -> (Micros, usize) {
        let config = self.around.config;
        let costs = self.around.costs;
        let plain = costs.predict(self.shape);
        // Without anybody whose output runs, a step still ends now and then for whoever arrives.
        let has_output = self.running.iter().any(|candidate| candidate.has_rows());
        let Micros(target) = config.step_target;
        let Micros(longest) = if has_output {
            config.step_target.max(Micros(plain.0.saturating_mul(3) / 2))
        } else {
            Micros(target.saturating_mul(PROMPT_STEP))
        };
        let decoding = self.running.iter().filter(|candidate| candidate.reaches_end());
        let wanted: usize = decoding.map(|candidate| candidate.draft_len_wanted).sum();
        if !has_prompts {
            return (Micros(longest), wanted.min(self.rows_left));
        }
        let middle = Micros(plain.0 + longest.saturating_sub(plain.0) / 2);
        let most = costs.rows_within(middle, self.shape, self.mean_context(), wanted);
        (Micros(longest), most.min(self.rows_left / 2))
    }

    /// The step with this many proposed rows.
    pub(super) fn with_proposals(&self, num_rows: usize) -> StepShape {
        let pairs = num_rows * self.mean_context();
        StepShape { rows: self.shape.rows + num_rows, pairs: self.shape.pairs + pairs }
    }

    fn mean_context(&self) -> usize {
        self.shape.pairs / self.shape.rows.max(1)
    }

    /// Whether this step ends with the first token of some sequence.
    pub(super) fn brings_a_first_token(&self) -> bool {
        self.running.iter().any(|candidate| candidate.reaches_end() && !candidate.has_output)
    }

    /// Gives `num_rows` rows and the blocks that nobody needs to proposals, one more token for each
    /// sequence in turn. Proposals never preempt, and never take rows from known tokens.
    pub(super) fn plan_proposals(&mut self, num_rows: usize) {
        let mut rows_left = num_rows.min(self.rows_left);
        for depth in 0..self.around.config.draft_len_max {
            for candidate in self.running.iter_mut() {
                let wants = depth < candidate.draft_len_wanted && candidate.draft_len == depth;
                if !wants || !candidate.reaches_end() || rows_left == 0 {
                    continue;
                }
                let needed = candidate.blocks_for(candidate.tokens_len + depth + 1);
                if needed <= self.room.available {
                    self.room.available -= needed;
                    rows_left -= 1;
                    candidate.new_blocks += needed;
                    candidate.draft_len = depth + 1;
                }
            }
        }
    }
}

/// A step of prompts alone may take this many times the target: larger steps compute them with
/// less effort per row.
const PROMPT_STEP: u64 = 4;
