//! Owns what is counted of plain HTTP requests. Knows paths by name only.

use http::StatusCode;

use super::metric::Sample;
use super::tally::{Label, Tally};

/// Paths that are counted by name; all others count together, so that peers cannot make up labels.
const PATHS: [&str; 6] = ["/", "/health", "/ready", "/version", "/metrics", "/metrics/vllm"];
/// How all other paths are shown.
const OTHER: &str = "other";

/// A status as a label: those that the paths answer with, and the rest together.
#[derive(Clone, Copy)]
enum Answer {
    Ok,
    NotFound,
    MethodNotAllowed,
    Unavailable,
    Other,
}

impl Label for Answer {
    const ALL: &'static [Self] =
        &[Self::Ok, Self::NotFound, Self::MethodNotAllowed, Self::Unavailable, Self::Other];

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ok => "200",
            Self::NotFound => "404",
            Self::MethodNotAllowed => "405",
            Self::Unavailable => "503",
            Self::Other => "other",
        }
    }
}

impl From<StatusCode> for Answer {
    fn from(status: StatusCode) -> Self {
        match status.as_u16() {
            200 => Self::Ok,
            404 => Self::NotFound,
            405 => Self::MethodNotAllowed,
            503 => Self::Unavailable,
            _ => Self::Other,
        }
    }
}

/// Counts of plain HTTP requests.
#[derive(Debug, Default)]
pub(crate) struct HttpCounters {
    /// By path, the last for all others.
    answered: [Tally<{ Answer::ALL.len() }>; PATHS.len() + 1],
}

impl HttpCounters {
    /// A request for `path` was answered.
    pub(crate) fn answered(&self, path: &str, status: StatusCode) {
        let index = PATHS.iter().position(|known| *known == path).unwrap_or(PATHS.len());
        self.answered[index].add(Answer::from(status));
    }

    /// Requests by path and status.
    pub(super) fn samples(&self) -> Vec<Sample> {
        let names = PATHS.into_iter().chain([OTHER]);
        let rows = names.zip(&self.answered);
        rows.flat_map(|(path, tally)| {
            let samples = tally.samples::<Answer>().into_iter();
            samples.map(move |(status, count)| ([vec![path.to_owned()], status].concat(), count))
        })
        .collect()
    }
}
