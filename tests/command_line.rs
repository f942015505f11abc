//! Proves that the commands of the built program do what they say and end with the right code: each
//! is run as a user would, as a process of its own.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use serde_json::Value;
use slipstream_proto::v1::generate_event::Event;
use slipstream_server::local::connect;
use slipstream_tests::client::{Client, block_on, greedy};

use crate::program::{printed, printed_for, run, slipstream};

const PROMPT: &str = "fn main() {\n    let mut ";

#[test]
fn the_demo_shows_its_measurements() {
    let text = printed(&["demo", "--tokens", "16", "--repeats", "1"]);
    assert!(text.contains("Every token below came over gRPC"), "{text}");
    assert!(text.contains("tokens/s"), "{text}");
}

#[test]
fn the_self_test_passes() {
    let text = printed(&["self-test", "--tokens", "16"]);
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
    let output = printed_for(&args, PROMPT);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), plain);
}

#[test]
fn commands_that_fail_say_why() {
    let cases: [(&[&str], i32, &str); 8] = [
        (&["generate", "a", "--n", "17"], 1, "n: must be from 1 to 16"),
        (&["generate", "a", "--tenant", "a b"], 1, "tenant: must be"),
        (&["generate", "a", "--priority", "urgent"], 2, "interactive, normal, batch"),
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

#[test]
fn generate_prints_one_object_for_programs() {
    let args = ["generate", PROMPT, "--max-tokens", "12", "--seed", "5", "--ignore-eos"];
    let plain = printed(&args);
    let text = printed(&[&args[..], &["--json", "--request-id", "r-1"]].concat());
    let object: Value = serde_json::from_str(&text).expect("one object");
    assert_eq!(object["text"].as_str().unwrap().to_owned() + "\n", plain);
    let tokens = object["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 12);
    assert!(tokens.iter().all(|token| token["logprob"].as_f64().is_some_and(|l| l <= 0.0)));
    let texts: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(object["text"], texts);
    assert_eq!((&object["finish_reason"], &object["seed"]), (&"length".into(), &5.into()));
    assert_eq!(object["usage"]["output_tokens"], 12);
    assert_eq!(object["request_id"], "r-1");
    assert!(object["timings"]["total_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn several_samples_come_one_behind_the_other() {
    let flags = ["generate", PROMPT, "--max-tokens", "12", "--seed", "5", "--ignore-eos"];
    let with = |args: &[&str]| printed(&[&flags[..], args].concat());
    let alone = ["7", "8", "9"].map(|index| with(&["--sample-index", index]));
    let expected: String =
        (7..).zip(&alone).map(|(index, text)| format!("--- sample {index} ---\n{text}")).collect();
    let several = ["--sample-index", "7", "--n", "3", "--tenant", "t", "--priority", "batch"];
    assert_eq!(with(&several), expected);
    let text = with(&[&several[..], &["--json", "--cache-salt", "s"]].concat());
    let object: Value = serde_json::from_str(&text).expect("one object");
    let samples = object["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    for ((sample, alone), index) in samples.iter().zip(&alone).zip(7..) {
        assert_eq!(sample["text"].as_str().unwrap().to_owned() + "\n", *alone);
        assert_eq!(sample["sample_index"], index);
        assert!(sample["usage"]["cached_prompt_tokens"].is_u64(), "{sample}");
        assert_eq!(sample["usage"]["preemptions"], 0);
    }
    assert_eq!(object["seed"], 5);
    let output = run(&[&flags[..], &["--n", "2", "--stats", "--no-prefix-reuse"]].concat());
    let errors = String::from_utf8(output.stderr).unwrap();
    for part in ["sample 0:\n", "sample 1:\n", "of them cached)", "--sample-index 1 "] {
        assert!(errors.contains(part), "no {part:?} in {errors}");
    }
}

#[test]
fn failures_are_objects_where_results_are() {
    let output = run(&["generate", "a", "--temperature", "-1", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let object: Value = serde_json::from_slice(&output.stderr).expect("one object");
    assert_eq!(object["error"]["code"], "INVALID_ARGUMENT");
    assert!(object["error"]["message"].as_str().unwrap().contains("temperature"), "{object}");
    assert!(object["error"]["resume"].is_null());
}

#[test]
fn the_self_test_has_a_result_for_programs() {
    let text = printed(&["self-test", "--tokens", "16", "--json"]);
    let object: Value = serde_json::from_str(&text).expect("one object");
    assert_eq!(object["different"], 0);
    assert!(object["accepted"].as_u64().unwrap() > 0, "{object}");
}

/// All commands that the program has, by its own help.
fn commands() -> Vec<String> {
    let help = printed(&["--help"]);
    let list = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

#[test]
fn shells_can_complete_every_command() {
    let commands = commands();
    assert!(commands.len() >= 9, "{commands:?}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = printed(&["completion", shell]);
        for command in commands.iter().filter(|name| *name != "help") {
            assert!(script.contains(command.as_str()), "{shell} does not know {command}");
        }
        assert!(script.contains("max-running"), "{shell} does not know the flags of serve");
    }
}

#[test]
fn help_tells_ranges_defaults_and_what_to_try() {
    let help = printed(&["serve", "--help"]);
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for text in ["[range: 1 to 65536]", "[default: 30s]", "[default: all cores]", "Examples:"] {
        assert!(words.contains(text), "{text}: {help}");
    }
    for command in ["generate", "chat", "check-config", "completion"] {
        assert!(printed(&[command, "--help"]).contains("Examples:"), "{command}");
    }
}

/// A running `serve` on a free port. Dropping it ends the process.
struct Serving {
    process: Child,
    /// What it logs, line by line, to its end.
    log: Receiver<Value>,
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
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
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
    fn until_logged(&self, message: &str) -> Value {
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
