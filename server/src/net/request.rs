//! Owns the requests in progress of one connection: how many there are, since when there are none,
//! and whose peer takes nothing of the answer. Knows no routes and no sockets.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::rt::Executor;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tower::Service as _;

/// The peer has everything that there is so far.
const WAITING: u64 = 0;

/// What the requests of one connection leave behind for whoever decides about it.
#[derive(Debug)]
pub(super) struct Traffic {
    /// Times below are milliseconds since then.
    begun_at: Instant,
    num_begun: AtomicU64,
    in_progress: AtomicUsize,
    idle_since_ms: AtomicU64,
    data_frames: AtomicU64,
    unstarted: AtomicUsize,
    is_flood: AtomicBool,
    answers: Mutex<Vec<Weak<Answer>>>,
    /// The answer whose HTTP/2 stream hyper is about to give to the executor.
    handed_over: Mutex<Option<Arc<Answer>>>,
}

/// How far one answer is.
#[derive(Debug)]
struct Answer {
    /// [`WAITING`], or when the frame that the peer is to take was there, plus one.
    delivered_ms: AtomicU64,
    /// The task of its HTTP/2 stream; HTTP/1 has none.
    task: OnceLock<AbortHandle>,
}

/// What became of answers that nobody takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stalled {
    /// HTTP/2 streams that were reset.
    pub(super) streams: usize,
    /// Whether there is one of HTTP/1, which ends with its connection only.
    pub(super) is_connection: bool,
}

impl Traffic {
    /// No requests yet.
    pub(super) fn new(begun_at: Instant) -> Self {
        Self {
            begun_at,
            num_begun: AtomicU64::new(0),
            in_progress: AtomicUsize::new(0),
            idle_since_ms: AtomicU64::new(0),
            data_frames: AtomicU64::new(0),
            unstarted: AtomicUsize::new(0),
            is_flood: AtomicBool::new(false),
            answers: Mutex::new(Vec::new()),
            handed_over: Mutex::new(None),
        }
    }

    /// Milliseconds since the connection began.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.begun_at.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Requests so far.
    pub(super) fn num_begun(&self) -> u64 {
        self.num_begun.load(Ordering::Relaxed)
    }

    /// Frames of answers so far.
    pub(super) fn data_frames(&self) -> u64 {
        self.data_frames.load(Ordering::Relaxed)
    }

    /// The peer sends more than it may: the connection is about to end for it.
    pub(super) fn note_flood(&self) {
        self.is_flood.store(true, Ordering::Relaxed);
    }

    /// Whether the peer sent more than it may.
    pub(super) fn is_flood(&self) -> bool {
        self.is_flood.load(Ordering::Relaxed)
    }

    /// HTTP/2 streams whose task has not had its first turn yet.
    pub(super) fn num_unstarted(&self) -> usize {
        self.unstarted.load(Ordering::Relaxed)
    }

    /// Since when there is no request in progress, if there is none.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        // First the number: the time of the last one's end was stored before it went.
        let is_idle = self.in_progress.load(Ordering::Acquire) == 0;
        let since = Duration::from_millis(self.idle_since_ms.load(Ordering::Acquire));
        is_idle.then(|| self.begun_at + since)
    }

    /// Ends the answers of which nothing was taken for `timeout` until `now_ms`, as far as that can
    /// be done without ending the connection.
    pub(super) fn end_stalled(&self, timeout: Duration, now_ms: u64) -> Stalled {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let mut stalled = Stalled::default();
        locked(&self.answers).retain(|answer| {
            let Some(answer) = answer.upgrade() else { return false };
            let delivered_ms = answer.delivered_ms.load(Ordering::Relaxed);
            if delivered_ms == WAITING || now_ms + 1 < delivered_ms.saturating_add(timeout_ms) {
                return true;
            }
            match answer.task.get() {
                Some(task) => {
                    task.abort();
                    stalled.streams += 1;
                }
                None => stalled.is_connection = true,
            }
            false
        });
        stalled
    }

    fn begin(self: &Arc<Self>, version: Version) -> InProgress {
        self.num_begun.fetch_add(1, Ordering::Relaxed);
        self.in_progress.fetch_add(1, Ordering::AcqRel);
        let answer =
            Arc::new(Answer { delivered_ms: AtomicU64::new(WAITING), task: OnceLock::new() });
        let mut answers = locked(&self.answers);
        if answers.len() == answers.capacity() {
            // Before it grows: what has ended goes, so that it stays as long as the most requests
            // at once, more or less.
            answers.retain(|answer| answer.strong_count() > 0);
        }
        answers.push(Arc::downgrade(&answer));
        drop(answers);
        if version == Version::HTTP_2 {
            *locked(&self.handed_over) = Some(Arc::clone(&answer));
        }
        InProgress { traffic: Arc::clone(self), answer }
    }
}

/// A panic while one of these locks was held leaves nothing half done behind.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One request, from its headers to the end of its answer.
#[derive(Debug)]
struct InProgress {
    traffic: Arc<Traffic>,
    answer: Arc<Answer>,
}

impl Drop for InProgress {
    fn drop(&mut self) {
        // First the time: who sees the last one gone must see when.
        self.traffic.idle_since_ms.store(self.traffic.now_ms(), Ordering::Release);
        self.traffic.in_progress.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The body of an answer, which tells how far it is.
#[derive(Debug)]
pub(super) struct AnswerBody {
    body: axum::body::Body,
    request: InProgress,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        let InProgress { traffic, answer } = &self.request;
        let state = match &polled {
            Poll::Ready(Some(_)) => {
                traffic.data_frames.fetch_add(1, Ordering::Relaxed);
                traffic.now_ms() + 1
            }
            Poll::Ready(None) | Poll::Pending => WAITING,
        };
        answer.delivered_ms.store(state, Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Answers the requests of one connection.
#[derive(Clone, Debug)]
pub(super) struct Answering {
    /// What answers.
    pub(super) router: axum::Router,
    /// What is kept about it.
    pub(super) traffic: Arc<Traffic>,
}

impl hyper::service::Service<Request<Incoming>> for Answering {
    type Response = Response<AnswerBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let in_progress = self.traffic.begin(request.version());
        let answer = self.router.clone().call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| AnswerBody { body, request: in_progress }))
        })
    }
}

/// A task that has not had its first turn.
struct Unstarted(Arc<Traffic>);

impl Unstarted {
    fn new(traffic: &Arc<Traffic>) -> Self {
        traffic.unstarted.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(traffic))
    }
}

impl Drop for Unstarted {
    fn drop(&mut self) {
        self.0.unstarted.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs the HTTP/2 streams of one connection as tasks, so that one of them can be ended alone.
/// hyper gives it the future of each stream right behind the call of [`Answering`].
#[derive(Clone, Debug)]
pub(super) struct StreamTasks(pub(super) Arc<Traffic>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for StreamTasks {
    fn execute(&self, stream: F) {
        let answer = locked(&self.0.handed_over).take();
        let unstarted = Unstarted::new(&self.0);
        let task = tokio::spawn(async move {
            drop(unstarted);
            stream.await;
        });
        if let Some(answer) = answer {
            // The cell is filled here and nowhere else.
            let _ = answer.task.set(task.abort_handle());
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn body(traffic: &Arc<Traffic>, version: Version, text: &'static str) -> AnswerBody {
        AnswerBody { body: axum::body::Body::from(text), request: traffic.begin(version) }
    }

    #[test]
    fn idle_is_who_has_no_request_in_progress() {
        let begun_at = Instant::now();
        let traffic = Arc::new(Traffic::new(begun_at));
        assert_eq!(traffic.idle_since(), Some(begun_at));
        let (first, second) = (traffic.begin(Version::HTTP_11), traffic.begin(Version::HTTP_11));
        drop(first);
        assert_eq!(traffic.idle_since(), None);
        drop(second);
        assert!(traffic.idle_since().is_some_and(|since| since <= Instant::now()));
        assert_eq!(traffic.num_begun(), 2);
    }

    #[tokio::test]
    async fn an_answer_stalls_when_its_frame_is_not_taken() {
        let traffic = Arc::new(Traffic::new(Instant::now()));
        let after = |minutes: u64| traffic.now_ms() + minutes * 60_000;
        let mut answer = body(&traffic, Version::HTTP_11, "text");
        let nothing = Stalled::default();
        assert_eq!(traffic.end_stalled(MINUTE, after(10)), nothing, "nothing is there to take");
        answer.frame().await.unwrap().unwrap();
        assert_eq!(traffic.end_stalled(MINUTE, traffic.now_ms()), nothing, "it has time yet");
        let cut = Stalled { streams: 0, is_connection: true };
        assert_eq!(traffic.end_stalled(MINUTE, after(1)), cut, "HTTP/1 has no streams");
        let mut taken = body(&traffic, Version::HTTP_11, "text");
        taken.frame().await.unwrap().unwrap();
        assert!(taken.frame().await.is_none());
        assert_eq!(traffic.end_stalled(MINUTE, after(10)), nothing, "all of it was taken");
    }

    #[tokio::test]
    async fn a_stalled_stream_is_ended_alone() {
        let traffic = Arc::new(Traffic::new(Instant::now()));
        let tasks = StreamTasks(Arc::clone(&traffic));
        let (ends, mut all_ended) = tokio::sync::mpsc::channel::<()>(1);
        for is_stuck in [true, false] {
            let mut answer = body(&traffic, Version::HTTP_2, "text");
            let end = ends.clone();
            tasks.execute(async move {
                answer.frame().await.unwrap().unwrap();
                if is_stuck {
                    std::future::pending::<()>().await;
                }
                assert!(answer.frame().await.is_none());
                drop(end);
            });
        }
        drop(ends);
        let mut num_reset = 0;
        while all_ended.try_recv() != Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) {
            tokio::task::yield_now().await;
            num_reset += traffic.end_stalled(MINUTE, traffic.now_ms() + 60_000).streams;
        }
        assert_eq!(num_reset, 1);
        assert!(traffic.idle_since().is_some());
    }

    #[tokio::test]
    async fn tasks_count_as_unstarted_until_their_first_turn() {
        let traffic = Arc::new(Traffic::new(Instant::now()));
        let tasks = StreamTasks(Arc::clone(&traffic));
        for _ in 0..3 {
            tasks.execute(std::future::pending::<()>());
        }
        assert_eq!(traffic.num_unstarted(), 3, "nothing has run yet on this one thread");
        while traffic.num_unstarted() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn ended_answers_are_forgotten() {
        let traffic = Arc::new(Traffic::new(Instant::now()));
        for _ in 0..10_000 {
            drop(traffic.begin(Version::HTTP_2));
        }
        assert!(locked(&traffic.answers).capacity() <= 8);
    }
}
