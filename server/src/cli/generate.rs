//! `slipstream generate`: complete one prompt and stream the text to stdout. What else there is to
//! tell goes to stderr, among it how to go on behind a completion that broke off.

use std::io::{self, Read, Write};

use anyhow::Context;
use slipstream_proto::v1;
use slipstream_proto::v1::finished::Cause;
use slipstream_proto::v1::generate_request::Prompt;

use super::OWN_SERVER_GRACE;
use super::address::Address;
use super::client::{self, Completion, StreamError};
use super::request_flags::RequestFlags;
use super::terminal::{Attribution, Palette, write_table};
use crate::config::{Config, ConfigError, EdgeConfig, LogFormat, ModelFlags, wants_colour};
use crate::local::{LocalServer, connect};
use crate::logging;

/// The one model flag that means something to a running server.
const MODEL_NAME: &str = "model-name";

/// Flags of `slipstream generate`.
#[derive(Debug, clap::Args)]
pub(super) struct GenerateFlags {
    /// What to complete; `-` reads it from stdin
    #[arg(required_unless_present = "token_ids", conflicts_with = "token_ids")]
    prompt: Option<String>,
    /// What to complete as token ids joined by commas, instead of a text
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    token_ids: Vec<u32>,
    /// Ask this server, for example http://127.0.0.1:50051, instead of starting one. Of the flags
    /// about models only --model-name then applies: the server must serve a model of that name
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Colour tokens by how they came about
    #[arg(long, visible_alias = "color")]
    colour: bool,
    /// Tell on stderr what the completion cost, and how to go on behind it
    #[arg(long)]
    stats: bool,
    /// List the tokens on stderr with their log-probabilities
    #[arg(long)]
    logprobs: bool,
    #[command(flatten)]
    request: RequestFlags,
    #[command(flatten)]
    model: ModelFlags,
}

/// Completes one prompt. `model_flags_given` names the model flags on the command line.
pub(super) async fn run(flags: GenerateFlags, model_flags_given: &[String]) -> anyhow::Result<()> {
    logging::start(LogFormat::Text, logging::QUIET)?;
    match &flags.server {
        Some(text) => {
            let address = Address::to_ask(text)
                .map_err(|problem| ConfigError::new("server", problem.to_string()))?;
            refuse_model_flags(model_flags_given)?;
            let channel = connect(&address.url()).await.with_context(|| {
                format!(
                    "no server at {address}: start one with `slipstream serve`, or leave --server \
                     out"
                )
            })?;
            print_completion(client::client(channel), &flags).await
        }
        None => {
            let config = Config::new(&flags.model, EdgeConfig::with_grace(OWN_SERVER_GRACE))?;
            let server = LocalServer::start(config).await?;
            print_completion(client::client(server.channel()), &flags).await?;
            Ok(server.stop().await?)
        }
    }
}

/// A running server has its models already.
fn refuse_model_flags(given: &[String]) -> Result<(), ConfigError> {
    let Some(flag) = given.iter().find(|flag| *flag != MODEL_NAME) else { return Ok(()) };
    let problem = format!(
        "a running server has its models and settings already, so --{flag} does not apply: leave \
         one of the two out"
    );
    Err(ConfigError::new("server", problem))
}

fn prompt(flags: &GenerateFlags) -> anyhow::Result<Prompt> {
    match flags.prompt.as_deref() {
        None => Ok(Prompt::TokenIds(v1::TokenIds { ids: flags.token_ids.clone() })),
        Some("-") => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("cannot read the prompt from stdin")?;
            Ok(Prompt::Text(text))
        }
        Some(text) => Ok(Prompt::Text(text.to_owned())),
    }
}

type Client = v1::completions_client::CompletionsClient<tonic::transport::Channel>;

async fn print_completion(client: Client, flags: &GenerateFlags) -> anyhow::Result<()> {
    let palette = Palette { colour: flags.colour && wants_colour() };
    let mut request = flags.request.request(prompt(flags)?);
    request.token_bytes = palette.colour || flags.logprobs;
    request.logprobs = flags.logprobs;
    request.model = flags.model.model_name.clone().unwrap_or_default();
    let prefix = request.output_prefix.clone();
    let mut attribution = Attribution::default();
    let streamed =
        client::stream(client, request, |event| write_tokens(event, &mut attribution, palette));
    let completion = match streamed.await {
        Ok(completion) => completion,
        Err(StreamError::Call { status, partial }) => {
            if !partial.text.is_empty() && !partial.text.ends_with('\n') {
                // On a terminal this ends the line; stdout keeps exactly the completion's bytes.
                writeln!(io::stderr())?;
            }
            let hint = resume_hint(&prefix, &partial);
            let error = StreamError::Call { status, partial };
            return Err(anyhow::anyhow!("{error}{hint}"));
        }
        Err(error @ StreamError::Output(_)) => return Err(error.into()),
    };
    writeln!(io::stdout())?;
    if flags.logprobs {
        write_logprobs(&completion)?;
    }
    if flags.stats {
        write_stats(&prefix, &completion)?;
    }
    Ok(())
}

/// How to repeat a request so that it goes on behind what came; nothing before `Started`.
fn resume_hint(prefix: &[u32], partial: &Completion) -> String {
    if partial.started == v1::Started::default() {
        return String::new();
    }
    format!(
        "\n{} output tokens came before. To go on behind them, repeat the command with\n  {}",
        partial.tokens.len(),
        resume_flags(prefix, partial)
    )
}

/// The flags that go on behind a completion.
fn resume_flags(prefix: &[u32], completion: &Completion) -> String {
    let sent = completion.tokens.iter().map(|token| token.id);
    let ids: Vec<String> = prefix.iter().copied().chain(sent).map(|id| id.to_string()).collect();
    let seed = format!("--seed {}", completion.started.seed);
    if ids.is_empty() { seed } else { format!("{seed} --output-prefix {}", ids.join(",")) }
}

/// Writes an event's text, coloured where tokens carry their bytes.
pub(super) fn write_tokens(
    event: &v1::Tokens,
    attribution: &mut Attribution,
    palette: Palette,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if palette.colour {
        for (provenance, text) in attribution.runs(event) {
            write!(out, "{}", palette.provenance(provenance, &text))?;
        }
    } else {
        write!(out, "{}", event.text)?;
    }
    out.flush()
}

fn write_logprobs(completion: &Completion) -> io::Result<()> {
    let titles = ["token", "logprob", "text"].map(str::to_owned).to_vec();
    let rows = completion.tokens.iter().map(|token| {
        let text = String::from_utf8_lossy(token.bytes.as_deref().unwrap_or_default());
        let logprob = token.logprob.map_or("-".to_owned(), |logprob| format!("{logprob:.4}"));
        vec![token.id.to_string(), logprob, format!("{text:?}")]
    });
    let rows: Vec<Vec<String>> = std::iter::once(titles).chain(rows).collect();
    write_table(&mut io::stderr().lock(), &rows)
}

/// Why a completion ended, for people.
fn reason(finished: &v1::Finished) -> String {
    match (finished.reason(), &finished.cause) {
        (v1::FinishReason::Length, _) => "ended by length".to_owned(),
        (_, Some(Cause::StopString(text))) => format!("ended by stop string {text:?}"),
        (_, Some(Cause::EndTokenId(id))) => format!("ended by end token {id}"),
        (v1::FinishReason::StopString, None) => "ended by a stop string".to_owned(),
        (v1::FinishReason::EndToken, None) => "ended by an end token".to_owned(),
        (v1::FinishReason::Unspecified, None) => "ended".to_owned(),
    }
}

fn write_stats(prefix: &[u32], completion: &Completion) -> io::Result<()> {
    let mut out = io::stderr().lock();
    let Completion { started, finished, .. } = completion;
    let usage = finished.usage.unwrap_or_default();
    let speculation = completion.speculation();
    let first_token_ms = finished.timings.and_then(|timings| timings.first_token_ms);
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    writeln!(
        out,
        "{} | {} prompt + {} output tokens | first token {} ms | {} tokens/s",
        reason(finished),
        usage.prompt_tokens,
        usage.output_tokens,
        number(first_token_ms),
        number(completion.tokens_per_second())
    )?;
    writeln!(
        out,
        "{} steps | {} of {} proposed tokens accepted | model {} | fingerprint {}",
        speculation.steps,
        speculation.accepted,
        speculation.proposed,
        started.model,
        started.fingerprint
    )?;
    let more = match finished.reason() {
        v1::FinishReason::Length => " and a larger --max-tokens",
        _ => "",
    };
    writeln!(out, "to go on behind it: {}{more}", resume_flags(prefix, completion))
}

#[cfg(test)]
mod tests {
    use super::{Completion, refuse_model_flags, resume_flags, resume_hint};
    use slipstream_proto::v1;

    #[test]
    fn going_on_needs_the_seed_and_all_output_so_far() {
        let started = v1::Started { seed: 9, ..v1::Started::default() };
        let tokens = [7, 8].map(|id| v1::Token { id, ..v1::Token::default() }).to_vec();
        let partial = Completion { started, tokens, ..Completion::default() };
        assert_eq!(resume_flags(&[5], &partial), "--seed 9 --output-prefix 5,7,8");
        assert!(resume_hint(&[5], &partial).starts_with("\n2 output tokens"));
        assert_eq!(resume_hint(&[5], &Completion::default()), "");
    }

    #[test]
    fn only_the_name_of_a_model_goes_to_a_running_server() {
        assert_eq!(refuse_model_flags(&["model-name".to_owned()]), Ok(()));
        let error = refuse_model_flags(&["model-name".to_owned(), "threads".to_owned()]);
        assert!(error.expect_err("refused").to_string().contains("--threads"));
    }
}
