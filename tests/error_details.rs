//! Proves what an error says beyond its message, over the wire: a field for people's forms, a
//! reason for programs, when to try again, what is full, and the id to ask about.

use std::time::Duration;

use slipstream_proto::v1;
use slipstream_proto::v1::models_client::ModelsClient;
use slipstream_proto::v1::tokenization_client::TokenizationClient;
use slipstream_server::local::LocalServer;
use slipstream_tests::client::{
    block_on, client, config, greedy, narrow_client, start, stream, url,
};
use slipstream_tests::held_loading::HeldLoading;
use slipstream_tests::raw_call::{GRPC, post, reason, whole};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

const PROMPT: &str = "fn main() {";

/// What every error has.
fn assert_known_as(status: &Status, request_id: &str, why: &str) {
    let details = status.get_error_details();
    assert_eq!(reason(status), why, "{status:?}");
    assert_eq!(details.error_info().unwrap().domain, "slipstream");
    assert_eq!(details.request_info().unwrap().request_id, request_id);
    assert_eq!(status.metadata().get("x-request-id").unwrap(), request_id);
}

/// What an error has that may pass.
fn assert_retry(status: &Status, delay: Duration) {
    let retry = status.get_error_details().retry_info().unwrap().retry_delay;
    assert_eq!(retry, Some(delay), "{status:?}");
    let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap();
    assert_eq!(pushback.to_str().unwrap(), delay.as_millis().to_string());
}

#[test]
fn a_wrong_field_is_named_for_programs() {
    block_on(async {
        let server = start(|_| {}).await;
        let named = |request| v1::GenerateRequest { request_id: Some("r".to_owned()), ..request };
        let cases = [
            (
                v1::GenerateRequest { top_k: -1, ..greedy(PROMPT, 8) },
                "top_k",
                Code::InvalidArgument,
                "INVALID_FIELD",
            ),
            (
                v1::GenerateRequest { stop_token_ids: vec![0, 5000], ..greedy(PROMPT, 8) },
                "stop_token_ids[1]",
                Code::InvalidArgument,
                "INVALID_FIELD",
            ),
            (greedy(PROMPT, 5000), "max_tokens", Code::OutOfRange, "OVER_CONTEXT"),
        ];
        for (request, field, code, why) in cases {
            let status = stream(&client(&server), named(request)).await.expect_err(field);
            assert_eq!(status.code(), code);
            assert_known_as(&status, "r", why);
            let details = status.get_error_details();
            let [violation] = &details.bad_request().unwrap().field_violations[..] else {
                panic!("one field is wrong: {details:?}")
            };
            assert_eq!(violation.field, field);
            assert!(status.message().ends_with(&violation.description), "{details:?}");
            assert!(details.retry_info().is_none(), "it would fail again");
        }
        let other = v1::GenerateRequest { model: "gpt".to_owned(), ..greedy(PROMPT, 8) };
        let status = stream(&client(&server), named(other)).await.expect_err("not served");
        assert_known_as(&status, "r", "UNKNOWN_MODEL");
        let resource = status.get_error_details().resource_info().unwrap().clone();
        assert_eq!(
            (resource.resource_type.as_str(), resource.resource_name.as_str()),
            ("model", "gpt")
        );
        server.stop().await.unwrap();
    });
}

/// What the server has too little of, in numbers.
fn quota(status: &Status) -> String {
    let quota = status.get_error_details().quota_failure().unwrap().clone();
    let [violation] = &quota.violations[..] else { panic!("one thing is too small: {quota:?}") };
    format!("{}: {}", violation.subject, violation.description)
}

#[test]
fn what_never_fits_the_memory_is_told_with_numbers_and_no_time_to_come_back() {
    block_on(async {
        // 32 blocks of 16 positions; the context has 1024.
        let server = start(|flags| flags.kv_blocks = Some(32)).await;
        let client = client(&server);
        let ids = |num| {
            let ids = v1::TokenIds { ids: vec![5; num] };
            Some(v1::generate_request::Prompt::TokenIds(ids))
        };
        let request = |num, max_tokens| v1::GenerateRequest {
            prompt: ids(num),
            max_tokens,
            request_id: Some("r".to_owned()),
            ..greedy("", 1)
        };
        for (num, max_tokens, field, needed) in [
            (400, Some(113), "max_tokens", "513 needed, 512 in all"),
            (300, None, "max_tokens", "556 needed, 512 in all"),
            (512, Some(1), "prompt", "513 needed, 512 in all"),
            (1000, Some(24), "prompt", "1024 needed, 512 in all"),
        ] {
            let status = stream(&client, request(num, max_tokens)).await.expect_err(field);
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            assert_known_as(&status, "r", "OVER_KV_POOL");
            assert_eq!(quota(&status), format!("positions of the KV pool: {needed}"));
            for part in [num.to_string().as_str(), "512", "KV pool"] {
                assert!(status.message().contains(part), "{status:?} without {part}");
            }
            let details = status.get_error_details();
            assert_eq!(details.bad_request().unwrap().field_violations[0].field, field);
            assert!(details.retry_info().is_none(), "it would fail again");
            assert!(status.metadata().get("grpc-retry-pushback-ms").is_none(), "{status:?}");
        }
        // What does not fit the model does not depend on the server's memory.
        for (num, max_tokens) in [(1000, 25), (1024, 1), (1025, 1), (1, i32::MAX)] {
            let status = stream(&client, request(num, Some(max_tokens))).await.expect_err("long");
            assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
            assert_known_as(&status, "r", "OVER_CONTEXT");
        }
        let fits = stream(&client, request(400, Some(112))).await.unwrap();
        assert_eq!(fits.tokens.len(), 112);
        server.stop().await.unwrap();
    });
}

/// A prompt that nobody else asks with and that takes many steps.
fn long_prompt(seed: u32) -> v1::GenerateRequest {
    let ids = (0..1000).map(|index| (index * 7 + seed * 13) % 1000 + 5).collect();
    let prompt = v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids });
    v1::GenerateRequest { prompt: Some(prompt), no_prefix_reuse: true, ..greedy("", 2) }
}

#[test]
fn a_deadline_that_cannot_be_met_is_told_at_once() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let mut first_token_ms = f64::MAX;
        for seed in 0..5 {
            // The engine learns what prompts cost, and so do we.
            let answer = stream(&client, long_prompt(seed)).await.unwrap();
            let timings = answer.finished.timings.unwrap();
            first_token_ms = first_token_ms.min(timings.first_token_ms.unwrap());
        }
        let mut reasons = Vec::new();
        for seed in 5..25 {
            let mut call = Request::new(long_prompt(seed));
            let timeout_us = (first_token_ms * 1000.0 / 3.0) as u64;
            let timeout = format!("{timeout_us}u").parse().unwrap();
            call.metadata_mut().insert("grpc-timeout", timeout);
            let Err(status) = client.clone().generate(call).await else { continue };
            // The client's own timer may be first, with a status of its own.
            let is_late = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled);
            assert!(is_late, "{status:?}");
            if status.get_error_details().error_info().is_none() {
                continue;
            }
            reasons.push(reason(&status));
            if reason(&status) == "DEADLINE_TOO_SHORT" {
                assert_eq!(status.code(), Code::DeadlineExceeded);
                assert!(status.get_error_details().retry_info().is_none(), "{status:?}");
                let numbers = status.message().split(|c: char| !c.is_ascii_digit());
                let numbers: Vec<u64> = numbers.filter_map(|text| text.parse().ok()).collect();
                assert!(matches!(numbers[..], [left, needed] if left < needed), "{status:?}");
            }
        }
        let is_told = reasons.iter().any(|reason| reason == "DEADLINE_TOO_SHORT");
        assert!(is_told, "of {first_token_ms} ms a third was enough: {reasons:?}");
        server.stop().await.unwrap();
    });
}

#[test]
fn a_bad_id_is_refused_wherever_it_stands() {
    block_on(async {
        let server = start(|_| {}).await;
        let bad = ["", "a b", "\u{7f}", &"i".repeat(129)];
        for id in bad {
            let request =
                v1::GenerateRequest { request_id: Some(id.to_owned()), ..greedy(PROMPT, 2) };
            let mut request = Request::new(request);
            request.metadata_mut().insert("x-request-id", "good".parse().unwrap());
            let status = client(&server).generate(request).await.expect_err(id);
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
            assert!(status.message().starts_with("request_id:"), "{status:?}");
            assert_known_as(&status, "good", "INVALID_FIELD");
        }
        let bad_headers = ["", "a b", &"i".repeat(129)];
        for path in ["Completions/Generate", "Models/List", "Tokenization/Tokenize"] {
            for id in bad_headers {
                let headers = [("content-type", GRPC), ("x-request-id", id)];
                let path = format!("/slipstream.v1.{path}");
                let status = post(&server, &path, &headers, whole(b"")).await.status();
                assert_eq!(status.code(), Code::InvalidArgument, "{path} {id:?}: {status:?}");
                assert!(status.message().starts_with("x-request-id:"), "{status:?}");
                let violation = status.get_error_details().bad_request().unwrap().clone();
                assert_eq!(violation.field_violations[0].field, "x-request-id");
                assert_ne!(status.metadata().get("x-request-id").unwrap().to_str().unwrap(), id);
            }
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn a_full_queue_says_how_full_and_when_to_come_back() {
    block_on(async {
        let server = start(|flags| {
            flags.max_running = 1;
            flags.max_waiting = 2;
        })
        .await;
        let client = narrow_client(&url(&server)).await;
        let mut running = Vec::new();
        let status = loop {
            match client.clone().generate(greedy(PROMPT, 1000)).await {
                Ok(call) => running.push(call),
                Err(status) => break status,
            }
            assert!(running.len() < 200, "3 are the limit, however fast they end");
        };
        assert_eq!(status.code(), Code::ResourceExhausted);
        let id = status.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
        assert!(["QUEUE_FULL", "TOO_MANY_REQUESTS"].contains(&reason(&status).as_str()));
        assert_known_as(&status, &id, &reason(&status));
        // The engine's own estimate.
        let retry = status.get_error_details().retry_info().unwrap().retry_delay.unwrap();
        assert!(!retry.is_zero() && retry < Duration::from_secs(3600), "{retry:?}");
        assert_retry(&status, retry);
        let quota = status.get_error_details().quota_failure().unwrap().clone();
        assert!(quota.violations[0].description.contains("3 of 3"), "{quota:?}");
        drop(running);
        server.stop().await.unwrap();
    });
}

#[test]
fn a_server_that_loads_says_when_to_come_back() {
    block_on(async {
        let held = HeldLoading::begin();
        let server = LocalServer::start_loading(config(|_| {})).await.unwrap();
        let mut models = ModelsClient::new(server.channel());
        let mut tokens = TokenizationClient::new(server.channel());
        let refused = [
            stream(&client(&server), greedy(PROMPT, 2)).await.map(drop),
            models.list(v1::ListModelsRequest {}).await.map(drop),
            models.get(v1::GetModelRequest::default()).await.map(drop),
            tokens.tokenize(v1::TokenizeRequest::default()).await.map(drop),
            tokens.detokenize(v1::DetokenizeRequest::default()).await.map(drop),
        ];
        for result in refused {
            let status = result.expect_err("the models are not there");
            assert_eq!(status.code(), Code::Unavailable);
            assert_eq!(reason(&status), "LOADING");
            assert_retry(&status, Duration::from_secs(2));
        }
        let nobody = v1::AbortRequest { request_ids: vec!["a".to_owned()] };
        let aborted = client(&server).abort(nobody).await.unwrap().into_inner();
        assert_eq!(aborted.aborted, 0);
        drop(held);
        server.stop().await.unwrap();
    });
}

#[test]
fn the_status_behind_a_stream_has_its_details_too() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.grace = Duration::ZERO;
        let server = LocalServer::start(settings).await.unwrap();
        let mut streams = Vec::new();
        for index in 0..16 {
            let id = Some(format!("r-{index}"));
            let request = v1::GenerateRequest { request_id: id, ..greedy(PROMPT, 1000) };
            streams.push(client(&server).generate(request).await.unwrap().into_inner());
        }
        let readers = async {
            let mut num_cut = 0;
            for (index, events) in streams.iter_mut().enumerate() {
                while let Some(event) = events.message().await.transpose() {
                    if let Err(status) = event {
                        num_cut += 1;
                        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                        assert_known_as(&status, &format!("r-{index}"), "SHUTTING_DOWN");
                        assert_retry(&status, Duration::from_secs(1));
                        break;
                    }
                }
            }
            num_cut
        };
        let (stopped, num_cut) = tokio::join!(server.stop(), readers);
        stopped.unwrap();
        assert!(num_cut > 0, "16 completions were faster than the stop");
    });
}
