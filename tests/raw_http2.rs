//! Proves that no bytes on a connection hurt anybody but their sender: every broken frame, header
//! block or request gets the answer that RFC 9113 and RFC 7541 ask for, and another connection's
//! call is served as ever. One table of mistakes, one server.

use std::net::SocketAddr;

use slipstream_tests::client::{Client, block_on, client, complete, greedy, start};
use slipstream_tests::raw_http2::Reaction::{Answered, Closed, GoAway, Reset, Status};
use slipstream_tests::raw_http2::code::{
    COMPRESSION_ERROR, ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, PROTOCOL_ERROR,
    REFUSED_STREAM, STREAM_CLOSED,
};
use slipstream_tests::raw_http2::flag::{ACK, END_HEADERS, END_STREAM, NONE, PADDED};
use slipstream_tests::raw_http2::kind::{
    CONTINUATION, DATA, GOAWAY, HEADERS, PING, PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS,
    UNKNOWN, WINDOW_UPDATE,
};
use slipstream_tests::raw_http2::{
    COMPLETE, FRAME_BYTES_MAX, HEALTH_CHECK, HEALTH_WATCH, PREFACE, Peer, Reaction, call, fields,
    frame, grpc_fields, head, message, open, open_block, setting,
};
use slipstream_tests::timing::timed;

/// Stream of the call that shows a connection to be still good. Above those of all cases.
const LATER_STREAM: u32 = 1001;
/// Largest window of flow control, and largest stream id.
const MAX_31_BITS: u32 = 0x7fff_ffff;

/// What is sent after the greeting, and what the server may do.
struct Case {
    name: &'static str,
    sent: Vec<u8>,
    allowed: Vec<Reaction>,
}

fn case(name: &'static str, sent: &[Vec<u8>], allowed: &[Reaction]) -> Case {
    Case { name, sent: sent.concat(), allowed: allowed.to_vec() }
}

/// The connection must end. With this code, or with the general one that the library has for all
/// that it cannot decode: codes help to find errors and bind nobody (RFC 9113, 5.4.1 and 7).
fn undecodable(name: &'static str, code: u32, sent: &[Vec<u8>]) -> Case {
    case(name, sent, &[GoAway(code), GoAway(PROTOCOL_ERROR)])
}

/// The connection must end with this code.
fn fatal(name: &'static str, code: u32, sent: &[Vec<u8>]) -> Case {
    case(name, sent, &[GoAway(code)])
}

/// The stream must end with this code. RFC 9113 5.4.1 lets a server end the connection instead.
fn broken(name: &'static str, code: u32, sent: &[Vec<u8>]) -> Case {
    case(name, sent, &[Reset(code), GoAway(code)])
}

/// The good call among what is sent must be answered.
fn harmless(name: &'static str, sent: &[Vec<u8>]) -> Case {
    case(name, sent, &[Answered])
}

/// A good call on stream 1.
fn good() -> Vec<u8> {
    call(1, HEALTH_CHECK, &[])
}

/// A call on stream 1 that stays open on the server's side and is over on the peer's.
fn half_closed() -> Vec<u8> {
    call(1, HEALTH_WATCH, &[])
}

/// A call on stream 1 that waits for its message.
fn waiting() -> Vec<u8> {
    open(1, COMPLETE)
}

/// The end of a body.
fn end(stream: u32) -> Vec<u8> {
    frame(DATA, END_STREAM, stream, &message(&[]))
}

fn frames() -> Vec<Case> {
    let long = head(FRAME_BYTES_MAX + 1, DATA, NONE, 1);
    let mut reserved_bit = open(1, HEALTH_CHECK);
    reserved_bit[5] |= 0x80;
    let block = fields(&grpc_fields(HEALTH_CHECK));
    let odd_flags = frame(HEADERS, END_HEADERS | 0x42, 1, &block);
    vec![
        fatal("a frame longer than allowed", FRAME_SIZE_ERROR, &[waiting(), long]),
        harmless("unknown frame type", &[frame(UNKNOWN, 0xff, 0, b"what?"), good()]),
        harmless("unknown type, idle stream", &[frame(UNKNOWN, 0, 9, b"what?"), good()]),
        harmless("reserved bit", &[reserved_bit, end(1)]),
        harmless("undefined flags", &[odd_flags, end(1)]),
        fatal(
            "padding over the end of DATA",
            PROTOCOL_ERROR,
            &[waiting(), frame(DATA, PADDED, 1, &[6, 0, 0, 0, 0, 0])],
        ),
        fatal(
            "padding over the end of HEADERS",
            PROTOCOL_ERROR,
            &[frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, &[&[255][..], &block].concat())],
        ),
        undecodable(
            "padded DATA without a length",
            FRAME_SIZE_ERROR,
            &[waiting(), frame(DATA, PADDED, 1, &[])],
        ),
        fatal(
            "a client's promise",
            PROTOCOL_ERROR,
            &[
                waiting(),
                frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &block].concat()),
            ],
        ),
    ]
}

impl Case {
    /// Where the standard leaves a choice, or where servers are known to differ from it harmlessly.
    fn or(mut self, reaction: Reaction) -> Self {
        self.allowed.push(reaction);
        self
    }
}

fn streams() -> Vec<Case> {
    let check = fields(&grpc_fields(HEALTH_CHECK));
    let reset = |stream| frame(RST_STREAM, NONE, stream, &[0, 0, 0, 8]);
    let trailer = |flags| frame(HEADERS, END_HEADERS | flags, 1, &fields(&[("a", "b")]));
    vec![
        fatal("HEADERS on stream 0", PROTOCOL_ERROR, &[open_block(0, &check)]),
        fatal("DATA on stream 0", PROTOCOL_ERROR, &[frame(DATA, NONE, 0, b"x")]),
        fatal("DATA on an idle stream", PROTOCOL_ERROR, &[frame(DATA, END_STREAM, 1, b"x")])
            .or(GoAway(STREAM_CLOSED)),
        broken("DATA behind the end", STREAM_CLOSED, &[half_closed(), end(1)])
            .or(GoAway(PROTOCOL_ERROR)),
        broken("HEADERS behind the end", STREAM_CLOSED, &[half_closed(), trailer(END_STREAM)])
            .or(GoAway(PROTOCOL_ERROR)),
        case(
            "DATA behind the peer's own reset",
            &[waiting(), reset(1), end(1)],
            &[Reset(STREAM_CLOSED), GoAway(STREAM_CLOSED)],
        ),
        broken(
            "HEADERS behind the peer's own reset",
            STREAM_CLOSED,
            &[waiting(), reset(1), trailer(END_STREAM)],
        )
        .or(GoAway(PROTOCOL_ERROR)),
        broken("trailers that do not end the stream", PROTOCOL_ERROR, &[waiting(), trailer(NONE)]),
        broken(
            "trailers with a pseudo-header",
            PROTOCOL_ERROR,
            &[waiting(), frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&[(":path", "/")]))],
        )
        // The library drops the field; the call then ends for want of a message.
        .or(Status(200)),
        fatal("a server's stream id", PROTOCOL_ERROR, &[open_block(2, &check)]),
        fatal("a lower stream id", PROTOCOL_ERROR, &[open(5, COMPLETE), open_block(3, &check)])
            .or(GoAway(STREAM_CLOSED)),
        fatal("RST_STREAM on stream 0", PROTOCOL_ERROR, &[reset(0)]),
        fatal("RST_STREAM on an idle stream", PROTOCOL_ERROR, &[reset(1)]),
        undecodable(
            "RST_STREAM of 3 bytes",
            FRAME_SIZE_ERROR,
            &[waiting(), frame(RST_STREAM, NONE, 1, &[0, 0, 8])],
        ),
        harmless(
            "RST_STREAM twice",
            &[open(1, COMPLETE), reset(1), reset(1), { call(3, HEALTH_CHECK, &[]) }],
        ),
        fatal(
            "CONTINUATION without HEADERS",
            PROTOCOL_ERROR,
            &[waiting(), frame(CONTINUATION, END_HEADERS, 1, &check)],
        ),
        fatal(
            "CONTINUATION on stream 0",
            PROTOCOL_ERROR,
            &[frame(CONTINUATION, END_HEADERS, 0, &check)],
        ),
    ]
}

fn inside_a_header_block() -> Vec<Case> {
    let begun = || frame(HEADERS, NONE, 1, &fields(&grpc_fields(HEALTH_CHECK)));
    let inside = |name, other: Vec<u8>| fatal(name, PROTOCOL_ERROR, &[begun(), other]);
    vec![
        inside("DATA inside a header block", frame(DATA, NONE, 1, b"x")),
        inside("PING inside a header block", frame(PING, NONE, 0, &[0; 8])),
        inside("SETTINGS inside a header block", frame(SETTINGS, NONE, 0, &[])),
        inside("unknown frame inside a header block", frame(UNKNOWN, NONE, 1, b"x")),
        inside("another stream's HEADERS inside a header block", open(3, HEALTH_CHECK)),
        inside("another stream's CONTINUATION", frame(CONTINUATION, END_HEADERS, 3, &[])),
        harmless(
            "an empty end of a header block",
            &[begun(), frame(CONTINUATION, END_HEADERS, 1, &[]), end(1)],
        ),
    ]
}

fn control() -> Vec<Case> {
    let settings = |payload: &[u8]| vec![frame(SETTINGS, NONE, 0, payload)];
    let window = |stream, by: u32| frame(WINDOW_UPDATE, NONE, stream, &by.to_be_bytes());
    let bad = |name, code, id, value| undecodable(name, code, &settings(&setting(id, value)));
    vec![
        undecodable("SETTINGS of 5 bytes", FRAME_SIZE_ERROR, &settings(&[0; 5])),
        fatal("SETTINGS on a stream", PROTOCOL_ERROR, &[frame(SETTINGS, NONE, 1, &[])]),
        undecodable(
            "SETTINGS answer with a payload",
            FRAME_SIZE_ERROR,
            &[frame(SETTINGS, ACK, 0, &setting(3, 1))],
        ),
        bad("ENABLE_PUSH of 2", PROTOCOL_ERROR, 2, 2),
        bad("INITIAL_WINDOW_SIZE of 2^31", FLOW_CONTROL_ERROR, 4, MAX_31_BITS + 1),
        bad("MAX_FRAME_SIZE of 16383", PROTOCOL_ERROR, 5, 16_383),
        bad("MAX_FRAME_SIZE of 2^24", PROTOCOL_ERROR, 5, 1 << 24),
        harmless("unknown setting", &[frame(SETTINGS, NONE, 0, &setting(0xfafa, 7)), good()]),
        undecodable("PING of 7 bytes", FRAME_SIZE_ERROR, &[frame(PING, NONE, 0, &[0; 7])]),
        fatal("PING on a stream", PROTOCOL_ERROR, &[frame(PING, NONE, 1, &[0; 8])]),
        harmless("answer to a PING that nobody sent", &[frame(PING, ACK, 0, &[7; 8]), good()]),
        fatal("GOAWAY on a stream", PROTOCOL_ERROR, &[frame(GOAWAY, NONE, 1, &[0; 8])]),
        undecodable("PRIORITY of 4 bytes", FRAME_SIZE_ERROR, &[frame(PRIORITY, NONE, 1, &[0; 4])]),
        fatal("PRIORITY on stream 0", PROTOCOL_ERROR, &[frame(PRIORITY, NONE, 0, &[0; 5])]),
        // RFC 7540 made it an error, RFC 9113 ignores priorities.
        broken(
            "PRIORITY on itself",
            PROTOCOL_ERROR,
            &[waiting(), frame(PRIORITY, NONE, 1, &[0, 0, 0, 1, 9]), call(3, HEALTH_CHECK, &[])],
        )
        .or(Answered),
        fatal("connection window by 0", PROTOCOL_ERROR, &[window(0, 0)]),
        broken("stream window by 0", PROTOCOL_ERROR, &[waiting(), window(1, 0)]),
        fatal("connection window past 2^31 - 1", FLOW_CONTROL_ERROR, &[window(0, MAX_31_BITS)]),
        broken(
            "stream window past 2^31 - 1",
            FLOW_CONTROL_ERROR,
            &[waiting(), window(1, MAX_31_BITS)],
        ),
        undecodable(
            "WINDOW_UPDATE of 3 bytes",
            FRAME_SIZE_ERROR,
            &[frame(WINDOW_UPDATE, NONE, 0, &[0, 0, 1])],
        ),
        fatal("WINDOW_UPDATE on an idle stream", PROTOCOL_ERROR, &[window(1, 1)]),
    ]
}

fn compression() -> Vec<Case> {
    let good = fields(&grpc_fields(HEALTH_CHECK));
    let block = |name, begin: &[u8], end: &[u8]| {
        let block = [begin, &good, end].concat();
        undecodable(name, COMPRESSION_ERROR, &[open_block(1, &block)])
    };
    vec![
        block("index past both tables", &[], &[0xc6]),
        block("index 0", &[], &[0x80]),
        block("literal with a name past both tables", &[], &[0x0f, 0x70, 1, b'x']),
        block("index that overflows", &[], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        block("table grown past the setting", &[0x3f, 0xe2, 0x1f], &[]),
        block("table size at the end", &[], &[0x20]),
        block("string past the end", &[], &[0x00, 5, b'a']),
        block("Huffman padding of a byte", &[], &[0x00, 1, b'a', 0x82, 0x1f, 0xff]),
        block("Huffman padding of zeros", &[], &[0x00, 1, b'a', 0x81, 0x18]),
        block("Huffman end of string", &[], &[0x00, 1, b'a', 0x84, 0xff, 0xff, 0xff, 0xff]),
    ]
}

/// A request whose fields are those of a good call, changed.
fn request(name: &'static str, change: impl Fn(&mut Vec<(&str, &str)>)) -> Case {
    let mut list = grpc_fields(HEALTH_CHECK);
    change(&mut list);
    let sent = [open_block(1, &fields(&list)), end(1)];
    // That its body comes for a stream that is over by then may be said, too.
    broken(name, PROTOCOL_ERROR, &sent).or(Status(400))
}

fn pseudo_headers() -> Vec<Case> {
    vec![
        request("no method", |list| _ = list.remove(0)),
        request("no scheme", |list| _ = list.remove(1)),
        request("no path", |list| _ = list.remove(2)),
        request("an empty path", |list| list[2].1 = ""),
        request("two methods", |list| list.insert(1, (":method", "POST"))),
        request("two schemes", |list| list.insert(1, (":scheme", "http"))),
        request("two paths", |list| list.insert(1, (":path", HEALTH_CHECK))),
        request("an unknown pseudo-header", |list| list.insert(1, (":colour", "red"))),
        request("a response's pseudo-header", |list| list.insert(1, (":status", "200"))),
        request("a pseudo-header behind the others", |list| {
            let path = list.remove(2);
            list.push(path);
        }),
    ]
}

fn header_fields() -> Vec<Case> {
    let with = |name, field| request(name, move |list| list.push(field));
    let length = |name, text| {
        let list = [&grpc_fields(COMPLETE)[..], &[("content-length", text)]].concat();
        broken(name, PROTOCOL_ERROR, &[open_block(1, &fields(&list)), end(1)]).or(Status(400))
    };
    vec![
        with("capitals in a name", ("X-Capital", "a")),
        with("a space in a name", ("x y", "a")),
        with("an empty name", ("", "a")),
        with("a line end in a value", ("x-a", "a\r\nb: c")),
        with("a zero byte in a value", ("x-a", "a\0b")),
        with("connection", ("connection", "close")),
        with("keep-alive", ("keep-alive", "5")),
        with("proxy-connection", ("proxy-connection", "close")),
        with("transfer-encoding", ("transfer-encoding", "chunked")),
        with("upgrade", ("upgrade", "h2c")),
        request("te other than trailers", |list| list[4].1 = "gzip"),
        length("content-length too small", "4"),
        length("content-length too large", "6"),
        length("content-length without sense", "five"),
        length("content-length past all numbers", "99999999999999999999999999"),
    ]
}

/// Header blocks by their size. The limit is 16 KiB.
fn header_sizes() -> Vec<Case> {
    let block = |len: usize| {
        let value = "v".repeat(len);
        fields(&[&grpc_fields(HEALTH_CHECK)[..], &[("x-long", &value)]].concat())
    };
    let split = |block: &[u8]| {
        let mut parts = block.chunks(FRAME_BYTES_MAX).peekable();
        let mut sent = frame(HEADERS, NONE, 1, parts.next().unwrap());
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { END_HEADERS } else { NONE };
            sent.extend(frame(CONTINUATION, flags, 1, part));
        }
        sent
    };
    let many: Vec<(&str, &str)> = (0..2000).map(|_| ("x-a", "b")).collect();
    let many = fields(&[&grpc_fields(HEALTH_CHECK)[..], &many].concat());
    // 4000 bytes enter the table once and are then named 2000 times.
    let mut expanding = fields(&grpc_fields(HEALTH_CHECK));
    expanding.extend([0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
    expanding.extend([b'v'; 4000]);
    expanding.extend([0xbe; 2000]);
    let too_much = [Status(431), Reset(PROTOCOL_ERROR), Reset(REFUSED_STREAM)];
    let cut = [GoAway(ENHANCE_YOUR_CALM), GoAway(COMPRESSION_ERROR), Closed];
    let either = [&too_much[..], &cut].concat();
    vec![
        harmless("headers of 12 KiB", &[open_block(1, &block(12 << 10)), end(1)]),
        case("headers of 20 KiB", &[split(&block(20 << 10))], &either),
        case("2000 small headers", &[split(&many)], &either),
        case("headers of 1 MiB", &[split(&block(1 << 20))], &cut),
        case("headers of 8 MiB from 6 KiB", &[open_block(1, &expanding)], &either),
    ]
}

async fn assert_serving(client: &Client, after: &str) {
    let answer = complete(client, greedy("fn main", 3)).await;
    let answer = answer.unwrap_or_else(|status| panic!("after {after}: {status}"));
    assert_eq!(answer.tokens.len(), 3, "after {after}");
}

/// Sends one case and looks at what it does to its own connection.
fn check(case: &Case, address: SocketAddr) -> Result<(), String> {
    let mut peer = Peer::greeted(address).map_err(|error| error.to_string())?;
    // A server that has seen enough may hang up before it was sent all.
    let _ = peer.send(&case.sent);
    let reaction = peer.reaction().map_err(|error| error.to_string())?;
    if !case.allowed.contains(&reaction) {
        return Err(format!("{reaction:?}, not one of {:?}", case.allowed));
    }
    if matches!(reaction, Reset(_) | Status(_)) {
        peer.send(&call(LATER_STREAM, HEALTH_CHECK, &[])).map_err(|error| error.to_string())?;
        // Frames on their way to the broken stream may be answered first.
        let mut last = peer.reaction();
        while matches!(last, Ok(Reset(STREAM_CLOSED | PROTOCOL_ERROR))) {
            last = peer.reaction();
        }
        if !matches!(last, Ok(Answered)) {
            return Err(format!("{reaction:?}, then the connection was of no use: {last:?}"));
        }
    }
    Ok(())
}

fn check_all(name: &str, cases: &[Case]) {
    timed(name, 2.0, || {
        block_on(async {
            let server = start(|_| {}).await;
            let client = client(&server);
            let mut wrong = Vec::new();
            for case in cases {
                if let Err(problem) = check(case, server.address()) {
                    wrong.push(format!("{}: {problem}", case.name));
                }
                assert_serving(&client, case.name).await;
            }
            drop(client);
            server.stop().await.unwrap();
            assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
        });
    });
}

#[test]
fn broken_frames_end_what_they_must_and_nothing_else() {
    let cases = [frames(), streams(), inside_a_header_block(), control()];
    check_all("raw frames", &cases.into_iter().flatten().collect::<Vec<_>>());
}

#[test]
fn broken_headers_end_what_they_must_and_nothing_else() {
    let cases = [compression(), pseudo_headers(), header_fields(), header_sizes()];
    check_all("raw headers", &cases.into_iter().flatten().collect::<Vec<_>>());
}

/// What is no HTTP/2, or not enough of it.
fn openings() -> Vec<(&'static str, Vec<u8>)> {
    let settings = frame(SETTINGS, NONE, 0, &[]);
    let long_line = [b"GET /".to_vec(), vec![b'a'; 1 << 20], b" HTTP/1.1\r\n\r\n".to_vec()];
    let long_header = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 1 << 20]];
    let many_headers = "X: a\r\n".repeat(10_000);
    vec![
        ("nothing", Vec::new()),
        ("zeros", vec![0; 4096]),
        ("a TLS greeting", vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0, 0, 0, 0, 0]),
        ("half a preface", PREFACE[..14].to_vec()),
        ("half a preface, then something else", [&PREFACE[..20], &[0; 64]].concat()),
        ("a wrong preface", [b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", &settings[..]].concat()),
        ("a preface without settings", [PREFACE, &call(1, HEALTH_CHECK, &[])].concat()),
        ("a preface twice", [PREFACE, PREFACE].concat()),
        ("half a request line", b"GET /hea".to_vec()),
        ("a request line of 1 MiB", long_line.concat()),
        ("a header without end", long_header.concat()),
        ("a header block without end", b"GET / HTTP/1.1\r\nHost: a\r\n".to_vec()),
        ("10,000 headers", ["GET / HTTP/1.1\r\n", &many_headers, "\r\n"].concat().into_bytes()),
        ("a wrong version", b"GET / HTTP/7.0\r\n\r\n".to_vec()),
        (
            "two lengths",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\
                          \r\nab"
                .to_vec(),
        ),
        (
            "length and chunks",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\
                          Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                .to_vec(),
        ),
        (
            "a chunk past all numbers",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\
                          \r\nffffffffffffffffff\r\n"
                .to_vec(),
        ),
        ("a line end alone", b"\n\n\n\n".to_vec()),
    ]
}

/// Peers that stop in the middle of their first words are not waited for by anybody else, and their
/// connections end when they hang up.
#[test]
fn garbage_instead_of_a_greeting_hurts_nobody() {
    timed("raw greetings", 2.0, || {
        block_on(async {
            let server = start(|_| {}).await;
            let client = client(&server);
            let mut silent = Vec::new();
            for (name, bytes) in openings() {
                let mut peer = Peer::connect(server.address()).unwrap();
                let _ = peer.send(&bytes); // the server may have hung up meanwhile
                assert_serving(&client, name).await;
                silent.push((name, peer));
            }
            for (name, peer) in &mut silent {
                let _ = peer.finish(); // the server may have done so first
                if let Err(error) = peer.until_eof() {
                    panic!("{name}: the connection does not end: {error}");
                }
            }
            assert_serving(&client, "all of them").await;
            drop(client);
            server.stop().await.unwrap();
        });
    });
}
