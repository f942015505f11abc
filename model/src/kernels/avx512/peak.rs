//! Owns the multiply-adds of the AVX-512 products on registers alone, see `avx2/peak.rs`. Both
//! formats are multiplied by the same instruction; floats run on the AVX2 kernels.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::super::avx2;
use super::super::packed::GroupLanes;
use super::super::peak::Mix;
use super::load_group;

/// Chains side by side.
const CHAINS: usize = 12;

/// Makes rounds of a mix and returns the multiply-adds of one.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn peak(mix: Mix, rounds: u64) -> u64 {
    match mix {
        Mix::Q8_0 | Mix::Q4_0 => {
            quants(rounds);
            (64 * CHAINS) as u64
        }
        Mix::Floats => avx2::peak::peak(mix, rounds),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn quants(rounds: u64) {
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for (index, sum) in sums.iter_mut().enumerate() {
        *sum = load_group(&black_box(GroupLanes([index as i8 + 1; 64])));
    }
    let weights = load_group(&black_box(GroupLanes([3; 64])));
    for _ in 0..rounds {
        for sum in &mut sums {
            // The sums are the inputs, so that no round can be left out.
            *sum = _mm512_dpbusd_epi32(*sum, weights, *sum);
        }
    }
    for sum in sums {
        black_box(_mm512_reduce_add_epi32(sum));
    }
}
