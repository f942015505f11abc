//! Owns what a step is expected to take: a fit to the steps that were measured. Knows rows,
//! positions and microseconds; the scheduler decides what follows from them. It decides only how
//! much a step computes, so it cannot change any output.
//!
//! The model is `base + per_row * rows + per_pair * pairs`, where pairs counts the positions that
//! all rows attend to. Measurements are averaged in cells of similar shape, and the fit goes
//! through the cells: a million plain steps do not make it forget what a chunk takes.

use slipstream_model::clock::Micros;

/// Shape of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StepShape {
    /// Rows.
    pub(super) rows: usize,
    /// Positions attended to, summed over rows.
    pub(super) pairs: usize,
}

impl StepShape {
    /// With `len` more rows of one sequence from position `start` on.
    pub(super) fn with(self, start: usize, len: usize) -> Self {
        // Row i attends to itself and everything before it.
        let pairs = len * start + len * (len + 1) / 2;
        Self { rows: self.rows + len, pairs: self.pairs + pairs }
    }

    fn features(self) -> [f64; 3] {
        [1.0, self.rows as f64, self.pairs as f64]
    }
}

/// Cells by the logarithm of rows, and of pairs per row.
const ROW_CELLS: usize = 17;
const PAIR_CELLS: usize = 21;
/// A cell follows the machine with this weight for a new measurement, faster while it is young.
const MEMORY: f64 = 16.0;
/// A measurement counts at most this many times what was expected: a pause of the whole machine
/// says nothing about the step.
const OUTLIER: f64 = 4.0;
/// Measurements of a cell before outliers in it are cut.
const YOUNG: u32 = 4;
/// Rows that are taken to need [`FIRST_GUESS_US`] before anything was measured.
const FIRST_GUESS_ROWS: usize = 32;
const FIRST_GUESS_US: f64 = 50_000.0;
/// Weight of that guess beside a measured cell, until there are enough of those.
const GUESS_WEIGHT: f64 = 1e-3;
const CELLS_ENOUGH: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    num: u32,
    rows: f64,
    pairs: f64,
    us: f64,
}

/// The cost curve of this machine and network, as learned so far.
#[derive(Debug)]
pub(super) struct StepCosts {
    cells: Vec<Cell>,
    /// Microseconds: of a step, of a row, of a pair.
    fit: [f64; 3],
    is_stale: bool,
}

impl Default for StepCosts {
    fn default() -> Self {
        let mut costs = Self {
            cells: vec![Cell::default(); ROW_CELLS * PAIR_CELLS],
            fit: [0.0; 3],
            is_stale: true,
        };
        costs.refit();
        costs
    }
}

fn log2_cell(value: usize, num_cells: usize) -> usize {
    (value.max(1).ilog2() as usize).min(num_cells - 1)
}

impl StepCosts {
    /// Learns what one step took.
    pub(super) fn observe(&mut self, shape: StepShape, taken: Micros) {
        if shape.rows == 0 {
            return;
        }
        let expected = self.predict_f64(shape);
        let row_cell = log2_cell(shape.rows, ROW_CELLS);
        let pair_cell = log2_cell(shape.pairs / shape.rows, PAIR_CELLS);
        let cell = &mut self.cells[row_cell * PAIR_CELLS + pair_cell];
        let mut us = (taken.0 as f64).max(1.0);
        if cell.num >= YOUNG {
            us = us.min(OUTLIER * expected);
        }
        cell.num = cell.num.saturating_add(1);
        let weight = 1.0 / f64::from(cell.num).min(MEMORY);
        cell.rows += weight * (shape.rows as f64 - cell.rows);
        cell.pairs += weight * (shape.pairs as f64 - cell.pairs);
        cell.us += weight * (us - cell.us);
        self.is_stale = true;
    }

    /// Brings predictions up to date with what was observed.
    pub(super) fn refresh(&mut self) {
        if std::mem::replace(&mut self.is_stale, false) {
            self.refit();
        }
    }

    /// What a step of this shape is expected to take.
    pub(super) fn predict(&self, shape: StepShape) -> Micros {
        Micros(self.predict_f64(shape) as u64)
    }

    fn predict_f64(&self, shape: StepShape) -> f64 {
        let features = shape.features();
        self.fit.iter().zip(features).map(|(cost, feature)| cost * feature).sum()
    }

    /// Whether a chunk was ever measured.
    pub(super) fn knows_chunks(&self) -> bool {
        self.cells[4 * PAIR_CELLS..].iter().any(|cell| cell.num > 0)
    }

    /// The most rows from position `start` on, up to `len_max`, that keep a step that has `shape`
    /// already within `budget`.
    pub(super) fn rows_within(
        &self,
        budget: Micros,
        shape: StepShape,
        start: usize,
        len_max: usize,
    ) -> usize {
        let fits = |len: usize| self.predict(shape.with(start, len)) <= budget;
        let (mut low, mut high) = (0, len_max);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        low
    }

    /// Least squares of relative errors over the cells, no cost below zero.
    fn refit(&mut self) {
        let mut normal = Normal::default();
        let measured = self.cells.iter().filter(|cell| cell.num > 0);
        if measured.clone().count() < CELLS_ENOUGH {
            for rows in [1, FIRST_GUESS_ROWS] {
                let (rows, pairs) = (rows as f64, (rows * rows) as f64);
                let us = rows * FIRST_GUESS_US / FIRST_GUESS_ROWS as f64;
                normal.add(&Cell { num: 1, rows, pairs, us }, GUESS_WEIGHT);
            }
        }
        measured.for_each(|cell| normal.add(cell, 1.0));
        self.fit = normal.solve();
    }
}

/// Normal equations of the fit.
#[derive(Clone, Copy, Debug, Default)]
struct Normal {
    matrix: [[f64; 3]; 3],
    right: [f64; 3],
}

impl Normal {
    fn add(&mut self, cell: &Cell, weight: f64) {
        let features = [1.0, cell.rows, cell.pairs];
        let weight = weight / (cell.us * cell.us);
        for (row, &feature) in features.iter().enumerate() {
            for (column, &other) in features.iter().enumerate() {
                self.matrix[row][column] += weight * feature * other;
            }
            self.right[row] += weight * feature * cell.us;
        }
    }

    /// The best costs that are not negative: of all choices of costs that are zero, the one with
    /// the least error among those that need no negative cost.
    fn solve(&self) -> [f64; 3] {
        let mut best = ([0.0; 3], f64::INFINITY);
        for mask in 1..8_u8 {
            let free: [bool; 3] = std::array::from_fn(|index| mask & (1 << index) != 0);
            let Some(costs) = self.solve_for(free) else { continue };
            if costs.iter().any(|&cost| cost < 0.0) {
                continue;
            }
            let error = self.error(&costs);
            if error < best.1 {
                best = (costs, error);
            }
        }
        best.0
    }

    /// Sum of squared errors, up to a constant.
    fn error(&self, costs: &[f64; 3]) -> f64 {
        let mut error = 0.0;
        for row in 0..3 {
            for column in 0..3 {
                error += costs[row] * self.matrix[row][column] * costs[column];
            }
            error -= 2.0 * costs[row] * self.right[row];
        }
        error
    }

    /// Gaussian elimination over the free costs; `None` when they are not determined.
    fn solve_for(&self, free: [bool; 3]) -> Option<[f64; 3]> {
        let indices = || (0..3).filter(|&index| free[index]);
        let (mut matrix, mut right) = (self.matrix, self.right);
        for pivot in indices() {
            if matrix[pivot][pivot] <= 1e-9 * self.matrix[pivot][pivot] {
                return None;
            }
            for row in indices().filter(|&row| row > pivot) {
                let factor = matrix[row][pivot] / matrix[pivot][pivot];
                for column in indices() {
                    matrix[row][column] -= factor * matrix[pivot][column];
                }
                right[row] -= factor * right[pivot];
            }
        }
        let mut costs = [0.0; 3];
        for row in indices().rev() {
            let known: f64 =
                indices().filter(|&column| column > row).map(|c| matrix[row][c] * costs[c]).sum();
            costs[row] = (right[row] - known) / matrix[row][row];
        }
        Some(costs)
    }
}

#[cfg(test)]
mod tests {
    use slipstream_model::clock::Micros;

    use super::{StepCosts, StepShape};

    /// A machine whose steps cost what the model says.
    fn taken(shape: StepShape) -> Micros {
        Micros(30_000 + 3_000 * shape.rows as u64 + shape.pairs as u64 / 2)
    }

    fn learned() -> StepCosts {
        let mut costs = StepCosts::default();
        for (start, len) in [(10, 1), (100, 1), (900, 1), (0, 16), (64, 32), (512, 64), (0, 200)] {
            let shape = StepShape::default().with(start, len);
            costs.observe(shape, taken(shape));
        }
        costs.refresh();
        costs
    }

    #[test]
    fn a_machine_that_fits_the_model_is_learned() {
        let costs = learned();
        for (start, len) in [(0, 1), (300, 8), (1_000, 48), (2_000, 128)] {
            let shape = StepShape::default().with(start, len);
            let (found, wanted) = (costs.predict(shape).0 as f64, taken(shape).0 as f64);
            assert!((found / wanted - 1.0).abs() < 0.03, "{shape:?}: {found} for {wanted}");
        }
    }

    #[test]
    fn plain_steps_do_not_wash_out_what_chunks_take() {
        let mut costs = learned();
        for step in 0..100_000 {
            let shape = StepShape::default().with(200 + step % 50, 1);
            costs.observe(shape, Micros(taken(shape).0 + (step % 7) as u64 * 100));
        }
        costs.refresh();
        let shape = StepShape::default().with(64, 64);
        let (found, wanted) = (costs.predict(shape).0 as f64, taken(shape).0 as f64);
        assert!((found / wanted - 1.0).abs() < 0.05, "{found} for {wanted}");
    }

    #[test]
    fn the_most_rows_that_fit_are_found() {
        let costs = learned();
        let decode = StepShape::default().with(100, 1).with(700, 1);
        for budget in [0, 30_000, 36_500, 54_000, 80_000, 400_000] {
            for start in [0, 50, 1_500] {
                let found = costs.rows_within(Micros(budget), decode, start, 100);
                let fits = |len| costs.predict(decode.with(start, len)) <= Micros(budget);
                assert!(found == 0 || fits(found), "{budget} from {start}: {found} are too many");
                assert!(
                    found == 100 || !fits(found + 1),
                    "{budget} from {start}: more than {found}"
                );
            }
        }
    }

    #[test]
    fn nothing_measured_gives_a_cautious_guess_and_one_pause_changes_little() {
        let mut costs = StepCosts::default();
        assert!((10..60).contains(&costs.rows_within(
            Micros(50_000),
            StepShape::default(),
            0,
            500
        )));
        assert!(!costs.knows_chunks());
        let shape = StepShape::default().with(100, 1);
        for _ in 0..10 {
            costs.observe(shape, Micros(5_000));
        }
        costs.refresh();
        costs.observe(shape, Micros(9_000_000));
        costs.refresh();
        assert!(costs.predict(shape) < Micros(8_000), "{:?}", costs.predict(shape));
    }
}
