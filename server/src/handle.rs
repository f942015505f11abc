//! Owns the network side of the engine's queues: submitting, receiving events, ending a request by
//! dropping its stream. Ending one from elsewhere is in `canceller.rs`. Knows tokio and the
//! engine's messages; never touches engine state.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use crossbeam::channel::Sender;
use slipstream_model::ids::SequenceId;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc, oneshot};

use crate::engine::event::{CancelReason, Event, OutputToken};
use crate::engine::request::{Request, SubmitError};

pub use crate::canceller::Canceller;

/// Events that wait for one slow reader before the engine holds further output back. Output is
/// never lost: it coalesces into the next event. The events of one request, queued or held back,
/// carry each of its tokens once, so together they take at most `context_len` times 32 bytes (an
/// output token, see below) plus the bytes of its text, however slow the reader is: less than 1 MiB
/// for a context of 16,384 and tokens of 24 bytes.
pub const EVENT_QUEUE_LEN: usize = 32;

const _: () = assert!(size_of::<OutputToken>() <= 32);

/// Requests beyond those that the engine holds that may be on their way to it. It refuses them
/// itself, because it knows when to come back, and counts them; what comes beyond these is refused
/// here, so that a flood costs the engine nothing.
const REFUSALS_MAX: usize = 64;

/// What the network side asks of the engine thread. Every live request has room for its two
/// commands reserved in the queue, so sending never blocks and a cancel is never lost.
#[derive(Debug)]
pub enum Command {
    /// Take a request.
    Submit(Box<Submission>),
    /// End a request and drop what it has not handed over. The permit is released when the engine
    /// has seen the command.
    Cancel(SequenceId, CancelReason, OwnedSemaphorePermit),
    /// Refuse new requests from now on; running ones go on.
    Drain,
    /// End every request as `ShuttingDown` and stop the thread.
    Stop,
}

/// A request on its way to the engine.
#[derive(Debug)]
pub struct Submission {
    /// The id given to it.
    pub id: SequenceId,
    /// What to do.
    pub request: Request,
    /// Where its events go.
    pub events: mpsc::Sender<Event>,
    /// Holds its place among the live requests.
    pub canceller: Canceller,
    /// Whether it was taken.
    pub reply: oneshot::Sender<Result<(), SubmitError>>,
}

/// Submits requests to the engine thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: Sender<Command>,
    permits: Arc<Semaphore>,
    max_requests: usize,
    next_id: Arc<AtomicU64>,
    /// Tells every stream when the engine is given up.
    given_up: Arc<Notify>,
}

/// A request that was sent off, and where its answer comes.
struct Sent {
    stream: RequestStream,
    /// `None` for one that was cancelled before: it has no answer and no events.
    answer: Option<oneshot::Receiver<Result<(), SubmitError>>>,
}

impl Sent {
    /// Waits until the engine has taken the request.
    async fn taken(mut self) -> Result<RequestStream, SubmitError> {
        let Some(answer) = self.answer else { return Ok(self.stream) };
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = self.stream.given_up.as_mut() => return Err(SubmitError::ShuttingDown),
        };
        match answer {
            Ok(Ok(())) => Ok(self.stream),
            Ok(Err(error)) => {
                self.stream.canceller.release();
                Err(error)
            }
            // It was cancelled before the engine saw it, and its command went with the engine.
            Err(_) => Err(SubmitError::ShuttingDown),
        }
    }
}

impl EngineHandle {
    /// Capacity of a command queue that serves `max_requests` live requests: two commands for each
    /// of them and of those that the engine refuses, and room for `Drain` and `Stop`.
    #[must_use]
    pub fn queue_capacity(max_requests: usize) -> usize {
        2 * (max_requests + REFUSALS_MAX) + 8
    }

    /// A handle that sends into a queue of [`queue_capacity`](Self::queue_capacity).
    #[must_use]
    pub fn new(commands: Sender<Command>, max_requests: usize) -> Self {
        let permits = Arc::new(Semaphore::new(max_requests + REFUSALS_MAX));
        let next_id = Arc::new(AtomicU64::new(0));
        Self { commands, permits, max_requests, next_id, given_up: Arc::default() }
    }

    /// Hands a request to the engine. It ends early when the stream of its events is dropped, or
    /// through `canceller`, which belongs to this request alone. One that was cancelled already is
    /// not handed over: its stream has no events.
    ///
    /// # Errors
    /// [`SubmitError`] when the request was not taken.
    pub async fn submit(
        &self,
        request: Request,
        canceller: &Canceller,
    ) -> Result<RequestStream, SubmitError> {
        let permit = self.permits(1)?;
        self.send(request, canceller, permit)?.taken().await
    }

    /// Hands several samples of one request to the engine: `request` and, with the sample indices
    /// behind its own, one more for every further canceller. All are taken or none; each ends early
    /// as if it were alone. Returns their streams in the same order.
    ///
    /// # Errors
    /// The first [`SubmitError`]; those taken before are cancelled.
    pub async fn submit_samples(
        &self,
        request: Request,
        cancellers: &[Canceller],
    ) -> Result<Vec<RequestStream>, SubmitError> {
        let mut permits = self.permits(cancellers.len())?;
        let mut sent: Vec<Sent> = Vec::with_capacity(cancellers.len());
        // All before the first answer: the engine sees them together, between two steps.
        for (canceller, offset) in cancellers.iter().zip(0..) {
            let mut sample = request.clone();
            sample.params.sample_index += offset;
            sample.sibling = sent.first().map(|first| first.stream.id);
            let permit = permits.split(1).ok_or(SubmitError::Invalid("a sample has no place"))?;
            sent.push(self.send(sample, canceller, permit)?);
        }
        let mut streams = Vec::with_capacity(sent.len());
        for sent in sent {
            streams.push(sent.taken().await?);
        }
        Ok(streams)
    }

    /// Places for so many requests, all or none.
    fn permits(&self, num: usize) -> Result<OwnedSemaphorePermit, SubmitError> {
        let full = SubmitError::TooManyRequests { limit: self.max_requests };
        let num = u32::try_from(num).map_err(|_| full.clone())?;
        Arc::clone(&self.permits).try_acquire_many_owned(num).map_err(|refused| match refused {
            TryAcquireError::NoPermits => full,
            TryAcquireError::Closed => SubmitError::ShuttingDown,
        })
    }

    /// Sends a request off. From here on the engine may know it: whatever happens to the future
    /// that waits for its answer, the stream's drop tells the engine to forget.
    fn send(
        &self,
        request: Request,
        canceller: &Canceller,
        permit: OwnedSemaphorePermit,
    ) -> Result<Sent, SubmitError> {
        let given_up = Box::pin(Arc::clone(&self.given_up).notified_owned());
        // Whoever gives the engine up closes the permits, then tells those that listen by then.
        if self.permits.is_closed() {
            return Err(SubmitError::ShuttingDown);
        }
        let id = SequenceId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (events, receiver) = mpsc::channel(EVENT_QUEUE_LEN);
        let unread = Unread::of(&events);
        let stream = RequestStream { id, receiver, unread, canceller: canceller.clone(), given_up };
        let (reply, answer) = oneshot::channel();
        let canceller = canceller.clone();
        let submission = Box::new(Submission { id, request, events, canceller, reply });
        let is_sent = stream.canceller.submit(submission, &self.commands, permit)?;
        Ok(Sent { stream, answer: is_sent.then_some(answer) })
    }

    /// Refuses new requests from now on.
    pub fn drain(&self) {
        // The only senders of Drain and Stop are shutdown paths; their room is reserved. A closed
        // queue means that the engine has already ended.
        let _ = self.commands.try_send(Command::Drain);
    }

    /// Ends every request and the engine thread.
    pub fn stop(&self) {
        let _ = self.commands.try_send(Command::Stop);
    }

    /// Ends every stream and takes no requests any more, without the engine, which does not come
    /// back: its requests end as if it had gone.
    pub(crate) fn give_up(&self) {
        self.permits.close();
        self.given_up.notify_waiters();
    }

    /// Requests that can be alive at the same time.
    #[must_use]
    pub fn max_requests(&self) -> usize {
        self.max_requests
    }

    /// Requests that are alive now: from submission until the engine has ended them, whether or not
    /// their last events were read.
    #[must_use]
    pub fn num_live(&self) -> usize {
        self.max_requests + REFUSALS_MAX - self.permits.available_permits()
    }
}

/// The events of one request. Dropping it before the end cancels the request.
#[derive(Debug)]
pub struct RequestStream {
    id: SequenceId,
    receiver: mpsc::Receiver<Event>,
    unread: Unread,
    canceller: Canceller,
    /// Resolves when the engine is given up.
    given_up: Pin<Box<OwnedNotified>>,
}

impl RequestStream {
    /// The next event; `None` after [`Event::Finished`], after a cancel, or when the engine has
    /// ended or was given up.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same for hand-written streams.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        match self.receiver.poll_recv(cx) {
            Poll::Pending if self.given_up.as_mut().poll(cx).is_ready() => Poll::Ready(None),
            news => news,
        }
    }

    /// The id the engine knows the request by.
    #[must_use]
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Tells others whether events wait in this stream.
    #[must_use]
    pub fn unread(&self) -> Unread {
        self.unread.clone()
    }

    /// Why no further events will come, if the request was cancelled.
    #[must_use]
    pub fn cancelled(&self) -> Option<CancelReason> {
        self.canceller.cancelled()
    }
}

/// Whether events wait to be read from a stream.
#[derive(Clone, Debug)]
pub struct Unread {
    events: mpsc::WeakSender<Event>,
}

impl Unread {
    /// Of the stream that these events go to.
    pub(crate) fn of(events: &mpsc::Sender<Event>) -> Self {
        Self { events: events.downgrade() }
    }

    /// Whether the stream would give something now: an event, or its end.
    #[must_use]
    pub fn is_any(&self) -> bool {
        // Without a sender the engine is done with the stream: its last event or its end is there.
        self.events.upgrade().is_none_or(|events| events.capacity() < EVENT_QUEUE_LEN)
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.canceller.cancel(CancelReason::ClientGone);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use crossbeam::channel;
    use slipstream_model::clock::Micros;
    use slipstream_model::ids::TokenId;
    use slipstream_model::sampling::SamplingParams;

    use super::{CancelReason, Canceller, Command, EngineHandle, Request, Submission};
    use crate::engine::request::{PrefixReuse, Priority, Speculation, SubmitError, TenantId};

    /// The least that can be asked.
    pub(crate) fn request() -> Request {
        Request {
            prompt: vec![TokenId(0)],
            output_prefix: Vec::new(),
            params: SamplingParams::greedy(),
            stop_strings: Vec::new(),
            max_tokens: 1,
            logprobs: false,
            speculation: Speculation::Off,
            arrival: Micros(0),
            deadline: None,
            tenant: TenantId::default(),
            priority: Priority::Normal,
            prefix_reuse: PrefixReuse::salted(""),
            sibling: None,
        }
    }

    /// A handle with room for one request, and the engine's end of its queue.
    fn one() -> (EngineHandle, channel::Receiver<Command>) {
        let (sender, commands) = channel::bounded(EngineHandle::queue_capacity(1));
        (EngineHandle::new(sender, 1), commands)
    }

    /// As the engine takes a request.
    fn take(commands: &channel::Receiver<Command>) -> Box<Submission> {
        match commands.try_recv() {
            Ok(Command::Submit(submission)) => submission,
            other => panic!("no request but {other:?}"),
        }
    }

    #[tokio::test]
    async fn the_first_of_stream_and_canceller_sends_the_one_cancel() {
        for is_canceller_first in [true, false] {
            let (handle, commands) = one();
            let canceller = Canceller::default();
            let (stream, submission) = tokio::join!(handle.submit(request(), &canceller), async {
                let Submission { id, request, events, canceller, reply } = *take(&commands);
                reply.send(Ok(())).expect("it is waited for");
                (id, request, events, canceller)
            });
            let mut stream = stream.expect("it was taken");
            assert_eq!(handle.num_live(), 1);
            if is_canceller_first {
                assert!(canceller.cancel(CancelReason::Aborted));
                assert!(!canceller.cancel(CancelReason::Stalled), "only once");
                assert_eq!(stream.cancelled(), Some(CancelReason::Aborted));
            }
            drop(submission);
            assert_eq!(stream.next().await, None);
            drop(stream);
            assert!(!canceller.cancel(CancelReason::Stalled), "it is over");
            let Ok(Command::Cancel(_, reason, permit)) = commands.try_recv() else { panic!() };
            let expected =
                if is_canceller_first { CancelReason::Aborted } else { CancelReason::ClientGone };
            assert_eq!(reason, expected);
            assert_eq!(handle.num_live(), 1, "the engine has not seen it yet");
            drop(permit);
            assert_eq!(handle.num_live(), 0);
            assert!(commands.try_recv().is_err(), "one cancel is all there is room for");
        }
    }

    #[tokio::test]
    async fn a_request_that_the_engine_has_ended_needs_no_cancel() {
        let (handle, commands) = one();
        let canceller = Canceller::default();
        let (stream, ()) = tokio::join!(handle.submit(request(), &canceller), async {
            let Submission { canceller, reply, .. } = *take(&commands);
            reply.send(Ok(())).expect("it is waited for");
            canceller.release();
        });
        let stream = stream.expect("it was taken");
        assert_eq!(handle.num_live(), 0, "though nobody has read it");
        assert!(!canceller.cancel(CancelReason::Aborted), "it was over");
        drop(stream);
        assert!(commands.try_recv().is_err());
    }

    #[tokio::test]
    async fn what_was_cancelled_before_never_reaches_the_engine() {
        let (handle, commands) = one();
        let canceller = Canceller::default();
        assert!(canceller.cancel(CancelReason::Aborted));
        let mut stream = handle.submit(request(), &canceller).await.expect("a stream without news");
        assert_eq!((stream.next().await, stream.cancelled()), (None, Some(CancelReason::Aborted)));
        drop(stream);
        assert_eq!(handle.num_live(), 0);
        assert!(commands.try_recv().is_err());
        let again = handle.submit(request(), &canceller).await;
        assert!(again.is_ok(), "still nothing");
    }

    #[tokio::test]
    async fn samples_go_together_and_come_back_together() {
        let (sender, commands) = channel::bounded(EngineHandle::queue_capacity(3));
        let handle = EngineHandle::new(sender, 3);
        let cancellers: Vec<Canceller> = (0..3).map(|_| Canceller::default()).collect();
        let mut first = request();
        first.params.sample_index = 7;
        let (streams, ()) = tokio::join!(handle.submit_samples(first, &cancellers), async {
            let taken: Vec<_> = (0..3).map(|_| *take(&commands)).collect();
            let what =
                |sample: &Submission| (sample.request.params.sample_index, sample.request.sibling);
            let first = Some(taken[0].id);
            let expected = [(7, None), (8, first), (9, first)];
            assert_eq!(taken.iter().map(what).collect::<Vec<_>>(), expected);
            assert_eq!(handle.num_live(), 3);
            let full = SubmitError::QueueFull { limit: 2, retry_after: Micros(1) };
            for (sample, answer) in taken.into_iter().zip([Ok(()), Err(full), Ok(())]) {
                sample.reply.send(answer).expect("it is waited for");
            }
        });
        assert!(matches!(streams, Err(SubmitError::QueueFull { limit: 2, .. })));
        let cancelled: Vec<_> = commands.try_iter().collect();
        assert_eq!(cancelled.len(), 2, "those that were taken: {cancelled:?}");
        drop(cancelled);
        assert_eq!(handle.num_live(), 0);
    }

    #[tokio::test]
    async fn a_flood_is_refused_without_the_engine() {
        let (handle, commands) = one();
        for (num, error) in [
            (1 + super::REFUSALS_MAX, None), // the engine has the word
            (2 + super::REFUSALS_MAX, Some(SubmitError::TooManyRequests { limit: 1 })),
        ] {
            let cancellers: Vec<Canceller> = (0..num).map(|_| Canceller::default()).collect();
            let refused = tokio::select! {
                biased;
                taken = handle.submit_samples(request(), &cancellers) => taken.err(),
                () = std::future::ready(()) => None,
            };
            assert_eq!(refused, error);
        }
        drop(commands);
    }

    #[tokio::test]
    async fn a_caller_that_stops_waiting_is_followed_by_its_cancel() {
        let (handle, commands) = one();
        let canceller = Canceller::default();
        let submit = handle.submit(request(), &canceller);
        tokio::select! {
            biased;
            _ = submit => panic!("nobody has answered"),
            () = std::future::ready(()) => {}
        }
        drop(take(&commands));
        assert!(matches!(commands.try_recv(), Ok(Command::Cancel(..))));
    }
}
