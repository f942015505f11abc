//! Owns the engine thread: takes commands, steps, hands events over. The only file of the engine
//! that touches channels and threads. Knows nothing of what requests mean.

use std::collections::HashMap;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{self, Receiver, RecvTimeoutError};
use slipstream_model::ids::SequenceId;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::event::{CancelReason, Event};
use super::request::SubmitError;
use super::{Engine, StepReport};
use crate::handle::{Canceller, Command, EngineHandle, Submission};
use crate::metrics::engine::{EngineRecorder, Pace};

/// How often output is offered again to readers whose queue was full, and the metrics to a scrape
/// that was just looking, while nothing else happens.
const STALLED_POLL: Duration = Duration::from_millis(2);

/// How the engine thread ended, unless as it was told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The verifier failed too often in a row, or panicked: nothing can be computed any more.
    /// Every request had its end.
    #[error("the verifier keeps failing")]
    VerifierFailed,
    /// The engine panicked elsewhere; the panic is on stderr.
    #[error("the engine thread panicked")]
    Panicked,
}

/// The running engine thread.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<Result<(), EngineError>>,
}

impl EngineThread {
    /// Waits for the thread to end.
    ///
    /// # Errors
    /// [`EngineError`] when nobody told it to end.
    pub fn join(self) -> Result<(), EngineError> {
        self.thread.join().unwrap_or(Err(EngineError::Panicked))
    }
}

/// Moves `engine` to a thread of its own that serves at most `max_requests` live requests.
///
/// # Errors
/// When the operating system refuses the thread.
pub(crate) fn spawn(
    engine: Engine,
    max_requests: usize,
    recorder: EngineRecorder,
) -> io::Result<(EngineHandle, EngineThread)> {
    let (sender, commands) = channel::bounded(EngineHandle::queue_capacity(max_requests));
    let runner = Runner {
        is_shown: recorder.step_ends(&engine, StepReport::default()),
        recorder,
        engine,
        commands,
        readers: HashMap::new(),
        is_draining: false,
        is_blocked: false,
        news: Vec::new(),
    };
    let thread = thread::Builder::new().name("engine".to_owned()).spawn(|| runner.run())?;
    Ok((EngineHandle::new(sender, max_requests), EngineThread { thread }))
}

/// Where the events of a request go, and who else holds its place among the live ones.
struct Reader {
    events: mpsc::Sender<Event>,
    canceller: Canceller,
    pace: Pace,
}

struct Runner {
    engine: Engine,
    commands: Receiver<Command>,
    /// Of requests that have not ended, or whose end was not handed over.
    readers: HashMap<SequenceId, Reader>,
    is_draining: bool,
    /// Whether the last step could compute nothing: whoever could run waits for somebody's reader.
    is_blocked: bool,
    recorder: EngineRecorder,
    /// Whether the recorder has shown what the engine is now.
    is_shown: bool,
    /// Scratch.
    news: Vec<SequenceId>,
}

impl Runner {
    fn run(mut self) -> Result<(), EngineError> {
        while !self.engine.has_failed() && self.take_commands() {
            self.recorder.step_begins();
            let report = self.engine.step();
            self.is_blocked = report.num_rows == 0;
            self.deliver();
            self.is_shown = self.recorder.step_ends(&self.engine, report);
        }
        self.engine.shut_down();
        self.deliver();
        self.recorder.ends(&self.engine);
        if self.engine.has_failed() { Err(EngineError::VerifierFailed) } else { Ok(()) }
    }

    /// Takes all commands that wait, and waits for one when there is nothing else to do. Returns
    /// false when the thread shall end.
    fn take_commands(&mut self) -> bool {
        if !self.engine.has_work() || self.is_blocked {
            // Somebody whose request has not ended, or who has not taken its end, is behind: their
            // output is offered again, and the step that comes with it ends what is out of time.
            let is_idle = self.readers.is_empty() && !self.engine.has_work();
            let first = if is_idle && self.is_shown {
                self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.commands.recv_timeout(STALLED_POLL)
            };
            match first {
                Ok(command) => {
                    if !self.apply(command) {
                        return false;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            if !self.apply(command) {
                return false;
            }
        }
        true
    }

    /// Returns false for `Stop`.
    fn apply(&mut self, command: Command) -> bool {
        match command {
            Command::Submit(submission) => self.submit(*submission),
            Command::Cancel(id, reason, permit) => {
                self.engine.forget(id, reason);
                self.readers.remove(&id);
                drop(permit);
            }
            Command::Drain => self.is_draining = true,
            Command::Stop => return false,
        }
        true
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { id, request, events, canceller, reply } = submission;
        let pace = Pace::new(request.arrival);
        let result = if self.is_draining {
            Err(SubmitError::ShuttingDown)
        } else {
            self.engine.submit(id, request)
        };
        if result.is_ok() {
            self.readers.insert(id, Reader { events, canceller, pace });
        }
        // A caller that no longer waits has dropped its stream, whose cancel follows in the queue.
        let _ = reply.send(result);
    }

    /// Offers unsent output to its readers. What does not fit stays with the sequence and
    /// coalesces.
    fn deliver(&mut self) {
        let mut news = std::mem::take(&mut self.news);
        news.clear();
        self.engine.ids_with_news(&mut news);
        for &id in &news {
            self.deliver_to(id);
        }
        self.news = news;
    }

    /// Keeps the reader while its request goes on or output is left. A request that has ended gives
    /// its place back even when nobody reads: what is unread is bounded.
    fn deliver_to(&mut self, id: SequenceId) {
        let Some(mut reader) = self.readers.remove(&id) else {
            self.engine.forget(id, CancelReason::ClientGone);
            return;
        };
        if self.engine.is_finished(id) {
            reader.canceller.release();
        }
        loop {
            match reader.events.try_reserve() {
                Ok(permit) => {
                    let Some(event) = self.engine.take_event(id) else { break };
                    let is_last = matches!(event, Event::Finished(_));
                    self.recorder.hands_over(&mut reader.pace, &event);
                    permit.send(event);
                    if is_last {
                        return;
                    }
                }
                Err(TrySendError::Full(())) => {
                    // Only of one that has ended by itself: the others' ends come as commands.
                    if let Some(reason) = reader.canceller.cancelled() {
                        self.engine.forget(id, reason);
                        return;
                    }
                    break;
                }
                Err(TrySendError::Closed(())) => {
                    self.engine.forget(id, CancelReason::ClientGone);
                    return;
                }
            }
        }
        self.readers.insert(id, reader);
    }
}
