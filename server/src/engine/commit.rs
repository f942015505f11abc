//! Owns keeping what agrees: appends accepted tokens and the target's own, applies end tokens, stop
//! strings and limits inside the accepted run, lowers the KV past the cut, accounts. Decides
//! nothing: the verdicts are the verifier's.

use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::proposal::Proposal;
use slipstream_verifier::acceptance::FinalToken;
use slipstream_verifier::verifier::Verdict;

use super::event::{FinishReason, OutputToken, Provenance, SequenceFault};
use super::lifecycle::stop_rules;
use super::scheduler::PlannedRows;
use super::step::{StepReport, StepRoom};
use super::{Engine, keeping};

/// One token about to be committed.
struct Commit {
    token: TokenId,
    provenance: Provenance,
    draft_epoch: Option<DraftEpoch>,
    logprob: Option<f64>,
}

impl Engine {
    /// Applies one verdict per planned sequence.
    pub(super) fn commit(&mut self, room: &StepRoom) -> StepReport {
        let mut report = StepReport::default();
        for (rows, verdict) in room.plan.rows.iter().zip(room.verdicts.iter()) {
            let proposal = room.proposals.of(rows.id);
            let proposed_len = proposal.map_or(0, |proposal| proposal.tokens.len());
            report.num_rows += rows.chunk_len + proposed_len;
            report.num_committed += match verdict {
                Some(verdict) => self.commit_verdict(rows, proposal, verdict),
                None => {
                    self.keep_computed(rows.id, rows.chunk_len);
                    0
                }
            };
        }
        self.counters.committed += report.num_committed as u64;
        report
    }

    /// Commits one sequence's accepted tokens and final token in order, until it ends. Returns how
    /// many it kept.
    fn commit_verdict(
        &mut self,
        rows: &PlannedRows,
        proposal: Option<Proposal<'_>>,
        verdict: Verdict<'_>,
    ) -> usize {
        let proposed: &[TokenId] = proposal.map_or(&[], |proposal| proposal.tokens);
        let epoch = proposal.map(|proposal| proposal.epoch);
        self.keep_computed(rows.id, rows.chunk_len + verdict.accepted_len);
        let accepted = proposed[..verdict.accepted_len].iter();
        let accepted = accepted.map(|&token| (token, Provenance::Accepted));
        let outcome = verdict.outcome.ok().flatten();
        let last = outcome.map(|last| (last.token(), provenance(last)));
        let mut num_kept = 0;
        let mut num_judged = 0;
        let mut reason = None;
        for (index, (token, provenance)) in accepted.chain(last).enumerate() {
            let commit = Commit {
                token,
                provenance,
                draft_epoch: epoch,
                logprob: verdict.logprobs.get(index).copied(),
            };
            num_judged += 1;
            let is_kept;
            (is_kept, reason) = self.commit_token(rows.id, &commit);
            num_kept += usize::from(is_kept);
            if reason.is_some() {
                break;
            }
        }
        // Behind an end inside the accepted run nothing was judged; behind a disagreement
        // everything was in vain.
        let is_cut = reason.is_some() && num_judged <= verdict.accepted_len;
        let proposed_len = if is_cut { num_judged } else { proposed.len() };
        self.account(rows.id, proposed_len, verdict.accepted_len.min(num_judged));
        match (reason, verdict.outcome) {
            (Some(reason), _) => self.finish(rows.id, reason),
            (None, Err(fault)) => {
                tracing::error!(sequence = %rows.id, %fault, "a sequence failed");
                self.finish(rows.id, FinishReason::Fault(SequenceFault::Choice(fault)));
            }
            (None, Ok(_)) => {}
        }
        num_kept
    }

    /// Appends one token unless it ends the completion. Returns whether it was appended, and why
    /// the sequence ends if it does.
    fn commit_token(&mut self, id: SequenceId, commit: &Commit) -> (bool, Option<FinishReason>) {
        let sequence = self.sequences.get_mut(&id).expect("plans name known sequences");
        if sequence.request.params.end_ids.contains(&commit.token) {
            return (false, Some(FinishReason::EndToken(commit.token)));
        }
        sequence.first_token.get_or_insert_with(|| self.clock.now());
        sequence.tokens.push(commit.token);
        self.share.charge(sequence.request.tenant, 0, 1);
        let token = OutputToken {
            id: commit.token,
            logprob: commit.logprob,
            provenance: commit.provenance,
            draft_epoch: commit.draft_epoch,
        };
        let piece = self.token_bytes.get(commit.token);
        let rules = stop_rules(&sequence.request);
        if let Some(found) = sequence.output.push(token, piece, rules) {
            return (true, Some(FinishReason::StopString(found.index)));
        }
        let is_full = sequence.remaining_len() == 0;
        (true, is_full.then_some(FinishReason::Length))
    }

    /// Records that `len` more positions hold valid KV, and gives back the blocks behind the next
    /// token: those of rejected proposals.
    fn keep_computed(&mut self, id: SequenceId, len: usize) {
        let sequence = self.sequences.get_mut(&id).expect("plans name known sequences");
        sequence.computed_len += len;
        if !sequence.is_pinned {
            let keep_len = sequence.computed_len.max(sequence.tokens.len());
            self.blocks.shrink(&mut sequence.blocks, keep_len);
        }
        keeping::remember_prompt(&self.config, &mut self.blocks, sequence);
        let prompt_len = sequence.computed_len.min(sequence.request.prompt.len());
        let num_new = prompt_len.saturating_sub(sequence.charged_len);
        sequence.charged_len += num_new;
        self.share.charge(sequence.request.tenant, num_new, 0);
    }

    /// Counts what the proposal of one sequence brought.
    fn account(&mut self, id: SequenceId, proposed_len: usize, accepted_len: usize) {
        let sequence = self.sequences.get_mut(&id).expect("plans name known sequences");
        let usage = &mut sequence.speculation;
        usage.num_steps += 1;
        usage.num_proposed += proposed_len;
        if usage.proposed_by_position.len() < proposed_len {
            usage.proposed_by_position.resize(proposed_len, 0);
            usage.accepted_by_position.resize(proposed_len, 0);
        }
        for depth in 0..proposed_len {
            usage.proposed_by_position[depth] += 1;
            usage.accepted_by_position[depth] += usize::from(depth < accepted_len);
        }
        self.counters.add_proposal(proposed_len, accepted_len);
    }
}

fn provenance(last: FinalToken) -> Provenance {
    match last {
        FinalToken::Correction(_) => Provenance::Correction,
        FinalToken::Bonus(_) => Provenance::Bonus,
        FinalToken::Plain(_) => Provenance::Plain,
    }
}
