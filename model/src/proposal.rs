//! Owns what a draft hands to a verifier. Knows neither of them.

use std::ops::Range;

use crate::ids::{DraftEpoch, SequenceId, TokenId};

/// Tokens that a draft suggests for one sequence in one step. May be empty: the step then
/// decodes plainly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposal<'a> {
    /// The sequence it continues.
    pub sequence: SequenceId,
    /// Epoch of the draft, and of the KV it proposed from.
    pub epoch: DraftEpoch,
    /// Proposed continuation of the sequence's known tokens, `[0 ..= draft_len]`.
    pub tokens: &'a [TokenId],
}

/// The proposals of one step. Reused from step to step: [`clear`](Self::clear) keeps capacity.
#[derive(Clone, Debug, Default)]
pub struct Proposals {
    entries: Vec<Entry>,
    /// Tokens of all entries.
    tokens: Vec<TokenId>,
}

#[derive(Clone, Debug)]
struct Entry {
    sequence: SequenceId,
    epoch: DraftEpoch,
    /// Where its tokens lie.
    tokens: Range<usize>,
}

impl Proposals {
    /// No proposals.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Drops all proposals.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.tokens.clear();
    }

    /// Appends a proposal.
    pub fn push(&mut self, proposal: Proposal<'_>) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(proposal.tokens);
        let Proposal { sequence, epoch, .. } = proposal;
        self.entries.push(Entry { sequence, epoch, tokens: start..self.tokens.len() });
    }

    /// Number of proposals.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All proposals, in order.
    pub fn iter(&self) -> impl Iterator<Item = Proposal<'_>> {
        self.entries.iter().map(|entry| self.proposal(entry))
    }

    /// The first proposal for a sequence.
    #[must_use]
    pub fn of(&self, sequence: SequenceId) -> Option<Proposal<'_>> {
        let found = self.entries.iter().find(|entry| entry.sequence == sequence);
        found.map(|entry| self.proposal(entry))
    }

    /// Drops what `keep` refuses, in order, and every further proposal for a sequence that one was
    /// kept for.
    pub fn keep_first(&mut self, mut keep: impl FnMut(Proposal<'_>) -> bool) {
        let mut num_kept = 0;
        for index in 0..self.entries.len() {
            let proposal = self.proposal(&self.entries[index]);
            let mut kept = self.entries[..num_kept].iter();
            if kept.all(|other| other.sequence != proposal.sequence) && keep(proposal) {
                self.entries.swap(num_kept, index);
                num_kept += 1;
            }
        }
        self.entries.truncate(num_kept);
    }

    /// Drops proposals without tokens.
    pub fn drop_empty(&mut self) {
        self.entries.retain(|entry| !entry.tokens.is_empty());
    }

    fn proposal(&self, entry: &Entry) -> Proposal<'_> {
        Proposal {
            sequence: entry.sequence,
            epoch: entry.epoch,
            tokens: &self.tokens[entry.tokens.clone()],
        }
    }
}
