//! Proves that n samples of a prompt are n completions, byte for byte, streamed and in one answer;
//! that they share the prompt; and that they are one call: taken together or not at all, ended
//! together, and given back together.

use slipstream_proto::v1;
use slipstream_proto::v1::FinishReason;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::config::ModelFlags;
use slipstream_tests::client::{
    Answer, Client, block_on, client, complete, complete_samples, greedy, narrow_client, read_on,
    sampled, samples_of, speculation, start, stream, stream_samples, until_taken, url,
};
use slipstream_tests::raw_call::reason;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

/// More than three blocks of tokens.
const PROMPT: &str = "use std::collections::HashMap;\n\n/// Counts the words of a text.\nfn \
                      count(text: &str) -> HashMap<String, usize> {\n    let mut counts = ";
/// Output that fills the micro verifier's context of 1024 behind a short prompt.
const LONG: i32 = 900;
const N: i32 = 4;

/// What each sample would be if it were asked for alone.
async fn alone(client: &Client, request: &v1::GenerateRequest) -> Vec<Answer> {
    let mut answers = Vec::new();
    for offset in 0..N as u32 {
        let sample_index = request.sample_index + offset;
        let one = v1::GenerateRequest { n: None, sample_index, ..request.clone() };
        answers.push(stream(client, one).await.unwrap());
    }
    answers
}

fn assert_same(answers: &[Answer], expected: &[Answer], how: &str) {
    assert_eq!(answers.len(), expected.len(), "{how}");
    for (index, (answer, alone)) in answers.iter().zip(expected).enumerate() {
        assert_eq!(answer.bytes(), alone.bytes(), "{how}, sample {index}");
        let (usage, alone) = (answer.finished.usage.unwrap(), alone.finished.usage.unwrap());
        assert_eq!(usage.output_tokens, alone.output_tokens, "{how}, sample {index}");
        assert_eq!(usage.prompt_tokens, alone.prompt_tokens, "{how}, sample {index}");
        assert_eq!(answer.finished.sample as usize, index, "{how}");
    }
}

#[test]
fn each_sample_has_the_bytes_of_a_call_of_its_own() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let base = v1::GenerateRequest { sample_index: 3, ..sampled(PROMPT, 48, 11) };
        let stopping = v1::GenerateRequest {
            stop_strings: vec!["\n".to_owned(), "e".to_owned()],
            ignore_eos: false,
            logprobs: true,
            token_bytes: true,
            ..base.clone()
        };
        let modes = [
            speculation(Mode::Off, None),
            speculation(Mode::Auto, None),
            speculation(Mode::Fixed, Some(8)),
        ];
        for request in [base, stopping, greedy(PROMPT, 20)] {
            let expected = alone(&client, &request).await;
            for speculation in modes {
                let request = samples_of(request.clone(), N);
                let request = v1::GenerateRequest { speculation, ..request };
                let streamed = stream_samples(&client, request.clone()).await.unwrap();
                assert_same(&streamed, &expected, "streamed");
                let unary = complete_samples(&client, request.clone()).await.unwrap();
                assert_same(&unary, &expected, "unary");
                let off = v1::GenerateRequest { no_prefix_reuse: true, ..request };
                let unshared = stream_samples(&client, off).await.unwrap();
                assert_same(&unshared, &expected, "without reuse");
            }
        }
        let texts = |answers: &[Answer]| answers.iter().map(|a| a.text.clone()).collect::<Vec<_>>();
        let drawn = stream_samples(&client, samples_of(sampled(PROMPT, 48, 12), N)).await.unwrap();
        let mut different = texts(&drawn);
        different.sort_unstable();
        different.dedup();
        assert!(different.len() > 1, "all samples are the same: {different:?}");
        server.stop().await.unwrap();
    });
}

#[test]
fn samples_share_the_prompt_even_where_others_may_not() {
    block_on(async {
        let server = start(|_| {}).await;
        let request = samples_of(sampled(PROMPT, 16, 1), N);
        let request = v1::GenerateRequest { no_prefix_reuse: true, ..request };
        let answers = stream_samples(&client(&server), request).await.unwrap();
        let prompt_len = answers[0].started.prompt_tokens;
        assert_eq!(answers[0].cached_len(), 0, "nobody was before it");
        for answer in &answers[1..] {
            assert_eq!(answer.cached_len(), prompt_len - 1, "all but what has to be computed");
        }
        server.stop().await.unwrap();
    });
}

/// Places for four requests in all, and blocks for two contexts.
fn four_places(flags: &mut ModelFlags) {
    flags.max_running = 2;
    flags.max_waiting = 2;
    flags.kv_blocks = Some(128);
}

fn long(id: &str) -> v1::GenerateRequest {
    let request_id = Some(id.to_owned());
    let request = samples_of(sampled("fn main() {", LONG, 5), N);
    v1::GenerateRequest { request_id, logprobs: true, token_bytes: true, ..request }
}

async fn open(client: &Client, request: v1::GenerateRequest) -> Streaming<v1::GenerateEvent> {
    client.clone().generate(request).await.unwrap().into_inner()
}

#[test]
fn a_call_that_is_dropped_gives_everything_back() {
    block_on(async {
        let server = start(four_places).await;
        let (client, narrow) = (client(&server), narrow_client(&url(&server)).await);
        for num_events in [0, 1, 2, 5, 9] {
            let mut events = open(&narrow, long("dropped")).await;
            for _ in 0..num_events {
                events.message().await.unwrap();
            }
            drop(events);
            until_taken(&client, &samples_of(greedy(PROMPT, 4), N)).await;
        }
        for _ in 0..5 {
            let call = tokio::spawn({
                let client = client.clone();
                async move { drop(complete_samples(&client, long("unary")).await) }
            });
            tokio::task::yield_now().await;
            call.abort();
            until_taken(&client, &samples_of(greedy(PROMPT, 4), N)).await;
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn an_aborted_call_ends_all_its_samples_and_gives_everything_back() {
    block_on(async {
        let server = start(four_places).await;
        let (client, narrow) = (client(&server), narrow_client(&url(&server)).await);
        let mut events = open(&narrow, long("mine")).await;
        let ids = v1::AbortRequest { request_ids: vec!["mine".to_owned()] };
        let aborted = client.clone().abort(ids.clone()).await.unwrap().into_inner().aborted;
        assert_eq!(aborted, 1, "all samples are one request");
        assert_eq!(client.clone().abort(ids).await.unwrap().into_inner().aborted, 0);
        until_taken(&client, &samples_of(greedy(PROMPT, 4), N)).await;
        let (_, status) = read_on(&mut events, Vec::new()).await;
        let status = status.expect("it was aborted");
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Cancelled, "ABORTED"));
        server.stop().await.unwrap();
    });
}

fn assert_full(status: &Status) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(["QUEUE_FULL", "TOO_MANY_REQUESTS"].contains(&reason(status).as_str()), "{status:?}");
    assert!(status.get_error_details().retry_info().is_some(), "{status:?}");
}

#[test]
fn samples_are_taken_together_or_not_at_all() {
    block_on(async {
        let server = start(four_places).await;
        let (client, narrow) = (client(&server), narrow_client(&url(&server)).await);
        let one = v1::GenerateRequest { n: None, ..long("one") };
        for _ in 0..5 {
            let running = open(&narrow, one.clone()).await;
            // Three places are left, and the fourth sample has none.
            let refused = client.clone().generate(long("four")).await;
            assert_full(&refused.map(drop).expect_err("there are four places in all"));
            let three = stream_samples(&client, samples_of(greedy(PROMPT, 4), 3)).await;
            assert_eq!(three.expect("those that were taken are back").len(), 3);
            drop(running);
            until_taken(&client, &samples_of(greedy(PROMPT, 4), N)).await;
        }
        let never = complete(&client, samples_of(greedy(PROMPT, 4), 5)).await;
        let never = never.expect_err("there are four places in all");
        assert_eq!(never.code(), Code::ResourceExhausted);
        assert_eq!(reason(&never), "OVER_PLACES");
        assert!(never.message().contains('5') && never.message().contains('4'), "{never:?}");
        let details = never.get_error_details();
        assert!(details.retry_info().is_none(), "it would fail again");
        let quota = details.quota_failure().unwrap().violations[0].description.clone();
        assert!(quota.contains('5') && quota.contains('4'), "{quota}");
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "n");
        server.stop().await.unwrap();
    });
}

#[test]
fn the_deadline_of_a_call_is_that_of_each_sample() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let whole = stream_samples(&client, samples_of(sampled("fn", LONG, 5), N)).await.unwrap();
        let mut was_late = false;
        for timeout in ["5m", "10m", "20m", "40m", "80m", "160m"] {
            let mut call = tonic::Request::new(samples_of(sampled("fn", LONG, 5), N));
            call.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
            let Ok(answer) = client.clone().generate(call).await else { continue };
            let mut events = answer.into_inner();
            let mut received = vec![Vec::new(); N as usize];
            let end = loop {
                match events.message().await {
                    Ok(Some(event)) => {
                        if let Some(v1::generate_event::Event::Tokens(tokens)) = event.event {
                            let ids = tokens.tokens.iter().map(|token| token.id);
                            received[tokens.sample as usize].extend(ids);
                        }
                    }
                    Ok(None) => break None,
                    Err(status) => break Some(status),
                }
            };
            let Some(status) = end else { continue };
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
            was_late |= received.iter().all(|sample| !sample.is_empty());
            for (sample, whole) in received.iter().zip(&whole) {
                assert!(whole.ids().starts_with(sample), "{sample:?}");
                assert_eq!(whole.finished.reason(), FinishReason::Length);
            }
        }
        assert!(was_late, "no deadline came in the middle");
        server.stop().await.unwrap();
    });
}
