//! Owns the statistics that tests of laws need: the chi-square distribution, central and
//! non-central, and Poisson tails. Knows no models. Accuracy about 1e-10, plenty for a verdict.

/// `ln Gamma(x)` for `x > 0`, by Stirling's series after shifting the argument above 10.
#[must_use]
pub fn ln_gamma(x: f64) -> f64 {
    let mut shift = 0.0;
    let mut x = x;
    while x < 10.0 {
        shift -= x.ln();
        x += 1.0;
    }
    let inverse = 1.0 / x;
    let square = inverse * inverse;
    let series = inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1260.0)));
    shift + (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series
}

/// Regularised upper incomplete gamma function `Q(a, x)`: the power series below `a + 1`, Lentz's
/// continued fraction above.
#[must_use]
pub fn upper_gamma(a: f64, x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 {
        let mut term = 1.0 / a;
        let mut sum = term;
        let mut n = a;
        while term > sum * 1e-17 {
            n += 1.0;
            term *= x / n;
            sum += term;
        }
        return 1.0 - front * sum;
    }
    let mut b = x + 1.0 - a;
    let mut c = 1e300;
    let mut d = 1.0 / b;
    let mut fraction = d;
    for i in 1..10_000 {
        let i = f64::from(i);
        let numerator = -i * (i - a);
        b += 2.0;
        d = 1.0 / (numerator * d + b);
        c = b + numerator / c;
        let change = d * c;
        fraction *= change;
        if (change - 1.0).abs() < 1e-15 {
            break;
        }
    }
    front * fraction
}

/// Probability that a chi-square variable with `degrees` degrees of freedom exceeds `x`.
#[must_use]
pub fn chi_square_tail(degrees: f64, x: f64) -> f64 {
    upper_gamma(degrees / 2.0, x / 2.0)
}

/// The value that a chi-square variable exceeds with probability `alarm`.
#[must_use]
pub fn chi_square_limit(degrees: f64, alarm: f64) -> f64 {
    let (mut low, mut high) = (0.0, degrees + 10_000.0);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if chi_square_tail(degrees, middle) > alarm {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// Probability that a non-central chi-square variable exceeds `x`: the power of a test whose
/// statistic has non-centrality `lambda = N sum (p' - p)^2 / p` when `p'` is the truth. A Poisson
/// mixture of central ones.
#[must_use]
pub fn chi_square_power(degrees: f64, lambda: f64, x: f64) -> f64 {
    let half = lambda / 2.0;
    let width = 12.0 * half.sqrt() + 40.0;
    let first = (half - width).max(0.0).floor();
    let mut sum = 0.0;
    let mut j = first;
    while j < half + width {
        let weight = (j * half.max(1e-300).ln() - half - ln_gamma(j + 1.0)).exp();
        sum += weight * chi_square_tail(degrees + 2.0 * j, x);
        j += 1.0;
    }
    sum
}

/// Pearson's statistic of observed counts against probabilities. Cells of probability 0 must be
/// empty and add no degree of freedom: the result is the statistic and the degrees.
///
/// # Panics
/// When a cell of probability 0 was hit, or the lists differ in length.
#[must_use]
pub fn pearson(observed: &[u64], probabilities: &[f64]) -> (f64, f64) {
    assert_eq!(observed.len(), probabilities.len(), "one count per cell");
    let total = observed.iter().sum::<u64>() as f64;
    let mut statistic = 0.0;
    let mut cells = 0.0;
    for (cell, (&count, &probability)) in observed.iter().zip(probabilities).enumerate() {
        if probability == 0.0 {
            assert_eq!(count, 0, "cell {cell} is impossible and was hit {count} times");
            continue;
        }
        let expected = total * probability;
        statistic += (count as f64 - expected).powi(2) / expected;
        cells += 1.0;
    }
    (statistic, cells - 1.0)
}

/// The non-centrality per sample of a truth `other` tested against `probabilities`.
#[must_use]
pub fn non_centrality(probabilities: &[f64], other: &[f64]) -> f64 {
    let cells = probabilities.iter().zip(other).filter(|(p, _)| **p > 0.0);
    cells.map(|(p, q)| (q - p).powi(2) / p).sum()
}

/// Probability that a Poisson variable of this mean is at most `count`.
#[must_use]
pub fn poisson_at_most(mean: f64, count: u64) -> f64 {
    upper_gamma(count as f64 + 1.0, mean)
}

#[cfg(test)]
mod tests {
    use super::{chi_square_limit, chi_square_power, chi_square_tail, ln_gamma, poisson_at_most};

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-3), "{a} is not {b}");
    }

    #[test]
    fn known_values() {
        close(ln_gamma(0.5), 0.5 * std::f64::consts::PI.ln());
        close(ln_gamma(11.0), 3_628_800.0_f64.ln());
        // Two degrees of freedom: the tail is exp(-x / 2).
        close(chi_square_tail(2.0, 7.0), (-3.5_f64).exp());
        close(chi_square_limit(2.0, 1e-6), -2.0 * 1e-6_f64.ln());
        close(chi_square_limit(1.0, 0.05), 3.841_458_8);
        close(chi_square_limit(80.0, 0.05), 101.879_474);
        close(poisson_at_most(3.0, 1), 4.0 * (-3.0_f64).exp());
        // One degree: the power is that of a two-sided normal test.
        close(chi_square_power(1.0, 3.841_458_8, 3.841_458_8), 0.500_044_3);
        close(chi_square_power(4.0, 0.0, 5.0), chi_square_tail(4.0, 5.0));
    }
}
