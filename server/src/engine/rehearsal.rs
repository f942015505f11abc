//! Owns measuring, before the first request, what steps of a few shapes take on this machine, so
//! that the first prompt is cut into chunks that fit.

use slipstream_model::block_manager::BlockTable;
use slipstream_model::clock::Micros;
use slipstream_model::forward::ForwardError;
use slipstream_model::ids::{BLOCK_LEN, TokenId};

use super::Engine;
use super::step_costs::StepShape;

/// Rows of the shapes, each from position 0 and from the middle of the context on.
const ROWS: [usize; 5] = [1, 8, 16, 32, 64];
/// Where the middle is at most.
const START_MAX: usize = 1024;
/// No further shape is tried after this time.
const TIME_MAX: Micros = Micros(2_000_000);

impl Engine {
    /// Learns what steps take. To be called before the first request; does nothing later. Takes a
    /// few forward passes, seconds for the largest models.
    ///
    /// # Errors
    /// When the verifier cannot compute a row.
    pub fn rehearse(&mut self) -> Result<(), ForwardError> {
        if self.counters.submitted > 0 {
            return Ok(());
        }
        let limits = self.verifier.limits();
        let begin = self.clock.now();
        let room_len = limits.context_len.min(self.blocks.num_available() * BLOCK_LEN);
        for rows in ROWS {
            for start in [0, START_MAX.min(room_len / 2)] {
                let is_late = self.clock.now().since(begin) > TIME_MAX;
                if is_late || start + rows > room_len {
                    continue;
                }
                self.rehearse_shape(start, rows)?;
            }
        }
        self.costs.refresh();
        Ok(())
    }

    /// Twice: the first time pays for memory that is touched for the first time.
    fn rehearse_shape(&mut self, start: usize, rows: usize) -> Result<(), ForwardError> {
        let mut table = BlockTable::new();
        let grown = self.blocks.grow(&mut table, start + rows);
        grown.expect("the caller counted the blocks");
        let tokens = vec![TokenId(0); rows];
        let mut taken = Ok(Micros(0));
        for _ in 0..2 {
            let begin = self.clock.now();
            let done = self.verifier.rehearse(&tokens, start, table.blocks());
            taken = done.map(|()| self.clock.now().since(begin));
        }
        self.blocks.release(&mut table);
        self.costs.observe(StepShape::default().with(start, rows), taken?);
        Ok(())
    }
}
