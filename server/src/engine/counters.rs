//! Owns what the engine counts, and one consistent picture of it for readers on other threads.
//! Plain numbers: knows no registry, no names and no threads.

use super::event::{CancelReason, FinishReason};
use super::sequence::Phase;
use super::{Engine, SequenceView};

/// Positions of a proposal that are counted apart; deeper ones count with the last of them. Twice
/// the deepest draft that settings allow, so that what is shown has a bound of its own.
pub const POSITIONS_MAX: usize = 16;

/// What has happened so far, for metrics and invariant checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps that computed rows.
    pub steps: u64,
    /// Rows computed.
    pub rows: u64,
    /// Requests taken.
    pub submitted: u64,
    /// Prompt tokens of the requests taken.
    pub prompt_tokens: u64,
    /// Requests that came to an end.
    pub finished: u64,
    /// The same by reason.
    pub finished_by: FinishedBy,
    /// Requests whose end was taken, or whose reader has gone: nothing of them is left.
    pub released: u64,
    /// Output tokens committed.
    pub committed: u64,
    /// Output tokens taken as events. Fewer than committed: stop strings and forced ends take
    /// tokens back, and readers go.
    pub taken: u64,
    /// Proposals verified.
    pub drafts: u64,
    /// Proposed tokens verified.
    pub proposed: u64,
    /// Proposed tokens accepted.
    pub accepted: u64,
    /// Proposed tokens verified, by position.
    pub proposed_by_position: [u64; POSITIONS_MAX],
    /// Proposed tokens accepted, by position.
    pub accepted_by_position: [u64; POSITIONS_MAX],
    /// Steps in which the draft failed as a whole.
    pub draft_faults: u64,
    /// Single proposals dropped as nonsense.
    pub dropped_proposals: u64,
    /// Times that a draft was put into quarantine.
    pub quarantines: u64,
    /// Times that a sequence gave its blocks back before its end.
    pub preemptions: u64,
    /// Steps in which the verifier failed.
    pub verifier_failures: u64,
    /// Known tokens of sequences that started, or started again, with the prefix cache allowed or
    /// behind a sibling's prompt.
    pub looked_up: u64,
    /// Of these, tokens whose KV was there.
    pub cached: u64,
    /// Cached blocks given up because their room was needed.
    pub evicted_blocks: u64,
    /// Shared blocks copied because a sequence wrote to them.
    pub copied_blocks: u64,
    /// Preemptions that made room for a tenant with less than its share; part of `preemptions`.
    pub fair_preemptions: u64,
    /// Times that a sequence paused because its reader was behind.
    pub pauses: u64,
    /// Requests refused because the queue was full.
    pub shed: u64,
    /// Requests refused because their deadline could not be met.
    pub refused_late: u64,
}

impl Counters {
    /// Counts the verified part of one proposal.
    pub(super) fn add_proposal(&mut self, proposed_len: usize, accepted_len: usize) {
        self.drafts += u64::from(proposed_len > 0);
        self.proposed += proposed_len as u64;
        self.accepted += accepted_len as u64;
        for depth in 0..proposed_len {
            let position = depth.min(POSITIONS_MAX - 1);
            self.proposed_by_position[position] += 1;
            self.accepted_by_position[position] += u64::from(depth < accepted_len);
        }
    }

    /// Counts the end of one request.
    pub(super) fn add_end(&mut self, reason: FinishReason) {
        self.finished += 1;
        let by = &mut self.finished_by;
        let count = match reason {
            FinishReason::EndToken(_) => &mut by.end_token,
            FinishReason::StopString(_) => &mut by.stop_string,
            FinishReason::Length => &mut by.length,
            FinishReason::Cancelled(CancelReason::ClientGone) => &mut by.client_gone,
            FinishReason::Cancelled(CancelReason::Aborted) => &mut by.aborted,
            FinishReason::Cancelled(CancelReason::Stalled) => &mut by.stalled,
            FinishReason::DeadlineExceeded => &mut by.deadline,
            FinishReason::Fault(_) => &mut by.fault,
            FinishReason::ShuttingDown => &mut by.shutting_down,
        };
        *count += 1;
    }
}

/// Requests that came to an end, by [`FinishReason`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FinishedBy {
    /// An end token was chosen.
    pub end_token: u64,
    /// A stop string was completed.
    pub stop_string: u64,
    /// A limit was reached.
    pub length: u64,
    /// The client cancelled or went away.
    pub client_gone: u64,
    /// Somebody asked for its end by its id.
    pub aborted: u64,
    /// The client took nothing for longer than the stall limit.
    pub stalled: u64,
    /// The deadline passed.
    pub deadline: u64,
    /// The sequence failed.
    pub fault: u64,
    /// The server shut down.
    pub shutting_down: u64,
}

/// The engine between two steps, as others see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineSnapshot {
    /// What has happened so far.
    pub counters: Counters,
    /// Sequences that hold KV blocks and take part in steps.
    pub num_running: usize,
    /// Sequences that wait for room, preempted ones included.
    pub num_waiting: usize,
    /// Sequences held, finished ones with unsent output included.
    pub num_held: usize,
    /// KV blocks of the verifier's pool.
    pub num_blocks: usize,
    /// Of these, blocks that nobody holds and that hold nothing of use.
    pub num_free_blocks: usize,
    /// Of these, blocks that no sequence holds but the prefix cache keeps. They count as free when
    /// room is needed.
    pub num_cached_blocks: usize,
    /// KV blocks of the draft's pool that it holds for sequences.
    pub num_draft_blocks: usize,
    /// Running sequences that wait for their readers.
    pub num_paused: usize,
    /// Waiting ones by priority, in the order of `Priority::ALL`.
    pub waiting_by_priority: [usize; 3],
    /// Longest draft length of a request.
    pub draft_len_max: usize,
    /// Whether a draft is installed.
    pub has_draft: bool,
    /// Whether it is in quarantine.
    pub is_draft_quarantined: bool,
}

impl Engine {
    /// A consistent picture of the engine. Costs one look at every sequence held.
    #[must_use]
    pub fn snapshot(&self) -> EngineSnapshot {
        let mut snapshot = EngineSnapshot {
            counters: self.counters,
            num_blocks: self.blocks.num_blocks(),
            num_free_blocks: self.blocks.num_free(),
            num_cached_blocks: self.blocks.num_cached(),
            num_draft_blocks: self.draft.num_held_blocks(),
            draft_len_max: self.config.draft_len_max,
            has_draft: self.draft.is_installed(),
            is_draft_quarantined: self.draft.is_quarantined(),
            ..EngineSnapshot::default()
        };
        for SequenceView { phase, priority, is_paused, .. } in self.sequences() {
            snapshot.num_held += 1;
            match phase {
                Phase::Running => {
                    snapshot.num_running += 1;
                    snapshot.num_paused += usize::from(is_paused);
                }
                Phase::Waiting | Phase::Preempted => {
                    snapshot.num_waiting += 1;
                    snapshot.waiting_by_priority[priority as usize] += 1;
                }
                Phase::Finished(_) => {}
            }
        }
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use slipstream_model::choice::ChoiceFault;
    use slipstream_model::ids::TokenId;

    use super::{Counters, POSITIONS_MAX};
    use crate::engine::event::{CancelReason, FinishReason, SequenceFault};

    #[test]
    fn every_end_counts_once_and_where_it_belongs() {
        let mut counters = Counters::default();
        let ends = [
            FinishReason::EndToken(TokenId(1)),
            FinishReason::StopString(0),
            FinishReason::Length,
            FinishReason::Cancelled(CancelReason::ClientGone),
            FinishReason::DeadlineExceeded,
            FinishReason::Fault(SequenceFault::VerifierFailed),
            FinishReason::ShuttingDown,
        ];
        for (times, reason) in (1..).zip(ends) {
            (0..times).for_each(|_| counters.add_end(reason));
        }
        let by = counters.finished_by;
        assert_eq!([by.end_token, by.stop_string, by.length], [1, 2, 3]);
        assert_eq!([by.client_gone, by.deadline, by.fault, by.shutting_down], [4, 5, 6, 7]);
        assert_eq!(counters.finished, 28);
        counters.add_end(FinishReason::Fault(SequenceFault::Choice(ChoiceFault::NotFinite)));
        assert_eq!(counters.finished_by.fault, 7);
    }

    #[test]
    fn deep_positions_count_with_the_last() {
        let mut counters = Counters::default();
        counters.add_proposal(POSITIONS_MAX + 3, POSITIONS_MAX + 1);
        counters.add_proposal(0, 0);
        assert_eq!(counters.drafts, 1);
        assert_eq!(counters.proposed_by_position[POSITIONS_MAX - 1], 4);
        assert_eq!(counters.accepted_by_position[POSITIONS_MAX - 1], 2);
        assert_eq!(counters.accepted_by_position[..POSITIONS_MAX - 1], [1; POSITIONS_MAX - 1]);
    }
}
