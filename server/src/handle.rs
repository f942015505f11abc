//! Owns the network side of the engine's queues: submitting, receiving events, ending a request by
//! dropping its stream or by its canceller. Knows tokio and the engine's messages; never touches
//! engine state.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use crossbeam::channel::Sender;
use slipstream_model::ids::SequenceId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::engine::event::{CancelReason, Event};
use crate::engine::request::{Request, SubmitError};

/// Events that wait for one slow reader before the engine holds further output back. Output is
/// never lost: it coalesces into the next event. The events of one request, queued or held back,
/// carry each of its tokens once, so together they take at most `context_len` times 40 bytes (an
/// output token) plus the bytes of its text, however slow the reader is: about 1 MiB for a context
/// of 16,384 and tokens of 24 bytes.
pub const EVENT_QUEUE_LEN: usize = 32;

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
}

impl EngineHandle {
    /// Capacity of a command queue that serves `max_requests` live requests: two commands each, and
    /// room for `Drain` and `Stop`.
    #[must_use]
    pub fn queue_capacity(max_requests: usize) -> usize {
        2 * max_requests + 8
    }

    /// A handle that sends into a queue of [`queue_capacity`](Self::queue_capacity).
    #[must_use]
    pub fn new(commands: Sender<Command>, max_requests: usize) -> Self {
        let permits = Arc::new(Semaphore::new(max_requests));
        Self { commands, permits, max_requests, next_id: Arc::new(AtomicU64::new(0)) }
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
        let permit = Arc::clone(&self.permits)
            .try_acquire_owned()
            .map_err(|_| SubmitError::TooManyRequests { limit: self.max_requests })?;
        let id = SequenceId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (events, receiver) = mpsc::channel(EVENT_QUEUE_LEN);
        // From here on the engine may know the request: whatever happens to this future, the
        // stream's drop tells it to forget.
        let unread = events.downgrade();
        let stream = RequestStream { id, receiver, unread, canceller: canceller.clone() };
        let (reply, answer) = oneshot::channel();
        let canceller = canceller.clone();
        let submission = Box::new(Submission { id, request, events, canceller, reply });
        if !stream.canceller.submit(submission, &self.commands, permit)? {
            return Ok(stream);
        }
        match answer.await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) => {
                stream.canceller.release();
                Err(error)
            }
            // It was cancelled before the engine saw it, and its command went with the engine.
            Err(_) => Err(SubmitError::ShuttingDown),
        }
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

    /// Requests that are alive now: from submission until the engine has ended them, whether or not
    /// their last events were read.
    #[must_use]
    pub fn num_live(&self) -> usize {
        self.max_requests - self.permits.available_permits()
    }
}

/// Ends one request from outside its stream. Clones are the same canceller. It holds the request's
/// place among the live ones, and with it the room that is reserved for its one cancel in the
/// engine's queue; whoever is first takes both: the stream's drop, a canceller, or the engine.
#[derive(Clone, Debug, Default)]
pub struct Canceller {
    state: Arc<Mutex<Life>>,
}

/// How far the life of a request is, as seen from the network side.
#[derive(Debug, Default)]
enum Life {
    /// The engine does not know it yet.
    #[default]
    New,
    /// The engine may work on it.
    Live { id: SequenceId, commands: Sender<Command>, permit: OwnedSemaphorePermit },
    /// The engine has ended it; events may be unread.
    Ended,
    /// It was told to end before anything else ended it, or what is unread shall go.
    Cancelled(CancelReason),
}

impl Canceller {
    /// Ends the request. Events that it has handed over can still be read, further ones will not
    /// come. Returns whether it was alive and this was the call that ended it.
    pub fn cancel(&self, reason: CancelReason) -> bool {
        let mut state = self.lock();
        if matches!(*state, Life::Cancelled(_)) {
            return false;
        }
        match std::mem::replace(&mut *state, Life::Cancelled(reason)) {
            Life::New => true,
            Life::Live { id, commands, permit } => {
                // Room for this command was reserved with the permit; a closed queue means that
                // there is no engine left to tell.
                let _ = commands.try_send(Command::Cancel(id, reason, permit));
                true
            }
            Life::Ended | Life::Cancelled(_) => false,
        }
    }

    /// Why the request was cancelled, if it was.
    #[must_use]
    pub fn cancelled(&self) -> Option<CancelReason> {
        match *self.lock() {
            Life::Cancelled(reason) => Some(reason),
            Life::New | Life::Live { .. } | Life::Ended => None,
        }
    }

    /// Gives the place back of a request that the engine has ended or never took.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        if matches!(*state, Life::Live { .. }) {
            *state = Life::Ended;
        }
    }

    /// Sends the request off. Returns false when it was cancelled before.
    fn submit(
        &self,
        submission: Box<Submission>,
        commands: &Sender<Command>,
        permit: OwnedSemaphorePermit,
    ) -> Result<bool, SubmitError> {
        let mut state = self.lock();
        match *state {
            Life::New => {}
            Life::Cancelled(_) => return Ok(false),
            Life::Live { .. } | Life::Ended => {
                return Err(SubmitError::Invalid("its canceller belongs to another request"));
            }
        }
        let id = submission.id;
        commands.try_send(Command::Submit(submission)).map_err(|_| SubmitError::ShuttingDown)?;
        *state = Life::Live { id, commands: commands.clone(), permit };
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        // No code that could panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of one request. Dropping it before the end cancels the request.
#[derive(Debug)]
pub struct RequestStream {
    id: SequenceId,
    receiver: mpsc::Receiver<Event>,
    unread: mpsc::WeakSender<Event>,
    canceller: Canceller,
}

impl RequestStream {
    /// The next event; `None` after [`Event::Finished`], after a cancel, or when the engine has
    /// ended.
    pub async fn next(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// The same for hand-written streams.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.receiver.poll_recv(cx)
    }

    /// The id the engine knows the request by.
    #[must_use]
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Tells others whether events wait in this stream.
    #[must_use]
    pub fn unread(&self) -> Unread {
        Unread { events: self.unread.clone() }
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
