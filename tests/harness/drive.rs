//! Owns running an engine from requests to their ends, for tests that care about outputs and not
//! about what happens on the way.

use std::sync::Arc;

use slipstream_draft::model_proposer::ModelProposerOptions;
use slipstream_draft::proposer::Proposer;
use slipstream_model::clock::Clock;
use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::request::Request;
use slipstream_server::engine::{Counters, Engine, EngineConfig, EngineParts};

use crate::collected::Collected;
use crate::hash_lm::{HashLm, HashLmConfig, HashLmProbe};
use crate::model_draft::model_draft;
use crate::proposers::{Behaviour, Knowledge, Script, ScriptedProposer, VirtualClock};
use crate::reference::{Expected, Pieces, decode};

/// A request and what must come of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The request.
    pub request: Request,
    /// The oracle's answer.
    pub expected: Expected,
}

impl Case {
    /// Asks the oracle, on a fresh hash LM of its own. `owner` is the sequence id that the request
    /// will have in the engine: its place in the list of cases, from 1.
    #[must_use]
    pub fn new(lm: HashLmConfig, pieces: &Pieces, request: Request, owner: u64) -> Self {
        let (mut forward, _) = HashLm::new(lm);
        let expected = decode(&mut forward, pieces, &request, owner);
        Self { request, expected }
    }

    /// All tokens the sequence will ever have.
    #[must_use]
    pub fn future(&self) -> Vec<TokenId> {
        [&self.request.prompt[..], &self.request.output_prefix, &self.expected.chosen].concat()
    }
}

/// What proposes in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DraftKind {
    /// Nothing.
    None,
    /// A scripted proposer.
    Scripted(Behaviour),
    /// The real model proposer on a hash LM of the same language with this much noise.
    Model(f32),
}

/// What a run brought.
pub struct Outcome {
    /// What each client received, in the order of the cases.
    pub collected: Vec<Collected>,
    /// The engine's counters at the end.
    pub counters: Counters,
}

/// An engine on a hash LM, and the probe into it.
#[must_use]
pub fn hash_engine(
    lm: HashLmConfig,
    config: EngineConfig,
    pieces: &Pieces,
    kind: DraftKind,
    cases: &[Case],
) -> (Engine, HashLmProbe) {
    let clock = Arc::new(VirtualClock::default());
    let (forward, probe) = HashLm::new(lm);
    let engine = Engine::new(EngineParts {
        config,
        verifier: Box::new(forward),
        proposer: draft(lm, kind, cases, &clock),
        token_bytes: Arc::new(TokenBytes::new(pieces)),
        clock: Arc::<VirtualClock>::clone(&clock) as Arc<dyn Clock>,
        cache_key: [7; 32],
    });
    (engine, probe)
}

/// The proposer of `kind`; a scripted one knows the futures of `cases`.
#[must_use]
pub fn draft(
    lm: HashLmConfig,
    kind: DraftKind,
    cases: &[Case],
    clock: &Arc<VirtualClock>,
) -> Option<Box<dyn Proposer>> {
    match kind {
        DraftKind::None => None,
        DraftKind::Scripted(behaviour) => {
            let knowledge = Knowledge::default();
            for (case, id) in cases.iter().zip(1..) {
                knowledge.learn(SequenceId(id), case.future());
            }
            Some(Box::new(ScriptedProposer::new(Script {
                behaviour,
                epoch: DraftEpoch(1),
                knowledge,
                vocab_size: lm.limits.vocab_size,
                clock: Arc::clone(clock),
                seed: 7,
            })))
        }
        DraftKind::Model(perturbation) => {
            let options = ModelProposerOptions::default();
            Some(model_draft(lm.draft(perturbation), DraftEpoch(1), options).0)
        }
    }
}

/// Submits `requests` one every `steps_between` steps under ids from 1 on, and runs until all are
/// finished and taken.
///
/// # Panics
/// When a request is refused or work does not end.
pub fn drive(engine: &mut Engine, requests: &[Request], steps_between: usize) -> Outcome {
    drive_with(engine, requests, steps_between, |_, _| {})
}

/// As [`drive`], calling `before_step` with the step's number before each step.
///
/// # Panics
/// When a request is refused or work does not end.
pub fn drive_with(
    engine: &mut Engine,
    requests: &[Request],
    steps_between: usize,
    mut before_step: impl FnMut(&mut Engine, usize),
) -> Outcome {
    let mut collected = vec![Collected::default(); requests.len()];
    let mut num_submitted = 0;
    let mut news = Vec::new();
    for step in 0.. {
        while num_submitted < requests.len() && num_submitted * steps_between <= step {
            let request = requests[num_submitted].clone();
            num_submitted += 1;
            let id = SequenceId(num_submitted as u64);
            engine.submit(id, request).expect("the request is valid and fits");
        }
        before_step(engine, step);
        engine.step();
        news.clear();
        engine.ids_with_news(&mut news);
        for &id in &news {
            while let Some(event) = engine.take_event(id) {
                collected[id.0 as usize - 1].take(event).expect("nothing follows the end");
            }
        }
        if num_submitted == requests.len() && !engine.has_work() {
            break;
        }
        assert!(step < 1_000_000, "work does not end");
    }
    Outcome { collected, counters: *engine.counters() }
}

/// Fails unless every client received what the oracle expects. `context` says what was run.
///
/// # Panics
/// When an output differs.
pub fn assert_expected(
    outcome: &Outcome,
    cases: &[Case],
    pieces: &Pieces,
    context: &dyn std::fmt::Debug,
) {
    for (index, (collected, case)) in outcome.collected.iter().zip(cases).enumerate() {
        let check = collected.check_finished(&case.request, &case.expected, pieces);
        if let Err(difference) = check {
            panic!("{context:?}: request {index} {:?}: {difference}", case.request);
        }
        let reason = collected.finished.as_ref().map(|finished| finished.reason);
        assert_eq!(reason, Some(case.expected.reason), "{context:?}: request {index}");
    }
}
