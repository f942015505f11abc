//! Proves that the commands of the built program do what they say and end with the right code: each
//! is run as a user would, as a process of its own.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};

use slipstream_proto::v1::generate_event::Event;
use slipstream_server::local::connect;
use slipstream_tests::client::{Client, block_on, greedy};

const PROMPT: &str = "fn main() {\n    let mut ";

/// The server's own main program, which this package builds under another name: cargo builds no
/// other package's programs for a test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_slipstream-under-test");

/// A command that no setting of the environment changes.
fn slipstream(args: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    let is_ours = |name: &OsStr| name.to_string_lossy().starts_with("SLIPSTREAM_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
        command.env_remove(name);
    }
    command.args(args).env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    slipstream(args).output().unwrap()
}

/// What a command that must succeed prints.
fn printed(args: &[&str]) -> String {
    let output = run(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_demo_shows_its_measurements() {
    let text = printed(&["demo", "--tokens", "16", "--repeats", "1"]);
    assert!(text.contains("Every token below came over gRPC"), "{text}");
    assert!(text.contains("tokens/s"), "{text}");
}

#[test]
fn the_self_test_passes() {
    let text = printed(&["self-test", "--tokens", "8"]);
    assert!(text.contains(" 0 different") && text.contains("PASS"), "{text}");
}

#[test]
fn generate_prints_one_completion_however_it_is_asked() {
    let flags = ["--max-tokens", "24", "--seed", "5", "--ignore-eos"];
    let with = |args: &[&str]| printed(&[&["generate"], args, &flags[..]].concat());
    let plain = with(&[PROMPT, "--speculation", "off"]);
    assert!(plain.len() > 10, "{plain:?}");
    assert_eq!(with(&[PROMPT]), plain);
    assert_eq!(with(&[PROMPT, "--speculation", "4", "--threads", "1"]), plain);
    let args = [&["generate", "-"], &flags[..]].concat();
    let mut asked = slipstream(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    asked.stdin.take().unwrap().write_all(PROMPT.as_bytes()).unwrap();
    let output = asked.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), plain);
}

#[test]
fn commands_that_fail_say_why() {
    let cases: [(&[&str], i32, &str); 5] = [
        (&["generate", "a", "--server", "http://127.0.0.1:1"], 1, "no server at"),
        (&["generate", "a", "--model", "no/such/model"], 1, "no/such/model"),
        (&["generate", "a", "--temperature", "-1"], 1, "temperature"),
        (&["generate", "a", "--no-such-flag"], 2, "--no-such-flag"),
        (&["self-test", "--draft-model", "none"], 2, "draft-model"),
    ];
    for (args, code, message) in cases {
        let output = run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.contains(message), "{args:?}: {errors}");
        assert!(output.stdout.is_empty(), "{args:?} prints a result");
    }
}

/// A running `serve` on a free port. Dropping it ends the process.
struct Serving {
    process: Child,
    /// What it logs, line by line, to its end.
    log: Receiver<serde_json::Value>,
    address: String,
}

impl Serving {
    /// Starts a server and waits until it is ready.
    fn start() -> Self {
        let args = ["serve", "--listen", "127.0.0.1:0", "--log-format", "json"];
        let mut process = slipstream(&[&args[..], &["--grace", "600s"]].concat())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let (sender, log) = channel();
        // Reads on to the end, so that the server never waits for a reader of its log.
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line));
                let _ = sender.send(line); // the test may have failed meanwhile
            }
        });
        let mut serving = Self { process, log, address: String::new() };
        let listening = serving.until_logged("listening");
        let address = listening["fields"]["address"].as_str().unwrap().to_owned();
        serving.address = format!("http://{address}");
        serving.until_logged("ready");
        serving
    }

    /// The next line with this message.
    fn until_logged(&self, message: &str) -> serde_json::Value {
        let mut passed = Vec::new();
        while let Ok(line) = self.log.recv() {
            if line["fields"]["message"] == message {
                return line;
            }
            passed.push(line);
        }
        panic!("the server ended without logging {message:?}: {passed:?}");
    }

    fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    fn wait(mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Most likely it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn serve_finishes_what_runs_when_told_to_end() {
    for signal in ["TERM", "INT"] {
        let serving = Serving::start();
        block_on(async {
            let mut client = Client::new(connect(&serving.address).await.unwrap());
            let mut events = client.generate(greedy(PROMPT, 600)).await.unwrap().into_inner();
            events.message().await.unwrap().expect("Started");
            serving.signal(signal);
            let mut num_tokens = 0;
            let finished = loop {
                let event = events.message().await.unwrap().expect("an end before the end");
                match event.event.unwrap() {
                    Event::Started(_) => panic!("Started twice"),
                    Event::Tokens(tokens) => num_tokens += tokens.tokens.len(),
                    Event::Finished(finished) => break finished,
                }
            };
            assert_eq!(num_tokens, 600);
            assert_eq!(finished.usage.unwrap().output_tokens, 600);
        });
        serving.until_logged("stopped");
        assert_eq!(serving.wait().code(), Some(0), "SIG{signal}");
    }
}
