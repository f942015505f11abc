//! Proves how calls and servers end: a client that goes away gives everything back, deadlines and
//! full queues have their codes, health follows the server's life, a drain loses nothing, and a
//! server that cannot start says why.

use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_proto::v1::generate_event::Event;
use slipstream_server::config::{ByteCount, ModelFlags};
use slipstream_server::local::{LocalServer, LocalServerError, connect};
use slipstream_server::{RunError, StartupError};
use slipstream_tests::client::{
    Client, PATIENCE, block_on, client, complete, config, greedy, narrow_client, read_on, sampled,
    start, stream, until_taken,
};
use slipstream_tests::exposition::Page;
use slipstream_tests::held_loading::HeldLoading;
use slipstream_tests::plain_http::get;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const PROMPT: &str = "use std::collections::HashMap;\n";
/// Output that fills the micro verifier's context of 1024 after `PROMPT`.
const LONG: i32 = 1000;
/// A request for as much output as there can be.
fn long() -> v1::GenerateRequest {
    v1::GenerateRequest { logprobs: true, token_bytes: true, ..greedy(PROMPT, LONG) }
}

#[test]
fn a_client_that_goes_away_gives_everything_back() {
    block_on(async {
        // Room for one request in all: 64 blocks are one full context.
        let one = |flags: &mut ModelFlags| {
            flags.max_running = 1;
            flags.max_waiting = 0;
            flags.kv_blocks = Some(64);
        };
        let server = start(one).await;
        let client = client(&server);
        let full = greedy(PROMPT, LONG);
        for num_events in 0..12 {
            let mut events = client.clone().generate(full.clone()).await.unwrap().into_inner();
            for _ in 0..num_events {
                events.message().await.unwrap();
            }
            drop(events);
            until_taken(&client, &greedy(PROMPT, 4)).await;
        }
        // All blocks came back: the whole pool serves one more full context.
        assert_eq!(stream(&client, full).await.unwrap().tokens.len(), LONG as usize);
        server.stop().await.unwrap();
    });
}

#[test]
fn a_call_dropped_before_its_answer_gives_everything_back() {
    block_on(async {
        let server = start(|flags| {
            flags.max_running = 1;
            flags.max_waiting = 0;
        })
        .await;
        let client = client(&server);
        for _ in 0..20 {
            let call = tokio::spawn({
                let mut client = client.clone();
                async move { client.complete(greedy(PROMPT, LONG)).await }
            });
            tokio::task::yield_now().await;
            call.abort();
            until_taken(&client, &greedy(PROMPT, 2)).await;
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn a_full_server_says_so_at_once() {
    block_on(async {
        let server = start(|flags| {
            flags.max_running = 1;
            flags.max_waiting = 19;
        })
        .await;
        let client = narrow_client(&format!("http://{}", server.address())).await;
        let mut running = Vec::new();
        let status = loop {
            match client.clone().generate(long()).await {
                Ok(call) => running.push(call.into_inner()),
                Err(status) => break status,
            }
            assert!(running.len() < 200, "20 are the limit, however fast they end");
        };
        assert!(running.len() >= 20, "{} calls: {status:?}", running.len());
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(status.message().contains("20"), "{status:?}");
        let first = &mut running[0];
        while first.message().await.unwrap().is_some() {}
        drop(running);
        until_taken(&client, &greedy(PROMPT, 4)).await;
        server.stop().await.unwrap();
    });
}

/// Generates with a deadline that only the server enforces once the stream is open.
async fn with_deadline(client: &Client, timeout: &'static str) -> Result<usize, Status> {
    let mut request = Request::new(greedy(PROMPT, LONG));
    request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
    let mut events = client.clone().generate(request).await?.into_inner();
    let mut num_tokens = 0;
    while let Some(event) = events.message().await? {
        if let Some(Event::Tokens(tokens)) = event.event {
            num_tokens += tokens.tokens.len();
        }
    }
    Ok(num_tokens)
}

/// Opens `num` calls that are all alive at once, waiting for places that are still to come back.
async fn open_at_once(server: &LocalServer, num: usize) -> Vec<Streaming<v1::GenerateEvent>> {
    let client = narrow_client(&format!("http://{}", server.address())).await;
    let begun = Instant::now();
    let mut open = Vec::new();
    while open.len() < num {
        match client.clone().generate(long()).await {
            Ok(call) => open.push(call.into_inner()),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(begun.elapsed() < PATIENCE, "only {} of {num} places", open.len());
                tokio::task::yield_now().await;
            }
        }
    }
    open
}

#[test]
fn deadlines_end_calls_and_nothing_else() {
    block_on(async {
        // Places for all calls, blocks for one full context.
        let server = start(|flags| {
            flags.max_running = 8;
            flags.max_waiting = 32;
            flags.kv_blocks = Some(64);
        })
        .await;
        let client = client(&server);
        let mut calls = JoinSet::new();
        for _ in 0..40 {
            let client = client.clone();
            calls.spawn(async move { with_deadline(&client, "40m").await });
        }
        let mut num_exceeded = 0;
        while let Some(result) = calls.join_next().await {
            match result.unwrap() {
                Ok(num_tokens) => assert_eq!(num_tokens, LONG as usize),
                // The second is what the client says when its own timer was first; that the engine
                // keeps deadlines by itself is proven in `deadlines.rs`.
                Err(status) => {
                    let is_late = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled);
                    assert!(is_late, "{status:?}");
                    num_exceeded += 1;
                }
            }
        }
        assert!(num_exceeded > 0, "40 full contexts in 40 ms are more than the server can do");
        // Every place came back, and every block: the whole pool serves one more full context.
        drop(open_at_once(&server, 40).await);
        until_taken(&client, &greedy(PROMPT, 4)).await;
        assert_eq!(with_deadline(&client, "60S").await.unwrap(), LONG as usize);
        server.stop().await.unwrap();
    });
}

/// What the server counts.
async fn counted(server: &LocalServer) -> Page {
    Page::parse(&get(server.address(), "/metrics").await.body).unwrap()
}

#[test]
fn a_request_that_waits_for_its_reader_ends_at_its_deadline() {
    block_on(async {
        let server = start(|flags| flags.unread_tokens = 1).await;
        let slow = narrow_client(&format!("http://{}", server.address())).await;
        let mut request = Request::new(long());
        request.metadata_mut().insert("grpc-timeout", "2S".parse().unwrap());
        let unread = slow.clone().generate(request).await.unwrap().into_inner();
        let begun = Instant::now();
        while counted(&server).await.number("slipstream_num_requests_paused") != 1.0 {
            assert!(begun.elapsed() < PATIENCE, "it never pauses");
            tokio::task::yield_now().await;
        }
        // Nothing is computed meanwhile: what wakes the engine only looks.
        let paused = counted(&server).await;
        let by_deadline = |page: &Page| {
            page.value("slipstream_requests_finished_total", &[("reason", "deadline")])
        };
        let ended = loop {
            let page = counted(&server).await;
            assert_eq!(
                page.number("slipstream_steps_total"),
                paused.number("slipstream_steps_total")
            );
            if by_deadline(&page) == Some(1.0) {
                break page;
            }
            assert!(begun.elapsed() < PATIENCE, "its deadline never comes");
            tokio::task::yield_now().await;
        };
        assert_eq!(ended.number("slipstream_kv_blocks_used"), 0.0);
        assert!(ended.number("slipstream_request_pauses_total") >= 1.0);
        drop(unread);
        server.stop().await.unwrap();
    });
}

fn watch_request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

#[test]
fn health_follows_the_life_of_the_server() {
    block_on(async {
        let server = LocalServer::start_loading(config(|_| {})).await.unwrap();
        let mut health = HealthClient::new(server.channel());
        let mut watches = Vec::new();
        for service in ["", "slipstream.v1.Completions"] {
            let mut statuses = health.watch(watch_request(service)).await.unwrap().into_inner();
            while let Some(status) = statuses.next().await {
                match status.unwrap().status() {
                    ServingStatus::Serving => break,
                    other => assert_eq!(other, ServingStatus::NotServing),
                }
            }
            let check = health.check(watch_request(service)).await.unwrap().into_inner();
            assert_eq!(check.status(), ServingStatus::Serving);
            watches.push(statuses);
        }
        let unknown = health.check(watch_request("other")).await.expect_err("not a service");
        assert_eq!(unknown.code(), Code::NotFound);
        server.stop().await.unwrap();
        for mut statuses in watches {
            let last = statuses.next().await.unwrap().unwrap();
            assert_eq!(last.status(), ServingStatus::NotServing);
            assert!(statuses.next().await.is_none_or(|end| end.is_err()));
        }
    });
}

#[test]
fn requests_before_the_models_are_loaded_are_unavailable() {
    block_on(async {
        let held = HeldLoading::begin();
        let server = LocalServer::start_loading(config(|_| {})).await.unwrap();
        let client = client(&server);
        let streamed = stream(&client, greedy(PROMPT, 2)).await;
        let unary = complete(&client, greedy(PROMPT, 2)).await;
        for refused in [streamed, unary] {
            let status = refused.expect_err("the models are not loaded");
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        }
        let mut health = HealthClient::new(server.channel());
        let mut statuses = health.watch(watch_request("")).await.unwrap().into_inner();
        let first = statuses.next().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::NotServing);
        drop(held);
        let second = statuses.next().await.unwrap().unwrap();
        assert_eq!(second.status(), ServingStatus::Serving);
        assert_eq!(stream(&client, greedy(PROMPT, 2)).await.unwrap().tokens.len(), 2);
        server.stop().await.unwrap();
    });
}

/// Opens streams and waits for the first token of each.
async fn open_streams(client: &Client, num: u64) -> Vec<Streaming<v1::GenerateEvent>> {
    let mut streams = Vec::new();
    for seed in 0..num {
        let call = client.clone().generate(sampled(PROMPT, 600, seed)).await;
        streams.push(call.unwrap().into_inner());
    }
    for stream in &mut streams {
        stream.message().await.unwrap().expect("Started");
        stream.message().await.unwrap().expect("first tokens");
    }
    streams
}

#[test]
fn a_drain_lets_running_requests_finish() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.grace = Duration::from_secs(600); // the drain ends as soon as the requests do
        let server = LocalServer::start(settings).await.unwrap();
        let address = format!("http://{}", server.address());
        let streams = open_streams(&client(&server), 16).await;
        let mut readers = JoinSet::new();
        for mut events in streams {
            readers.spawn(async move {
                let mut last = None;
                while let Some(event) = events.message().await.unwrap() {
                    last = event.event;
                }
                matches!(last, Some(Event::Finished(_)))
            });
        }
        server.stop().await.unwrap();
        while let Some(is_finished) = readers.join_next().await {
            assert!(is_finished.unwrap(), "a stream ended without Finished");
        }
        assert!(connect(&address).await.is_err(), "the port is still open");
    });
}

#[test]
fn a_connection_without_a_call_does_not_hold_up_the_end() {
    block_on(async {
        let server = start(|_| {}).await; // its grace is 20 s
        let silent = tokio::net::TcpStream::connect(server.address()).await.unwrap();
        let begun = Instant::now();
        server.stop().await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        drop(silent);
    });
}

#[test]
fn what_the_grace_does_not_cover_ends_as_unavailable_and_can_go_on_elsewhere() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.grace = Duration::ZERO;
        let server = LocalServer::start(settings).await.unwrap();
        let request = |seed: u64| sampled(PROMPT, 900, seed);
        // 32 long completions together take far longer than the stop.
        let mut readers = JoinSet::new();
        for seed in 0..32 {
            let call = client(&server).clone().generate(request(seed)).await;
            let mut events = call.unwrap().into_inner();
            readers.spawn(async move { (seed, read_on(&mut events, Vec::new()).await) });
        }
        server.stop().await.unwrap();
        let other = start(|_| {}).await;
        let mut num_cut = 0;
        while let Some(result) = readers.join_next().await {
            let (seed, (mut received, status)) = result.unwrap();
            let Some(status) = status else { continue };
            num_cut += 1;
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            if num_cut > 4 {
                continue;
            }
            let output_prefix = received.clone();
            let resumed = v1::GenerateRequest { output_prefix, ..request(seed) };
            received.extend(stream(&client(&other), resumed).await.unwrap().ids());
            let whole = stream(&client(&other), request(seed)).await.unwrap();
            assert_eq!(received, whole.ids(), "seed {seed}");
        }
        assert!(num_cut > 0, "every completion was faster than the stop");
        other.stop().await.unwrap();
    });
}

async fn start_error(change: impl FnOnce(&mut ModelFlags)) -> StartupError {
    match LocalServer::start(config(change)).await {
        Err(LocalServerError::Run(RunError::Startup(error))) => error,
        other => panic!("expected a startup error, got {other:?}"),
    }
}

#[test]
fn a_server_that_cannot_start_says_why() {
    block_on(async {
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/llama-gqa/");
        let missing = start_error(|f| f.model = Some("no/such/model".to_owned())).await;
        let message = missing.to_string();
        assert!(message.contains("verifier") && message.contains("no/such/model"), "{message}");
        let other = format!("{fixtures}model-f32.gguf");
        let vocabulary = start_error(|f| f.draft_model = Some(other)).await;
        let message = vocabulary.to_string();
        assert!(matches!(vocabulary, StartupError::Vocabulary { .. }), "{message}");
        assert!(message.contains("fingerprints") && message.contains("--draft-model"), "{message}");
        let pool = start_error(|f| f.kv_memory = Some(ByteCount(16))).await;
        assert!(matches!(pool, StartupError::KvPool { .. }), "{pool}");
    });
}
