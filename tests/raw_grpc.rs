//! Proves that whatever comes inside well-formed HTTP/2 as a gRPC call, its caller gets a status
//! and the server goes on: broken prefixes, half messages, bytes that are no protobuf, wrong
//! methods, types and deadlines.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use slipstream_proto::v1::GenerateRequest;
use slipstream_tests::client::{block_on, client, complete, greedy, start};
use slipstream_tests::random::Rng;
use slipstream_tests::raw_http2::{COMPLETE, PATIENCE, message};
use slipstream_tests::timing::timed;
use tokio::net::TcpStream;
use tonic::Code;

/// Name of the header and trailer that a gRPC call ends with.
const GRPC_STATUS: &str = "grpc-status";

/// A call, and the ends that are right for it.
struct Case {
    name: String,
    method: Method,
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    allowed: Vec<End>,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With this status.
    Grpc(Code),
    /// With this HTTP status and no gRPC status: not a gRPC call for the server.
    Http(u16),
    /// Its stream was reset.
    Reset(h2::Reason),
}

/// A good call of a completion of 2 tokens.
fn good(name: impl Into<String>) -> Case {
    use prost::Message as _;
    let headers = [("te", "trailers"), ("content-type", "application/grpc")];
    Case {
        name: name.into(),
        method: Method::POST,
        path: COMPLETE,
        headers: headers.map(|(name, value)| (name, value.to_owned())).to_vec(),
        body: message(&greedy("fn main", 2).encode_to_vec()),
        allowed: vec![End::Grpc(Code::Ok)],
    }
}

/// The good call with another body.
fn body(name: &str, body: Vec<u8>, codes: &[Code]) -> Case {
    let allowed = codes.iter().map(|code| End::Grpc(*code)).collect();
    Case { body, allowed, ..good(name) }
}

fn bodies() -> Vec<Case> {
    let whole = good("").body;
    let flagged = |flag| [&[flag], &whole[1..]].concat();
    let longer = |by: u32| {
        let len = (whole.len() - 5) as u32 + by;
        [&[0], &len.to_be_bytes()[..], &whole[5..]].concat()
    };
    let broken = [Code::Internal, Code::InvalidArgument, Code::Unknown, Code::Cancelled];
    let missing = [Code::Internal, Code::InvalidArgument, Code::Unimplemented];
    vec![
        body("good", whole.clone(), &[Code::Ok]),
        body("no message", Vec::new(), &missing),
        body("compression flag 2", flagged(2), &broken),
        body("compression flag 255", flagged(255), &broken),
        body("compressed, but not said how", flagged(1), &broken),
        body("half a prefix", whole[..3].to_vec(), &[&broken[..], &missing].concat()),
        body("a prefix and nothing", whole[..5].to_vec(), &[&broken[..], &missing].concat()),
        body("a length past the end", longer(1), &broken),
        body("a length far past the end", longer(1 << 20), &broken),
        body(
            "a length over the limit",
            longer(64 << 20),
            &[Code::ResourceExhausted, Code::OutOfRange],
        ),
        body(
            "the largest length",
            longer(u32::MAX - 1000),
            &[Code::ResourceExhausted, Code::OutOfRange],
        ),
        body("half a message", message(&whole[5..whole.len() - 3]), &broken),
        // The second one is not looked at, or refused.
        body(
            "two messages",
            [&whole[..], &whole].concat(),
            &[Code::Ok, Code::Internal, Code::InvalidArgument, Code::Unimplemented],
        ),
        body(
            "a message and garbage",
            [&whole[..], b"garbage"].concat(),
            &[&[Code::Ok][..], &broken].concat(),
        ),
    ]
}

/// Bytes that are no `GenerateRequest`, made by hand and by chance.
fn messages() -> Vec<Case> {
    let broken = [Code::InvalidArgument, Code::Internal];
    let by_hand: [(&str, Vec<u8>); 10] = [
        ("text that is not UTF-8", vec![0x0a, 2, 0xff, 0xfe]),
        ("a string past the end", vec![0x0a, 100, b'a']),
        ("a string of 2^63 bytes", vec![0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 127]),
        (
            "a number that does not end",
            vec![0x30, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255],
        ),
        ("half a number", vec![0x30, 0x80]),
        ("field 0", vec![0x00, 0x00]),
        ("wire type 7", vec![0x0f]),
        ("a number where a text belongs", vec![0x08, 1]),
        ("the end of no group", vec![0x0c]),
        ("a group without end", vec![0xa3, 0x3e]),
    ];
    let mut cases: Vec<Case> =
        by_hand.into_iter().map(|(name, bytes)| body(name, message(&bytes), &broken)).collect();
    // Groups of an unknown field, one inside the other.
    cases.push(body("100,000 nested groups", message(&[0xa3, 0x3e].repeat(100_000)), &broken));
    cases
}

/// Valid protobuf or not, valid request or not: some status.
fn by_chance(count: u64) -> Vec<Case> {
    let mut rng = Rng::new(7);
    let whole = good("").body.split_off(5);
    let mut cases = Vec::new();
    for number in 0..count {
        let mut bytes = whole.clone();
        if number % 2 == 0 {
            bytes = (0..rng.below(64)).map(|_| rng.below(256) as u8).collect();
        } else {
            for _ in 0..=rng.below(4) {
                let index = rng.below(bytes.len());
                bytes[index] = rng.below(256) as u8;
            }
        }
        let codes = [Code::Ok, Code::InvalidArgument, Code::Internal, Code::OutOfRange];
        let codes = [&codes[..], &[Code::NotFound]].concat();
        cases.push(body(
            &format!("bytes by chance {number}: {bytes:02x?}"),
            message(&bytes),
            &codes,
        ));
    }
    cases
}

fn headers() -> Vec<Case> {
    let typed = |text: &str| {
        let mut case = good(format!("content-type {text:?}"));
        case.headers[1].1 = text.to_owned();
        case
    };
    let refused = |mut case: Case, allowed: &[End]| {
        case.allowed = allowed.to_vec();
        case
    };
    let unsupported = [End::Http(415), End::Http(400), End::Grpc(Code::Unimplemented)];
    let mut untyped = good("no content-type");
    drop(untyped.headers.remove(1));
    let method = |method: Method| {
        let name = method.to_string();
        let allowed = vec![End::Http(405), End::Http(404), End::Grpc(Code::Unimplemented)];
        Case { method, allowed, ..good(name) }
    };
    let path = |path| {
        let allowed = vec![End::Grpc(Code::Unimplemented), End::Http(404)];
        Case { path, allowed, ..good(path) }
    };
    let mut encoded = good("an encoding that nobody has");
    encoded.headers.push(("grpc-encoding", "zstd9".to_owned()));
    encoded.body[0] = 1;
    vec![
        typed("application/grpc"),
        typed("application/grpc+proto"),
        refused(typed("application/json"), &unsupported),
        refused(typed("text/plain"), &unsupported),
        refused(typed("application/grpcx"), &unsupported),
        refused(untyped, &unsupported),
        method(Method::GET),
        method(Method::PUT),
        method(Method::OPTIONS),
        path("/slipstream.v1.Completions/NoSuchMethod"),
        path("/no.such.Service/Method"),
        path("/slipstream.v1.Completions"),
        refused(encoded, &[End::Grpc(Code::Unimplemented), End::Grpc(Code::Internal)]),
    ]
}

fn timeouts() -> Vec<Case> {
    let malformed = [
        "",
        " ",
        "1",
        "S",
        "-1S",
        "+1S",
        "1.5S",
        "1X",
        "1s",
        "1 S",
        " 1S",
        "1S ",
        "123456789S",
        "99999999999999999999S",
        "0x1S",
        "1SS",
        "NaNS",
        "\u{b9}S",
    ];
    let timeout = |text: &str, code| {
        let mut case = good(format!("grpc-timeout {text:?}"));
        case.headers.push(("grpc-timeout", text.to_owned()));
        case.allowed = vec![End::Grpc(code)];
        case
    };
    let mut cases: Vec<Case> =
        malformed.iter().map(|text| timeout(text, Code::InvalidArgument)).collect();
    cases.extend(["1H", "99999999H", "00000060S", "99999999S"].map(|text| timeout(text, Code::Ok)));
    cases.extend(["0S", "0n", "1n"].map(|text| timeout(text, Code::DeadlineExceeded)));
    cases
}

/// One call on a connection of its own.
async fn end_of(case: &Case, address: SocketAddr) -> Result<End, h2::Error> {
    let socket = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await?;
    let driving = tokio::spawn(connection);
    let mut request = Request::builder()
        .method(case.method.clone())
        .uri(format!("http://localhost{}", case.path));
    for (name, value) in &case.headers {
        request = request.header(*name, http::HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    let end = finish(client, request.body(()).unwrap(), case.body.clone()).await;
    driving.abort();
    match end {
        Err(error) if error.is_reset() => Ok(End::Reset(error.reason().expect("a reset has one"))),
        end => end,
    }
}

async fn finish(
    client: h2::client::SendRequest<Bytes>,
    request: Request<()>,
    body: Vec<u8>,
) -> Result<End, h2::Error> {
    let mut client = client.ready().await?;
    let (response, mut sender) = client.send_request(request, false)?;
    // A server that has seen enough may have closed the stream.
    let _ = sender.send_data(Bytes::from(body), true);
    let (head, mut received) = response.await?.into_parts();
    while let Some(data) = received.data().await {
        let len = data?.len();
        received.flow_control().release_capacity(len)?;
    }
    let trailers = received.trailers().await?.unwrap_or_default();
    let code = |headers: &HeaderMap| {
        headers.get(GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
    };
    Ok(match code(&trailers).or_else(|| code(&head.headers)) {
        Some(code) => End::Grpc(code),
        None => End::Http(head.status.as_u16()),
    })
}

fn check_all(name: &str, cases: Vec<Case>) {
    timed(name, 2.0, || {
        block_on(async {
            let server = start(|_| {}).await;
            let client = client(&server);
            let mut wrong = Vec::new();
            for case in &cases {
                let end = tokio::time::timeout(PATIENCE, end_of(case, server.address())).await;
                if !matches!(&end, Ok(Ok(end)) if case.allowed.contains(end)) {
                    wrong.push(format!("{}: {end:?}, not one of {:?}", case.name, case.allowed));
                }
                let request: GenerateRequest = greedy("fn main", 3);
                complete(&client, request).await.unwrap_or_else(|status| {
                    panic!("after {}: {status}", case.name);
                });
            }
            drop(client);
            server.stop().await.unwrap();
            assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
        });
    });
}

#[test]
fn broken_bodies_end_with_a_status() {
    check_all("raw bodies", bodies());
}

#[test]
fn broken_messages_end_with_a_status() {
    check_all("raw messages", [messages(), by_chance(100)].into_iter().flatten().collect());
}

#[test]
fn wrong_methods_types_and_paths_end_with_a_status() {
    check_all("raw calls", headers());
}

#[test]
fn malformed_timeouts_are_refused() {
    check_all("raw timeouts", timeouts());
}

#[test]
fn a_message_that_never_ends_is_given_up_on_at_its_deadline() {
    block_on(async {
        let server = start(|_| {}).await;
        let socket = TcpStream::connect(server.address()).await.unwrap();
        let (client, connection) = h2::client::handshake(socket).await.unwrap();
        let driving = tokio::spawn(connection);
        let mut client = client.ready().await.unwrap();
        let request = Request::post("http://localhost/slipstream.v1.Completions/Complete")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", "200m");
        let (answer, mut sender) = client.send_request(request.body(()).unwrap(), false).unwrap();
        // A message of 4096 bytes, of which three come.
        sender.send_data(Bytes::from_static(&[0, 0, 0, 16, 0, 1, 2, 3]), false).unwrap();
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        let code = Code::from_bytes(answer.headers()[GRPC_STATUS].as_bytes());
        assert_eq!(code, Code::DeadlineExceeded);
        driving.abort();
        server.stop().await.unwrap();
    });
}
