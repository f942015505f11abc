//! Owns the real model proposer on a hash LM, with a window through which a test can see that it
//! leaks no KV blocks. Knows no engine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slipstream_draft::fault::DraftFault;
use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_draft::proposer::{ProposeWork, Proposer, TimeBudget};
use slipstream_model::ids::{DraftEpoch, SequenceId};
use slipstream_model::proposal::Proposals;

use crate::hash_lm::{HashLm, HashLmConfig, HashLmProbe};
use crate::proposers::VirtualClock;

/// The engine's half of a shared model proposer.
struct SharedProposer(Arc<Mutex<ModelProposer>>);

/// The test's half.
#[derive(Clone)]
pub struct DraftWatch {
    proposer: Arc<Mutex<ModelProposer>>,
    /// Looks into the draft's hash LM.
    pub probe: HashLmProbe,
    /// Ids that the draft knows.
    pub vocab_size: usize,
}

impl DraftWatch {
    /// KV blocks that the draft holds.
    #[must_use]
    pub fn num_held_blocks(&self) -> usize {
        lock(&self.proposer).num_held_blocks()
    }

    /// Faults that were caused on purpose: failed calls and rows of NaN.
    #[must_use]
    pub fn num_caused_faults(&self) -> u64 {
        let counts = self.probe.counts();
        counts.failed_calls + counts.nan_rows
    }
}

/// A model proposer on the hash LM of `config`.
#[must_use]
pub fn model_draft(
    config: HashLmConfig,
    epoch: DraftEpoch,
    options: ModelProposerOptions,
) -> (Box<dyn Proposer>, DraftWatch) {
    wrap(config, HashLm::new(config), epoch, options)
}

/// As [`model_draft`]; its passes take the time that `config` says.
#[must_use]
pub fn timed_model_draft(
    config: HashLmConfig,
    epoch: DraftEpoch,
    options: ModelProposerOptions,
    clock: &Arc<VirtualClock>,
) -> (Box<dyn Proposer>, DraftWatch) {
    wrap(config, HashLm::timed(config, clock), epoch, options)
}

fn wrap(
    config: HashLmConfig,
    (forward, probe): (HashLm, HashLmProbe),
    epoch: DraftEpoch,
    options: ModelProposerOptions,
) -> (Box<dyn Proposer>, DraftWatch) {
    let vocab_size = config.limits.vocab_size;
    let proposer = Arc::new(Mutex::new(ModelProposer::new(Box::new(forward), epoch, options)));
    (Box::new(SharedProposer(Arc::clone(&proposer))), DraftWatch { proposer, probe, vocab_size })
}

fn lock(proposer: &Mutex<ModelProposer>) -> MutexGuard<'_, ModelProposer> {
    proposer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proposer for SharedProposer {
    fn epoch(&self) -> DraftEpoch {
        lock(&self.0).epoch()
    }

    fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        budget: TimeBudget<'_>,
        proposals: &mut Proposals,
    ) -> Result<(), DraftFault> {
        lock(&self.0).propose(work, budget, proposals)
    }

    fn release(&mut self, sequence: SequenceId) {
        lock(&self.0).release(sequence);
    }

    fn reset(&mut self) {
        lock(&self.0).reset();
    }
}

/// A proposer that forgets everything before it proposes: what its cache may save, never change.
pub struct Forgetful(pub Box<dyn Proposer>);

impl Proposer for Forgetful {
    fn epoch(&self) -> DraftEpoch {
        self.0.epoch()
    }

    fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        budget: TimeBudget<'_>,
        proposals: &mut Proposals,
    ) -> Result<(), DraftFault> {
        self.0.reset();
        self.0.propose(work, budget, proposals)
    }

    fn release(&mut self, sequence: SequenceId) {
        self.0.release(sequence);
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}
