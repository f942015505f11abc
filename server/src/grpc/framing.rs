//! Owns the checks on the frames around request messages, before anything is set aside for one:
//! a length over the limit, a message that is cut off, one too many. tonic would give these other
//! codes than the protocol file promises. Knows no messages.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use crate::grpc::status::CallError;

/// Bytes before each message: a flag, and its length.
const PREFIX_LEN: usize = 5;
/// The largest flag: 1 says that the message is compressed.
const FLAG_MAX: u8 = 1;

/// How long one message may take to come in full: the largest one on a slow line, and no peer that
/// holds memory for a message that never ends.
pub(crate) const MESSAGE_TIME_MAX: Duration = Duration::from_secs(60);

/// What a body may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameLimits {
    /// One message, in bytes.
    pub(crate) message_bytes_max: usize,
    /// Whether there may be more than one, at any time.
    pub(crate) takes_many: bool,
    /// When the client stops waiting, if it does before [`MESSAGE_TIME_MAX`] is over.
    pub(crate) deadline: Option<Duration>,
}

/// How far the frames of a body were read.
#[derive(Debug)]
struct Frames {
    limits: FrameLimits,
    prefix: [u8; PREFIX_LEN],
    /// Bytes of the prefix that are there.
    prefix_len: usize,
    /// Bytes of the message that are still to come.
    message_left: usize,
    num_messages: usize,
}

impl Frames {
    fn new(limits: FrameLimits) -> Self {
        let prefix = [0; PREFIX_LEN];
        Self { limits, prefix, prefix_len: 0, message_left: 0, num_messages: 0 }
    }

    /// Goes over the next bytes, however they are split.
    fn take(&mut self, mut data: &[u8]) -> Result<(), CallError> {
        while !data.is_empty() {
            let skipped = self.message_left.min(data.len());
            self.message_left -= skipped;
            data = &data[skipped..];
            let copied = (PREFIX_LEN - self.prefix_len).min(data.len());
            self.prefix[self.prefix_len..self.prefix_len + copied].copy_from_slice(&data[..copied]);
            self.prefix_len += copied;
            data = &data[copied..];
            if self.prefix_len == PREFIX_LEN {
                self.prefix_len = 0;
                self.begin_message()?;
            }
        }
        Ok(())
    }

    fn begin_message(&mut self) -> Result<(), CallError> {
        let [flag, length @ ..] = self.prefix;
        let len = u32::from_be_bytes(length) as usize;
        self.num_messages += 1;
        if flag > FLAG_MAX {
            return Err(CallError::Malformed(format!("its flag is {flag}, not 0 or 1")));
        }
        if self.num_messages > 1 && !self.limits.takes_many {
            return Err(CallError::Malformed("there is a second one, one is taken".to_owned()));
        }
        let limit = self.limits.message_bytes_max;
        if len > limit {
            return Err(CallError::MessageTooLarge { size: format!("{len} bytes"), limit });
        }
        self.message_left = len;
        Ok(())
    }

    /// The body is over.
    fn end(&self) -> Result<(), CallError> {
        if self.prefix_len > 0 {
            let problem = format!("it ends after {} of 5 bytes of its prefix", self.prefix_len);
            return Err(CallError::Malformed(problem));
        }
        if self.message_left > 0 {
            let problem = format!("it ends {} bytes before its end", self.message_left);
            return Err(CallError::Malformed(problem));
        }
        if self.num_messages == 0 && !self.limits.takes_many {
            return Err(CallError::Malformed("there is none, one is needed".to_owned()));
        }
        Ok(())
    }
}

/// A request body whose frames are checked as they pass. The error of one that is wrong is the
/// status of the call.
#[derive(Debug)]
pub(crate) struct FramedBody {
    inner: Body,
    frames: Frames,
    request_id: String,
    is_over: bool,
    begun: Instant,
    /// Made when the message does not come at once.
    late: Option<Pin<Box<Sleep>>>,
}

impl FramedBody {
    /// Checks `inner`, the body of the call that is known as `request_id`.
    pub(crate) fn new(inner: Body, limits: FrameLimits, request_id: String) -> Self {
        let (frames, begun) = (Frames::new(limits), Instant::now());
        Self { inner, frames, request_id, is_over: false, begun, late: None }
    }

    /// Waits for the rest of the message, but not for ever.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let limits = self.frames.limits;
        if limits.takes_many {
            return Poll::Pending;
        }
        let deadline = limits.deadline.filter(|deadline| *deadline < MESSAGE_TIME_MAX);
        let end = self.begun + deadline.unwrap_or(MESSAGE_TIME_MAX);
        let late = self.late.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        match late.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => self.fail(match deadline {
                Some(_) => CallError::DeadlineExceeded,
                None => CallError::MessageLate { limit: MESSAGE_TIME_MAX },
            }),
        }
    }

    fn fail(&mut self, error: CallError) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        self.is_over = true;
        Poll::Ready(Some(Err(Box::new(error.into_status(&self.request_id)))))
    }
}

impl http_body::Body for FramedBody {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match polled {
            Poll::Pending => self.wait(cx),
            Poll::Ready(Some(Ok(frame))) => {
                let checked = frame.data_ref().map_or(Ok(()), |data| self.frames.take(data));
                match checked {
                    Ok(()) => Poll::Ready(Some(Ok(frame))),
                    Err(error) => self.fail(error),
                }
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => match self.frames.end() {
                Ok(()) => Poll::Ready(None),
                Err(error) => self.fail(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{CallError, FrameLimits, Frames};

    fn message(len: u32) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(len.to_be_bytes());
        bytes.extend(vec![7; len as usize]);
        bytes
    }

    /// Reads `body` in pieces of every length.
    fn read(body: &[u8], takes_many: bool) -> Result<(), CallError> {
        let mut results = (1..=body.len().max(1)).map(|piece_len| {
            let mut frames =
                Frames::new(FrameLimits { message_bytes_max: 8, takes_many, deadline: None });
            body.chunks(piece_len).try_for_each(|piece| frames.take(piece))?;
            frames.end()
        });
        let first = results.next().expect("at least one piece length");
        assert!(results.all(|result| result == first), "{body:?} depends on its pieces");
        first
    }

    #[test]
    fn whole_messages_within_the_limit_pass() {
        for len in 0..=8 {
            assert_eq!(read(&message(len), false), Ok(()));
        }
        assert_eq!(read(&[message(8), message(0), message(3)].concat(), true), Ok(()));
        assert_eq!(read(&[], true), Ok(()));
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let too_large = CallError::MessageTooLarge { size: "9 bytes".to_owned(), limit: 8 };
        assert_eq!(read(&message(9), false), Err(too_large));
        let lie = CallError::MessageTooLarge { size: "4294967295 bytes".to_owned(), limit: 8 };
        assert_eq!(read(&[0, 255, 255, 255, 255], false), Err(lie));
        let malformed = [
            (vec![], "none"),
            (vec![2, 0, 0, 0, 0], "flag is 2"),
            (vec![0, 0, 0], "after 3 of 5"),
            (message(5)[..8].to_vec(), "2 bytes before"),
            ([message(1), message(1)].concat(), "second"),
        ];
        for (body, part) in malformed {
            let error = read(&body, false).expect_err(part);
            assert!(matches!(error, CallError::Malformed(_)) && error.to_string().contains(part));
        }
    }
}
