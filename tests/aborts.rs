//! Proves that a request can be ended by its id from anywhere: its stream ends behind what was
//! certain, what it held comes back though nobody reads, and asking twice or for nobody is fine.

use slipstream_proto::v1;
use slipstream_server::config::ModelFlags;
use slipstream_server::local::LocalServer;
use slipstream_tests::client::{
    Client, PATIENCE, block_on, client, complete, greedy, narrow_client, read_on, sampled, start,
    stream, until_taken, url,
};
use slipstream_tests::raw_call::reason;
use tonic::{Code, Status};

const PROMPT: &str = "use std::collections::HashMap;\n";
/// Output that fills the micro verifier's context of 1024 after `PROMPT`.
const LONG: i32 = 1000;

fn named(id: &str, request: v1::GenerateRequest) -> v1::GenerateRequest {
    v1::GenerateRequest { request_id: Some(id.to_owned()), ..request }
}

async fn abort(client: &Client, ids: &[&str]) -> Result<u32, Status> {
    let request_ids = ids.iter().map(|id| (*id).to_owned()).collect();
    let response = client.clone().abort(v1::AbortRequest { request_ids }).await?;
    Ok(response.into_inner().aborted)
}

fn assert_aborted(status: &Status) {
    assert_eq!(status.code(), Code::Cancelled, "{status:?}");
    assert_eq!(reason(status), "ABORTED");
    assert!(status.message().contains("output_prefix"), "{status:?}");
}

/// Reads `num_read` events of a request, aborts it, and reads on. `None` when the request was over
/// before the abort came.
async fn cut(
    server: &LocalServer,
    request: &v1::GenerateRequest,
    num_read: usize,
) -> Option<Vec<u32>> {
    let id = request.request_id.as_deref().unwrap();
    let other = client(server);
    let call = narrow_client(&url(server)).await.generate(request.clone()).await;
    let mut events = call.unwrap().into_inner();
    let mut received = Vec::new();
    for _ in 0..num_read {
        let event = events.message().await.unwrap()?.event;
        if let Some(v1::generate_event::Event::Tokens(tokens)) = event {
            received.extend(tokens.tokens.iter().map(|token| token.id));
        }
    }
    if abort(&other, &["somebody-else", id]).await.unwrap() == 0 {
        return None;
    }
    assert_eq!(abort(&other, &[id, id]).await.unwrap(), 0, "it is told once");
    let (received, status) = read_on(&mut events, received).await;
    assert_aborted(&status.expect("it was aborted"));
    assert!(events.message().await.unwrap().is_none(), "nothing follows a status");
    Some(received)
}

#[test]
fn an_aborted_stream_ends_behind_what_was_certain_and_can_go_on() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        for num_read in [0, 1, 3, 10] {
            let mut found = None;
            for seed in 0..50 {
                let request = named(&format!("mine-{num_read}"), sampled(PROMPT, LONG, seed));
                if let Some(received) = cut(&server, &request, num_read).await {
                    found = Some((request, received));
                    break;
                }
            }
            let (request, received) = found.expect("one of 50 was slow enough to be aborted");
            let resumed =
                v1::GenerateRequest { output_prefix: received.clone(), ..request.clone() };
            let rest = stream(&client, resumed).await.unwrap().ids();
            assert!(!rest.is_empty(), "nothing was cut off");
            let whole = stream(&client, request).await.unwrap().ids();
            assert_eq!([received, rest].concat(), whole);
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn all_requests_of_one_id_end_and_give_everything_back_unread() {
    block_on(async {
        // Places for four requests in all, and 64 blocks: one full context.
        let few = |flags: &mut ModelFlags| {
            flags.max_running = 2;
            flags.max_waiting = 2;
            flags.kv_blocks = Some(64);
        };
        let server = start(few).await;
        let (unread, other) = (narrow_client(&url(&server)).await, client(&server));
        let mut streams = Vec::new();
        for seed in 0..4 {
            let request = named("shared", sampled(PROMPT, LONG, seed));
            streams.push(unread.clone().generate(request).await.unwrap().into_inner());
        }
        let aborted = abort(&other, &["shared"]).await.unwrap();
        assert_eq!(aborted, 4, "running and waiting ones alike");
        until_taken(&other, &greedy(PROMPT, LONG)).await;
        for events in &mut streams {
            assert_aborted(&read_on(events, Vec::new()).await.1.expect("it was aborted"));
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn a_call_for_one_response_can_be_aborted_too() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let call = tokio::spawn({
            let client = client.clone();
            async move { complete(&client, named("unary", greedy(PROMPT, LONG))).await }
        });
        let until_found = async {
            while abort(&client, &["unary"]).await.unwrap() == 0 {
                assert!(!call.is_finished(), "it ended before anybody could abort it");
            }
        };
        tokio::time::timeout(PATIENCE, until_found).await.expect("the call is there soon");
        assert_aborted(&call.await.unwrap().expect_err("it was aborted"));
        server.stop().await.unwrap();
    });
}

#[test]
fn aborting_nobody_is_fine_and_nonsense_is_not() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let finished = named("done", greedy(PROMPT, 2));
        stream(&client, finished).await.unwrap();
        assert_eq!(abort(&client, &["done", "never-there"]).await.unwrap(), 0);
        let longest = "i".repeat(128);
        let many: Vec<&str> = vec![&longest; 1024];
        assert_eq!(abort(&client, &many).await.unwrap(), 0);
        let (too_many, too_long) = (vec!["id"; 1025], "i".repeat(129));
        let cases: [(&[&str], &[&str]); 5] = [
            (&[], &["request_ids", "at least one"]),
            (&too_many, &["request_ids", "1025", "1024"]),
            (&["a", ""], &["request_ids[1]"]),
            (&["a b"], &["request_ids[0]"]),
            (&[&too_long], &["request_ids[0]", "129", "128"]),
        ];
        for (ids, parts) in cases {
            let status = abort(&client, ids).await.expect_err(parts[0]);
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
            for part in parts {
                assert!(status.message().contains(part), "{status:?} without {part}");
            }
        }
        server.stop().await.unwrap();
    });
}
