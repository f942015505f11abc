//! Owns the `traceparent` header of the W3C Trace Context recommendation (level 1): which trace a
//! call belongs to. What is malformed is ignored, as the recommendation says. Knows no spans.

use http::HeaderMap;

/// Name of the header.
const TRACEPARENT: &str = "traceparent";
/// Characters of version 00: `00-` trace id `-` parent id `-` flags.
const LEN: usize = 55;

/// The trace that a call belongs to, in the header's own lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceContext {
    /// Names the trace: 16 bytes.
    pub(crate) trace_id: String,
    /// The caller's span: 8 bytes.
    pub(crate) parent_id: String,
}

impl TraceContext {
    /// That of a call, unless it has none or more than one, or one that is not well-formed.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let value = values.next()?;
        if values.next().is_some() {
            return None;
        }
        Self::parse(value.to_str().ok()?)
    }

    /// Version 00 exactly; a later one as far as version 00 goes, as the recommendation wants it.
    fn parse(text: &str) -> Option<Self> {
        let known = text.get(..LEN)?;
        let rest = &text[LEN..];
        let mut parts = known.split('-');
        let (version, trace_id, parent_id, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_well_formed = parts.next().is_none()
            && is_hex(version, 2)
            && is_hex(trace_id, 32)
            && is_hex(parent_id, 16)
            && is_hex(flags, 2);
        let is_version_known = if version == "00" {
            rest.is_empty()
        } else {
            rest.is_empty() || rest.starts_with('-')
        };
        let is_zero = |id: &str| id.bytes().all(|digit| digit == b'0');
        let is_valid = version != "ff" && !is_zero(trace_id) && !is_zero(parent_id);
        (is_well_formed && is_version_known && is_valid)
            .then(|| Self { trace_id: trace_id.to_owned(), parent_id: parent_id.to_owned() })
    }
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::{TRACEPARENT, TraceContext};

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    fn of(values: &[&str]) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, HeaderValue::from_str(value).expect("a header's value"));
        }
        TraceContext::of(&headers)
    }

    #[test]
    fn well_formed_values_are_read() {
        let both = Some(TraceContext { trace_id: TRACE.into(), parent_id: PARENT.into() });
        for flags in ["00", "01", "ff"] {
            assert_eq!(of(&[&format!("00-{TRACE}-{PARENT}-{flags}")]), both);
        }
        assert_eq!(of(&[&format!("cc-{TRACE}-{PARENT}-01")]), both);
        assert_eq!(of(&[&format!("cc-{TRACE}-{PARENT}-01-what-may-come")]), both);
    }

    #[test]
    fn malformed_values_are_ignored() {
        let (zeros, short) = ("0".repeat(32), &TRACE[1..]);
        let upper = TRACE.to_uppercase();
        let values = [
            String::new(),
            "00".to_owned(),
            format!("00-{TRACE}-{PARENT}"),
            format!("00-{TRACE}-{PARENT}-01-"),
            format!("00-{TRACE}-{PARENT}-01-more"),
            format!("cc-{TRACE}-{PARENT}-01.more"),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("0-{TRACE}-{PARENT}-001"),
            format!("00-{zeros}-{PARENT}-01"),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{upper}-{PARENT}-01"),
            format!("00-{short}-{PARENT}-011"),
            format!("00-{TRACE}-{PARENT}-0g"),
            format!("00_{TRACE}_{PARENT}_01"),
            format!(" 00-{TRACE}-{PARENT}-01"),
        ];
        for value in &values {
            assert_eq!(of(&[value]), None, "{value:?}");
        }
        let good = format!("00-{TRACE}-{PARENT}-01");
        assert_eq!(of(&[&good, &good]), None, "which of the two?");
        assert_eq!(of(&[]), None);
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_bytes(&[0xe9; 55]).expect("opaque bytes"));
        assert_eq!(TraceContext::of(&headers), None);
    }
}
