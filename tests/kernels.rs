//! Proves that every implementation of the kernels that this CPU has equals the plain twin bit for
//! bit, at all edges of tiles and with NaN, infinities and extreme integers; that the twins compute
//! what they say; and that the thread team calls every tile once, whatever panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use slipstream_model::kernels::team::Team;
use slipstream_model::kernels::tile::Grid;
use slipstream_model::kernels::{self, EXP_ULPS};
use slipstream_model::math;
use slipstream_tests::kernel_checks::{ODD, check, floats};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

const SEED: u64 = 20_261_121;

#[test]
fn row_kernels_equal_their_twins() {
    timed("kernels rows", 3.0, || {
        let mut rng = Rng::new(SEED + 3);
        for len in 1..=300 {
            let odd_in = [0, 0, 100][len % 3];
            let x = floats(&mut rng, len, odd_in);
            let y = floats(&mut rng, len, odd_in);
            check(&format!("rms_norm {len}"), SEED, |isa| {
                let mut out = vec![0.0; len];
                kernels::rms_norm(isa, &x, &y, 1e-5, &mut out);
                out
            });
            check(&format!("swiglu {len}"), SEED, |isa| {
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
        check("exp", SEED, |isa| {
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
fn tiles_of_several_matrices_are_written_once_where_they_belong() {
    for threads in [1, 2, 3] {
        let mut team = Team::new(threads).unwrap();
        for (num_rows, tile_rows) in [(0, 4), (1, 8), (5, 2), (9, 9), (13, 4)] {
            for (row_len, tile_columns) in [(1, 16), (16, 16), (37, 16), (48, 5)] {
                let grid = |row_len| Grid { num_rows, row_len, tile_rows, tile_columns };
                let mut parts = [vec![0.0; num_rows * row_len], vec![0.0; num_rows * 7]];
                let [first, second] = &mut parts;
                let grids = [(&mut first[..], grid(row_len)), (&mut second[..], grid(7))];
                team.run_tiles(grids, |part, place, mut tile| {
                    assert_eq!(tile.num_rows(), place.rows.len());
                    for (offset, row) in place.rows.enumerate() {
                        let columns = place.columns.clone().zip(tile.row_mut(offset));
                        columns.for_each(|(column, to)| *to += at(part, row, column));
                    }
                });
                for (part, (data, row_len)) in parts.iter().zip([row_len, 7]).enumerate() {
                    for (index, &found) in data.iter().enumerate() {
                        assert_eq!(found, at(part, index / row_len, index % row_len));
                    }
                }
            }
        }
    }
}

/// A number that says where it belongs.
fn at(part: usize, row: usize, column: usize) -> f32 {
    (part * 10_000 + row * 100 + column + 1) as f32
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
