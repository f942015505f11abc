//! Owns the register of completions in progress: by id for those who abort them, and all of them
//! for the sweeper, which ends those whose clients take nothing. Knows no messages.
//!
//! A client takes nothing when there is something to take and nobody asks for it. The connection
//! asks for one more event than its peer's window has room for, and for the next one only when that
//! has gone, so being asked is the sign of life. Events cost two atomic stores for this and no
//! timer: the sweeper compares counts. The samples of one call are one here: they end together.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::engine::event::CancelReason;
use crate::grpc::calls::CallGuard;
use crate::handle::{Canceller, Unread};

/// Sweeps in one stall limit: a stalled call ends at most this fraction of the limit late.
const SWEEPS_PER_LIMIT: u32 = 8;
/// Least time between two sweeps.
const SWEEP_INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Serial numbers keep requests of one id apart.
type Key = (String, u64);

/// The completions in progress. Bounded by the streams that connections may have open.
#[derive(Debug)]
pub(crate) struct LiveCalls {
    calls: Mutex<BTreeMap<Key, Arc<LiveCall>>>,
    next_serial: AtomicU64,
    stall_limit: Duration,
    sweeper: OnceLock<JoinHandle<()>>,
}

impl LiveCalls {
    /// An empty register whose sweeper runs until it is dropped. Needs a running tokio runtime.
    pub(crate) fn start(stall_limit: Duration) -> Arc<Self> {
        let calls = Arc::new(Self::new(stall_limit));
        let interval = (stall_limit / SWEEPS_PER_LIMIT).max(SWEEP_INTERVAL_MIN);
        let sweeper = tokio::spawn(sweep_every(interval, Arc::downgrade(&calls)));
        let _ = calls.sweeper.set(sweeper); // nobody else sets it
        calls
    }

    fn new(stall_limit: Duration) -> Self {
        Self {
            calls: Mutex::default(),
            next_serial: AtomicU64::new(0),
            stall_limit,
            sweeper: OnceLock::new(),
        }
    }

    /// What a client may take nothing for.
    pub(crate) fn stall_limit(&self) -> Duration {
        self.stall_limit
    }

    /// Enters a call, before the engine knows its request. It leaves with the entry.
    pub(crate) fn enter(self: &Arc<Self>, request_id: &str, guard: CallGuard) -> Entry {
        let call = Arc::new(LiveCall {
            cancellers: Mutex::new(vec![Canceller::default()]),
            guard: Mutex::new(Some(guard)),
            samples: OnceLock::new(),
            num_asked: AtomicU32::new(0),
            is_waiting: AtomicBool::new(false),
            seen: Mutex::default(),
        });
        let key = (request_id.to_owned(), self.next_serial.fetch_add(1, Ordering::Relaxed));
        self.lock().insert(key.clone(), Arc::clone(&call));
        Entry { calls: Arc::clone(self), key, call }
    }

    /// Ends all requests of this id. Returns how many calls were alive.
    pub(crate) fn abort(&self, request_id: &str) -> usize {
        let range = (request_id.to_owned(), 0)..=(request_id.to_owned(), u64::MAX);
        let found: Vec<_> = self.lock().range(range).map(|(_, call)| Arc::clone(call)).collect();
        found.iter().filter(|call| call.cancel(CancelReason::Aborted)).count()
    }

    /// Looks at every call once and ends those that have stalled.
    fn sweep(&self) {
        let stalled: Vec<Key> = {
            let calls = self.lock();
            let stalled = calls.iter().filter(|(_, call)| call.has_stalled());
            stalled.map(|(key, _)| key.clone()).collect()
        };
        for key in stalled {
            let Some(call) = self.lock().remove(&key) else { continue };
            call.cancel(CancelReason::Stalled);
            call.release();
            tracing::debug!(request_id = key.0, "the client takes nothing: request ended");
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<LiveCall>>> {
        // No code that could panic runs under the lock.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LiveCalls {
    fn drop(&mut self) {
        if let Some(sweeper) = self.sweeper.get() {
            sweeper.abort();
        }
    }
}

async fn sweep_every(interval: Duration, calls: Weak<LiveCalls>) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(calls) = calls.upgrade() else { return };
        calls.sweep();
    }
}

/// One completion in progress.
#[derive(Debug)]
pub(crate) struct LiveCall {
    /// Of its samples, in order; at least one.
    cancellers: Mutex<Vec<Canceller>>,
    /// What a drain waits for.
    guard: Mutex<Option<CallGuard>>,
    /// What its stream holds of each sample; absent for calls that are not streamed.
    samples: OnceLock<Vec<Watched>>,
    /// How often the connection asked for more.
    num_asked: AtomicU32,
    /// Whether it was last told that there is nothing yet.
    is_waiting: AtomicBool,
    /// The sweeper's own.
    seen: Mutex<Seen>,
}

/// What the sweeper remembers of a call.
#[derive(Debug, Default)]
struct Seen {
    num_asked: u32,
    /// Sweeps since the one that first found something to take, with nobody asking since.
    num_idle: Option<u32>,
}

/// One sample of a streamed call.
#[derive(Debug)]
struct Watched {
    unread: Unread,
    /// Whether its end was taken: then there is nothing to take any more.
    is_over: AtomicBool,
}

impl LiveCall {
    /// What ends each of `num` samples from outside its stream; at least one. Further ones are
    /// cancelled already if the call is.
    pub(crate) fn cancellers(&self, num: usize) -> Vec<Canceller> {
        let mut cancellers = self.lock_cancellers();
        while cancellers.len() < num {
            let further = Canceller::default();
            if let Some(reason) = cancellers.first().and_then(Canceller::cancelled) {
                further.cancel(reason);
            }
            cancellers.push(further);
        }
        cancellers.clone()
    }

    /// Ends all samples. Returns whether any was alive and this was the call that ended it.
    pub(crate) fn cancel(&self, reason: CancelReason) -> bool {
        let cancellers = self.lock_cancellers();
        let num_ended = cancellers.iter().filter(|sample| sample.cancel(reason)).count();
        num_ended > 0
    }

    /// Why the call was cancelled, if it was.
    pub(crate) fn cancelled(&self) -> Option<CancelReason> {
        self.lock_cancellers().first().and_then(Canceller::cancelled)
    }

    /// From now on the call is a stream of these samples whose client may stall.
    pub(crate) fn watch(&self, samples: impl IntoIterator<Item = Unread>) {
        let watched = |unread| Watched { unread, is_over: AtomicBool::new(false) };
        let _ = self.samples.set(samples.into_iter().map(watched).collect()); // it has one stream
    }

    /// The end of a sample was taken.
    pub(crate) fn sample_is_over(&self, index: usize) {
        if let Some(sample) = self.samples.get().and_then(|samples| samples.get(index)) {
            sample.is_over.store(true, Ordering::Relaxed);
        }
    }

    /// The connection asks for more.
    pub(crate) fn asked(&self) {
        self.num_asked.fetch_add(1, Ordering::Relaxed);
    }

    /// What it was told: whether it has to wait.
    pub(crate) fn answered(&self, is_waiting: bool) {
        self.is_waiting.store(is_waiting, Ordering::Relaxed);
    }

    fn lock_cancellers(&self) -> MutexGuard<'_, Vec<Canceller>> {
        // No code that could panic runs under the lock.
        self.cancellers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a drain go on without this call.
    fn release(&self) {
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(guard);
    }

    /// Called by the sweeper alone, once per sweep.
    fn has_stalled(&self) -> bool {
        let Some(samples) = self.samples.get() else { return false };
        let is_something_there = !self.is_waiting.load(Ordering::Relaxed)
            || samples
                .iter()
                .any(|sample| !sample.is_over.load(Ordering::Relaxed) && sample.unread.is_any());
        let num_asked = self.num_asked.load(Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.num_idle = match seen.num_idle {
            _ if !is_something_there => None,
            Some(num_idle) if num_asked == seen.num_asked => Some(num_idle + 1),
            Some(_) | None => Some(0),
        };
        seen.num_asked = num_asked;
        seen.num_idle.is_some_and(|num_idle| num_idle >= SWEEPS_PER_LIMIT)
    }
}

/// A call's place in the register. Dropping it takes the call out.
#[derive(Debug)]
pub(crate) struct Entry {
    calls: Arc<LiveCalls>,
    key: Key,
    call: Arc<LiveCall>,
}

impl std::ops::Deref for Entry {
    type Target = LiveCall;

    fn deref(&self) -> &LiveCall {
        &self.call
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.calls.lock().remove(&self.key);
        // The sweeper may hold the call a moment longer.
        self.call.release();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::{CancelReason, Canceller, Entry, LiveCalls, SWEEPS_PER_LIMIT};
    use crate::engine::event::{Event, TokensEvent};
    use crate::grpc::calls::Calls;
    use crate::handle::{EVENT_QUEUE_LEN, Unread};

    struct Stream {
        entry: Entry,
        events: mpsc::Sender<Event>,
        receiver: mpsc::Receiver<Event>,
    }

    fn open(live: &Arc<LiveCalls>, calls: &Calls) -> Stream {
        let entry = live.enter("id", calls.begin());
        let (events, receiver) = mpsc::channel(EVENT_QUEUE_LEN);
        entry.watch([Unread::of(&events)]);
        Stream { entry, events, receiver }
    }

    impl Stream {
        fn put(&self) {
            let event = Event::Tokens(TokensEvent::default());
            self.events.try_send(event).expect("there is room");
        }

        /// As a connection whose peer has room does.
        fn take_all(&mut self) {
            self.entry.asked();
            while self.receiver.try_recv().is_ok() {
                self.entry.answered(false);
                self.entry.asked();
            }
            self.entry.answered(true);
        }

        fn is_ended(&self) -> bool {
            self.entry.cancelled() == Some(CancelReason::Stalled)
        }
    }

    /// The sweep that ends the call, counted from 1.
    fn sweeps_to_end(live: &LiveCalls, stream: &Stream) -> Option<u32> {
        (1..=4 * SWEEPS_PER_LIMIT).find(|_| {
            live.sweep();
            stream.is_ended()
        })
    }

    #[test]
    fn who_takes_nothing_is_ended_after_the_limit_and_not_before() {
        let (live, calls) = (Arc::new(LiveCalls::new(Duration::from_secs(1))), Calls::new());
        let mut stream = open(&live, &calls);
        stream.take_all();
        stream.put();
        // The first sweep sees that there is something.
        assert_eq!(sweeps_to_end(&live, &stream), Some(1 + SWEEPS_PER_LIMIT));
        assert_eq!(calls.num_in_progress(), 0, "a drain need not wait for it");
        drop(stream);
        assert!(live.lock().is_empty());
    }

    #[test]
    fn who_never_asked_is_ended_too() {
        let (live, calls) = (Arc::new(LiveCalls::new(Duration::from_secs(1))), Calls::new());
        let stream = open(&live, &calls);
        assert_eq!(sweeps_to_end(&live, &stream), Some(1 + SWEEPS_PER_LIMIT), "Started is there");
    }

    #[test]
    fn who_waits_or_takes_now_and_then_goes_on() {
        let (live, calls) = (Arc::new(LiveCalls::new(Duration::from_secs(1))), Calls::new());
        let mut stream = open(&live, &calls);
        stream.take_all();
        assert_eq!(sweeps_to_end(&live, &stream), None, "there was nothing to take");
        for _ in 0..5 {
            stream.put();
            for _ in 0..SWEEPS_PER_LIMIT {
                live.sweep();
            }
            stream.take_all();
        }
        assert!(!stream.is_ended());
        assert_eq!(calls.num_in_progress(), 1);
        // The engine is done with it: its end is there to take.
        let (events, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut stream.events, events));
        assert_eq!(sweeps_to_end(&live, &stream), Some(1 + SWEEPS_PER_LIMIT));
    }

    #[test]
    fn the_samples_of_a_call_stall_and_end_as_one() {
        let (live, calls) = (Arc::new(LiveCalls::new(Duration::from_secs(1))), Calls::new());
        let entry = live.enter("id", calls.begin());
        let cancellers = entry.cancellers(3);
        let mut queues: Vec<_> = (0..3).map(|_| mpsc::channel(EVENT_QUEUE_LEN)).collect();
        entry.watch(queues.iter().map(|(events, _)| Unread::of(events)));
        entry.asked();
        entry.answered(true);
        let sweeps_to_end = || {
            (1..=4 * SWEEPS_PER_LIMIT).find(|_| {
                live.sweep();
                entry.cancelled() == Some(CancelReason::Stalled)
            })
        };
        // The engine is done with the first sample, and its end was taken: the others may take
        // their time.
        drop(queues.remove(0));
        entry.sample_is_over(0);
        assert_eq!(sweeps_to_end(), None, "nothing is there to take");
        queues[1].0.try_send(Event::Tokens(TokensEvent::default())).expect("there is room");
        assert_eq!(sweeps_to_end(), Some(1 + SWEEPS_PER_LIMIT));
        let is_stalled = |sample: &Canceller| sample.cancelled() == Some(CancelReason::Stalled);
        assert!(cancellers.iter().all(is_stalled), "{cancellers:?}");
        assert!(entry.cancellers(5).iter().all(is_stalled), "those that come later too");
        assert!(!entry.cancel(CancelReason::Aborted), "it has ended");
    }

    #[test]
    fn ids_are_told_apart_and_shared_ones_end_together() {
        let (live, calls) = (Arc::new(LiveCalls::new(Duration::from_secs(1))), Calls::new());
        let same: Vec<Entry> = (0..3).map(|_| live.enter("a", calls.begin())).collect();
        let others = ["", "a\u{0}", "a0", "b"].map(|id| live.enter(id, calls.begin()));
        assert_eq!((live.abort("a"), live.abort("a"), live.abort("c")), (3, 0, 0));
        assert!(same.iter().all(|entry| entry.cancelled().is_some()));
        assert!(others.iter().all(|entry| entry.cancelled().is_none()));
        drop((same, others));
        assert!(live.lock().is_empty());
        assert_eq!(calls.num_in_progress(), 0);
    }
}
