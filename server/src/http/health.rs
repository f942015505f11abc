//! Owns what makes a process unsound: an engine that does not come back. Knows no stages.

use std::time::Duration;

use slipstream_model::clock::Micros;

use crate::metrics::Metrics;

/// Whether the process can still do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Soundness {
    /// It can.
    Sound,
    /// It cannot, because of this.
    Unsound(String),
}

impl Soundness {
    /// `step_limit` is what one step of the engine may take.
    pub(super) fn of(metrics: &Metrics, step_limit: Duration) -> Self {
        if metrics.has_engine_ended() {
            return Self::Unsound("the engine has ended".to_owned());
        }
        let Micros(age) = metrics.step_age();
        if u128::from(age) > step_limit.as_micros() {
            let seconds = age as f64 / 1e6;
            let reason = format!(
                "the engine has been inside one step for {seconds:.1} s, the limit is \
                 {step_limit:?} (--step-limit)"
            );
            return Self::Unsound(reason);
        }
        Self::Sound
    }

    pub(super) fn is_sound(&self) -> bool {
        *self == Self::Sound
    }
}
