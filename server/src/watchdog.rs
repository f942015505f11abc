//! Owns the watch over the engine's steps: one that takes longer than the limit is reported, and
//! one that takes twice as long is given up. Knows no calls and ends nothing itself.

use std::sync::Arc;
use std::time::Duration;

use slipstream_model::clock::Micros;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::stage::Stage;

/// How often the engine is looked at within one limit.
const LOOKS_PER_LIMIT: u32 = 8;
/// Least and most time between two looks.
const LOOK_INTERVAL: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];
/// After so many limits the engine is given up. In the second one, probes say that the server is
/// unsound while it may still recover: enough for a balancer to look elsewhere, and for a person to
/// look at the process.
const LIMITS_TO_GIVE_UP: u32 = 2;

/// Looks at the engine now and then.
pub(crate) struct Watchdog {
    metrics: Arc<Metrics>,
    limit: Duration,
    stage: watch::Sender<Stage>,
    /// Whether the step in progress has been reported.
    is_reported: bool,
}

impl Watchdog {
    /// For steps that may take `limit`. While one takes longer, a serving server is stuck.
    pub(crate) fn new(metrics: Arc<Metrics>, limit: Duration, stage: watch::Sender<Stage>) -> Self {
        Self { metrics, limit, stage, is_reported: false }
    }

    /// Resolves when a step has taken so long that its end is not waited for: with its age. May be
    /// dropped and called again.
    pub(crate) async fn hung(&mut self) -> Duration {
        let [least, most] = LOOK_INTERVAL;
        let interval = (self.limit / LOOKS_PER_LIMIT).clamp(least, most);
        loop {
            let age = self.look();
            if age > self.limit * LIMITS_TO_GIVE_UP {
                return age;
            }
            tokio::time::sleep(interval).await;
        }
    }

    /// The age of the step in progress. Reports it when it is too old, once.
    fn look(&mut self) -> Duration {
        let Micros(age) = self.metrics.step_age();
        let age = Duration::from_micros(age);
        let (age_ms, limit_ms) = (age.as_millis() as u64, self.limit.as_millis() as u64);
        match (age > self.limit, self.is_reported) {
            (true, false) => {
                tracing::error!(age_ms, limit_ms, "the engine hangs inside a step");
                self.moves([Stage::Serving, Stage::Stuck]);
            }
            (false, true) => {
                tracing::warn!(limit_ms, "the engine has come back from a long step");
                self.moves([Stage::Stuck, Stage::Serving]);
            }
            (true, true) | (false, false) => {}
        }
        self.is_reported = age > self.limit;
        age
    }

    /// A server that drains goes on draining.
    fn moves(&self, [from, to]: [Stage; 2]) {
        self.stage.send_if_modified(|stage| {
            let is_there = *stage == from;
            *stage = if is_there { to } else { *stage };
            is_there
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use slipstream_model::clock::{Clock, Micros};

    use super::Watchdog;
    use crate::metrics::{Metrics, ServedName};
    use crate::stage::{self, Stage};

    /// Time that stands where it was put.
    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now(&self) -> Micros {
            Micros(self.0.load(Ordering::Relaxed))
        }
    }

    #[tokio::test]
    async fn a_step_is_reported_at_the_limit_and_given_up_at_twice_that() {
        let hand = Arc::new(Hand::default());
        let clock: Arc<dyn Clock> = Arc::<Hand>::clone(&hand);
        let (stage, stages) = stage::channel();
        stage.send_replace(Stage::Serving);
        let metrics = Arc::new(Metrics::new(&clock, stages));
        let served = ServedName { model: String::new(), fingerprint: String::new() };
        let recorder = metrics.engine_starts(served);
        let mut watchdog = Watchdog::new(Arc::clone(&metrics), Duration::from_millis(5), stage);
        recorder.step_begins();
        for (now, is_reported) in [(5_000, false), (5_001, true), (10_000, true)] {
            hand.0.store(now, Ordering::Relaxed);
            assert_eq!(watchdog.look(), Duration::from_micros(now));
            assert_eq!(watchdog.is_reported, is_reported, "at {now} us");
            assert_eq!(metrics.stage() == Stage::Stuck, is_reported, "at {now} us");
        }
        let mut hung = Box::pin(watchdog.hung());
        let is_early = tokio::select! {
            biased;
            _ = &mut hung => true,
            () = std::future::ready(()) => false,
        };
        assert!(!is_early);
        hand.0.store(10_001, Ordering::Relaxed);
        assert_eq!(hung.await, Duration::from_micros(10_001));
        recorder.step_begins(); // so the one before has ended
        assert_eq!(watchdog.look(), Duration::ZERO);
        assert!(!watchdog.is_reported && metrics.stage() == Stage::Serving);
        recorder.step_begins();
        watchdog.stage.send_replace(Stage::Draining);
        hand.0.store(20_000, Ordering::Relaxed);
        assert!(watchdog.look() > watchdog.limit && metrics.stage() == Stage::Draining);
    }
}
