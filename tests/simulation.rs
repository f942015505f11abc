//! Proves that whole worlds stay sound: every invariant after every step, every output equal to the
//! oracle's, everything finished and given back at the end. Runs as many seeds as fit
//! `SLIPSTREAM_SIM_SECONDS`, 90 unless said. A failing seed prints the command that replays it.
//! `SLIPSTREAM_SIM_SEEDS=100000` runs exactly that many, `SLIPSTREAM_SIM_FIRST` chooses where they
//! begin, `SLIPSTREAM_SIM_SEED` runs one. `tests/planted/run.sh` shows what it catches.

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use slipstream_tests::sim::{Coverage, World};
use slipstream_tests::timing::report;

/// Worlds that live at the same time.
const NUM_THREADS: usize = 2;

/// Seconds that the test takes unless it is told otherwise.
const SECONDS: u64 = 90;

/// With fewer seeds than this a rare thing may not happen.
const SEEDS_TO_SEE_ALL: u64 = 3_000;

/// Seeds that once found something, with what: always run.
const KEPT: [(u64, &str); 0] = [];

/// What many seeds must have met at least once each; otherwise the simulator went blind.
const MUST_HAPPEN: [&str; 51] = [
    "accepted from a like draft",
    "accepted from a narrower draft",
    "accepted from a wider draft",
    "accepted tokens",
    "bonus tokens",
    "cached tokens",
    "cancelled finished",
    "cancelled in output",
    "cancelled in prompt",
    "cancelled paused",
    "cancelled preempted",
    "cancelled waiting",
    "chunked prompts",
    "copies on write",
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
    "evictions",
    "failed engines",
    "fair preemptions",
    "forced ends",
    "forgotten",
    "natural ends",
    "paused",
    "pinned",
    "plain tokens",
    "preempted and finished",
    "preemptions",
    "prefix hits",
    "proposed",
    "quarantines",
    "refused",
    "refused late",
    "rejected",
    "resumed",
    "resumed with hits",
    "shed",
    "siblings shared",
    "steps",
    "swaps",
    "unpaused",
    "verifier failures",
    "verifier panics",
];

fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Lives one world. Panics of the engine count as failures of the seed like broken invariants do.
fn live(seed: u64) -> Result<Coverage, String> {
    let life = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed);
        world.run().map(|()| world.coverage)
    }));
    let broken = match life {
        Ok(Ok(coverage)) => return Ok(coverage),
        Ok(Err(broken)) => broken,
        Err(_) => "panicked, see above".to_owned(),
    };
    Err(format!(
        "seed {seed}: {broken}\nreplay with: SLIPSTREAM_SIM_SEED={seed} \
         cargo test --release -p slipstream-tests simulation"
    ))
}

/// What the threads of a run share.
struct Run {
    next: u64,
    /// Behind the last seed; `u64::MAX` while only time ends the run.
    end: u64,
    stop_at: Option<Instant>,
    num_lived: u64,
    total: Coverage,
    /// The lowest seed that failed so far, and how.
    failure: Option<(u64, String)>,
}

impl Run {
    /// The next seed to live, if any.
    fn take(&mut self) -> Option<u64> {
        let is_over = self.stop_at.is_some_and(|stop_at| Instant::now() >= stop_at);
        if is_over || self.next >= self.end {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    fn add(&mut self, seed: u64, life: Result<Coverage, String>) {
        self.num_lived += 1;
        match life {
            Ok(coverage) => self.total.add(&coverage),
            Err(broken) => {
                // Seeds below it are already taken; those above need not be lived any more.
                self.end = self.end.min(seed);
                if self.failure.as_ref().is_none_or(|(lowest, _)| seed < *lowest) {
                    self.failure = Some((seed, broken));
                }
            }
        }
    }
}

/// Lives `num_seeds` worlds from `first` on, or as many as fit the time.
fn live_many(first: u64, num_seeds: Option<u64>) -> Run {
    let seconds = number("SLIPSTREAM_SIM_SECONDS").unwrap_or(SECONDS);
    let run = Mutex::new(Run {
        next: first,
        end: num_seeds.map_or(u64::MAX, |num_seeds| first + num_seeds),
        stop_at: num_seeds.is_none().then(|| Instant::now() + Duration::from_secs(seconds)),
        num_lived: 0,
        total: Coverage::new(),
        failure: None,
    });
    std::thread::scope(|scope| {
        for _ in 0..NUM_THREADS {
            scope.spawn(|| {
                loop {
                    let seed = run.lock().unwrap().take();
                    let Some(seed) = seed else { break };
                    let life = live(seed);
                    run.lock().unwrap().add(seed, life);
                }
            });
        }
    });
    run.into_inner().unwrap()
}

#[test]
fn every_seed_lives_soundly() {
    if let Some(seed) = number("SLIPSTREAM_SIM_SEED") {
        match live(seed) {
            Ok(coverage) => report(&format!("  seed {seed} is sound: {}", coverage.line())),
            Err(broken) => panic!("{broken}"),
        }
        return;
    }
    let num_seeds = number("SLIPSTREAM_SIM_SEEDS");
    let first = number("SLIPSTREAM_SIM_FIRST").unwrap_or(0);
    if num_seeds.is_none() {
        for (seed, found) in KEPT {
            live(seed).unwrap_or_else(|broken| panic!("once found {found}: {broken}"));
        }
    }
    let begin = Instant::now();
    let run = live_many(first, num_seeds);
    let elapsed_s = begin.elapsed().as_secs_f64();
    report(&format!("  simulation: {} seeds in {elapsed_s:.1} s", run.num_lived));
    if let Some((seed, broken)) = run.failure {
        panic!("the first of {} seeds to fail: {broken}", seed - first + 1);
    }
    report(&format!("  simulation: {}", run.total.line()));
    let missing: Vec<&str> =
        MUST_HAPPEN.into_iter().filter(|what| run.total.of(what) == 0).collect();
    let is_long = run.num_lived >= SEEDS_TO_SEE_ALL;
    assert!(missing.is_empty() || !is_long, "never happened: {missing:?}");
}
