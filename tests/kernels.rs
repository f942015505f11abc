//! Proves that every implementation of the kernels that this CPU has equals the plain twin bit for
//! bit, at all edges of tiles and with NaN, infinities and extreme integers; that the twins compute
//! what they say; and that the thread team calls every tile once, whatever panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use slipstream_model::kernels::packed::{PackedF32, PackedQ8, StripOutput};
use slipstream_model::kernels::team::Team;
use slipstream_model::kernels::{self, AMAX_MIN, EXP_ULPS, Isa, QUANT_BLOCK_LEN, QuantRows};
use slipstream_model::math;
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

const SEED: u64 = 20_261_121;

/// Numbers that arithmetic trips over.
const ODD: [f32; 10] = [
    0.0,
    -0.0,
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    1e-40,
    -1e-30,
];

/// Normal-looking numbers; about one in `odd_in` is odd instead (0: none).
pub(crate) fn floats(rng: &mut Rng, len: usize, odd_in: usize) -> Vec<f32> {
    let mut one = || {
        if rng.one_in(odd_in) {
            return *rng.pick(&ODD);
        }
        let sum = rng.unit() + rng.unit() + rng.unit() - 1.5;
        (sum * 2.0) as f32
    };
    (0..len).map(|_| one()).collect()
}

fn bytes(rng: &mut Rng, len: usize) -> Vec<i8> {
    let extreme = rng.one_in(2);
    (0..len)
        .map(|_| if extreme { *rng.pick(&[-128, 127, -127]) } else { rng.bits() as i8 })
        .collect()
}

/// Equality of bits; one NaN is as good as another.
#[track_caller]
fn same_bits(what: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let same = found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan());
        assert!(same, "{what}: [{index}] is {found:e}, the plain twin has {wanted:e}");
    }
}

/// Runs `kernel` with every implementation and holds it against the plain twin.
#[track_caller]
pub(crate) fn check(what: &str, kernel: impl Fn(Isa) -> Vec<f32>) {
    let wanted = kernel(Isa::Plain);
    for isa in Isa::available() {
        same_bits(&format!("{} {what} (seed {SEED})", isa.name()), &kernel(isa), &wanted);
    }
}

struct Q8Case {
    matrix: PackedQ8,
    quants: Vec<i8>,
    scales: Vec<f32>,
    num_outputs: usize,
}

impl Q8Case {
    fn random(rng: &mut Rng, out_len: usize, in_len: usize, num_rows: usize) -> Self {
        let weights = bytes(rng, out_len * in_len);
        let scales = floats(rng, weights.len() / QUANT_BLOCK_LEN, 0);
        let scales: Vec<f16> = scales.iter().map(|&scale| f16::from_f32(scale)).collect();
        let matrix = PackedQ8::pack(out_len, in_len, &weights, &scales).unwrap();
        let odd_in = if rng.one_in(3) { 20 } else { 0 };
        let mut quants = bytes(rng, num_rows * in_len);
        quants.iter_mut().for_each(|quant| *quant = (*quant).max(-127));
        let scales = floats(rng, quants.len() / QUANT_BLOCK_LEN, odd_in);
        let num_outputs = matrix.num_strips() * num_rows;
        Self { matrix, quants, scales, num_outputs }
    }

    fn product(&self, isa: Isa) -> Vec<f32> {
        let mut out = vec![StripOutput::default(); self.num_outputs];
        let input = QuantRows { quants: &self.quants, scales: &self.scales };
        let strips = self.matrix.strips(0..self.matrix.num_strips());
        kernels::product_q8_0(isa, strips, input, &mut out);
        out.into_flattened()
    }
}

#[test]
fn q8_0_product_equals_its_twin() {
    timed("kernels q8_0 product", 3.0, || {
        let mut rng = Rng::new(SEED);
        for out_len in [1, 7, 8, 9, 15, 16, 17, 40, 67] {
            for num_rows in 0..=9 {
                for in_len in [32, 64, 96, 256] {
                    let case = Q8Case::random(&mut rng, out_len, in_len, num_rows);
                    let what = format!("q8_0 product {out_len}x{in_len}, {num_rows} rows");
                    check(&what, |isa| case.product(isa));
                }
            }
        }
    });
}

#[test]
fn f32_product_equals_its_twin() {
    timed("kernels f32 product", 3.0, || {
        let mut rng = Rng::new(SEED + 1);
        for out_len in [1, 7, 8, 9, 16, 23, 24, 25, 32, 33, 40, 67] {
            for num_rows in 0..=9 {
                for in_len in [1, 2, 7, 8, 33] {
                    let odd_in = if rng.one_in(3) { 30 } else { 0 };
                    let weights = floats(&mut rng, out_len * in_len, 0);
                    let matrix = PackedF32::pack(out_len, in_len, &weights).unwrap();
                    let input = floats(&mut rng, num_rows * in_len, odd_in);
                    check(&format!("f32 product {out_len}x{in_len}, {num_rows} rows"), |isa| {
                        let mut out = vec![StripOutput::default(); matrix.num_strips() * num_rows];
                        let strips = matrix.strips(0..matrix.num_strips());
                        kernels::product_f32(isa, strips, &input, &mut out);
                        out.into_flattened()
                    });
                }
            }
        }
    });
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
        check("quantise", |isa| {
            let (mut quants, mut scales) = (vec![1_i8; values.len()], vec![1.0; 4]);
            kernels::quantise(isa, &values, &mut quants, &mut scales);
            assert!(!quants.contains(&-128), "quants stay within 127");
            quants.iter().map(|&quant| f32::from(quant)).chain(scales).collect()
        });
    }
}

#[test]
fn quantisation_keeps_its_promises() {
    let quantise = |block: &[f32; 32]| {
        let (mut quants, mut scale) = ([1; 32], [1.0]);
        kernels::quantise(Isa::Plain, block, &mut quants, &mut scale);
        (quants, scale[0])
    };
    let mut block = [0.0; 32];
    assert_eq!(quantise(&block), ([0; 32], 0.0));
    block[3] = AMAX_MIN / 2.0;
    assert_eq!(quantise(&block), ([0; 32], 0.0));
    block[4] = -254.0;
    block[5] = 127.0;
    block[6] = 5.0; // 2.5 quants: a tie goes to the even one
    let (quants, scale) = quantise(&block);
    assert_eq!((quants[3], quants[4], quants[5], quants[6], scale), (0, -127, 64, 2, 2.0));
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        block[31] = odd;
        let (quants, scale) = quantise(&block);
        assert!(quants == [0; 32] && scale.is_nan(), "{odd} must not be lost");
    }
}

#[test]
fn row_kernels_equal_their_twins() {
    timed("kernels rows", 3.0, || {
        let mut rng = Rng::new(SEED + 3);
        for len in 1..=300 {
            let odd_in = [0, 0, 100][len % 3];
            let x = floats(&mut rng, len, odd_in);
            let y = floats(&mut rng, len, odd_in);
            check(&format!("rms_norm {len}"), |isa| {
                let mut out = vec![0.0; len];
                kernels::rms_norm(isa, &x, &y, 1e-5, &mut out);
                out
            });
            check(&format!("swiglu {len}"), |isa| {
                let mut gate: Vec<f32> = x.iter().map(|x| x * 30.0).collect();
                kernels::swiglu(isa, &mut gate, &y);
                gate
            });
        }
    });
}

/// Distance in units in the last place of f32 between a result and the exact value.
fn ulps(found: f32, exact: f64) -> f64 {
    let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
    (f64::from(found) - exact).abs() / ulp
}

#[test]
fn exponential_is_accurate_and_equals_its_twin() {
    timed("kernels exp", 3.0, || {
        let mut values: Vec<f32> =
            (0..=u32::MAX / 2111).map(|i| f32::from_bits(i * 2111)).collect();
        values.extend((-2_000_000..2_000_000).map(|i| i as f32 * 4.4e-5));
        values.extend(ODD);
        check("exp", |isa| {
            let mut out = values.clone();
            kernels::exp_slice(isa, &mut out);
            out
        });
        let mut worst = 0.0_f64;
        for &x in &values {
            let (found, exact) = (kernels::exp(x), math::exp(f64::from(x).clamp(-700.0, 700.0)));
            if x.is_nan() {
                assert!(found.is_nan());
            } else if exact > f64::from(f32::MAX) {
                assert!(found == f32::INFINITY || found == f32::MAX, "exp({x}) = {found}");
            } else if exact < f64::from(f32::MIN_POSITIVE) {
                assert!((f64::from(found) - exact).abs() <= 2e-45, "exp({x}) = {found:e}");
            } else {
                worst = worst.max(ulps(found, exact));
            }
        }
        assert!(worst <= f64::from(EXP_ULPS), "exp is off by {worst} ulp");
        assert_eq!(kernels::exp(0.0), 1.0);
        assert_eq!(kernels::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(kernels::exp(f32::INFINITY), f32::INFINITY);
    });
}

#[test]
fn twins_compute_what_they_say() {
    let mut rng = Rng::new(SEED + 5);
    let (out_len, in_len) = (13, 128);
    let quants = bytes(&mut rng, out_len * in_len);
    let scales: Vec<f16> =
        floats(&mut rng, quants.len() / 32, 0).iter().map(|&s| f16::from_f32(s)).collect();
    let matrix = PackedQ8::pack(out_len, in_len, &quants, &scales).unwrap();
    let input = floats(&mut rng, in_len, 0);
    let (mut input_quants, mut input_scales) = (vec![0; in_len], vec![0.0; in_len / 32]);
    kernels::quantise(Isa::Plain, &input, &mut input_quants, &mut input_scales);
    let mut out = vec![StripOutput::default(); 2];
    let rows = QuantRows { quants: &input_quants, scales: &input_scales };
    kernels::product_q8_0(Isa::Plain, matrix.strips(0..2), rows, &mut out);
    let mut row = vec![0.0; in_len];
    let exact: Vec<f64> = (0..out_len)
        .map(|o| {
            matrix.read_row(o, &mut row);
            for (k, &weight) in row.iter().enumerate() {
                let scale = scales[(o * in_len + k) / 32].to_f32();
                assert_eq!(weight, scale * f32::from(quants[o * in_len + k]), "weights survive");
            }
            let weights = row.iter().map(|&weight| f64::from(weight));
            weights.zip(&input).map(|(weight, &x)| weight * f64::from(x)).sum()
        })
        .collect();
    let largest = exact.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    for (found, exact) in out.as_flattened().iter().zip(&exact) {
        assert!((f64::from(*found) - exact).abs() < 0.02 * largest, "{found} is not {exact}");
    }
    assert_eq!(out.as_flattened()[out_len..], [0.0; 3], "padding is zero");
}

#[test]
fn a_row_of_a_product_does_not_see_the_others() {
    let mut rng = Rng::new(SEED + 6);
    let mut case = Q8Case::random(&mut rng, 24, 64, 9);
    for isa in Isa::available() {
        let together = case.product(isa);
        let (quants, scales) = (case.quants.clone(), case.scales.clone());
        for row in 0..9 {
            case.quants = quants[row * 64..(row + 1) * 64].to_vec();
            case.scales = scales[row * 2..(row + 1) * 2].to_vec();
            case.num_outputs = 3;
            let alone = case.product(isa);
            for (strip, wanted) in alone.chunks(8).enumerate() {
                let at = (strip * 9 + row) * 8;
                same_bits("a row in company", &together[at..at + 8], wanted);
            }
        }
        (case.quants, case.scales, case.num_outputs) = (quants, scales, 27);
    }
}

#[test]
fn a_team_calls_every_tile_once() {
    timed("kernels team", 3.0, || {
        for threads in [1, 2, 3, 7] {
            let mut team = Team::new(threads).unwrap();
            for num_tiles in (0..400).chain([10_000]) {
                let mut data = vec![0_u32; num_tiles * 3 + 2];
                team.run_chunks(&mut data, 3, |tile, chunk| {
                    chunk.iter_mut().for_each(|item| *item += tile as u32 + 1);
                });
                for (index, &item) in data.iter().enumerate() {
                    assert_eq!(
                        item as usize,
                        index / 3 + 1,
                        "{threads} threads, {num_tiles} tiles"
                    );
                }
            }
        }
    });
}

#[test]
fn a_panic_in_a_tile_reaches_the_caller_and_the_team_goes_on() {
    for threads in [1, 2, 4] {
        let mut team = Team::new(threads).unwrap();
        for bad_tile in 0..60 {
            let calls = AtomicUsize::new(0);
            let run = catch_unwind(AssertUnwindSafe(|| {
                team.run(60, &|tile| {
                    calls.fetch_add(1, Ordering::Relaxed);
                    // Without the hook's message: this one is expected.
                    if tile == bad_tile {
                        std::panic::resume_unwind(Box::new("a bad tile"));
                    }
                });
            }));
            let panic = run.expect_err("the panic is passed on");
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"a bad tile"));
            calls.store(0, Ordering::Relaxed);
            team.run(60, &|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(calls.into_inner(), 60, "the team still works");
        }
    }
}
