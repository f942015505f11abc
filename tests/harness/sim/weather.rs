//! Owns what happens to a world between two steps without anybody having asked for it: time that
//! passes, cancels in every state, drafts that come and go, a verifier that fails or panics.

use std::sync::Arc;

use slipstream_draft::model_proposer::ModelProposerOptions;
use slipstream_draft::proposer::Proposer;
use slipstream_model::clock::Micros;
use slipstream_model::ids::{DraftEpoch, SequenceId};
use slipstream_server::engine::Phase;
use slipstream_server::engine::event::CancelReason;

use super::World;
use crate::model_draft::timed_model_draft;
use crate::proposers::{BEHAVIOURS, Behaviour, Script, ScriptedProposer};

/// Time between two steps at most, beside what they take.
const PAUSE_MAX_US: usize = 2_000;

impl World {
    /// Whatever the storm does between two steps.
    pub(super) fn disturb(&mut self) -> Result<(), String> {
        let faults = self.climate.faults;
        if self.rng.one_in(3) {
            self.clock.advance(Micros(self.rng.below(PAUSE_MAX_US) as u64));
        }
        if self.rng.one_in(faults.swap_one_in) {
            self.swap_draft();
            self.coverage.note("swaps", 1);
        }
        if self.rng.one_in(faults.verifier_fails_one_in) {
            self.verifier.fail_next(u32::try_from(self.rng.between(1, 4)).unwrap());
        }
        if self.rng.one_in(faults.verifier_panics_one_in) {
            self.verifier.panic_next(1);
        }
        if let Some(draft) = &self.draft
            && self.rng.one_in(60)
        {
            draft.probe.fail_next(1);
        }
        if self.rng.one_in(faults.cancel_one_in) {
            self.cancel_someone()?;
        }
        Ok(())
    }

    fn cancel_someone(&mut self) -> Result<(), String> {
        let ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        if ids.is_empty() {
            self.engine.cancel(SequenceId(u64::MAX), CancelReason::ClientGone);
            return Ok(());
        }
        let id = *self.rng.pick(&ids);
        let view = self.engine.sequences().find(|view| view.id == id);
        let Some(view) = view else { return Err(format!("{id} vanished unread")) };
        let state = match view.phase {
            Phase::Waiting => "cancelled waiting",
            Phase::Running if view.is_paused => "cancelled paused",
            Phase::Running if view.computed_len < view.prompt_len => "cancelled in prompt",
            Phase::Running => "cancelled in output",
            Phase::Preempted => "cancelled preempted",
            Phase::Finished(_) => "cancelled finished",
        };
        self.coverage.note(state, 1);
        if self.rng.one_in(3) {
            self.engine.forget(id, CancelReason::ClientGone);
            self.clients.remove(&id);
            self.coverage.note("forgotten", 1);
            if self.engine.sequences().any(|view| view.id == id) {
                return Err(format!("{id} was forgotten and is still there"));
            }
        } else {
            self.engine.cancel(id, CancelReason::Aborted);
            if !self.engine.is_finished(id) {
                return Err(format!("{id} was cancelled and goes on"));
            }
        }
        self.checker.between_steps(&self.engine)
    }

    /// Installs another draft: a scripted one, the real proposer on a related hash LM, or none.
    pub(super) fn swap_draft(&mut self) {
        self.epoch += 2; // a wrong-epoch proposer claims the odd one behind its own
        let epoch = DraftEpoch(self.epoch);
        self.draft = None;
        let proposer: Option<Box<dyn Proposer>> = match self.rng.below(10) {
            0 => None,
            1..=4 => Some(self.model_draft(epoch)),
            _ => {
                let behaviour = match self.rng.below(BEHAVIOURS.len() + 3) {
                    index if index < BEHAVIOURS.len() => BEHAVIOURS[index],
                    _ => Behaviour::Mixed,
                };
                let script = Script {
                    behaviour,
                    epoch,
                    knowledge: self.knowledge.clone(),
                    vocab_size: self.climate.sizes.vocab_size,
                    clock: Arc::clone(&self.clock),
                    seed: self.rng.bits(),
                };
                Some(Box::new(ScriptedProposer::new(script)))
            }
        };
        self.engine.set_proposer(proposer);
    }

    /// The real proposer on a hash LM that is more or less like the verifier's.
    fn model_draft(&mut self, epoch: DraftEpoch) -> Box<dyn Proposer> {
        let mut config = self.climate.verifier.draft(*self.rng.pick(&[0.0, 0.3, 1.0, 3.0]));
        config.cost = self.climate.draft_cost;
        config.limits.num_blocks = self.rng.between(1, 30);
        config.nan_one_in = *self.rng.pick(&[0, 0, 40]);
        let target_vocab_size = self.climate.sizes.vocab_size;
        if self.rng.one_in(2) {
            // Padding may differ between models of one tokenizer.
            let others = [target_vocab_size - 3, target_vocab_size + 8];
            config.limits.vocab_size = *self.rng.pick(&others);
        }
        let options = ModelProposerOptions {
            catch_up_rows_max: *self.rng.pick(&[1, 7, 512]),
            sharpening: *self.rng.pick(&[1.0, 1.5]),
            target_vocab_size,
        };
        let (proposer, watch) = timed_model_draft(config, epoch, options, &self.clock);
        self.draft = Some(watch);
        proposer
    }
}
