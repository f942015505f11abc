//! Owns the threads that share the work of one network. Knows tiles by number and nothing of what
//! they compute: which thread takes which tile cannot change a result, because tiles write apart.
//!
//! The caller works too. Workers take tiles from a shared counter, spin for a moment when there are
//! none, then park. One atomic word says everything: a job's number, whether it is still open, how
//! many workers are inside. A worker that wakes too late finds it closed and is not waited for.
#![allow(unsafe_code)] // a borrowed closure crosses threads, and a slice is split by chunk number

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::tile::{Grid, Place, SharedMatrix, Tile};

/// Most threads of a team, the caller included.
pub const THREADS_MAX: usize = 256;

/// How long an idle worker spins before it parks: longer than the gaps between two products of a
/// network, shorter than anyone would notice on a busy machine.
const SPIN_TIME: Duration = Duration::from_micros(50);

/// Looks at the shared word between two looks at the time.
const SPINS_PER_LOOK: usize = 64;

/// Spins of the caller on workers that finish their last tile before it yields its core to them.
const SPINS_BEFORE_YIELD: usize = 10_000;

/// In the shared word: a worker is inside for each of these.
const ONE_ACTIVE: u64 = 1;
const ACTIVE_MASK: u64 = 0xFFFF;
/// The job may still be joined.
const OPEN: u64 = 1 << 16;
/// The team is going away.
const CLOSED_FOR_GOOD: u64 = 1 << 17;
/// The number of the job starts here; it does not wrap within centuries.
const JOB_NUMBER: u64 = 1 << 18;

/// A borrowed closure without its lifetime, and how many tiles it has.
#[derive(Clone, Copy)]
struct Job {
    tile: *const (dyn Fn(usize) + Sync),
    num_tiles: usize,
}

/// Keeps what different threads write on different cache lines.
#[repr(align(128))]
struct OwnLine<T>(T);

struct Shared {
    word: OwnLine<AtomicU64>,
    next_tile: OwnLine<AtomicUsize>,
    /// Written by the caller while no worker is inside; read by workers that are inside.
    job: UnsafeCell<Option<Job>>,
    /// The first panic of a worker in this job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// One per worker: it parks, or is about to.
    parked: Box<[AtomicBool]>,
}

// SAFETY: `job` is the only part that is not already safe to share. Only `Team::run` writes it,
// holding the team by `&mut` while the word says "not open, nobody inside"; workers read it only
// between joining an open job and leaving it, and the acquiring join sees what was written before
// the word was opened.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside `job` is to a `Sync` closure and is used as described above.
unsafe impl Send for Shared {}

/// A caller and its workers.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Team {
    /// A team of `threads` threads, the caller included; at least 1, at most [`THREADS_MAX`].
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let num_workers = threads.clamp(1, THREADS_MAX) - 1;
        let shared = Arc::new(Shared {
            word: OwnLine(AtomicU64::new(0)),
            next_tile: OwnLine(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            parked: (0..num_workers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut team = Self { shared, workers: Vec::with_capacity(num_workers) };
        for worker in 0..num_workers {
            let shared = Arc::clone(&team.shared);
            let builder = thread::Builder::new().name(format!("kernels-{}", worker + 1));
            team.workers.push(builder.spawn(move || shared.serve(worker))?);
        }
        Ok(team)
    }

    /// Threads of the team, the caller included.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `tile` once with every number below `num_tiles`, on any thread, and returns when all
    /// calls have returned.
    ///
    /// # Panics
    /// When a call panics; the other threads have left by then.
    pub fn run(&mut self, num_tiles: usize, tile: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || num_tiles <= 1 {
            (0..num_tiles).for_each(tile);
            return;
        }
        // SAFETY: only the lifetime is dropped. Workers use the pointer only while they are inside
        // this job, and `Leaving` does not let this function end, by panic either, before it is
        // closed and the last one has left.
        let tile = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(tile)
        };
        let job = Job { tile, num_tiles };
        // SAFETY: `&mut self` and the word (closed, nobody inside) keep everyone else away.
        unsafe { *self.shared.job.get() = Some(job) };
        self.shared.next_tile.0.store(0, Ordering::Relaxed);
        // When caller and worker had both panicked, the worker's panic is still here.
        *self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let number = self.shared.word.0.load(Ordering::Relaxed) / JOB_NUMBER + 1;
        // Sequentially consistent with the flags: either a worker that is about to park sees the
        // job, or we see its flag.
        self.shared.word.0.store((number * JOB_NUMBER) | OPEN, Ordering::SeqCst);
        self.wake();
        let leaving = Leaving { shared: &self.shared, num_tiles };
        self.shared.work(job);
        drop(leaving);
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Splits `data` into chunks of `chunk_len` (the last may be shorter) and calls `work` once
    /// with every chunk and its number, on any thread.
    ///
    /// # Panics
    /// When `chunk_len` is zero or a call panics.
    pub fn run_chunks<T: Send>(
        &mut self,
        data: &mut [T],
        chunk_len: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "a chunk holds something");
        let len = data.len();
        let base = BasePointer(data.as_mut_ptr());
        self.run(len.div_ceil(chunk_len), &|chunk| {
            let start = chunk * chunk_len;
            let chunk_len = chunk_len.min(len - start);
            // SAFETY: `run` passes each number below the number of chunks once, so the parts lie
            // within `data`, which is borrowed mutably until `run` returns, and do not overlap.
            let part = unsafe { std::slice::from_raw_parts_mut(base.get().add(start), chunk_len) };
            work(chunk, part);
        });
    }

    /// Calls `work` once with every tile of every part, on any thread: which part, where the tile
    /// lies in it, and the tile for writing.
    ///
    /// # Panics
    /// When a matrix has another shape than its grid, or a call panics.
    pub fn run_tiles<const PARTS: usize>(
        &mut self,
        parts: [(&mut [f32], Grid); PARTS],
        work: impl Fn(usize, Place, Tile<'_>) + Sync,
    ) {
        let parts = parts.map(|(data, grid)| SharedMatrix::new(data, grid));
        let num_tiles = parts.iter().map(SharedMatrix::num_tiles).sum();
        self.run(num_tiles, &|number| {
            let mut tile = number;
            for (index, part) in parts.iter().enumerate() {
                if tile < part.num_tiles() {
                    // SAFETY: `run` passes each number below the sum once, so each tile of each
                    // part is asked for once.
                    let (place, tile) = unsafe { part.tile(tile) };
                    return work(index, place, tile);
                }
                tile -= part.num_tiles();
            }
        });
    }

    fn wake(&self) {
        for (parked, worker) in self.shared.parked.iter().zip(&self.workers) {
            if parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.word.0.store(CLOSED_FOR_GOOD, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches what tiles throw; there is nothing to learn from its end.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("num_threads", &self.num_threads()).finish()
    }
}

/// Closes the job and waits until nobody is inside, whichever way the caller leaves it.
struct Leaving<'a> {
    shared: &'a Shared,
    num_tiles: usize,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // Nothing changes when all tiles are taken; after a panic nobody starts another.
        self.shared.next_tile.0.store(self.num_tiles, Ordering::Relaxed);
        self.shared.word.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut num_spins = 0;
        while self.shared.word.0.load(Ordering::Acquire) & ACTIVE_MASK != 0 {
            num_spins += 1;
            if num_spins < SPINS_BEFORE_YIELD {
                std::hint::spin_loop()
            } else {
                thread::yield_now()
            }
        }
    }
}

/// The start of a slice that is handed out in parts.
struct BasePointer<T>(*mut T);

impl<T> BasePointer<T> {
    /// Through a method, so that closures capture the whole and with it the promise below.
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: threads only derive pointers to parts of their own from it, and `T: Send` items may be
// used from other threads.
unsafe impl<T: Send> Sync for BasePointer<T> {}

impl Shared {
    /// Takes tiles until there are none.
    fn work(&self, job: Job) {
        loop {
            let tile = self.next_tile.0.fetch_add(1, Ordering::Relaxed);
            if tile >= job.num_tiles {
                return;
            }
            // SAFETY: the closure lives until the job is closed and everyone has left it; whoever
            // is here is inside.
            unsafe { (*job.tile)(tile) };
        }
    }

    /// A worker's life.
    fn serve(&self, worker: usize) {
        let mut last_job = 0;
        loop {
            let word = self.await_job(worker, last_job);
            if word & CLOSED_FOR_GOOD != 0 {
                return;
            }
            let join = self.word.0.compare_exchange(
                word,
                word + ONE_ACTIVE,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            if join.is_err() {
                continue;
            }
            last_job = word / JOB_NUMBER;
            // SAFETY: joined while open; nobody writes `job` before this worker has left.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job {
                self.work_caught(job);
            }
            self.word.0.fetch_sub(ONE_ACTIVE, Ordering::Release);
        }
    }

    fn work_caught(&self, job: Job) {
        // Nobody looks at what a panicking tile left behind: `Team::run` passes the panic on.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(job))) {
            self.next_tile.0.store(job.num_tiles, Ordering::Relaxed);
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
    }

    /// Waits for an open job other than `last_job`, or for the end. Returns the word that says so.
    fn await_job(&self, worker: usize, last_job: u64) -> u64 {
        let news = |word: u64| {
            let is_open = word & OPEN != 0 && word / JOB_NUMBER != last_job;
            is_open || word & CLOSED_FOR_GOOD != 0
        };
        loop {
            let start = Instant::now();
            while start.elapsed() < SPIN_TIME {
                for _ in 0..SPINS_PER_LOOK {
                    let word = self.word.0.load(Ordering::Relaxed);
                    if news(word) {
                        return word;
                    }
                    std::hint::spin_loop();
                }
            }
            self.parked[worker].store(true, Ordering::SeqCst);
            if !news(self.word.0.load(Ordering::SeqCst)) {
                thread::park();
            }
            self.parked[worker].store(false, Ordering::SeqCst);
        }
    }
}
