//! Proves in virtual time what the scheduler promises about waiting: a noisy tenant does not double
//! another's time to the first token, and a long prompt does not stretch the steps of running
//! streams. Passes cost what a real network of this size might; arrivals come when they come,
//! whatever the engine does.

use std::collections::VecDeque;
use std::sync::Arc;

use slipstream_model::clock::{Clock, Micros};
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::SequenceId;
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::event::Event;
use slipstream_server::engine::request::{Priority, Request, SubmitError, TenantId};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};
use slipstream_tests::hash_lm::{ForwardCost, HashLm, HashLmConfig};
use slipstream_tests::pieces::pieces;
use slipstream_tests::proposers::VirtualClock;
use slipstream_tests::random::Rng;
use slipstream_tests::requests::{plain_request, random_tokens};
use slipstream_tests::timing::{report, timed};

const VOCAB_SIZE: usize = 32;
const QUIET: TenantId = TenantId(1);
const NOISY: TenantId = TenantId(2);

/// An engine in virtual time.
struct Bench {
    engine: Engine,
    clock: Arc<VirtualClock>,
    /// The longest steps: while nobody's output runs, and while somebody's does.
    longest: [Micros; 2],
    /// Times to first token by tenant, in the order of ends.
    first_tokens: Vec<(TenantId, Micros)>,
    tenants: Vec<TenantId>,
    num_refused: usize,
}

impl Bench {
    fn new(config: EngineConfig, cost: ForwardCost, limits: ForwardLimits) -> Self {
        let clock = Arc::new(VirtualClock::default());
        let lm = HashLmConfig { cost, ..HashLmConfig::verifier(3, limits) };
        let mut engine = Engine::new(EngineParts {
            config,
            verifier: Box::new(HashLm::timed(lm, &clock).0),
            proposer: None,
            token_bytes: Arc::new(TokenBytes::new(pieces(VOCAB_SIZE))),
            clock: Arc::<VirtualClock>::clone(&clock) as Arc<dyn Clock>,
            cache_key: [7; 32],
        });
        engine.rehearse().expect("the hash LM computes rows");
        Self {
            engine,
            clock,
            longest: [Micros(0); 2],
            first_tokens: Vec::new(),
            tenants: Vec::new(),
            num_refused: 0,
        }
    }

    fn submit(&mut self, request: Request) {
        let tenant = request.tenant;
        self.tenants.push(tenant);
        let id = SequenceId(self.tenants.len() as u64);
        match self.engine.submit(id, request) {
            Ok(()) => {}
            // Whoever floods is refused, and nobody else.
            Err(SubmitError::QueueFull { .. }) if tenant == NOISY => self.num_refused += 1,
            Err(error) => panic!("{id}: {error}"),
        }
    }

    /// One step; every reader takes what there is at once.
    fn step(&mut self) {
        let has_output = self.engine.sequences().any(|view| view.tokens.len() > view.prompt_len);
        let begin = self.clock.now();
        self.engine.step();
        let longest = &mut self.longest[usize::from(has_output)];
        *longest = (*longest).max(self.clock.now().since(begin));
        let mut news = Vec::new();
        self.engine.ids_with_news(&mut news);
        for id in news {
            while let Some(event) = self.engine.take_event(id) {
                if let Event::Finished(finished) = event {
                    let tenant = self.tenants[id.0 as usize - 1];
                    let first = finished.timings.first_token.expect("nothing is cut short");
                    self.first_tokens.push((tenant, first));
                }
            }
        }
    }

    /// Lets everybody of `arrivals`, ordered by time, come at its time and get its end.
    fn run(&mut self, mut arrivals: VecDeque<Request>) {
        let begin = self.clock.now();
        arrivals.iter_mut().for_each(|request| request.arrival = request.arrival.plus(begin));
        loop {
            let now = self.clock.now();
            while arrivals.front().is_some_and(|request| request.arrival <= now) {
                let request = arrivals.pop_front().unwrap();
                self.submit(request);
            }
            if self.engine.has_work() {
                self.step();
            } else if let Some(next) = arrivals.front() {
                self.clock.advance(next.arrival.since(now));
            } else {
                return;
            }
        }
    }

    /// The 99th percentile of a tenant's times to first token.
    fn p99(&self, tenant: TenantId) -> Micros {
        let own = self.first_tokens.iter().filter(|(whose, _)| *whose == tenant);
        let mut times: Vec<Micros> = own.map(|(_, time)| *time).collect();
        times.sort_unstable();
        times[times.len() * 99 / 100]
    }
}

/// `num` requests of a tenant that come at random, one in `mean_us` microseconds.
fn stream(tenant: TenantId, priority: Priority, num: usize, mean_us: f64) -> Vec<Request> {
    let mut rng = Rng::new(tenant.0 as u64);
    let mut at = 0.0;
    let request = |_| {
        at -= (1.0 - rng.unit()).ln() * mean_us;
        let prompt_len = rng.between(100, 160);
        let mut request =
            plain_request(random_tokens(&mut rng, VOCAB_SIZE, prompt_len), rng.between(8, 24));
        request.params.end_ids.clear();
        request.tenant = tenant;
        request.priority = priority;
        request.arrival = Micros(at as u64);
        request
    };
    (0..num).map(request).collect()
}

/// A core's worth of a small network: 5 ms for the weights, a millisecond for each row.
const COST: ForwardCost = ForwardCost { base_ns: 5_000_000, row_ns: 1_000_000, pair_ns: 1_000 };

/// Requests of a flood.
const NUM_NOISY: usize = 6_000;

/// Times to first token of the quiet tenant, alone and beside a flood: their 99th percentiles.
fn quiet_and_flooded(priority: Priority) -> [Micros; 2] {
    let limits = ForwardLimits { vocab_size: VOCAB_SIZE, context_len: 256, num_blocks: 160 };
    let config = EngineConfig { max_running: 8, max_waiting: 400, ..EngineConfig::default() };
    // A tenth of what the machine can do.
    let quiet = stream(QUIET, Priority::Normal, 300, 2_000_000.0);
    // More than the machine can do, all the time: the queue is as full as one tenant may make it.
    let noisy = stream(NOISY, priority, NUM_NOISY, 100_000.0);
    let mut alone = Bench::new(config, COST, limits);
    alone.run(quiet.clone().into());
    let mut flooded = Bench::new(config, COST, limits);
    let mut all = [quiet, noisy].concat();
    all.sort_by_key(|request| request.arrival);
    flooded.run(all.into());
    assert!(flooded.num_refused > 1_000, "it is no flood");
    let num_late = flooded.first_tokens.iter().filter(|(tenant, _)| *tenant == NOISY).count();
    assert_eq!(num_late + flooded.num_refused, NUM_NOISY, "the noisy one is served too");
    report(&format!(
        "  fairness: p99 of the quiet tenant {:.0} ms alone, {:.0} ms beside a {} flood, whose own \
         is {:.0} ms; {} preemptions",
        alone.p99(QUIET).as_millis_f64(),
        flooded.p99(QUIET).as_millis_f64(),
        priority.name(),
        flooded.p99(NOISY).as_millis_f64(),
        flooded.engine.counters().preemptions,
    ));
    [alone.p99(QUIET), flooded.p99(QUIET)]
}

#[test]
fn a_flood_does_not_double_another_tenants_time_to_first_token() {
    timed("fairness, floods", 10.0, || {
        for priority in [Priority::Normal, Priority::Batch] {
            let [alone, flooded] = quiet_and_flooded(priority);
            assert!(flooded.0 < 2 * alone.0, "{alone:?} alone, {flooded:?} beside {priority:?}");
        }
    });
}

/// Eight streams run when a prompt of 2,000 tokens comes. Returns the longest step while output
/// runs, and the time to the first token of the long prompt.
fn long_prompt_among_streams(step_target: Micros) -> (Micros, Micros) {
    let limits = ForwardLimits { vocab_size: VOCAB_SIZE, context_len: 2304, num_blocks: 256 };
    let config = EngineConfig { step_target, step_tokens_max: 4096, ..EngineConfig::default() };
    let cost = ForwardCost { base_ns: 8_000_000, row_ns: 400_000, pair_ns: 500 };
    let mut bench = Bench::new(config, cost, limits);
    let mut rng = Rng::new(9);
    let mut long = plain_request(random_tokens(&mut rng, VOCAB_SIZE, 2_000), 4);
    long.params.end_ids.clear();
    long.tenant = NOISY;
    let streams = (0..8).map(|_| {
        let mut request = plain_request(random_tokens(&mut rng, VOCAB_SIZE, 8), 160);
        request.params.end_ids.clear();
        request.tenant = QUIET;
        request
    });
    streams.collect::<Vec<_>>().into_iter().for_each(|request| bench.submit(request));
    for _ in 0..20 {
        bench.step();
    }
    bench.longest = [Micros(0); 2];
    long.arrival = bench.clock.now();
    bench.submit(long);
    while bench.engine.has_work() {
        bench.step();
    }
    (bench.longest[1], bench.p99(NOISY))
}

#[test]
fn a_long_prompt_never_stretches_a_step_beyond_the_target() {
    timed("fairness, long prompt", 5.0, || {
        let target = Micros(50_000);
        let (chunked, first) = long_prompt_among_streams(target);
        let (whole, first_whole) = long_prompt_among_streams(Micros(60_000_000));
        report(&format!(
            "  fairness: longest step of 8 streams beside a prompt of 2,000 tokens {:.0} ms in \
             chunks, {:.0} ms at once; its first token after {:.0} and {:.0} ms",
            chunked.as_millis_f64(),
            whole.as_millis_f64(),
            first.as_millis_f64(),
            first_whole.as_millis_f64(),
        ));
        // The cost curve is learned: a hundredth is allowed for its error.
        assert!(chunked.0 <= target.0 + target.0 / 100, "{chunked:?}");
        assert!(whole.0 > 10 * target.0, "{whole:?}: the prompt was cut all the same");
    });
}
