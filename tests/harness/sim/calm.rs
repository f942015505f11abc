//! Owns the end of a world: faults and cancels stop, readers read, and everything must come to its
//! end and be given back.

use slipstream_model::clock::Micros;

use super::{World, is_live, require};

/// Most steps that calm weather may take before a world counts as stuck.
const CALM_STEPS_MAX: usize = 20_000;

impl World {
    /// Lives the calm.
    pub(super) fn calm(&mut self) -> Result<(), String> {
        self.verifier.fail_next(0);
        self.verifier.panic_next(0);
        if self.engine.has_failed() || self.rng.one_in(8) {
            self.engine.shut_down();
            let has_live = self.engine.sequences().any(|view| is_live(view.phase));
            require(!has_live, || "somebody lives on after the shutdown".to_owned())?;
        }
        self.read(true)?;
        let mut num_steps = 0;
        while self.engine.has_work() {
            let num_rows = self.step()?;
            self.read(true)?;
            self.clock.advance(Micros(100));
            num_steps += 1;
            require(num_rows > 0 || !self.engine.has_work(), || {
                "liveness: a step computed nothing with work to do".to_owned()
            })?;
            require(num_steps <= CALM_STEPS_MAX, || "liveness: work does not end".to_owned())?;
        }
        self.read(true)?;
        let left = self.clients.keys().next();
        require(left.is_none(), || format!("liveness: {left:?} never got its end"))?;
        self.checker.at_the_end(&self.engine)?;
        if let Some(draft) = &self.draft {
            let num_held = draft.num_held_blocks();
            require(num_held == 0, || format!("the draft leaks {num_held} blocks"))?;
        }
        self.note_counters();
        Ok(())
    }

    fn note_counters(&mut self) {
        let counters = *self.engine.counters();
        let verifier = self.verifier.counts();
        for (what, times) in [
            ("preemptions", counters.preemptions),
            ("quarantines", counters.quarantines),
            ("draft faults", counters.draft_faults),
            ("dropped proposals", counters.dropped_proposals),
            ("proposed", counters.proposed),
            ("rejected", counters.proposed - counters.accepted),
            ("verifier failures", counters.verifier_failures),
            ("verifier panics", verifier.panicked_calls),
            ("cached tokens", counters.cached),
            ("evictions", counters.evicted_blocks),
            ("copies on write", counters.copied_blocks),
            ("fair preemptions", counters.fair_preemptions),
            ("paused", counters.pauses),
        ] {
            self.coverage.note(what, times);
        }
    }
}
