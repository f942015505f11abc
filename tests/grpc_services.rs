//! Proves what is beside completions: models and tokenisation tell what completions do, reflection
//! tells what there is and nothing else, every answer carries its id, and compression is used only
//! where it is allowed.

use std::collections::BTreeSet;

use prost::Message;
use reflection::server_reflection_request::MessageRequest;
use reflection::server_reflection_response::MessageResponse;
use slipstream_proto::v1;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::models_client::ModelsClient;
use slipstream_proto::v1::tokenization_client::TokenizationClient;
use slipstream_server::local::LocalServer;
use slipstream_tests::client::{block_on, client, config, greedy, start, stream};
use slipstream_tests::raw_call::{GRPC, post, reason, whole};
use tokio_stream::{StreamExt, once};
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_reflection::pb::{v1 as reflection, v1alpha as reflection_alpha};

const PROMPT: &str = "impl fmt::Display for Error {\n    fn fmt(&self, ";

#[test]
fn models_tell_what_completions_say() {
    block_on(async {
        let server = start(|_| {}).await;
        let started = stream(&client(&server), greedy(PROMPT, 2)).await.unwrap().started;
        let mut models = ModelsClient::new(server.channel());
        let listed = models.list(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
        let [model] = listed.as_slice() else { panic!("one model, got {listed:?}") };
        assert_eq!((&model.name, &model.fingerprint), (&started.model, &started.fingerprint));
        assert_eq!((model.vocab_size, model.context_len, model.draft_len_max), (1024, 1024, 8));
        assert_eq!(model.vocabulary_fingerprint.len(), 16);
        assert!(!model.eos_token_ids.is_empty());
        assert_eq!(model.draft.as_ref().unwrap().epoch, 1);
        for name in ["", &model.name] {
            let request = v1::GetModelRequest { name: name.to_owned() };
            assert_eq!(&models.get(request).await.unwrap().into_inner(), model);
        }
        let other = models.get(v1::GetModelRequest { name: "other".to_owned() }).await;
        assert_eq!(other.expect_err("it is not served").code(), Code::NotFound);
        let long = models.get(v1::GetModelRequest { name: "n".repeat(257) }).await;
        let long = long.expect_err("no name is so long");
        assert_eq!(long.code(), Code::InvalidArgument);
        assert!(long.message().contains("name") && long.message().contains("256"), "{long:?}");
        server.stop().await.unwrap();
        let lone = start(|flags| flags.draft_model = Some("none".to_owned())).await;
        let request = v1::GetModelRequest::default();
        let model = ModelsClient::new(lone.channel()).get(request).await.unwrap().into_inner();
        assert_eq!(model.draft, None);
        lone.stop().await.unwrap();
    });
}

fn tokenize(text: &str) -> v1::TokenizeRequest {
    v1::TokenizeRequest { text: text.to_owned(), ..v1::TokenizeRequest::default() }
}

#[test]
fn tokens_are_those_of_completions_and_come_back_as_text() {
    block_on(async {
        let server = start(|_| {}).await;
        let mut tokens = TokenizationClient::new(server.channel());
        let texts =
            [PROMPT, " ", "\u{e9}t\u{e9} \u{1f980}\n", "\0\t<s></s><unk>", &"x y ".repeat(50)];
        for text in texts {
            let request = v1::TokenizeRequest { token_bytes: true, ..tokenize(text) };
            let answer = tokens.tokenize(request).await.unwrap().into_inner();
            let by_text = stream(&client(&server), greedy(text, 12)).await.unwrap();
            assert_eq!(by_text.started.prompt_tokens as usize, answer.token_ids.len(), "{text:?}");
            let ids = v1::TokenIds { ids: answer.token_ids.clone() };
            let by_ids =
                v1::GenerateRequest { prompt: Some(Prompt::TokenIds(ids)), ..greedy("", 12) };
            let by_ids = stream(&client(&server), by_ids).await.unwrap();
            assert_eq!(by_text.bytes(), by_ids.bytes(), "{text:?}");
            let token_ids = answer.token_ids;
            let request = v1::DetokenizeRequest { token_ids, model: String::new() };
            let back = tokens.detokenize(request).await.unwrap().into_inner();
            assert_eq!(back.bytes, answer.token_bytes.concat(), "{text:?}");
            assert_eq!(back.text, String::from_utf8_lossy(&back.bytes), "{text:?}");
            if !text.contains("<s>") {
                assert_eq!(back.text, text);
            }
        }
        let bare = v1::TokenizeRequest { add_special_tokens: Some(false), ..tokenize("") };
        let nothing = tokens.tokenize(bare).await.unwrap().into_inner();
        assert_eq!(nothing, v1::TokenizeResponse::default());
        let none = tokens.detokenize(v1::DetokenizeRequest::default()).await.unwrap().into_inner();
        assert_eq!(none, v1::DetokenizeResponse::default());
        server.stop().await.unwrap();
    });
}

#[test]
fn tokenisation_has_the_bounds_of_prompts() {
    block_on(async {
        let server = start(|_| {}).await;
        let mut tokens = TokenizationClient::new(server.channel());
        assert!(tokens.tokenize(tokenize(&"x".repeat(1 << 20))).await.is_ok());
        let long = tokens.tokenize(tokenize(&"x".repeat((1 << 20) + 1))).await;
        let other = v1::TokenizeRequest { model: "other".to_owned(), ..tokenize("x") };
        let ids = |token_ids| v1::DetokenizeRequest { token_ids, model: String::new() };
        assert!(tokens.detokenize(ids(vec![1023; 1024])).await.is_ok());
        let cases = [
            (long.map(drop), Code::InvalidArgument, ["text", "1048577", "1048576"]),
            (tokens.tokenize(other).await.map(drop), Code::NotFound, ["model", "other", ""]),
            (
                tokens.detokenize(ids(vec![0; 1025])).await.map(drop),
                Code::OutOfRange,
                ["token_ids", "1025", "1024"],
            ),
            (
                tokens.detokenize(ids(vec![0, 1024])).await.map(drop),
                Code::InvalidArgument,
                ["token_ids[1]", "1024", ""],
            ),
        ];
        for (result, code, parts) in cases {
            let status = result.expect_err(parts[0]);
            assert_eq!(status.code(), code, "{status:?}");
            assert!(parts.iter().all(|part| status.message().contains(part)), "{status:?}");
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn no_service_works_past_a_deadline() {
    block_on(async {
        let server = start(|_| {}).await;
        let paths =
            ["Models/List", "Models/Get", "Tokenization/Tokenize", "Tokenization/Detokenize"];
        for path in paths.into_iter().chain(["Completions/Abort", "Completions/Generate"]) {
            let path = format!("/slipstream.v1.{path}");
            for (timeout, why) in [
                ("0n", "DEADLINE_EXCEEDED"),
                ("999n", "DEADLINE_EXCEEDED"),
                ("-1S", "INVALID_FIELD"),
            ] {
                let headers = [("content-type", GRPC), ("grpc-timeout", timeout)];
                let status = post(&server, &path, &headers, whole(b"")).await.status();
                // A transport that keeps deadlines too may be first with a status of its own.
                if status.code() != Code::Cancelled {
                    assert_eq!(reason(&status), why, "{path} {timeout}: {status:?}");
                }
            }
        }
        server.stop().await.unwrap();
    });
}

/// Asks one question of reflection, version 1.
async fn reflect(channel: Channel, question: MessageRequest) -> MessageResponse {
    let request = reflection::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(once(request)).await.unwrap().into_inner();
    answers.next().await.unwrap().unwrap().message_response.unwrap()
}

/// As much of `google.protobuf.FileDescriptorProto` as names its methods.
#[derive(Clone, PartialEq, prost::Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "6")]
    services: Vec<Service>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Service {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    methods: Vec<Method>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Method {
    #[prost(string, tag = "1")]
    name: String,
}

/// The methods of one service, as reflection describes them.
async fn methods_of(channel: Channel, service: &str) -> Vec<String> {
    let answer = reflect(channel, MessageRequest::FileContainingSymbol(service.to_owned())).await;
    let MessageResponse::FileDescriptorResponse(files) = answer else {
        panic!("{service}: {answer:?}")
    };
    let mut methods = Vec::new();
    for file in files.file_descriptor_proto {
        let file = File::decode(file.as_slice()).unwrap();
        for each in file.services {
            let name = format!("{}.{}", file.package, each.name);
            if name == service {
                methods.extend(each.methods.iter().map(|method| format!("{name}/{}", method.name)));
            }
        }
    }
    methods
}

#[test]
fn reflection_knows_exactly_the_methods_there_are() {
    block_on(async {
        let server = start(|_| {}).await;
        let answer = reflect(server.channel(), MessageRequest::ListServices(String::new())).await;
        let MessageResponse::ListServicesResponse(services) = answer else { panic!("{answer:?}") };
        let mut reflected = BTreeSet::new();
        for service in services.service {
            reflected.extend(methods_of(server.channel(), &service.name).await);
        }
        let headers = [("content-type", GRPC)];
        let unknown = post(&server, "/a.B/C", &headers, whole(b"")).await.status();
        let (_, listed) = unknown.message().split_once("gRPC has ").unwrap();
        let (listed, _) = listed.split_once(", on the port").unwrap();
        let listed: BTreeSet<String> = listed.split(", ").map(str::to_owned).collect();
        assert_eq!(listed, reflected);
        assert!(listed.contains("slipstream.v1.Completions/Generate"), "{listed:?}");
        assert!(listed.contains("grpc.health.v1.Health/Check"), "{listed:?}");
        server.stop().await.unwrap();
    });
}

#[test]
fn reflection_answers_in_its_older_version_too() {
    use reflection_alpha::server_reflection_client::ServerReflectionClient;
    use reflection_alpha::server_reflection_request::MessageRequest;
    use reflection_alpha::server_reflection_response::MessageResponse;
    block_on(async {
        let server = start(|_| {}).await;
        let ask = |question| reflection_alpha::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(question),
        };
        let questions = [
            ask(MessageRequest::ListServices(String::new())),
            ask(MessageRequest::FileContainingSymbol("slipstream.v1.Models.Get".to_owned())),
            ask(MessageRequest::FileContainingSymbol("no.such.Symbol".to_owned())),
        ];
        let mut client = ServerReflectionClient::new(server.channel());
        let asked = tokio_stream::iter(questions);
        let mut answers = client.server_reflection_info(asked).await.unwrap().into_inner();
        let mut next = async || answers.next().await.unwrap().map(|a| a.message_response.unwrap());
        let Ok(MessageResponse::ListServicesResponse(services)) = next().await else {
            panic!("not a list")
        };
        assert_eq!(services.service.len(), 6, "{services:?}");
        assert!(matches!(next().await, Ok(MessageResponse::FileDescriptorResponse(_))));
        assert!(matches!(next().await, Err(status) if status.code() == Code::NotFound));
        server.stop().await.unwrap();
    });
}

#[test]
fn what_is_not_there_or_not_grpc_is_said_so() {
    block_on(async {
        let server = start(|_| {}).await;
        let long = format!("/{}/Generate", "x".repeat(3000));
        for path in ["/a.B/C", "/slipstream.v1.Completions/Nothing", &long] {
            let answer = post(&server, path, &[("content-type", GRPC)], whole(b"")).await;
            let status = answer.status();
            assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
            assert_eq!(reason(&status), "UNKNOWN_METHOD");
            assert!(status.message().contains("slipstream.v1.Models/List"), "{status:?}");
            assert!(status.message().len() < 1000, "{status:?}");
            assert!(answer.headers.contains_key("x-request-id"));
        }
        let method = "/slipstream.v1.Completions/Generate";
        let kinds =
            ["application/grpc-web", "application/json", "application/grpc+json", "", "text"];
        for kind in kinds {
            let answer = post(&server, method, &[("content-type", kind)], whole(b"")).await;
            assert_eq!(answer.http_status, 415, "{kind}");
            assert!(answer.body.ends_with(b"application/grpc\n"), "{kind}: {:?}", answer.body);
        }
        for kind in ["application/grpc+proto", "application/grpc;x=y", "Application/GRPC"] {
            let answer = post(&server, method, &[("content-type", kind)], whole(b"")).await;
            assert_eq!(answer.status().code(), Code::InvalidArgument, "{kind}: no prompt");
        }
        let nothing = post(&server, "/nothing", &[], Vec::new()).await;
        assert_eq!(nothing.http_status, 404);
        assert!(nothing.body.starts_with(b"there is nothing"), "{:?}", nothing.body);
        server.stop().await.unwrap();
    });
}

/// A completion whose message, metadata or both name it; what it was known as, twice.
async fn known_as(
    server: &LocalServer,
    message: Option<&str>,
    metadata: Option<&str>,
) -> (String, String) {
    let mut request = Request::new(v1::GenerateRequest {
        request_id: message.map(str::to_owned),
        ..greedy(PROMPT, 2)
    });
    if let Some(id) = metadata {
        request.metadata_mut().insert("x-request-id", id.parse().unwrap());
    }
    let answer = client(server).clone().generate(request).await.unwrap();
    let tagged = answer.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    let first = answer.into_inner().message().await.unwrap().unwrap();
    let Some(v1::generate_event::Event::Started(started)) = first.event else {
        panic!("{first:?}")
    };
    (started.request_id, tagged)
}

#[test]
fn the_message_names_a_request_before_metadata_before_the_server() {
    block_on(async {
        let server = start(|_| {}).await;
        for (message, metadata, expected) in
            [(Some("a"), Some("b"), "a"), (None, Some("b"), "b"), (Some("a"), None, "a")]
        {
            let (started, tagged) = known_as(&server, message, metadata).await;
            assert_eq!((started.as_str(), tagged.as_str()), (expected, expected));
        }
        let (started, tagged) = known_as(&server, None, None).await;
        assert_eq!(started, tagged);
        assert_eq!(started.len(), 32);
        // Every other method, well or ill, has it too.
        let methods = ["slipstream.v1.Models/List", "slipstream.v1.Models/Nothing"];
        for path in methods
            .into_iter()
            .chain(["grpc.health.v1.Health/Check", "slipstream.v1.Completions/Abort"])
        {
            let headers = [("content-type", GRPC), ("x-request-id", "mine")];
            let answer = post(&server, &format!("/{path}"), &headers, whole(b"")).await;
            assert_eq!(answer.headers.get("x-request-id").unwrap(), "mine", "{path}");
        }
        server.stop().await.unwrap();
    });
}

/// A server that allows compression, and one that does not.
async fn with_gzip(gzip: bool) -> LocalServer {
    let mut settings = config(|_| {});
    settings.edge.gzip = gzip;
    LocalServer::start(settings).await.unwrap()
}

#[test]
fn compression_is_used_only_where_it_is_allowed() {
    block_on(async {
        let gzip = CompressionEncoding::Gzip;
        for allowed in [true, false] {
            let server = with_gzip(allowed).await;
            let receiver = client(&server).accept_compressed(gzip);
            let answer = receiver.clone().generate(greedy(PROMPT, 4)).await.unwrap();
            let encoding = answer.metadata().get("grpc-encoding");
            assert_eq!(encoding.is_some_and(|name| name == "gzip"), allowed);
            let sender = receiver.clone().send_compressed(gzip);
            let sent = stream(&sender, greedy(PROMPT, 4)).await;
            match sent {
                Ok(answer) => assert!(allowed && answer.tokens.len() == 4),
                Err(status) => {
                    assert!(!allowed && status.code() == Code::Unimplemented, "{status:?}");
                    assert!(status.metadata().contains_key("x-request-id"));
                }
            }
            server.stop().await.unwrap();
        }
    });
}

#[test]
fn what_decompresses_to_too_much_is_refused() {
    block_on(async {
        let server = with_gzip(true).await;
        let client = client(&server).send_compressed(CompressionEncoding::Gzip);
        let bomb = v1::GenerateRequest { model: "x".repeat(256 << 20), ..greedy(PROMPT, 4) };
        let status: Status = stream(&client, bomb).await.expect_err("256 MiB in 256 KiB");
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert_eq!(reason(&status), "MESSAGE_TOO_LARGE");
        assert!(status.message().contains("4194304"), "{status:?}");
        assert!(stream(&client, greedy(PROMPT, 4)).await.is_ok());
        server.stop().await.unwrap();
    });
}
