//! Owns what must be true of turns: who starts before whom, that whoever can run does, and that
//! whoever waits for a reader does not.
//!
//! Why nobody waits for ever (I9). Those that wait stand in one line, ordered by class, then by
//! what their tenant was served, then by age; the first that does not fit stops it. A class rises
//! with every `priority_aging` in which nobody of it started, so after two of them a request is in
//! the first class.
//! There, one of another tenant can go before it only while that tenant was served less. Each such
//! start raises that tenant's service by what it computes, so together they get at most the
//! difference at that moment and one request each more; then the line is at its tenant, where only
//! older requests go first. What is checked is the order itself, at every start, which gives the
//! bound, and in the calm that the line empties.

use slipstream_model::ids::SequenceId;
use slipstream_server::engine::{Engine, Phase, SequenceView, StepReport};

use super::{Before, Checker, both, claim};

/// The place of a sequence in line: class after aging, service of its tenant, age.
type Place = (usize, u64, SequenceId);

impl Checker {
    /// I9: nobody starts before one that stands before it in line.
    pub(super) fn turns_are_fair(&self, engine: &Engine) -> Result<(), String> {
        let mut last_started: Option<Place> = None;
        let mut first_waiting: Option<Place> = None;
        for (before, view) in both(&self.before, engine) {
            let place = self.place(&before, &view);
            match (before.phase, view.phase) {
                (Phase::Waiting | Phase::Preempted, Phase::Running) => {
                    last_started = last_started.max(Some(place));
                }
                (Phase::Waiting | Phase::Preempted, Phase::Waiting | Phase::Preempted)
                    if !view.is_paused && !self.may_wait_for_sibling(&view) =>
                {
                    first_waiting = Some(first_waiting.map_or(place, |first| first.min(place)));
                }
                (Phase::Waiting | Phase::Running | Phase::Preempted | Phase::Finished(_), _) => {}
            }
        }
        let (Some(started), Some(waiting)) = (last_started, first_waiting) else { return Ok(()) };
        claim(started < waiting, || {
            format!("I9: {started:?} (class, service, id) has started, {waiting:?} has not")
        })
    }

    fn place(&self, before: &Before, view: &SequenceView<'_>) -> Place {
        let since = self.known[&view.id].waiting_since;
        let since = since.max(self.before.last_starts[view.priority as usize]);
        let waited = self.before.now.since(since);
        let steps_up = waited.0 / self.config.priority_aging.0.max(1);
        let class = (view.priority as usize).saturating_sub(usize::try_from(steps_up).unwrap());
        (class, before.service, view.id)
    }

    /// Whether a sibling may just be computing the prompt that this sequence needs.
    fn may_wait_for_sibling(&self, view: &SequenceView<'_>) -> bool {
        let Some(sibling) = self.known[&view.id].sibling else { return false };
        let is_there = |before: &Before| {
            before.id == sibling && matches!(before.phase, Phase::Waiting | Phase::Running)
        };
        self.before.sequences.iter().any(is_there)
    }

    /// With work to do a step computes rows, unless it was what ended the work; and nothing moves
    /// for those who wait for their readers.
    pub(super) fn work_is_done(&self, engine: &Engine, report: StepReport) -> Result<(), String> {
        let after = engine.counters();
        let has_failed = after.verifier_failures > self.before.counters.verifier_failures;
        let is_idle = report.num_rows == 0 && !has_failed;
        claim(!(is_idle && self.before.has_work && engine.has_work()), || {
            let views = engine.sequences().map(|v| {
                let place = (v.id.0, v.phase, v.priority, v.tenant.0, v.blocks.len());
                (place, (v.tokens.len(), v.computed_len), v.is_pinned, v.is_paused)
            });
            let views: Vec<_> = views.collect();
            format!("a step computed nothing with work to do: {views:?}")
        })?;
        for (before, view) in both(&self.before, engine) {
            let Before { id, tokens_len, computed_len, .. } = before;
            let has_moved = view.tokens.len() > tokens_len || view.computed_len > computed_len;
            claim(!view.is_paused || !has_moved, || {
                format!("{id} went on although it waits for its reader")
            })?;
        }
        Ok(())
    }
}
