//! Proves what a command says when a call does not go well: ctrl-c, a server that sends details, a
//! server of another kind. The servers here are made for it.

use std::io::{Read, Write};
use std::net::TcpListener as StdListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_server::{Completions, CompletionsServer};
use slipstream_proto::v1::generate_event::Event;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_tests::client::block_on;
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::program::slipstream;

type Events = ReceiverStream<Result<v1::GenerateEvent, Status>>;

/// Sends two tokens to whoever asks, one of a second sample to who asks for two, then an error, or
/// nothing ever.
struct Scripted {
    end: Option<Status>,
    /// Keeps streams open.
    open: std::sync::Mutex<Vec<tokio::sync::mpsc::Sender<Result<v1::GenerateEvent, Status>>>>,
}

#[tonic::async_trait]
impl Completions for Scripted {
    type GenerateStream = Events;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Events>, Status> {
        if request.get_ref().request_id() == "refuse-me" {
            return Err(self.end.clone().expect("there is a status to refuse with"));
        }
        let is_chat = matches!(&request.get_ref().prompt, Some(Prompt::Text(text))
            if text.ends_with("Assistant:"));
        if is_chat && request.get_ref().stop_strings != ["\nUser:"] {
            return Err(Status::invalid_argument("answers would run into the next turn"));
        }
        let (sender, events) = tokio::sync::mpsc::channel(4);
        let started = v1::Started { seed: 9, request_id: "r-1".into(), ..v1::Started::default() };
        let token = |id| v1::Token { id, ..v1::Token::default() };
        let tokens = |sample, text: &str, tokens| {
            Event::Tokens(v1::Tokens { text: text.to_owned(), tokens, sample })
        };
        let mut news = vec![Event::Started(started), tokens(0, "ab", vec![token(7), token(8)])];
        if request.get_ref().n == Some(2) {
            news.push(tokens(1, "c", vec![token(5)]));
        }
        for event in news {
            sender.send(Ok(v1::GenerateEvent { event: Some(event) })).await.unwrap();
        }
        match &self.end {
            Some(status) => sender.send(Err(status.clone())).await.unwrap(),
            None => self.open.lock().unwrap().push(sender),
        }
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn complete(
        &self,
        _: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::CompleteResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn abort(
        &self,
        _: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

/// Runs `generate` against a scripted server; `meanwhile` has the process once text has come.
fn generate(end: Option<Status>, args: &[&str], meanwhile: impl FnOnce(&mut Child)) -> Output {
    ask(end, &[&["generate", "x"], args].concat(), meanwhile)
}

/// Runs a command against a scripted server.
fn ask(end: Option<Status>, args: &[&str], meanwhile: impl FnOnce(&mut Child)) -> Output {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = CompletionsServer::new(Scripted { end, open: Default::default() });
        let server = tonic::transport::Server::builder().add_service(service);
        let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let mut command = slipstream(&[args, &["--server", &address]].concat());
        let piped = Stdio::piped;
        command.stdin(piped()).stdout(piped()).stderr(piped());
        let mut child = command.spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"Hi\n").unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut text = vec![0; 2];
        // What is refused ends without any.
        let num_read = tokio::task::block_in_place(|| stdout.read(&mut text).unwrap());
        if num_read > 0 {
            meanwhile(&mut child);
        }
        let mut output = tokio::task::block_in_place(|| child.wait_with_output().unwrap());
        text.truncate(num_read);
        output.stdout = text;
        serving.abort();
        output
    })
}

fn press_ctrl_c(child: &Child) {
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &id]).status().unwrap().success());
}

fn errors(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn ctrl_c_ends_a_completion_and_tells_how_to_go_on() {
    let output = generate(None, &[], |child| press_ctrl_c(child));
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(130), "{errors}");
    assert_eq!(output.stdout, b"ab");
    assert!(errors.contains("interrupted\n2 output tokens came before"), "{errors}");
    assert!(errors.contains("--seed 9 --output-prefix 7,8"), "{errors}");
}

#[test]
fn ctrl_c_ends_an_answer_and_the_conversation_goes_on() {
    let output = ask(None, &["chat"], |child| {
        press_ctrl_c(child);
        child.stdin.as_mut().unwrap().write_all(b"/nonsense\n").unwrap();
    });
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let (_, after) = errors.split_once("(interrupted)").expect("it says so");
    assert!(after.contains("no command /nonsense"), "{errors}");
}

fn full() -> Status {
    let mut details = ErrorDetails::new();
    details
        .set_retry_info(Some(Duration::from_secs(2)))
        .set_error_info("QUEUE_FULL", "slipstream", [])
        .add_quota_failure_violation("requests", "64 are waiting")
        .set_request_info("r-7", "");
    Status::with_error_details(Code::ResourceExhausted, "no room", details)
}

#[test]
fn details_of_the_server_are_told() {
    let output = generate(Some(full()), &["--request-id", "refuse-me"], |_| ());
    let text = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let lines = [
        "error: the server is full, try again later: no room",
        "requests: 64 are waiting",
        "try again in 2.0 s",
        "reason QUEUE_FULL (slipstream)",
        "request id r-7",
    ];
    for line in lines {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    assert!(!text.contains("output tokens came before"), "{text}");
    let output = generate(Some(full()), &["--request-id", "refuse-me", "--json"], |_| ());
    let object: Value = serde_json::from_slice(&output.stderr).unwrap();
    let error = &object["error"];
    assert_eq!((&error["reason"], &error["retry_after_ms"]), (&"QUEUE_FULL".into(), &2000.into()));
}

#[test]
fn a_stream_that_breaks_off_can_be_gone_on_with() {
    let end = || Some(Status::unavailable("going down"));
    let output = generate(end(), &["--output-prefix", "5"], |_| ());
    let text = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the stream broke off: going down"), "{text}");
    assert!(text.contains("--seed 9 --output-prefix 5,7,8"), "{text}");
    let output = generate(end(), &["--json"], |_| ());
    let object: Value = serde_json::from_slice(&output.stderr).unwrap();
    let resume = &object["error"]["resume"];
    assert_eq!(resume["output_prefix"], serde_json::json!([7, 8]));
    assert_eq!((&resume["seed"], &resume["text"]), (&9.into(), &"ab".into()));
}

#[test]
fn each_sample_of_a_stream_that_breaks_off_can_be_gone_on_with() {
    let end = || Some(Status::unavailable("going down"));
    let output = generate(end(), &["--n", "2", "--sample-index", "3"], |_| ());
    let text = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(output.stdout, b"--", "a heading");
    let lines = [
        "repeat the command without --n and with",
        "--seed 9 --sample-index 3 --output-prefix 7,8 (sample 3, 2 tokens)",
        "--seed 9 --sample-index 4 --output-prefix 5 (sample 4, 1 tokens)",
    ];
    for line in lines {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    let output = generate(end(), &["--n", "2", "--json"], |_| ());
    let object: Value = serde_json::from_slice(&output.stderr).unwrap();
    let resume = &object["error"]["resume"];
    assert_eq!(resume[0]["output_prefix"], serde_json::json!([7, 8]));
    assert_eq!(resume[1]["output_prefix"], serde_json::json!([5]));
    assert_eq!((&resume[1]["sample_index"], &resume[1]["text"]), (&1.into(), &"c".into()));
}

#[test]
fn what_never_fits_is_not_called_full() {
    let never = |reason: &str| {
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, "slipstream", []);
        Some(Status::with_error_details(Code::ResourceExhausted, "too large", details))
    };
    let output = generate(never("OVER_KV_POOL"), &["--request-id", "refuse-me"], |_| ());
    let text = errors(&output);
    assert!(text.contains("the request is more than this server can take: too large"), "{text}");
    assert!(!text.contains("try again"), "{text}");
}

/// What `generate` says to a server that answers with these bytes.
fn told_by(answer: &'static [u8]) -> String {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut command = slipstream(&["generate", "x", "--server", &address, "--timeout", "20s"]);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    peer.read_exact(&mut [0; 24]).unwrap();
    // Nobody answers when the command tries again.
    drop(listener);
    peer.write_all(answer).unwrap();
    drop(peer);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    errors(&output)
}

#[test]
fn servers_of_another_kind_are_recognised() {
    let http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let tls_alert = b"\x15\x03\x01\x00\x02\x02\x46\x00\x00\x00\x00\x00";
    for answer in [&http[..], tls_alert] {
        let text = told_by(answer);
        assert!(text.contains("does not speak gRPC") && text.contains("TLS"), "{text}");
    }
}

#[test]
fn a_server_that_says_nothing_is_given_up_on_in_time() {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let args = ["generate", "x", "--server", &address, "--timeout", "100ms"];
    let output = slipstream(&args).output().unwrap();
    let text = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the time that --timeout gives is over"), "{text}");
}
