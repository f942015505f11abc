//! Proves that a peer that asks too much gets it at nobody else's cost: beside every flood the
//! completions of other connections are the same bytes as ever, the server's memory stays within
//! [`GROWTH_BYTES_MAX`], its log within [`LOG_LINES_MAX`], and it serves on.
//!
//! How much slower the others become is measured and printed, never asserted: attacker, server and
//! clients share the cores of one machine here. `SLIPSTREAM_FLOOD_SECONDS` makes each attack longer
//! and the figures better.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use slipstream_proto::v1::GenerateRequest;
use slipstream_proto::v1::generate_event::Event;
use slipstream_server::local::connect;
use slipstream_tests::attacks::{self, Attack};
use slipstream_tests::child_server::ChildServer;
use slipstream_tests::client::{Answer, Client, block_on, complete, greedy, sampled};
use slipstream_tests::timing::{report, timed};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// What all attacks together may add to the server's memory. One connection's buffers and windows
/// are about 2 MiB, 500 idle connections about 20 MiB; the rest is the allocator's.
const GROWTH_BYTES_MAX: u64 = 64 << 20;
/// Lines that all attacks together may add to the server's log.
const LOG_LINES_MAX: usize = 200;
/// How long a victim's single call may take before the server counts as gone.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long each attack lasts unless configured.
const ATTACK: Duration = Duration::from_millis(200);
/// How often the server's memory is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Beginning of the names of the server's network threads.
const NETWORK_THREADS: &str = "tokio-rt-worker";

/// Times of one run in microseconds, sorted.
#[derive(Default)]
struct Times(Vec<u64>);

impl Times {
    /// The smallest time that this share of all does not exceed, in milliseconds.
    fn percentile_ms(&mut self, share: f64) -> f64 {
        self.0.sort_unstable();
        let index = (self.0.len() as f64 * share) as usize;
        let time = self.0.get(index.min(self.0.len().saturating_sub(1)));
        time.map_or(f64::NAN, |time| *time as f64 / 1000.0)
    }
}

/// What the clients saw beside one attack.
#[derive(Default)]
struct Seen {
    /// Between two messages of a stream.
    gaps: Times,
    /// Whole calls of one token.
    calls: Times,
    tokens: usize,
    resident_bytes_max: u64,
}

/// The requests of the streams, and what they are answered undisturbed.
struct Victims {
    client: Client,
    expected: Vec<(GenerateRequest, Answer)>,
    single: (GenerateRequest, Answer),
}

impl Victims {
    async fn new(address: SocketAddr) -> Self {
        let client = Client::new(connect(&format!("http://{address}")).await.unwrap());
        let requests = [
            greedy("fn main() {\n", 160),
            sampled("use std::", 160, 3),
            sampled("/// The", 160, 4),
        ];
        let mut expected = Vec::new();
        for request in requests {
            let answer = complete(&client, request.clone()).await.unwrap();
            expected.push((request, answer));
        }
        let request = greedy("let x", 1);
        let answer = complete(&client, request.clone()).await.unwrap();
        Self { client, expected, single: (request, answer) }
    }

    /// Streams and calls for this long, while something else may go on.
    async fn run(&self, server: &ChildServer, length: Duration) -> Seen {
        let end = Instant::now() + length;
        let mut streams = JoinSet::new();
        for (request, expected) in self.expected.clone() {
            streams.spawn(stream_until(self.client.clone(), request, expected, end));
        }
        let (request, expected) = self.single.clone();
        let calls = tokio::spawn(call_until(self.client.clone(), request, expected, end));
        let mut seen = Seen::default();
        let mut ticks = tokio::time::interval(LOOK);
        while Instant::now() < end {
            ticks.tick().await;
            let resident = server.resident_bytes().unwrap_or(0);
            seen.resident_bytes_max = seen.resident_bytes_max.max(resident);
        }
        for (gaps, tokens) in streams.join_all().await {
            seen.gaps.0.extend(gaps);
            seen.tokens += tokens;
        }
        seen.calls.0 = calls.await.unwrap();
        seen
    }
}

/// Streams one request again and again and compares it each time; gaps and number of tokens.
async fn stream_until(
    mut client: Client,
    request: GenerateRequest,
    expected: Answer,
    end: Instant,
) -> (Vec<u64>, usize) {
    let mut gaps = Vec::new();
    let mut num_tokens = 0;
    while Instant::now() < end {
        let call = timeout(PATIENCE, client.generate(request.clone())).await;
        let mut events = call.expect("an answer in time").unwrap().into_inner();
        let mut answer = Answer::default();
        let mut last = None;
        while let Some(event) = timeout(PATIENCE, events.message()).await.unwrap().unwrap() {
            let now = Instant::now();
            match event.event.unwrap() {
                Event::Started(started) => answer.started = started,
                Event::Tokens(tokens) => {
                    let before = last.replace(now);
                    gaps.extend(before.map(|before| (now - before).as_micros() as u64));
                    answer.text.push_str(&tokens.text);
                    answer.tokens.extend(tokens.tokens);
                }
                Event::Finished(finished) => answer.finished = finished,
            }
        }
        assert_eq!(answer.bytes(), expected.bytes(), "another output beside an attack");
        num_tokens += answer.tokens.len();
    }
    (gaps, num_tokens)
}

async fn call_until(
    client: Client,
    request: GenerateRequest,
    expected: Answer,
    end: Instant,
) -> Vec<u64> {
    let mut times = Vec::new();
    while Instant::now() < end {
        let start = Instant::now();
        let answer = timeout(PATIENCE, complete(&client, request.clone())).await;
        let answer = answer.expect("an answer in time").unwrap();
        times.push(start.elapsed().as_micros() as u64);
        assert_eq!(answer.bytes(), expected.bytes(), "another output beside an attack");
    }
    times
}

/// One line of the table.
struct Line {
    name: &'static str,
    attacker: String,
    seen: Seen,
    network_share: f64,
}

/// Runs the victims for `length`, beside an attack if there is one.
async fn beside(
    attack: Option<(Attack, SocketAddr)>,
    victims: &Victims,
    server: &ChildServer,
    length: Duration,
) -> Line {
    let start = Instant::now();
    let ticks = || server.cpu_ticks(NETWORK_THREADS).unwrap_or(0);
    let ticks_before = ticks();
    let running = attack.map(|(attack, address)| attack.start(address));
    let seen = victims.run(server, length).await;
    let seconds = start.elapsed().as_secs_f64();
    let network_share = (ticks() - ticks_before) as f64 / seconds;
    let attacker = running.map_or(String::new(), |running| {
        let tally = running.stop();
        let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        let code = tally.code().map_or("-".to_owned(), |code| code.to_string());
        let sent = count(&tally.sent);
        format!(
            "{:>9.0} {:>5} {:>4} {:>5}",
            sent as f64 / seconds,
            count(&tally.cut),
            code,
            count(&tally.stalled)
        )
    });
    let name = attack.map_or("(nothing)", |(attack, _)| attack.name);
    Line { name, attacker, seen, network_share }
}

/// The table's figures: each p99 also over that of the quiet run and over that of the run beside
/// an attacker that only takes a core, the first two lines.
fn print(lines: &mut [Line], resident_before: u64) {
    report(&format!(
        "  {:<21} {:>9} {:>5} {:>4} {:>5} | {:>5} {:>7} {:>6} {:>6} | {:>6} {:>7} {:>6} {:>6} | \
         {:>6} {:>4} {:>4}",
        "beside",
        "sent/s",
        "cut",
        "code",
        "stall",
        "gap50",
        "gap99",
        "quiet",
        "core",
        "call50",
        "call99",
        "quiet",
        "core",
        "tokens",
        "net%",
        "MiB"
    ));
    let p99 =
        |line: &mut Line| [line.seen.gaps.percentile_ms(0.99), line.seen.calls.percentile_ms(0.99)];
    let quiet = p99(&mut lines[0]);
    let core = p99(&mut lines[1]);
    for line in lines {
        let [gap, call] = p99(line);
        report(&format!(
            "  {:<21} {:>26} | {:>5.2} {gap:>7.2} {:>6.2} {:>6.2} | {:>6.2} {call:>7.2} {:>6.2} \
             {:>6.2} | {:>6} {:>4.0} {:>4}",
            line.name,
            line.attacker,
            line.seen.gaps.percentile_ms(0.5),
            gap / quiet[0],
            gap / core[0],
            line.seen.calls.percentile_ms(0.5),
            call / quiet[1],
            call / core[1],
            line.seen.tokens,
            line.network_share,
            line.seen.resident_bytes_max.saturating_sub(resident_before) >> 20,
        ));
    }
}

/// How long each attack lasts, and whether somebody wants figures.
fn length() -> (Duration, bool) {
    let configured = std::env::var_os("SLIPSTREAM_FLOOD_SECONDS");
    let seconds = configured.and_then(|text| text.to_str()?.parse().ok());
    match seconds.map(Duration::try_from_secs_f64) {
        Some(Ok(length)) => (length, true),
        _ => (ATTACK, false),
    }
}

/// Whether an attack is among those asked for: all, unless configured.
fn is_wanted(attack: &Attack) -> bool {
    let only = std::env::var_os("SLIPSTREAM_FLOOD_ONLY");
    only.is_none_or(|only| only.to_string_lossy().split(',').any(|name| name == attack.name))
}

#[test]
fn floods_cost_nobody_else_output_memory_or_the_server() {
    let (length, is_long) = length();
    timed("floods", 12.0, || {
        let program = env!("CARGO_BIN_EXE_slipstream-under-test");
        let mut server = ChildServer::start(program, &[]);
        block_on(async {
            let victims = Victims::new(server.address()).await;
            // The first run warms the server up.
            beside(None, &victims, &server, length).await;
            let before = server.resident_bytes().unwrap_or(0);
            let mut lines = vec![beside(None, &victims, &server, length).await];
            let busy = (attacks::spin(), server.address());
            lines.push(beside(Some(busy), &victims, &server, length).await);
            if is_long {
                let into_sink =
                    (attacks::named("PING").called("(PING into a sink)"), attacks::sink());
                lines.push(beside(Some(into_sink), &victims, &server, length).await);
            }
            for attack in attacks::all().into_iter().filter(is_wanted) {
                let attack = Some((attack, server.address()));
                lines.push(beside(attack, &victims, &server, length).await);
                assert!(server.is_alive(), "{attack:?} ended the server");
            }
            lines.push(beside(None, &victims, &server, length).await);
            print(&mut lines, before);
            for line in &lines {
                let most = line.seen.resident_bytes_max;
                let growth = most.saturating_sub(before);
                assert!(growth <= GROWTH_BYTES_MAX, "{}: {growth} bytes more", line.name);
            }
        });
        let log = server.logged();
        assert!(
            log.len() <= LOG_LINES_MAX,
            "{} lines logged, the last: {:?}",
            log.len(),
            log.last()
        );
        assert_eq!(server.stop(), Some(0));
    });
}
