//! Proves what one peer may take of the server before it is anybody's request: one port speaks both
//! protocols, connections that say nothing, do nothing or are old go, dead and stuck peers give
//! everything back, floods end their own connection only, and accepting survives whatever happens.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_server::local::{LocalServer, connect};
use slipstream_server::{Listeners, NetConfig, Shutdown, run};
use slipstream_tests::client::{
    Client, block_on, client, complete, config, greedy, narrow_client, stream, url,
};
use slipstream_tests::exposition::Page;
use slipstream_tests::plain_http;
use slipstream_tests::proxy::Proxy;
use slipstream_tests::serving::{SERVE, Serving};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const PROGRAM: &str = env!("CARGO_BIN_EXE_slipstream-under-test");
const PROMPT: &str = "use std::collections::HashMap;\n";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty SETTINGS frame.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
/// A PING frame.
const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
/// What the short times below are.
const SHORT: Duration = Duration::from_millis(200);
/// Far longer than anything here takes: only a server that hangs reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server with room for one request, and its bounds of connections changed.
async fn server(change: impl FnOnce(&mut NetConfig)) -> LocalServer {
    let mut config = config(|flags| {
        flags.max_running = 1;
        flags.max_waiting = 0;
    });
    change(&mut config.edge.net);
    LocalServer::start(config).await.unwrap()
}

/// A request with more output than a narrow peer takes unread.
fn long() -> v1::GenerateRequest {
    v1::GenerateRequest { logprobs: true, token_bytes: true, ..greedy(PROMPT, 1000) }
}

/// Begins a request that its peer does not read, and waits until the engine works on it.
async fn begin_unread(client: &Client) -> Streaming<v1::GenerateEvent> {
    let mut events = client.clone().generate(long()).await.unwrap().into_inner();
    events.message().await.unwrap().expect("Started");
    events
}

async fn metrics(server: &LocalServer) -> Page {
    let page = plain_http::request(server.address(), "GET", "/metrics").await.body;
    Page::parse(&page).expect("a page of metrics")
}

/// Completions in progress, as the server counts them: one that is unread is, even when the engine
/// has long been done with it.
async fn num_calls(server: &LocalServer) -> f64 {
    let page = metrics(server).await;
    let method = [("method", "slipstream.v1.Completions/Generate")];
    page.value("slipstream_grpc_calls_in_progress", &method).expect("it is shown")
}

/// Waits until the server has let go of every completion, and the engine of its request: it learns
/// of an ended call between two steps, so a place can be taken a moment longer than a call lasts.
async fn until_let_go(server: &LocalServer) {
    let begun = Instant::now();
    let live = async || metrics(server).await.value("slipstream_requests_live", &[]);
    while num_calls(server).await > 0.0 || live().await != Some(0.0) {
        assert!(begun.elapsed() < PATIENCE, "the call never ended");
    }
}

async fn open(server: &LocalServer, bytes: &[u8]) -> TcpStream {
    let mut peer = TcpStream::connect(server.address()).await.unwrap();
    peer.write_all(bytes).await.unwrap();
    peer
}

/// Reads until the other side closes or cuts the connection.
async fn until_closed(peer: &mut TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    let end = tokio::time::timeout(PATIENCE, peer.read_to_end(&mut received)).await;
    // An error is a reset, which closes it as well.
    let _ = end.expect("the connection was never closed");
    received
}

#[test]
fn one_port_speaks_http1_and_http2() {
    block_on(async {
        let server = server(|_| {}).await;
        let mut peer = open(&server, b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let mut answer = [0; 9];
        peer.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 ");
        assert_eq!(stream(&client(&server), greedy(PROMPT, 3)).await.unwrap().tokens.len(), 3);
        server.stop().await.unwrap();
    });
}

#[test]
fn connections_age_and_their_requests_do_not_notice() {
    block_on(async {
        let server = server(|net| {
            net.age_max = Some(SHORT);
            net.age_grace = PATIENCE;
        })
        .await;
        let proxy = Proxy::start(server.address()).await;
        let client = Client::new(connect(&proxy.url()).await.unwrap());
        let whole = complete(&client, greedy(PROMPT, 40)).await.unwrap();
        let (mut num_done, mut num_refused) = (0, 0);
        let begun = Instant::now();
        while proxy.num_connections() < 4 {
            assert!(begun.elapsed() < PATIENCE, "connections never age");
            // A client that hears GOAWAY has to ask again: the server has not looked at the
            // request. Everything that the server took has to succeed.
            match complete(&client, greedy(PROMPT, 40)).await {
                Ok(answer) => {
                    assert_eq!(answer.bytes(), whole.bytes());
                    num_done += 1;
                }
                Err(status) => {
                    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                    num_refused += 1;
                }
            }
        }
        assert!(num_done > 10 && num_refused < 8, "{num_done} done, {num_refused} refused");
        server.stop().await.unwrap();
    });
}

#[test]
fn a_client_that_does_not_go_is_cut_after_its_grace() {
    block_on(async {
        let server = server(|net| {
            net.age_max = Some(SHORT);
            net.age_grace = SHORT;
        })
        .await;
        let stuck = narrow_client(&url(&server)).await;
        let begun = Instant::now();
        let mut events = begin_unread(&stuck).await;
        until_let_go(&server).await;
        assert!(begun.elapsed() > SHORT, "it was cut before its grace was over");
        let cut = loop {
            match events.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the request ended well"),
                Err(status) => break status,
            }
        };
        assert_ne!(cut.code(), Code::Ok);
        server.stop().await.unwrap();
    });
}

#[test]
fn who_begins_no_request_has_to_go() {
    block_on(async {
        let server = server(|net| net.first_request_timeout = SHORT).await;
        let pings = [PREFACE, SETTINGS, PING, PING, SETTINGS].concat();
        let cases: [(&str, &[u8]); 4] = [
            ("nothing", b""),
            ("half a preface", &PREFACE[..12]),
            ("half a header", b"GET / HTTP/1.1\r\nhost: a\r\nx-"),
            ("no request", &pings),
        ];
        for (name, bytes) in cases {
            let begun = Instant::now();
            let mut peer = open(&server, bytes).await;
            until_closed(&mut peer).await;
            assert!(begun.elapsed() + Duration::from_millis(1) >= SHORT, "{name}: too soon");
        }
        stream(&client(&server), greedy(PROMPT, 2)).await.unwrap();
        server.stop().await.unwrap();
    });
}

#[test]
fn who_is_idle_has_to_go_and_who_waits_may_stay() {
    block_on(async {
        let server = server(|net| net.idle_timeout = SHORT).await;
        let watching = connect(&url(&server)).await.unwrap();
        let mut health = HealthClient::new(watching);
        let request = HealthCheckRequest { service: String::new() };
        let mut statuses = health.watch(request.clone()).await.unwrap().into_inner();
        statuses.message().await.unwrap().unwrap();
        for _ in 0..2 {
            let mut peer = open(&server, b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n").await;
            assert!(until_closed(&mut peer).await.starts_with(b"HTTP/1.1 "));
            let socket = TcpStream::connect(server.address()).await.unwrap();
            let (mut requests, connection) = h2::client::handshake(socket).await.unwrap();
            let end = tokio::spawn(connection);
            let get = http::Request::get("http://a/nothing").body(()).unwrap();
            let (answer, _) = requests.send_request(get, true).unwrap();
            answer.await.unwrap();
            let end = tokio::time::timeout(PATIENCE, end).await.expect("it was never closed");
            assert!(end.unwrap().is_ok(), "it was not told to go first");
        }
        drop(health);
        server.drain();
        assert!(statuses.message().await.unwrap().is_some(), "the watch had ended before");
        server.stop().await.unwrap();
    });
}

#[test]
fn more_connections_than_allowed_are_closed_as_they_come() {
    block_on(async {
        // The server's own connection is one of them.
        let server = server(|net| net.connections_max = 3).await;
        stream(&client(&server), greedy(PROMPT, 2)).await.unwrap();
        let get = b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n";
        let mut answer = [0; 1];
        let mut first = open(&server, get).await;
        first.read_exact(&mut answer).await.unwrap();
        let mut second = open(&server, get).await;
        second.read_exact(&mut answer).await.unwrap();
        let mut third = TcpStream::connect(server.address()).await.unwrap();
        assert!(until_closed(&mut third).await.is_empty());
        drop(first);
        let begun = Instant::now();
        loop {
            let mut next = TcpStream::connect(server.address()).await.unwrap();
            // It may be closed before it is written to, as long as the first is not seen gone.
            let _ = next.write_all(get).await;
            if next.read_exact(&mut answer).await.is_ok() {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "the place of a connection never came back");
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn a_peer_that_fell_silent_gives_its_place_back() {
    block_on(async {
        let server = server(|net| {
            net.keepalive_interval = SHORT;
            net.keepalive_timeout = SHORT;
        })
        .await;
        let proxy = Proxy::start(server.address()).await;
        let lost = narrow_client(&proxy.url()).await;
        let _events = begin_unread(&lost).await;
        assert_eq!(num_calls(&server).await, 1.0);
        proxy.fall_silent();
        until_let_go(&server).await;
        server.stop().await.unwrap();
    });
}

#[test]
fn a_stream_whose_peer_takes_nothing_is_reset_alone() {
    block_on(async {
        let server = server(|net| net.stream_stall_timeout = SHORT).await;
        let narrow = narrow_client(&url(&server)).await;
        let mut events = begin_unread(&narrow).await;
        // The same connection serves others meanwhile and afterwards.
        until_let_go(&server).await;
        stream(&narrow, greedy(PROMPT, 2)).await.unwrap();
        let reset = loop {
            match events.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the request ended well"),
                Err(status) => break status,
            }
        };
        assert_eq!(reset.code(), Code::Cancelled, "{reset:?}");
        server.stop().await.unwrap();
    });
}

/// A frame of this type with these flags and this payload, on the connection itself.
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let len = u8::try_from(payload.len()).unwrap();
    [&[0, 0, len, kind, flags, 0, 0, 0, 0], payload].concat()
}

#[test]
fn a_flood_of_control_frames_ends_its_own_connection() {
    block_on(async {
        let server = server(|_| {}).await;
        let hello = [PREFACE, SETTINGS].concat();
        let mut tame = open(&server, &[&hello[..], &PING.repeat(1000)].concat()).await;
        let floods = [
            ("PING", PING.to_vec()),
            ("answers to PING", frame(6, 1, &[0; 8])),
            ("SETTINGS", SETTINGS.to_vec()),
            ("WINDOW_UPDATE", frame(8, 0, &[0, 0, 0, 1])),
            ("unknown", frame(99, 0, &[])),
        ];
        for (name, bytes) in floods {
            let mut peer = open(&server, &hello).await;
            let (mut from, mut to) = peer.split();
            let many = bytes.repeat(1000);
            let sending = async { while to.write_all(&many).await.is_ok() {} };
            let mut answers = Vec::new();
            let receiving = from.read_to_end(&mut answers);
            let both = async { tokio::join!(sending, receiving) };
            let ended = tokio::time::timeout(PATIENCE, both).await;
            assert!(ended.is_ok(), "the flood of {name} goes on for ever");
        }
        let mut answers = vec![0; 1000 * PING.len()];
        tame.read_exact(&mut answers).await.unwrap();
        stream(&client(&server), greedy(PROMPT, 2)).await.unwrap();
        server.stop().await.unwrap();
    });
}

#[test]
fn a_second_port_is_for_http_only() {
    block_on(async {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let (main, http) = (bind().await.unwrap(), bind().await.unwrap());
        let (main_address, http_address) = (main.local_addr().unwrap(), http.local_addr().unwrap());
        let (stopper, shutdown) = Shutdown::new();
        let listeners = Listeners { main, http: Some(http) };
        let ended = tokio::spawn(run(config(|_| {}), listeners, shutdown));
        let health = async |address| {
            let channel = connect(&format!("http://{address}")).await.unwrap();
            let request = HealthCheckRequest { service: String::new() };
            HealthClient::new(channel).check(request).await
        };
        health(main_address).await.unwrap();
        let elsewhere = health(http_address).await.unwrap_err();
        assert_eq!(elsewhere.code(), Code::Unimplemented, "{elsewhere:?}");
        let mut peer = TcpStream::connect(http_address).await.unwrap();
        let get = b"GET /nothing HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        peer.write_all(get).await.unwrap();
        assert!(until_closed(&mut peer).await.starts_with(b"HTTP/1.1 404 "));
        stopper.drain();
        ended.await.unwrap().unwrap();
        for address in [main_address, http_address] {
            assert!(TcpStream::connect(address).await.is_err(), "{address} is still open");
        }
    });
}

/// Opens connections that are answered, up to `most`; stops at the first that is not.
async fn open_answered(address: &str, most: usize) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for _ in 0..most {
        let mut peer = TcpStream::connect(address).await.unwrap();
        let sent = peer.write_all(b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let answered = tokio::time::timeout(Duration::from_secs(1), peer.read_u8()).await;
        open.push(peer);
        if sent.is_err() || !matches!(answered, Ok(Ok(_))) {
            break;
        }
    }
    open
}

#[test]
fn accepting_survives_that_there_are_no_more_files() {
    // The server leaves room for 32 files besides connections. So many more that it does not know
    // of are open, and there is no room for all connections that it counts on.
    let unknown: Vec<File> = (0..32).map(|_| inherited().unwrap()).collect();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 80; exec \"$@\"", "sh", PROGRAM]).args(SERVE);
    command.args(["--threads", "1"]).stdout(Stdio::null());
    let serving = Serving::start(command);
    drop(unknown);
    block_on(async {
        let open = open_answered(serving.address(), 80).await;
        assert!(open.len() < 48, "{} connections fit", open.len());
        serving.until_logged("cannot accept a connection");
        drop(open);
        // Those that had to wait are accepted, and then a new one.
        let served = async {
            loop {
                let channel = connect(&serving.url()).await.unwrap();
                if let Ok(answer) = stream(&Client::new(channel), greedy(PROMPT, 2)).await {
                    return answer.tokens.len();
                }
            }
        };
        let served = tokio::time::timeout(PATIENCE, served).await;
        assert_eq!(served.expect("the server never accepts again"), 2);
    });
}

/// An open file that a program started now inherits.
fn inherited() -> io::Result<File> {
    let file = File::open("/dev/null")?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    Ok(file)
}
