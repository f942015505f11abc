//! Proves that no byte of an output depends on speculation, its depth, who proposes, who shares the
//! batch or how prompts are chunked: everything is compared with the one-token-at-a-time oracle.
//!
//! Crossed in full: 16 ways to choose and stop x draft length 0 to 8 x batch 1, 3, 8 x 6 chunkings
//! x 19 proposers. Beside it stand sweeps that put one event at every place: stops, ends, limits,
//! faults, resumption, swaps.

use std::sync::Arc;

use slipstream_model::clock::Micros;
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_server::engine::event::{FinishReason, SequenceFault};
use slipstream_server::engine::request::{Request, Speculation};
use slipstream_server::engine::{Counters, EngineConfig};
use slipstream_tests::collected::is_natural;
use slipstream_tests::drive::{
    Case, DraftKind, Outcome, assert_expected, draft, drive, drive_with, hash_engine,
};
use slipstream_tests::hash_lm::{HashLm, HashLmConfig};
use slipstream_tests::model_draft::Forgetful;
use slipstream_tests::pieces::{END, pieces, stop_string};
use slipstream_tests::proposers::{BEHAVIOURS, Behaviour, VirtualClock};
use slipstream_tests::random::Rng;
use slipstream_tests::reference::{bytes_of, decode, known_text};
use slipstream_tests::requests::{plain_request, random_params, random_tokens};
use slipstream_tests::timing::{report, timed};

const VOCAB_SIZE: usize = 32;
const DRAFT_LEN_MAX: usize = 8;
/// Rows of one step: from one token at a time to whole prompts at once.
const STEP_TOKENS_MAX: [usize; 6] = [1, 2, 5, 9, 24, 256];

/// From here on a step has rows to spare for the proposals of some sequence.
const ROOMY: usize = 24;

/// Enough of everything for eight sequences at once.
fn lm(language: u64) -> HashLmConfig {
    HashLmConfig::verifier(
        language,
        ForwardLimits { vocab_size: VOCAB_SIZE, context_len: 128, num_blocks: 64 },
    )
}

fn config(step_tokens_max: usize) -> EngineConfig {
    EngineConfig {
        step_tokens_max,
        max_running: 8,
        draft_len_max: DRAFT_LEN_MAX,
        propose_budget: Micros(1_000),
        quarantine_after: usize::MAX,
        ..EngineConfig::default()
    }
}

/// The ways to choose and stop, by name.
fn ways() -> Vec<(&'static str, SamplingParams)> {
    let greedy = SamplingParams { end_ids: vec![END], ..SamplingParams::greedy() };
    let warm = SamplingParams { temperature: 0.8, ..greedy.clone() };
    let bias = vec![(END, 1.0), (TokenId(3), 2.5), (TokenId(9), -3.0)];
    vec![
        ("greedy", greedy.clone()),
        ("T 0.2", SamplingParams { temperature: 0.2, ..greedy.clone() }),
        ("T 0.8", warm.clone()),
        ("T 1.5", SamplingParams { temperature: 1.5, ..greedy.clone() }),
        ("top-k", SamplingParams { top_k: 4, ..warm.clone() }),
        ("top-p", SamplingParams { top_p: 0.8, ..warm.clone() }),
        ("min-p", SamplingParams { min_p: 0.15, ..warm.clone() }),
        (
            "top-k, top-p and min-p",
            SamplingParams { temperature: 1.5, top_k: 9, top_p: 0.9, min_p: 0.02, ..warm.clone() },
        ),
        ("repetition", SamplingParams { repetition_penalty: 1.4, ..greedy.clone() }),
        (
            "penalties",
            SamplingParams { presence_penalty: 0.7, frequency_penalty: 0.4, ..warm.clone() },
        ),
        ("min_tokens", SamplingParams { min_tokens: 15, ..warm.clone() }),
        ("logit bias", SamplingParams { logit_bias: bias, ..warm.clone() }),
        ("stop strings", warm.clone()),
        (
            "stop ids",
            SamplingParams { end_ids: vec![END, TokenId(5), TokenId(17)], ..warm.clone() },
        ),
        ("ignore_eos", SamplingParams { end_ids: Vec::new(), ..warm }),
        ("greedy, stop strings", greedy),
    ]
}

/// Eight requests that choose in the same way, with prompts of eight lengths.
fn cases(way: usize, name: &str, params: &SamplingParams) -> Vec<Case> {
    let pieces = pieces(VOCAB_SIZE);
    let mut rng = Rng::new(way as u64);
    let lens = [5, 1, 17, 40, 16, 3, 33, 2];
    let mut cases = Vec::new();
    for (prompt_len, owner) in lens.into_iter().zip(1..) {
        let prompt = random_tokens(&mut rng, VOCAB_SIZE, prompt_len);
        let mut request = plain_request(prompt, 20 + prompt_len % 5);
        request.params = SamplingParams { seed: rng.bits(), ..params.clone() };
        request.logprobs = owner % 2 == 0;
        // One of the first has none, so that proposals can be of use to it.
        if name.contains("stop strings") && owner != 2 {
            request.stop_strings = (0..3).map(|_| stop_string(&mut rng, &pieces)).collect();
        }
        cases.push(Case::new(lm(1), &pieces, request, owner));
    }
    cases
}

/// Counters must say what happened: a perfect draft is always right, a wrong one never.
fn assert_counters(outcome: &Outcome, kind: DraftKind, draft_len: usize, context: &str) {
    let counters = outcome.counters;
    match kind {
        _ if draft_len == 0 => assert_eq!(counters.proposed, 0, "{context}"),
        DraftKind::Scripted(Behaviour::Perfect) | DraftKind::Model(0.0) => {
            assert_eq!(counters.accepted, counters.proposed, "{context}");
        }
        DraftKind::Scripted(Behaviour::AlwaysWrong) => {
            assert_eq!(counters.accepted, 0, "{context}");
        }
        DraftKind::Scripted(_) | DraftKind::Model(_) | DraftKind::None => {}
    }
}

/// Figures of many runs.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    tokens: u64,
    accepted: u64,
    rejected: u64,
}

impl Totals {
    fn add(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            accepted: self.accepted + other.accepted,
            rejected: self.rejected + other.rejected,
        }
    }
}

/// Runs one way to choose against everything it is crossed with.
fn cross(way: usize, name: &str, params: &SamplingParams) -> Totals {
    let pieces = pieces(VOCAB_SIZE);
    let all_cases = cases(way, name, params);
    let mut kinds: Vec<DraftKind> = BEHAVIOURS.map(DraftKind::Scripted).to_vec();
    kinds.push(DraftKind::Scripted(Behaviour::Mixed));
    kinds.extend([0.0, 0.3, 1.5].map(DraftKind::Model));
    let mut totals = Totals::default();
    for draft_len in 0..=DRAFT_LEN_MAX {
        for batch in [1, 3, 8] {
            let mut cases = all_cases[..batch].to_vec();
            for case in &mut cases {
                case.request.speculation = Speculation::Fixed(draft_len);
            }
            let requests: Vec<Request> = cases.iter().map(|case| case.request.clone()).collect();
            // Not over before a proposal can be of use.
            let is_long = cases.iter().any(|case| case.expected.chosen.len() > 2);
            assert!(is_long || batch == 1, "{name}: every output is short");
            for step_tokens_max in STEP_TOKENS_MAX {
                for &kind in &kinds {
                    let context = format!(
                        "{name}, draft_len {draft_len}, batch {batch}, rows {step_tokens_max}, \
                         {kind:?}"
                    );
                    let config = config(step_tokens_max);
                    let (mut engine, _) = hash_engine(lm(1), config, &pieces, kind, &cases);
                    let outcome = drive(&mut engine, &requests, step_tokens_max % 3);
                    assert_expected(&outcome, &cases, &pieces, &context);
                    assert_counters(&outcome, kind, draft_len, &context);
                    let Counters { committed, proposed, accepted, .. } = outcome.counters;
                    // Steps with room for proposals must have had some, once nobody's first token
                    // is due any more: those steps propose nothing.
                    let outlives = |case: &Case| case.expected.chosen.len() > 2 + 4 * batch;
                    let is_long = cases.iter().any(outlives);
                    let must_use_it = draft_len > 0 && step_tokens_max >= ROOMY && is_long;
                    if must_use_it && kind == DraftKind::Scripted(Behaviour::Perfect) {
                        assert!(accepted > 0, "{context}: nothing was accepted");
                    }
                    let rejected = proposed - accepted;
                    totals = totals.add(Totals { tokens: committed, accepted, rejected });
                }
            }
        }
    }
    totals
}

#[test]
fn the_full_product_equals_the_oracle() {
    timed("exactness, full product", 30.0, || {
        // Half of the ways on each of two threads: the longest test would else decide alone how
        // long all tests take.
        let ways = ways();
        let halves = [0, 1].map(|half| (half..ways.len()).step_by(2).collect::<Vec<_>>());
        let totals = std::thread::scope(|scope| {
            let run = |way: &usize| cross(*way, ways[*way].0, &ways[*way].1);
            let threads = halves.each_ref().map(|half| {
                scope.spawn(move || half.iter().map(run).fold(Totals::default(), Totals::add))
            });
            let halves = threads.into_iter().map(|thread| thread.join().expect("a half failed"));
            halves.fold(Totals::default(), Totals::add)
        });
        report(&format!("  exactness: equal to the oracle's: {totals:?}"));
        assert!(totals.accepted > 0 && totals.rejected > 0, "{totals:?}");
    });
}

/// Runs one request with a perfect draft at every draft length and a model draft at one.
fn check_at_every_depth(lm: HashLmConfig, request: &Request, what: &str) {
    let pieces = pieces(lm.limits.vocab_size);
    let mut case = Case::new(lm, &pieces, request.clone(), 1);
    for draft_len in 0..=DRAFT_LEN_MAX {
        case.request.speculation = Speculation::Fixed(draft_len);
        let kind = match draft_len {
            5 => DraftKind::Model(0.4),
            _ => DraftKind::Scripted(Behaviour::Perfect),
        };
        let cases = [case.clone()];
        let (mut engine, _) = hash_engine(lm, config(64), &pieces, kind, &cases);
        let outcome = drive(&mut engine, &[case.request.clone()], 0);
        assert_expected(&outcome, &cases, &pieces, &(what, draft_len));
    }
}

#[test]
fn stop_strings_end_at_every_byte_of_a_run() {
    timed("exactness, stops", 5.0, || {
        let pieces = pieces(VOCAB_SIZE);
        for language in 0..3 {
            let mut request = plain_request(vec![TokenId(2), TokenId(7)], 14);
            request.params.end_ids.clear();
            request.logprobs = true;
            let free = Case::new(lm(language), &pieces, request.clone(), 1);
            let bytes = bytes_of(&pieces, &free.expected.tokens);
            for begin in 0..bytes.len() {
                for end in begin + 1..=(begin + 7).min(bytes.len()) {
                    request.stop_strings = vec![bytes[begin..end].to_vec()];
                    check_at_every_depth(lm(language), &request, "stop string");
                }
            }
        }
    });
}

#[test]
fn stops_limits_and_minima_meet_everywhere() {
    timed("exactness, stops and limits", 5.0, || {
        let pieces = pieces(VOCAB_SIZE);
        let mut request = plain_request(vec![TokenId(2), TokenId(7), TokenId(1)], 12);
        request.params.end_ids.clear();
        let free = Case::new(lm(5), &pieces, request.clone(), 1).expected;
        for first in 0..12 {
            // Two strings that may overlap: the end of one token with the next, and that next one.
            let pair = bytes_of(&pieces, &free.tokens[first..(first + 2).min(12)]);
            let next = bytes_of(&pieces, &free.tokens[(first + 1).min(11)..][..1]);
            request.stop_strings = [pair, next].into_iter().filter(|s| !s.is_empty()).collect();
            for max_tokens in 1..=12 {
                for min_tokens in [0, first, first + 1, first + 2, 12] {
                    request.max_tokens = max_tokens;
                    request.params.min_tokens = min_tokens;
                    check_at_every_depth(lm(5), &request, "stop, limit, minimum");
                }
            }
        }
    });
}

#[test]
fn ends_and_limits_fall_on_every_index() {
    timed("exactness, ends", 5.0, || {
        // Many tokens, so that hardly any repeats and each can serve as an end.
        let mut lm = lm(9);
        lm.limits.vocab_size = 400;
        let pieces = pieces(400);
        let mut request = plain_request(vec![TokenId(30), TokenId(31)], 20);
        request.params.end_ids.clear();
        let free = Case::new(lm, &pieces, request.clone(), 1).expected;
        for (index, &token) in free.tokens.iter().enumerate() {
            request.params.end_ids = vec![token];
            for max_tokens in [index.max(1), index + 1, index + 2] {
                request.max_tokens = max_tokens;
                check_at_every_depth(lm, &request, "end token");
            }
        }
        request.params.end_ids.clear();
        for max_tokens in 1..=20 {
            request.max_tokens = max_tokens;
            check_at_every_depth(lm, &request, "limit");
        }
    });
}

#[test]
fn a_resumed_request_continues_identically_from_every_cut() {
    timed("exactness, resumption", 5.0, || {
        let pieces = pieces(VOCAB_SIZE);
        let mut num_cuts = 0;
        for seed in 0..120 {
            let mut rng = Rng::new(seed);
            let mut request = plain_request(random_tokens(&mut rng, VOCAB_SIZE, 6), 22);
            request.params = random_params(&mut rng, VOCAB_SIZE);
            request.stop_strings =
                (0..rng.below(3)).map(|_| stop_string(&mut rng, &pieces)).collect();
            // As on the wire: a stop that begins inside a character could cut one in half.
            request.stop_strings.retain(|stop| std::str::from_utf8(stop).is_ok());
            request.logprobs = true;
            let whole = Case::new(lm(seed), &pieces, request.clone(), 1).expected;
            for cut in 0..=whole.tokens.len() {
                request.output_prefix = whole.tokens[..cut].to_vec();
                let rest = Case::new(lm(seed), &pieces, request.clone(), 1);
                let cases = [rest];
                let kind = DraftKind::Model(0.5);
                let (mut engine, _) = hash_engine(lm(seed), config(48), &pieces, kind, &cases);
                let outcome = drive(&mut engine, &[request.clone()], 0);
                assert_expected(&outcome, &cases, &pieces, &(seed, cut));
                // And the two parts are the whole, whatever the oracle says about the second.
                let second = &outcome.collected[0];
                assert_eq!(second.ids(), whole.tokens[cut..], "seed {seed}, cut {cut}");
                let first = known_text(&bytes_of(&pieces, &request.output_prefix));
                let joined = format!("{first}{}", second.text);
                // A stop string may take back text of the prefix, and then nothing follows it.
                let is_whole = joined == whole.text
                    || (second.text.is_empty() && first.starts_with(&whole.text));
                assert!(is_whole, "seed {seed}, cut {cut}: {joined:?} is not {:?}", whole.text);
                let reason = second.finished.as_ref().unwrap().reason;
                assert_eq!(reason, whole.reason, "seed {seed}, cut {cut}");
                num_cuts += 1;
            }
        }
        report(&format!("  exactness: {num_cuts} cuts continued identically"));
    });
}

#[test]
fn a_bad_row_ends_its_sequence_at_its_position_and_nobody_else() {
    let pieces = pieces(VOCAB_SIZE);
    for position in 2..24 {
        for draft_len in [0, 1, 4, 8] {
            let mut requests = Vec::new();
            for first in [4, 5, 6] {
                let mut request = plain_request(vec![TokenId(first); 3], 20);
                request.speculation = Speculation::Fixed(draft_len);
                request.params.end_ids.clear();
                request.params.temperature = 0.8;
                requests.push(request);
            }
            let mut cases = Vec::new();
            for (request, owner) in requests.iter().zip(1..) {
                let (mut forward, probe) = HashLm::new(lm(2));
                probe.poison_row(2, position);
                let expected = decode(&mut forward, &pieces, request, owner);
                cases.push(Case { request: request.clone(), expected });
            }
            let kind = DraftKind::Scripted(Behaviour::RightThenWrong);
            let (mut engine, probe) = hash_engine(lm(2), config(40), &pieces, kind, &cases);
            probe.poison_row(2, position);
            let outcome = drive(&mut engine, &requests, 0);
            assert_expected(&outcome, &cases, &pieces, &(position, draft_len));
            let fault = cases[1].expected.reason;
            let is_fault = matches!(fault, FinishReason::Fault(SequenceFault::Choice(_)));
            // The row at the limit's position is never computed.
            assert_eq!(is_fault, position < 22, "position {position}: {fault:?}");
        }
    }
}

#[test]
fn a_row_without_any_allowed_token_is_that_sequences_fault() {
    let mut request = plain_request(vec![TokenId(1)], 5);
    request.params.end_ids = (0..VOCAB_SIZE as u32).map(TokenId).collect();
    request.params.min_tokens = 1;
    for temperature in [0.0, 1.0] {
        request.params.temperature = temperature;
        check_at_every_depth(lm(3), &request, "all masked");
    }
}

#[test]
fn a_draft_swapped_at_any_step_changes_nothing() {
    let pieces = pieces(VOCAB_SIZE);
    let cases: Vec<Case> = cases(3, "swap", &ways()[2].1);
    let requests: Vec<Request> = cases.iter().map(|case| case.request.clone()).collect();
    let kinds = [
        DraftKind::Model(0.3),
        DraftKind::None,
        DraftKind::Scripted(Behaviour::AlwaysWrong),
        DraftKind::Scripted(Behaviour::Perfect),
        DraftKind::Scripted(Behaviour::Panicking),
    ];
    let clock = Arc::new(VirtualClock::default());
    for swap_at in 0..16 {
        for (index, from) in kinds.into_iter().enumerate() {
            let to = kinds[(index + 1) % kinds.len()];
            let (mut engine, _) = hash_engine(lm(1), config(40), &pieces, from, &cases);
            let outcome = drive_with(&mut engine, &requests, 1, |engine, step| {
                if step == swap_at {
                    engine.set_proposer(draft(lm(1), to, &cases, &clock));
                }
            });
            assert_expected(&outcome, &cases, &pieces, &(swap_at, from, to));
            assert!(
                outcome.collected.iter().all(|c| is_natural(c.finished.as_ref().unwrap().reason))
            );
        }
    }
}

#[test]
fn a_perfect_draft_saves_the_steps_it_should() {
    let pieces = pieces(VOCAB_SIZE);
    let mut request = plain_request(vec![TokenId(8); 5], 40);
    request.params.end_ids.clear();
    for draft_len in 0..=DRAFT_LEN_MAX {
        request.speculation = Speculation::Fixed(draft_len);
        let cases = [Case::new(lm(4), &pieces, request.clone(), 1)];
        let kind = DraftKind::Scripted(Behaviour::Perfect);
        let (mut engine, probe) = hash_engine(lm(4), config(64), &pieces, kind, &cases);
        let outcome = drive(&mut engine, &[request.clone()], 0);
        // The first token comes alone; then every step brings the proposal and one more.
        let num_steps = 1 + 39_usize.div_ceil(draft_len + 1);
        assert_eq!(outcome.counters.steps as usize, num_steps, "draft_len {draft_len}");
        // Prompt and output but the last token: nothing is computed twice.
        assert_eq!(probe.counts().rows, 44, "draft_len {draft_len}");
    }
}

#[test]
fn faults_of_a_draft_are_counted_and_end_in_quarantine() {
    let pieces = pieces(VOCAB_SIZE);
    let cases = cases(1, "faults", &ways()[14].1);
    let requests: Vec<Request> = cases.iter().map(|case| case.request.clone()).collect();
    for behaviour in BEHAVIOURS {
        let config = EngineConfig { quarantine_after: 1, ..config(64) };
        let kind = DraftKind::Scripted(behaviour);
        let (mut engine, _) = hash_engine(lm(1), config, &pieces, kind, &cases);
        let outcome = drive(&mut engine, &requests, 0);
        assert_expected(&outcome, &cases, &pieces, &behaviour);
        let counters = outcome.counters;
        let (fails, talks_nonsense) = match behaviour {
            Behaviour::Panicking | Behaviour::Erroring | Behaviour::Slow => (true, false),
            Behaviour::OutOfRange
            | Behaviour::TooMany
            | Behaviour::WrongEpoch
            | Behaviour::UnknownSequence
            | Behaviour::Duplicate => (false, true),
            Behaviour::Perfect
            | Behaviour::AlwaysWrong
            | Behaviour::Random
            | Behaviour::RightThenWrong
            | Behaviour::RightThenEnd
            | Behaviour::Empty
            | Behaviour::Silent
            | Behaviour::Mixed => (false, false),
        };
        assert_eq!(counters.draft_faults > 0, fails, "{behaviour:?}: {counters:?}");
        assert_eq!(counters.dropped_proposals > 0, talks_nonsense, "{behaviour:?}: {counters:?}");
        assert_eq!(engine.is_draft_quarantined(), fails || talks_nonsense, "{behaviour:?}");
        assert_eq!(counters.quarantines, u64::from(fails || talks_nonsense), "{behaviour:?}");
        let asks = !matches!(behaviour, Behaviour::Empty | Behaviour::Silent);
        let is_used = asks && behaviour != Behaviour::WrongEpoch;
        if !is_used {
            assert_eq!(counters.proposed, 0, "{behaviour:?}");
        }
    }
}

#[test]
fn the_drafts_cache_changes_none_of_its_proposals() {
    let pieces = pieces(VOCAB_SIZE);
    let cases = cases(2, "cache", &ways()[14].1);
    let requests: Vec<Request> = cases.iter().map(|case| case.request.clone()).collect();
    let clock = Arc::new(VirtualClock::default());
    // With few rows a sequence is often not asked for steps on end, and comes back with a history
    // that has left the draft's entry behind.
    for (perturbation, rows) in [(0.3, 64), (1.0, 9), (1.0, 11), (2.0, 14), (2.0, 64)] {
        let kind = DraftKind::Model(perturbation);
        let mut usages = Vec::new();
        for forgets in [false, true] {
            let (mut engine, _) = hash_engine(lm(1), config(rows), &pieces, kind, &cases);
            let proposer = draft(lm(1), kind, &cases, &clock).unwrap();
            engine.set_proposer(Some(match forgets {
                true => Box::new(Forgetful(proposer)),
                false => proposer,
            }));
            let outcome = drive(&mut engine, &requests, 1);
            assert_expected(&outcome, &cases, &pieces, &(perturbation, rows, forgets));
            let ends = outcome.collected.into_iter().map(|c| c.finished.unwrap().speculation);
            usages.push(ends.collect::<Vec<_>>());
        }
        // A stale entry shows here and nowhere else: output never depends on the draft.
        assert_eq!(usages[0], usages[1], "noise {perturbation}, {rows} rows");
        assert!(usages[0].iter().any(|usage| usage.num_accepted() < usage.num_proposed));
    }
}
