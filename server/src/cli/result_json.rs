//! Owns how a completion is printed for programs: one JSON object, its names as in the protocol.

use serde_json::{Value, json};
use slipstream_proto::v1;
use slipstream_proto::v1::finished::Cause;

use super::client::Completion;

/// A completion with all that came with it; several samples as a list. Wants a request with token
/// bytes and log-probabilities.
pub(super) fn completion(completion: &Completion) -> Value {
    let started = &completion.started;
    let mut object = match completion.others.is_empty() {
        true => sample(completion),
        false => {
            let samples: Vec<Value> = completion.samples().map(numbered).collect();
            json!({ "samples": samples })
        }
    };
    let known_as = [
        ("model", &started.model),
        ("fingerprint", &started.fingerprint),
        ("request_id", &started.request_id),
    ];
    for (name, value) in known_as {
        object[name] = json!(value);
    }
    object["seed"] = json!(started.seed);
    object
}

/// One of several.
fn numbered(completion: &Completion) -> Value {
    let mut object = sample(completion);
    object["sample_index"] = json!(completion.sample_index);
    object
}

fn sample(completion: &Completion) -> Value {
    let finished = &completion.finished;
    let usage = finished.usage.unwrap_or_default();
    let timings = finished.timings.unwrap_or_default();
    let speculation = completion.speculation();
    let tokens: Vec<Value> = completion.tokens.iter().map(token).collect();
    let mut object = json!({
        "text": completion.text,
        "tokens": tokens,
        "finish_reason": finish_reason(finished.reason()),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.output_tokens,
            "prefix_tokens": usage.prefix_tokens,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "preemptions": usage.preemptions,
        },
        "timings": {
            "queue_ms": timings.queue_ms,
            "first_token_ms": timings.first_token_ms,
            "total_ms": timings.total_ms,
        },
        "speculation": {
            "steps": speculation.steps,
            "proposed": speculation.proposed,
            "accepted": speculation.accepted,
            "proposed_by_position": speculation.proposed_by_position,
            "accepted_by_position": speculation.accepted_by_position,
        },
    });
    match &finished.cause {
        Some(Cause::StopString(text)) => object["stop_string"] = json!(text),
        Some(Cause::EndTokenId(id)) => object["end_token_id"] = json!(id),
        None => {}
    }
    object
}

/// A token. Its bytes are text where they are whole characters, numbers otherwise.
fn token(token: &v1::Token) -> Value {
    let mut object = json!({
        "id": token.id,
        "logprob": token.logprob,
        "provenance": provenance(token.provenance()),
        "draft_epoch": token.draft_epoch,
    });
    if let Some(bytes) = token.bytes.as_deref() {
        match std::str::from_utf8(bytes) {
            Ok(text) => object["text"] = json!(text),
            Err(_) => object["bytes"] = json!(bytes),
        }
    }
    object
}

fn finish_reason(reason: v1::FinishReason) -> &'static str {
    match reason {
        v1::FinishReason::EndToken => "end_token",
        v1::FinishReason::StopString => "stop_string",
        v1::FinishReason::Length => "length",
        v1::FinishReason::Unspecified => "unknown",
    }
}

fn provenance(provenance: v1::Provenance) -> &'static str {
    match provenance {
        v1::Provenance::Accepted => "accepted",
        v1::Provenance::Correction => "correction",
        v1::Provenance::Bonus => "bonus",
        v1::Provenance::Plain => "plain",
        v1::Provenance::Unspecified => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::token;
    use slipstream_proto::v1;

    #[test]
    fn bytes_of_half_a_character_are_numbers() {
        let with = |bytes: &[u8]| {
            token(&v1::Token { bytes: Some(bytes.to_vec()), ..v1::Token::default() })
        };
        assert_eq!(with("é".as_bytes())["text"], "é");
        let half = with(b"\xc3");
        assert_eq!(half["bytes"], serde_json::json!([195]));
        assert!(half.get("text").is_none());
    }
}
