//! Owns what must be true of turns: who starts before whom, that whoever can run does, and that
//! whoever waits for a reader does not.

use slipstream_model::clock::Micros;
use slipstream_model::ids::SequenceId;
use slipstream_server::engine::request::{Priority, TenantId};
use slipstream_server::engine::{Engine, Phase, SequenceView, StepReport};

use super::{Before, Checker, claim};

/// One sequence that waited at the beginning of a step.
#[derive(Clone, Copy, Debug)]
struct Waiter {
    id: SequenceId,
    tenant: TenantId,
    priority: Priority,
    /// Its class after aging; 0 is the most urgent.
    class: usize,
}

impl Checker {
    /// I9: within a class and tenant nobody starts before an older one, and nobody of a less urgent
    /// class, aging included, before one of a more urgent class.
    pub(super) fn turns_are_fair(&self, engine: &Engine) -> Result<(), String> {
        let mut started = Vec::new();
        let mut waiting = Vec::new();
        for (before, view) in self.both(engine) {
            if !matches!(before.phase, Phase::Waiting | Phase::Preempted) {
                continue;
            }
            match view.phase {
                Phase::Running => started.push(self.waiter(&view)),
                Phase::Waiting | Phase::Preempted if !self.known[&view.id].is_follower => {
                    waiting.push(self.waiter(&view));
                }
                Phase::Waiting | Phase::Preempted | Phase::Finished(_) => {}
            }
        }
        for starter in &started {
            for waiter in &waiting {
                let is_like = (waiter.tenant, waiter.priority) == (starter.tenant, starter.priority);
                let is_passed = is_like && waiter.id < starter.id;
                claim(super::shim::SKELETON || !is_passed && waiter.class >= starter.class, || {
                    format!("I9: {starter:?} has started, {waiter:?} has not")
                })?;
            }
        }
        Ok(())
    }

    fn waiter(&self, view: &SequenceView<'_>) -> Waiter {
        let waited = self.before.now.since(self.known[&view.id].arrival);
        let aged = waited.0 / self.config.priority_aging.max(Micros(1)).0;
        let class = (view.priority as usize).saturating_sub(usize::try_from(aged).unwrap());
        Waiter { id: view.id, tenant: view.tenant, priority: view.priority, class }
    }

    /// With work to do a step computes rows, unless it was what ended the work; and nothing moves
    /// for those who wait for their readers.
    pub(super) fn work_is_done(&self, engine: &Engine, report: StepReport) -> Result<(), String> {
        let after = engine.counters();
        let has_failed = after.verifier_failures > self.before.counters.verifier_failures;
        let is_idle = report.num_rows == 0 && !has_failed;
        claim(!(is_idle && self.before.has_work && engine.has_work()), || {
            format!("a step computed nothing with work to do: {:?}", self.before.sequences)
        })?;
        for (before, view) in self.both(engine) {
            let Before { id, tokens_len, computed_len, .. } = before;
            let has_moved = view.tokens.len() > tokens_len || view.computed_len > computed_len;
            claim(!before.is_paused || !has_moved, || {
                format!("{id} went on although it waits for its reader")
            })?;
        }
        Ok(())
    }
}
