//! Proves the promise on a real pair and over the real wire: 200 seeded configurations, each
//! answered plainly and alone, speculatively and alone, and speculatively among changing neighbours
//! on a server with other threads, chunking and memory, of several tenants and classes, in part
//! with KV that earlier requests left. All bytes are equal.

use slipstream_proto::v1;
use slipstream_proto::v1::speculation::Mode;
use slipstream_tests::client::{
    Answer, Client, block_on, client, sampled, speculation, start, stream,
};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::{report, timed};
use tokio::task::JoinSet;

const NUM_CONFIGURATIONS: u64 = 200;
/// Configurations that share a batch.
const NEIGHBOURS: usize = 8;
/// Text that prompts are cut from.
const TEXT: &str = include_str!("fixtures/text-random.txt");
const STOPS: [&str; 6] = ["\n\n", "}\n", "fn ", ";", "// ", "é"];

/// A random prompt with random parameters; everything follows from the seed.
fn configuration(seed: u64) -> v1::GenerateRequest {
    let mut rng = Rng::new(seed);
    let begin = (0..).map(|_| rng.below(TEXT.len() - 400)).find(|at| TEXT.is_char_boundary(*at));
    let rest = &TEXT[begin.unwrap_or(0)..];
    let len = rng.between(1, 300);
    let prompt: String = rest.chars().take(len).collect();
    let max_tokens = rng.between(1, 48) as i32;
    let mut request = sampled(&prompt, max_tokens, rng.bits());
    request.temperature = Some(*rng.pick(&[0.0, 0.0, 0.2, 0.8, 1.0, 1.5]));
    request.ignore_eos = rng.one_in(2);
    request.sample_index = rng.below(3) as u32;
    if rng.one_in(3) {
        request.top_k = rng.between(1, 50) as i32;
    }
    if rng.one_in(3) {
        request.top_p = Some(0.05 + 0.95 * rng.unit());
    }
    if rng.one_in(4) {
        request.min_p = 0.3 * rng.unit();
    }
    if rng.one_in(3) {
        request.repetition_penalty = Some(0.8 + rng.unit());
        request.presence_penalty = 2.0 * rng.unit() - 1.0;
        request.frequency_penalty = 2.0 * rng.unit() - 1.0;
    }
    if rng.one_in(4) {
        let mut ids: Vec<u32> = (0..rng.between(1, 9)).map(|_| rng.below(1024) as u32).collect();
        ids.sort_unstable();
        ids.dedup();
        let bias = |token_id| v1::LogitBias { token_id, bias: 8.0 * rng.unit() - 4.0 };
        request.logit_bias = ids.into_iter().map(bias).collect();
    }
    if rng.one_in(2) {
        let stops = (0..rng.between(1, 3)).map(|_| (*rng.pick(&STOPS)).to_owned());
        request.stop_strings = stops.collect();
        request.min_tokens = rng.below(1 + max_tokens as usize / 2) as i32;
    }
    if rng.one_in(4) {
        request.stop_token_ids = (0..3).map(|_| rng.below(1024) as u32).collect();
    }
    request
}

/// AUTO, or a draft length of 1 to 8.
fn random_mode(rng: &mut Rng) -> Option<v1::Speculation> {
    match rng.below(9) {
        0 => speculation(Mode::Auto, None),
        len => speculation(Mode::Fixed, Some(len as i32)),
    }
}

/// The same, with everything left to chance that changes no byte: speculation, whose it is, how
/// urgent, and what it may share.
fn served_anyhow(rng: &mut Rng, seed: u64) -> v1::GenerateRequest {
    let classes = [v1::Priority::Interactive, v1::Priority::Normal, v1::Priority::Batch];
    v1::GenerateRequest {
        speculation: random_mode(rng),
        tenant: ["", "a", "b"][rng.below(3)].to_owned(),
        priority: (*rng.pick(&classes)).into(),
        no_prefix_reuse: rng.one_in(4),
        ..configuration(seed)
    }
}

async fn answer(client: &Client, request: v1::GenerateRequest, seed: u64) -> Answer {
    match stream(client, request).await {
        Ok(answer) => answer,
        Err(status) => panic!("configuration {seed}: {status:?}"),
    }
}

fn assert_same(seed: u64, how: &str, plain: &Answer, other: &Answer) {
    let first = plain.ids().iter().zip(other.ids()).position(|(one, other)| *one != other);
    assert!(
        plain.bytes() == other.bytes(),
        "configuration({seed}) differs {how}, first different token {first:?}\n\
         plain: {:?}\nother: {:?}",
        plain.bytes(),
        other.bytes(),
    );
}

/// Figures of a run.
#[derive(Default)]
struct Totals {
    num_compared: usize,
    proposed: u32,
    accepted: u32,
    cached: u32,
}

impl Totals {
    fn add(&mut self, answer: &Answer) {
        self.num_compared += 1;
        self.proposed += answer.speculation().proposed;
        self.accepted += answer.speculation().accepted;
        self.cached += answer.cached_len();
    }
}

/// Answers all of `seeds` at the same time.
async fn together(client: &Client, seeds: &[u64]) -> Vec<(u64, Answer)> {
    let mut calls = JoinSet::new();
    for &seed in seeds {
        let client = client.clone();
        let mut rng = Rng::new(seed).fork(2);
        let request = served_anyhow(&mut rng, seed);
        calls.spawn(async move { (seed, answer(&client, request, seed).await) });
    }
    calls.join_all().await
}

#[test]
fn two_hundred_configurations_give_the_same_bytes_however_they_are_computed() {
    timed("200 configurations over gRPC", 60.0, || {
        block_on(async {
            let one = start(|flags| flags.draft_len = 3).await;
            // Other threads, prompts in chunks of 24, and memory for two full contexts only.
            let other = start(|flags| {
                flags.threads = Some(1);
                flags.step_tokens = 24;
                flags.kv_blocks = Some(128);
                flags.max_running = 5;
            })
            .await;
            let mut totals = Totals::default();
            let seeds: Vec<u64> = (0..NUM_CONFIGURATIONS).collect();
            for group in seeds.chunks(NEIGHBOURS) {
                let mut plain = Vec::new();
                for &seed in group {
                    let off = speculation(Mode::Off, None);
                    let off = v1::GenerateRequest { speculation: off, ..configuration(seed) };
                    plain.push(answer(&client(&one), off, seed).await);
                    let on = served_anyhow(&mut Rng::new(seed).fork(1), seed);
                    let on = answer(&client(&one), on, seed).await;
                    totals.add(&on);
                    assert_same(seed, "with speculation", &plain[plain.len() - 1], &on);
                }
                for (seed, answer) in together(&client(&other), group).await {
                    totals.add(&answer);
                    let index = (seed - group[0]) as usize;
                    assert_same(seed, "among neighbours", &plain[index], &answer);
                }
            }
            report(&format!(
                "  {} comparisons, {} of {} proposed tokens accepted, {} prompt tokens cached",
                totals.num_compared, totals.accepted, totals.proposed, totals.cached
            ));
            assert!(totals.cached > 0, "nothing was ever shared");
            assert_eq!(totals.num_compared as u64, 2 * NUM_CONFIGURATIONS);
            assert!(
                totals.accepted * 4 > totals.proposed,
                "the draft agrees too seldom to show much"
            );
            one.stop().await.unwrap();
            other.stop().await.unwrap();
        });
    });
}
