//! Owns how tests run the built program: as a user would, as a process of its own, with no setting
//! of the environment that it was not given. Proves nothing by itself.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// The server's own main program, which this package builds under another name: cargo builds no
/// other package's programs for a test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_slipstream-under-test");

/// A command that no setting of the environment changes.
pub(crate) fn slipstream(args: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    let is_ours = |name: &OsStr| name.to_string_lossy().starts_with("SLIPSTREAM_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
        command.env_remove(name);
    }
    command.args(args).env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    slipstream(args).output().unwrap()
}

/// What a command that must succeed prints.
pub(crate) fn printed(args: &[&str]) -> String {
    must_succeed(run(args), args)
}

/// What a command that must succeed prints when it reads this.
pub(crate) fn printed_for(args: &[&str], stdin: &str) -> Output {
    let piped = Stdio::piped;
    let mut command = slipstream(args);
    let mut child = command.stdin(piped()).stdout(piped()).stderr(piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    must_succeed(output.clone(), args);
    output
}

fn must_succeed(output: Output, args: &[&str]) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
