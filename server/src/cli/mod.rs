//! The `slipstream` command line: what there is, how a command ends, and its exit code. Results go
//! to stdout, everything else to stderr. Knows the server by its public API and speaks gRPC to it.

mod client;
mod compare;
mod demo;
mod generate;
mod request_flags;
mod self_test;
mod serve;
mod terminal;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::config::ConfigError;
use crate::logging::FilterError;

/// Exit code of a command that could not do what it was asked to.
const FAILED: u8 = 1;
/// How long a server that a command started for itself may take to end.
const OWN_SERVER_GRACE: Duration = Duration::from_secs(5);
/// Threads that tokenise prompts; more prompts wait for one.
const TOKENISING_THREADS: usize = 4;
/// Exit code of a command that was asked wrongly.
const MISUSED: u8 = 2;

/// Completions from a large model at the speed of a small one, byte for byte the same.
#[derive(Debug, Parser)]
#[command(name = "slipstream", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stream completions from the embedded pair, plain and speculative, and compare them
    Demo(demo::DemoFlags),
    /// Serve completions over gRPC until SIGTERM or ctrl-c
    Serve(crate::config::ServeFlags),
    /// Complete one prompt, on a server of its own or on a running one
    Generate(generate::GenerateFlags),
    /// Check that a pair gives the same bytes with speculation and without
    SelfTest(self_test::SelfTestFlags),
}

/// Parses the command line, runs the command, and tells how it went: 0 done, 1 failed, 2 asked
/// wrongly.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without stderr there is nobody to tell.
            let _ = writeln!(std::io::stderr().lock(), "error: {}", describe(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The error with its causes, except those that its message already tells.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<ConfigError>() || error.is::<FilterError>() { MISUSED } else { FAILED }
}

fn execute(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(network_threads())
        .max_blocking_threads(TOKENISING_THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        match command {
            Command::Demo(flags) => demo::run(flags).await,
            Command::Serve(flags) => serve::run(flags).await,
            Command::Generate(flags) => generate::run(flags).await,
            Command::SelfTest(flags) => self_test::run(flags).await,
        }
    });
    // A connection that does not close or a prompt in tokenisation must not hold up the end.
    runtime.shutdown_background();
    result
}

/// Network work is light: a second thread pays only where cores are to spare.
fn network_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores > 2 { 2 } else { 1 }
}
