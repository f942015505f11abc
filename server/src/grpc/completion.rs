//! Owns a completion that the engine works on, seen from the wire: its samples, asked in turn, as
//! one stream of events or one response, and how the end of one of them ends the others. A client
//! that goes away drops it, and with it the engine's requests. Decides no codes and translates no
//! messages itself.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use slipstream_model::token_bytes::TokenBytes;
use slipstream_proto::v1;
use slipstream_proto::v1::generate_event;
use tokio_stream::Stream;
use tonic::Status;

use crate::engine::event::{CancelReason, Event};
use crate::grpc::events;
use crate::grpc::live_calls::Entry;
use crate::grpc::status::CallError;
use crate::handle::RequestStream;

/// What a completion is known by and what its events need.
pub(crate) struct About {
    /// Its place among the live calls.
    pub(crate) entry: Entry,
    /// Names it in logs.
    pub(crate) request_id: String,
    /// The stop strings as text, in the request's order.
    pub(crate) stop_strings: Vec<String>,
    /// For clients that want the bytes of every token.
    pub(crate) token_bytes: Option<Arc<TokenBytes>>,
    /// What its client may take nothing for.
    pub(crate) stall_limit: Duration,
}

/// A request that the engine works on. Dropping it cancels the request.
pub(crate) struct Completion {
    samples: Vec<Sample>,
    /// The sample that is asked first: the one behind that which last had news.
    next: usize,
    /// How the call ends once all samples have, because one of them failed.
    failed: Option<CallError>,
    about: About,
    /// Where its log lines belong.
    span: tracing::Span,
}

/// One sample of it.
struct Sample {
    stream: RequestStream,
    is_over: bool,
}

impl Completion {
    /// The completion whose samples have these streams, at least one.
    pub(crate) fn new(streams: Vec<RequestStream>, about: About) -> Self {
        let samples = streams.into_iter().map(|stream| Sample { stream, is_over: false }).collect();
        let span = tracing::Span::current();
        Self { samples, next: 0, failed: None, about, span }
    }

    /// The next news of any sample. The last is an error, or the `Finished` behind which all
    /// samples [are over](Self::is_over).
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<generate_event::Event, CallError>> {
        let num_samples = self.samples.len();
        let mut is_pending = false;
        for index in (self.next..num_samples).chain(0..self.next) {
            let sample = &mut self.samples[index];
            if sample.is_over {
                continue;
            }
            match sample.stream.poll_next(cx) {
                Poll::Pending => is_pending = true,
                Poll::Ready(Some(Event::Tokens(event))) => {
                    self.next = (index + 1) % num_samples;
                    let tokens = events::tokens(event, index, self.about.token_bytes.as_deref());
                    return Poll::Ready(Ok(generate_event::Event::Tokens(tokens)));
                }
                Poll::Ready(end) => {
                    sample.is_over = true;
                    self.about.entry.sample_is_over(index);
                    match self.end_of(index, end) {
                        Ok(end) => return Poll::Ready(Ok(generate_event::Event::Finished(end))),
                        Err(error) => self.fail(error),
                    }
                }
            }
        }
        if is_pending {
            return Poll::Pending;
        }
        let asked_behind = CallError::Internal("a completion was asked behind its end");
        Poll::Ready(Err(self.failed.take().unwrap_or(asked_behind)))
    }

    /// Whether every sample came to a good end, and the last of them was told.
    fn is_over(&self) -> bool {
        self.failed.is_none() && self.samples.iter().all(|sample| sample.is_over)
    }

    /// What the end of a sample's events means.
    fn end_of(&self, index: usize, end: Option<Event>) -> Result<v1::Finished, CallError> {
        let _entered = self.span.enter();
        let request_id = self.about.request_id.as_str();
        let Some(Event::Finished(event)) = end else {
            let reason = self.samples[index].stream.cancelled();
            tracing::debug!(request_id, sample = index, ?reason, "request cut short");
            return Err(match reason {
                Some(reason) => events::cancelled(reason, self.about.stall_limit),
                None => CallError::EngineGone,
            });
        };
        tracing::debug!(
            request_id,
            sample = index,
            reason = ?event.reason,
            output_tokens = event.usage.output_tokens,
            total_ms = event.timings.total.as_millis_f64(),
            "request ended"
        );
        events::finished(event, index, &self.about.stop_strings, self.about.stall_limit)
    }

    /// The call will end with the first error, behind what is certain of the other samples. A fault
    /// is one sample's own, so the others are told to end; what else ends a sample early ends all
    /// of them by itself, and their last tokens are on the way.
    fn fail(&mut self, error: CallError) {
        if matches!(error, CallError::Fault(_)) {
            self.about.entry.cancel(CancelReason::ClientGone);
        }
        self.failed.get_or_insert(error);
    }

    /// All of it in one response.
    pub(crate) async fn collect(
        mut self,
        started: v1::Started,
    ) -> Result<v1::CompleteResponse, CallError> {
        let mut samples = vec![v1::Sample::default(); self.samples.len()];
        while !self.is_over() {
            match poll_fn(|cx| self.poll_next(cx)).await? {
                generate_event::Event::Started(_) => {}
                generate_event::Event::Tokens(tokens) => {
                    let sample = &mut samples[tokens.sample as usize];
                    sample.text.push_str(&tokens.text);
                    sample.tokens.extend(tokens.tokens);
                }
                generate_event::Event::Finished(finished) => {
                    let sample = &mut samples[finished.sample as usize];
                    sample.finished = Some(finished);
                }
            }
        }
        let mut samples = samples.into_iter();
        let v1::Sample { text, tokens, finished } = samples.next().unwrap_or_default();
        let more_samples = samples.collect();
        Ok(v1::CompleteResponse { started: Some(started), text, tokens, finished, more_samples })
    }
}

/// The events of one call. Polled only when the event before has gone into the peer's window, so
/// that a slow reader holds back nothing but its own queues.
pub(crate) struct EventStream {
    started: Option<v1::Started>,
    completion: Option<Completion>,
}

impl EventStream {
    /// The stream of a completion that has just been taken.
    pub(crate) fn new(started: v1::Started, completion: Completion) -> Self {
        let unread = completion.samples.iter().map(|sample| sample.stream.unread());
        completion.about.entry.watch(unread);
        Self { started: Some(started), completion: Some(completion) }
    }
}

impl Stream for EventStream {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(completion) = this.completion.as_mut() else { return Poll::Ready(None) };
        completion.about.entry.asked();
        if let Some(started) = this.started.take() {
            completion.about.entry.answered(false);
            let event = Some(generate_event::Event::Started(started));
            return Poll::Ready(Some(Ok(v1::GenerateEvent { event })));
        }
        let news = completion.poll_next(cx);
        completion.about.entry.answered(news.is_pending());
        let news = ready!(news);
        let is_last = news.is_err() || completion.is_over();
        let item = match news {
            Ok(event) => Ok(v1::GenerateEvent { event: Some(event) }),
            Err(error) => Err(error.into_status(&completion.about.request_id)),
        };
        if is_last {
            this.completion = None;
        }
        Poll::Ready(Some(item))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use crossbeam::channel::{self, Receiver};
    use slipstream_model::choice::ChoiceFault;
    use tokio::sync::mpsc::Sender;

    use super::{About, CallError, CancelReason, Completion, Context, Event, Poll, generate_event};
    use crate::engine::event::{
        FinishReason, Finished, SequenceFault, SpeculationUsage, Timings, TokensEvent, Usage,
    };
    use crate::grpc::calls::Calls;
    use crate::grpc::live_calls::LiveCalls;
    use crate::handle::tests::request;
    use crate::handle::{Canceller, Command, EngineHandle};

    /// The engine's end of one sample.
    struct Working {
        events: Sender<Event>,
        canceller: Canceller,
    }

    impl Working {
        fn put(&self, text: &str) {
            let event = TokensEvent { text: text.to_owned(), ..TokensEvent::default() };
            self.events.try_send(Event::Tokens(event)).expect("there is room");
        }

        /// As the engine does it: the place is free before the end can be read.
        fn end(&self, reason: FinishReason) {
            self.canceller.release();
            let finished = Finished {
                reason,
                usage: Usage::default(),
                timings: Timings::default(),
                speculation: SpeculationUsage::default(),
            };
            self.events.try_send(Event::Finished(finished)).expect("there is room");
        }
    }

    /// A completion of so many samples that the engine has taken, and the engine's ends of it.
    async fn begin(num: usize) -> (Completion, Vec<Working>, Receiver<Command>) {
        let stall_limit = std::time::Duration::from_secs(60);
        let entry = LiveCalls::start(stall_limit).enter("id", Calls::new().begin());
        let (sender, commands) = channel::bounded(EngineHandle::queue_capacity(num));
        let handle = EngineHandle::new(sender, num);
        let cancellers = entry.cancellers(num);
        let (streams, working) =
            tokio::join!(handle.submit_samples(request(), &cancellers), async {
                let submissions = commands.try_iter().map(|command| match command {
                    Command::Submit(submission) => submission,
                    other => panic!("no request but {other:?}"),
                });
                let take = |submission: Box<crate::handle::Submission>| {
                    submission.reply.send(Ok(())).expect("it is waited for");
                    Working { events: submission.events, canceller: submission.canceller }
                };
                submissions.map(take).collect::<Vec<_>>()
            });
        let (request_id, stop_strings, token_bytes) = (String::new(), Vec::new(), None);
        let about = About { entry, request_id, stop_strings, token_bytes, stall_limit };
        (Completion::new(streams.expect("all were taken"), about), working, commands)
    }

    /// What there is to take now, up to the end: text or `.` by sample, and how it ended.
    fn drain(completion: &mut Completion) -> (Vec<(u32, String)>, Option<CallError>) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut taken = Vec::new();
        while !completion.is_over() {
            match completion.poll_next(&mut cx) {
                Poll::Pending => break,
                Poll::Ready(Ok(generate_event::Event::Started(_))) => panic!("it has started"),
                Poll::Ready(Ok(generate_event::Event::Tokens(event))) => {
                    taken.push((event.sample, event.text));
                }
                Poll::Ready(Ok(generate_event::Event::Finished(end))) => {
                    taken.push((end.sample, ".".to_owned()));
                }
                Poll::Ready(Err(error)) => return (taken, Some(error)),
            }
        }
        (taken, None)
    }

    fn pairs(expected: &[(u32, &str)]) -> Vec<(u32, String)> {
        expected.iter().map(|&(sample, text)| (sample, text.to_owned())).collect()
    }

    #[tokio::test]
    async fn samples_take_turns_and_each_has_its_end() {
        let (mut completion, working, commands) = begin(3).await;
        for text in ["a", "b", "c", "d"] {
            working[0].put(text);
        }
        working[1].put("e");
        for text in ["f", "g"] {
            working[2].put(text);
        }
        working[0].end(FinishReason::Length);
        let turns =
            [(0, "a"), (1, "e"), (2, "f"), (0, "b"), (2, "g"), (0, "c"), (0, "d"), (0, ".")];
        assert_eq!(drain(&mut completion), (pairs(&turns), None));
        working[2].end(FinishReason::Length);
        working[1].put("h");
        let (taken, error) = drain(&mut completion);
        assert_eq!((taken.len(), error, completion.is_over()), (2, None, false));
        working[1].end(FinishReason::Length);
        assert_eq!(drain(&mut completion), (pairs(&[(1, ".")]), None));
        assert!(completion.is_over());
        drop(completion);
        assert!(commands.try_recv().is_err(), "all ended by themselves");
    }

    #[tokio::test]
    async fn the_fault_of_one_ends_all_behind_what_was_certain() {
        let (mut completion, working, commands) = begin(3).await;
        let fault = SequenceFault::Choice(ChoiceFault::AllMasked);
        working[1].put("a");
        working[1].end(FinishReason::Fault(fault));
        working[2].end(FinishReason::Length);
        assert_eq!(drain(&mut completion), (pairs(&[(1, "a"), (2, ".")]), None));
        let cancelled: Vec<_> = commands.try_iter().collect();
        assert!(matches!(cancelled[..], [Command::Cancel(_, CancelReason::ClientGone, _)]));
        working[0].put("b");
        drop(working);
        let (taken, error) = drain(&mut completion);
        assert_eq!((taken, error), (pairs(&[(0, "b")]), Some(CallError::Fault(fault))));
    }

    #[tokio::test]
    async fn what_ends_all_at_once_waits_for_the_last_tokens_of_each() {
        let (mut completion, working, commands) = begin(2).await;
        working[0].put("a");
        working[0].end(FinishReason::DeadlineExceeded);
        assert_eq!(drain(&mut completion), (pairs(&[(0, "a")]), None), "the other's may come");
        working[1].put("b");
        working[1].end(FinishReason::DeadlineExceeded);
        let late = Some(CallError::DeadlineExceeded);
        assert_eq!(drain(&mut completion), (pairs(&[(1, "b")]), late));
        assert!(commands.try_recv().is_err(), "nobody had to be told");
    }

    #[tokio::test]
    async fn a_call_that_is_dropped_or_aborted_ends_all_its_samples() {
        for is_aborted in [true, false] {
            let (mut completion, working, commands) = begin(3).await;
            working[1].end(FinishReason::Length);
            let expected = match is_aborted {
                true => {
                    assert!(completion.about.entry.cancel(CancelReason::Aborted));
                    drop(working);
                    let (taken, error) = drain(&mut completion);
                    assert_eq!((taken, error), (pairs(&[(1, ".")]), Some(CallError::Aborted)));
                    CancelReason::Aborted
                }
                false => CancelReason::ClientGone,
            };
            drop(completion);
            let told = commands.try_iter().map(|command| match command {
                Command::Cancel(id, reason, _) => (id.0, reason),
                other => panic!("no cancel but {other:?}"),
            });
            assert_eq!(told.collect::<Vec<_>>(), [(0, expected), (2, expected)]);
        }
    }
}
