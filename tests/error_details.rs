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
        assert_retry(&status, Duration::from_secs(1));
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
