//! Owns what a seed decides about a world before it starts: the engine's shape and the cost of its
//! passes, who its tenants are, how they ask and read, and what goes wrong how often. Knows nothing
//! that happens later.

use slipstream_model::clock::Micros;
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::BLOCK_LEN;
use slipstream_server::engine::EngineConfig;

use crate::hash_lm::{ForwardCost, HashLmConfig};
use crate::random::Rng;
use crate::requests::RequestSizes;

/// A feature that is off in some worlds: once in so many draws; 0 for never.
type OneIn = usize;

/// What one seed decides.
#[derive(Clone, Debug)]
pub(super) struct Climate {
    pub(super) verifier: HashLmConfig,
    /// What passes of model drafts cost.
    pub(super) draft_cost: ForwardCost,
    pub(super) config: EngineConfig,
    pub(super) sizes: RequestSizes,
    pub(super) customs: Customs,
    pub(super) faults: Faults,
    pub(super) storm_steps: usize,
}

/// How clients behave in a world.
#[derive(Clone, Debug)]
pub(super) struct Customs {
    pub(super) num_requests: usize,
    /// Most requests of a common burst; rare ones are many times as large.
    pub(super) burst_max: usize,
    pub(super) num_tenants: usize,
    /// Whether most requests come from the first tenant, or from all alike.
    pub(super) is_flooded: bool,
    /// Whether requests differ in priority.
    pub(super) has_classes: bool,
    /// Salts in use, the empty one included.
    pub(super) num_salts: usize,
    pub(super) reuse_off_one_in: OneIn,
    /// Prompts that several requests begin with.
    pub(super) num_system_prompts: usize,
    /// Requests that go on from an earlier one's prompt and output.
    pub(super) follow_up_one_in: OneIn,
    /// Requests that several samples are wanted of.
    pub(super) siblings_one_in: OneIn,
    pub(super) deadline_one_in: OneIn,
    /// Requests that bring the beginning of their output along.
    pub(super) prefix_one_in: OneIn,
    /// How clients read: once in so many steps; 0 for not before the calm.
    pub(super) reads_one_in: &'static [usize],
}

/// What goes wrong in a world.
#[derive(Clone, Copy, Debug)]
pub(super) struct Faults {
    pub(super) cancel_one_in: OneIn,
    pub(super) swap_one_in: OneIn,
    pub(super) verifier_fails_one_in: OneIn,
    pub(super) verifier_panics_one_in: OneIn,
}

impl Climate {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let vocab_size = rng.between(20, 40);
        let sizes = RequestSizes {
            vocab_size,
            prompt_len_max: *rng.pick(&[rng.clone().between(4, 30), 70, 70]),
            max_tokens_max: rng.between(2, 80),
        };
        let len_max = sizes.prompt_len_max + sizes.max_tokens_max;
        let fewest = len_max.div_ceil(BLOCK_LEN);
        let limits = ForwardLimits {
            vocab_size,
            context_len: len_max + rng.below(20),
            // Often hardly more than one request needs, so that sequences fight for blocks.
            num_blocks: fewest + *rng.pick(&[rng.clone().below(4), rng.clone().below(40), 8]),
        };
        let language = HashLmConfig::verifier(rng.bits(), limits);
        let cost = verifier_cost(rng);
        Self {
            verifier: HashLmConfig { nan_one_in: *rng.pick(&[0, 0, 0, 150]), cost, ..language },
            draft_cost: *rng.pick(&[
                ForwardCost::default(),
                ForwardCost { base_ns: 20_000, row_ns: 1_000, pair_ns: 10 },
            ]),
            config: engine_config(rng),
            sizes,
            customs: Customs::new(rng),
            faults: Faults {
                cancel_one_in: *rng.pick(&[0, 15, 100]),
                swap_one_in: *rng.pick(&[0, 8, 60]),
                verifier_fails_one_in: *rng.pick(&[0, 0, 0, 100]),
                verifier_panics_one_in: *rng.pick(&[0, 0, 0, 0, 0, 0, 0, 200]),
            },
            storm_steps: rng.between(20, 600),
        }
    }
}

fn verifier_cost(rng: &mut Rng) -> ForwardCost {
    ForwardCost {
        base_ns: *rng.pick(&[50_000, 1_000_000, 5_000_000]),
        row_ns: *rng.pick(&[1_000, 50_000, 300_000]),
        pair_ns: *rng.pick(&[0, 100, 2_000]),
    }
}

fn engine_config(rng: &mut Rng) -> EngineConfig {
    EngineConfig {
        step_tokens_max: *rng.pick(&[1, 3, 5, 8, 16, 16, 40, 40, 256, 256]),
        max_running: rng.between(1, 10),
        max_waiting: *rng.pick(&[rng.clone().between(1, 12), 60]),
        draft_len_auto: rng.between(0, 5),
        draft_len_max: *rng.pick(&[0, 1, 2, 4, 8, 8, 8]),
        propose_budget: Micros(1_000),
        quarantine_after: *rng.pick(&[1, 3, 1_000, 1_000, 1_000]),
        step_target: Micros(*rng.pick(&[1, 2_000, 10_000, 50_000, 50_000, 1_000_000])),
        unread_tokens_max: *rng.pick(&[1, 2, 5, 20, 512, 512]),
        preemptions_max: rng.between(0, 3),
        priority_aging: Micros(*rng.pick(&[2_000, 20_000, 200_000, 10_000_000])),
        prefix_reuse: !rng.one_in(8),
        verifier_failures_max: rng.between(1, 3),
    }
}

impl Customs {
    fn new(rng: &mut Rng) -> Self {
        Self {
            num_requests: rng.between(3, 60),
            burst_max: rng.between(1, 8),
            num_tenants: *rng.pick(&[1, 1, 2, 3, 5]),
            is_flooded: rng.one_in(3),
            has_classes: rng.one_in(2),
            num_salts: *rng.pick(&[1, 1, 1, 2]),
            reuse_off_one_in: *rng.pick(&[0, 0, 5]),
            num_system_prompts: *rng.pick(&[0, 1, 1, 3]),
            follow_up_one_in: *rng.pick(&[0, 3, 6]),
            siblings_one_in: *rng.pick(&[0, 4, 12]),
            deadline_one_in: *rng.pick(&[0, 6, 12]),
            prefix_one_in: *rng.pick(&[0, 4, 8]),
            reads_one_in: *rng.pick(&[
                &[1][..],
                &[1, 1, 5, 50][..],
                &[1, 5, 0][..],
                &[1, 1, 1, 1, 1, 0][..],
            ]),
        }
    }
}
