//! Proves that settings come from the right layer, that what is wrong is told where it stands,
//! that the printed configuration is the one in effect, and that the documentation is what the
//! code says.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::Value;
use slipstream_server::config::reference;
use slipstream_tests::micro_pair;

use crate::program::{printed, run, slipstream};

/// A folder with one configuration file.
struct File {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn file(text: impl AsRef<[u8]>) -> File {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slipstream.toml");
    std::fs::write(&path, text).unwrap();
    File { _folder: folder, path }
}

impl File {
    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

/// Runs `check-config` with these variables set.
fn check_config(variables: &[(&str, &str)], args: &[&str]) -> Output {
    let args = [&["check-config"], args].concat();
    slipstream(&args).envs(variables.iter().copied()).output().unwrap()
}

/// The settings in effect, by key.
fn settings(variables: &[(&str, &str)], args: &[&str]) -> Value {
    let output = check_config(variables, &[args, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    object["settings"].clone()
}

/// What a wrong configuration prints.
fn refused(variables: &[(&str, &str)], args: &[&str]) -> String {
    let output = check_config(variables, args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{variables:?} {args:?}: {errors}");
    assert!(output.stdout.is_empty(), "{variables:?} {args:?} prints a configuration");
    errors
}

/// One setting of each type: key, default, then what file, environment and command line say.
const LAYERED: [(&str, &str, [&str; 3]); 15] = [
    ("max_running", "64", ["2", "3", "4"]),
    ("load_memory", "64GiB", ["2GiB", "3GiB", "1000"]),
    ("grace", "30s", ["2s", "3m", "400ms"]),
    ("max_age", "off", ["2h", "3h", "off"]),
    ("gzip", "false", ["true", "false", "true"]),
    ("log_format", "text", ["json", "text", "json"]),
    ("listen", "127.0.0.1:50051", ["a:1", "b:1", "c:1"]),
    ("quantize", "none", ["q8_0", "none", "q4"]),
    ("draft_quantize", "none", ["q4", "none", "q8_0"]),
    ("kv_type", "f32", ["f16", "f32", "f16"]),
    ("step_target", "50ms", ["20ms", "1s", "30ms"]),
    ("unread_tokens", "512", ["1", "2", "3"]),
    ("priority_aging", "10s", ["20s", "100ms", "1m"]),
    ("prefix_reuse", "true", ["false", "true", "false"]),
    ("step_limit", "1m", ["2m", "10ms", "3s"]),
];

fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[test]
fn the_command_line_beats_the_environment_beats_the_file() {
    let line = |(key, _, [value, ..]): &(&str, &str, [&str; 3])| match *key {
        "max_running" | "unread_tokens" | "gzip" | "prefix_reuse" => format!("{key} = {value}\n"),
        _ => format!("{key} = {value:?}\n"),
    };
    let file = file(LAYERED.iter().map(line).collect::<String>());
    let names: Vec<String> =
        LAYERED.iter().map(|(key, ..)| format!("SLIPSTREAM_{}", key.to_uppercase())).collect();
    let variables: Vec<(&str, &str)> =
        names.iter().zip(&LAYERED).map(|(name, (.., values))| (name.as_str(), values[1])).collect();
    let flags: Vec<String> = LAYERED
        .iter()
        .map(|(key, _, values)| format!("--{}={}", key.replace('_', "-"), values[2]))
        .collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let with_file = ["--config", file.name()];
    let effective = [
        ("default", settings(&[], &[])),
        ("file", settings(&[], &with_file)),
        ("environment", settings(&variables, &with_file)),
        ("command_line", settings(&variables, &[&with_file[..], &flags].concat())),
    ];
    for (index, (source, settings)) in effective.iter().enumerate() {
        for (key, default, values) in LAYERED {
            let expected = if index == 0 { default } else { values[index - 1] };
            assert_eq!(shown(&settings[key]["value"]), expected, "{key} by {source}");
            assert_eq!(settings[key]["source"], *source, "{key}");
        }
    }
    assert_eq!(effective[1].1["gzip"]["line"], 5);
    // The file may be named by the environment, too.
    let named = settings(&[("SLIPSTREAM_CONFIG", file.name())], &[]);
    assert_eq!(named["max_running"]["value"], 2);
}

/// Lines without their comments.
fn bare(text: &str) -> Vec<&str> {
    let lines = text.lines().map(|line| line.split(" # ").next().unwrap().trim());
    lines.filter(|line| !line.starts_with('#') && !line.is_empty()).collect()
}

#[test]
fn the_printed_configuration_can_be_used_as_it_is() {
    let args = [
        "check-config",
        "--threads=3",
        "--context-limit=128",
        "--kv-blocks=64",
        "--draft-model=embedded",
        "--model=embedded",
        "--model-name=a \"name\" # with \\ signs",
        "--http-listen=[::1]:9000",
        "--max-age=2h",
        "--gzip",
        "--prefix-reuse=false",
        "--step-target=75ms",
        "--max-message=1048577",
    ];
    let text = printed(&args);
    let file = file(&text);
    let again = printed(&["check-config", "--config", file.name()]);
    assert_eq!(bare(&again), bare(&text));
    assert!(
        text.lines().any(|line| line.starts_with("gzip = true ") && line.contains("command l"))
    );
    let settings = settings(&[], &["--config", file.name()]);
    for (key, setting) in settings.as_object().unwrap() {
        // The one that excludes another.
        let expected = if key == "kv_memory" { "default" } else { "file" };
        assert_eq!(setting["source"], expected, "{key}");
    }
    // What nobody sets stays open, so that the file means the same on another machine.
    let defaults = printed(&["check-config"]);
    assert!(defaults.contains("\n# threads = "), "{defaults}");
    assert!(bare(&defaults).iter().all(|line| !line.starts_with("threads")), "{defaults}");
}

#[test]
fn wrong_files_are_refused_with_the_line() {
    let cases: [(&str, &[&str]); 15] = [
        ("\nmax_runing = 4", &[":2: ", "max_runing", "did you mean max_running?"]),
        ("colour = 4", &[":1: ", "there are: listen, http_listen, grace"]),
        ("max_running = \"4\"", &[":1: max_running: must be an integer", "a string \"4\""]),
        ("gzip = 1", &["gzip: must be true or false", "an integer 1"]),
        ("grace = 30", &["grace: must be a time with its unit", "an integer 30"]),
        ("grace = \"30\"", &[":1: grace: must be a time with its unit", "got \"30\""]),
        ("kv_memory = \"4GB\"", &[":1: kv_memory: must be a size", "got \"4GB\""]),
        ("log_format = \"xml\"", &[":1: log_format: must be one of text, json, got \"xml\""]),
        ("max_running = 0", &[":1: max_running: must be from 1 to 65536, got 0", "--max-running"]),
        ("[server]\ngrace = '1s'", &[":1: server: there are no tables"]),
        ("a b", &[":1: this is not TOML"]),
        ("kv_blocks = 1\nkv_memory = '1MiB'", &[":1: kv_blocks: excludes --kv-memory"]),
        (
            "\n\nstall_limit = '70s'",
            &["--stream-stall-timeout: must be a quarter longer", "(70s)", "got 1m"],
        ),
        ("log = 'a=b=c'", &[":1: log: "]),
        ("log = 'inof'", &[":1: log: \"inof\" is no level"]),
    ];
    for (text, messages) in cases {
        let file = file(text);
        let errors = refused(&[], &["--config", file.name()]);
        for message in messages {
            assert!(errors.contains(message), "{text:?}: no {message:?} in {errors}");
        }
        let names_file = errors.contains("slipstream.toml:");
        assert!(names_file || errors.contains("--stream-stall"), "{text:?}: {errors}");
    }
}

#[test]
fn what_is_no_file_of_settings_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no.toml");
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    let big = file(vec![b'#'; (1 << 20) + 1]);
    let binary = file(b"\xff\xfe");
    let cases = [
        (name(&missing), "cannot read"),
        (name(folder.path()), "is a folder"),
        (name(&big.path), "more than 1048576 bytes"),
        (name(&binary.path), "not UTF-8"),
    ];
    for (path, message) in cases {
        let errors = refused(&[], &["--config", &path]);
        assert!(errors.contains(message) && errors.contains(&path), "{errors}");
    }
    // At the bound itself it is read.
    let full = file([b"#".repeat((1 << 20) - 1), b"\n".to_vec()].concat());
    settings(&[], &["--config", full.name()]);
}

/// Variables and arguments that are refused, and what is said about them.
type Wrong =
    (&'static [(&'static str, &'static str)], &'static [&'static str], &'static [&'static str]);

#[test]
fn values_outside_their_range_name_value_and_limit() {
    let cases: [Wrong; 13] = [
        (&[], &["--grace=25h"], &["--grace: must be from 0s to 24h, got 25h", "grace in a conf"]),
        (
            &[("SLIPSTREAM_THREADS", "0")],
            &[],
            &["SLIPSTREAM_THREADS: must be from 1 to 256, got 0"],
        ),
        (&[("SLIPSTREAM_THREADS", "x")], &[], &["'x'", "variable SLIPSTREAM_THREADS"]),
        (&[], &["--stream-window=65534"], &["--stream-window: must be from 65535 to 21474"]),
        (&[], &["--connection-window=65535"], &["--connection-window", "--stream-window (256KiB)"]),
        (&[], &["--step-target=0s"], &["--step-target: must be from 1ms to 1h, got 0s"]),
        (&[], &["--unread-tokens=0"], &["--unread-tokens: must be from 1 to 1048576, got 0"]),
        (&[], &["--max-preemptions=1025"], &["--max-preemptions: must be from 0 to 1024"]),
        (&[], &["--step-limit=9ms"], &["--step-limit: must be from 10ms to 24h, got 9ms"]),
        (&[], &["--max-headers=1KiB"], &["from 8KiB to 1MiB, got 1KiB"]),
        (&[], &["--max-age=0s"], &["--max-age: must be from 10ms"]),
        (&[], &["--http-listen=127.0.0.1:50051"], &["--http-listen: is the address of --listen"]),
        (&[], &["--model=no/such/model"], &["--model: there is no file or folder no/such/model"]),
    ];
    for (variables, args, messages) in cases {
        let errors = refused(variables, args);
        for message in messages {
            assert!(errors.contains(message), "{variables:?} {args:?}: {errors}");
        }
    }
}

#[test]
fn of_two_settings_that_exclude_each_other_the_higher_layer_wins() {
    let file = file("kv_blocks = 8\n");
    let with_file = ["--config", file.name()];
    let memory = [("SLIPSTREAM_KV_MEMORY", "1MiB")];
    let is_set = |settings: &Value| {
        ["kv_blocks", "kv_memory"].map(|key| settings[key]["value"] != Value::Null)
    };
    assert_eq!(is_set(&settings(&[], &with_file)), [true, false]);
    assert_eq!(is_set(&settings(&memory, &with_file)), [false, true]);
    assert_eq!(is_set(&settings(&memory, &["--kv-blocks=9"])), [true, false]);
    let errors = refused(&[], &["--kv-blocks=9", "--kv-memory=1MiB"]);
    assert!(errors.contains("--kv-blocks: excludes --kv-memory"), "{errors}");
}

/// The line that a server with these flags logs about its KV memory.
fn kv_memory(flags: &[&str]) -> Value {
    let args = ["serve", "--listen=127.0.0.1:0", "--log-format=json"];
    let mut command = slipstream(&[&args, flags].concat());
    let mut process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut lines = lines.map(|line| serde_json::from_str::<Value>(&line).expect(&line));
    let found = lines.find(|line| line["fields"]["message"] == "KV memory");
    process.kill().unwrap();
    process.wait().unwrap();
    found.expect("it says how much KV there is")["fields"].clone()
}

#[test]
fn one_budget_is_for_the_kv_of_verifier_and_draft() {
    let number = |line: &Value, key| line[key].as_u64().expect(key);
    let of_pair = |flag: &str| kv_memory(&[&micro_pair::FLAGS[..], &[flag]].concat());
    let one = of_pair("--kv-blocks=1");
    assert_eq!((number(&one, "capacity_tokens"), &one["from"]), (16, &"--kv-blocks".into()));
    let both = number(&one, "verifier_bytes") + number(&one, "draft_bytes");
    assert!(number(&one, "draft_bytes") > 0);
    let budget = 10 * both + both / 2;
    let set = of_pair(&format!("--kv-memory={budget}"));
    assert_eq!(number(&set, "capacity_tokens"), 160);
    assert_eq!(number(&set, "verifier_bytes") + number(&set, "draft_bytes"), 10 * both);
    let alone = kv_memory(&["--model", micro_pair::VERIFIER, "--kv-memory=1MiB"]);
    let tokens = 16 * ((1 << 20) / number(&one, "verifier_bytes"));
    assert_eq!((number(&alone, "capacity_tokens"), number(&alone, "draft_bytes")), (tokens, 0));
    assert_eq!(alone["from"], "--kv-memory 1MiB");
    // Two requests of 1024 positions each, and as much again for those before them.
    let derived = of_pair("--max-running=2");
    assert_eq!(number(&derived, "capacity_tokens"), 4096);
    assert!(derived["from"].as_str().unwrap().contains("--max-running 2"), "{derived}");
}

#[test]
fn variables_that_set_nothing_are_warned_of() {
    let output = check_config(&[("SLIPSTREAM_MAX_RUNING", "1"), ("SLIPSTREAM_SIM_SEED", "1")], &[]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(errors.contains("SLIPSTREAM_MAX_RUNING sets nothing"), "{errors}");
    assert!(errors.contains("did you mean SLIPSTREAM_MAX_RUNNING?"), "{errors}");
    assert!(!errors.contains("SIM_SEED"), "{errors}");
}

#[test]
fn other_commands_take_the_keys_they_have() {
    let file = file("draft_model = \"none\"\ngrace = \"1s\"\nlisten = \"a:1\"\n");
    let errors = String::from_utf8(run(&["self-test", "--config", file.name()]).stderr).unwrap();
    assert!(errors.contains("slipstream.toml:1: draft_model: there is none"), "{errors}");
}

#[test]
fn the_documentation_is_what_the_code_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    let generated = reference::markdown();
    if std::env::var_os("SLIPSTREAM_WRITE_DOCS").is_some() {
        std::fs::create_dir_all(Path::new(path).parent().unwrap()).unwrap();
        std::fs::write(path, &generated).unwrap();
    }
    let written = std::fs::read_to_string(path).expect("docs/configuration.md is there");
    let first = written.lines().zip(generated.lines()).find(|(written, code)| written != code);
    let how = "write it anew: SLIPSTREAM_WRITE_DOCS=1 cargo test ... settings::";
    assert!(first.is_none() && written == generated, "{first:?}; {how}");
    let limits = printed(&["limits"]);
    for key in ["--max-running", "1 to 65536", "stop_strings", "at most 16"] {
        assert!(limits.contains(key), "{limits}");
    }
}
