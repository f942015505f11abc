//! Proves that what sequences share and what the scheduler takes from them changes no byte: prompts
//! with common beginnings, groups of samples, tiny pools and chunks, each shown to have happened.

use slipstream_model::clock::Micros;
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::{SequenceId, TokenId};
use slipstream_server::engine::request::{PrefixReuse, Request, Speculation, TenantId};
use slipstream_server::engine::{Counters, Engine, EngineConfig, Phase};
use slipstream_tests::drive::{Case, DraftKind, assert_expected, drive_with, hash_engine};
use slipstream_tests::hash_lm::HashLmConfig;
use slipstream_tests::pieces::pieces;
use slipstream_tests::proposers::Behaviour;
use slipstream_tests::random::Rng;
use slipstream_tests::requests::{plain_request, random_params, random_tokens};
use slipstream_tests::timing::{report, timed};

const VOCAB_SIZE: usize = 32;
const NUM_REQUESTS: usize = 10;
/// Longest prompt and output together.
const LEN_MAX: usize = 96;

/// What a grid of runs went through.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    runs: u64,
    preemptions: u64,
    cached: u64,
    copied: u64,
    evicted: u64,
    /// Steps that left somebody in the middle of a prompt.
    in_prompt: u64,
    proposed: u64,
}

impl Seen {
    fn add(&mut self, counters: &Counters, in_prompt: u64) {
        self.runs += 1;
        self.preemptions += counters.preemptions;
        self.cached += counters.cached;
        self.copied += counters.copied_blocks;
        self.evicted += counters.evicted_blocks;
        self.in_prompt += in_prompt;
        self.proposed += counters.proposed;
    }
}

fn lm(num_blocks: usize) -> HashLmConfig {
    let limits = ForwardLimits { vocab_size: VOCAB_SIZE, context_len: 128, num_blocks };
    HashLmConfig::verifier(11, limits)
}

/// Requests of which most begin alike: two beginnings, two tenants that share nothing, one request
/// that keeps to itself, and groups of samples.
fn requests(seed: u64) -> Vec<Request> {
    let mut rng = Rng::new(seed);
    let beginnings = [33, 47].map(|len| random_tokens(&mut rng, VOCAB_SIZE, len));
    let mut requests: Vec<Request> = Vec::new();
    for index in 0..NUM_REQUESTS {
        let is_sample = index % 5 > 2;
        if is_sample {
            let mut sample = requests[index - index % 5 + 2].clone();
            sample.params.sample_index = u32::try_from(index).unwrap();
            sample.sibling = Some(SequenceId((index - index % 5 + 3) as u64));
            requests.push(sample);
            continue;
        }
        let mut prompt = beginnings[rng.below(2)].clone();
        let behind = rng.below(12);
        prompt.extend(random_tokens(&mut rng, VOCAB_SIZE, behind));
        let mut request = plain_request(prompt, rng.between(8, 36));
        request.params = random_params(&mut rng, VOCAB_SIZE);
        request.params.end_ids.clear();
        request.tenant = TenantId((index % 3 / 2) as u128);
        request.logprobs = index % 2 == 0;
        request.speculation = Speculation::Fixed(rng.below(6));
        if index == 6 {
            request.prefix_reuse = PrefixReuse::Off;
        }
        requests.push(request);
    }
    requests
}

fn is_in_prompt(engine: &Engine) -> bool {
    engine.sequences().any(|view| {
        view.phase == Phase::Running
            && view.computed_len > view.cached_len
            && view.computed_len + 1 < view.prompt_len
    })
}

#[test]
fn sharing_preemption_and_chunks_change_no_byte() {
    timed("sharing", 10.0, || {
        let pieces = pieces(VOCAB_SIZE);
        let fewest = LEN_MAX.div_ceil(16);
        let mut seen = Seen::default();
        for seed in 0..12 {
            let requests = requests(seed);
            let case = |(request, owner): (&Request, u64)| {
                Case::new(lm(fewest), &pieces, request.clone(), owner)
            };
            let cases: Vec<Case> = requests.iter().zip(1..).map(case).collect();
            for num_blocks in [fewest, fewest + 3, 16, 64] {
                for step_tokens_max in [5, 24, 256] {
                    for kind in [
                        DraftKind::None,
                        DraftKind::Model(0.5),
                        DraftKind::Scripted(Behaviour::RightThenWrong),
                    ] {
                        let config = EngineConfig {
                            step_tokens_max,
                            max_running: 6,
                            preemptions_max: (seed % 4) as usize,
                            propose_budget: Micros(1_000),
                            prefix_reuse: seed % 6 != 5,
                            ..EngineConfig::default()
                        };
                        let (mut engine, probe) =
                            hash_engine(lm(num_blocks), config, &pieces, kind, &cases);
                        let mut in_prompt = 0;
                        let outcome = drive_with(&mut engine, &requests, 2, |engine, _| {
                            in_prompt += u64::from(is_in_prompt(engine));
                        });
                        let context = (seed, num_blocks, step_tokens_max, kind);
                        assert_expected(&outcome, &cases, &pieces, &context);
                        let counts = probe.counts();
                        let nonsense = counts.poisoned_reads + counts.shared_writes;
                        assert_eq!(nonsense, 0, "{context:?}: {counts:?}");
                        assert_eq!(counts.copied_blocks, outcome.counters.copied_blocks);
                        assert_eq!(engine.blocks().num_available(), num_blocks, "{context:?}");
                        seen.add(&outcome.counters, in_prompt);
                    }
                }
            }
        }
        report(&format!("  sharing: equal to the oracle's: {seen:?}"));
        let Seen { preemptions, cached, copied, evicted, in_prompt, proposed, .. } = seen;
        let all = [preemptions, cached, copied, evicted, in_prompt, proposed];
        assert!(all.iter().all(|&times| times > 100), "{seen:?}");
    });
}

#[test]
fn a_prompt_is_computed_once_for_all_its_samples() {
    let pieces = pieces(VOCAB_SIZE);
    let prompt: Vec<TokenId> = random_tokens(&mut Rng::new(5), VOCAB_SIZE, 41);
    let requests: Vec<Request> = (0..4)
        .map(|index| {
            let mut request = plain_request(prompt.clone(), 12);
            request.params.end_ids.clear();
            request.params.temperature = 0.9;
            request.params.sample_index = index;
            request.sibling = (index > 0).then_some(SequenceId(1));
            request
        })
        .collect();
    let case =
        |(request, owner): (&Request, u64)| Case::new(lm(16), &pieces, request.clone(), owner);
    let cases: Vec<Case> = requests.iter().zip(1..).map(case).collect();
    let config = EngineConfig { prefix_reuse: false, ..EngineConfig::default() };
    let (mut engine, probe) = hash_engine(lm(16), config, &pieces, DraftKind::None, &cases);
    let outcome = drive_with(&mut engine, &requests, 0, |_, _| {});
    assert_expected(&outcome, &cases, &pieces, &"samples");
    // The prompt once, its last token for each, and of every output all but the last token.
    assert_eq!(probe.counts().rows, 40 + 4 + 4 * 11);
    for collected in &outcome.collected[1..] {
        assert_eq!(collected.finished.as_ref().unwrap().usage.cached_tokens, 40);
    }
    // The block in which they part was copied for all but one of them.
    assert_eq!(outcome.counters.copied_blocks, 3);
}
