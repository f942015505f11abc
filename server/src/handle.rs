//! Owns the network side of the engine's queues: submitting, receiving events, cancelling by drop.
//! Knows tokio and the engine's messages; never touches engine state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::Sender;
use slipstream_model::ids::SequenceId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::engine::event::Event;
use crate::engine::request::{Request, SubmitError};

/// Events that wait for one slow reader before the engine holds further output back. Output is
/// never lost: it coalesces into the next event.
pub const EVENT_QUEUE_LEN: usize = 32;

/// What the network side asks of the engine thread. Every live request has room for its two
/// commands reserved in the queue, so sending never blocks and a cancel is never lost.
#[derive(Debug)]
pub enum Command {
    /// Take a request.
    Submit(Box<Submission>),
    /// A client has gone. The permit is released when the engine has seen the command.
    Cancel(SequenceId, OwnedSemaphorePermit),
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

    /// Hands a request to the engine. The stream of its events cancels it when dropped early.
    ///
    /// # Errors
    /// [`SubmitError`] when the request was not taken.
    pub async fn submit(&self, request: Request) -> Result<RequestStream, SubmitError> {
        let permit = Arc::clone(&self.permits)
            .try_acquire_owned()
            .map_err(|_| SubmitError::TooManyRequests { limit: self.max_requests })?;
        let id = SequenceId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (events, receiver) = mpsc::channel(EVENT_QUEUE_LEN);
        let (reply, answer) = oneshot::channel();
        let submission = Box::new(Submission { id, request, events, reply });
        self.commands
            .try_send(Command::Submit(submission))
            .map_err(|_| SubmitError::ShuttingDown)?;
        // From here on the engine may know the request: whatever happens to this future, the
        // stream's drop tells it to forget.
        let stream =
            RequestStream { id, receiver, commands: self.commands.clone(), permit: Some(permit) };
        match answer.await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) => {
                stream.forget();
                Err(error)
            }
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

    /// Requests that are alive now, from submission to the last event taken.
    #[must_use]
    pub fn num_live(&self) -> usize {
        self.max_requests - self.permits.available_permits()
    }
}

/// The events of one request. Dropping it before the end cancels the request.
#[derive(Debug)]
pub struct RequestStream {
    id: SequenceId,
    receiver: mpsc::Receiver<Event>,
    commands: Sender<Command>,
    permit: Option<OwnedSemaphorePermit>,
}

impl RequestStream {
    /// The next event; `None` after [`Event::Finished`], or when the engine has ended.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.receiver.recv().await;
        if matches!(event, Some(Event::Finished(_))) {
            self.permit = None;
        }
        event
    }

    /// The id the engine knows the request by.
    #[must_use]
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Ends the stream of a request that the engine never took.
    fn forget(mut self) {
        self.permit = None;
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            // Room for this command was reserved with the permit; a closed queue means that there
            // is no engine left to tell.
            let _ = self.commands.try_send(Command::Cancel(self.id, permit));
        }
    }
}
