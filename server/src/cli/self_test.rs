//! `slipstream self-test`: any pair, plain beside speculative, alone and in a batch. Same bytes, or
//! the first difference and exit code 1.

use std::io::{self, Write};

use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_request::Prompt;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::client::{self, Completion};
use super::compare::first_difference;
use super::request_flags::{auto, fixed, off};
use super::{PROPOSING_TOKENS_MIN, comparison_config};
use crate::config::{FileFlag, ModelFlags};
use crate::local::LocalServer;

/// Temperatures that are tested.
const TEMPERATURES: [f64; 4] = [0.0, 0.2, 0.8, 1.5];
/// Seeds that are tested at each temperature.
const SEEDS: [u64; 2] = [1, 0x5EED];
/// Longest draft length that is tested.
const DRAFT_LEN_MAX: i32 = 8;
/// Prompts that take turns, unless others are given.
const PROMPTS: [&str; 4] = [
    "fn main() {\n    let mut ",
    "impl fmt::Display for Error {\n    fn fmt(&self, ",
    "/// Returns the number of elements in the ",
    "use std::collections::HashMap;\nuse std::",
];

/// Flags of `slipstream self-test`.
#[derive(Debug, clap::Args)]
pub(super) struct SelfTestFlags {
    /// Output tokens per completion, 3 or more
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 64,
        value_parser = clap::value_parser!(u16).range(PROPOSING_TOKENS_MIN..)
    )]
    tokens: u16,
    /// Prompts to complete; may be given several times
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// Print one JSON object at the end; what is compared meanwhile goes to stderr
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    file: FileFlag,
}

/// What the comparisons found.
#[derive(Debug, Default)]
struct Findings {
    num_compared: usize,
    num_tokens: usize,
    num_different: usize,
    proposed: u32,
    accepted: u32,
    /// Speculative modes in which nothing was proposed, so that they compared plain with plain.
    silent: Vec<String>,
}

/// Compares, and fails at any difference.
pub(super) async fn run(flags: SelfTestFlags) -> anyhow::Result<()> {
    let config = comparison_config(&flags.model)?;
    let mut out = progress(flags.json);
    writeln!(out, "Loading ...")?;
    let server = LocalServer::start(config).await?;
    let client = client::client(server.channel());
    let requests = requests(&flags);
    writeln!(
        out,
        "Comparing {} completions of up to {} tokens with plain decoding, alone and all at once.",
        requests.len(),
        flags.tokens
    )?;
    let findings = compare_all(&client, &requests, &mut out).await?;
    server.stop().await?;
    if flags.json {
        writeln!(io::stdout(), "{}", findings.json())?;
    }
    conclude(&findings, &mut out)
}

/// Where what is found on the way goes: stdout is for the result alone where programs read it.
fn progress(is_json: bool) -> Box<dyn Write + Send> {
    if is_json { Box::new(io::stderr()) } else { Box::new(io::stdout()) }
}

impl Findings {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "compared": self.num_compared,
            "different": self.num_different,
            "tokens": self.num_tokens,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "nothing_proposed_in": self.silent,
        })
    }
}

/// All temperatures with all seeds; the prompts take turns.
fn requests(flags: &SelfTestFlags) -> Vec<v1::GenerateRequest> {
    let given = flags.prompts.iter().map(String::as_str);
    let prompts: Vec<&str> =
        if flags.prompts.is_empty() { PROMPTS.to_vec() } else { given.collect() };
    let settings = SEEDS.iter().flat_map(|seed| TEMPERATURES.map(|t| (*seed, t)));
    let turns = settings.zip(prompts.iter().cycle());
    turns
        .map(|((seed, temperature), prompt)| v1::GenerateRequest {
            prompt: Some(Prompt::Text((*prompt).to_owned())),
            max_tokens: Some(i32::from(flags.tokens)),
            temperature: Some(temperature),
            seed: Some(seed),
            token_bytes: true,
            ..v1::GenerateRequest::default()
        })
        .collect()
}

async fn compare_all(
    client: &CompletionsClient<Channel>,
    requests: &[v1::GenerateRequest],
    out: &mut (dyn Write + Send),
) -> anyhow::Result<Findings> {
    let plain = answers(client, with_mode(requests, off()), 1).await?;
    let mut modes = vec![("plain".to_owned(), off()), ("auto".to_owned(), auto())];
    modes.extend((1..=DRAFT_LEN_MAX).map(|len| (format!("draft length {len}"), fixed(len))));
    let mut findings = Findings::default();
    for batch in [1, requests.len()] {
        for (name, mode) in &modes {
            if batch == 1 && *mode == off() {
                continue; // that is what the others are compared with
            }
            let answers = answers(client, with_mode(requests, *mode), batch).await?;
            let label = format!("batch {batch}, {name}");
            let num_proposed = compare(out, &label, [&plain, &answers], &mut findings)?;
            if *mode != off() && num_proposed == 0 {
                findings.silent.push(label);
            }
        }
    }
    Ok(findings)
}

fn with_mode(requests: &[v1::GenerateRequest], mode: v1::Speculation) -> Vec<v1::GenerateRequest> {
    let with_mode = requests.iter().cloned();
    with_mode.map(|request| v1::GenerateRequest { speculation: Some(mode), ..request }).collect()
}

/// Answers in the order of the requests, `batch` of which are asked at the same time.
async fn answers(
    client: &CompletionsClient<Channel>,
    requests: Vec<v1::GenerateRequest>,
    batch: usize,
) -> anyhow::Result<Vec<Completion>> {
    let mut answers = vec![Completion::default(); requests.len()];
    let mut waiting = requests.into_iter().enumerate();
    let mut calls = JoinSet::new();
    loop {
        while calls.len() < batch {
            let Some((index, request)) = waiting.next() else { break };
            let client = client.clone();
            calls.spawn(async move { (index, client::stream(client, request, |_| Ok(())).await) });
        }
        let Some(answer) = calls.join_next().await else { return Ok(answers) };
        let (index, completion) = answer?;
        answers[index] = completion?;
    }
}

/// Compares plain decoding with answers and writes a line. Returns how many tokens were proposed.
fn compare(
    out: &mut dyn Write,
    label: &str,
    [plain, answers]: [&[Completion]; 2],
    findings: &mut Findings,
) -> io::Result<u32> {
    let (mut proposed, mut accepted, mut num_same) = (0, 0, 0);
    for (index, (plain, answer)) in plain.iter().zip(answers).enumerate() {
        let speculation = answer.speculation();
        proposed += speculation.proposed;
        accepted += speculation.accepted;
        findings.num_tokens += answer.tokens.len();
        match first_difference(plain, answer) {
            None => num_same += 1,
            Some(difference) => writeln!(out, "{label}, completion {index}: {difference}")?,
        }
    }
    findings.num_compared += answers.len();
    findings.num_different += answers.len() - num_same;
    findings.proposed += proposed;
    findings.accepted += accepted;
    writeln!(
        out,
        "{label:<24} {num_same} of {} the same, {accepted} of {proposed} proposed tokens accepted",
        answers.len()
    )?;
    Ok(proposed)
}

fn conclude(findings: &Findings, out: &mut dyn Write) -> anyhow::Result<()> {
    writeln!(
        out,
        "{} comparisons over {} tokens, {} different; {} of {} proposed tokens accepted.",
        findings.num_compared,
        findings.num_tokens,
        findings.num_different,
        findings.accepted,
        findings.proposed
    )?;
    if findings.num_different > 0 {
        anyhow::bail!("{} completions differ from plain decoding", findings.num_different);
    }
    if findings.proposed == 0 {
        anyhow::bail!(
            "nothing was ever proposed, so the comparison shows nothing: allow longer completions \
             with --tokens, or more rows with --step-tokens"
        );
    }
    if !findings.silent.is_empty() {
        anyhow::bail!(
            "nothing was proposed in: {}. The log above says why if the draft failed",
            findings.silent.join("; ")
        );
    }
    if findings.accepted == 0 {
        anyhow::bail!(
            "no proposed token was ever accepted, so the comparison shows nothing: choose a draft \
             that knows the verifier's kind of text, or prompts of that kind with --prompt"
        );
    }
    writeln!(out, "PASS: every byte is the same with speculation and without.")?;
    Ok(())
}
