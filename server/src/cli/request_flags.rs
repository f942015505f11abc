//! Owns the flags of a completion and the wire request they become. Checks nothing: the server
//! does, and names the field.

use std::str::FromStr;

use anyhow::Context;
use slipstream_proto::v1;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use tonic::Request;

use crate::config::TimeSpan;

/// How urgent a request is, as on the wire.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PriorityFlag {
    Interactive,
    Normal,
    Batch,
}

impl PriorityFlag {
    fn wire(self) -> v1::Priority {
        match self {
            Self::Interactive => v1::Priority::Interactive,
            Self::Normal => v1::Priority::Normal,
            Self::Batch => v1::Priority::Batch,
        }
    }
}

/// How to choose tokens and when to stop. Defaults are the server's.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Completion", allow_negative_numbers = true)]
pub(super) struct RequestFlags {
    /// Longest output in tokens [default: 256]
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<i32>,
    /// Output length before which the completion cannot end
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    min_tokens: i32,
    /// Emit end-of-text tokens instead of ending there
    #[arg(long)]
    ignore_eos: bool,
    /// 0 is greedy [default: 1]
    #[arg(long, short = 't', value_name = "T")]
    temperature: Option<f64>,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: i32,
    /// Keep the likeliest tokens that reach this probability together [default: 1]
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Keep tokens at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Repeat this seed to repeat the completion [default: drawn, and shown by --stats]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Which of several samples of one seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    sample_index: u32,
    /// End before this text; may be given several times
    #[arg(long = "stop", value_name = "TEXT")]
    stop_strings: Vec<String>,
    /// End at this token id; may be given several times
    #[arg(long = "stop-id", value_name = "ID")]
    stop_token_ids: Vec<u32>,
    /// Divide the logits of tokens seen before [default: 1]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,
    /// Subtract from the logits of tokens in the output
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    presence_penalty: f64,
    /// Subtract from logits per occurrence in the output
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    frequency_penalty: f64,
    /// Add BIAS to the logit of token ID; may be given several times
    #[arg(long = "logit-bias", value_name = "ID=BIAS")]
    logit_bias: Vec<Bias>,
    /// Draft length: `auto`, `off`, or a number of tokens, 0 to 8
    #[arg(long, value_name = "MODE", default_value = "auto")]
    speculation: SpeculationFlag,
    /// How urgent it is [default: normal]
    #[arg(long, value_name = "CLASS", value_enum)]
    priority: Option<PriorityFlag>,
    /// Whose request it is: tenants get equal shares of the server and share no KV memory
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    tenant: String,
    /// Share the KV memory of equal prompts only with requests of this salt
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    cache_salt: String,
    /// Neither use the KV memory of earlier requests nor leave any to later ones
    #[arg(long)]
    no_prefix_reuse: bool,
    /// Give up after this time, which the server is told, too; for example 5s
    #[arg(long, value_name = "TIME")]
    timeout: Option<TimeSpan>,
    /// Name the request in the server's log and for Abort [default: drawn by the server]
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

impl RequestFlags {
    /// The call of a wire request, with its deadline.
    pub(super) fn call(&self, message: v1::GenerateRequest) -> Request<v1::GenerateRequest> {
        let mut call = Request::new(message);
        if let Some(timeout) = self.timeout {
            call.set_timeout(timeout.0);
        }
        call
    }

    /// Longest output, where it was given.
    pub(super) fn max_tokens(&self) -> Option<i32> {
        self.max_tokens
    }

    /// The wire request for a prompt.
    pub(super) fn request(&self, prompt: Prompt) -> v1::GenerateRequest {
        v1::GenerateRequest {
            prompt: Some(prompt),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            sample_index: self.sample_index,
            stop_strings: self.stop_strings.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().map(|bias| bias.0).collect(),
            speculation: Some(self.speculation.0),
            request_id: self.request_id.clone(),
            priority: self.priority.map_or(v1::Priority::Unspecified, PriorityFlag::wire).into(),
            tenant: self.tenant.clone(),
            cache_salt: self.cache_salt.clone(),
            no_prefix_reuse: self.no_prefix_reuse,
            ..v1::GenerateRequest::default()
        }
    }
}

/// `ID=BIAS`.
#[derive(Clone, Debug)]
struct Bias(v1::LogitBias);

impl FromStr for Bias {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (id, bias) = text.split_once('=').context("must be a token id, =, and a number")?;
        let token_id = id.parse().context("the token id is not a number")?;
        let bias = bias.parse().context("the bias is not a number")?;
        Ok(Self(v1::LogitBias { token_id, bias }))
    }
}

/// `auto`, `off` or a draft length.
#[derive(Clone, Debug, Default)]
struct SpeculationFlag(v1::Speculation);

impl FromStr for SpeculationFlag {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let speculation = match text {
            "auto" => auto(),
            "off" => off(),
            number => fixed(number.parse().context("must be auto, off or a number of tokens")?),
        };
        Ok(Self(speculation))
    }
}

/// The server decides.
pub(super) fn auto() -> v1::Speculation {
    v1::Speculation { mode: Mode::Auto.into(), draft_len: None }
}

/// No proposals.
pub(super) fn off() -> v1::Speculation {
    v1::Speculation { mode: Mode::Off.into(), draft_len: None }
}

/// This many tokens per proposal.
pub(super) fn fixed(draft_len: i32) -> v1::Speculation {
    v1::Speculation { mode: Mode::Fixed.into(), draft_len: Some(draft_len) }
}
