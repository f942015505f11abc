//! Proves what a gRPC client may rely on: the order and content of events, one status per call,
//! replay by seed, resumption at every cut, stops, and neighbours that do not matter. Real server,
//! real connection, micro pair.

use slipstream_model::load::{LoadOptions, ModelSource, load};
use slipstream_model::tokenizer::Tokenizer;
use slipstream_proto::v1;
use slipstream_proto::v1::finished::Cause;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use slipstream_proto::v1::{FinishReason, Provenance};
use slipstream_tests::client::{
    Answer, Client, block_on, client, complete, greedy, sampled, speculation, start, stream,
};
use slipstream_tests::micro_pair;
use tokio::task::JoinSet;

const PROMPT: &str = "impl fmt::Display for Error {\n    fn fmt(&self, ";

/// Everything an answer says about itself agrees.
fn assert_consistent(answer: &Answer, prefix_len: usize) {
    let usage = answer.finished.usage.unwrap();
    let timings = answer.finished.timings.unwrap();
    let speculation = answer.speculation();
    assert_eq!(usage.output_tokens as usize, answer.tokens.len());
    assert_eq!(usage.prefix_tokens as usize, prefix_len);
    assert_eq!(usage.prompt_tokens, answer.started.prompt_tokens);
    assert!(timings.queue_ms.unwrap() <= timings.first_token_ms.unwrap());
    assert!(timings.first_token_ms.unwrap() <= timings.total_ms);
    assert_eq!(speculation.proposed, speculation.proposed_by_position.iter().sum::<u32>());
    assert_eq!(speculation.accepted, speculation.accepted_by_position.iter().sum::<u32>());
    let pairs = speculation.proposed_by_position.iter().zip(&speculation.accepted_by_position);
    assert!(pairs.clone().all(|(proposed, accepted)| accepted <= proposed));
    assert!(speculation.steps as usize <= answer.tokens.len());
    let count =
        |provenance| answer.tokens.iter().filter(|token| token.provenance() == provenance).count();
    assert_eq!(count(Provenance::Unspecified), 0);
    assert!(count(Provenance::Accepted) <= speculation.accepted as usize);
    for token in &answer.tokens {
        let is_plain = token.provenance() == Provenance::Plain;
        assert_eq!(token.draft_epoch.is_none(), is_plain, "{token:?}");
    }
}

#[test]
fn stream_and_unary_agree_and_add_up() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let request = v1::GenerateRequest {
            request_id: Some("walk-1".to_owned()),
            token_bytes: true,
            logprobs: true,
            ..greedy(PROMPT, 60)
        };
        let streamed = stream(&client, request.clone()).await.unwrap();
        let unary = complete(&client, request).await.unwrap();
        assert_eq!(streamed.bytes(), unary.bytes());
        assert_eq!(streamed.started, unary.started);
        assert_consistent(&streamed, 0);
        assert_consistent(&unary, 0);
        assert_eq!(streamed.started.request_id, "walk-1");
        assert_eq!(streamed.started.seed, 1);
        assert!(streamed.started.fingerprint.starts_with('n'), "{}", streamed.started.fingerprint);
        assert_eq!(streamed.finished.reason(), FinishReason::Length);
        assert_eq!(streamed.tokens.len(), 60);
        assert!(streamed.speculation().accepted > 0, "the draft was of no use at all");
        assert!(streamed.tokens.iter().all(|token| token.logprob.unwrap() <= 0.0));
        let bytes: Vec<u8> =
            streamed.tokens.iter().flat_map(|token| token.bytes.clone().unwrap()).collect();
        assert_eq!(String::from_utf8_lossy(&bytes), streamed.text);
        server.stop().await.unwrap();
    });
}

#[test]
fn extras_come_only_when_asked_for() {
    block_on(async {
        let server = start(|_| {}).await;
        let answer = stream(&client(&server), greedy(PROMPT, 8)).await.unwrap();
        assert!(answer.tokens.iter().all(|token| token.logprob.is_none() && token.bytes.is_none()));
        server.stop().await.unwrap();
    });
}

#[test]
fn drawn_seeds_and_ids_are_returned_and_seeds_replay() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let open = v1::GenerateRequest { seed: None, ..sampled(PROMPT, 48, 0) };
        let first = stream(&client, open.clone()).await.unwrap();
        let second = stream(&client, open.clone()).await.unwrap();
        assert_ne!(first.started.seed, second.started.seed);
        assert_ne!(first.started.request_id, second.started.request_id);
        assert_ne!(first.text, second.text, "two draws gave one completion");
        let seed = Some(first.started.seed);
        let replay = stream(&client, v1::GenerateRequest { seed, ..open.clone() }).await.unwrap();
        assert_eq!(replay.bytes(), first.bytes());
        let other = v1::GenerateRequest { seed, sample_index: 1, ..open };
        assert_ne!(stream(&client, other).await.unwrap().text, first.text);
        server.stop().await.unwrap();
    });
}

#[test]
fn absent_fields_mean_their_documented_defaults() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let absent = v1::GenerateRequest {
            prompt: Some(Prompt::Text(PROMPT.to_owned())),
            ignore_eos: true,
            seed: Some(9),
            ..v1::GenerateRequest::default()
        };
        let spelled_out = v1::GenerateRequest {
            max_tokens: Some(256),
            temperature: Some(1.0),
            top_p: Some(1.0),
            repetition_penalty: Some(1.0),
            model: "".to_owned(),
            speculation: speculation(Mode::Auto, None),
            ..absent.clone()
        };
        let one = stream(&client, absent).await.unwrap();
        assert_eq!(one.tokens.len(), 256);
        assert_eq!(one.bytes(), stream(&client, spelled_out).await.unwrap().bytes());
        server.stop().await.unwrap();
    });
}

#[test]
fn the_output_continues_identically_at_every_cut() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let requests = [
            greedy(PROMPT, 40),
            sampled(PROMPT, 40, 3),
            v1::GenerateRequest {
                repetition_penalty: Some(1.2),
                frequency_penalty: 0.3,
                min_tokens: 10,
                ignore_eos: false,
                stop_strings: vec!["fn".to_owned(), "}\n}".to_owned()],
                ..sampled(PROMPT, 40, 4)
            },
        ];
        for request in requests {
            let whole = stream(&client, request.clone()).await.unwrap();
            for cut in 0..=whole.tokens.len() {
                let (prefix, rest) = whole.tokens.split_at(cut);
                let output_prefix: Vec<u32> = prefix.iter().map(|token| token.id).collect();
                let resumed = v1::GenerateRequest { output_prefix, ..request.clone() };
                let resumed = stream(&client, resumed).await.unwrap();
                let rest: Vec<u32> = rest.iter().map(|token| token.id).collect();
                assert_eq!(resumed.ids(), rest, "cut at {cut}");
                assert!(whole.text.ends_with(&resumed.text), "cut at {cut}");
                assert_eq!(resumed.finished.reason, whole.finished.reason, "cut at {cut}");
                assert_eq!(resumed.finished.cause, whole.finished.cause, "cut at {cut}");
                assert_eq!(resumed.finished.usage.unwrap().prefix_tokens as usize, cut);
            }
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn a_stop_string_cuts_text_ids_and_usage_alike() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let plain = v1::GenerateRequest { token_bytes: true, ..greedy(PROMPT, 48) };
        let whole = stream(&client, plain.clone()).await.unwrap();
        for begin in (0..whole.text.len() - 3).filter(|at| whole.text.is_char_boundary(*at)) {
            let Some(stop) = whole.text.get(begin..begin + 3) else { continue };
            let cut = whole.text.find(stop).unwrap();
            let request = v1::GenerateRequest {
                stop_strings: vec!["\u{0}never".to_owned(), stop.to_owned()],
                logprobs: true,
                ..plain.clone()
            };
            let answer = stream(&client, request).await.unwrap();
            assert_eq!(answer.text, whole.text[..cut], "stop {stop:?}");
            assert_eq!(answer.finished.reason(), FinishReason::StopString);
            assert_eq!(answer.finished.cause, Some(Cause::StopString(stop.to_owned())));
            assert_consistent_cut(&answer, &whole, cut);
        }
        server.stop().await.unwrap();
    });
}

/// The tokens are those of the whole answer that have a byte before the cut.
fn assert_consistent_cut(answer: &Answer, whole: &Answer, cut: usize) {
    let mut begin = 0;
    let mut expected = Vec::new();
    for token in &whole.tokens {
        let len = token.bytes.as_ref().unwrap().len();
        if begin < cut && len > 0 {
            expected.push(token.id);
        }
        begin += len;
    }
    assert_eq!(answer.ids(), expected);
    assert_eq!(answer.finished.usage.unwrap().output_tokens as usize, expected.len());
}

#[test]
fn a_stop_id_ends_the_output_and_is_not_part_of_it() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let whole = stream(&client, greedy(PROMPT, 40)).await.unwrap().ids();
        for stop in &whole {
            let first = whole.iter().position(|id| id == stop).unwrap();
            let request = v1::GenerateRequest { stop_token_ids: vec![*stop], ..greedy(PROMPT, 40) };
            let answer = stream(&client, request).await.unwrap();
            assert_eq!(answer.ids(), whole[..first]);
            assert_eq!(answer.finished.reason(), FinishReason::EndToken);
            assert_eq!(answer.finished.cause, Some(Cause::EndTokenId(*stop)));
        }
        server.stop().await.unwrap();
    });
}

/// The tokenizer of the verifier, from its file.
fn verifiers_tokenizer() -> Tokenizer {
    let source = ModelSource::Path(micro_pair::VERIFIER.into());
    load(source, &LoadOptions::default(), &mut |_| {}).unwrap().tokenizer
}

#[test]
fn text_and_its_token_ids_are_the_same_prompt() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let tokenizer = verifiers_tokenizer();
        for prompt in
            [PROMPT, "fn", "\u{e9}t\u{e9} \u{1f980}\n", "let x = vec![0u8; 1 << 12];\n    "]
        {
            let by_text = stream(&client, greedy(prompt, 24)).await.unwrap();
            let ids: Vec<u32> =
                tokenizer.encode(prompt, true).unwrap().iter().map(|id| id.0).collect();
            assert_eq!(by_text.started.prompt_tokens as usize, ids.len(), "{prompt:?}");
            let prompt_ids = Some(Prompt::TokenIds(v1::TokenIds { ids }));
            let by_ids = v1::GenerateRequest { prompt: prompt_ids, ..greedy("", 24) };
            let by_ids = stream(&client, by_ids).await.unwrap();
            assert_eq!(by_text.started.prompt_tokens, by_ids.started.prompt_tokens);
            assert_eq!(by_text.bytes(), by_ids.bytes(), "{prompt:?}");
        }
        server.stop().await.unwrap();
    });
}

async fn all_at_once(client: &Client, requests: &[v1::GenerateRequest]) -> Vec<Answer> {
    let mut calls = JoinSet::new();
    for (index, request) in requests.iter().cloned().enumerate() {
        let client = client.clone();
        calls.spawn(async move { (index, stream(&client, request).await.unwrap()) });
    }
    let mut answers = vec![Answer::default(); requests.len()];
    while let Some(answer) = calls.join_next().await {
        let (index, answer) = answer.unwrap();
        answers[index] = answer;
    }
    answers
}

#[test]
fn neighbours_do_not_matter() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let requests: Vec<v1::GenerateRequest> = (0..24)
            .map(|index| {
                let prompt = &PROMPT.repeat(4)[..10 + 7 * index as usize];
                sampled(prompt, 10 + 2 * index, index as u64)
            })
            .collect();
        let together = all_at_once(&client, &requests).await;
        for (request, together) in requests.iter().zip(&together) {
            let alone = stream(&client, request.clone()).await.unwrap();
            assert_eq!(alone.bytes(), together.bytes());
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn without_a_draft_every_mode_is_plain_and_the_bytes_are_the_same() {
    block_on(async {
        let with = start(|_| {}).await;
        let without = start(|flags| flags.draft_model = Some("none".to_owned())).await;
        for seed in 0..4 {
            let request = v1::GenerateRequest {
                speculation: speculation(Mode::Fixed, Some(5)),
                ..sampled(PROMPT, 40, seed)
            };
            let one = stream(&client(&with), request.clone()).await.unwrap();
            let other = stream(&client(&without), request).await.unwrap();
            assert_eq!(one.bytes(), other.bytes());
            assert_eq!(one.started.fingerprint, other.started.fingerprint);
            assert!(one.speculation().proposed > 0);
            assert_eq!(other.speculation().proposed, 0);
            let is_plain = |token: &v1::Token| token.provenance() == Provenance::Plain;
            assert!(other.tokens.iter().all(is_plain));
        }
        with.stop().await.unwrap();
        without.stop().await.unwrap();
    });
}
