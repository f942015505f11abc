//! Owns matrices as the network uses them: packed for the kernels, multiplied with the rows of a
//! step. Knows weights by name only to report what is wrong with them; knows no layers.

use std::ops::Range;

use crate::compute::{Compute, InputRows};
use crate::kernels::packed::{F32Lanes, PackedFloats, PackedQuants, Q8Tile, STRIP_LEN};
use crate::kernels::products::{Epilogue, product_floats, product_quants};
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
    packed: Packed,
}

#[derive(Debug)]
enum Packed {
    F32(PackedFloats<F32Lanes>),
    Q8_0(PackedQuants<Q8Tile>),
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
        let no_memory = |_| ModelError::OutOfMemory { what: name.to_owned(), bytes: num_weights };
        let packed = match data {
            MatrixData::F32(data) => {
                if data.len() != num_weights {
                    return Err(wrong(format!("{} numbers", data.len())));
                }
                Packed::F32(PackedFloats::pack(out_len, in_len, &data).map_err(no_memory)?)
            }
            MatrixData::Q8_0 { scales, quants } => {
                if !in_len.is_multiple_of(QUANT_BLOCK_LEN) {
                    return Err(ModelError::PartialBlock { tensor: name.to_owned(), in_len });
                }
                if quants.len() != num_weights || scales.len() != num_weights / QUANT_BLOCK_LEN {
                    return Err(wrong(format!("{} quants, {} scales", quants.len(), scales.len())));
                }
                let packed = PackedQuants::pack(out_len, in_len, &quants, &scales);
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

    /// Whether its products read quantised input.
    fn is_quantised(&self) -> bool {
        match &self.packed {
            Packed::F32(_) => false,
            Packed::Q8_0(_) => true,
        }
    }

    /// Multiplies some strips with some rows of the input.
    fn product(&self, isa: Isa, part: Part<'_>, epilogue: Epilogue, out: &mut Tile<'_>) {
        let Part { input, strips, rows } = part;
        match &self.packed {
            Packed::F32(matrix) => {
                product_floats(isa, matrix.strips(strips), input.values(rows), epilogue, out);
            }
            Packed::Q8_0(matrix) => {
                product_quants(isa, matrix.strips(strips), input.quants(rows), epilogue, out);
            }
        }
    }

    /// Bytes of input that a row of a product reads.
    fn input_bytes(&self) -> usize {
        if self.is_quantised() { self.in_len() * 5 / 4 } else { self.in_len() * size_of::<f32>() }
    }
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
            tile_rows: (panel_rows / ROW_GROUP).max(1) * ROW_GROUP,
            tile_columns: tile_strips.clamp(1, TILE_STRIPS_MAX) * STRIP_LEN,
        }
    }
}

/// Rows that kernels take together.
const ROW_GROUP: usize = 8;

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
        if matrix.is_quantised() {
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
        let Some(up) = gated else { return matrix.product(isa, part, epilogue, &mut tile) };
        matrix.product(isa, part.clone(), epilogue, &mut tile);
        up.product(isa, part, Epilogue::SwiGlu, &mut tile);
    });
}
