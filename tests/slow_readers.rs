//! Proves what becomes of completions whose clients take nothing: they pause when too much is
//! unread, while others go on as if they were alone; they are ended at the stall limit with
//! everything given back, and can go on; those that are over give their place back at once; and
//! whoever merely waits for the server is left alone.

use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_server::config::{Config, ModelFlags};
use slipstream_server::local::LocalServer;
use slipstream_tests::client::{
    PATIENCE, block_on, client, config, greedy, narrow_client, read_on, sampled, stream,
    until_taken, url,
};
use slipstream_tests::exposition::Page;
use slipstream_tests::plain_http::get;
use slipstream_tests::raw_call::reason;
use tonic::{Code, Request};

const PROMPT: &str = "use std::collections::HashMap;\n";
/// Output that fills the micro verifier's context of 1024 after `PROMPT`.
const LONG: i32 = 1000;
/// Output that is computed in full for somebody who reads nothing.
const SHORT: i32 = 400;

/// Places for `num` requests in all, blocks for one full context.
fn settings(num: usize, stall_limit: Duration) -> Config {
    let mut settings = config(|flags: &mut ModelFlags| {
        flags.max_running = 1;
        flags.max_waiting = num - 1;
        flags.kv_blocks = Some(64);
    });
    settings.edge.stall_limit = stall_limit;
    settings
}

/// More bytes than a connection takes unread.
fn wide(seed: u64) -> v1::GenerateRequest {
    v1::GenerateRequest { logprobs: true, token_bytes: true, ..sampled(PROMPT, LONG, seed) }
}

#[test]
fn a_client_that_takes_nothing_is_ended_and_can_go_on() {
    block_on(async {
        let limit = Duration::from_millis(40);
        let server = LocalServer::start(settings(4, limit)).await.unwrap();
        let (slow, other) = (narrow_client(&url(&server)).await, client(&server));
        let mut streams = Vec::new();
        for seed in 0..4 {
            streams.push(slow.clone().generate(wide(seed)).await.unwrap().into_inner());
        }
        // All blocks are back while none of them was read.
        until_taken(&other, &greedy(PROMPT, LONG)).await;
        // The last of them may have come to its turn late.
        let begun = Instant::now();
        let mut num_stalled = 0;
        for (seed, events) in (0..).zip(&mut streams) {
            let (received, status) = read_on(events, Vec::new()).await;
            let Some(status) = status else {
                assert_eq!(received.len(), LONG as usize, "it was read before its limit");
                continue;
            };
            num_stalled += 1;
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            assert_eq!(reason(&status), "STALLED");
            for part in ["40ms", "output_prefix"] {
                assert!(status.message().contains(part), "{status:?}");
            }
            let resumed = v1::GenerateRequest { output_prefix: received.clone(), ..wide(seed) };
            let rest = stream(&other, resumed).await.unwrap().ids();
            let whole = stream(&other, wide(seed)).await.unwrap().ids();
            assert_eq!([received, rest].concat(), whole, "seed {seed}");
        }
        assert!(num_stalled > 0, "nobody stalled in {:?}", begun.elapsed());
        server.stop().await.unwrap();
    });
}

#[test]
fn a_completion_that_is_over_gives_its_place_back_unread() {
    block_on(async {
        let never = Duration::from_secs(3600);
        let server = LocalServer::start(settings(1, never)).await.unwrap();
        let (slow, other) = (narrow_client(&url(&server)).await, client(&server));
        let short = v1::GenerateRequest { max_tokens: Some(SHORT), ..wide(1) };
        let mut events = slow.clone().generate(short.clone()).await.unwrap().into_inner();
        until_taken(&other, &greedy(PROMPT, 4)).await;
        let (received, status) = read_on(&mut events, Vec::new()).await;
        assert!(status.is_none(), "{status:?}");
        assert_eq!(received, stream(&other, short).await.unwrap().ids());
        server.stop().await.unwrap();
    });
}

/// Waits until so many requests have ended, and says how many output tokens were committed.
///
/// # Panics
/// When more have ended.
async fn committed_by(server: &LocalServer, num_ended: usize) -> usize {
    let begun = Instant::now();
    loop {
        let page = Page::parse(&get(server.address(), "/metrics").await.body).unwrap();
        let ended = page.families["slipstream_requests_finished_total"].samples.iter();
        let ended = ended.map(|sample| sample.value).sum::<f64>() as usize;
        assert!(ended <= num_ended, "{ended} requests have ended");
        if ended == num_ended {
            return page.number("slipstream_committed_tokens_total") as usize;
        }
        assert!(begun.elapsed() < PATIENCE, "only {ended} requests have ended");
        tokio::task::yield_now().await;
    }
}

#[test]
fn who_is_behind_pauses_and_nobody_else() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.stall_limit = Duration::from_secs(3600);
        let server = LocalServer::start(settings).await.unwrap();
        let (slow, other) = (narrow_client(&url(&server)).await, client(&server));
        let whole = stream(&other, wide(1)).await.unwrap().ids();
        let mut alone = Vec::new();
        for seed in 2..6 {
            alone.push(stream(&other, sampled(PROMPT, LONG, seed)).await.unwrap());
        }
        let before = committed_by(&server, 5).await;
        let mut events = slow.clone().generate(wide(1)).await.unwrap().into_inner();
        // Four times the work of the one that is not read.
        for (seed, alone) in (2..6).zip(&alone) {
            let answer = stream(&other, sampled(PROMPT, LONG, seed)).await.unwrap();
            assert_eq!(answer.bytes(), alone.bytes());
        }
        // The one that is not read has not ended.
        let num_ahead = committed_by(&server, 9).await - before - 4 * LONG as usize;
        assert!((512..900).contains(&num_ahead), "{num_ahead} tokens ahead");
        let (received, status) = read_on(&mut events, Vec::new()).await;
        assert!(status.is_none(), "{status:?}");
        assert_eq!(received, whole, "a pause changes nothing");
        server.stop().await.unwrap();
    });
}

#[test]
fn a_deadline_passes_in_a_pause_too_and_leaves_what_was_certain() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.stall_limit = Duration::from_secs(3600);
        let server = LocalServer::start(settings).await.unwrap();
        let (slow, other) = (narrow_client(&url(&server)).await, client(&server));
        let whole = stream(&other, wide(1)).await.unwrap().ids();
        let before = committed_by(&server, 1).await;
        let mut call = Request::new(wide(1));
        call.metadata_mut().insert("grpc-timeout", "1S".parse().unwrap());
        let mut events = slow.clone().generate(call).await.unwrap().into_inner();
        let num_certain = committed_by(&server, 2).await - before;
        let (received, status) = read_on(&mut events, Vec::new()).await;
        let status = status.expect("its deadline has passed");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert_eq!(received.len(), num_certain, "every certain token came");
        assert!(received.len() >= 512 && whole.starts_with(&received));
        let resumed = v1::GenerateRequest { output_prefix: received.clone(), ..wide(1) };
        let rest = stream(&other, resumed).await.unwrap().ids();
        assert_eq!([received, rest].concat(), whole);
        server.stop().await.unwrap();
    });
}

#[test]
fn a_drain_waits_for_nobody_who_takes_nothing() {
    block_on(async {
        let mut settings = settings(2, Duration::from_millis(200));
        settings.edge.grace = PATIENCE * 10;
        let server = LocalServer::start(settings).await.unwrap();
        let slow = narrow_client(&url(&server)).await;
        let mut streams = Vec::new();
        for seed in 0..2 {
            streams.push(slow.clone().generate(wide(seed)).await.unwrap().into_inner());
        }
        tokio::time::timeout(PATIENCE, server.stop()).await.expect("the drain ends").unwrap();
        drop(streams);
    });
}

#[test]
fn waiting_for_the_server_is_no_stall() {
    block_on(async {
        let limit = Duration::from_millis(40);
        let server = LocalServer::start(settings(4, limit)).await.unwrap();
        let client = client(&server);
        let calls: Vec<_> = (0..4)
            .map(|seed| {
                let client = client.clone();
                tokio::spawn(async move { stream(&client, sampled(PROMPT, LONG, seed)).await })
            })
            .collect();
        let mut longest_wait_ms: f64 = 0.0;
        for call in calls {
            let answer = call.await.unwrap().unwrap();
            assert_eq!(answer.tokens.len(), LONG as usize);
            let timings = answer.finished.timings.unwrap();
            longest_wait_ms = longest_wait_ms.max(timings.first_token_ms.unwrap());
        }
        let limit_ms = limit.as_secs_f64() * 1000.0;
        assert!(longest_wait_ms > 2.0 * limit_ms, "{longest_wait_ms} ms prove nothing");
        server.stop().await.unwrap();
    });
}
