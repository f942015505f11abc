//! `slipstream generate`: complete one prompt and stream the text to stdout. What else there is to
//! tell goes to stderr, among it how to go on behind a completion that broke off.

use std::io::{self, Read, Write};

use anyhow::Context;
use serde_json::{Value, json};
use slipstream_proto::v1;
use slipstream_proto::v1::finished::Cause;
use slipstream_proto::v1::generate_request::Prompt;

use super::client::{self, Client, Completion, StreamError};
use super::explain;
use super::reach::Reached;
use super::request_flags::RequestFlags;
use super::result_json;
use super::samples::{SampleWriter, styled};
use super::terminal::{Attribution, Palette, write_table};
use crate::config::{FileFlag, ModelFlags, wants_colour};

/// Flags of `slipstream generate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The text goes to stdout as it comes, everything else to stderr. With --json one object goes to \
stdout at the end; a failure is an object {\"error\": ...} on stderr. With --n the samples come \
one behind the other under a heading each, in the object as a list.

Exit codes: 0 complete, 1 failed, 2 asked wrongly, 130 ended by ctrl-c, 141 nobody reads stdout.

Examples:
  slipstream generate 'fn main() {' --max-tokens 64 --stats
  slipstream generate --server http://127.0.0.1:50051 'use std::' --temperature 0.8 --seed 7
  slipstream generate 'fn new(' --n 4 --seed 7 --stats
  cat prompt.txt | slipstream generate - --json | jq -r .text")]
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
    #[arg(long, visible_alias = "color", conflicts_with = "json")]
    colour: bool,
    /// Tell on stderr what the completion cost, and how to go on behind it
    #[arg(long)]
    stats: bool,
    /// List the tokens on stderr with their log-probabilities
    #[arg(long)]
    logprobs: bool,
    /// Print one JSON object at the end: text, tokens with log-probabilities, usage, timings,
    /// speculation, seed, fingerprint
    #[arg(long)]
    pub(super) json: bool,
    /// Output already received, as ids joined by commas: goes on behind it. Needs the same --seed
    #[arg(long, value_name = "IDS", value_delimiter = ',', help_heading = "Completion")]
    output_prefix: Vec<u32>,
    /// Complete the prompt so many times, with the sample indices from --sample-index on
    /// [default: 1]
    #[arg(long, value_name = "N", help_heading = "Completion")]
    n: Option<i32>,
    #[command(flatten)]
    request: RequestFlags,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    file: FileFlag,
}

/// A completion that is not there in full, and how to get the rest.
#[derive(Debug, thiserror::Error)]
#[error("{error}{}", self.hint())]
pub(super) struct Unfinished {
    /// Why.
    pub(super) error: StreamError,
    /// The output prefix that it was asked with.
    prefix: Vec<u32>,
}

impl Unfinished {
    fn partial(&self) -> Option<&Completion> {
        match &self.error {
            StreamError::Call { partial, .. } | StreamError::Interrupted { partial } => {
                Some(partial)
            }
            StreamError::Output(_) => None,
        }
    }

    fn hint(&self) -> String {
        self.partial().map(|partial| resume_hint(&self.prefix, partial)).unwrap_or_default()
    }

    /// The same for programs.
    pub(super) fn json(&self) -> Value {
        let mut object = match &self.error {
            StreamError::Call { status, partial } => explain::json(status, partial),
            StreamError::Interrupted { .. } => json!({ "message": "interrupted" }),
            StreamError::Output(error) => json!({ "message": error.to_string() }),
        };
        let started = self.partial().filter(|partial| has_started(partial));
        object["resume"] = match started {
            None => Value::Null,
            Some(partial) if partial.others.is_empty() => self.resume_json(partial),
            Some(partial) => partial.samples().map(|sample| self.resume_json(sample)).collect(),
        };
        object
    }

    fn resume_json(&self, sample: &Completion) -> Value {
        json!({
            "text": sample.text,
            "seed": sample.started.seed,
            "sample_index": sample.sample_index,
            "output_prefix": output_ids(&self.prefix, sample),
        })
    }
}

/// Completes one prompt. `model_flags_given` names the model flags on the command line.
pub(super) async fn run(flags: GenerateFlags, model_flags_given: &[String]) -> anyhow::Result<()> {
    let server = Reached::new(flags.server.as_deref(), &flags.model, model_flags_given).await?;
    print_completion(server.client.clone(), &flags).await?;
    server.leave().await
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

async fn print_completion(client: Client, flags: &GenerateFlags) -> anyhow::Result<()> {
    let palette = Palette { colour: flags.colour && wants_colour() };
    let mut message = flags.request.request(prompt(flags)?);
    message.token_bytes = palette.colour || flags.logprobs || flags.json;
    message.logprobs = flags.logprobs || flags.json;
    message.model = flags.model.model_name.clone().unwrap_or_default();
    message.output_prefix.clone_from(&flags.output_prefix);
    message.n = flags.n;
    let mut writer = SampleWriter::new(&message, palette);
    let on_tokens = |event: &v1::Tokens| match flags.json {
        true => Ok(()),
        false => writer.take(event),
    };
    let call = flags.request.call(message);
    let completion = match client::stream_until(client, call, on_tokens, interrupt()).await {
        Ok(completion) => completion,
        Err(error) => return Err(unfinished(error, flags, &mut writer)?.into()),
    };
    match flags.json {
        true => writeln!(io::stdout(), "{}", result_json::completion(&completion))?,
        false => writer.finish()?,
    }
    for sample in completion.samples() {
        if !completion.others.is_empty() && (flags.logprobs || flags.stats) {
            writeln!(io::stderr(), "sample {}:", sample.sample_index)?;
        }
        if flags.logprobs {
            write_logprobs(sample)?;
        }
        if flags.stats {
            write_stats(&flags.output_prefix, sample)?;
        }
    }
    Ok(())
}

/// Resolves when ctrl-c is pressed.
pub(super) async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        // Without a handler the system's own way stays: the process ends.
        std::future::pending::<()>().await;
    }
}

/// Ends the line on a terminal; stdout keeps exactly the completion's bytes. Of several samples it
/// gets what came of each.
fn unfinished(
    error: StreamError,
    flags: &GenerateFlags,
    writer: &mut SampleWriter,
) -> io::Result<Unfinished> {
    let unfinished = Unfinished { error, prefix: flags.output_prefix.clone() };
    let partial = unfinished.partial().filter(|partial| !flags.json && has_started(partial));
    match partial {
        Some(partial) if !partial.others.is_empty() => writer.finish()?,
        Some(partial) if !partial.text.is_empty() && !partial.text.ends_with('\n') => {
            writeln!(io::stderr())?;
        }
        Some(_) | None => {}
    }
    Ok(unfinished)
}

fn has_started(partial: &Completion) -> bool {
    partial.started != v1::Started::default()
}

/// How to repeat a request so that it goes on behind what came; nothing before `Started`.
fn resume_hint(prefix: &[u32], partial: &Completion) -> String {
    if !has_started(partial) {
        return String::new();
    }
    if partial.others.is_empty() {
        return format!(
            "\n{} output tokens came before. To go on behind them, repeat the command with\n  {}",
            partial.tokens.len(),
            resume_flags(prefix, partial)
        );
    }
    let lines = partial.samples().map(|sample| {
        let (index, num_tokens) = (sample.sample_index, sample.tokens.len());
        format!("\n  {} (sample {index}, {num_tokens} tokens)", resume_flags(prefix, sample))
    });
    let lines: String = lines.collect();
    format!(
        "\nTo go on behind what came of a sample, repeat the command without --n and with{lines}"
    )
}

/// All output so far, with what an earlier call brought.
fn output_ids(prefix: &[u32], completion: &Completion) -> Vec<u32> {
    let sent = completion.tokens.iter().map(|token| token.id);
    prefix.iter().copied().chain(sent).collect()
}

/// The flags that go on behind a completion.
fn resume_flags(prefix: &[u32], completion: &Completion) -> String {
    let ids = output_ids(prefix, completion);
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let mut seed = format!("--seed {}", completion.started.seed);
    if completion.sample_index > 0 {
        seed.push_str(&format!(" --sample-index {}", completion.sample_index));
    }
    if ids.is_empty() { seed } else { format!("{seed} --output-prefix {}", ids.join(",")) }
}

/// Writes an event's text, coloured where tokens carry their bytes.
pub(super) fn write_tokens(
    event: &v1::Tokens,
    attribution: &mut Attribution,
    palette: Palette,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{}", styled(event, attribution, palette))?;
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
        "{} | {} prompt ({} of them cached) + {} output tokens | first token {} ms | {} tokens/s",
        reason(finished),
        usage.prompt_tokens,
        usage.cached_prompt_tokens,
        usage.output_tokens,
        number(first_token_ms),
        number(completion.tokens_per_second())
    )?;
    let preempted = match usage.preemptions {
        0 => String::new(),
        times => format!(" | preempted {times} times"),
    };
    writeln!(
        out,
        "{} steps | {} of {} proposed tokens accepted{preempted} | model {} | fingerprint {}",
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
    use super::{Completion, resume_flags, resume_hint};
    use slipstream_proto::v1;

    #[test]
    fn going_on_needs_the_seed_and_all_output_so_far() {
        let started = v1::Started { seed: 9, ..v1::Started::default() };
        let tokens = [7, 8].map(|id| v1::Token { id, ..v1::Token::default() }).to_vec();
        let partial = Completion { started, tokens, ..Completion::default() };
        assert_eq!(resume_flags(&[5], &partial), "--seed 9 --output-prefix 5,7,8");
        assert!(resume_hint(&[5], &partial).starts_with("\n2 output tokens"));
        assert_eq!(resume_hint(&[5], &Completion::default()), "");
        let other = Completion { sample_index: 3, ..partial.clone() };
        assert_eq!(resume_flags(&[], &other), "--seed 9 --sample-index 3 --output-prefix 7,8");
        let several = Completion { others: vec![other], ..partial };
        let hint = resume_hint(&[], &several);
        assert!(hint.contains("without --n") && hint.contains("(sample 3, 2 tokens)"), "{hint}");
    }
}
