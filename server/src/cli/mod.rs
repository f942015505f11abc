//! The `slipstream` command line: what there is, how a command ends, and its exit code. Results go
//! to stdout, everything else to stderr. Knows the server by its public API and speaks gRPC to it.

mod address;
mod chat;
mod chat_prompt;
mod check_config;
mod client;
mod compare;
mod completion;
mod demo;
mod explain;
mod generate;
mod grow;
mod grow_check;
mod limits;
mod listen;
mod reach;
mod request_flags;
mod result_json;
mod samples;
mod self_test;
mod serve;
mod terminal;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::{Value, json};

use self::client::StreamError;
use self::generate::Unfinished;
use crate::config::layers::{LayerError, Layers, blamed_variable, unknown_variables};
use crate::config::{Config, ConfigError, EdgeConfig, LogFormat, ModelChoice, ModelFlags, setting};
use crate::logging;
use crate::run::RunError;

/// Exit code of a command that could not do what it was asked to.
const FAILED: u8 = 1;
/// How long a server that a command started for itself may take to end.
const OWN_SERVER_GRACE: Duration = Duration::from_secs(5);
/// Threads that tokenise prompts; more prompts wait for one.
const TOKENISING_THREADS: usize = 4;
/// Exit code of a command that was asked wrongly.
const MISUSED: u8 = 2;
/// Exit code of a server whose verifier kept failing.
const VERIFIER_FAILED: u8 = 3;
/// Exit code of a server whose engine did not come back from a step.
const ENGINE_HUNG: u8 = 4;
/// Exit code of a command whose output nobody reads any more: as if SIGPIPE had ended it.
const UNREAD: u8 = 128 + 13;
/// Exit code of a command that ctrl-c ended: as if SIGINT had.
const INTERRUPTED: u8 = 128 + 2;
/// Fewest output tokens with a proposal among them: the first comes from the prompt, and the last
/// needs none.
const PROPOSING_TOKENS_MIN: i64 = 3;

/// A speculative-decoding server: the bytes of a completion never depend on the draft.
#[derive(Debug, Parser)]
#[command(
    name = "slipstream",
    version,
    about,
    arg_required_else_help = true,
    after_help = "\
Settings come from the command line, the environment (SLIPSTREAM_*) and a TOML file (--config), in \
this order; `slipstream check-config` shows what is in effect.

Examples:
  slipstream demo
  slipstream serve --config slipstream.toml
  slipstream chat --server http://127.0.0.1:50051"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a server, stream some completions, and measure them plain beside speculative
    Demo(demo::DemoFlags),
    /// Serve completions over gRPC until SIGTERM or ctrl-c
    #[command(after_help = "\
The first SIGTERM or ctrl-c lets running requests finish within --grace; the second ends at once.
Exit codes: 0 told to end, 1 failed or cut off, 2 asked wrongly, 3 the verifier kept failing, 4 the
engine hung.

Examples:
  slipstream serve
  slipstream serve --config slipstream.toml --listen 0.0.0.0:50051
  SLIPSTREAM_MAX_RUNNING=32 slipstream serve --model DIR-OR-GGUF --draft-model DIR-OR-GGUF")]
    Serve(Box<crate::config::ServeFlags>),
    /// Complete one prompt, on a server of its own or on a running one
    Generate(Box<generate::GenerateFlags>),
    /// Talk with a model, on a server of its own or on a running one
    Chat(Box<chat::ChatFlags>),
    /// Check that a pair gives the same bytes with speculation and without
    SelfTest(self_test::SelfTestFlags),
    /// Write a larger model with the function of a small one, to measure with
    Grow(Box<grow::GrowFlags>),
    /// Check the settings of serve and print the configuration in effect
    CheckConfig(Box<check_config::CheckConfigFlags>),
    /// List every limit: what operators set and what the protocol fixes
    Limits,
    /// Print a script that lets a shell complete the command line
    Completion(completion::CompletionFlags),
}

impl Command {
    /// Whether results are read by programs, which then read errors, too.
    fn wants_json(&self) -> bool {
        match self {
            Self::Generate(flags) => flags.json,
            Self::Chat(flags) => flags.json,
            Self::SelfTest(flags) => flags.json,
            Self::Demo(_) | Self::Serve(_) | Self::Grow(_) | Self::CheckConfig(_) => false,
            Self::Limits | Self::Completion(_) => false,
        }
    }
}

/// Parses the command line, runs the command, and tells how it went: 0 done, 1 failed, 2 asked
/// wrongly, 3 the verifier kept failing, 4 the engine hung, 130 interrupted, 141 nobody reads the
/// output.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let layers = match Layers::read(&command(), &args) {
        Ok(layers) => layers,
        Err(LayerError::Usage(error)) => return misused(&error, &args),
        Err(LayerError::File(error)) => return failed(&error.into(), false),
        Err(LayerError::Config(error)) => return failed(&error.into(), false),
    };
    let cli = match Cli::from_arg_matches(&layers.matches) {
        Ok(cli) => cli,
        Err(error) => return misused(&error, &args),
    };
    let wants_json = cli.command.wants_json();
    let Err(error) = execute(cli.command, &layers) else { return ExitCode::SUCCESS };
    match error.downcast::<ConfigError>() {
        Ok(error) => failed(&layers.explain(error).into(), wants_json),
        Err(error) => failed(&error, wants_json),
    }
}

/// The command line with all that its help tells.
fn command() -> clap::Command {
    setting::describe(Cli::command())
}

/// Tells what clap says, and the variable that a wrong value came from.
fn misused(error: &clap::Error, args: &[OsString]) -> ExitCode {
    let _ = error.print(); // without a terminal there is nobody to tell
    if let Some(variable) = blamed_variable(error, args) {
        let note = "the value comes from the environment variable";
        let _ = writeln!(io::stderr().lock(), "note: {note} {variable}");
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(MISUSED))
}

/// Tells an error and gives its exit code.
fn failed(error: &anyhow::Error, wants_json: bool) -> ExitCode {
    if is_unread(error) {
        return ExitCode::from(UNREAD);
    }
    let mut stderr = io::stderr().lock();
    // Without stderr there is nobody to tell.
    let _ = match wants_json {
        true => writeln!(stderr, "{}", json!({ "error": error_json(error) })),
        false => writeln!(stderr, "error: {}", describe(error)),
    };
    ExitCode::from(exit_code(error))
}

fn error_json(error: &anyhow::Error) -> Value {
    match error.downcast_ref::<Unfinished>() {
        Some(unfinished) => unfinished.json(),
        None => json!({ "message": describe(error) }),
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
    let is_interrupted = matches!(stream_error(error), Some(StreamError::Interrupted { .. }));
    if is_interrupted || error.is::<grow::Interrupted>() {
        INTERRUPTED
    } else if error.is::<ConfigError>() || error.is::<crate::config::file::FileError>() {
        MISUSED
    } else {
        match error.downcast_ref::<RunError>() {
            Some(RunError::VerifierFailed) => VERIFIER_FAILED,
            Some(RunError::EngineHung { .. }) => ENGINE_HUNG,
            Some(
                RunError::Startup(_)
                | RunError::Thread(_)
                | RunError::EngineEnded
                | RunError::Forced,
            )
            | None => FAILED,
        }
    }
}

fn stream_error(error: &anyhow::Error) -> Option<&StreamError> {
    let unfinished = error.downcast_ref::<Unfinished>().map(|unfinished| &unfinished.error);
    unfinished.or_else(|| error.downcast_ref::<StreamError>())
}

/// Whether the reader of stdout has gone. Errors of connections are never bare [`io::Error`]s.
fn is_unread(error: &anyhow::Error) -> bool {
    let failed = match stream_error(error) {
        Some(StreamError::Output(error)) => Some(error),
        Some(StreamError::Call { .. } | StreamError::Interrupted { .. }) => None,
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
    existing_models(&config)?;
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

/// Checks that there is something where models are said to be.
fn existing_models(config: &Config) -> Result<(), ConfigError> {
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
    Ok(())
}

fn execute(command: Command, layers: &Layers) -> anyhow::Result<()> {
    match &command {
        Command::Serve(flags) => logging::start(flags.log.format, &flags.log.filter)?,
        Command::Demo(_)
        | Command::Generate(_)
        | Command::Chat(_)
        | Command::SelfTest(_)
        | Command::Grow(_)
        | Command::CheckConfig(_)
        | Command::Limits
        | Command::Completion(_) => logging::start(LogFormat::Text, logging::QUIET)?,
    }
    for warning in unknown_variables(&self::command()) {
        tracing::warn!("{warning}");
    }
    let given = layers.matches.subcommand();
    let given = given.map_or_else(Vec::new, |(_, flags)| model_flags_given(flags));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(network_threads())
        .max_blocking_threads(TOKENISING_THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        match command {
            Command::Demo(flags) => demo::run(flags).await,
            Command::Serve(flags) => serve::run(*flags).await,
            Command::Generate(flags) => generate::run(*flags, &given).await,
            Command::Chat(flags) => chat::run(*flags, &given).await,
            Command::SelfTest(flags) => self_test::run(flags).await,
            Command::Grow(flags) => grow::run(*flags).await,
            Command::CheckConfig(flags) => check_config::run(&flags, layers),
            Command::Limits => Ok(limits::run()?),
            Command::Completion(flags) => Ok(completion::run(&flags, self::command())?),
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::exit_code;
    use crate::run::RunError;

    #[test]
    fn an_engine_that_cannot_go_on_has_codes_of_its_own() {
        let code = |error: RunError| exit_code(&error.into());
        let second = Duration::from_secs(1);
        assert_eq!(code(RunError::VerifierFailed), 3);
        assert_eq!(code(RunError::EngineHung { age: second, limit: second }), 4);
        assert_eq!(code(RunError::EngineEnded), 1);
        assert_eq!(code(RunError::Forced), 1);
    }
}
