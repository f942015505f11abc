//! Owns when one connection has to go: a pure function of times and settings. Knows no sockets.

use std::time::Duration;

use tokio::time::Instant;

use super::settings::NetConfig;
use super::stats::CloseReason;

/// What a peer without any request may take to close its connection when told to.
const CLOSING_GRACE: Duration = Duration::from_secs(1);
/// Looks at the connection within each of the times that it keeps watch over.
const LOOKS: u32 = 4;
/// The shortest time between two looks.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Age differs by up to one part in so many, so that connections made together do not end together.
const JITTER_PART: f64 = 0.1;

/// What is to be done with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Nothing.
    Keep,
    /// Tell the peer to go.
    TellToGo(CloseReason),
    /// End it at once: it was told to go, and its grace is over.
    Cut,
}

/// What there is to know about a connection's requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Whether there was one yet.
    pub(super) has_begun: bool,
    /// Since when there is none in progress; `None` while there is one.
    pub(super) idle_since: Option<Instant>,
}

/// The times of one connection.
#[derive(Debug)]
pub(super) struct Lifetime {
    first_request_by: Instant,
    idle_timeout: Duration,
    goes_at: Option<Instant>,
    grace: Duration,
    look_interval: Duration,
    told: Option<Told>,
}

/// How a connection was told to go.
#[derive(Clone, Copy, Debug)]
enum Told {
    /// By itself: it is cut then.
    CutAt(Instant),
    /// With the whole server, which cuts all connections when it ends.
    WithTheServer,
}

impl Lifetime {
    /// A connection that begins now. `jitter` is from 0 to 1.
    pub(super) fn new(config: &NetConfig, now: Instant, jitter: f64) -> Self {
        let factor = 1.0 + JITTER_PART * (2.0 * jitter - 1.0);
        let shortest = config.stream_stall_timeout.min(config.idle_timeout);
        Self {
            first_request_by: now + config.first_request_timeout,
            idle_timeout: config.idle_timeout,
            goes_at: config.age_max.map(|age| now + age.mul_f64(factor)),
            grace: config.age_grace,
            look_interval: (shortest / LOOKS).max(LOOK_INTERVAL_MIN),
            told: None,
        }
    }

    /// The server tells all connections to go. False when this one was told before.
    pub(super) fn end_with_the_server(&mut self) -> bool {
        let is_new = self.told.is_none();
        self.told.get_or_insert(Told::WithTheServer);
        is_new
    }

    /// What is to be done now.
    pub(super) fn look(&mut self, now: Instant, seen: Seen) -> Order {
        match self.told {
            Some(Told::CutAt(at)) if now >= at => return Order::Cut,
            Some(Told::CutAt(_) | Told::WithTheServer) => return Order::Keep,
            None => {}
        }
        let is_idle = seen.idle_since.is_some_and(|since| now >= since + self.idle_timeout);
        let (reason, grace) = if !seen.has_begun && now >= self.first_request_by {
            (CloseReason::FirstRequest, CLOSING_GRACE)
        } else if seen.has_begun && is_idle {
            (CloseReason::Idle, self.grace)
        } else if self.goes_at.is_some_and(|at| now >= at) {
            (CloseReason::Age, self.grace)
        } else {
            return Order::Keep;
        };
        self.told = Some(Told::CutAt(now + grace));
        Order::TellToGo(reason)
    }

    /// When to look again.
    pub(super) fn next_look(&self, now: Instant, seen: Seen) -> Instant {
        let regular = now + self.look_interval;
        let due = match self.told {
            Some(Told::CutAt(at)) => Some(at),
            Some(Told::WithTheServer) => None,
            None => {
                let first = (!seen.has_begun).then_some(self.first_request_by);
                let idle = seen.idle_since.map(|since| since + self.idle_timeout);
                let idle = idle.filter(|_| seen.has_begun);
                [first, idle, self.goes_at].into_iter().flatten().min()
            }
        };
        due.map_or(regular, |due| due.min(regular))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn config() -> NetConfig {
        NetConfig {
            first_request_timeout: 10 * SECOND,
            idle_timeout: 100 * SECOND,
            age_max: Some(1000 * SECOND),
            age_grace: 30 * SECOND,
            ..NetConfig::default()
        }
    }

    #[test]
    fn every_time_has_its_order() {
        let t0 = Instant::now();
        let at = |seconds: u32| t0 + seconds * SECOND;
        let new = || Lifetime::new(&config(), t0, 0.5);
        let silent = Seen { has_begun: false, idle_since: Some(t0) };
        let busy = Seen { has_begun: true, idle_since: None };
        let idle = Seen { has_begun: true, idle_since: Some(at(50)) };

        let mut first = new();
        assert_eq!(first.look(at(9), silent), Order::Keep);
        assert_eq!(first.look(at(10), silent), Order::TellToGo(CloseReason::FirstRequest));
        assert_eq!(first.look(at(10), silent), Order::Keep);
        assert_eq!(first.look(at(11), silent), Order::Cut);

        let mut quiet = new();
        assert_eq!(quiet.look(at(149), idle), Order::Keep);
        assert_eq!(quiet.look(at(150), idle), Order::TellToGo(CloseReason::Idle));
        assert_eq!(quiet.look(at(179), busy), Order::Keep);
        assert_eq!(quiet.look(at(180), busy), Order::Cut);

        let mut old = new();
        assert_eq!(old.look(at(999), busy), Order::Keep);
        assert_eq!(old.look(at(1000), busy), Order::TellToGo(CloseReason::Age));
        assert_eq!(old.look(at(1030), busy), Order::Cut);

        let mut drained = new();
        assert!(drained.end_with_the_server());
        assert!(!drained.end_with_the_server());
        assert_eq!(drained.look(at(5000), idle), Order::Keep, "the server decides");
    }

    #[test]
    fn it_looks_again_in_time() {
        let t0 = Instant::now();
        let lifetime = Lifetime::new(&config(), t0, 0.5);
        let silent = Seen { has_begun: false, idle_since: Some(t0) };
        assert_eq!(lifetime.next_look(t0, silent), t0 + 10 * SECOND);
        let busy = Seen { has_begun: true, idle_since: None };
        assert_eq!(lifetime.next_look(t0, busy), t0 + 15 * SECOND, "for streams that stall");
        let idle = Seen { has_begun: true, idle_since: Some(t0) };
        assert_eq!(lifetime.next_look(t0 + 99 * SECOND, idle), t0 + 100 * SECOND);
    }

    #[test]
    fn ages_differ_by_a_tenth() {
        let t0 = Instant::now();
        let age = |jitter| Lifetime::new(&config(), t0, jitter).goes_at.map(|at| at - t0);
        assert_eq!(age(0.0), Some(900 * SECOND));
        assert_eq!(age(1.0), Some(1100 * SECOND));
    }
}
