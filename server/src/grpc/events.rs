//! Owns the translation of engine events to wire messages. Decides nothing.

use std::time::Duration;

use slipstream_model::clock::Micros;
use slipstream_model::token_bytes::TokenBytes;
use slipstream_proto::v1;

use crate::engine::event::{
    CancelReason, FinishReason, Finished, OutputToken, Provenance, SpeculationUsage, Timings,
    TokensEvent, Usage,
};
use crate::grpc::status::CallError;

/// A count as the wire carries it. Counts are bounded by the context, far below the limit.
pub(crate) fn wire_count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Some output of a sample, with the bytes of every token if there is a table for them.
pub(crate) fn tokens(
    event: TokensEvent,
    sample: usize,
    token_bytes: Option<&TokenBytes>,
) -> v1::Tokens {
    let tokens = event.tokens.into_iter().map(|each| token(each, token_bytes)).collect();
    v1::Tokens { text: event.text, tokens, sample: wire_count(sample) }
}

fn token(token: OutputToken, token_bytes: Option<&TokenBytes>) -> v1::Token {
    let provenance = match token.provenance {
        Provenance::Accepted => v1::Provenance::Accepted,
        Provenance::Correction => v1::Provenance::Correction,
        Provenance::Bonus => v1::Provenance::Bonus,
        Provenance::Plain => v1::Provenance::Plain,
    };
    v1::Token {
        id: token.id.0,
        logprob: token.logprob,
        provenance: provenance.into(),
        draft_epoch: token.draft_epoch.map(|epoch| epoch.0),
        bytes: token_bytes.map(|table| table.get(token.id).to_vec()),
    }
}

/// The end of a sample.
///
/// # Errors
/// [`CallError`] for every end that is not a completion: the call's status.
pub(crate) fn finished(
    event: Finished,
    sample: usize,
    stop_strings: &[String],
    stall_limit: Duration,
) -> Result<v1::Finished, CallError> {
    let (reason, cause) = match event.reason {
        FinishReason::EndToken(id) => {
            (v1::FinishReason::EndToken, Some(v1::finished::Cause::EndTokenId(id.0)))
        }
        FinishReason::StopString(index) => {
            let text = stop_strings.get(index).cloned().unwrap_or_default();
            (v1::FinishReason::StopString, Some(v1::finished::Cause::StopString(text)))
        }
        FinishReason::Length => (v1::FinishReason::Length, None),
        FinishReason::Cancelled(reason) => return Err(cancelled(reason, stall_limit)),
        FinishReason::DeadlineExceeded => return Err(CallError::DeadlineExceeded),
        FinishReason::Fault(fault) => return Err(CallError::Fault(fault)),
        FinishReason::ShuttingDown => return Err(CallError::ShuttingDown),
    };
    Ok(v1::Finished {
        reason: reason.into(),
        cause,
        usage: Some(usage(event.usage)),
        timings: Some(timings(event.timings)),
        speculation: Some(speculation(&event.speculation)),
        sample: wire_count(sample),
    })
}

/// The end of a call that somebody ended.
pub(crate) fn cancelled(reason: CancelReason, stall_limit: Duration) -> CallError {
    match reason {
        CancelReason::ClientGone => CallError::Cancelled,
        CancelReason::Aborted => CallError::Aborted,
        CancelReason::Stalled => CallError::Stalled { limit: stall_limit },
    }
}

fn usage(usage: Usage) -> v1::Usage {
    v1::Usage {
        prompt_tokens: wire_count(usage.prompt_tokens),
        output_tokens: wire_count(usage.output_tokens),
        prefix_tokens: wire_count(usage.prefix_tokens),
        cached_prompt_tokens: wire_count(usage.cached_tokens),
        preemptions: wire_count(usage.preemptions),
    }
}

fn timings(timings: Timings) -> v1::Timings {
    v1::Timings {
        queue_ms: timings.queue.map(Micros::as_millis_f64),
        first_token_ms: timings.first_token.map(Micros::as_millis_f64),
        total_ms: timings.total.as_millis_f64(),
    }
}

fn speculation(usage: &SpeculationUsage) -> v1::SpeculationStats {
    let counts = |positions: &[usize]| positions.iter().copied().map(wire_count).collect();
    v1::SpeculationStats {
        steps: wire_count(usage.num_steps),
        proposed: wire_count(usage.num_proposed),
        accepted: wire_count(usage.num_accepted()),
        proposed_by_position: counts(&usage.proposed_by_position),
        accepted_by_position: counts(&usage.accepted_by_position),
    }
}
