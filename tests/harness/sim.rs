//! Owns the simulated world: one seed decides the engine's shape, who arrives when and asks what,
//! who reads slowly, cancels or goes away, which drafts come and go, and what fails. First a storm
//! in which safety is checked after every step, then calm weather in which everything must finish.
//! Time is virtual, so that a seed replays exactly. Each part of a world has a file of its own.

mod arrivals;
mod calm;
mod climate;
mod coverage;
mod readers;
mod weather;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use slipstream_model::clock::Clock;
use slipstream_model::ids::{BLOCK_LEN, SequenceId};
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::{Counters, Engine, EngineParts, Phase};

use crate::checkers::Checker;
use crate::hash_lm::{HashLm, HashLmProbe};
use crate::model_draft::DraftWatch;
use crate::pieces::pieces;
use crate::proposers::{Knowledge, VirtualClock};
use crate::random::Rng;
use arrivals::Population;
use climate::Climate;
use readers::Client;

pub use coverage::Coverage;

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
    population: Population,
    clients: BTreeMap<SequenceId, Client>,
    /// What happened.
    pub coverage: Coverage,
}

/// Whether a sequence in this phase can still get tokens.
fn is_live(phase: Phase) -> bool {
    !matches!(phase, Phase::Finished(_))
}

/// A claim about the world; its failure names what broke.
fn require(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

impl World {
    /// The world of a seed, before anything has happened.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let climate = Climate::new(&mut rng);
        let clock = Arc::new(VirtualClock::default());
        let (forward, verifier) = HashLm::timed(climate.verifier, &clock);
        let mut oracle_config = climate.verifier;
        oracle_config.limits.num_blocks = climate.verifier.limits.context_len.div_ceil(BLOCK_LEN);
        let pieces = pieces(climate.sizes.vocab_size);
        let engine = Engine::new(EngineParts {
            config: climate.config,
            verifier: Box::new(forward),
            proposer: None,
            token_bytes: Arc::new(TokenBytes::new(&pieces)),
            clock: Arc::<VirtualClock>::clone(&clock),
            cache_key: [7; 32],
        });
        let mut world = Self {
            checker: Checker::new(climate.config, climate.verifier, verifier.clone()),
            oracle: HashLm::new(oracle_config).0,
            population: Population::new(&mut rng, &climate),
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

    /// What the seed decided before anything happened.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{:?}", self.climate)
    }

    /// Lives the world to its end.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn run(&mut self) -> Result<(), String> {
        for _ in 0..self.climate.storm_steps {
            self.arrivals()?;
            self.disturb()?;
            self.step()?;
            self.read(false)?;
            if self.engine.has_failed() {
                self.coverage.note("failed engines", 1);
                break;
            }
        }
        self.calm()
    }

    /// One step of the engine, checked. Returns the rows it computed.
    fn step(&mut self) -> Result<usize, String> {
        let before = *self.engine.counters();
        let num_caused = self.draft.as_ref().map_or(0, DraftWatch::num_caused_faults);
        self.checker.before_step(&self.engine, self.clock.now());
        let report = self.engine.step();
        self.checker.after_step(&self.engine, report, &mut self.coverage)?;
        if let Some(breach) = self.knowledge.breaches().first() {
            return Err(format!("the engine asked a proposer wrongly: {breach}"));
        }
        self.check_draft(&before, num_caused)?;
        self.coverage.note("steps", 1);
        Ok(report.num_rows)
    }

    /// The installed draft did nothing in this step that it was not made to do.
    fn check_draft(&mut self, before: &Counters, num_caused: u64) -> Result<(), String> {
        let Some(draft) = &self.draft else { return Ok(()) };
        let counts = draft.probe.counts();
        let nonsense = counts.poisoned_reads + counts.refused_calls + counts.shared_writes;
        require(nonsense == 0, || format!("the draft read or computed nonsense: {counts:?}"))?;
        let after = *self.engine.counters();
        let is_caused = draft.num_caused_faults() > num_caused;
        require(after.draft_faults == before.draft_faults || is_caused, || {
            "the draft failed by itself".to_owned()
        })?;
        require(after.dropped_proposals == before.dropped_proposals, || {
            "the draft proposed what cannot be".to_owned()
        })?;
        let kind = match draft.vocab_size.cmp(&self.climate.sizes.vocab_size) {
            Ordering::Less => "accepted from a narrower draft",
            Ordering::Equal => "accepted from a like draft",
            Ordering::Greater => "accepted from a wider draft",
        };
        self.coverage.note(kind, after.accepted - before.accepted);
        Ok(())
    }
}
