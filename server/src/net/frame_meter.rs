//! Owns the bound on HTTP/2 control frames that one peer may send. h2 bounds CONTINUATION, small
//! and empty DATA, and resets of streams it has not accepted yet; it answers or ignores as many
//! PING, SETTINGS, PRIORITY, WINDOW_UPDATE, later RST_STREAM and unknown frames as come. Knows
//! frame headers only; allocates nothing.

/// What an HTTP/2 peer sends first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length, type, flags and stream of a frame.
const HEADER_LEN: usize = 9;

/// Control frames that a peer may send at once. Twice the streams of a connection and more: a proxy
/// that loses its own client cancels them all together.
const BURST: u64 = 4096;
/// Control frames that a peer may send on and on, per millisecond.
const PER_MS: u64 = 1;
/// Control frames that every DATA frame we send may cause: a PING that estimates the bandwidth and
/// WINDOW_UPDATEs of stream and connection.
const PER_DATA_FRAME: u64 = 3;

/// What an answer to a PING costs. We ask ten times a second at most, and h2 logs every answer that
/// nobody asked for.
const PING_ANSWER_COST: u64 = 20;

/// Frames of one turn. Calls take some 20 us each, so a turn is about a millisecond.
const FRAMES_PER_TURN: u64 = 64;
/// Requests of a connection whose work has not begun. Reading on would pile up work, and memory,
/// faster than it is done, whatever the bound on streams: they begin anew with every connection.
pub(super) const UNSTARTED_MAX: usize = 64;
/// Frames that are shorter on average are dense: one read could hold a thousand of them.
const DENSE_FRAME_BYTES: u64 = 128;
/// Bytes of one read behind dense frames.
pub(super) const DENSE_READ_BYTES: usize = 2048;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
/// The flag of an answer.
const ACK: u8 = 1;

/// Where in the bytes of a peer the parser stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// So many bytes of the preface have come.
    Preface(usize),
    /// So many bytes of a frame's header have come.
    Header(usize),
    /// So many bytes of a frame's payload are still to come.
    Payload(usize),
    /// The peer does not speak HTTP/2.
    NotHttp2,
}

/// Finds the frames in what a peer sends, however it is split.
#[derive(Debug)]
pub(super) struct FrameParser {
    place: Place,
    header: [u8; HEADER_LEN],
    num_frames: u64,
}

impl FrameParser {
    /// At the beginning of a connection.
    pub(super) fn new() -> Self {
        Self { place: Place::Preface(0), header: [0; HEADER_LEN], num_frames: 0 }
    }

    /// Frames so far, of all kinds.
    pub(super) fn num_frames(&self) -> u64 {
        self.num_frames
    }

    /// What the control frames cost whose header ends in these bytes: 1 each, with one exception.
    pub(super) fn cost(&mut self, mut bytes: &[u8]) -> u64 {
        let mut cost = 0;
        while !bytes.is_empty() {
            let taken = match self.place {
                Place::NotHttp2 => return cost,
                Place::Preface(begun) => self.preface(begun, bytes),
                Place::Payload(left) => {
                    let taken = left.min(bytes.len());
                    self.place = match left - taken {
                        0 => Place::Header(0),
                        left => Place::Payload(left),
                    };
                    taken
                }
                Place::Header(begun) => {
                    let taken = (HEADER_LEN - begun).min(bytes.len());
                    self.header[begun..begun + taken].copy_from_slice(&bytes[..taken]);
                    self.place = Place::Header(begun + taken);
                    if begun + taken == HEADER_LEN {
                        cost += self.begin_payload();
                    }
                    taken
                }
            };
            bytes = &bytes[taken..];
        }
        cost
    }

    fn preface(&mut self, begun: usize, bytes: &[u8]) -> usize {
        let taken = (PREFACE.len() - begun).min(bytes.len());
        let is_http2 = PREFACE[begun..begun + taken] == bytes[..taken];
        self.place = match begun + taken {
            _ if !is_http2 => Place::NotHttp2,
            begun if begun == PREFACE.len() => Place::Header(0),
            begun => Place::Preface(begun),
        };
        taken
    }

    /// Goes on behind a complete header; what the frame costs.
    fn begin_payload(&mut self) -> u64 {
        self.num_frames += 1;
        let [high, middle, low, kind, flags, ..] = self.header;
        let len = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.place = if len == 0 { Place::Header(0) } else { Place::Payload(len) };
        match kind {
            DATA | HEADERS | CONTINUATION => 0,
            PING if flags & ACK != 0 => PING_ANSWER_COST,
            _ => 1,
        }
    }
}

/// How much of what a peer sends is worked on before others have their turn. The work that a frame
/// causes does not depend on its length: bytes alone would let a peer with tiny frames, calls
/// without a message for example, keep a thread to itself for seconds.
#[derive(Debug, Default)]
pub(super) struct Turn {
    num_frames: u64,
    is_dense: bool,
}

impl Turn {
    /// Notes that so many bytes were read, with so many frames in them.
    pub(super) fn note(&mut self, num_bytes: usize, num_frames: u64) {
        self.num_frames += num_frames;
        self.is_dense = num_frames.saturating_mul(DENSE_FRAME_BYTES) > num_bytes as u64;
    }

    /// Whether the next read has to be a small one.
    pub(super) fn is_dense(&self) -> bool {
        self.is_dense
    }

    /// Whether it is over. The next one then begins.
    pub(super) fn is_over(&mut self) -> bool {
        let is_over = self.num_frames >= FRAMES_PER_TURN;
        if is_over {
            self.num_frames = 0;
        }
        is_over
    }

    /// There is nothing to read: others have their turn anyway.
    pub(super) fn end(&mut self) {
        self.num_frames = 0;
    }
}

/// What a peer may still send: a bucket that time and our own DATA frames fill.
#[derive(Debug)]
pub(super) struct ControlBudget {
    left: u64,
    filled_at_ms: u64,
    data_frames_seen: u64,
}

impl ControlBudget {
    /// A full bucket at time 0.
    pub(super) fn new() -> Self {
        Self { left: BURST, filled_at_ms: 0, data_frames_seen: 0 }
    }

    /// Takes `cost` out at `now_ms`, when `data_frames` have been sent so far. False when there is
    /// not so much left.
    pub(super) fn take(&mut self, cost: u64, now_ms: u64, data_frames: u64) -> bool {
        let passed_ms = now_ms.saturating_sub(self.filled_at_ms);
        let sent = data_frames.saturating_sub(self.data_frames_seen);
        self.filled_at_ms = self.filled_at_ms.max(now_ms);
        self.data_frames_seen = self.data_frames_seen.max(data_frames);
        let earned =
            passed_ms.saturating_mul(PER_MS).saturating_add(sent.saturating_mul(PER_DATA_FRAME));
        self.left = self.left.saturating_add(earned).min(BURST);
        match self.left.checked_sub(cost) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![(len >> 16) as u8, (len >> 8) as u8, len as u8, kind];
        bytes.extend([0, 0, 0, 0, 1]);
        bytes.extend(std::iter::repeat_n(b'x', len));
        bytes
    }

    /// A connection with four control frames: two SETTINGS, PING, an unknown one.
    fn four_control_frames() -> Vec<u8> {
        [
            PREFACE.to_vec(),
            frame(4, 6),
            frame(4, 0),
            frame(HEADERS, 70),
            frame(CONTINUATION, 7),
            frame(DATA, 300),
            frame(PING, 8),
            frame(99, 20),
            frame(DATA, 0),
        ]
        .concat()
    }

    #[test]
    fn frames_are_found_wherever_the_bytes_are_split() {
        let bytes = four_control_frames();
        for split in 0..bytes.len() {
            let mut parser = FrameParser::new();
            let (begin, rest) = bytes.split_at(split);
            let count = parser.cost(begin) + parser.cost(rest);
            assert_eq!(count, 4, "split at {split}");
        }
        for size in 1..20 {
            let mut parser = FrameParser::new();
            let count: u64 = bytes.chunks(size).map(|part| parser.cost(part)).sum();
            assert_eq!(count, 4, "parts of {size}");
        }
    }

    #[test]
    fn answers_to_pings_are_dear() {
        let mut parser = FrameParser::new();
        let mut answer = frame(PING, 8);
        answer[4] = ACK;
        let bytes = [PREFACE.to_vec(), answer, frame(PING, 8)].concat();
        assert_eq!(parser.cost(&bytes), PING_ANSWER_COST + 1);
    }

    #[test]
    fn other_protocols_are_not_looked_at() {
        let mut parser = FrameParser::new();
        assert_eq!(parser.cost(b"PRI"), 0);
        assert_eq!(parser.cost(b"NT / HTTP/1.1\r\n"), 0);
        assert_eq!(parser.cost(&four_control_frames()), 0);
        assert_eq!(parser.place, Place::NotHttp2);
    }

    #[test]
    fn a_turn_is_a_number_of_frames_and_ends_when_there_is_nothing_to_read() {
        let mut turn = Turn::default();
        turn.note(16_384, 1);
        assert!(!turn.is_dense() && !turn.is_over());
        turn.note(20 * 30, FRAMES_PER_TURN - 1);
        assert!(turn.is_dense());
        assert!(turn.is_over());
        assert!(!turn.is_over(), "another one has begun");
        turn.note(20 * 30, FRAMES_PER_TURN - 1);
        turn.end();
        turn.note(9, 1);
        assert!(!turn.is_over(), "what came before a pause does not count");
    }

    #[test]
    fn a_flood_empties_the_bucket_and_normal_traffic_does_not() {
        let mut flood = ControlBudget::new();
        assert!(flood.take(BURST, 0, 0));
        assert!(!flood.take(1, 0, 0));
        assert!(flood.take(5, 5, 0), "time fills it");
        assert!(!flood.take(1, 5, 0));
        assert!(flood.take(PER_DATA_FRAME, 5, 1), "what we send fills it");
        assert!(!flood.take(1, 5, 1));
        let mut busy = ControlBudget::new();
        for sent in 1..100_000 {
            assert!(busy.take(PER_DATA_FRAME, 0, sent), "after {sent} frames");
        }
        let mut long_quiet = ControlBudget::new();
        assert!(!long_quiet.take(BURST + 1, u64::MAX, 0), "more than a burst is never saved up");
    }
}
