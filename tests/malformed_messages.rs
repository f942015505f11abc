//! Proves what becomes of requests that are not the messages they should be: a byte over the limit,
//! lying or missing lengths, nonsense in place of protobuf. Each ends with the promised code and a
//! reason, none reaches a method, and the connection lives.

use prost::Message;
use slipstream_proto::v1;
use slipstream_server::local::LocalServer;
use slipstream_tests::client::{block_on, client, config, greedy, start, stream};
use slipstream_tests::raw_call::{GRPC, framed, post, reason, whole};
use tonic::{Code, Status};
use tonic_types::StatusExt;

const GENERATE: &str = "/slipstream.v1.Completions/Generate";
/// What a message may have unless configured.
const LIMIT: usize = 4 << 20;

async fn send(server: &LocalServer, body: Vec<u8>) -> Status {
    let headers = [("content-type", GRPC), ("x-request-id", "probe")];
    let status = post(server, GENERATE, &headers, body).await.status();
    assert_eq!(status.metadata().get("x-request-id").unwrap(), "probe", "{status:?}");
    assert_eq!(status.get_error_details().request_info().unwrap().request_id, "probe");
    assert!(status.message().len() < 400, "{status:?}");
    status
}

/// A message of exactly this many bytes, wrong for its long model name alone.
fn of_len(len: usize) -> Vec<u8> {
    let mut request = greedy("fn main() {", 8);
    request.model = "m".repeat(len);
    let overhead = request.encoded_len() - len;
    request.model.truncate(len - overhead);
    let bytes = request.encode_to_vec();
    assert_eq!(bytes.len(), len);
    bytes
}

fn assert_too_large(status: &Status, numbers: [usize; 2]) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(reason(status), "MESSAGE_TOO_LARGE");
    for part in numbers.map(|number| number.to_string()) {
        assert!(status.message().contains(&part), "{status:?}");
    }
    assert!(status.message().contains("--max-message"), "{status:?}");
}

#[test]
fn the_limit_of_messages_is_exact_and_named() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.message_bytes_max = 2000;
        let small = LocalServer::start(settings).await.unwrap();
        let usual = start(|_| {}).await;
        for (server, limit) in [(&usual, LIMIT), (&small, 2000)] {
            // At the limit the message is read, and its field refused.
            let status = send(server, whole(&of_len(limit))).await;
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
            assert_eq!(reason(&status), "INVALID_FIELD");
            let status = send(server, whole(&of_len(limit + 1))).await;
            assert_too_large(&status, [limit + 1, limit]);
            // A prefix alone is enough, whatever follows or does not.
            let status = send(server, framed(0, u32::MAX, b"")).await;
            assert_too_large(&status, [u32::MAX as usize, limit]);
            assert!(stream(&client(server), greedy("fn main() {", 4)).await.is_ok());
        }
        small.stop().await.unwrap();
        usual.stop().await.unwrap();
    });
}

/// `depth` messages inside each other, as groups of an unknown field.
fn nested(depth: usize) -> Vec<u8> {
    let (begin, end) = ([0xfb, 0x01], [0xfc, 0x01]); // field 31, wire types 3 and 4
    [begin.repeat(depth), end.repeat(depth)].concat()
}

#[test]
fn nonsense_is_an_invalid_argument() {
    block_on(async {
        let server = start(|_| {}).await;
        let good = greedy("fn main() {", 8).encode_to_vec();
        let len = u32::try_from(good.len()).unwrap();
        let bodies = [
            ("nothing", Vec::new()),
            ("half a prefix", vec![0, 0]),
            ("a prefix alone", framed(0, 5, b"")),
            ("a length too long", framed(0, len + 1, &good)),
            ("a length too short", framed(0, len - 1, &good)),
            ("a flag that is none", framed(7, len, &good)),
            ("compressed without saying how", framed(1, len, &good)),
            ("two messages", [whole(&good), whole(&good)].concat()),
            ("a message and a half", [whole(&good), framed(0, len, &good[..3])].concat()),
            ("a truncated message", whole(&good[..good.len() - 1])),
            ("random bytes", whole(&[0xff; 64])),
            ("field number 0", whole(&[0x02, 0x00])),
            (
                "a varint without an end",
                whole(&[0x38, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            ),
            ("a string that is not UTF-8", whole(b"\x0a\x03a\xffb")),
            ("a surrogate", whole(b"\x0a\x03\xed\xa0\x80")),
            ("the wrong wire type", whole(&[0x08, 0x01])),
            ("a length beyond the message", whole(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f])),
            ("deep nesting", whole(&nested(10_000))),
            ("a group that never ends", whole(&[0xfb; 100])),
        ];
        for (name, body) in bodies {
            let status = send(&server, body).await;
            assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status:?}");
            assert_eq!(reason(&status), "MALFORMED_MESSAGE", "{name}");
        }
        assert!(stream(&client(&server), greedy("fn main() {", 4)).await.is_ok());
        server.stop().await.unwrap();
    });
}

#[test]
fn what_a_newer_client_adds_is_ignored() {
    block_on(async {
        let server = start(|_| {}).await;
        let mut message = v1::GetModelRequest::default().encode_to_vec();
        message.extend([0xf8, 0x3f, 0x2a]); // field 1023, a number
        message.extend(b"\xfa\x3f\x03new");
        let headers = [("content-type", GRPC)];
        let path = "/slipstream.v1.Models/Get";
        let answer = post(&server, path, &headers, whole(&message)).await;
        assert_eq!(answer.status().code(), Code::Ok, "{answer:?}");
        assert!(v1::Model::decode(&answer.body[5..]).unwrap().vocab_size > 0);
        server.stop().await.unwrap();
    });
}
