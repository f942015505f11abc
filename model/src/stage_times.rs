//! Owns the time that each stage of forward passes took, for measurements. Collects nothing unless
//! it is asked to: then a stage costs one look at the clock, else one branch. Knows no networks.

use std::time::{Duration, Instant};

/// A stage of a forward pass. Products quantise their input first, where the weights want that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Rows of the embedding.
    Embedding,
    /// Norms before attention.
    AttentionNorm,
    /// Products of queries, keys and values.
    QueryKeyValue,
    /// Rotation, and keys and values on their way into the pool.
    RopeAndKv,
    /// Attention.
    Attention,
    /// Products behind attention.
    AttentionOutput,
    /// Norms before the feed-forward part.
    FfnNorm,
    /// Products of gates and what they multiply.
    GateUp,
    /// Products behind the gates.
    Down,
    /// The last norm.
    OutputNorm,
    /// The product that makes logits.
    Head,
}

impl Stage {
    /// All stages in the order of a pass.
    pub const ALL: [Self; 11] = [
        Self::Embedding,
        Self::AttentionNorm,
        Self::QueryKeyValue,
        Self::RopeAndKv,
        Self::Attention,
        Self::AttentionOutput,
        Self::FfnNorm,
        Self::GateUp,
        Self::Down,
        Self::OutputNorm,
        Self::Head,
    ];

    /// Name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::AttentionNorm => "attention norm",
            Self::QueryKeyValue => "query, key, value",
            Self::RopeAndKv => "rope, KV write",
            Self::Attention => "attention",
            Self::AttentionOutput => "attention output",
            Self::FfnNorm => "ffn norm",
            Self::GateUp => "gate, up",
            Self::Down => "down",
            Self::OutputNorm => "output norm",
            Self::Head => "head",
        }
    }
}

/// What was collected since it was switched on: all layers and passes added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    is_on: bool,
    totals: [Duration; Stage::ALL.len()],
    since: Option<Instant>,
}

impl StageTimes {
    /// Nothing collected yet, on or off.
    #[must_use]
    pub(crate) fn new(is_on: bool) -> Self {
        Self { is_on, ..Self::default() }
    }

    /// Time of a stage.
    #[must_use]
    pub fn of(&self, stage: Stage) -> Duration {
        self.totals[stage as usize]
    }

    /// Time of all stages.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.totals.iter().sum()
    }

    /// What comes next belongs to a stage.
    #[inline]
    pub(crate) fn start(&mut self) {
        if self.is_on {
            self.since = Some(Instant::now());
        }
    }

    /// What was done since the start, or since the stage before, belongs to this stage.
    #[inline]
    pub(crate) fn end(&mut self, stage: Stage) {
        if let Some(since) = self.since {
            let now = Instant::now();
            self.totals[stage as usize] += now - since;
            self.since = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Stage, StageTimes};

    #[test]
    fn stages_are_numbered_in_order() {
        for (index, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as usize, index, "{}", stage.name());
        }
    }

    #[test]
    fn nothing_is_collected_unless_asked_for() {
        for is_on in [false, true] {
            let mut times = StageTimes::new(is_on);
            times.end(Stage::Embedding); // nothing was started
            times.start();
            while is_on && times.since.is_some_and(|since| since.elapsed().is_zero()) {}
            times.end(Stage::Head);
            assert_eq!(times.of(Stage::Head) > std::time::Duration::ZERO, is_on);
            assert_eq!(times.total(), times.of(Stage::Head));
        }
    }
}
