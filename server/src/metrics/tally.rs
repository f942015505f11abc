//! Owns counting by a label: one number per value of a closed set. Anybody may add at any time
//! without waiting; readers see each number by itself.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};

use super::metric::Sample;

/// A label with a closed set of values.
pub(crate) trait Label: Copy + 'static {
    /// Every value once, at the place that [`index`](Self::index) says.
    const ALL: &'static [Self];

    /// Its place among all.
    fn index(self) -> usize;

    /// What the label shows.
    fn name(self) -> &'static str;
}

/// One number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// Counts one more.
    pub(crate) fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The count so far.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts by the `N` values of a label.
#[derive(Debug)]
pub(crate) struct Tally<const N: usize>([Count; N]);

impl<const N: usize> Default for Tally<N> {
    fn default() -> Self {
        Self(array::from_fn(|_| Count::default()))
    }
}

impl<const N: usize> Tally<N> {
    /// Counts one more with this label.
    pub(crate) fn add(&self, label: impl Label) {
        self.0[label.index()].add_one();
    }

    /// The count of one place.
    pub(crate) fn at(&self, index: usize) -> u64 {
        self.0[index].get()
    }

    /// One sample per value of the label.
    pub(crate) fn samples<L: Label>(&self) -> Vec<Sample> {
        let all = L::ALL.iter();
        all.map(|label| (vec![label.name().to_owned()], self.at(label.index()) as f64)).collect()
    }
}
