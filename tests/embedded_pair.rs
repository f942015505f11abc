//! Proves that the pair inside the binary is one: a server that was told nothing about models
//! serves it under its own names, fills its context, and speculation with it finds tokens and
//! changes nothing. All else is proven on the micro pair, which is faster.

use slipstream_proto::v1;
use slipstream_proto::v1::models_client::ModelsClient;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::local::LocalServer;
use slipstream_tests::client::{
    block_on, client, embedded_config, greedy, sampled, speculation, stream,
};
use tokio::task::JoinSet;

const PROMPT: &str = "impl fmt::Display for Error {\n    fn fmt(&self, ";
/// Vocabulary and context of the verifier.
const VOCAB_SIZE: u32 = 4096;
const CONTEXT_LEN: u32 = 2048;

async fn start() -> LocalServer {
    LocalServer::start(embedded_config()).await.expect("the embedded pair starts")
}

#[test]
fn it_is_served_under_its_own_names() {
    block_on(async {
        let server = start().await;
        let request = v1::GetModelRequest::default();
        let model = ModelsClient::new(server.channel()).get(request).await.unwrap().into_inner();
        assert_eq!((model.vocab_size, model.context_len), (VOCAB_SIZE, CONTEXT_LEN));
        let draft = model.draft.unwrap().name;
        for (name, role) in [(&model.name, "verifier"), (&draft, "draft")] {
            assert!(name.starts_with("slipstream ") && name.ends_with(role), "{name}");
        }
        let started = stream(&client(&server), greedy(PROMPT, 2)).await.unwrap().started;
        assert_eq!(started.model, model.name);
        server.stop().await.unwrap();
    });
}

#[test]
fn speculation_with_it_is_accepted_and_changes_nothing() {
    block_on(async {
        let server = start().await;
        let requests = (0..6).map(|seed| sampled(PROMPT, 48, seed)).chain([greedy(PROMPT, 48)]);
        let mut calls = JoinSet::new();
        for request in requests {
            let client = client(&server);
            calls.spawn(async move {
                let off = speculation(Mode::Off, None);
                let plain = v1::GenerateRequest { speculation: off, ..request.clone() };
                let plain = stream(&client, plain).await.unwrap();
                let mut num_accepted = 0;
                for draft_len in [1, 4, 8] {
                    let fixed = speculation(Mode::Fixed, Some(draft_len));
                    let request = v1::GenerateRequest { speculation: fixed, ..request.clone() };
                    let answer = stream(&client, request).await.unwrap();
                    assert_eq!(answer.bytes(), plain.bytes(), "draft length {draft_len}");
                    num_accepted += answer.speculation().accepted;
                }
                num_accepted
            });
        }
        let num_accepted: u32 = calls.join_all().await.iter().sum();
        assert!(num_accepted > 0, "the draft is of no use at all");
        server.stop().await.unwrap();
    });
}

#[test]
fn its_whole_context_can_be_filled() {
    block_on(async {
        let server = start().await;
        let client = client(&server);
        let prompt_len = stream(&client, greedy(PROMPT, 1)).await.unwrap().started.prompt_tokens;
        let left = i32::try_from(CONTEXT_LEN - prompt_len).unwrap();
        let answer = stream(&client, sampled(PROMPT, left, 1)).await.unwrap();
        assert_eq!(answer.tokens.len(), left as usize);
        let more = stream(&client, sampled(PROMPT, left + 1, 1)).await.unwrap_err();
        assert_eq!(more.code(), tonic::Code::OutOfRange, "{more:?}");
        server.stop().await.unwrap();
    });
}
