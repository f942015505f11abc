//! Owns the invariants that hold after every step, whatever happened in it. Sees the engine through
//! its public views only. Numbers like I1 are those of the project's reliability notes.

use std::collections::{BTreeMap, BTreeSet};

use slipstream_model::block_manager::BlockManager;
use slipstream_model::ids::{SequenceId, TokenId};
use slipstream_server::engine::{Engine, EngineConfig, Phase, SequenceView, StepReport};

use crate::hash_lm::HashLmProbe;

/// What the checker must know about the world.
pub struct Checker {
    config: EngineConfig,
    verifier: HashLmProbe,
    /// Prompt, prefix and all tokens that each sequence will ever choose.
    futures: BTreeMap<SequenceId, Vec<TokenId>>,
    /// Known length of each sequence after the previous step.
    lens: BTreeMap<SequenceId, usize>,
}

/// A claim about the engine; its failure names what broke.
fn claim(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

impl Checker {
    /// A checker of an engine with this configuration and verifier.
    #[must_use]
    pub fn new(config: EngineConfig, verifier: HashLmProbe) -> Self {
        Self { config, verifier, futures: BTreeMap::new(), lens: BTreeMap::new() }
    }

    /// Learns of a request that was taken: all tokens it will ever have, and how many it has.
    pub fn admit(&mut self, id: SequenceId, future: Vec<TokenId>, known_len: usize) {
        self.futures.insert(id, future);
        self.lens.insert(id, known_len);
    }

    /// Checks everything that a step must leave true.
    ///
    /// # Errors
    /// What is broken.
    pub fn after_step(&mut self, engine: &Engine, report: StepReport) -> Result<(), String> {
        self.rows_are_bounded(engine, report)?;
        self.blocks_are_accounted_for(engine)?;
        self.counters_add_up(engine)?;
        first_come_first_served(engine)?;
        let mut num_committed = 0;
        for view in engine.sequences() {
            self.kv_is_what_it_says(&view)?;
            num_committed += self.tokens_are_the_expected(&view)?;
        }
        claim(num_committed == report.num_committed, || {
            format!("I3: {num_committed} tokens appeared, the step says {report:?}")
        })
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
        let bound = 2 * self.config.max_running + self.config.max_waiting;
        claim(num_waiting <= bound, || format!("I12: {num_waiting} waiting"))?;
        let counts = self.verifier.counts();
        claim(counts.refused_calls == 0, || "I4: an id, position or block out of range".into())?;
        claim(counts.poisoned_reads == 0, || {
            format!("I2, I10: {} foreign or stale KV slots were read", counts.poisoned_reads)
        })
    }

    /// I1: every block is free or owned, once.
    fn blocks_are_accounted_for(&self, engine: &Engine) -> Result<(), String> {
        let blocks = engine.blocks();
        let mut owned = BTreeSet::new();
        for view in engine.sequences() {
            for &block in view.blocks {
                owned.insert(block);
                claim(blocks.refs(block) > 0, || format!("I1: {block:?} is owned and free"))?;
            }
            claim(view.phase == Phase::Running || view.blocks.is_empty(), || {
                format!("I1: sequence {} in {:?} holds blocks", view.id, view.phase)
            })?;
        }
        claim(blocks.num_available() + owned.len() == blocks.num_blocks(), || {
            format!(
                "I1: {} free and {} owned of {}",
                blocks.num_free(),
                owned.len(),
                blocks.num_blocks()
            )
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
            && counters.taken <= counters.committed;
        claim(is_split_right, || format!("I6: parts and sums differ: {counters:?}"))?;
        let shown = engine.snapshot();
        let num_live = shown.num_running + shown.num_waiting;
        let is_shown_right = shown.counters == *counters
            && shown.num_held as u64 == num_held
            && num_live as u64 + num_over == num_held
            && shown.num_free_blocks == engine.blocks().num_free()
            && shown.is_draft_quarantined == engine.is_draft_quarantined();
        claim(is_shown_right, || format!("I6: shown is {shown:?}, counted {counters:?}"))
    }

    /// I2: what counts as computed really is in the store, and nothing beyond it is held.
    fn kv_is_what_it_says(&self, view: &SequenceView<'_>) -> Result<(), String> {
        let id = view.id;
        if view.phase != Phase::Running {
            return claim(view.computed_len == 0, || format!("I2: {id} computed without blocks"));
        }
        claim(view.computed_len < view.tokens.len(), || format!("I2: {id} is past its tokens"))?;
        let needed = BlockManager::blocks_for(view.computed_len);
        let useful = BlockManager::blocks_for(view.tokens.len());
        let num_blocks = view.blocks.len();
        claim((needed..=useful).contains(&num_blocks), || {
            format!("I2: {id} holds {num_blocks} blocks, {needed} to {useful} make sense")
        })?;
        let computed = &view.tokens[..view.computed_len];
        let wrong = self.verifier.first_wrong_slot(id.0, view.blocks, computed);
        claim(wrong.is_none(), || format!("I2: {id} has a wrong KV slot: {wrong:?}"))
    }

    /// I3 and I11: a step adds at most a proposal and one token, and only what the oracle chose.
    fn tokens_are_the_expected(&mut self, view: &SequenceView<'_>) -> Result<usize, String> {
        let id = view.id;
        let future = self.futures.get(&id).ok_or_else(|| format!("{id} was never admitted"))?;
        claim(future.starts_with(view.tokens), || {
            format!("I11: {id} has {:?}, the oracle {future:?}", view.tokens)
        })?;
        let old_len = self.lens.insert(id, view.tokens.len()).unwrap_or(0);
        let num_new = view.tokens.len() - old_len;
        claim(num_new <= self.config.draft_len_max + 1, || format!("I3: {id} got {num_new}"))?;
        Ok(num_new)
    }

    /// Liveness: with everything finished and taken, nothing is left.
    ///
    /// # Errors
    /// What is left.
    pub fn at_the_end(&self, engine: &Engine) -> Result<(), String> {
        let counters = engine.counters();
        let blocks = engine.blocks();
        claim(!engine.has_work() && engine.sequences().count() == 0, || "work is left".into())?;
        claim(blocks.num_available() == blocks.num_blocks(), || "blocks are left".into())?;
        claim(
            counters.submitted == counters.finished && counters.finished == counters.released,
            || format!("requests are left: {counters:?}"),
        )
    }
}

/// I9: nobody starts before an older request has started. Ids ascend with arrival.
fn first_come_first_served(engine: &Engine) -> Result<(), String> {
    let mut waits = None;
    for view in engine.sequences() {
        match view.phase {
            Phase::Waiting => waits = waits.or(Some(view.id)),
            Phase::Running | Phase::Preempted => claim(waits.is_none(), || {
                format!("I9: {} has started, the older {waits:?} has not", view.id)
            })?,
            Phase::Finished(_) => {}
        }
    }
    Ok(())
}
