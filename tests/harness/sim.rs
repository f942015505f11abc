//! Owns the simulated world: one seed decides the engine's shape, who arrives when and asks what,
//! who reads slowly, cancels or goes away, which drafts come and go, and what fails. First a storm
//! in which safety is checked after every step, then calm weather in which everything must finish.
//! Time is virtual, so that a seed replays exactly.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use slipstream_draft::model_proposer::ModelProposerOptions;
use slipstream_draft::proposer::Proposer;
use slipstream_model::clock::{Clock, Micros};
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::{BLOCK_LEN, DraftEpoch, SequenceId, TokenId};
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::event::{CancelReason, Event, FinishReason, Provenance};
use slipstream_server::engine::request::{Request, SubmitError};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts, Phase};

use crate::checkers::Checker;
use crate::collected::{Collected, is_natural};
use crate::hash_lm::{HashLm, HashLmConfig, HashLmProbe};
use crate::model_draft::{DraftWatch, model_draft};
use crate::pieces::pieces;
use crate::proposers::{BEHAVIOURS, Behaviour, Knowledge, Script, ScriptedProposer, VirtualClock};
use crate::random::Rng;
use crate::reference::{Expected, decode};
use crate::requests::{RequestSizes, random_request};

/// How often each thing happened, so that a simulator that goes blind is noticed.
pub type Coverage = BTreeMap<&'static str, u64>;

/// Most steps that calm weather may take before a world counts as stuck.
const CALM_STEPS_MAX: usize = 20_000;

/// What one seed decides about a world before it starts.
#[derive(Clone, Debug)]
struct Climate {
    verifier: HashLmConfig,
    config: EngineConfig,
    sizes: RequestSizes,
    num_requests: usize,
    storm_steps: usize,
    burst_max: usize,
    cancel_one_in: usize,
    swap_one_in: usize,
    verifier_fails_one_in: usize,
}

impl Climate {
    fn new(rng: &mut Rng) -> Self {
        let vocab_size = rng.between(20, 40);
        let sizes = RequestSizes {
            vocab_size,
            prompt_len_max: rng.between(4, 70),
            max_tokens_max: rng.between(2, 80),
        };
        let len_max = sizes.prompt_len_max + sizes.max_tokens_max;
        let fewest = len_max.div_ceil(BLOCK_LEN);
        let limits = ForwardLimits {
            vocab_size,
            context_len: len_max + rng.below(20),
            // Mostly hardly more than one request needs, so that sequences fight for blocks.
            num_blocks: fewest + if rng.one_in(4) { rng.below(40) } else { rng.below(4) },
        };
        let nan_one_in = *rng.pick(&[0, 0, 0, 150]);
        Self {
            verifier: HashLmConfig { nan_one_in, ..HashLmConfig::verifier(rng.bits(), limits) },
            config: EngineConfig {
                step_tokens_max: *rng.pick(&[1, 3, 5, 8, 16, 16, 40, 40, 256, 256]),
                max_running: rng.between(1, 10),
                max_waiting: rng.between(1, 12),
                draft_len_auto: rng.between(0, 5),
                draft_len_max: *rng.pick(&[0, 1, 2, 4, 8, 8, 8]),
                propose_budget: Micros(1_000),
                quarantine_after: *rng.pick(&[1, 3, 1_000, 1_000, 1_000]),
                ..EngineConfig::default()
            },
            sizes,
            num_requests: rng.between(3, 60),
            storm_steps: rng.between(20, 800),
            burst_max: rng.between(1, 8),
            cancel_one_in: *rng.pick(&[0, 15, 100]),
            swap_one_in: *rng.pick(&[0, 8, 60]),
            verifier_fails_one_in: *rng.pick(&[0, 0, 0, 150]),
        }
    }
}

/// One client.
struct Client {
    request: Request,
    expected: Expected,
    collected: Collected,
    /// Takes its events once in this many steps.
    reads_one_in: usize,
}

/// A world in motion.
pub struct World {
    rng: Rng,
    climate: Climate,
    clock: Arc<VirtualClock>,
    engine: Engine,
    checker: Checker,
    verifier: HashLmProbe,
    oracle: HashLm,
    pieces: Vec<Vec<u8>>,
    knowledge: Knowledge,
    draft: Option<DraftWatch>,
    epoch: u32,
    next_id: u64,
    clients: BTreeMap<SequenceId, Client>,
    /// What happened.
    pub coverage: Coverage,
}

impl World {
    /// The world of a seed, before anything has happened.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let climate = Climate::new(&mut rng);
        let (forward, verifier) = HashLm::new(climate.verifier);
        let mut oracle_config = climate.verifier;
        oracle_config.limits.num_blocks = climate.verifier.limits.context_len.div_ceil(BLOCK_LEN);
        let pieces = pieces(climate.sizes.vocab_size);
        let clock = Arc::new(VirtualClock::default());
        let engine = Engine::new(EngineParts {
            config: climate.config,
            verifier: Box::new(forward),
            proposer: None,
            token_bytes: Arc::new(TokenBytes::new(&pieces)),
            clock: Arc::<VirtualClock>::clone(&clock),
            cache_key: [7; 32],
        });
        let mut world = Self {
            checker: Checker::new(climate.config, verifier.clone()),
            oracle: HashLm::new(oracle_config).0,
            rng,
            climate,
            clock,
            engine,
            verifier,
            pieces,
            knowledge: Knowledge::default(),
            draft: None,
            epoch: 0,
            next_id: 1,
            clients: BTreeMap::new(),
            coverage: Coverage::new(),
        };
        world.swap_draft();
        world
    }

    /// Lives the world to its end.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn run(&mut self) -> Result<(), String> {
        let mut arrivals_left = self.climate.num_requests;
        for _ in 0..self.climate.storm_steps {
            if self.rng.one_in(4) {
                let burst = self.rng.between(1, self.climate.burst_max).min(arrivals_left);
                arrivals_left -= burst;
                for _ in 0..burst {
                    self.arrive()?;
                }
            }
            self.disturb()?;
            self.step()?;
            self.read(false)?;
        }
        self.calm()
    }

    fn note(&mut self, what: &'static str, times: u64) {
        *self.coverage.entry(what).or_default() += times;
    }

    /// One new request, sometimes a resumed one, sometimes one that must be refused.
    fn arrive(&mut self) -> Result<(), String> {
        let mut rng = self.rng.fork(self.next_id);
        let mut request = random_request(&mut rng, self.climate.sizes, &self.pieces);
        request.arrival = self.clock.now();
        if rng.one_in(12) {
            request.deadline = Some(self.clock.now().plus(Micros(rng.below(60_000) as u64)));
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let mut expected = decode(&mut self.oracle, &self.pieces, &request, id.0);
        if rng.one_in(4) {
            let cut = rng.below(expected.tokens.len() + 1);
            request.output_prefix = expected.tokens[..cut].to_vec();
            expected = decode(&mut self.oracle, &self.pieces, &request, id.0);
            self.note("resumed", 1);
        }
        if rng.one_in(10) {
            return self.arrive_badly(id, request, &mut rng);
        }
        let num_submitted = self.engine.counters().submitted;
        match self.engine.submit(id, request.clone()) {
            Ok(()) => {}
            Err(SubmitError::QueueFull { .. }) => {
                self.note("queue full", 1);
                let is_unchanged = self.engine.counters().submitted == num_submitted;
                return if is_unchanged { Ok(()) } else { Err("refused, but counted".into()) };
            }
            Err(error) => return Err(format!("a valid request was refused: {error}")),
        }
        let mut future = request.prompt.clone();
        future.extend_from_slice(&request.output_prefix);
        let known_len = future.len();
        future.extend_from_slice(&expected.chosen);
        self.knowledge.learn(id, future.clone());
        self.checker.admit(id, future, known_len);
        let reads_one_in = *rng.pick(&[1, 1, 5, 50]);
        let collected = Collected::default();
        self.clients.insert(id, Client { request, expected, collected, reads_one_in });
        self.checker.between_steps(&self.engine)
    }

    /// A request with one thing wrong must be refused and leave nothing behind.
    fn arrive_badly(
        &mut self,
        id: SequenceId,
        mut request: Request,
        rng: &mut Rng,
    ) -> Result<(), String> {
        let beyond = TokenId(u32::try_from(self.climate.sizes.vocab_size).unwrap());
        match rng.below(6) {
            0 => request.prompt.clear(),
            1 => request.prompt.push(beyond),
            2 => request.output_prefix = vec![TokenId(u32::MAX)],
            3 => request.max_tokens = 0,
            4 => request.max_tokens = self.climate.verifier.limits.context_len,
            _ => request.stop_strings.push(Vec::new()),
        }
        let before = *self.engine.counters();
        let refusal = self.engine.submit(id, request);
        self.note("refused", 1);
        let is_unchanged = *self.engine.counters() == before;
        if refusal.is_ok() || !is_unchanged {
            return Err(format!("a bad request was taken: {refusal:?}"));
        }
        self.checker.between_steps(&self.engine)
    }

    /// Whatever the storm does between two steps.
    fn disturb(&mut self) -> Result<(), String> {
        self.clock.advance(Micros(self.rng.below(2_000) as u64));
        if self.rng.one_in(self.climate.swap_one_in) {
            self.swap_draft();
            self.note("swaps", 1);
        }
        if self.rng.one_in(self.climate.verifier_fails_one_in) {
            self.verifier.fail_next(1);
        }
        if let Some(draft) = &self.draft
            && self.rng.one_in(60)
        {
            draft.probe.fail_next(1);
        }
        if self.rng.one_in(self.climate.cancel_one_in) {
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
            Phase::Running if view.computed_len < view.prompt_len => "cancelled in prompt",
            Phase::Running => "cancelled in output",
            Phase::Preempted => "cancelled preempted",
            Phase::Finished(_) => "cancelled finished",
        };
        self.note(state, 1);
        if self.rng.one_in(3) {
            self.engine.forget(id, CancelReason::ClientGone);
            self.clients.remove(&id);
            self.note("forgotten", 1);
            if self.engine.sequences().any(|view| view.id == id) {
                return Err(format!("{id} was forgotten and is still there"));
            }
        } else {
            self.engine.cancel(id, CancelReason::Aborted);
        }
        self.checker.between_steps(&self.engine)
    }

    /// Installs another draft: a scripted one, the real proposer on a related hash LM, or none.
    fn swap_draft(&mut self) {
        self.epoch += 2; // a wrong-epoch proposer claims the odd one behind its own
        let epoch = DraftEpoch(self.epoch);
        self.draft = None;
        let proposer: Option<Box<dyn Proposer>> = match self.rng.below(10) {
            0 => None,
            1..=4 => {
                let mut config = self.climate.verifier.draft(*self.rng.pick(&[0.0, 0.3, 1.0, 3.0]));
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
                let (proposer, watch) = model_draft(config, epoch, options);
                self.draft = Some(watch);
                Some(proposer)
            }
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

    fn step(&mut self) -> Result<usize, String> {
        let before = *self.engine.counters();
        let num_caused = self.draft.as_ref().map_or(0, DraftWatch::num_caused_faults);
        let report = self.engine.step();
        self.checker.after_step(&self.engine, report)?;
        if let Some(breach) = self.knowledge.breaches().first() {
            return Err(format!("the engine asked a proposer wrongly: {breach}"));
        }
        if let Some(draft) = &self.draft {
            let counts = draft.probe.counts();
            if counts.poisoned_reads + counts.refused_calls > 0 {
                return Err(format!("the draft read or computed nonsense: {counts:?}"));
            }
            let after = *self.engine.counters();
            let is_caused = draft.num_caused_faults() > num_caused;
            if after.draft_faults > before.draft_faults && !is_caused {
                return Err("the draft failed by itself".to_owned());
            }
            if after.dropped_proposals > before.dropped_proposals {
                return Err("the draft proposed what cannot be".to_owned());
            }
            let kind = match draft.vocab_size.cmp(&self.climate.sizes.vocab_size) {
                Ordering::Less => "accepted from a narrower draft",
                Ordering::Equal => "accepted from a like draft",
                Ordering::Greater => "accepted from a wider draft",
            };
            self.note(kind, after.accepted - before.accepted);
        }
        let in_prompt = self.engine.sequences().any(|view| {
            view.phase == Phase::Running && (1..view.prompt_len).contains(&view.computed_len)
        });
        self.note("steps", 1);
        self.note("steps inside a prompt", u64::from(in_prompt));
        Ok(report.num_rows)
    }

    /// Clients take their events; in calm weather all do, all the time.
    fn read(&mut self, is_calm: bool) -> Result<(), String> {
        let ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        for id in ids {
            let client = self.clients.get_mut(&id).expect("ids were just listed");
            if !is_calm && !self.rng.one_in(client.reads_one_in) {
                continue;
            }
            let is_running = self
                .engine
                .sequences()
                .any(|view| view.id == id && !matches!(view.phase, Phase::Finished(_)));
            while let Some(event) = self.engine.take_event(id) {
                let is_end = matches!(event, Event::Finished(_));
                client.collected.take(event).map_err(|error| format!("I7: {id}: {error}"))?;
                if is_end {
                    break;
                }
            }
            if is_running {
                let check = client.collected.check_running(&client.expected);
                check.map_err(|error| format!("I5, I11: {id}: {error}"))?;
            }
            if client.collected.finished.is_some() {
                let client = self.clients.remove(&id).expect("it was just used");
                self.close(id, &client)?;
            }
        }
        self.checker.between_steps(&self.engine)
    }

    /// A client has its end: everything it received is compared with the oracle.
    fn close(&mut self, id: SequenceId, client: &Client) -> Result<(), String> {
        let Client { request, expected, collected, .. } = client;
        let check = collected.check_finished(request, expected, &self.pieces);
        check.map_err(|error| format!("I5, I6, I11: {id} {request:?}: {error}"))?;
        let reason = collected.finished.as_ref().expect("only ended clients close").reason;
        self.note(if is_natural(reason) { "natural ends" } else { "forced ends" }, 1);
        self.note(
            match reason {
                FinishReason::EndToken(_) => "ended by token",
                FinishReason::StopString(_) => "ended by stop string",
                FinishReason::Length => "ended by length",
                FinishReason::Cancelled(_) => "ended by cancel",
                FinishReason::DeadlineExceeded => "ended by deadline",
                FinishReason::Fault(_) if is_natural(reason) => "ended by bad logits",
                FinishReason::Fault(_) => "ended by verifier failure",
                FinishReason::ShuttingDown => "ended by shutdown",
            },
            1,
        );
        let first = collected.tokens.first().map(|token| token.provenance);
        if first.is_some_and(|provenance| provenance != Provenance::Plain) {
            return Err(format!("{id} waited for a draft before its first token: {first:?}"));
        }
        for token in &collected.tokens {
            let is_known_epoch = token.draft_epoch.is_none_or(|epoch| epoch.0 <= self.epoch);
            let is_even = token.draft_epoch.is_none_or(|epoch| epoch.0.is_multiple_of(2));
            if !is_known_epoch || !is_even {
                return Err(format!("I8: {id} has a token of another epoch: {token:?}"));
            }
            self.note(
                match token.provenance {
                    Provenance::Accepted => "accepted tokens",
                    Provenance::Correction => "correction tokens",
                    Provenance::Bonus => "bonus tokens",
                    Provenance::Plain => "plain tokens",
                },
                1,
            );
        }
        Ok(())
    }

    /// Faults and cancels stop, readers read: everything must come to its end.
    fn calm(&mut self) -> Result<(), String> {
        self.verifier.fail_next(0);
        if self.rng.one_in(8) {
            self.engine.shut_down();
        }
        let mut num_steps = 0;
        while self.engine.has_work() {
            let had_live = self.engine.sequences().any(|v| !matches!(v.phase, Phase::Finished(_)));
            let num_rows = self.step()?;
            self.read(true)?;
            self.clock.advance(Micros(100));
            num_steps += 1;
            if had_live && num_rows == 0 && self.engine.has_work() {
                return Err("liveness: a step computed nothing with work to do".to_owned());
            }
            if num_steps > CALM_STEPS_MAX {
                return Err("liveness: work does not end".to_owned());
            }
        }
        self.read(true)?;
        if let Some(id) = self.clients.keys().next() {
            return Err(format!("liveness: {id} never got its end"));
        }
        self.checker.at_the_end(&self.engine)?;
        if let Some(draft) = &self.draft
            && draft.num_held_blocks() > 0
        {
            return Err(format!("the draft leaks {} blocks", draft.num_held_blocks()));
        }
        let counters = *self.engine.counters();
        self.note("preemptions", counters.preemptions);
        self.note("quarantines", counters.quarantines);
        self.note("draft faults", counters.draft_faults);
        self.note("dropped proposals", counters.dropped_proposals);
        self.note("proposed", counters.proposed);
        self.note("rejected", counters.proposed - counters.accepted);
        self.note("verifier failures", counters.verifier_failures);
        Ok(())
    }
}
