//! Proves that the matrix products and the quantisation of every implementation equal their plain
//! twins bit for bit at all edges of tiles, with every epilogue, with NaN, infinities and extreme
//! integers; that the twins compute what they say; and that a row does not see the others.

use half::{bf16, f16};
use slipstream_model::kernels::packed::{
    Bf16Lanes, F16Lanes, F32Lanes, Lanes, PackedFloats, PackedQuants, Q4Tile, Q8Tile, STRIP_LEN,
};
use slipstream_model::kernels::products::{
    Epilogue, FloatWeights, QuantBlock, QuantRows, QuantWeights, product_floats, product_quants,
    quantise,
};
use slipstream_model::kernels::tile::Tile;
use slipstream_model::kernels::{AMAX_MIN, Isa, QUANT_BLOCK_LEN};
use slipstream_tests::kernel_checks::{bytes, check, floats, same_bits};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

const SEED: u64 = 20_261_121;

const EPILOGUES: [Epilogue; 3] = [Epilogue::Store, Epilogue::Add, Epilogue::SwiGlu];

/// Columns of the matrix around a tile that no product may touch.
const MARGIN: usize = 3;

/// Runs a product on the middle columns of a wider matrix and returns all of that.
fn in_a_tile(num_rows: usize, out_len: usize, product: impl FnOnce(&mut Tile<'_>)) -> Vec<f32> {
    let row_len = out_len + 2 * MARGIN;
    let mut data: Vec<f32> = (0..num_rows * row_len).map(|i| (i % 97) as f32 * 0.1).collect();
    product(&mut Tile::whole(&mut data, row_len).columns(MARGIN..MARGIN + out_len));
    data
}

struct QuantCase<T> {
    matrix: PackedQuants<T>,
    blocks: Vec<QuantBlock>,
    num_rows: usize,
}

/// Blocks of activations as quantisation makes them, and odd scales.
fn random_blocks(rng: &mut Rng, num_blocks: usize) -> Vec<QuantBlock> {
    let odd_in = if rng.one_in(3) { 20 } else { 0 };
    let scales = floats(rng, num_blocks, odd_in);
    let blocks = scales.into_iter().map(|scale| {
        let mut quants = [0; QUANT_BLOCK_LEN];
        quants.copy_from_slice(&bytes(rng, QUANT_BLOCK_LEN));
        quants.iter_mut().for_each(|quant| *quant = (*quant).max(-127));
        let offset = -8 * quants.iter().map(|&quant| i32::from(quant)).sum::<i32>();
        QuantBlock { scale, offset, quants }
    });
    blocks.collect()
}

fn random_scales(rng: &mut Rng, num_blocks: usize) -> Vec<f16> {
    floats(rng, num_blocks, 0).into_iter().map(f16::from_f32).collect()
}

/// A matrix of any quantised format: both are given bytes, which all mean something.
fn random_quants<T: QuantWeights>(
    rng: &mut Rng,
    [out_len, in_len]: [usize; 2],
    num_rows: usize,
    stored: fn(i8) -> T::Stored,
) -> QuantCase<T> {
    let num_blocks = in_len / QUANT_BLOCK_LEN;
    let weights = bytes(rng, out_len * num_blocks * T::STORED_LEN);
    let weights: Vec<T::Stored> = weights.into_iter().map(stored).collect();
    let scales = random_scales(rng, out_len * num_blocks);
    let matrix = PackedQuants::pack(out_len, in_len, &weights, &scales).unwrap();
    QuantCase { matrix, blocks: random_blocks(rng, num_rows * num_blocks), num_rows }
}

impl<T: QuantWeights> QuantCase<T> {
    fn product(&self, isa: Isa, epilogue: Epilogue) -> Vec<f32> {
        let out_len = self.matrix.out_len();
        let strips = self.matrix.strips(0..out_len.div_ceil(STRIP_LEN));
        in_a_tile(self.num_rows, out_len, |tile| {
            product_quants(isa, strips, QuantRows { blocks: &self.blocks }, epilogue, tile);
        })
    }
}

fn quants_equal_their_twin<T: QuantWeights>(name: &str, stored: fn(i8) -> T::Stored) {
    let mut rng = Rng::new(SEED);
    for out_len in [1, 7, 8, 15, 16, 17, 31, 32, 33, 67] {
        for num_rows in (0..=9).chain([15, 16, 17, 24, 25]) {
            for in_len in [32, 64, 96, 352] {
                let shape = [out_len, in_len];
                let case = random_quants::<T>(&mut rng, shape, num_rows, stored);
                let epilogue = *rng.pick(&EPILOGUES);
                let what = format!("{name} {out_len}x{in_len}, {num_rows} rows, {epilogue:?}");
                check(&what, SEED, |isa| case.product(isa, epilogue));
            }
        }
    }
}

#[test]
fn q8_0_product_equals_its_twin() {
    timed("kernels q8_0 product", 4.0, || quants_equal_their_twin::<Q8Tile>("q8_0", |b| b));
}

#[test]
fn q4_0_product_equals_its_twin() {
    timed("kernels q4_0 product", 4.0, || quants_equal_their_twin::<Q4Tile>("q4_0", |b| b as u8));
}

fn floats_equal_their_twin<L: FloatWeights>(name: &str, stored: fn(f32) -> L::Weight) {
    let mut rng = Rng::new(SEED + 1);
    for out_len in [1, 7, 8, 9, 15, 16, 17, 33, 48, 67] {
        for num_rows in 0..=9 {
            for in_len in [1, 2, 7, 8, 33] {
                let odd_in = if rng.one_in(3) { 30 } else { 0 };
                let weights: Vec<L::Weight> =
                    floats(&mut rng, out_len * in_len, 0).into_iter().map(stored).collect();
                let matrix = PackedFloats::<L>::pack(out_len, in_len, &weights).unwrap();
                let input = floats(&mut rng, num_rows * in_len, odd_in);
                let epilogue = *rng.pick(&EPILOGUES);
                let what = format!("{name} {out_len}x{in_len}, {num_rows} rows, {epilogue:?}");
                check(&what, SEED, |isa| {
                    in_a_tile(num_rows, out_len, |tile| {
                        let strips = matrix.strips(0..out_len.div_ceil(STRIP_LEN));
                        product_floats(isa, strips, &input, epilogue, tile);
                    })
                });
            }
        }
    }
}

#[test]
fn float_products_equal_their_twins() {
    timed("kernels float products", 4.0, || {
        floats_equal_their_twin::<F32Lanes>("f32", |x| x);
        floats_equal_their_twin::<F16Lanes>("f16", f16::from_f32);
        floats_equal_their_twin::<Bf16Lanes>("bf16", bf16::from_f32);
    });
}

/// Half-precision weights give the bits of the same weights as 32-bit floats.
#[test]
fn half_precision_is_only_a_way_to_store() {
    fn product<L: FloatWeights>(weights: &[L::Weight], input: &[f32]) -> Vec<f32> {
        let matrix = PackedFloats::<L>::pack(33, 40, weights).unwrap();
        in_a_tile(3, 33, |tile| {
            product_floats(Isa::detect(), matrix.strips(0..3), input, Epilogue::Store, tile);
        })
    }
    let mut rng = Rng::new(SEED + 7);
    let (weights, input) = (floats(&mut rng, 33 * 40, 0), floats(&mut rng, 3 * 40, 0));
    let halves: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
    let widened: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
    let found = product::<F16Lanes>(&halves, &input);
    same_bits("f16", &found, &product::<F32Lanes>(&widened, &input));
    let brains: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
    let widened: Vec<f32> = brains.iter().map(|w| w.to_f32()).collect();
    let found = product::<Bf16Lanes>(&brains, &input);
    same_bits("bf16", &found, &product::<F32Lanes>(&widened, &input));
    assert_eq!(F16Lanes([f16::ONE.to_bits(); STRIP_LEN]).get(3), 1.0);
}

#[test]
fn quantisation_equals_its_twin() {
    let mut rng = Rng::new(SEED + 2);
    for round in 0..300 {
        let magnitude = 10.0_f32.powi(rng.between(0, 76) as i32 - 38);
        let mut values = floats(&mut rng, 4 * QUANT_BLOCK_LEN, [0, 40][round % 2]);
        values.iter_mut().for_each(|value| *value *= magnitude);
        if round % 5 == 0 {
            // Ties: with a largest magnitude of 127 the factor is 1.
            values[0] = 127.0;
            values[1..32].iter_mut().for_each(|value| *value = rng.between(0, 252) as f32 / 2.0);
        }
        check("quantise", SEED, |isa| {
            let mut blocks = vec![QuantBlock { scale: 1.0, offset: 1, quants: [1; 32] }; 4];
            quantise(isa, &values, &mut blocks);
            blocks.iter().flat_map(numbers).collect()
        });
    }
}

/// A block as numbers to compare; checks what is promised of every block.
fn numbers(block: &QuantBlock) -> Vec<f32> {
    assert!(!block.quants.contains(&-128), "quants stay within 127");
    let sum: i32 = block.quants.iter().map(|&quant| i32::from(quant)).sum();
    assert_eq!(block.offset, -8 * sum, "the offset is what it says");
    block.quants.iter().map(|&quant| f32::from(quant)).chain([block.scale]).collect()
}

#[test]
fn quantisation_keeps_its_promises() {
    let quantised = |values: &[f32; 32]| {
        let mut block = [QuantBlock::default()];
        quantise(Isa::Plain, values, &mut block);
        (block[0].quants, block[0].scale)
    };
    let mut block = [0.0; 32];
    assert_eq!(quantised(&block), ([0; 32], 0.0));
    block[3] = AMAX_MIN / 2.0;
    assert_eq!(quantised(&block), ([0; 32], 0.0));
    block[4] = -254.0;
    block[5] = 127.0;
    block[6] = 5.0; // 2.5 quants: a tie goes to the even one
    let (quants, scale) = quantised(&block);
    assert_eq!((quants[3], quants[4], quants[5], quants[6], scale), (0, -127, 64, 2, 2.0));
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        block[31] = odd;
        let (quants, scale) = quantised(&block);
        assert!(quants == [0; 32] && scale.is_nan(), "{odd} must not be lost");
    }
}

#[test]
fn twins_compute_what_they_say() {
    let mut rng = Rng::new(SEED + 5);
    let (out_len, in_len) = (13, 128);
    let quants = bytes(&mut rng, out_len * in_len);
    let scales = random_scales(&mut rng, quants.len() / 32);
    let q8 = PackedQuants::<Q8Tile>::pack(out_len, in_len, &quants, &scales).unwrap();
    let nibbles: Vec<u8> = quants[..quants.len() / 2].iter().map(|&byte| byte as u8).collect();
    let q4 = PackedQuants::<Q4Tile>::pack(out_len, in_len, &nibbles, &scales).unwrap();
    let of_q8 = |o: usize, k: usize| quants[o * in_len + k];
    let of_q4 = |o: usize, k: usize| {
        let byte = nibbles[(o * in_len + k) / 32 * 16 + k % 16];
        (if k % 32 < 16 { byte & 15 } else { byte >> 4 }) as i8 - 8
    };
    let input = floats(&mut rng, in_len, 0);
    computes_what_it_says(&q8, &scales, &input, of_q8);
    computes_what_it_says(&q4, &scales, &input, of_q4);
}

fn computes_what_it_says<T: QuantWeights>(
    matrix: &PackedQuants<T>,
    scales: &[f16],
    input: &[f32],
    quant: impl Fn(usize, usize) -> i8,
) {
    let (out_len, in_len) = (matrix.out_len(), matrix.in_len());
    let mut blocks = vec![QuantBlock::default(); in_len / QUANT_BLOCK_LEN];
    quantise(Isa::Plain, input, &mut blocks);
    let mut out = vec![0.0; out_len];
    let rows = QuantRows { blocks: &blocks };
    let mut tile = Tile::whole(&mut out, out_len);
    product_quants(Isa::Plain, matrix.strips(0..1), rows, Epilogue::Store, &mut tile);
    let mut row = vec![0.0; in_len];
    let exact: Vec<f64> = (0..out_len)
        .map(|o| {
            matrix.read_row(o, &mut row);
            for (k, &weight) in row.iter().enumerate() {
                let scale = scales[(o * in_len + k) / 32].to_f32();
                assert_eq!(weight, scale * f32::from(quant(o, k)), "weights survive packing");
            }
            let weights = row.iter().map(|&weight| f64::from(weight));
            weights.zip(input).map(|(weight, &x)| weight * f64::from(x)).sum()
        })
        .collect();
    let largest = exact.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    for (found, exact) in out.iter().zip(&exact) {
        assert!((f64::from(*found) - exact).abs() < 0.02 * largest, "{found} is not {exact}");
    }
}

#[test]
fn a_row_of_a_product_does_not_see_the_others() {
    let mut rng = Rng::new(SEED + 6);
    let q8 = random_quants::<Q8Tile>(&mut rng, [24, 64], 21, |b| b);
    let q4 = random_quants::<Q4Tile>(&mut rng, [24, 64], 21, |b| b as u8);
    for isa in Isa::available() {
        rows_are_alone(isa, &q8);
        rows_are_alone(isa, &q4);
    }
}

fn rows_are_alone<T: QuantWeights>(isa: Isa, case: &QuantCase<T>) {
    let product = |blocks: &[QuantBlock]| {
        let num_rows = blocks.len() / 2;
        let mut out = vec![0.0; num_rows * 24];
        let rows = QuantRows { blocks };
        let strips = case.matrix.strips(0..2);
        product_quants(isa, strips, rows, Epilogue::Store, &mut Tile::whole(&mut out, 24));
        out
    };
    let together = product(&case.blocks);
    for (row, blocks) in case.blocks.chunks(2).enumerate() {
        same_bits("a row in company", &together[row * 24..(row + 1) * 24], &product(blocks));
    }
}
