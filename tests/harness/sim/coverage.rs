//! Owns the tally of what happened in a world, so that a simulator that goes blind is noticed.
//! Knows names and numbers only.

use std::collections::BTreeMap;

/// How often each thing happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    times: BTreeMap<&'static str, u64>,
}

impl Coverage {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts `what` as having happened so many more times.
    pub fn note(&mut self, what: &'static str, times: u64) {
        *self.times.entry(what).or_default() += times;
    }

    /// Adds another world's tally.
    pub fn add(&mut self, other: &Self) {
        for (what, times) in &other.times {
            self.note(what, *times);
        }
    }

    /// How often `what` happened.
    #[must_use]
    pub fn of(&self, what: &str) -> u64 {
        self.times.get(what).copied().unwrap_or(0)
    }

    /// One line of names and numbers.
    #[must_use]
    pub fn line(&self) -> String {
        let entries = self.times.iter().map(|(what, times)| format!("{what} {times}"));
        entries.collect::<Vec<_>>().join(", ")
    }
}
