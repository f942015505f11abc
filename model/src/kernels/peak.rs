//! Owns the highest speed that the products could reach on this machine: their multiply-add
//! instructions on registers, without memory. For measurements only; computes nothing of use.

use super::Isa;

/// Instructions that products of a kind of weights multiply with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// 8-bit weights with quantised input.
    Q8_0,
    /// 4-bit weights with quantised input.
    Q4_0,
    /// Weights that are floats, or widened to them.
    Floats,
}

/// One implementation: makes so many rounds of a mix and returns the multiply-adds of a round.
pub(super) type Peak = fn(Mix, u64) -> u64;

/// Makes at least `at_least` multiply-adds as fast as this implementation can and returns how many
/// it made. The caller takes the time. `None` for [`Isa::Plain`], whose speed is the compiler's
/// affair.
#[must_use]
pub fn multiply_adds(isa: Isa, mix: Mix, at_least: u64) -> Option<u64> {
    let peak = isa.kernels().peak?;
    let per_round = peak(mix, 0);
    let rounds = at_least.div_ceil(per_round);
    peak(mix, rounds);
    Some(rounds.saturating_mul(per_round))
}

#[cfg(test)]
mod tests {
    use super::{Isa, Mix, multiply_adds};

    #[test]
    fn all_but_the_plain_twins_have_a_peak() {
        for isa in Isa::available() {
            for mix in [Mix::Q8_0, Mix::Q4_0, Mix::Floats] {
                let made = multiply_adds(isa, mix, 1000);
                assert_eq!(made.is_none(), isa == Isa::Plain, "{} {mix:?}", isa.name());
                assert!(made.is_none_or(|made| (1000..3000).contains(&made)), "{made:?}");
            }
        }
    }
}
