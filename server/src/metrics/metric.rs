//! Owns what a metric is: its name, kind, unit, labels, help, and where its values come from at a
//! scrape. Knows no particular metric.

use prometheus::Histogram;

use super::Metrics;
use super::reading::Reading;

/// What a metric does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, from zero at the start of the process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations in buckets; only grows.
    Histogram,
}

impl Kind {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// What a value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Seconds; names say so.
    Seconds,
    /// Bytes; names say so.
    Bytes,
    /// A share from 0 to 1.
    Share,
    /// 1 for yes, 0 for no.
    Flag,
    /// Whole things of this kind.
    Number(&'static str),
}

impl Unit {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Seconds => "seconds",
            Self::Bytes => "bytes",
            Self::Share => "0 to 1",
            Self::Flag => "0 or 1",
            Self::Number(things) => things,
        }
    }
}

/// One value of a metric with labels: the labels' values in the order of their names.
pub(crate) type Sample = (Vec<String>, f64);

/// One histogram of a metric, with the values of its labels.
pub(crate) type Observed<'a> = (Vec<String>, &'a Histogram);

/// Where the values come from.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// One value, or none where it cannot be known.
    One(fn(&Reading<'_>) -> Option<f64>),
    /// One value per set of labels; their number is bounded by a constant.
    Many(fn(&Reading<'_>) -> Vec<Sample>),
    /// Observations per set of labels.
    Histograms(for<'a> fn(&'a Metrics) -> Vec<Observed<'a>>),
}

/// A metric. Everything that is shown at `/metrics` is one of these.
#[derive(Clone, Copy)]
pub struct Metric {
    /// Its name; begins with `slipstream_`.
    pub name: &'static str,
    /// What it does over time.
    pub kind: Kind,
    /// What its values count.
    pub unit: Unit,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it means, for those who look at a graph of it.
    pub help: &'static str,
    /// The name that dashboards made for other servers know it by, shown at `/metrics/vllm`.
    pub de_facto: Option<&'static str>,
    pub(super) source: Source,
}

impl Metric {
    /// A counter without labels.
    pub(super) const fn counter(
        name: &'static str,
        unit: Unit,
        help: &'static str,
        read: fn(&Reading<'_>) -> Option<f64>,
    ) -> Self {
        let source = Source::One(read);
        Self { name, kind: Kind::Counter, unit, labels: &[], help, de_facto: None, source }
    }

    /// A gauge without labels.
    pub(super) const fn gauge(
        name: &'static str,
        unit: Unit,
        help: &'static str,
        read: fn(&Reading<'_>) -> Option<f64>,
    ) -> Self {
        Self { kind: Kind::Gauge, ..Self::counter(name, unit, help, read) }
    }

    /// A counter with one value per set of labels.
    pub(super) const fn counter_by(
        name: &'static str,
        unit: Unit,
        help: &'static str,
        labels: &'static [&'static str],
        read: fn(&Reading<'_>) -> Vec<Sample>,
    ) -> Self {
        let source = Source::Many(read);
        Self { name, kind: Kind::Counter, unit, labels, help, de_facto: None, source }
    }

    /// A gauge with one value per set of labels.
    pub(super) const fn gauge_by(
        name: &'static str,
        unit: Unit,
        help: &'static str,
        labels: &'static [&'static str],
        read: fn(&Reading<'_>) -> Vec<Sample>,
    ) -> Self {
        Self { kind: Kind::Gauge, ..Self::counter_by(name, unit, help, labels, read) }
    }

    /// A histogram without labels.
    pub(super) const fn histogram(
        name: &'static str,
        unit: Unit,
        help: &'static str,
        observed: for<'a> fn(&'a Metrics) -> Vec<Observed<'a>>,
    ) -> Self {
        Self::histogram_by(name, unit, help, &[], observed)
    }

    /// A histogram per set of labels.
    pub(super) const fn histogram_by(
        name: &'static str,
        unit: Unit,
        help: &'static str,
        labels: &'static [&'static str],
        observed: for<'a> fn(&'a Metrics) -> Vec<Observed<'a>>,
    ) -> Self {
        let source = Source::Histograms(observed);
        Self { name, kind: Kind::Histogram, unit, labels, help, de_facto: None, source }
    }

    /// The same, known to dashboards under another name, too.
    pub(super) const fn also(self, de_facto: &'static str) -> Self {
        Self { de_facto: Some(de_facto), ..self }
    }
}
