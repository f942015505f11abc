//! Owns proposers that no draft should be: perfect ones and broken ones in every way. Whatever they
//! do, output must not change. Knows the `Proposer` seam and what the oracle expects of each
//! sequence; knows nothing of the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use slipstream_draft::fault::DraftFault;
use slipstream_draft::proposer::{ProposeWork, Proposer, TimeBudget};
use slipstream_model::clock::{Clock, Micros};
use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::proposal::{Proposal, Proposals};

use crate::random::Rng;

/// Time that only the test moves.
#[derive(Debug, Default)]
pub struct VirtualClock {
    now_us: AtomicU64,
}

impl VirtualClock {
    /// Moves time forward.
    pub fn advance(&self, span: Micros) {
        self.now_us.fetch_add(span.0, Ordering::Relaxed);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Micros {
        Micros(self.now_us.load(Ordering::Relaxed))
    }
}

/// What is known of every sequence: prompt, output prefix and all tokens it will choose. Shared
/// between the test, which knows them from the oracle, and the proposers.
#[derive(Clone, Debug, Default)]
pub struct Knowledge {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    tokens: BTreeMap<SequenceId, Vec<TokenId>>,
    ended: BTreeSet<SequenceId>,
    breaches: Vec<String>,
}

impl Knowledge {
    /// Tells what `sequence` will consist of in all.
    pub fn learn(&self, sequence: SequenceId, tokens: Vec<TokenId>) {
        self.lock().tokens.insert(sequence, tokens);
    }

    /// Breaches of the engine's side of the `Proposer` contract seen so far.
    #[must_use]
    pub fn breaches(&self) -> Vec<String> {
        self.lock().breaches.clone()
    }

    /// What will follow `work.history`, and checks that the history is the one expected.
    fn continuation(&self, work: &ProposeWork<'_>) -> Vec<TokenId> {
        let mut known = self.lock();
        let id = work.sequence;
        let Some(tokens) = known.tokens.get(&id).cloned() else {
            known.breaches.push(format!("sequence {id} is unknown"));
            return Vec::new();
        };
        if known.ended.contains(&id) {
            known.breaches.push(format!("sequence {id} was released before"));
        }
        if work.draft_len == 0 {
            known.breaches.push(format!("sequence {id} was asked for nothing"));
        }
        if !tokens.starts_with(work.history) {
            known.breaches.push(format!("sequence {id} has an unexpected history"));
            return Vec::new();
        }
        tokens[work.history.len()..].to_vec()
    }

    fn breach(&self, what: &str) {
        self.lock().breaches.push(what.to_owned());
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// How a scripted proposer behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Always what the verifier will choose, the end token included, then random ids.
    Perfect,
    /// Never what the verifier will choose.
    AlwaysWrong,
    /// Random ids of the vocabulary.
    Random,
    /// Right for a random number of tokens, wrong from there on.
    RightThenWrong,
    /// Right for a random number of tokens, then an end token that may be wrong.
    RightThenEnd,
    /// One id outside the vocabulary among right ones.
    OutOfRange,
    /// More tokens than were asked for, all right as long as any are known.
    TooMany,
    /// Right, but stamped with another epoch.
    WrongEpoch,
    /// Right, but for a sequence that does not exist.
    UnknownSequence,
    /// Two right proposals per sequence.
    Duplicate,
    /// Proposals without tokens.
    Empty,
    /// No proposals.
    Silent,
    /// Panics now and then, perfect otherwise.
    Panicking,
    /// Returns an error now and then after proposing, perfect otherwise.
    Erroring,
    /// Takes far longer than it may, perfect otherwise.
    Slow,
    /// One of the above, drawn anew at each call.
    Mixed,
}

/// Every behaviour but the mixture.
pub const BEHAVIOURS: [Behaviour; 15] = [
    Behaviour::Perfect,
    Behaviour::AlwaysWrong,
    Behaviour::Random,
    Behaviour::RightThenWrong,
    Behaviour::RightThenEnd,
    Behaviour::OutOfRange,
    Behaviour::TooMany,
    Behaviour::WrongEpoch,
    Behaviour::UnknownSequence,
    Behaviour::Duplicate,
    Behaviour::Empty,
    Behaviour::Silent,
    Behaviour::Panicking,
    Behaviour::Erroring,
    Behaviour::Slow,
];

/// What a scripted proposer needs.
#[derive(Clone, Debug)]
pub struct Script {
    /// How it behaves.
    pub behaviour: Behaviour,
    /// Its epoch.
    pub epoch: DraftEpoch,
    /// What it knows.
    pub knowledge: Knowledge,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Moved far ahead by slow behaviour.
    pub clock: Arc<VirtualClock>,
    /// Seeds what it draws.
    pub seed: u64,
}

/// A proposer that behaves as its script says.
#[derive(Debug)]
pub struct ScriptedProposer {
    script: Script,
    rng: Rng,
    /// After a fault its state is unknown: the engine must reset it before asking again.
    needs_reset: bool,
}

impl ScriptedProposer {
    /// A proposer of this script.
    #[must_use]
    pub fn new(script: Script) -> Self {
        let rng = Rng::new(script.seed);
        Self { script, rng, needs_reset: false }
    }

    fn random_token(&mut self) -> TokenId {
        TokenId(u32::try_from(self.rng.below(self.script.vocab_size)).unwrap())
    }

    /// `len` tokens: the right ones as far as known, then random ones.
    fn right(&mut self, truth: &[TokenId], len: usize) -> Vec<TokenId> {
        (0..len).map(|i| truth.get(i).copied().unwrap_or_else(|| self.random_token())).collect()
    }

    fn wrong(&self, token: TokenId) -> TokenId {
        TokenId((token.0 + 1) % u32::try_from(self.script.vocab_size).unwrap())
    }

    fn tokens(
        &mut self,
        behaviour: Behaviour,
        work: &ProposeWork<'_>,
        truth: &[TokenId],
    ) -> Vec<TokenId> {
        let len = work.draft_len;
        let mut tokens = self.right(truth, len);
        let at = self.rng.below(len);
        match behaviour {
            Behaviour::AlwaysWrong => tokens.iter_mut().for_each(|t| *t = self.wrong(*t)),
            Behaviour::Random => tokens.iter_mut().for_each(|t| *t = self.random_token()),
            Behaviour::RightThenWrong => {
                let at = self.rng.below(len + 1);
                tokens[at..].iter_mut().for_each(|t| *t = self.wrong(*t));
            }
            Behaviour::RightThenEnd => {
                tokens[at] = work.params.end_ids.first().copied().unwrap_or(crate::pieces::END);
            }
            Behaviour::OutOfRange => {
                let beyond = u32::try_from(self.script.vocab_size).unwrap();
                tokens[at] = *self.rng.pick(&[TokenId(beyond), TokenId(u32::MAX)]);
            }
            Behaviour::TooMany => {
                let extra = self.rng.between(1, 40);
                tokens = self.right(truth, len + extra);
            }
            Behaviour::Empty => tokens.clear(),
            Behaviour::Perfect
            | Behaviour::WrongEpoch
            | Behaviour::UnknownSequence
            | Behaviour::Duplicate
            | Behaviour::Silent
            | Behaviour::Panicking
            | Behaviour::Erroring
            | Behaviour::Slow
            | Behaviour::Mixed => {}
        }
        tokens
    }
}

impl Proposer for ScriptedProposer {
    fn epoch(&self) -> DraftEpoch {
        self.script.epoch
    }

    fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        budget: TimeBudget<'_>,
        proposals: &mut Proposals,
    ) -> Result<(), DraftFault> {
        if self.needs_reset {
            self.script.knowledge.breach("a draft was asked again after a fault, without a reset");
        }
        let behaviour = match self.script.behaviour {
            Behaviour::Mixed => *self.rng.pick(&BEHAVIOURS),
            other => other,
        };
        let panics_at = (behaviour == Behaviour::Panicking && self.rng.one_in(3))
            .then(|| self.rng.below(work.len()));
        for (index, item) in work.iter().enumerate() {
            let truth = self.script.knowledge.continuation(item);
            if panics_at == Some(index) {
                self.needs_reset = true;
                // Unwinds like a panic, without the message that the panic hook would print.
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            if behaviour == Behaviour::Silent {
                continue;
            }
            let (sequence, epoch) = match behaviour {
                Behaviour::UnknownSequence => (SequenceId(u64::MAX), self.script.epoch),
                Behaviour::WrongEpoch => (item.sequence, DraftEpoch(self.script.epoch.0 + 1)),
                _ => (item.sequence, self.script.epoch),
            };
            let tokens = self.tokens(behaviour, item, &truth);
            let proposal = Proposal { sequence, epoch, tokens: &tokens };
            if behaviour == Behaviour::Duplicate {
                proposals.push(proposal);
            }
            proposals.push(proposal);
        }
        if behaviour == Behaviour::Slow && self.rng.one_in(2) {
            let left = budget.deadline.since(budget.clock.now());
            // A fault, but not one that spoils its KV: no reset follows.
            self.script.clock.advance(Micros(3 * left.0 + 1));
        }
        if behaviour == Behaviour::Erroring && self.rng.one_in(3) {
            self.needs_reset = true;
            return Err(DraftFault::Panicked("on purpose".to_owned()));
        }
        Ok(())
    }

    fn release(&mut self, sequence: SequenceId) {
        self.script.knowledge.lock().ended.insert(sequence);
    }

    fn reset(&mut self) {
        self.needs_reset = false;
    }
}
