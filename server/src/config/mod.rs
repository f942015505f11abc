//! Owns the settings of a server: what is given by command line, environment and file, and the
//! [`Config`] it becomes once checked. The only reader of the environment. Knows no models and no
//! sockets.

pub(crate) mod bounds;
pub(crate) mod effective;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod flags;
pub(crate) mod layers;
pub mod reference;
pub(crate) mod setting;
pub(crate) mod units;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use slipstream_model::clock::Micros;

use self::bounds::{check_bytes, check_count, check_time};
pub use self::error::{ConfigError, Origin};
pub use self::flags::{ConnectionFlags, FileFlag, LogFlags, ModelFlags, ServeFlags, TimeFlags};
pub use self::units::{ByteCount, TimeSpan, TimeSpanOrOff, UnitError};
use crate::engine::EngineConfig;
use crate::net::settings::NetConfig;

/// Name under which the embedded models are chosen.
const EMBEDDED: &str = "embedded";
/// What `--draft-model` says for no draft.
const NONE: &str = "none";

/// Weight format in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantize {
    /// As the file has them.
    #[default]
    None,
    /// 8-bit integers with one scale per 32 weights.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit integers with one scale per 32 weights.
    Q4,
}

/// Type of keys and values in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum KvPrecision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats.
    F16,
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

/// Size of the KV pools of verifier and draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    /// As much as is of use, within a share of the memory that is free.
    Auto,
    /// So many blocks in each.
    Blocks(usize),
    /// As many blocks as fit both pools together, in bytes.
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
    /// Weight format of the verifier in memory.
    pub quantize: Quantize,
    /// Weight format of the draft in memory.
    pub draft_quantize: Quantize,
    /// Memory that loading one model may take at its peak.
    pub load_memory_bytes: u64,
    /// Size of the KV pools: verifier and draft have as many blocks.
    pub kv: KvSize,
    /// Type of keys and values of both.
    pub kv_type: KvPrecision,
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
    /// What one step of the engine may take before the server counts as unsound; after twice that
    /// it ends.
    pub step_limit: Duration,
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
            // The longest honest steps, a full batch of long prompts on a large model, take
            // seconds; an orchestrator's restart costs more than that.
            step_limit: Duration::from_secs(60),
            stall_limit: Duration::from_secs(30),
            message_bytes_max: crate::grpc::limits::MESSAGE_BYTES_MAX,
            gzip: false,
            net: NetConfig::default(),
        }
    }
}

impl Config {
    /// Checks flags about models. What clients see is taken as it is, the grace excepted: tests set
    /// what no operator may.
    ///
    /// # Errors
    /// [`ConfigError`] for the first one that cannot be used.
    pub fn new(flags: &ModelFlags, edge: EdgeConfig) -> Result<Self, ConfigError> {
        check_time("grace", edge.grace)?;
        Ok(Self {
            models: models(flags)?,
            engine: EngineConfig {
                step_tokens_max: check_count("step-tokens", flags.step_tokens)?,
                max_running: check_count("max-running", flags.max_running)?,
                max_waiting: check_count("max-waiting", flags.max_waiting)?,
                draft_len_auto: check_count("draft-len", flags.draft_len)?,
                draft_len_max: bounds::most("draft-len"),
                step_target: micros("step-target", flags.step_target)?,
                unread_tokens_max: check_count("unread-tokens", flags.unread_tokens)?,
                preemptions_max: check_count("max-preemptions", flags.max_preemptions)?,
                priority_aging: micros("priority-aging", flags.priority_aging)?,
                prefix_reuse: flags.prefix_reuse,
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

impl ServeFlags {
    /// Checks all flags but the addresses to listen on and the log's filter.
    ///
    /// # Errors
    /// [`ConfigError`] for the first one that cannot be used.
    pub fn config(&self) -> Result<Config, ConfigError> {
        Config::new(&self.model, self.edge()?)
    }

    fn edge(&self) -> Result<EdgeConfig, ConfigError> {
        let flags = &self.connections;
        let edge = EdgeConfig {
            grace: check_time("grace", self.grace.0)?,
            step_limit: check_time("step-limit", self.step_limit.0)?,
            stall_limit: check_time("stall-limit", flags.times.stall_limit.0)?,
            message_bytes_max: small_bytes("max-message", flags.max_message)?,
            gzip: flags.gzip,
            net: flags.net()?,
        };
        let net = &edge.net;
        if net.connection_window_bytes < net.stream_window_bytes {
            let problem = format!(
                "must be at least --stream-window ({}), or no stream could use its own; got {}",
                flags.stream_window, flags.connection_window
            );
            return Err(ConfigError::new("connection-window", problem));
        }
        // Who looks for stalled completions comes by eight times per limit.
        if net.stream_stall_timeout < edge.stall_limit + edge.stall_limit / 4 {
            let problem = format!(
                "must be a quarter longer than --stall-limit ({}), so that a completion whose \
                 client does not read ends with a status before its stream is reset; got {}",
                flags.times.stall_limit, flags.times.stream_stall_timeout
            );
            return Err(ConfigError::new("stream-stall-timeout", problem));
        }
        Ok(edge)
    }
}

impl ConnectionFlags {
    fn net(&self) -> Result<NetConfig, ConfigError> {
        let streams = usize::try_from(self.max_streams).unwrap_or(usize::MAX);
        check_count("max-streams", streams)?;
        let times = &self.times;
        let age_max = times.max_age.0.map(|age| check_time("max-age", age));
        Ok(NetConfig {
            connections_max: check_count("max-connections", self.max_connections)?,
            streams_max: self.max_streams,
            stream_window_bytes: small_bytes("stream-window", self.stream_window)?,
            connection_window_bytes: small_bytes("connection-window", self.connection_window)?,
            send_buffer_bytes: small_bytes("send-buffer", self.send_buffer)?,
            header_bytes_max: small_bytes("max-headers", self.max_headers)?,
            pending_resets_max: check_count("max-pending-resets", self.max_pending_resets)?,
            keepalive_interval: check_time("keepalive-interval", times.keepalive_interval.0)?,
            keepalive_timeout: check_time("keepalive-timeout", times.keepalive_timeout.0)?,
            first_request_timeout: check_time(
                "first-request-timeout",
                times.first_request_timeout.0,
            )?,
            idle_timeout: check_time("idle-timeout", times.idle_timeout.0)?,
            age_max: age_max.transpose()?,
            age_grace: check_time("age-grace", times.age_grace.0)?,
            stream_stall_timeout: check_time("stream-stall-timeout", times.stream_stall_timeout.0)?,
        })
    }
}

/// Checks a time that the engine counts in microseconds.
fn micros(flag: &'static str, time: TimeSpan) -> Result<Micros, ConfigError> {
    let time = check_time(flag, time.0)?;
    Ok(Micros(u64::try_from(time.as_micros()).expect("the range of the setting fits")))
}

/// Checks a size whose range fits the type it is kept in.
fn small_bytes<T>(flag: &'static str, size: ByteCount) -> Result<T, ConfigError>
where
    T: TryFrom<u64, Error: std::fmt::Debug>,
{
    let bytes = check_bytes(flag, size)?;
    Ok(T::try_from(bytes).expect("the range of the setting fits its type"))
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
    let kv = match (flags.kv_blocks, flags.kv_memory) {
        (Some(blocks), _) => KvSize::Blocks(check_count("kv-blocks", blocks)?),
        (None, Some(size)) => KvSize::Bytes(check_bytes("kv-memory", size)?),
        (None, None) => KvSize::Auto,
    };
    let threads = flags.threads.unwrap_or_else(core_count);
    let limit = flags.context_limit.map(|limit| check_count("context-limit", limit));
    Ok(ModelConfig {
        verifier,
        draft,
        name: flags.model_name.as_deref().map(model_name).transpose()?,
        threads: check_count("threads", threads)?,
        context_limit: limit.transpose()?,
        quantize: flags.quantize,
        draft_quantize: flags.draft_quantize,
        load_memory_bytes: check_bytes("load-memory", flags.load_memory)?,
        kv,
        kv_type: flags.kv_type,
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

fn core_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(bounds::most("threads"))
}

/// Whether stdout is a terminal that shall be written in colour (`NO_COLOR` is honoured).
#[must_use]
pub fn wants_colour() -> bool {
    let is_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !is_refused
}

#[cfg(test)]
mod tests {
    use super::{ByteCount, Config, ConfigError, EdgeConfig, ModelChoice, ModelFlags};

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
    fn wrong_settings_name_their_flag() {
        let base = || ModelFlags { model: Some("m".to_owned()), ..ModelFlags::default() };
        let cases = [
            ("--threads", ModelFlags { threads: Some(0), ..base() }),
            ("--context-limit", ModelFlags { context_limit: Some(1), ..base() }),
            ("--draft-len", ModelFlags { draft_len: 9, ..base() }),
            ("--max-running", ModelFlags { max_running: 0, ..base() }),
            ("--step-tokens", ModelFlags { step_tokens: 0, ..base() }),
            ("--kv-blocks", ModelFlags { kv_blocks: Some(0), ..base() }),
            ("--kv-memory", ModelFlags { kv_memory: Some(ByteCount(0)), ..base() }),
            ("--load-memory", ModelFlags { load_memory: ByteCount(0), ..base() }),
            ("--model", ModelFlags { model: Some(String::new()), ..base() }),
            ("--model-name", ModelFlags { model_name: Some("a\nb".to_owned()), ..base() }),
        ];
        for (flag, flags) in cases {
            let error = check(flags).expect_err(flag).to_string();
            assert!(error.starts_with(flag), "{error}");
        }
    }
}
