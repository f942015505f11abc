//! Owns matrices as the network uses them: packed for the kernels, multiplied with the rows of a
//! step by a team. Knows weights by name only to report what is wrong with them; knows no layers.

use std::ops::Range;

use crate::kernels::packed::{PackedF32, PackedQ8, STRIP_LEN, StripOutput};
use crate::kernels::team::Team;
use crate::kernels::{self, Isa, QUANT_BLOCK_LEN, QuantRows};
use crate::load::{unpack_q4_0, widen};
use crate::packed::ModelError;
use crate::weights::{Matrix, MatrixData};

/// Multiply-adds below which a product runs on the caller alone: some 30 microseconds of work. A
/// worker that has parked takes about as long to wake, and steps of small models are that short.
const TEAM_MACS_MIN: usize = 1 << 21;

/// Strips per tile of a product, at most; fewer when that would leave a thread without work.
const TILE_STRIPS_MAX: usize = 16;

/// Tiles per thread that make the last ones to finish finish together.
const TILES_PER_THREAD: usize = 4;

/// A packed matrix that maps rows of `in_len` numbers to rows of `out_len`.
#[derive(Debug)]
pub struct Linear {
    packed: Packed,
}

#[derive(Debug)]
enum Packed {
    F32(PackedF32),
    Q8_0(PackedQ8),
}

impl Linear {
    /// Packs a matrix and drops its original. `name` is what errors call it; `shape` is the
    /// `[out, in]` that the network needs.
    ///
    /// # Errors
    /// When the matrix has another shape, its data another length, Q8_0 rows are no multiple of
    /// 32 long, or memory runs out.
    pub fn pack(name: &str, matrix: Matrix, shape: [usize; 2]) -> Result<Self, ModelError> {
        let Matrix { out_len, in_len, data } = matrix;
        let wrong = |found: String| ModelError::Shape { tensor: name.to_owned(), found, shape };
        if [out_len, in_len] != shape || out_len == 0 || in_len == 0 {
            return Err(wrong(format!("[{out_len}, {in_len}]")));
        }
        let num_weights = out_len.saturating_mul(in_len);
        let no_memory = |_| ModelError::OutOfMemory { what: name.to_owned(), bytes: num_weights };
        let packed = match data {
            MatrixData::F32(data) => {
                if data.len() != num_weights {
                    return Err(wrong(format!("{} numbers", data.len())));
                }
                Packed::F32(PackedF32::pack(out_len, in_len, &data).map_err(no_memory)?)
            }
            MatrixData::F16(_) | MatrixData::Bf16(_) => {
                let data = MatrixData::F32(widen(&data));
                return Self::pack(name, Matrix { out_len, in_len, data }, shape);
            }
            MatrixData::Q4_0 { scales, quants } => {
                if quants.len().checked_mul(2) != Some(num_weights) {
                    return Err(wrong(format!("{} bytes of quants", quants.len())));
                }
                let data = MatrixData::Q8_0 { scales, quants: unpack_q4_0(&quants) };
                return Self::pack(name, Matrix { out_len, in_len, data }, shape);
            }
            MatrixData::Q8_0 { scales, quants } => {
                if !in_len.is_multiple_of(QUANT_BLOCK_LEN) {
                    return Err(ModelError::PartialBlock { tensor: name.to_owned(), in_len });
                }
                if quants.len() != num_weights || scales.len() != num_weights / QUANT_BLOCK_LEN {
                    return Err(wrong(format!("{} quants, {} scales", quants.len(), scales.len())));
                }
                let packed = PackedQ8::pack(out_len, in_len, &quants, &scales);
                Packed::Q8_0(packed.map_err(no_memory)?)
            }
        };
        Ok(Self { packed })
    }

    /// Length of an output row.
    #[must_use]
    pub fn out_len(&self) -> usize {
        match &self.packed {
            Packed::F32(matrix) => matrix.out_len(),
            Packed::Q8_0(matrix) => matrix.out_len(),
        }
    }

    /// Length of an input row.
    #[must_use]
    pub fn in_len(&self) -> usize {
        match &self.packed {
            Packed::F32(matrix) => matrix.in_len(),
            Packed::Q8_0(matrix) => matrix.in_len(),
        }
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match &self.packed {
            Packed::F32(matrix) => matrix.num_bytes(),
            Packed::Q8_0(matrix) => matrix.num_bytes(),
        }
    }

    /// Writes one row of the matrix, `[in]`, as floats: the lookup of an embedding.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        match &self.packed {
            Packed::F32(matrix) => matrix.read_row(row, out),
            Packed::Q8_0(matrix) => matrix.read_row(row, out),
        }
    }

    /// Multiplies: `out` is `[rows, out_len]`, `input` is `[rows, in_len]`. A Q8_0 matrix sees the
    /// input quantised, which is done once per input however many matrices share it.
    ///
    /// # Panics
    /// When a length disagrees.
    pub fn apply(&self, compute: &mut Compute, input: &mut InputRows, out: &mut [f32]) {
        let (in_len, out_len) = (self.in_len(), self.out_len());
        assert_eq!(input.in_len, in_len, "input rows are as long as the matrix wants");
        let num_rows = input.num_rows();
        assert_eq!(out.len(), num_rows * out_len, "out is [rows, out_len]");
        if num_rows == 0 {
            return;
        }
        let isa = compute.isa;
        if let Packed::Q8_0(_) = self.packed {
            input.quantise(isa);
        }
        let input = &*input;
        let num_strips = out_len.div_ceil(STRIP_LEN);
        compute.product(num_rows * in_len, num_strips, num_rows, |strips, out| {
            match &self.packed {
                Packed::F32(matrix) => {
                    kernels::product_f32(isa, matrix.strips(strips), &input.values, out);
                }
                Packed::Q8_0(matrix) => {
                    kernels::product_q8_0(isa, matrix.strips(strips), input.quantised(), out);
                }
            }
        });
        unstrip(&compute.strips, num_rows, out_len, out);
    }
}

/// Turns `[strips, rows]` of 8 outputs into `[rows, out_len]`, the padding dropped.
fn unstrip(strips: &[StripOutput], num_rows: usize, out_len: usize, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(out_len).enumerate() {
        let (whole, tail) = out.as_chunks_mut::<STRIP_LEN>();
        let num_whole = whole.len();
        for (strip, to) in whole.iter_mut().enumerate() {
            *to = strips[strip * num_rows + row];
        }
        if !tail.is_empty() {
            tail.copy_from_slice(&strips[num_whole * num_rows + row][..tail.len()]);
        }
    }
}

/// What computes: an implementation of the kernels and a team, with the room products need.
#[derive(Debug)]
pub struct Compute {
    /// Implementation of the kernels.
    pub isa: Isa,
    /// The threads.
    pub team: Team,
    /// Output of a product, `[strips, rows]`: tiles are contiguous in it.
    strips: Vec<StripOutput>,
    /// Multiply-adds from which a product is shared.
    team_macs_min: usize,
}

impl Compute {
    /// A team of `threads` threads.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(isa: Isa, threads: usize) -> std::io::Result<Self> {
        let team = Team::new(threads)?;
        Ok(Self { isa, team, strips: Vec::new(), team_macs_min: TEAM_MACS_MIN })
    }

    /// Shares products from `macs` multiply-adds on with the team. For tests and measurements: it
    /// cannot change a bit.
    pub fn share_products_from(&mut self, macs: usize) {
        self.team_macs_min = macs;
    }

    /// Runs `kernel` on ranges of strips and the parts of the output that belong to them.
    /// `macs_per_output` is what one output of all rows costs.
    fn product(
        &mut self,
        macs_per_output: usize,
        num_strips: usize,
        num_rows: usize,
        kernel: impl Fn(Range<usize>, &mut [StripOutput]) + Sync,
    ) {
        self.strips.clear();
        self.strips.resize(num_strips * num_rows, [0.0; STRIP_LEN]);
        let macs = macs_per_output.saturating_mul(num_strips * STRIP_LEN);
        let num_threads = self.team.num_threads();
        if macs < self.team_macs_min || num_threads == 1 {
            kernel(0..num_strips, &mut self.strips);
            return;
        }
        let tile_strips = num_strips.div_ceil(num_threads * TILES_PER_THREAD);
        let tile_strips = tile_strips.clamp(1, TILE_STRIPS_MAX);
        self.team.run_chunks(&mut self.strips, tile_strips * num_rows, |tile, out| {
            let start = tile * tile_strips;
            kernel(start..start + out.len() / num_rows, out);
        });
    }
}

/// Rows that products read, with their quantised form once a Q8_0 matrix has asked for it. Reused
/// from step to step.
#[derive(Debug, Default)]
pub struct InputRows {
    in_len: usize,
    /// `[rows, in]`.
    values: Vec<f32>,
    /// `[rows, in]`.
    quants: Vec<i8>,
    /// `[rows, in / 32]`.
    scales: Vec<f32>,
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

    fn num_rows(&self) -> usize {
        self.values.len().checked_div(self.in_len).unwrap_or(0)
    }

    fn quantise(&mut self, isa: Isa) {
        if self.is_quantised {
            return;
        }
        self.quants.resize(self.values.len(), 0);
        self.scales.resize(self.values.len() / QUANT_BLOCK_LEN, 0.0);
        kernels::quantise(isa, &self.values, &mut self.quants, &mut self.scales);
        self.is_quantised = true;
    }

    fn quantised(&self) -> QuantRows<'_> {
        QuantRows { quants: &self.quants, scales: &self.scales }
    }
}
