//! The `slipstream` command line: what there is, how a command ends, and its exit code. Results go
//! to stdout, everything else to stderr. Knows the server by its public API and speaks gRPC to it.

mod address;
mod client;
mod compare;
mod demo;
mod generate;
mod request_flags;
mod self_test;
mod serve;
mod terminal;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use self::client::StreamError;
use crate::config::{Config, ConfigError, EdgeConfig, ModelChoice, ModelFlags};
use crate::logging::FilterError;

/// Exit code of a command that could not do what it was asked to.
const FAILED: u8 = 1;
/// How long a server that a command started for itself may take to end.
const OWN_SERVER_GRACE: Duration = Duration::from_secs(5);
/// Threads that tokenise prompts; more prompts wait for one.
const TOKENISING_THREADS: usize = 4;
/// Exit code of a command that was asked wrongly.
const MISUSED: u8 = 2;
/// Exit code of a command whose output nobody reads any more: as if SIGPIPE had ended it.
const UNREAD: u8 = 128 + 13;
/// Fewest output tokens with a proposal among them: the first comes from the prompt, and the last
/// needs none.
const PROPOSING_TOKENS_MIN: i64 = 3;

/// A speculative-decoding server: the bytes of a completion never depend on the draft.
#[derive(Debug, Parser)]
#[command(name = "slipstream", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a server, stream some completions, and measure them plain beside speculative
    Demo(demo::DemoFlags),
    /// Serve completions over gRPC until SIGTERM or ctrl-c
    Serve(crate::config::ServeFlags),
    /// Complete one prompt, on a server of its own or on a running one
    Generate(Box<generate::GenerateFlags>),
    /// Check that a pair gives the same bytes with speculation and without
    SelfTest(self_test::SelfTestFlags),
}

/// Parses the command line, runs the command, and tells how it went: 0 done, 1 failed, 2 asked
/// wrongly, 141 nobody reads the output.
#[must_use]
pub fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let given = matches.subcommand().map_or_else(Vec::new, |(_, flags)| model_flags_given(flags));
    match execute(cli.command, &given) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_unread(&error) => ExitCode::from(UNREAD),
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

/// Whether the reader of stdout has gone. Errors of connections are never bare [`io::Error`]s.
fn is_unread(error: &anyhow::Error) -> bool {
    let failed = match error.downcast_ref::<StreamError>() {
        Some(StreamError::Output(error)) => Some(error),
        Some(StreamError::Call { .. }) => None,
        None => error.downcast_ref::<io::Error>(),
    };
    failed.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Names of the model flags on the command line; the environment's do not count.
fn model_flags_given(flags: &clap::ArgMatches) -> Vec<String> {
    let known = ModelFlags::augment_args(clap::Command::new("models"));
    let on_line = |id: &str| {
        flags.try_contains_id(id).is_ok()
            && flags.value_source(id) == Some(ValueSource::CommandLine)
    };
    let given = known.get_arguments().filter(|flag| on_line(flag.get_id().as_str()));
    given.filter_map(|flag| flag.get_long().map(str::to_owned)).collect()
}

/// Settings for a command that compares with and without a draft.
fn comparison_config(flags: &ModelFlags) -> Result<Config, ConfigError> {
    let config = Config::new(flags, EdgeConfig::with_grace(OWN_SERVER_GRACE))?;
    let models =
        [("model", Some(&config.models.verifier)), ("draft-model", config.models.draft.as_ref())];
    for (flag, choice) in models {
        if let Some(ModelChoice::Path(path)) = choice
            && !path.exists()
        {
            let problem = format!("there is no file or folder {}", path.display());
            return Err(ConfigError::new(flag, problem));
        }
    }
    if config.models.draft.is_none() {
        let problem = "there is none, and this command compares with and without one: give a draft \
                       with the verifier's vocabulary";
        return Err(ConfigError::new("draft-model", problem));
    }
    if config.engine.step_tokens_max < 2 {
        let problem = "1 leaves no room for a proposal, so there is nothing to compare: give 2 or \
                       more";
        return Err(ConfigError::new("step-tokens", problem));
    }
    Ok(config)
}

fn execute(command: Command, model_flags_given: &[String]) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(network_threads())
        .max_blocking_threads(TOKENISING_THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        match command {
            Command::Demo(flags) => demo::run(flags).await,
            Command::Serve(flags) => serve::run(flags).await,
            Command::Generate(flags) => generate::run(*flags, model_flags_given).await,
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
