//! Proves that whole worlds stay sound: every invariant after every step, every output equal to the
//! oracle's, everything finished and given back at the end. A failing seed prints the command that
//! replays it. `SLIPSTREAM_SIM_SEEDS=100000` makes a long run of it, `SLIPSTREAM_SIM_FIRST` chooses
//! where that begins.

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};

use slipstream_tests::sim::{Coverage, World};
use slipstream_tests::timing::{report, timed};

const NUM_SEEDS: u64 = 500;

/// What the default seeds must have met at least once each; otherwise the simulator went blind.
const MUST_HAPPEN: [&str; 36] = [
    "accepted from a like draft",
    "accepted from a narrower draft",
    "accepted from a wider draft",
    "accepted tokens",
    "bonus tokens",
    "cancelled finished",
    "cancelled in output",
    "cancelled in prompt",
    "cancelled preempted",
    "cancelled waiting",
    "correction tokens",
    "draft faults",
    "dropped proposals",
    "ended by bad logits",
    "ended by cancel",
    "ended by deadline",
    "ended by length",
    "ended by shutdown",
    "ended by stop string",
    "ended by token",
    "ended by verifier failure",
    "forced ends",
    "forgotten",
    "natural ends",
    "plain tokens",
    "preemptions",
    "proposed",
    "quarantines",
    "queue full",
    "refused",
    "rejected",
    "resumed",
    "steps",
    "steps inside a prompt",
    "swaps",
    "verifier failures",
];

fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Lives one world. Panics of the engine count as failures of the seed like broken invariants do.
fn live(seed: u64) -> Coverage {
    let life = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed);
        world.run().map(|()| world.coverage)
    }));
    match life {
        Ok(Ok(coverage)) => coverage,
        failure => panic!(
            "seed {seed}: {}\nreplay with: SLIPSTREAM_SIM_SEED={seed} \
             cargo test --release -p slipstream-tests simulation",
            match failure {
                Ok(Err(broken)) => broken,
                _ => "panicked, see above".to_owned(),
            }
        ),
    }
}

#[test]
fn every_seed_lives_soundly() {
    if let Some(seed) = number("SLIPSTREAM_SIM_SEED") {
        let coverage = live(seed);
        report(&format!("  simulation: seed {seed} is sound: {coverage:?}"));
        return;
    }
    timed("simulation", 20.0, || {
        let num_seeds = number("SLIPSTREAM_SIM_SEEDS").unwrap_or(NUM_SEEDS);
        let first = number("SLIPSTREAM_SIM_FIRST").unwrap_or(0);
        let mut total = Coverage::new();
        for seed in first..first + num_seeds {
            for (what, times) in live(seed) {
                *total.entry(what).or_default() += times;
            }
        }
        report(&format!("  simulation: {num_seeds} seeds: {total:?}"));
        let is_blind = |what: &&str| total.get(*what).is_none_or(|&times| times == 0);
        let missing: Vec<&str> = MUST_HAPPEN.into_iter().filter(is_blind).collect();
        assert!(missing.is_empty() || num_seeds < NUM_SEEDS, "never happened: {missing:?}");
    });
}
