//! Owns a peer that speaks HTTP/2 as badly as a test wants: frames with any bytes go out, frames
//! come in with their heads parsed. Knows the wire format of RFC 9113 and as much of RFC 7541 as
//! writing plain header fields takes; knows no server and no engine.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long a peer waits for a server that has something to say.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// What a client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest payload that a server which allows no more has to take.
pub const FRAME_BYTES_MAX: usize = 16_384;
/// A call that is answered at once with one message.
pub const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
/// A call that is answered with one message and then stays open.
pub const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
/// A call that waits for its one message.
pub const COMPLETE: &str = "/slipstream.v1.Completions/Complete";

/// Frame types.
pub mod kind {
    /// Part of a body.
    pub const DATA: u8 = 0;
    /// Opens a stream, or ends its body.
    pub const HEADERS: u8 = 1;
    /// Advice that nobody heeds any more.
    pub const PRIORITY: u8 = 2;
    /// Ends a stream at once.
    pub const RST_STREAM: u8 = 3;
    /// Settings of the sender.
    pub const SETTINGS: u8 = 4;
    /// Only servers may promise.
    pub const PUSH_PROMISE: u8 = 5;
    /// Asks for a sign of life.
    pub const PING: u8 = 6;
    /// Ends a connection.
    pub const GOAWAY: u8 = 7;
    /// Allows the other side to send more.
    pub const WINDOW_UPDATE: u8 = 8;
    /// More of a header block.
    pub const CONTINUATION: u8 = 9;
    /// No type at all.
    pub const UNKNOWN: u8 = 0xfa;
}

/// Frame flags.
pub mod flag {
    /// Nothing.
    pub const NONE: u8 = 0;
    /// Of SETTINGS and PING: an answer.
    pub const ACK: u8 = 1;
    /// Of DATA and HEADERS: the sender is done.
    pub const END_STREAM: u8 = 1;
    /// Of HEADERS and CONTINUATION: the header block is complete.
    pub const END_HEADERS: u8 = 4;
    /// Of DATA and HEADERS: the payload begins with the length of its padding.
    pub const PADDED: u8 = 8;
    /// Of HEADERS: a dependency comes first.
    pub const PRIORITY: u8 = 0x20;
}

/// Error codes.
pub mod code {
    /// The peer broke a rule.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// The peer broke flow control.
    pub const FLOW_CONTROL_ERROR: u32 = 3;
    /// A frame for a stream that is over.
    pub const STREAM_CLOSED: u32 = 5;
    /// A frame whose length cannot be.
    pub const FRAME_SIZE_ERROR: u32 = 6;
    /// The stream was not looked at.
    pub const REFUSED_STREAM: u32 = 7;
    /// A header block that cannot be decoded.
    pub const COMPRESSION_ERROR: u32 = 9;
    /// The peer asks too much.
    pub const ENHANCE_YOUR_CALM: u32 = 11;
}

/// The nine bytes before a payload of `len` bytes, whether or not one follows.
///
/// # Panics
/// When the length does not fit its 24 bits.
#[must_use]
pub fn head(len: usize, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
    let len = u32::try_from(len).ok().filter(|len| *len < 1 << 24).expect("24 bits");
    let mut bytes = len.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes
}

/// A frame.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&head(payload.len(), kind, flags, stream), payload].concat()
}

/// A header block of these fields, each written out: nothing enters anybody's table.
#[must_use]
pub fn fields<S: AsRef<[u8]>>(list: &[(S, S)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in list {
        block.push(0);
        string(name.as_ref(), &mut block);
        string(value.as_ref(), &mut block);
    }
    block
}

/// A string without Huffman coding (RFC 7541, 5.1 and 5.2).
fn string(text: &[u8], into: &mut Vec<u8>) {
    const SHORT: usize = 127;
    if text.len() < SHORT {
        into.push(text.len() as u8);
    } else {
        into.push(SHORT as u8);
        let mut rest = text.len() - SHORT;
        while rest >= 128 {
            into.push((rest % 128) as u8 | 128);
            rest /= 128;
        }
        into.push(rest as u8);
    }
    into.extend(text);
}

/// The fields of a gRPC call.
#[must_use]
pub fn grpc_fields(path: &str) -> Vec<(&str, &str)> {
    vec![
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
}

/// A gRPC message: flag, length, bytes.
#[must_use]
pub fn message(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).expect("a message that a test makes up is short");
    [&[0], &len.to_be_bytes()[..], bytes].concat()
}

/// Opens a stream with this header block; the body may follow.
#[must_use]
pub fn open_block(stream: u32, block: &[u8]) -> Vec<u8> {
    frame(kind::HEADERS, flag::END_HEADERS, stream, block)
}

/// Opens a gRPC call; the body may follow.
#[must_use]
pub fn open(stream: u32, path: &str) -> Vec<u8> {
    open_block(stream, &fields(&grpc_fields(path)))
}

/// A whole gRPC call.
#[must_use]
pub fn call(stream: u32, path: &str, bytes: &[u8]) -> Vec<u8> {
    let body = frame(kind::DATA, flag::END_STREAM, stream, &message(bytes));
    [open(stream, path), body].concat()
}

/// One setting.
#[must_use]
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its stream.
    pub stream: u32,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The four bytes at `start` of its payload as a number.
    fn number(&self, start: usize) -> u32 {
        let bytes = self.payload.get(start..start + 4).expect("the server sends whole frames");
        u32::from_be_bytes(bytes.try_into().expect("four bytes"))
    }
}

/// What a server does about something it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// The connection ended with this code.
    GoAway(u32),
    /// The connection ended without a word.
    Closed,
    /// One stream ended with this code.
    Reset(u32),
    /// A stream was answered with this HTTP status and no body. gRPC errors look like that.
    Status(u16),
    /// A stream was answered with a body.
    Answered,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Peer {
    socket: TcpStream,
    received: Vec<u8>,
    /// Streams on which a body was begun.
    with_body: BTreeSet<u32>,
}

impl Peer {
    /// Connects and says nothing.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, received: Vec::new(), with_body: BTreeSet::new() })
    }

    /// Connects and exchanges settings.
    ///
    /// # Errors
    /// Those of the socket, and `UnexpectedEof` when the server hangs up.
    pub fn greeted(address: SocketAddr) -> io::Result<Self> {
        let mut peer = Self::connect(address)?;
        peer.send(&[PREFACE, &frame(kind::SETTINGS, flag::NONE, 0, &[])].concat())?;
        while let Some(frame) = peer.next_frame()? {
            if frame.kind == kind::SETTINGS && frame.flags & flag::ACK != 0 {
                return Ok(peer);
            }
        }
        Err(ErrorKind::UnexpectedEof.into())
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn finish(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    /// The next frame, `None` at the end of the connection. Settings and pings of the server are
    /// answered on the way.
    ///
    /// # Errors
    /// `TimedOut` for a server that says nothing, and other errors of the socket.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(frame) = self.take_frame() {
                let answers = [kind::SETTINGS, kind::PING].contains(&frame.kind);
                if answers && frame.flags & flag::ACK == 0 {
                    let echo: &[u8] = if frame.kind == kind::PING { &frame.payload } else { &[] };
                    // A connection that is being closed takes nothing any more.
                    let _ = self.send(&self::frame(frame.kind, flag::ACK, 0, echo));
                }
                return Ok(Some(frame));
            }
            if self.receive()? == 0 {
                return Ok(None);
            }
            if Instant::now() > deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }

    /// Takes what has come; how much, 0 at the end of the connection.
    fn receive(&mut self) -> io::Result<usize> {
        let mut chunk = [0; FRAME_BYTES_MAX];
        match self.socket.read(&mut chunk) {
            Ok(len) => {
                self.received.extend(&chunk[..len]);
                Ok(len)
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
    }

    fn take_frame(&mut self) -> Option<Frame> {
        let (head, rest) = self.received.split_at_checked(9)?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = rest.get(..len)?.to_vec();
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        let frame = Frame { kind: head[3], flags: head[4], stream, payload };
        self.received.drain(..9 + len);
        Some(frame)
    }

    /// What the server does next that matters: the first end of a stream, or that of the
    /// connection. Beginnings of answers are not ends.
    ///
    /// # Errors
    /// `TimedOut` for a server that does nothing, and other errors of the socket.
    pub fn reaction(&mut self) -> io::Result<Reaction> {
        while let Some(frame) = self.next_frame()? {
            let is_end = frame.flags & flag::END_STREAM != 0;
            match frame.kind {
                // With the code 0 it announces an end and is none.
                kind::GOAWAY if frame.number(4) != 0 => {
                    let code = frame.number(4);
                    self.until_closed()?;
                    return Ok(Reaction::GoAway(code));
                }
                kind::RST_STREAM => return Ok(Reaction::Reset(frame.number(0))),
                kind::DATA if is_end => return Ok(Reaction::Answered),
                kind::DATA => drop(self.with_body.insert(frame.stream)),
                kind::HEADERS if is_end && self.with_body.contains(&frame.stream) => {
                    return Ok(Reaction::Answered);
                }
                kind::HEADERS if is_end => return Ok(Reaction::Status(status(&frame.payload))),
                _ => {}
            }
        }
        Ok(Reaction::Closed)
    }

    /// Reads to the end of the connection, whatever comes before it.
    ///
    /// # Errors
    /// `TimedOut` when it does not come.
    pub fn until_eof(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.receive()? != 0 {
            self.received.clear();
            if Instant::now() > deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Reads frames to the end of the connection.
    ///
    /// # Errors
    /// `TimedOut` when it does not come.
    pub fn until_closed(&mut self) -> io::Result<()> {
        while self.next_frame()?.is_some() {}
        Ok(())
    }
}

/// The status at the beginning of a header block. Servers write it first (RFC 9113, 8.3), with the
/// static table's name, and its value from that table, in digits or in Huffman's.
fn status(block: &[u8]) -> u16 {
    const INDEXED: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    match block {
        [byte @ 0x88..=0x8e, ..] => INDEXED[usize::from(byte - 0x88)],
        // A literal whose name is entry 8, in any of its three forms.
        [0x48 | 0x08 | 0x18, len, rest @ ..] => {
            let value = rest.get(..usize::from(len & 0x7f)).expect("the server sends whole blocks");
            let digits = if len & 0x80 == 0 {
                value.iter().map(|digit| u16::from(digit - b'0')).collect()
            } else {
                huffman_digits(value)
            };
            digits.iter().fold(0, |number, digit| number * 10 + digit)
        }
        _ => panic!("no status at the beginning of {block:02x?}"),
    }
}

/// Digits in the code of RFC 7541, appendix B: 0 to 2 are the five-bit codes 0 to 2, 3 to 9 the
/// six-bit codes 25 to 31.
fn huffman_digits(bytes: &[u8]) -> Vec<u16> {
    let bits: Vec<u16> = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| u16::from(byte >> bit & 1)))
        .collect();
    let number = |bits: &[u16]| bits.iter().fold(0, |number, bit| number * 2 + bit);
    let mut digits = Vec::new();
    let mut rest = &bits[..];
    // Fewer than five bits, or ones only, are padding.
    while rest.len() >= 5 && rest.contains(&0) {
        let len = if number(&rest[..5]) < 3 { 5 } else { 6 };
        let Some((code, behind)) = rest.split_at_checked(len) else { break };
        digits.push(if len == 5 { number(code) } else { number(code) - 22 });
        rest = behind;
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::{fields, frame, head, message, status};

    #[test]
    fn bytes_are_laid_out_as_the_standards_say() {
        assert_eq!(head(0x01_02_03, 4, 5, 6), [1, 2, 3, 4, 5, 0, 0, 0, 6]);
        assert_eq!(frame(0, 1, 3, b"ab"), [0, 0, 2, 0, 1, 0, 0, 0, 3, b'a', b'b']);
        assert_eq!(message(b"x"), [0, 0, 0, 0, 1, b'x']);
        assert_eq!(fields(&[("a", "bc")]), [0, 1, b'a', 2, b'b', b'c']);
        let long = "v".repeat(127 + 300);
        assert_eq!(fields(&[("a", &long)])[3..6], [127, 0x80 | 44, 2]);
    }

    #[test]
    fn a_status_is_read_in_every_form() {
        assert_eq!(status(&[0x88]), 200);
        assert_eq!(status(&[0x8d]), 404);
        assert_eq!(status(b"\x48\x03415"), 415);
        assert_eq!(status(&[0x48, 0x83, 0x69, 0x90, 0xff]), 431);
        // RFC 7541, C.6.1 and C.6.2.
        assert_eq!(status(&[0x48, 0x82, 0x64, 0x02]), 302);
        assert_eq!(status(&[0x48, 0x83, 0x64, 0x0e, 0xff]), 307);
    }
}
