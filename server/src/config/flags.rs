//! Owns the settings as clap reads them: each flag is also a variable of the environment and a key
//! of the configuration file. Ranges are in `bounds.rs`.

use std::path::PathBuf;
use std::time::Duration;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use slipstream_model::load::DEFAULT_MEMORY_BUDGET_BYTES;

use super::units::{ByteCount, TimeSpan, TimeSpanOrOff};
use super::{EdgeConfig, KvPrecision, LogFormat, Quantize};
use crate::engine::EngineConfig;
use crate::net::settings::NetConfig;

/// What settings without a fixed default are when nobody sets them. A model has a default, too, but
/// not in every build.
pub(crate) const DERIVED_DEFAULTS: [(&str, &str); 8] = [
    ("http-listen", "none: probes and metrics are on the one port only"),
    ("model", "embedded"),
    ("draft-model", "embedded with the embedded verifier, otherwise none"),
    ("model-name", "the model's own"),
    ("threads", "all cores"),
    ("context-limit", "all of the model's"),
    ("kv-blocks", "as --kv-memory says"),
    (
        "kv-memory",
        "half of the memory that is free once the models are loaded, at most twice what \
         --max-running full contexts take",
    ),
];

/// Settings that exclude each other. Where two layers set one each, the higher layer wins.
pub(crate) const EXCLUSIVE: (&str, &str) = ("kv-blocks", "kv-memory");

/// The one flag that is no key of the file.
pub(crate) const CONFIG_FLAG: &str = "config";

/// Where settings are read from beside command line and environment.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Configuration")]
pub struct FileFlag {
    /// Read settings from this TOML file: every flag that has an environment variable is a key, in
    /// snake_case. The command line and the environment come before it
    #[arg(long, value_name = "FILE", env = "SLIPSTREAM_CONFIG")]
    pub config: Option<PathBuf>,
}

/// Flags about models and engine, shared by all commands that run a server of their own.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Models and engine")]
pub struct ModelFlags {
    /// Verifier: a Hugging Face directory, a GGUF file, or `embedded`
    #[arg(long, value_name = "PATH", env = "SLIPSTREAM_MODEL")]
    pub model: Option<String>,
    /// Draft: a Hugging Face directory, a GGUF file, `embedded`, or `none`. Must have the
    /// verifier's vocabulary
    #[arg(long, value_name = "PATH", env = "SLIPSTREAM_DRAFT_MODEL")]
    pub draft_model: Option<String>,
    /// Name clients know the verifier by
    #[arg(long, value_name = "NAME", env = "SLIPSTREAM_MODEL_NAME")]
    pub model_name: Option<String>,
    /// Threads for the networks
    #[arg(long, value_name = "N", env = "SLIPSTREAM_THREADS")]
    pub threads: Option<usize>,
    /// Positions to use of the model's context
    #[arg(long, value_name = "POSITIONS", env = "SLIPSTREAM_CONTEXT_LIMIT")]
    pub context_limit: Option<usize>,
    /// All matrices of the verifier in memory: as in the file (none), 8-bit or 4-bit
    #[arg(long, value_enum, default_value_t, env = "SLIPSTREAM_QUANTIZE")]
    pub quantize: Quantize,
    /// All matrices of the draft in memory: as in the file (none), 8-bit or 4-bit
    #[arg(long, value_enum, default_value_t, env = "SLIPSTREAM_DRAFT_QUANTIZE")]
    pub draft_quantize: Quantize,
    /// Memory that loading one model may take at its peak
    #[arg(
        long,
        value_name = "SIZE",
        default_value_t = ByteCount(DEFAULT_MEMORY_BUDGET_BYTES),
        env = "SLIPSTREAM_LOAD_MEMORY"
    )]
    pub load_memory: ByteCount,
    /// KV blocks of 16 positions, as many for the draft as for the verifier; excludes --kv-memory
    #[arg(long, value_name = "BLOCKS", env = "SLIPSTREAM_KV_BLOCKS")]
    pub kv_blocks: Option<usize>,
    /// Memory for KV, that of verifier and draft together; excludes --kv-blocks
    #[arg(long, value_name = "SIZE", env = "SLIPSTREAM_KV_MEMORY")]
    pub kv_memory: Option<ByteCount>,
    /// Keys and values in memory: single precision, or half of it in half the memory
    #[arg(long, value_enum, default_value_t, env = "SLIPSTREAM_KV_TYPE")]
    pub kv_type: KvPrecision,
    /// Tokens per proposal where clients leave it to the server; 0 never proposes
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = EngineConfig::default().draft_len_auto,
        env = "SLIPSTREAM_DRAFT_LEN"
    )]
    pub draft_len: usize,
    /// Requests computed at the same time
    #[arg(
        long,
        value_name = "N",
        default_value_t = EngineConfig::default().max_running,
        env = "SLIPSTREAM_MAX_RUNNING"
    )]
    pub max_running: usize,
    /// Requests that may wait beyond those; more are refused with RESOURCE_EXHAUSTED
    #[arg(
        long,
        value_name = "N",
        default_value_t = EngineConfig::default().max_waiting,
        env = "SLIPSTREAM_MAX_WAITING"
    )]
    pub max_waiting: usize,
    /// Rows of one step over all requests. Proposals need 2 or more
    #[arg(
        long,
        value_name = "ROWS",
        default_value_t = EngineConfig::default().step_tokens_max,
        env = "SLIPSTREAM_STEP_TOKENS"
    )]
    pub step_tokens: usize,
    /// How long a step shall take at most while somebody's output is running: prompts are computed
    /// in pieces for that. Steps may always take half as long again as the running outputs alone
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(Duration::from_micros(EngineConfig::default().step_target.0)),
        env = "SLIPSTREAM_STEP_TARGET"
    )]
    pub step_target: TimeSpan,
    /// Output tokens that may wait for a slow client before its request pauses
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = EngineConfig::default().unread_tokens_max,
        env = "SLIPSTREAM_UNREAD_TOKENS"
    )]
    pub unread_tokens: usize,
    /// Times that a request can lose its KV blocks to others; after that it keeps them to its end
    #[arg(
        long,
        value_name = "N",
        default_value_t = EngineConfig::default().preemptions_max,
        env = "SLIPSTREAM_MAX_PREEMPTIONS"
    )]
    pub max_preemptions: usize,
    /// After each such time in which none of its class started, a waiting request counts as one
    /// class more urgent
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(Duration::from_micros(EngineConfig::default().priority_aging.0)),
        env = "SLIPSTREAM_PRIORITY_AGING"
    )]
    pub priority_aging: TimeSpan,
    /// Whether KV of earlier requests is kept, so that later ones with the same beginning need not
    /// compute it again
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = EngineConfig::default().prefix_reuse,
        value_parser = BoolishValueParser::new(),
        env = "SLIPSTREAM_PREFIX_REUSE"
    )]
    pub prefix_reuse: bool,
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
            draft_quantize: Quantize::default(),
            load_memory: ByteCount(DEFAULT_MEMORY_BUDGET_BYTES),
            kv_blocks: None,
            kv_memory: None,
            kv_type: KvPrecision::default(),
            draft_len: engine.draft_len_auto,
            max_running: engine.max_running,
            max_waiting: engine.max_waiting,
            step_tokens: engine.step_tokens_max,
            step_target: TimeSpan(Duration::from_micros(engine.step_target.0)),
            unread_tokens: engine.unread_tokens_max,
            max_preemptions: engine.preemptions_max,
            priority_aging: TimeSpan(Duration::from_micros(engine.priority_aging.0)),
            prefix_reuse: engine.prefix_reuse,
        }
    }
}

/// Flags about connections and what one peer may take of the server.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub struct ConnectionFlags {
    /// Connections at the same time; more are closed as they come
    #[arg(
        long,
        value_name = "N",
        default_value_t = NetConfig::default().connections_max,
        env = "SLIPSTREAM_MAX_CONNECTIONS"
    )]
    pub max_connections: usize,
    /// HTTP/2 streams of one connection at the same time; more are refused
    #[arg(
        long,
        value_name = "N",
        default_value_t = NetConfig::default().streams_max,
        env = "SLIPSTREAM_MAX_STREAMS"
    )]
    pub max_streams: u32,
    /// One request message; a larger one ends RESOURCE_EXHAUSTED
    #[arg(
        long,
        value_name = "SIZE",
        default_value_t = ByteCount(EdgeConfig::default().message_bytes_max as u64),
        env = "SLIPSTREAM_MAX_MESSAGE"
    )]
    pub max_message: ByteCount,
    /// All headers of one request together
    #[arg(
        long,
        value_name = "SIZE",
        default_value_t = ByteCount(u64::from(NetConfig::default().header_bytes_max)),
        env = "SLIPSTREAM_MAX_HEADERS"
    )]
    pub max_headers: ByteCount,
    /// Whether gRPC messages may be compressed with gzip, in both directions
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = EdgeConfig::default().gzip,
        value_parser = BoolishValueParser::new(),
        env = "SLIPSTREAM_GZIP"
    )]
    pub gzip: bool,
    /// What a peer may send on one HTTP/2 stream before the server has read it
    #[arg(
        long,
        value_name = "SIZE",
        default_value_t = ByteCount(u64::from(NetConfig::default().stream_window_bytes)),
        env = "SLIPSTREAM_STREAM_WINDOW"
    )]
    pub stream_window: ByteCount,
    /// What a peer may send on all HTTP/2 streams of a connection before the server has read it; at
    /// least --stream-window
    #[arg(
        long,
        value_name = "SIZE",
        default_value_t = ByteCount(u64::from(NetConfig::default().connection_window_bytes)),
        env = "SLIPSTREAM_CONNECTION_WINDOW"
    )]
    pub connection_window: ByteCount,
    /// What of one HTTP/2 stream waits for a peer to take it
    #[arg(
        long,
        value_name = "SIZE",
        default_value_t = ByteCount(NetConfig::default().send_buffer_bytes as u64),
        env = "SLIPSTREAM_SEND_BUFFER"
    )]
    pub send_buffer: ByteCount,
    /// HTTP/2 streams that a peer may open and reset before the server has looked at them; one more
    /// and the connection is told to go
    #[arg(
        long,
        value_name = "N",
        default_value_t = NetConfig::default().pending_resets_max,
        env = "SLIPSTREAM_MAX_PENDING_RESETS"
    )]
    pub max_pending_resets: usize,
    /// Times of connections.
    #[command(flatten)]
    pub times: TimeFlags,
}

/// Flags about how long peers may take.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub struct TimeFlags {
    /// A completion whose client takes nothing for this long, although there is something to take,
    /// is ended with RESOURCE_EXHAUSTED
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(EdgeConfig::default().stall_limit),
        env = "SLIPSTREAM_STALL_LIMIT"
    )]
    pub stall_limit: TimeSpan,
    /// A stream whose peer takes nothing for this long is reset; longer than --stall-limit, which
    /// ends completions with a status first
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(NetConfig::default().stream_stall_timeout),
        env = "SLIPSTREAM_STREAM_STALL_TIMEOUT"
    )]
    pub stream_stall_timeout: TimeSpan,
    /// A quiet HTTP/2 connection is asked for a sign of life this often
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(NetConfig::default().keepalive_interval),
        env = "SLIPSTREAM_KEEPALIVE_INTERVAL"
    )]
    pub keepalive_interval: TimeSpan,
    /// A connection that gives none for this long is closed, and its requests are cancelled
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(NetConfig::default().keepalive_timeout),
        env = "SLIPSTREAM_KEEPALIVE_TIMEOUT"
    )]
    pub keepalive_timeout: TimeSpan,
    /// A new connection has to begin its first request within this time
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(NetConfig::default().first_request_timeout),
        env = "SLIPSTREAM_FIRST_REQUEST_TIMEOUT"
    )]
    pub first_request_timeout: TimeSpan,
    /// A connection without a request in progress is told to go after this time
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(NetConfig::default().idle_timeout),
        env = "SLIPSTREAM_IDLE_TIMEOUT"
    )]
    pub idle_timeout: TimeSpan,
    /// A connection is told to go at this age, or never with `off`: clients then connect anew,
    /// maybe to another server
    #[arg(
        long,
        value_name = "TIME|off",
        default_value_t = TimeSpanOrOff(NetConfig::default().age_max),
        env = "SLIPSTREAM_MAX_AGE"
    )]
    pub max_age: TimeSpanOrOff,
    /// What a connection that was told to go may take to finish its requests before it is cut
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(NetConfig::default().age_grace),
        env = "SLIPSTREAM_AGE_GRACE"
    )]
    pub age_grace: TimeSpan,
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
    /// A second address for probes and metrics alone, so that they need not be open to clients
    #[arg(long, value_name = "ADDRESS", env = "SLIPSTREAM_HTTP_LISTEN")]
    pub http_listen: Option<String>,
    /// How long running requests may take to finish at shutdown
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(EdgeConfig::default().grace),
        env = "SLIPSTREAM_GRACE"
    )]
    pub grace: TimeSpan,
    /// What one step of the engine may take. Beyond that the probes fail; after twice as long the
    /// server ends, and its requests with UNAVAILABLE
    #[arg(
        long,
        value_name = "TIME",
        default_value_t = TimeSpan(EdgeConfig::default().step_limit),
        env = "SLIPSTREAM_STEP_LIMIT"
    )]
    pub step_limit: TimeSpan,
    /// Connections.
    #[command(flatten)]
    pub connections: ConnectionFlags,
    /// Models and engine.
    #[command(flatten)]
    pub model: ModelFlags,
    /// The log.
    #[command(flatten)]
    pub log: LogFlags,
    /// The configuration file.
    #[command(flatten)]
    pub file: FileFlag,
}

/// Flags about the log of `slipstream serve`.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub struct LogFlags {
    /// Form of the log on stderr
    #[arg(long = "log-format", value_enum, default_value_t, env = "SLIPSTREAM_LOG_FORMAT")]
    #[arg(id = "log_format")]
    pub format: LogFormat,
    /// What to log, for example `info` or `slipstream_server=debug`
    #[arg(id = "log", long = "log", value_name = "FILTER", default_value = "info")]
    #[arg(env = "SLIPSTREAM_LOG")]
    pub filter: String,
}
