//! Owns matrices as the network uses them: packed for the kernels, multiplied with the rows of a
//! step. Knows weights by name only to report what is wrong with them; knows no layers.

use std::collections::TryReserveError;
use std::ops::Range;

use crate::compute::{Compute, InputRows};
use crate::kernels::packed::{
    Bf16Lanes, F16Lanes, F32Lanes, PackedFloats, PackedQuants, Q4Tile, Q8Tile, STRIP_LEN,
};
use crate::kernels::products::{
    Epilogue, FloatWeights, QuantBlock, QuantWeights, ROWS_MAX, product_floats, product_quants,
};
use crate::kernels::tile::{Grid, Tile};
use crate::kernels::{Isa, QUANT_BLOCK_LEN};
use crate::packed::ModelError;
use crate::weights::{Matrix, MatrixData};

/// Strips per tile of a product, at most; fewer when that would leave a thread without work.
const TILE_STRIPS_MAX: usize = 8;

/// Tiles per thread that make the last ones to finish finish together.
const TILES_PER_THREAD: usize = 4;

/// Input that a tile reads for each of its strips, at most: with the strip it stays in a core's L2
/// cache, so that a prompt of any length reads weights once per panel of rows.
const PANEL_BYTES: usize = 256 << 10;

/// A packed matrix that maps rows of `in_len` numbers to rows of `out_len`.
#[derive(Debug)]
pub struct Linear {
    out_len: usize,
    in_len: usize,
    packed: Box<dyn Packed>,
}

/// A matrix of some format, packed.
trait Packed: std::fmt::Debug + Send + Sync {
    fn num_bytes(&self) -> usize;
    fn read_row(&self, row: usize, out: &mut [f32]);
    /// Whether its products read quantised input.
    fn is_quantised(&self) -> bool;
    /// Multiplies some strips with some rows of the input.
    fn product(&self, isa: Isa, part: Part<'_>, epilogue: Epilogue, out: &mut Tile<'_>);
}

impl<L: FloatWeights + std::fmt::Debug> Packed for PackedFloats<L> {
    fn num_bytes(&self) -> usize {
        self.num_bytes()
    }

    fn read_row(&self, row: usize, out: &mut [f32]) {
        self.read_row(row, out);
    }

    fn is_quantised(&self) -> bool {
        false
    }

    fn product(&self, isa: Isa, part: Part<'_>, epilogue: Epilogue, out: &mut Tile<'_>) {
        let Part { input, strips, rows } = part;
        product_floats(isa, self.strips(strips), input.values(rows), epilogue, out);
    }
}

impl<T: QuantWeights + std::fmt::Debug> Packed for PackedQuants<T> {
    fn num_bytes(&self) -> usize {
        self.num_bytes()
    }

    fn read_row(&self, row: usize, out: &mut [f32]) {
        self.read_row(row, out);
    }

    fn is_quantised(&self) -> bool {
        true
    }

    fn product(&self, isa: Isa, part: Part<'_>, epilogue: Epilogue, out: &mut Tile<'_>) {
        let Part { input, strips, rows } = part;
        product_quants(isa, self.strips(strips), input.quants(rows), epilogue, out);
    }
}

impl Linear {
    /// Packs a matrix and drops its original. `name` is what errors call it; `shape` is the
    /// `[out, in]` that the network needs.
    ///
    /// # Errors
    /// When the matrix has another shape, its data another length, rows of a quantised one are no
    /// multiple of 32 long, or memory runs out.
    pub fn pack(name: &str, matrix: Matrix, shape: [usize; 2]) -> Result<Self, ModelError> {
        let Matrix { out_len, in_len, data } = matrix;
        let wrong = |found: String| ModelError::Shape { tensor: name.to_owned(), found, shape };
        if [out_len, in_len] != shape || out_len == 0 || in_len == 0 {
            return Err(wrong(format!("[{out_len}, {in_len}]")));
        }
        let num_weights = out_len.saturating_mul(in_len);
        let (num_stored, num_scales) = match &data {
            MatrixData::F32(data) => (data.len(), 0),
            MatrixData::F16(data) => (data.len(), 0),
            MatrixData::Bf16(data) => (data.len(), 0),
            MatrixData::Q8_0 { scales, quants } => (quants.len(), scales.len()),
            MatrixData::Q4_0 { scales, quants } => (quants.len() * 2, scales.len()),
        };
        if num_stored != num_weights {
            return Err(wrong(format!("{num_stored} numbers")));
        }
        if data.is_quantised() && !in_len.is_multiple_of(QUANT_BLOCK_LEN) {
            return Err(ModelError::PartialBlock { tensor: name.to_owned(), in_len });
        }
        if data.is_quantised() && num_scales != num_weights / QUANT_BLOCK_LEN {
            return Err(wrong(format!("{num_scales} scales")));
        }
        let packed = pack([out_len, in_len], &data);
        let bytes = data.num_bytes();
        let no_memory = |_| ModelError::OutOfMemory { what: name.to_owned(), bytes };
        Ok(Self { out_len, in_len, packed: packed.map_err(no_memory)? })
    }

    /// Length of an output row.
    #[must_use]
    pub fn out_len(&self) -> usize {
        self.out_len
    }

    /// Length of an input row.
    #[must_use]
    pub fn in_len(&self) -> usize {
        self.in_len
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.packed.num_bytes()
    }

    /// Writes one row of the matrix, `[in]`, as floats: the lookup of an embedding.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        self.packed.read_row(row, out);
    }

    /// Bytes of input that a row of a product reads.
    fn input_bytes(&self) -> usize {
        match self.packed.is_quantised() {
            true => self.in_len / QUANT_BLOCK_LEN * size_of::<QuantBlock>(),
            false => self.in_len * size_of::<f32>(),
        }
    }
}

/// Packs numbers whose lengths were checked.
fn pack(
    [out_len, in_len]: [usize; 2],
    data: &MatrixData,
) -> Result<Box<dyn Packed>, TryReserveError> {
    Ok(match data {
        MatrixData::F32(data) => Box::new(PackedFloats::<F32Lanes>::pack(out_len, in_len, data)?),
        MatrixData::F16(data) => Box::new(PackedFloats::<F16Lanes>::pack(out_len, in_len, data)?),
        MatrixData::Bf16(data) => Box::new(PackedFloats::<Bf16Lanes>::pack(out_len, in_len, data)?),
        MatrixData::Q8_0 { scales, quants } => {
            Box::new(PackedQuants::<Q8Tile>::pack(out_len, in_len, quants, scales)?)
        }
        MatrixData::Q4_0 { scales, quants } => {
            Box::new(PackedQuants::<Q4Tile>::pack(out_len, in_len, quants, scales)?)
        }
    })
}

/// What a tile multiplies.
#[derive(Clone, Debug)]
struct Part<'a> {
    input: &'a InputRows,
    strips: Range<usize>,
    rows: Range<usize>,
}

/// A product to be made: where it goes and what becomes of it.
#[derive(Debug)]
pub struct Product<'a> {
    matrix: &'a Linear,
    epilogue: Epilogue,
    /// Multiplies the silu of the product, element by element.
    gated: Option<&'a Linear>,
    /// `[rows, out_len]`.
    out: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// `out = matrix * input`.
    pub fn store(matrix: &'a Linear, out: &'a mut [f32]) -> Self {
        Self { matrix, epilogue: Epilogue::Store, gated: None, out }
    }

    /// `out = out + matrix * input`.
    pub fn add(matrix: &'a Linear, out: &'a mut [f32]) -> Self {
        Self { matrix, epilogue: Epilogue::Add, gated: None, out }
    }

    /// `out = swiglu(gate * input, up * input)`.
    ///
    /// # Panics
    /// When the matrices have different shapes.
    pub fn swiglu(gate: &'a Linear, up: &'a Linear, out: &'a mut [f32]) -> Self {
        assert_eq!((gate.out_len(), gate.in_len()), (up.out_len(), up.in_len()), "equal shapes");
        Self { matrix: gate, epilogue: Epilogue::Store, gated: Some(up), out }
    }

    fn matrices(&self) -> impl Iterator<Item = &'a Linear> {
        [Some(self.matrix), self.gated].into_iter().flatten()
    }

    fn grid(&self, num_rows: usize, num_threads: usize) -> Grid {
        let row_len = self.matrix.out_len();
        let num_strips = row_len.div_ceil(STRIP_LEN);
        let tile_strips = num_strips.div_ceil(num_threads * TILES_PER_THREAD);
        let panel_rows = PANEL_BYTES / self.matrix.input_bytes().max(1);
        Grid {
            num_rows,
            row_len,
            // Whole groups of the rows that kernels take together.
            tile_rows: (panel_rows / ROWS_MAX).max(1) * ROWS_MAX,
            tile_columns: tile_strips.clamp(1, TILE_STRIPS_MAX) * STRIP_LEN,
        }
    }
}

/// Makes some products of the same input: tiles of all of them are shared by the team as one job.
///
/// # Panics
/// When a length disagrees.
pub fn multiply<const N: usize>(
    compute: &mut Compute,
    input: &mut InputRows,
    products: [Product<'_>; N],
) {
    let num_rows = input.num_rows();
    let mut macs = 0_usize;
    for matrix in products.iter().flat_map(Product::matrices) {
        assert_eq!(input.in_len(), matrix.in_len(), "input rows are as long as the matrix wants");
        macs = macs.saturating_add(num_rows * matrix.in_len() * matrix.out_len());
        if matrix.packed.is_quantised() {
            input.quantise(compute);
        }
    }
    let input = &*input;
    let isa = compute.isa();
    let team = compute.team_for(macs);
    let num_threads = team.num_threads();
    let jobs = products.each_ref().map(|product| (product.matrix, product.epilogue, product.gated));
    let parts = products.map(|product| {
        let grid = product.grid(num_rows, num_threads);
        (product.out, grid)
    });
    team.run_tiles(parts, |index, place, mut tile| {
        let (matrix, epilogue, gated) = jobs[index];
        let strips = place.columns.start / STRIP_LEN..place.columns.end.div_ceil(STRIP_LEN);
        let part = Part { input, strips, rows: place.rows };
        let Some(up) = gated else { return matrix.packed.product(isa, part, epilogue, &mut tile) };
        matrix.packed.product(isa, part.clone(), epilogue, &mut tile);
        up.packed.product(isa, part, Epilogue::SwiGlu, &mut tile);
    });
}
