//! Proves that a deadline ends its request at that moment of the engine's clock and not before,
//! wherever the request is, and changes nothing for the others. Time is virtual: every step takes
//! one microsecond.

use std::sync::Arc;

use slipstream_model::clock::{Clock, Micros};
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::{SequenceId, TokenId};
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::event::FinishReason;
use slipstream_server::engine::request::{Request, Speculation};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};
use slipstream_tests::collected::Collected;
use slipstream_tests::drive::{Case, DraftKind, draft};
use slipstream_tests::hash_lm::{HashLm, HashLmConfig};
use slipstream_tests::pieces::pieces;
use slipstream_tests::proposers::{Behaviour, VirtualClock};
use slipstream_tests::requests::plain_request;

const VOCAB_SIZE: usize = 32;
const MAX_TOKENS: usize = 12;

fn lm() -> HashLmConfig {
    let limits = ForwardLimits { vocab_size: VOCAB_SIZE, context_len: 64, num_blocks: 8 };
    HashLmConfig::verifier(4, limits)
}

/// A request for exactly [`MAX_TOKENS`] tokens.
fn request(first: u32, draft_len: usize) -> Request {
    let mut request = plain_request(vec![TokenId(first); 5], MAX_TOKENS);
    request.params.end_ids.clear();
    request.speculation = Speculation::Fixed(draft_len);
    request
}

fn cases(requests: &[Request]) -> Vec<Case> {
    let pieces = pieces(VOCAB_SIZE);
    let case = |(request, owner): (&Request, u64)| Case::new(lm(), &pieces, request.clone(), owner);
    requests.iter().zip(1..).map(case).collect()
}

/// Submits all cases at time 0 and steps at 0, 1, 2, ... microseconds. Says what each received and
/// at which time it got its end.
fn run(cases: &[Case], kind: DraftKind, max_running: usize) -> Vec<(Collected, u64)> {
    let clock = Arc::new(VirtualClock::default());
    let mut engine = Engine::new(EngineParts {
        config: EngineConfig { max_running, ..EngineConfig::default() },
        verifier: Box::new(HashLm::new(lm()).0),
        proposer: draft(lm(), kind, cases, &clock),
        token_bytes: Arc::new(TokenBytes::new(pieces(VOCAB_SIZE))),
        clock: Arc::<VirtualClock>::clone(&clock) as Arc<dyn Clock>,
        cache_key: [7; 32],
    });
    for (case, id) in cases.iter().zip(1..) {
        engine.submit(SequenceId(id), case.request.clone()).unwrap();
    }
    let mut received = vec![(Collected::default(), 0); cases.len()];
    while engine.has_work() {
        engine.step();
        for ((collected, ended_at), id) in received.iter_mut().zip(1..) {
            while let Some(event) = engine.take_event(SequenceId(id)) {
                collected.take(event).unwrap();
                *ended_at = clock.now().0;
            }
        }
        clock.advance(Micros(1));
        assert!(clock.now() < Micros(1_000), "work does not end");
    }
    assert_eq!(engine.blocks().num_available(), lm().limits.num_blocks, "blocks are missing");
    received
}

fn reason(collected: &Collected) -> FinishReason {
    collected.finished.as_ref().unwrap().reason
}

#[test]
fn a_deadline_ends_its_request_at_its_moment_and_nobody_else() {
    let pieces = pieces(VOCAB_SIZE);
    for (kind, draft_len) in [(DraftKind::None, 0), (DraftKind::Scripted(Behaviour::Perfect), 2)] {
        for deadline in 1..=MAX_TOKENS as u64 + 1 {
            let mut requests =
                [request(4, draft_len), request(5, draft_len), request(6, draft_len)];
            requests[1].deadline = Some(Micros(deadline));
            let cases = cases(&requests);
            let received = run(&cases, kind, 3);
            // The first step brings one token, every other one the proposal's and one more.
            let num_steps = deadline as usize;
            let num_tokens = (1 + (num_steps - 1) * (draft_len + 1)).min(MAX_TOKENS);
            let context = format!("{kind:?}, deadline {deadline}");
            let (late, ended_at) = &received[1];
            assert_eq!(late.tokens.len(), num_tokens, "{context}");
            if num_tokens < MAX_TOKENS {
                assert_eq!(reason(late), FinishReason::DeadlineExceeded, "{context}");
                assert_eq!(*ended_at, deadline, "{context}");
            } else {
                assert_eq!(reason(late), FinishReason::Length, "{context}");
            }
            for (case, (collected, _)) in cases.iter().zip(&received) {
                collected.check_finished(&case.request, &case.expected, &pieces).unwrap();
            }
            for other in [&received[0].0, &received[2].0] {
                assert_eq!(reason(other), FinishReason::Length, "{context}");
            }
        }
    }
}

#[test]
fn a_request_may_miss_its_deadline_in_the_queue() {
    for deadline in 1..MAX_TOKENS as u64 {
        let mut requests = [request(4, 0), request(5, 0), request(6, 0)];
        requests[1].deadline = Some(Micros(deadline));
        let cases = cases(&requests);
        let received = run(&cases, DraftKind::None, 1);
        let (waiting, ended_at) = &received[1];
        assert_eq!(reason(waiting), FinishReason::DeadlineExceeded, "deadline {deadline}");
        assert_eq!((waiting.tokens.len(), *ended_at), (0, deadline));
        assert_eq!(waiting.finished.as_ref().unwrap().timings.queue, None);
        // Whoever waits behind it comes as if it had never been there.
        let (next, ended_at) = &received[2];
        assert_eq!(next.ids(), cases[2].expected.tokens);
        assert_eq!(*ended_at, 2 * MAX_TOKENS as u64 - 1);
    }
}
