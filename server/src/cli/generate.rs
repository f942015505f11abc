//! `slipstream generate`: complete one prompt and stream the text to stdout.

use std::io::{Read, Write};

use anyhow::Context;
use slipstream_proto::v1;

use super::OWN_SERVER_GRACE;
use super::client::{self, Completion};
use super::request_flags::RequestFlags;
use super::terminal::{Attribution, Palette};
use crate::config::{Config, LogFormat, ModelFlags, wants_colour};
use crate::local::{LocalServer, connect};
use crate::logging;

/// Flags of `slipstream generate`.
#[derive(Debug, clap::Args)]
pub(super) struct GenerateFlags {
    /// What to complete; `-` reads it from stdin
    prompt: String,
    /// Ask this server, for example http://127.0.0.1:50051, instead of starting one; flags about
    /// models then do not apply
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Colour tokens by how they came about
    #[arg(long)]
    colour: bool,
    /// Tell on stderr what the completion cost
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    request: RequestFlags,
    #[command(flatten)]
    model: ModelFlags,
}

/// Completes one prompt.
pub(super) async fn run(flags: GenerateFlags) -> anyhow::Result<()> {
    logging::start(LogFormat::Text, "warn")?;
    let mut request = flags.request.request(prompt(&flags.prompt)?);
    request.token_bytes = flags.colour;
    let palette = Palette { colour: flags.colour && wants_colour() };
    match &flags.server {
        Some(address) => {
            let channel = connect(address).await.with_context(|| {
                format!(
                    "no server at {address}: start one with `slipstream serve`, or leave --server \
                     out"
                )
            })?;
            print_completion(client::client(channel), request, palette, flags.stats).await
        }
        None => {
            let config = Config::new(&flags.model, OWN_SERVER_GRACE)?;
            let server = LocalServer::start(config).await?;
            let client = client::client(server.channel());
            print_completion(client, request, palette, flags.stats).await?;
            Ok(server.stop().await?)
        }
    }
}

fn prompt(given: &str) -> anyhow::Result<String> {
    if given != "-" {
        return Ok(given.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from stdin")?;
    Ok(text)
}

type Client = v1::completions_client::CompletionsClient<tonic::transport::Channel>;

async fn print_completion(
    client: Client,
    request: v1::GenerateRequest,
    palette: Palette,
    stats: bool,
) -> anyhow::Result<()> {
    let mut attribution = Attribution::default();
    let mut written = Ok(());
    let completion = client::stream(client, request, |event| {
        if written.is_ok() {
            written = write_tokens(event, &mut attribution, palette);
        }
    })
    .await
    .map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()))?;
    written.context("cannot write to stdout")?;
    writeln!(std::io::stdout())?;
    if stats {
        write_stats(&completion)?;
    }
    Ok(())
}

/// Writes an event's text, coloured where tokens carry their bytes.
pub(super) fn write_tokens(
    event: &v1::Tokens,
    attribution: &mut Attribution,
    palette: Palette,
) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if palette.colour {
        for (provenance, text) in attribution.runs(event) {
            write!(out, "{}", palette.provenance(provenance, &text))?;
        }
    } else {
        write!(out, "{}", event.text)?;
    }
    out.flush()
}

fn write_stats(completion: &Completion) -> std::io::Result<()> {
    let mut out = std::io::stderr().lock();
    let usage = completion.finished.usage.unwrap_or_default();
    let speculation = completion.speculation();
    writeln!(
        out,
        "seed {} | {:?} | {} prompt + {} output tokens | first token {:.1} ms | {}",
        completion.started.seed,
        completion.finished.reason(),
        usage.prompt_tokens,
        usage.output_tokens,
        completion.first_token.as_secs_f64() * 1000.0,
        match completion.tokens_per_second() {
            Some(rate) => format!("{rate:.1} tokens/s"),
            None => "too short for a rate".to_owned(),
        }
    )?;
    writeln!(
        out,
        "{} steps | {} of {} proposed tokens accepted | fingerprint {}",
        speculation.steps,
        speculation.accepted,
        speculation.proposed,
        completion.started.fingerprint
    )
}
