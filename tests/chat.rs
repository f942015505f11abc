//! Proves that a conversation is sent as its template says, is cut when the context is full, and
//! obeys its commands.

use serde_json::Value;
use slipstream_tests::micro_pair;

use crate::program::{printed, printed_for, slipstream};

/// The micro pair, and answers of a fixed length that any machine repeats.
const FLAGS: [&str; 9] = {
    let [model, verifier, draft_model, draft] = micro_pair::FLAGS;
    [model, verifier, draft_model, draft, "--seed", "3", "--max-tokens", "12", "--ignore-eos"]
};

/// Runs a chat that prints objects, and gives them with what it says beside.
fn chat(args: &[&str], stdin: &str) -> (Vec<Value>, String) {
    let args = [&["chat", "--json"], args, &FLAGS[..]].concat();
    let output = printed_for(&args, stdin);
    let text = String::from_utf8(output.stdout).unwrap();
    let turns = text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    (turns, String::from_utf8(output.stderr).unwrap())
}

/// The answer to a prompt that is written out.
fn completed(prompt: &str) -> Value {
    let args = [&["generate", prompt, "--json", "--stop", "\nUser:"], &FLAGS[..]].concat();
    serde_json::from_str(&printed(&args)).unwrap()
}

#[test]
fn turns_are_sent_as_the_template_says() {
    let (turns, said) = chat(&["--system", "You write Rust."], "Hi\n\nAnd a struct?\n");
    assert!(said.contains("no chat template") && said.contains("`User: ...`"), "{said}");
    assert_eq!(turns.len(), 2);
    let first = completed("You write Rust.\n\nUser: Hi\nAssistant:");
    assert_eq!(turns[0]["text"], first["text"]);
    let answer = first["text"].as_str().unwrap().trim();
    let second = completed(&format!(
        "You write Rust.\n\nUser: Hi\nAssistant: {answer}\nUser: And a struct?\nAssistant:"
    ));
    assert_eq!(turns[1]["text"], second["text"]);
    assert_eq!(turns[1]["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"]);
    assert_eq!((&turns[1]["turn"], &turns[1]["user"]), (&2.into(), &"And a struct?".into()));
}

#[test]
fn commands_change_the_conversation() {
    let script = "Hi\n/reset\n/system Be brief.\nHi\n/nonsense\n/exit\nnever asked\n";
    let (turns, said) = chat(&[], script);
    assert_eq!(turns.len(), 2);
    assert_eq!(turns[0]["text"], completed("User: Hi\nAssistant:")["text"]);
    assert_eq!(turns[1]["text"], completed("Be brief.\n\nUser: Hi\nAssistant:")["text"]);
    assert!(said.contains("All turns are forgotten"), "{said}");
    assert!(said.contains("no command /nonsense") && said.contains("/help"), "{said}");
}

#[test]
fn the_oldest_turns_go_when_the_context_is_full() {
    let (turns, said) = chat(&["--context-limit", "80"], &"Tell me more of it.\n".repeat(6));
    assert_eq!(turns.len(), 6);
    let left_out: Vec<u64> =
        turns.iter().map(|turn| turn["turns_left_out"].as_u64().unwrap()).collect();
    assert_eq!(left_out[0], 0);
    assert!(left_out.iter().sum::<u64>() > 0, "{left_out:?}");
    assert!(said.contains("more of the oldest turn"), "{said}");
    for turn in &turns {
        let len = |name: &str| turn["usage"][name].as_u64().unwrap();
        assert!(len("prompt_tokens") + len("output_tokens") <= 80, "{turn}");
    }
}

#[test]
fn the_oldest_turns_go_when_the_memory_is_full() {
    let (turns, said) = chat(&["--kv-blocks", "5"], &"Tell me more of it.\n".repeat(6));
    assert_eq!(turns.len(), 6);
    assert!(said.contains("more of the oldest turn"), "{said}");
}

#[test]
fn plain_answers_are_all_that_stdout_has() {
    let args = [&["chat"], &FLAGS[..]].concat();
    let output = printed_for(&args, "Hi\n");
    let text = String::from_utf8(output.stdout).unwrap();
    let answer = completed("User: Hi\nAssistant:")["text"].as_str().unwrap().to_owned();
    assert_eq!(text, format!("{}\n", answer.trim_start()));
}

#[test]
fn a_turn_that_never_fits_is_an_error() {
    let args = [&["chat", "--context-limit", "8"], &micro_pair::FLAGS[..]].concat();
    let mut command = slipstream(&args);
    let mut child = command
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut { stdin }, b"Tell me more of it.\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("the request is refused: prompt"), "{errors}");
}
