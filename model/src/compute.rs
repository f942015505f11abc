//! Owns what computes a step: an implementation of the kernels, the threads, and the rows that
//! products read with their quantised form. Knows no matrices and no layers.

use std::ops::Range;

use crate::kernels::Isa;
use crate::kernels::QUANT_BLOCK_LEN;
use crate::kernels::products::{QuantBlock, QuantRows, quantise};
use crate::kernels::team::Team;

/// Multiply-adds below which a product runs on the caller alone, until it was measured. A worker
/// that has parked takes tens of microseconds to wake, and steps of small models are that short.
const TEAM_MACS_MIN: usize = 1 << 21;

/// Numbers of a pass over rows (norms, quantisation) below which the caller works alone: some tens
/// of microseconds.
const TEAM_NUMBERS_MIN: usize = 1 << 16;

/// An implementation of the kernels and a team.
#[derive(Debug)]
pub struct Compute {
    isa: Isa,
    team: Team,
    /// A team without workers, for what is not worth sharing.
    alone: Team,
    /// Multiply-adds from which a product is shared.
    team_macs_min: usize,
}

impl Compute {
    /// A team of `threads` threads.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(isa: Isa, threads: usize) -> std::io::Result<Self> {
        let (team, alone) = (Team::new(threads)?, Team::new(1)?);
        Ok(Self { isa, team, alone, team_macs_min: TEAM_MACS_MIN })
    }

    /// Implementation of the kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the caller included.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.team.num_threads()
    }

    /// The threads, for work that shares itself.
    pub fn team(&mut self) -> &mut Team {
        &mut self.team
    }

    /// Shares products from `macs` multiply-adds on with the team. It cannot change a
    /// bit.
    pub fn share_products_from(&mut self, macs: usize) {
        self.team_macs_min = macs;
    }

    /// Who makes products of so many multiply-adds.
    pub fn team_for(&mut self, macs: usize) -> &mut Team {
        if macs < self.team_macs_min { &mut self.alone } else { &mut self.team }
    }

    /// Calls `work` once with every row of `out`, `[rows, row_len]`, and its number.
    pub fn rows<T: Send>(
        &mut self,
        out: &mut [T],
        row_len: usize,
        numbers_per_row: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let num_rows = out.len() / row_len.max(1);
        let is_shared = num_rows.saturating_mul(numbers_per_row) >= TEAM_NUMBERS_MIN;
        let team = if is_shared { &mut self.team } else { &mut self.alone };
        team.run_chunks(out, row_len, work);
    }
}

/// Rows that products read, with their quantised form once a quantised matrix has asked for it.
/// Reused from step to step.
#[derive(Debug, Default)]
pub struct InputRows {
    in_len: usize,
    /// `[rows, in]`.
    values: Vec<f32>,
    /// `[rows, in / 32]`.
    blocks: Vec<QuantBlock>,
    is_quantised: bool,
}

impl InputRows {
    /// No rows.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for rows of `in_len` numbers and returns it, `[rows, in]`, to be overwritten:
    /// what is there before is arbitrary.
    pub fn write(&mut self, num_rows: usize, in_len: usize) -> &mut [f32] {
        self.in_len = in_len;
        self.is_quantised = false;
        self.values.resize(num_rows * in_len, 0.0);
        &mut self.values
    }

    /// Numbers per row.
    #[must_use]
    pub fn in_len(&self) -> usize {
        self.in_len
    }

    /// Rows held.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.values.len().checked_div(self.in_len).unwrap_or(0)
    }

    /// Some rows, `[rows, in]`.
    #[must_use]
    pub fn values(&self, rows: Range<usize>) -> &[f32] {
        &self.values[rows.start * self.in_len..rows.end * self.in_len]
    }

    /// Quantises all rows, unless they are.
    pub fn quantise(&mut self, compute: &mut Compute) {
        if self.is_quantised {
            return;
        }
        let (in_len, values) = (self.in_len, &self.values);
        self.blocks.resize(values.len() / QUANT_BLOCK_LEN, QuantBlock::default());
        let isa = compute.isa();
        compute.rows(&mut self.blocks, in_len / QUANT_BLOCK_LEN, in_len, |row, blocks| {
            quantise(isa, &values[row * in_len..(row + 1) * in_len], blocks);
        });
        self.is_quantised = true;
    }

    /// Some rows quantised.
    ///
    /// # Panics
    /// When they were not.
    #[must_use]
    pub fn quants(&self, rows: Range<usize>) -> QuantRows<'_> {
        assert!(self.is_quantised, "rows are quantised before they are multiplied");
        let num_blocks = self.in_len / QUANT_BLOCK_LEN;
        QuantRows { blocks: &self.blocks[rows.start * num_blocks..rows.end * num_blocks] }
    }
}
