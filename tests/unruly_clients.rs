//! Proves that clients who do not behave cost the server nothing in the end: half of them die at a
//! random moment, others do not read, fall silent without closing, or give up after 20 ms. Every
//! request, KV block and call is released while the silent ones are still connected, clients who
//! behave get their bytes undisturbed, and the log stays short. They are of several tenants and
//! classes, and one in four asks for several samples.
//!
//! `SLIPSTREAM_UNRULY_CLIENTS=10000` runs the long form, `SLIPSTREAM_UNRULY_SEED` another storm.

use std::collections::BTreeMap;
use std::env;
use std::sync::Arc;
use std::time::Duration;

use slipstream_proto::v1;
use slipstream_tests::client::{Answer, Client, block_on, greedy, sampled, stream};
use slipstream_tests::flaky_proxy::{Fate, FlakyProxy};
use slipstream_tests::process::ServerProcess;
use slipstream_tests::random::Rng;
use slipstream_tests::timing::report;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::Endpoint;
use tonic::{Code, Request, Streaming};

const PROGRAM: &str = env!("CARGO_BIN_EXE_slipstream-under-test");
const PROMPT: &str = "use std::collections::HashMap;\n";
/// Output that nearly fills the micro verifier's context of 1024 behind a prompt.
const LONG: i32 = 980;
/// Places for everybody, so that every client's request is really taken.
const PLACES: [&str; 4] = ["--max-running", "64", "--max-waiting", "20000"];
/// Short enough to see them work; long enough for clients who behave on a busy machine.
const LIMITS: [&str; 8] = [
    "--stall-limit",
    "1s",
    "--stream-stall-timeout",
    "3s",
    "--keepalive-interval",
    "500ms",
    "--keepalive-timeout",
    "2s",
];
/// Clients of the short form.
const NUM_CLIENTS: usize = 200;
/// Clients who behave, in between.
const NUM_WELL_BEHAVED: usize = 20;
/// Clients who are at work at the same time, silent and slow ones not counted.
const NUM_AT_ONCE: usize = 64;
/// Slow readers at the same time: this machine has to read for all of them in time.
const NUM_SLOW: usize = 32;
/// Connections that clients share who reset a stream but not a connection.
const NUM_SHARED: u64 = 8;
/// How often a slow reader takes an event. The server hears of it when half of the window is free,
/// some five events later, which must be well within the stall limit.
const SLOW_INTERVAL: Duration = Duration::from_millis(20);
/// Bytes that a slow reader leaves the server to send ahead.
const NARROW_WINDOW_BYTES: u32 = 512;
/// Lines that the server may log, however many clients there are.
const LOG_LINES_MAX: usize = 200;
/// Far longer than anything here takes: only a server that hangs or leaks reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Manner {
    /// Drops its call before there is an answer.
    DiesWaiting,
    /// Drops its stream after some events; the connection stays.
    DiesReading,
    /// Its connection is reset in the middle of a message.
    DiesSpeaking,
    /// Takes an event now and then.
    ReadsSlowly,
    /// Takes nothing, and stays.
    NeverReads,
    /// Its packets are lost from some moment on.
    FallsSilent,
    /// Gives up after 20 ms.
    Hurries,
    /// Asks, reads, and compares.
    Behaves,
}

/// Out of 30: 15 kills, 3 slow readers, 3 half-open peers, 9 deadlines.
const SHARES: [(Manner, usize); 7] = [
    (Manner::DiesWaiting, 5),
    (Manner::DiesReading, 5),
    (Manner::DiesSpeaking, 5),
    (Manner::ReadsSlowly, 1),
    (Manner::NeverReads, 2),
    (Manner::FallsSilent, 3),
    (Manner::Hurries, 9),
];

fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Who comes, in a random order.
fn crowd(rng: &mut Rng, num: usize) -> Vec<Manner> {
    let all = SHARES.iter().flat_map(|&(manner, share)| std::iter::repeat_n(manner, share));
    let mut crowd: Vec<_> = all.cycle().take(num).collect();
    crowd.extend([Manner::Behaves; NUM_WELL_BEHAVED]);
    for last in (1..crowd.len()).rev() {
        crowd.swap(last, rng.below(last + 1));
    }
    crowd
}

/// A request for as much output as there can be, in the most bytes. Whose it is, what it shares and
/// how many samples it wants is chance.
fn long(rng: &mut Rng) -> v1::GenerateRequest {
    let classes = [v1::Priority::Interactive, v1::Priority::Normal, v1::Priority::Batch];
    let prompt = format!("{PROMPT}// {}\n", rng.below(5));
    v1::GenerateRequest {
        logprobs: true,
        token_bytes: true,
        n: rng.one_in(4).then(|| 2 + rng.below(3) as i32),
        tenant: ["", "a", "b"][rng.below(3)].to_owned(),
        priority: (*rng.pick(&classes)).into(),
        no_prefix_reuse: rng.one_in(4),
        ..greedy(&prompt, LONG)
    }
}

fn well_behaved(index: usize) -> v1::GenerateRequest {
    sampled(PROMPT, 48, index as u64)
}

/// What the clients meet.
struct Stage {
    server: std::net::SocketAddr,
    resetting: FlakyProxy,
    silencing: FlakyProxy,
    shared: Vec<Client>,
    /// Places of those at work.
    turns: Semaphore,
    /// Places of those who read slowly.
    slow_turns: Semaphore,
    /// Becomes true when those who read slowly may go.
    is_over: watch::Sender<bool>,
}

/// What stays behind of a client: as long as it lives, the server thinks the client does.
enum Remains {
    Nothing,
    Unread(Box<Streaming<v1::GenerateEvent>>),
}

async fn connect(address: std::net::SocketAddr, window_bytes: Option<u32>) -> Client {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap().tcp_nodelay(true);
    Client::new(endpoint.initial_stream_window_size(window_bytes).connect().await.unwrap())
}

/// Reads so many events, or to the end.
async fn read(events: &mut Streaming<v1::GenerateEvent>, num: usize) -> Result<(), tonic::Status> {
    for _ in 0..num {
        if events.message().await?.is_none() {
            break;
        }
    }
    Ok(())
}

impl Stage {
    async fn set(server: std::net::SocketAddr, rng: &Rng) -> Arc<Self> {
        // Behind the handshake's bytes, into the events: a long answer has far more.
        let bytes = |purpose| {
            let mut rng = rng.fork(purpose);
            move || rng.below(8_000)
        };
        let mut shared = Vec::new();
        for _ in 0..NUM_SHARED {
            shared.push(connect(server, None).await);
        }
        Arc::new(Self {
            server,
            resetting: FlakyProxy::start(server, Fate::Reset, bytes(1)).await,
            silencing: FlakyProxy::start(server, Fate::Silence, bytes(2)).await,
            shared,
            turns: Semaphore::new(NUM_AT_ONCE),
            slow_turns: Semaphore::new(NUM_SLOW),
            is_over: watch::Sender::new(false),
        })
    }

    /// Lives one client's life.
    async fn play(&self, manner: Manner, mut rng: Rng) -> Remains {
        let _turn = self.turns.acquire().await.unwrap();
        match manner {
            Manner::DiesWaiting => self.die_waiting(&mut rng).await,
            Manner::DiesReading => {
                let mut client = self.shared[rng.below(self.shared.len())].clone();
                let mut events = client.generate(long(&mut rng)).await.unwrap().into_inner();
                read(&mut events, rng.below(12)).await.unwrap();
            }
            Manner::DiesSpeaking => {
                let mut client = connect(self.resetting.address(), None).await;
                let outcome = match client.generate(long(&mut rng)).await {
                    Ok(events) => read(&mut events.into_inner(), usize::MAX).await,
                    Err(status) => Err(status),
                };
                outcome.expect_err("the connection was reset");
            }
            Manner::NeverReads => {
                let mut client = connect(self.server, Some(NARROW_WINDOW_BYTES)).await;
                let events = client.generate(long(&mut rng)).await.unwrap().into_inner();
                return Remains::Unread(Box::new(events));
            }
            Manner::FallsSilent => {
                let mut client = connect(self.silencing.address(), None).await;
                // It stays, and so does its connection, until the end of the test.
                tokio::spawn(async move {
                    if let Ok(events) = client.generate(long(&mut rng)).await {
                        // Never ends while the proxy holds the connection.
                        let _ = read(&mut events.into_inner(), usize::MAX).await;
                    }
                });
            }
            Manner::Hurries => self.hurry(&mut rng).await,
            Manner::ReadsSlowly | Manner::Behaves => unreachable!("they have scenes of their own"),
        }
        Remains::Nothing
    }

    async fn die_waiting(&self, rng: &mut Rng) {
        let mut client = connect(self.server, None).await;
        let (is_unary, request) = (rng.one_in(2), long(rng));
        let call = tokio::spawn(async move {
            if is_unary {
                drop(client.complete(request).await);
            } else {
                drop(client.generate(request).await);
            }
        });
        for _ in 0..rng.below(20) {
            tokio::task::yield_now().await;
        }
        call.abort();
    }

    /// Only the server keeps this deadline: the client's own timer is not set.
    async fn hurry(&self, rng: &mut Rng) {
        let mut request = Request::new(long(rng));
        request.metadata_mut().insert("grpc-timeout", "20m".parse().unwrap());
        let mut client = connect(self.server, None).await;
        let outcome = match client.generate(request).await {
            Ok(events) => read(&mut events.into_inner(), usize::MAX).await,
            Err(status) => Err(status),
        };
        if let Err(status) = outcome {
            let is_late = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled);
            assert!(is_late, "{status:?}");
        }
    }

    /// Takes one event at a time until its end or that of all: slow, but never still for the stall
    /// limit.
    async fn read_slowly(&self, mut rng: Rng) {
        let _turn = self.slow_turns.acquire().await.unwrap();
        let mut is_over = self.is_over.subscribe();
        let mut client = connect(self.server, Some(NARROW_WINDOW_BYTES)).await;
        let mut events = client.generate(long(&mut rng)).await.unwrap().into_inner();
        let mut ticks = interval(SLOW_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !*is_over.borrow_and_update() {
            ticks.tick().await;
            if events.message().await.unwrap().is_none() {
                return;
            }
        }
    }

    /// One who behaves gets the bytes that were there before the storm.
    async fn behave(&self, index: usize, expected: &Answer) {
        let _turn = self.turns.acquire().await.unwrap();
        let answer = stream(&connect(self.server, None).await, well_behaved(index)).await;
        assert_eq!(answer.unwrap().bytes(), expected.bytes(), "client {index}");
    }
}

/// Sums of all samples on `/metrics` by name, whatever their labels.
async fn metrics(server: std::net::SocketAddr) -> BTreeMap<String, f64> {
    let mut socket = TcpStream::connect(server).await.unwrap();
    let question = format!("GET /metrics HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\r\n");
    socket.write_all(question.as_bytes()).await.unwrap();
    let mut page = String::new();
    socket.read_to_string(&mut page).await.unwrap();
    let mut sums = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or(series);
        if let Ok(value) = value.parse::<f64>() {
            *sums.entry(name.to_owned()).or_insert(0.0) += value;
        }
    }
    assert!(sums.len() > 10, "no metrics:\n{page}");
    sums
}

/// Waits until nothing is left of anybody's request, and returns how many there were.
async fn until_balanced(server: std::net::SocketAddr) -> f64 {
    let mut last = BTreeMap::new();
    let balanced = timeout(PATIENCE, async {
        let mut ticks = interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            last = metrics(server).await;
            let get = |name: &str| *last.get(name).unwrap_or_else(|| panic!("no {name}: {last:?}"));
            let submitted = get("slipstream_requests_submitted_total");
            let is_balanced = submitted == get("slipstream_requests_finished_total")
                && submitted == get("slipstream_requests_released_total")
                && get("slipstream_kv_blocks_used") == 0.0
                && get("slipstream_draft_kv_blocks_used") == 0.0
                && get("slipstream_kv_blocks_free") + get("slipstream_kv_blocks_cached")
                    == get("slipstream_kv_blocks")
                && get("slipstream_requests_live") == 0.0
                && get("slipstream_grpc_calls_in_progress") == 0.0;
            if is_balanced {
                return submitted;
            }
        }
    });
    match balanced.await {
        Ok(submitted) => submitted,
        Err(_) => panic!("something was never released: {last:#?}"),
    }
}

#[test]
fn unruly_clients_leave_nothing_behind() {
    let seed = number("SLIPSTREAM_UNRULY_SEED").unwrap_or(1);
    let num = number("SLIPSTREAM_UNRULY_CLIENTS").map_or(NUM_CLIENTS, |num| num as usize);
    report(&format!("  unruly clients: {num}, SLIPSTREAM_UNRULY_SEED={seed}"));
    let server = ServerProcess::start(PROGRAM, &[&PLACES[..], &LIMITS[..]].concat());
    let num_taken = block_on(storm(server.address(), seed, num));
    // Those killed while they waited for the answer may not have got as far as a request.
    assert!(num_taken > num as f64 / 2.0, "only {num_taken} of {num} clients were served at all");
    let log = server.log();
    assert!(log.len() <= LOG_LINES_MAX, "{} lines:\n{}", log.len(), log.join("\n"));
    report(&format!("  unruly clients: {num_taken} requests, {} lines of log", log.len()));
}

/// Lets the crowd come, and looks at what is left. Returns how many requests there were.
async fn storm(server: std::net::SocketAddr, seed: u64, num: usize) -> f64 {
    let mut rng = Rng::new(seed);
    let stage = Stage::set(server, &rng).await;
    let mut expected = Vec::new();
    for index in 0..NUM_WELL_BEHAVED {
        expected.push(stream(&stage.shared[0], well_behaved(index)).await.unwrap());
    }
    let expected = Arc::new(expected);
    let crowd = crowd(&mut rng, num);
    let num_silent = crowd.iter().filter(|manner| **manner == Manner::FallsSilent).count();
    let (mut scenes, mut slow) = (JoinSet::new(), JoinSet::new());
    let mut num_behaving = 0;
    for (index, manner) in crowd.into_iter().enumerate() {
        let (stage, rng) = (Arc::clone(&stage), rng.fork(index as u64));
        match manner {
            Manner::ReadsSlowly => drop(slow.spawn(async move { stage.read_slowly(rng).await })),
            Manner::Behaves => {
                let (number, expected) = (num_behaving, Arc::clone(&expected));
                num_behaving += 1;
                scenes.spawn(async move {
                    stage.behave(number, &expected[number]).await;
                    Remains::Nothing
                });
            }
            manner => drop(scenes.spawn(async move { stage.play(manner, rng).await })),
        }
    }
    let mut remains = Vec::new();
    while let Some(remain) = timeout(PATIENCE, scenes.join_next()).await.unwrap() {
        remains.push(remain.unwrap());
    }
    stage.silencing.until_struck(num_silent, PATIENCE).await;
    stage.is_over.send_replace(true);
    while let Some(end) = timeout(PATIENCE, slow.join_next()).await.unwrap() {
        end.unwrap();
    }
    // Silent peers still hold their connections and unread streams are still unread: the server
    // let go of them. The stall limit freed their requests, then the connection layer reset the
    // streams.
    let num_taken = until_balanced(server).await;
    for remain in remains {
        if let Remains::Unread(mut events) = remain {
            read(&mut events, usize::MAX).await.expect_err("the stream was cut");
        }
    }
    let again = stream(&connect(server, None).await, well_behaved(0)).await.unwrap();
    assert_eq!(again.bytes(), expected[0].bytes());
    num_taken
}
