//! Owns the `grpc-timeout` header: the client's deadline as the protocol writes it. Knows no clock.

use http::HeaderMap;
use slipstream_model::clock::Micros;
use tonic::metadata::MetadataMap;

use crate::grpc::refusal::Refusal;

/// Name of the header.
const GRPC_TIMEOUT: &str = "grpc-timeout";
/// Digits that the gRPC specification allows.
const DIGITS_MAX: usize = 8;
/// How much earlier than the client the server stops, so that its answer still arrives.
const ANSWER_MARGIN: Micros = Micros(5_000);

/// How long the server may work on a call; `None` when the client sets no deadline. A little less
/// than the client waits: a twentieth, at most 5 ms.
///
/// # Errors
/// [`Refusal`] for a header that is not one to eight digits and a unit.
pub(crate) fn time_allowed(metadata: &MetadataMap) -> Result<Option<Micros>, Refusal> {
    match metadata.get(GRPC_TIMEOUT) {
        None => Ok(None),
        Some(value) => value.to_str().ok().and_then(allowed).map(Some).ok_or_else(|| {
            let problem = "must be 1 to 8 digits and a unit of H, M, S, m, u or n";
            Refusal::argument(GRPC_TIMEOUT, problem)
        }),
    }
}

/// The same of a call that has not reached its method yet; a malformed header is refused there.
pub(crate) fn time_allowed_by(headers: &HeaderMap) -> Option<Micros> {
    headers.get(GRPC_TIMEOUT)?.to_str().ok().and_then(allowed)
}

fn allowed(text: &str) -> Option<Micros> {
    let timeout = parse(text)?;
    let margin = ANSWER_MARGIN.0.min(timeout.0 / 20);
    Some(Micros(timeout.0 - margin))
}

/// `TimeoutValue TimeoutUnit` of the gRPC-over-HTTP/2 specification. Nanoseconds round down.
fn parse(text: &str) -> Option<Micros> {
    let digits = text.get(..text.len().checked_sub(1)?)?;
    let is_number = !digits.is_empty()
        && digits.len() <= DIGITS_MAX
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    let micros = match text.as_bytes().last()? {
        b'H' => amount * 3_600_000_000,
        b'M' => amount * 60_000_000,
        b'S' => amount * 1_000_000,
        b'm' => amount * 1_000,
        b'u' => amount,
        b'n' => amount / 1_000,
        _ => return None,
    };
    Some(Micros(micros))
}

#[cfg(test)]
mod tests {
    use super::{Micros, parse};

    #[test]
    fn every_unit_is_read() {
        let cases = [("2H", 7_200_000_000), ("3M", 180_000_000), ("4S", 4_000_000), ("5m", 5_000)];
        for (text, micros) in cases {
            assert_eq!(parse(text), Some(Micros(micros)), "{text}");
        }
        assert_eq!(parse("6u"), Some(Micros(6)));
        assert_eq!(parse("7999n"), Some(Micros(7)));
        assert_eq!(parse("0S"), Some(Micros(0)));
        assert_eq!(parse("99999999H"), Some(Micros(99_999_999 * 3_600_000_000)));
    }

    #[test]
    fn malformed_values_are_refused() {
        for text in ["", "S", "5", "-1S", "+1S", "1.5S", "123456789m", "1 S", "1s", "١S", "1é"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
