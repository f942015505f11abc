//! Owns the way from a wire request to an engine [`Request`], a type that can only be valid. Cheap
//! checks come first, tokenisation last; nothing is allocated in proportion to a number that a
//! client merely claims. Knows no sockets and no clock: it is a pure function and runs off the
//! async threads.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use slipstream_model::clock::Micros;
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_proto::v1;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;

use crate::engine::request::{Request, Speculation, TenantId};
use crate::grpc::limits;
use crate::grpc::refusal::Refusal;
use crate::grpc::served::ServedModel;
use crate::grpc::sharing::{check_tenant, num_samples, prefix_reuse, priority};

/// What the server contributes to a request: when it came and what stands in for absent fields.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    /// When the call reached its handler.
    pub(crate) arrival: Micros,
    /// When the client stops waiting.
    pub(crate) deadline: Option<Micros>,
    /// Tenant of a request without one.
    pub(crate) tenant: Option<String>,
    /// Seed of a request without one.
    pub(crate) drawn_seed: u64,
}

/// A request that can be submitted, and what the edge has to remember about it.
#[derive(Debug)]
pub(crate) struct Validated {
    /// For the engine: the first sample.
    pub(crate) request: Request,
    /// How many samples there are, at least 1.
    pub(crate) num_samples: u32,
    /// The stop strings as text, in the request's order.
    pub(crate) stop_strings: Vec<String>,
}

/// Turns a wire request into an engine request.
///
/// # Errors
/// [`Refusal`] naming the first field that is wrong, its value and its limit.
pub(crate) fn validate(
    wire: v1::GenerateRequest,
    model: &ServedModel,
    admission: Admission,
) -> Result<Validated, Refusal> {
    check_model("model", &wire.model, model)?;
    let tenant = match check_tenant("tenant", &wire.tenant)? {
        "" => TenantId::named(admission.tenant.as_deref().unwrap_or_default()),
        name => TenantId::named(name),
    };
    let priority = priority(wire.priority)?;
    let prefix_reuse = prefix_reuse(&wire)?;
    let num_samples = num_samples(&wire)?;
    let mut params = sampling_params(&wire, model)?;
    params.seed = wire.seed.unwrap_or(admission.drawn_seed);
    let speculation = speculation(wire.speculation, model.draft_len_max)?;
    check_stop_strings(&wire.stop_strings)?;
    let wanted_max_tokens = wire.max_tokens.map(max_tokens).transpose()?;
    let output_prefix = token_ids("output_prefix", &wire.output_prefix, model)?;
    let prompt = prompt(wire.prompt, model)?;
    let max_tokens = fit_context(prompt.len(), wanted_max_tokens, model)?;
    check_lengths(max_tokens, output_prefix.len(), params.min_tokens)?;
    let request = Request {
        prompt,
        output_prefix,
        params,
        stop_strings: wire.stop_strings.iter().map(|text| text.as_bytes().to_vec()).collect(),
        max_tokens,
        logprobs: wire.logprobs,
        speculation,
        arrival: admission.arrival,
        deadline: admission.deadline,
        tenant,
        priority,
        prefix_reuse,
        sibling: None,
    };
    Ok(Validated { request, num_samples, stop_strings: wire.stop_strings })
}

/// That this model is served, or whatever is.
///
/// # Errors
/// [`Refusal`] for another, or for a `field` too long to be a name.
pub(crate) fn check_model(field: &str, wanted: &str, model: &ServedModel) -> Result<(), Refusal> {
    if wanted.len() > limits::MODEL_NAME_BYTES_MAX {
        let problem = over_limit(wanted.len(), limits::MODEL_NAME_BYTES_MAX, "bytes");
        return Err(Refusal::argument(field, problem));
    }
    if wanted.is_empty() || wanted == model.name {
        return Ok(());
    }
    Err(Refusal::UnknownModel { wanted: wanted.to_owned(), served: model.name.clone() })
}

/// Everything about token choice but the seed.
fn sampling_params(
    wire: &v1::GenerateRequest,
    model: &ServedModel,
) -> Result<SamplingParams, Refusal> {
    let penalty = wire.repetition_penalty.unwrap_or(1.0);
    Ok(SamplingParams {
        temperature: temperature(wire.temperature)?,
        top_k: u32::try_from(count("top_k", wire.top_k)?).unwrap_or(u32::MAX),
        top_p: top_p(wire.top_p)?,
        min_p: within("min_p", wire.min_p, &(0.0..=1.0))?,
        repetition_penalty: within(
            "repetition_penalty",
            penalty,
            &limits::REPETITION_PENALTY_RANGE,
        )?,
        presence_penalty: within(
            "presence_penalty",
            wire.presence_penalty,
            &limits::ADDED_PENALTY_RANGE,
        )?,
        frequency_penalty: within(
            "frequency_penalty",
            wire.frequency_penalty,
            &limits::ADDED_PENALTY_RANGE,
        )?,
        logit_bias: logit_bias(&wire.logit_bias, model)?,
        seed: 0,
        sample_index: wire.sample_index,
        min_tokens: count("min_tokens", wire.min_tokens)?,
        end_ids: end_ids(wire, model)?,
    })
}

fn temperature(given: Option<f64>) -> Result<f64, Refusal> {
    let value = given.unwrap_or(limits::TEMPERATURE_DEFAULT);
    let range = &limits::TEMPERATURE_RANGE;
    if value == 0.0 {
        return Ok(0.0); // -0.0 too
    }
    if range.contains(&value) {
        return Ok(value);
    }
    let problem = format!("must be 0, or from {} to {}, got {value}", range.start(), range.end());
    Err(Refusal::argument("temperature", problem))
}

fn top_p(given: Option<f64>) -> Result<f64, Refusal> {
    let value = given.unwrap_or(1.0);
    if value > 0.0 && value <= 1.0 {
        return Ok(value);
    }
    Err(Refusal::argument("top_p", format!("must be above 0 and at most 1, got {value}")))
}

/// A number inside a range. NaN lies in none.
fn within(field: &str, value: f64, range: &RangeInclusive<f64>) -> Result<f64, Refusal> {
    if range.contains(&value) {
        return Ok(value);
    }
    let problem = format!("must be from {} to {}, got {value}", range.start(), range.end());
    Err(Refusal::argument(field, problem))
}

/// A number that counts something.
fn count(field: &str, value: i32) -> Result<usize, Refusal> {
    usize::try_from(value)
        .map_err(|_| Refusal::argument(field, format!("must not be negative, got {value}")))
}

fn max_tokens(value: i32) -> Result<usize, Refusal> {
    match usize::try_from(value) {
        Ok(max_tokens) if max_tokens >= 1 => Ok(max_tokens),
        Ok(_) | Err(_) => {
            Err(Refusal::argument("max_tokens", format!("must be at least 1, got {value}")))
        }
    }
}

/// What is wrong with a list or text that is too long.
pub(crate) fn over_limit(len: usize, limit: usize, unit: &str) -> String {
    format!("has {len} {unit}, the limit is {limit}")
}

/// The id, if it is one. The field's name is only made when it is needed.
fn token_id(
    id: u32,
    model: &ServedModel,
    field: impl FnOnce() -> String,
) -> Result<TokenId, Refusal> {
    if TokenId(id).index() < model.vocab_size {
        return Ok(TokenId(id));
    }
    let problem = format!("token id {id} lies outside the vocabulary of {}", model.vocab_size);
    Err(Refusal::argument(field(), problem))
}

/// A list of ids that has to fit the context.
///
/// # Errors
/// [`Refusal`] naming the first element outside the vocabulary, or the list.
pub(crate) fn token_ids(
    field: &str,
    ids: &[u32],
    model: &ServedModel,
) -> Result<Vec<TokenId>, Refusal> {
    if ids.len() > model.model_context_len {
        let limit = model.model_context_len;
        let problem = over_limit(ids.len(), limit, "tokens, more than the context");
        return Err(Refusal::range(field, problem));
    }
    let checked = ids.iter().enumerate();
    checked.map(|(index, &id)| token_id(id, model, || format!("{field}[{index}]"))).collect()
}

fn logit_bias(
    entries: &[v1::LogitBias],
    model: &ServedModel,
) -> Result<Vec<(TokenId, f64)>, Refusal> {
    if entries.len() > limits::LOGIT_BIAS_ENTRIES_MAX {
        let problem = over_limit(entries.len(), limits::LOGIT_BIAS_ENTRIES_MAX, "entries");
        return Err(Refusal::argument("logit_bias", problem));
    }
    let mut seen = HashSet::with_capacity(entries.len());
    let mut biases = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let id_field = || format!("logit_bias[{index}].token_id");
        let id = token_id(entry.token_id, model, id_field)?;
        if !seen.insert(id) {
            let problem = format!("token id {id} has a bias already");
            return Err(Refusal::argument(id_field(), problem));
        }
        let bias_field = format!("logit_bias[{index}].bias");
        biases.push((id, within(&bias_field, entry.bias, &limits::LOGIT_BIAS_RANGE)?));
    }
    Ok(biases)
}

/// EOS unless it is ignored, and the stop ids; each once.
fn end_ids(wire: &v1::GenerateRequest, model: &ServedModel) -> Result<Vec<TokenId>, Refusal> {
    let given = &wire.stop_token_ids;
    if given.len() > limits::STOP_TOKEN_IDS_MAX {
        let problem = over_limit(given.len(), limits::STOP_TOKEN_IDS_MAX, "ids");
        return Err(Refusal::argument("stop_token_ids", problem));
    }
    let mut ids = if wire.ignore_eos { Vec::new() } else { model.eos_ids.clone() };
    for (index, &id) in given.iter().enumerate() {
        ids.push(token_id(id, model, || format!("stop_token_ids[{index}]"))?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn check_stop_strings(texts: &[String]) -> Result<(), Refusal> {
    if texts.len() > limits::STOP_STRINGS_MAX {
        let problem = over_limit(texts.len(), limits::STOP_STRINGS_MAX, "strings");
        return Err(Refusal::argument("stop_strings", problem));
    }
    for (index, text) in texts.iter().enumerate() {
        if text.is_empty() || text.len() > limits::STOP_STRING_BYTES_MAX {
            let limit = limits::STOP_STRING_BYTES_MAX;
            let problem = format!("must have 1 to {limit} bytes, got {}", text.len());
            return Err(Refusal::argument(format!("stop_strings[{index}]"), problem));
        }
    }
    Ok(())
}

fn speculation(
    given: Option<v1::Speculation>,
    draft_len_max: usize,
) -> Result<Speculation, Refusal> {
    let Some(given) = given else { return Ok(Speculation::Auto) };
    let mode = Mode::try_from(given.mode).map_err(|_| {
        Refusal::argument("speculation.mode", format!("{} is not a mode", given.mode))
    })?;
    let field = "speculation.draft_len";
    match (mode, given.draft_len) {
        (Mode::Unspecified | Mode::Auto, None) => Ok(Speculation::Auto),
        (Mode::Off, None) => Ok(Speculation::Off),
        (Mode::Fixed, Some(draft_len)) => {
            let draft_len = count(field, draft_len)?;
            if draft_len > draft_len_max {
                let problem = format!("must be from 0 to {draft_len_max}, got {draft_len}");
                return Err(Refusal::argument(field, problem));
            }
            Ok(Speculation::Fixed(draft_len))
        }
        (Mode::Fixed, None) => Err(Refusal::argument(field, "is required with MODE_FIXED")),
        (Mode::Unspecified | Mode::Auto | Mode::Off, Some(_)) => {
            Err(Refusal::argument(field, "is only allowed with MODE_FIXED"))
        }
    }
}

/// The prompt's tokens, at least one. Lengths are checked before any work on the content.
fn prompt(given: Option<Prompt>, model: &ServedModel) -> Result<Vec<TokenId>, Refusal> {
    match given {
        None => Err(Refusal::argument("prompt", "is required: set text or token_ids")),
        Some(Prompt::TokenIds(list)) => {
            if list.ids.is_empty() {
                return Err(Refusal::argument("token_ids", "must hold at least one token"));
            }
            token_ids("token_ids.ids", &list.ids, model)
        }
        Some(Prompt::Text(text)) => tokenise(&text, model),
    }
}

fn tokenise(text: &str, model: &ServedModel) -> Result<Vec<TokenId>, Refusal> {
    if text.is_empty() {
        return Err(Refusal::argument("text", "must not be empty"));
    }
    let ids = encode(text, true, model)?;
    if ids.is_empty() {
        return Err(Refusal::argument("text", "has no tokens"));
    }
    Ok(ids)
}

/// The ids of a text, which may be empty. Its length is checked before any work on it.
///
/// # Errors
/// [`Refusal`] for a text that is too long or cannot be tokenised.
pub(crate) fn encode(
    text: &str,
    add_special: bool,
    model: &ServedModel,
) -> Result<Vec<TokenId>, Refusal> {
    if text.len() > limits::PROMPT_TEXT_BYTES_MAX {
        let problem = over_limit(text.len(), limits::PROMPT_TEXT_BYTES_MAX, "bytes");
        return Err(Refusal::argument("text", problem));
    }
    let encoded = model.tokenizer.encode(text, add_special);
    encoded.map_err(|error| Refusal::argument("text", error.to_string()))
}

/// `max_tokens` as asked or by default, such that prompt and output fit the context and the KV
/// pool. The default follows the model's context alone: a small pool refuses, it does not shorten.
fn fit_context(
    prompt_len: usize,
    wanted: Option<usize>,
    model: &ServedModel,
) -> Result<usize, Refusal> {
    let context_len = model.model_context_len;
    let room = context_len.saturating_sub(prompt_len);
    if room == 0 {
        let problem = format!(
            "the prompt has {prompt_len} tokens, the context of {context_len} has to hold it and \
             one more"
        );
        return Err(Refusal::range("prompt", problem));
    }
    let max_tokens = wanted.unwrap_or(limits::MAX_TOKENS_DEFAULT.min(room));
    let default = if wanted.is_none() { " (the default)" } else { "" };
    if max_tokens > room {
        let problem = format!(
            "{max_tokens}{default} tokens after a prompt of {prompt_len} do not fit the \
             {context_len} positions of the context; at most {room} do"
        );
        return Err(Refusal::range("max_tokens", problem));
    }
    let (wanted, capacity) = (prompt_len + max_tokens, model.context_len);
    if wanted <= capacity {
        return Ok(max_tokens);
    }
    let (field, problem) = match capacity.saturating_sub(prompt_len) {
        0 => (
            "prompt",
            format!(
                "the prompt has {prompt_len} tokens, the KV pool of {capacity} has to hold it and \
                 one more"
            ),
        ),
        room => (
            "max_tokens",
            format!(
                "{max_tokens}{default} tokens after a prompt of {prompt_len} never fit the \
                 {capacity} positions of the KV pool; at most {room} do"
            ),
        ),
    };
    Err(Refusal::Pool { field: field.to_owned(), problem, wanted, capacity })
}

fn check_lengths(max_tokens: usize, prefix_len: usize, min_tokens: usize) -> Result<(), Refusal> {
    if prefix_len > max_tokens {
        let problem = format!("has {prefix_len} tokens, more than max_tokens ({max_tokens})");
        return Err(Refusal::argument("output_prefix", problem));
    }
    if min_tokens > max_tokens {
        let problem = format!("must be at most max_tokens ({max_tokens}), got {min_tokens}");
        return Err(Refusal::argument("min_tokens", problem));
    }
    Ok(())
}
