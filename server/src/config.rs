//! Owns the settings of a server: flags and environment as given, and the [`Config`] they become
//! once checked. The only reader of the environment. Knows no models and no sockets.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use slipstream_model::load::DEFAULT_MEMORY_BUDGET_BYTES;

use crate::engine::EngineConfig;
use crate::net::settings::NetConfig;

/// Threads that one network may use.
const THREADS_MAX: usize = 256;
/// Rows that one step may compute.
const STEP_TOKENS_MAX: usize = 65_536;
/// Requests that may run or wait at the same time.
const REQUESTS_MAX: usize = 65_536;
/// Longest draft length; beyond it acceptance is hopeless and verification dear.
const DRAFT_LEN_MAX: usize = 8;
/// Positions of a configured context limit.
const CONTEXT_LEN_MAX: usize = 1 << 24;
/// KV blocks of one pool.
const KV_BLOCKS_MAX: usize = u32::MAX as usize;
/// Longest wait for running requests at shutdown, in seconds.
const GRACE_SECONDS_MAX: u64 = 24 * 3600;
/// Name under which the embedded models are chosen.
const EMBEDDED: &str = "embedded";
/// What `--draft-model` says for no draft.
const NONE: &str = "none";

/// Flags about models and engine, shared by all commands that run a server of their own.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Models and engine")]
pub struct ModelFlags {
    /// Verifier: a Hugging Face directory, a GGUF file, or `embedded`
    #[arg(long, value_name = "PATH", env = "SLIPSTREAM_MODEL")]
    pub model: Option<String>,
    /// Draft: a Hugging Face directory, a GGUF file, `embedded`, or `none`. Must have the
    /// verifier's vocabulary [default: embedded with the embedded verifier, otherwise none]
    #[arg(long, value_name = "PATH", env = "SLIPSTREAM_DRAFT_MODEL")]
    pub draft_model: Option<String>,
    /// Name clients know the verifier by [default: the model's own]
    #[arg(long, value_name = "NAME", env = "SLIPSTREAM_MODEL_NAME")]
    pub model_name: Option<String>,
    /// Threads for the networks, 1 to 256 [default: all cores]
    #[arg(long, value_name = "N", env = "SLIPSTREAM_THREADS")]
    pub threads: Option<usize>,
    /// Positions to use of the model's context, 2 or more [default: all]
    #[arg(long, value_name = "POSITIONS", env = "SLIPSTREAM_CONTEXT_LIMIT")]
    pub context_limit: Option<usize>,
    /// Weights in memory: as in the file, or 8-bit
    #[arg(long, value_enum, default_value_t, env = "SLIPSTREAM_QUANTIZE")]
    pub quantize: Quantize,
    /// Memory that loading one model may take at its peak, for example 8GiB [default: 64GiB]
    #[arg(long, value_name = "SIZE", env = "SLIPSTREAM_LOAD_MEMORY")]
    pub load_memory: Option<String>,
    /// KV pool in blocks of 16 positions, 1 or more
    #[arg(long, value_name = "BLOCKS", env = "SLIPSTREAM_KV_BLOCKS", conflicts_with = "kv_memory")]
    pub kv_blocks: Option<usize>,
    /// KV pool of the verifier as memory, for example 512MiB [default: enough for --max-running
    /// full contexts, at most 1GiB]
    #[arg(long, value_name = "SIZE", env = "SLIPSTREAM_KV_MEMORY")]
    pub kv_memory: Option<String>,
    /// Tokens per proposal where clients leave it to the server, 0 to 8; 0 never proposes
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = EngineConfig::default().draft_len_auto,
        env = "SLIPSTREAM_DRAFT_LEN"
    )]
    pub draft_len: usize,
    /// Requests computed at the same time, 1 to 65536
    #[arg(
        long,
        value_name = "N",
        default_value_t = EngineConfig::default().max_running,
        env = "SLIPSTREAM_MAX_RUNNING"
    )]
    pub max_running: usize,
    /// Requests that may wait beyond those, 0 to 65536; more are refused with RESOURCE_EXHAUSTED
    #[arg(
        long,
        value_name = "N",
        default_value_t = EngineConfig::default().max_waiting,
        env = "SLIPSTREAM_MAX_WAITING"
    )]
    pub max_waiting: usize,
    /// Rows of one step over all requests, 1 to 65536: bounds how long a long prompt holds others
    /// up. Proposals need 2 or more
    #[arg(
        long,
        value_name = "ROWS",
        default_value_t = EngineConfig::default().step_tokens_max,
        env = "SLIPSTREAM_STEP_TOKENS"
    )]
    pub step_tokens: usize,
}

impl Default for ModelFlags {
    /// The embedded pair and the engine's defaults, as on an empty command line.
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            model: None,
            draft_model: None,
            model_name: None,
            threads: None,
            context_limit: None,
            quantize: Quantize::default(),
            load_memory: None,
            kv_blocks: None,
            kv_memory: None,
            draft_len: engine.draft_len_auto,
            max_running: engine.max_running,
            max_waiting: engine.max_waiting,
            step_tokens: engine.step_tokens_max,
        }
    }
}

/// Flags of `slipstream serve`.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct ServeFlags {
    /// Host name or IP address, and port, to listen on; port 0 takes a free one
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:50051",
        env = "SLIPSTREAM_LISTEN"
    )]
    pub listen: String,
    /// How long running requests may take to finish at shutdown, 0 to 86400
    #[arg(long, value_name = "SECONDS", default_value_t = 30, env = "SLIPSTREAM_GRACE_SECONDS")]
    pub grace_seconds: u64,
    /// Form of the log on stderr
    #[arg(long, value_enum, default_value_t, env = "SLIPSTREAM_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// What to log, for example `info` or `slipstream_server=debug`
    #[arg(long, value_name = "FILTER", default_value = "info", env = "SLIPSTREAM_LOG")]
    pub log: String,
    /// Models and engine.
    #[command(flatten)]
    pub model: ModelFlags,
}

/// Weight format in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantize {
    /// As the file has them.
    #[default]
    None,
    /// 8-bit integers with one scale per 32 weights.
    #[value(name = "q8_0")]
    Q8_0,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelChoice {
    /// The one inside the binary.
    Embedded,
    /// A Hugging Face directory or a GGUF file.
    Path(PathBuf),
}

/// Size of the KV pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    /// Full contexts for all running requests, within a bound.
    Auto,
    /// So many blocks.
    Blocks(usize),
    /// As many blocks as fit, in bytes.
    Bytes(u64),
}

/// Checked settings of the models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    /// The target.
    pub verifier: ModelChoice,
    /// What proposes, if anything does.
    pub draft: Option<ModelChoice>,
    /// Name clients know the verifier by; `None` for its own.
    pub name: Option<String>,
    /// Threads per network, at least 1.
    pub threads: usize,
    /// Positions to use of the context, at least 1; `None` for all.
    pub context_limit: Option<usize>,
    /// Weight format in memory.
    pub quantize: Quantize,
    /// Memory that loading one model may take at its peak.
    pub load_memory_bytes: u64,
    /// Size of the verifier's KV pool; the draft's has as many blocks.
    pub kv: KvSize,
}

/// Checked settings of a server. The listener comes separately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The models.
    pub models: ModelConfig,
    /// The engine.
    pub engine: EngineConfig,
    /// The side that clients see.
    pub edge: EdgeConfig,
}

/// Checked settings of the side that clients see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeConfig {
    /// How long running requests may take to finish at shutdown.
    pub grace: Duration,
    /// A completion whose client takes nothing for this long, although there is something to take,
    /// is ended.
    pub stall_limit: Duration,
    /// One request message, in bytes.
    pub message_bytes_max: usize,
    /// Whether gRPC messages may be compressed with gzip, in both directions.
    pub gzip: bool,
    /// Connections.
    pub net: NetConfig,
}

impl EdgeConfig {
    /// The defaults, with this grace.
    #[must_use]
    pub fn with_grace(grace: Duration) -> Self {
        Self { grace, ..Self::default() }
    }
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(30),
            stall_limit: Duration::from_secs(30),
            message_bytes_max: crate::grpc::limits::MESSAGE_BYTES_MAX,
            gzip: false,
            net: NetConfig::default(),
        }
    }
}

/// A setting that cannot be used. The message names the flag, the value and what would be allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}{variable}: {problem}")]
pub struct ConfigError {
    flag: &'static str,
    /// Where the value may have come from instead.
    variable: String,
    problem: String,
}

impl ConfigError {
    pub(crate) fn new(flag: &'static str, problem: impl Into<String>) -> Self {
        let name = format!("SLIPSTREAM_{}", flag.replace('-', "_").to_uppercase());
        let variable = match std::env::var_os(&name) {
            Some(_) => format!(" or {name}"),
            None => String::new(),
        };
        Self { flag, variable, problem: problem.into() }
    }
}

impl Config {
    /// Checks flags.
    ///
    /// # Errors
    /// [`ConfigError`] for the first one that cannot be used.
    pub fn new(flags: &ModelFlags, edge: EdgeConfig) -> Result<Self, ConfigError> {
        within("grace-seconds", edge.grace.as_secs(), 0, GRACE_SECONDS_MAX)?;
        Ok(Self {
            models: models(flags)?,
            engine: EngineConfig {
                step_tokens_max: within("step-tokens", flags.step_tokens, 1, STEP_TOKENS_MAX)?,
                max_running: within("max-running", flags.max_running, 1, REQUESTS_MAX)?,
                max_waiting: within("max-waiting", flags.max_waiting, 0, REQUESTS_MAX)?,
                draft_len_auto: within("draft-len", flags.draft_len, 0, DRAFT_LEN_MAX)?,
                draft_len_max: DRAFT_LEN_MAX,
                ..EngineConfig::default()
            },
            edge,
        })
    }

    /// Requests that the server holds at the same time at most.
    #[must_use]
    pub fn requests_max(&self) -> usize {
        self.engine.max_running + self.engine.max_waiting
    }
}

fn models(flags: &ModelFlags) -> Result<ModelConfig, ConfigError> {
    let verifier = match flags.model.as_deref() {
        None => ModelChoice::Embedded,
        Some(text) => model_choice("model", text)?,
    };
    let draft = match flags.draft_model.as_deref() {
        None if verifier == ModelChoice::Embedded => Some(ModelChoice::Embedded),
        None | Some(NONE) => None,
        Some(text) => Some(model_choice("draft-model", text)?),
    };
    let embedded = [("model", Some(&verifier)), ("draft-model", draft.as_ref())]
        .into_iter()
        .find(|(_, choice)| *choice == Some(&ModelChoice::Embedded));
    if let (Some((flag, _)), false) = (embedded, cfg!(feature = "embedded-pair")) {
        let problem = "this binary was built without the embedded pair: give the path of a model";
        return Err(ConfigError::new(flag, problem));
    }
    let kv = match (flags.kv_blocks, flags.kv_memory.as_deref()) {
        (Some(blocks), _) => KvSize::Blocks(within("kv-blocks", blocks, 1, KV_BLOCKS_MAX)?),
        (None, Some(text)) => KvSize::Bytes(byte_count("kv-memory", text)?),
        (None, None) => KvSize::Auto,
    };
    let threads = flags.threads.unwrap_or_else(core_count);
    let limit = flags.context_limit;
    Ok(ModelConfig {
        verifier,
        draft,
        name: flags.model_name.as_deref().map(model_name).transpose()?,
        threads: within("threads", threads, 1, THREADS_MAX)?,
        context_limit: limit
            .map(|limit| within("context-limit", limit, 2, CONTEXT_LEN_MAX))
            .transpose()?,
        quantize: flags.quantize,
        load_memory_bytes: match flags.load_memory.as_deref() {
            Some(text) => byte_count("load-memory", text)?,
            None => DEFAULT_MEMORY_BUDGET_BYTES,
        },
        kv,
    })
}

fn model_choice(flag: &'static str, text: &str) -> Result<ModelChoice, ConfigError> {
    match text {
        "" => Err(ConfigError::new(flag, "is empty: give a path, or leave the flag out")),
        EMBEDDED => Ok(ModelChoice::Embedded),
        path => Ok(ModelChoice::Path(PathBuf::from(path))),
    }
}

fn model_name(name: &str) -> Result<String, ConfigError> {
    let limit = crate::grpc::limits::MODEL_NAME_BYTES_MAX;
    if name.is_empty() || name.len() > limit || name.chars().any(char::is_control) {
        let problem = format!("must be 1 to {limit} bytes without control characters");
        return Err(ConfigError::new("model-name", problem));
    }
    Ok(name.to_owned())
}

fn within<T: PartialOrd + Copy + std::fmt::Display>(
    flag: &'static str,
    value: T,
    least: T,
    most: T,
) -> Result<T, ConfigError> {
    if value >= least && value <= most {
        return Ok(value);
    }
    Err(ConfigError::new(flag, format!("must be from {least} to {most}, got {value}")))
}

/// A number with a unit: `KiB`, `MiB`, `GiB` or none for bytes.
fn byte_count(flag: &'static str, text: &str) -> Result<u64, ConfigError> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1u64)];
    let parsed = units.iter().find_map(|(unit, factor)| {
        let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
        number.checked_mul(*factor)
    });
    parsed
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| ConfigError::new(flag, format!("must be like 512MiB or 2GiB, got {text:?}")))
}

fn core_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

/// Whether stdout is a terminal that shall be written in colour (`NO_COLOR` is honoured).
#[must_use]
pub fn wants_colour() -> bool {
    let is_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !is_refused
}

#[cfg(test)]
mod tests {
    use super::{Config, ConfigError, EdgeConfig, KvSize, ModelChoice, ModelFlags};

    fn check(flags: ModelFlags) -> Result<Config, ConfigError> {
        Config::new(&flags, EdgeConfig::default())
    }

    #[test]
    fn a_draft_comes_along_only_with_the_embedded_verifier() {
        let path = || Some("models/big".to_owned());
        let config = check(ModelFlags { model: path(), ..ModelFlags::default() }).expect("valid");
        assert_eq!(config.models.draft, None);
        if cfg!(feature = "embedded-pair") {
            let config = check(ModelFlags::default()).expect("valid");
            assert_eq!(config.models.draft, Some(ModelChoice::Embedded));
            let none = ModelFlags { draft_model: Some("none".to_owned()), ..ModelFlags::default() };
            assert_eq!(check(none).expect("valid").models.draft, None);
        }
    }

    #[test]
    fn sizes_are_read_with_their_unit() {
        for (text, bytes) in [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("7", 7), ("1 KiB", 1024)] {
            let flags = ModelFlags {
                model: Some("m".to_owned()),
                kv_memory: Some(text.to_owned()),
                ..ModelFlags::default()
            };
            assert_eq!(check(flags).expect(text).models.kv, KvSize::Bytes(bytes));
        }
    }

    #[test]
    fn wrong_settings_name_their_flag() {
        let base = || ModelFlags { model: Some("m".to_owned()), ..ModelFlags::default() };
        let cases = [
            ("--threads", ModelFlags { threads: Some(0), ..base() }),
            ("--context-limit", ModelFlags { context_limit: Some(1), ..base() }),
            ("--draft-len", ModelFlags { draft_len: 9, ..base() }),
            ("--max-running", ModelFlags { max_running: 0, ..base() }),
            ("--step-tokens", ModelFlags { step_tokens: 0, ..base() }),
            ("--kv-blocks", ModelFlags { kv_blocks: Some(0), ..base() }),
            ("--kv-memory", ModelFlags { kv_memory: Some("many".to_owned()), ..base() }),
            ("--kv-memory", ModelFlags { kv_memory: Some("0MiB".to_owned()), ..base() }),
            ("--model", ModelFlags { model: Some(String::new()), ..base() }),
            ("--model-name", ModelFlags { model_name: Some("a\nb".to_owned()), ..base() }),
        ];
        for (flag, flags) in cases {
            let error = check(flags).expect_err(flag).to_string();
            assert!(error.starts_with(flag), "{error}");
        }
    }
}
