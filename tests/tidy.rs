//! Proves that the sources keep their shape: lengths, columns, imports that must not exist, words
//! that must not be left behind, documented public items, and an ARCHITECTURE that names real
//! files. Reads files only; a rule that cannot be told from the text of a file is clippy's.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use slipstream_tests::timing::timed;

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 499;
const COLUMNS_MAX: usize = 100;

/// Functions that may be longer than the limit: file, name, reason. May only shrink.
const LONG_FUNCTIONS: [(&str, &str, &str); 0] = [];

/// Folders that hold sources.
const FOLDERS: [&str; 9] =
    ["proto", "model", "draft", "verifier", "server", "tests", "benches", "training", "models"];

/// Text that no file under a folder may contain: folder, text, where it is allowed, why.
const BANNED_IMPORTS: [(&str, &str, &[&str], &str); 21] = [
    ("server/src/engine/", "tokio", &["runner.rs"], "the engine is synchronous"),
    ("server/src/engine/", "tonic", &["runner.rs"], "the engine knows no wire"),
    ("server/src/engine/", "prost", &["runner.rs"], "the engine knows no wire"),
    ("server/src/engine/", "slipstream_proto", &["runner.rs"], "the engine knows no wire"),
    ("server/src/engine/", "crossbeam", &["runner.rs"], "the engine has no channels"),
    ("server/src/engine/", "std::time", &["runner.rs"], "time comes through Clock"),
    ("server/src/engine/", "std::thread", &["runner.rs"], "the engine is one struct"),
    ("server/src/engine/", "std::sync::mpsc", &["runner.rs"], "the engine has no channels"),
    ("server/src/engine/", "HashMap", &["runner.rs"], "its order may differ between runs"),
    ("server/src/engine/", "HashSet", &["runner.rs"], "its order may differ between runs"),
    ("draft/", "slipstream_verifier", &[], "draft and verifier do not know each other"),
    ("draft/", "slipstream_server", &[], "dependencies point downwards"),
    ("verifier/", "slipstream_draft", &[], "draft and verifier do not know each other"),
    ("verifier/", "slipstream_server", &[], "dependencies point downwards"),
    ("model/", "slipstream_draft", &[], "dependencies point downwards"),
    ("model/", "slipstream_verifier", &[], "dependencies point downwards"),
    ("model/", "slipstream_server", &[], "dependencies point downwards"),
    ("model/", "slipstream_proto", &[], "dependencies point downwards"),
    ("model/", "tokio", &[], "models are synchronous"),
    ("draft/", "tokio", &[], "drafts are synchronous"),
    ("verifier/", "tokio", &[], "verification is synchronous"),
];

/// A source file, by its path from the workspace's root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn collect(folder: &Path, into: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_hidden = name.starts_with('.') || name.starts_with("__") || name == "target";
        if path.is_dir() && !is_hidden {
            collect(&path, into);
        }
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        if path.is_file() && ["rs", "py", "toml", "proto", "md"].contains(&extension) {
            let text = fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
            into.push(Source { path, text });
        }
    }
}

fn sources() -> Vec<Source> {
    let mut all = Vec::new();
    for folder in FOLDERS {
        collect(&root().join(folder), &mut all);
    }
    assert!(all.len() > 20, "the sources were not found");
    all
}

/// Runs `rule` over the sources and fails with everything it found.
fn check(rule: impl Fn(&Source, &mut Vec<String>)) {
    timed("tidy", 5.0, || {
        let mut found = Vec::new();
        for source in sources() {
            let mut here = Vec::new();
            rule(&source, &mut here);
            found.extend(here.into_iter().map(|line| format!("{}:{line}", source.path)));
        }
        let mut list = String::new();
        for line in &found {
            writeln!(list, "  {line}").unwrap();
        }
        assert!(found.is_empty(), "{} untidy places:\n{list}", found.len());
    });
}

/// A line without its comment and without the contents of its string literals.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let mut chars = line.chars().peekable();
    let mut in_string = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' if in_string => drop(chars.next()),
            '\'' if !in_string && chars.peek() == Some(&'"') => drop(chars.next()),
            '"' => {
                in_string = !in_string;
                code.push(c);
            }
            '/' if !in_string && chars.peek() == Some(&'/') => break,
            _ if in_string => {}
            _ => code.push(c),
        }
    }
    code
}

/// The name of the function that begins on this line of code.
fn function_name(code: &str) -> Option<&str> {
    let start = code.trim_start();
    let words = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"\""];
    let mut rest = start;
    loop {
        let (word, tail) = rest.split_once(' ')?;
        if word == "fn" {
            return tail.split(['(', '<']).next();
        }
        if !words.contains(&word) {
            return None;
        }
        rest = tail;
    }
}

/// Name, first line (from 1) and length of every function of formatted Rust source: it ends at the
/// closing brace of its own indentation.
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(name) = function_name(&code_of(line)).map(str::to_owned) else { continue };
        let indent = &line[..line.len() - line.trim_start().len()];
        let ends = |line: &&str| {
            *line == format!("{indent}}}") || (line.starts_with(indent) && line.ends_with(");"))
        };
        let one_line = line.ends_with('}') || line.ends_with(';');
        let len = if one_line {
            1
        } else {
            let last = lines[index + 1..].iter().position(|line| {
                ends(line) && line.len() - line.trim_start().len() == indent.len()
            });
            last.map_or(lines.len() - index, |last| last + 2)
        };
        found.push((name, index + 1, len));
    }
    found
}

#[test]
fn functions_fit_a_screen() {
    check(|source, found| {
        if !source.is_rust() {
            return;
        }
        for (name, line, len) in functions(&source.text) {
            let excused =
                LONG_FUNCTIONS.iter().any(|(path, long, _)| *path == source.path && *long == name);
            if len > FUNCTION_LINES_MAX && !excused {
                found.push(format!("{line}: fn {name} has {len} lines"));
            }
        }
    });
}

#[test]
fn files_are_short_and_narrow() {
    check(|source, found| {
        let is_code = source.is_rust() || source.path.ends_with(".py");
        let len = source.text.lines().count();
        if is_code && len > FILE_LINES_MAX {
            found.push(format!("1: {len} lines"));
        }
        for (index, line) in source.text.lines().enumerate() {
            let columns = line.chars().count();
            // A link cannot be broken; everything else can.
            if source.is_rust() && columns > COLUMNS_MAX && !line.contains("https://") {
                found.push(format!("{}: {columns} columns", index + 1));
            }
        }
    });
}

#[test]
fn files_say_what_they_own() {
    check(|source, found| {
        if source.is_rust() && !source.text.starts_with("//!") {
            found.push("1: does not open with `//!`".to_owned());
        }
    });
}

#[test]
fn forbidden_imports_do_not_exist() {
    check(|source, found| {
        if !source.is_rust() {
            return;
        }
        for (folder, word, except, why) in BANNED_IMPORTS {
            let excused = except.iter().any(|name| source.path == format!("{folder}{name}"));
            if !source.path.starts_with(folder) || excused {
                continue;
            }
            for (index, line) in source.text.lines().enumerate() {
                if code_of(line).contains(word) {
                    found.push(format!("{}: `{word}`, but {why}", index + 1));
                }
            }
        }
    });
}

#[test]
fn manifests_point_downwards() {
    let below = [
        ("proto", &[][..]),
        ("model", &[]),
        ("draft", &["model"]),
        ("verifier", &["model"]),
        ("server", &["proto", "model", "draft", "verifier"]),
    ];
    check(|source, found| {
        for (name, allowed) in below {
            if source.path != format!("{name}/Cargo.toml") {
                continue;
            }
            for (index, line) in source.text.lines().enumerate() {
                let Some(rest) = line.strip_prefix("slipstream-") else { continue };
                let dependency = rest.split(['.', ' ', '=']).next().unwrap();
                if !allowed.contains(&dependency) {
                    found.push(format!("{}: {name} must not know {dependency}", index + 1));
                }
            }
        }
    });
}

#[test]
fn unsafe_lives_in_the_kernels() {
    check(|source, found| {
        if !source.is_rust() || source.path.starts_with("model/src/kernels/") {
            return;
        }
        for (index, line) in source.text.lines().enumerate() {
            let code = code_of(line);
            let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            if words.any(|word| word == "unsafe") {
                found.push(format!("{}: unsafe outside the kernels", index + 1));
            }
        }
    });
}

/// Whether a public item begins on this line.
fn is_public_item(line: &str) -> bool {
    let items = ["fn", "struct", "enum", "trait", "const", "static", "type", "async", "unsafe"];
    let Some(rest) = line.trim_start().strip_prefix("pub ") else { return false };
    rest.split(' ').next().is_some_and(|word| items.contains(&word))
}

#[test]
fn public_items_are_documented() {
    check(|source, found| {
        if !source.is_rust() || source.path.starts_with("proto/") {
            return;
        }
        let lines: Vec<&str> = source.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            if !is_public_item(line) {
                continue;
            }
            // Attributes may stand between the item and its description, over several lines.
            let mut above = lines[..index].iter().rev().map(|line| line.trim());
            let first = above.find(|line| {
                let is_attribute = line.starts_with("#[") || line.ends_with(")]") || *line == "]";
                !is_attribute
            });
            if !first.is_some_and(|line| line.starts_with("///")) {
                found.push(format!("{}: no description: {}", index + 1, line.trim()));
            }
        }
    });
}

#[test]
fn nothing_is_left_behind() {
    // Put together here, so that this file does not find itself.
    let words: Vec<String> = [
        ["todo", "!("],
        ["unimplemented", "!("],
        ["FIX", "ME"],
        ["XX", "X:"],
        ["dbg", "!("],
        ["/ho", "me/"],
        ["/ro", "ot/"],
        ["/Us", "ers/"],
        ["/wo", "rk/"],
        ["/tm", "p/"],
        ["C:", "\\\\"],
    ]
    .iter()
    .map(|parts| parts.concat())
    .collect();
    check(|source, found| {
        for (index, line) in source.text.lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(*word)) {
                found.push(format!("{}: `{word}`", index + 1));
            }
        }
    });
}

#[test]
fn silenced_lints_give_a_reason() {
    check(|source, found| {
        if !source.is_rust() {
            return;
        }
        let lines: Vec<&str> = source.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let start = line.trim_start();
            let is_allow = ["#[allow(", "#![allow(", "#[expect(", "#![expect("]
                .iter()
                .any(|word| start.starts_with(word));
            let end = (index + 6).min(lines.len());
            let attribute = lines[index..end].join(" ");
            let attribute = attribute.split(")]").next().unwrap();
            let above = index.checked_sub(1).map_or("", |above| lines[above].trim_start());
            let is_explained = attribute.contains("reason =")
                || line.contains("] //")
                || (above.starts_with("// ") && !above.starts_with("///"));
            if is_allow && !is_explained {
                found.push(format!("{}: no reason: {start}", index + 1));
            }
        }
    });
}

/// The words in backticks of a text outside its code fences.
fn backticked(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut in_fence = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
        } else if !in_fence {
            words.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    words
}

#[test]
fn the_map_names_real_files() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("there is a map");
    let mut missing = Vec::new();
    for word in backticked(&text) {
        let is_path = word.contains('/') && !word.contains([' ', '<', '*', '{', ':', '(']);
        // Options and routes look like paths and are none.
        if !is_path || word.starts_with(['/', '-']) {
            continue;
        }
        let path = word.trim_end_matches('/');
        let is_there = root().join(path).exists()
            || ["server/src", "model/src", "draft/src", "verifier/src"]
                .iter()
                .any(|folder| root().join(folder).join(path).exists());
        if !is_there {
            missing.push(word);
        }
    }
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:?}");
}

#[test]
fn the_rules_see_what_they_should() {
    let source = "/// A.\npub fn short() {}\n\n    async fn long(\n        a: u8,\n    ) -> u8 {\n\
                  \x20       a\n    }\nconst fn last() -> u8 {\n    1\n}\n";
    let lens: Vec<usize> = functions(source).into_iter().map(|(_, _, len)| len).collect();
    assert_eq!(lens, [1, 5, 3]);
    assert_eq!(code_of("let a = \"unsafe // \\\" x\"; // unsafe"), "let a = \"\"; ");
    assert!(is_public_item("    pub fn a()") && !is_public_item("pub(super) fn a()"));
    assert_eq!(backticked("a `b/c` d\n```\n`e`\n```\n`f`"), ["b/c", "f"]);
}
