//! Owns the invariants that hold after every step, whatever happened in it. Sees the engine through
//! its public views only, and the verifier's store through its probe. Numbers like I1 are those of
//! the project's reliability notes. What concerns blocks and what concerns turns has its own file.

mod order;
mod pool;

use std::collections::BTreeMap;

use slipstream_model::block_manager::BlockManager;
use slipstream_model::clock::Micros;
use slipstream_model::ids::{BlockId, SequenceId, TokenId};
use slipstream_server::engine::request::{PrefixReuse, Request};
use slipstream_server::engine::{
    Counters, Engine, EngineConfig, EngineSnapshot, Phase, SequenceView, StepReport,
};

use crate::hash_lm::{HashLmConfig, HashLmCounts, HashLmProbe};
use crate::sim::Coverage;
use pool::CachedContents;

/// What is known of one request from the outside.
struct Known {
    /// Prompt, prefix and all tokens that it will ever choose.
    future: Vec<TokenId>,
    /// What the KV slots of all of them must hold.
    states: Vec<u64>,
    /// Its known length after the previous step.
    len: usize,
    /// Times that it had to give way.
    num_preemptions: usize,
    /// Since when it has stood in line.
    waiting_since: Micros,
    /// Whose KV of the prompt it may share.
    sibling: Option<SequenceId>,
    max_len: usize,
    /// Whether nothing of its KV may be kept for others.
    is_private: bool,
    /// Whether others may share its prompt all the same.
    has_followers: bool,
}

/// One sequence before a step.
#[derive(Clone, Copy, Debug)]
struct Before {
    id: SequenceId,
    phase: Phase,
    tokens_len: usize,
    computed_len: usize,
    is_paused: bool,
    /// What its tenant was served.
    service: u64,
    /// Where its blocks stand in [`Moment::blocks`].
    blocks: (usize, usize),
}

/// The engine before a step.
#[derive(Default)]
struct Moment {
    now: Micros,
    sequences: Vec<Before>,
    /// The blocks of all tables, one after another.
    blocks: Vec<BlockId>,
    counters: Counters,
    verifier: HashLmCounts,
    has_work: bool,
    /// When a request of each class last started.
    last_starts: [Micros; 3],
}

/// What the checker must know about the world.
pub struct Checker {
    config: EngineConfig,
    lm: HashLmConfig,
    verifier: HashLmProbe,
    known: BTreeMap<SequenceId, Known>,
    before: Moment,
    cached: CachedContents,
    /// Failures of the verifier since its last success.
    failures_in_a_row: u64,
}

/// A claim about the engine; its failure names what broke.
fn claim(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

impl Checker {
    /// A checker of an engine with this configuration, on this verifier.
    #[must_use]
    pub fn new(config: EngineConfig, lm: HashLmConfig, verifier: HashLmProbe) -> Self {
        Self {
            config,
            lm,
            verifier,
            known: BTreeMap::new(),
            before: Moment::default(),
            cached: CachedContents::default(),
            failures_in_a_row: 0,
        }
    }

    /// Learns of a request that was taken, and of all tokens it will ever have.
    pub fn admit(&mut self, id: SequenceId, request: &Request, future: Vec<TokenId>, now: Micros) {
        if let Some(leader) = request.sibling.and_then(|id| self.known.get_mut(&id)) {
            leader.has_followers = true;
        }
        let known = Known {
            states: self.lm.states(request.scope().tag(), &future),
            future,
            len: request.prompt.len() + request.output_prefix.len(),
            num_preemptions: 0,
            waiting_since: now,
            sibling: request.sibling,
            max_len: request.max_len(),
            is_private: request.prefix_reuse == PrefixReuse::Off,
            has_followers: request.sibling.is_some(),
        };
        self.known.insert(id, known);
    }

    /// Remembers what the coming step begins with.
    pub fn before_step(&mut self, engine: &Engine, now: Micros) {
        let before = &mut self.before;
        before.now = now;
        before.counters = *engine.counters();
        before.verifier = self.verifier.counts();
        before.has_work = engine.has_work();
        before.last_starts = engine.last_starts();
        before.sequences.clear();
        before.blocks.clear();
        for view in engine.sequences() {
            let start = before.blocks.len();
            before.blocks.extend_from_slice(view.blocks);
            before.sequences.push(Before {
                id: view.id,
                phase: view.phase,
                tokens_len: view.tokens.len(),
                computed_len: view.computed_len,
                is_paused: view.is_paused,
                service: engine.service(view.tenant),
                blocks: (start, before.blocks.len()),
            });
        }
    }

    /// Checks everything that a step must leave true.
    ///
    /// # Errors
    /// What is broken.
    pub fn after_step(
        &mut self,
        engine: &Engine,
        report: StepReport,
        coverage: &mut Coverage,
    ) -> Result<(), String> {
        self.rows_are_bounded(engine, report)?;
        self.blocks_are_accounted_for(engine)?;
        self.cached_blocks_hold_what_they_say(engine)?;
        self.counters_add_up(engine)?;
        self.turns_are_fair(engine)?;
        self.work_is_done(engine, report)?;
        self.failures_end_the_engine(engine)?;
        let mut num_committed = 0;
        for view in engine.sequences() {
            self.kv_is_what_it_says(&view)?;
            num_committed += self.tokens_are_the_expected(&view)?;
        }
        claim(num_committed == report.num_committed, || {
            format!("I3: {num_committed} tokens appeared, the step says {report:?}")
        })?;
        for (before, view) in both(&self.before, engine) {
            if before.phase == Phase::Running && view.phase == Phase::Preempted {
                let known = self.known.get_mut(&view.id).expect("it was looked at above");
                known.waiting_since = self.before.now;
                // What a reader that is behind costs is its own.
                known.num_preemptions += usize::from(!view.is_paused);
                claim(known.num_preemptions <= self.config.preemptions_max, || {
                    format!("{} was preempted {} times", view.id, known.num_preemptions)
                })?;
            }
        }
        self.note(engine, coverage);
        Ok(())
    }

    /// Checks what an event, a cancel or an admission must leave true.
    ///
    /// # Errors
    /// What is broken.
    pub fn between_steps(&self, engine: &Engine) -> Result<(), String> {
        self.blocks_are_accounted_for(engine)?;
        self.counters_add_up(engine)
    }

    /// I12: steps and queues stay within their bounds.
    fn rows_are_bounded(&self, engine: &Engine, report: StepReport) -> Result<(), String> {
        claim(report.num_rows <= self.config.step_tokens_max, || {
            format!("I12: {} rows of {}", report.num_rows, self.config.step_tokens_max)
        })?;
        let num_running = engine.sequences().filter(|view| view.phase == Phase::Running).count();
        claim(num_running <= self.config.max_running, || format!("I12: {num_running} running"))?;
        let is_waiting = |phase| matches!(phase, Phase::Waiting | Phase::Preempted);
        let num_waiting = engine.sequences().filter(|view| is_waiting(view.phase)).count();
        let bound = self.config.max_running + self.config.max_waiting;
        claim(num_waiting + num_running <= bound, || {
            format!("I12: {num_waiting} waiting, {num_running} running")
        })?;
        let counts = self.verifier.counts();
        claim(counts.refused_calls == 0, || "I4: an id, position or block out of range".into())?;
        claim(counts.poisoned_reads == 0, || {
            format!("I2, I10: {} foreign or stale KV slots were read", counts.poisoned_reads)
        })?;
        claim(counts.shared_writes == 0, || {
            format!("I2: {} blocks were written that others read", counts.shared_writes)
        })
    }

    fn counters_add_up(&self, engine: &Engine) -> Result<(), String> {
        let counters = engine.counters();
        let num_held = engine.sequences().count() as u64;
        let is_over = |view: &SequenceView<'_>| matches!(view.phase, Phase::Finished(_));
        let num_over = engine.sequences().filter(is_over).count() as u64;
        let is_sound = counters.submitted - counters.released == num_held
            && counters.finished - counters.released == num_over
            && counters.accepted <= counters.proposed;
        claim(is_sound, || format!("I6: {counters:?} with {num_held} held, {num_over} over"))?;
        let by = counters.finished_by;
        let num_natural = by.end_token + by.stop_string + by.length;
        let num_forced =
            by.client_gone + by.aborted + by.stalled + by.deadline + by.fault + by.shutting_down;
        let proposed: u64 = counters.proposed_by_position.iter().sum();
        let accepted: u64 = counters.accepted_by_position.iter().sum();
        let is_split_right = num_natural + num_forced == counters.finished
            && (proposed, accepted) == (counters.proposed, counters.accepted)
            && counters.drafts == counters.proposed_by_position[0]
            && counters.taken <= counters.committed
            && counters.cached <= counters.looked_up
            && counters.fair_preemptions <= counters.preemptions;
        claim(is_split_right, || format!("I6: parts and sums differ: {counters:?}"))?;
        let shown = engine.snapshot();
        claim(shown == expected_snapshot(engine, &shown), || {
            format!("I6: shown is {shown:?}, there is {:?}", expected_snapshot(engine, &shown))
        })
    }

    /// I2: what counts as computed really is in the store, and nothing beyond it is held.
    fn kv_is_what_it_says(&self, view: &SequenceView<'_>) -> Result<(), String> {
        let id = view.id;
        if view.phase != Phase::Running {
            return claim(view.computed_len == 0, || format!("I2: {id} computed without blocks"));
        }
        claim(view.computed_len < view.tokens.len(), || format!("I2: {id} is past its tokens"))?;
        let known = self.known.get(&id).ok_or_else(|| format!("{id} was never admitted"))?;
        let needed = BlockManager::blocks_for(view.computed_len);
        let useful = BlockManager::blocks_for(view.tokens.len());
        let all = BlockManager::blocks_for(known.max_len);
        let bounds = if view.is_pinned { all..=all } else { needed..=useful };
        let num_blocks = view.blocks.len();
        claim(bounds.contains(&num_blocks), || {
            format!("I2: {id} holds {num_blocks} blocks, {bounds:?} make sense")
        })?;
        let wrong = self.verifier.first_wrong_slot(view.blocks, &known.states[..view.computed_len]);
        claim(wrong.is_none(), || format!("I2: {id} has a wrong KV slot: {wrong:?}"))
    }

    /// I3 and I11: a step adds at most a proposal and one token, and only what the oracle chose.
    fn tokens_are_the_expected(&mut self, view: &SequenceView<'_>) -> Result<usize, String> {
        let id = view.id;
        let known = self.known.get_mut(&id).ok_or_else(|| format!("{id} was never admitted"))?;
        claim(known.future.starts_with(view.tokens), || {
            format!("I11: {id} has {:?}, the oracle {:?}", view.tokens, known.future)
        })?;
        let num_new = view.tokens.len() - known.len;
        known.len = view.tokens.len();
        claim(num_new <= self.config.draft_len_max + 1, || format!("I3: {id} got {num_new}"))?;
        Ok(num_new)
    }

    /// A verifier that panicked once, or failed too often in a row, ends the engine; nothing else
    /// does.
    fn failures_end_the_engine(&mut self, engine: &Engine) -> Result<(), String> {
        let (before, after) = (self.before.verifier, self.verifier.counts());
        if after.failed_calls > before.failed_calls {
            self.failures_in_a_row += 1;
        } else if after.calls > before.calls {
            self.failures_in_a_row = 0;
        }
        let num_failed = self.failures_in_a_row;
        let is_over =
            after.panicked_calls > 0 || num_failed >= self.config.verifier_failures_max as u64;
        claim(engine.has_failed() == is_over, || {
            format!("{num_failed} failures in a row, {after:?}: {}", engine.has_failed())
        })
    }

    /// Liveness: with everything finished and taken, nothing is left.
    ///
    /// # Errors
    /// What is left.
    pub fn at_the_end(&self, engine: &Engine) -> Result<(), String> {
        let counters = engine.counters();
        claim(!engine.has_work() && engine.sequences().count() == 0, || "work is left".into())?;
        self.blocks_are_accounted_for(engine)?;
        claim(
            counters.submitted == counters.finished && counters.finished == counters.released,
            || format!("requests are left: {counters:?}"),
        )
    }

    /// Notes what the last step did that only a comparison with the moment before it shows.
    fn note(&self, engine: &Engine, coverage: &mut Coverage) {
        let mut num_started = [0, 0]; // never computed before, preempted before
        for (before, view) in both(&self.before, engine) {
            let starts = view.phase == Phase::Running && before.phase != Phase::Running;
            num_started[usize::from(before.phase == Phase::Preempted)] += usize::from(starts);
            let is_unpaused = before.is_paused && !view.is_paused && view.phase == Phase::Running;
            coverage.note("unpaused", u64::from(is_unpaused));
            coverage.note("pinned", u64::from(starts && view.is_pinned));
            let has_part = before.computed_len > 0 && before.computed_len + 1 < view.prompt_len;
            let is_more = view.computed_len > before.computed_len;
            coverage.note("chunked prompts", u64::from(has_part && is_more));
        }
        let hits = engine.counters().cached - self.before.counters.cached;
        let only_resumed = num_started[0] == 0 && num_started[1] > 0;
        coverage.note("resumed with hits", u64::from(only_resumed && hits > 0));
    }
}

/// Every sequence that was there before the step and is still, as it was and as it is.
fn both<'a>(
    before: &'a Moment,
    engine: &'a Engine,
) -> impl Iterator<Item = (Before, SequenceView<'a>)> {
    let mut before = before.sequences.iter();
    engine.sequences().filter_map(move |view| {
        before.find(|before| before.id == view.id).map(|before| (*before, view))
    })
}

/// What a snapshot must show. What only the engine knows is taken from `shown`.
fn expected_snapshot(engine: &Engine, shown: &EngineSnapshot) -> EngineSnapshot {
    let mut wanted = EngineSnapshot {
        counters: *engine.counters(),
        num_running: 0,
        num_waiting: 0,
        num_held: 0,
        num_paused: 0,
        waiting_by_priority: [0; 3],
        num_blocks: engine.blocks().num_blocks(),
        num_free_blocks: engine.blocks().num_free(),
        num_cached_blocks: engine.blocks().num_cached(),
        is_draft_quarantined: engine.is_draft_quarantined(),
        ..*shown
    };
    for view in engine.sequences() {
        wanted.num_held += 1;
        match view.phase {
            Phase::Running => {
                wanted.num_running += 1;
                wanted.num_paused += usize::from(view.is_paused);
            }
            Phase::Waiting | Phase::Preempted => {
                wanted.num_waiting += 1;
                wanted.waiting_by_priority[view.priority as usize] += 1;
            }
            Phase::Finished(_) => {}
        }
    }
    wanted
}
