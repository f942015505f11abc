//! Owns what makes a process unsound: an engine that does not come back. Knows no stages.

use std::time::Duration;

use slipstream_model::clock::Micros;

use crate::metrics::Metrics;

/// The engine is taken for hung when one step takes longer. The longest honest steps, a full batch
/// of long prompts on a large model, take seconds; an orchestrator's restart costs more than that.
const STEP_MAX: Duration = Duration::from_secs(60);

/// Whether the process can still do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Soundness {
    /// It can.
    Sound,
    /// It cannot, because of this.
    Unsound(String),
}

impl Soundness {
    pub(super) fn of(metrics: &Metrics) -> Self {
        if metrics.has_engine_ended() {
            return Self::Unsound("the engine has ended".to_owned());
        }
        let Micros(age) = metrics.step_age();
        if u128::from(age) > STEP_MAX.as_micros() {
            let (seconds, limit) = (age / 1_000_000, STEP_MAX.as_secs());
            let reason = format!(
                "the engine has been inside one step for {seconds} s, the limit is {limit} s"
            );
            return Self::Unsound(reason);
        }
        Self::Sound
    }

    pub(super) fn is_sound(&self) -> bool {
        *self == Self::Sound
    }
}
