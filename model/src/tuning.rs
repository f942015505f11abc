//! Owns the choice of which products a team shares, by measurement when a network starts. Whether
//! sharing pays depends on the machine (how long a thread takes to wake, what the caches give one
//! core) and on the network's size. Nothing here can change an output bit.

use std::time::{Duration, Instant};

use crate::batch::{RaggedBatch, SegmentInput};
use crate::forward::{Forward, Logits};
use crate::ids::{BlockId, TokenId};
use crate::transformer::Transformer;

/// Multiply-adds from which products are shared: what is tried. The first shares everything.
const CANDIDATES: [usize; 6] = [0, 1 << 17, 1 << 19, 1 << 20, 1 << 21, usize::MAX];

/// A pass this long has products of milliseconds: all are shared, and nothing is measured.
const LONG_PASS: Duration = Duration::from_millis(3);

/// Passes measured per candidate and kind of pause; the median counts.
const ROUNDS: usize = 7;

/// What an engine or a draft may do between two passes: nothing, or so much that idle workers have
/// parked. The choice minimises the sum.
const PAUSES: [Duration; 2] = [Duration::ZERO, Duration::from_micros(80)];

/// What was chosen and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Multiply-adds from which a product is shared; `usize::MAX` for never.
    pub from_macs: usize,
    /// A pass of one row on one thread.
    pub alone: Duration,
    /// A pass of one row as chosen, workers awake.
    pub chosen: Duration,
}

impl Transformer {
    /// Measures passes of one row with products shared more and less, and keeps the best. `None`
    /// when there is nothing to choose: one thread, no block, or passes so long that all products
    /// are shared. Block 0 of the pool is written to: call it before anything is computed.
    pub fn choose_sharing(&mut self) -> Option<Sharing> {
        if self.num_threads() == 1 || self.limits().num_blocks == 0 {
            return None;
        }
        self.share_products_from(usize::MAX);
        let mut pass = Pass::new(self);
        pass.time(Duration::ZERO);
        let alone = pass.time(Duration::ZERO);
        if alone > LONG_PASS {
            self.share_products_from(0);
            return None;
        }
        let mut best: Option<(Duration, Sharing)> = None;
        for from_macs in CANDIDATES {
            pass.network.share_products_from(from_macs);
            let mut medians = [Duration::ZERO; PAUSES.len()];
            for (median, pause) in medians.iter_mut().zip(PAUSES) {
                *median = pass.median(pause);
            }
            let total = medians.iter().sum();
            let sharing = Sharing { from_macs, alone, chosen: medians[0] };
            if best.is_none_or(|(least, _)| total < least) {
                best = Some((total, sharing));
            }
        }
        let chosen = best.map(|(_, sharing)| sharing);
        self.share_products_from(chosen.map_or(0, |sharing| sharing.from_macs));
        chosen
    }
}

/// A pass of one row, to be repeated.
struct Pass<'a> {
    network: &'a mut Transformer,
    batch: RaggedBatch,
    logits: Logits,
}

impl<'a> Pass<'a> {
    fn new(network: &'a mut Transformer) -> Self {
        let mut batch = RaggedBatch::new();
        batch.push(SegmentInput {
            tokens: &[TokenId(0)],
            start: 0,
            block_table: &[BlockId(0)],
            logits_from: 0,
            owner: 0,
            scope: 0,
        });
        Self { network, batch, logits: Logits::new() }
    }

    /// One pass behind a pause.
    fn time(&mut self, pause: Duration) -> Duration {
        let pause_start = Instant::now();
        while pause_start.elapsed() < pause {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        let passed = self.network.forward(&self.batch, &mut self.logits);
        passed.expect("every network has a first token, position and block");
        start.elapsed()
    }

    fn median(&mut self, pause: Duration) -> Duration {
        self.time(pause);
        let mut times = [Duration::ZERO; ROUNDS];
        for time in &mut times {
            *time = self.time(pause);
        }
        times.sort_unstable();
        times[ROUNDS / 2]
    }
}
