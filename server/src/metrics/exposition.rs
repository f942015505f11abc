//! Owns turning the table and one reading into Prometheus's text format, under our names and under
//! those that dashboards know. Knows no particular metric.

use prometheus::core::Metric as _;
use prometheus::proto::{Counter, Gauge, LabelPair, MetricFamily, MetricType};
use prometheus::{TextEncoder, proto};

use super::Metrics;
use super::metric::{Kind, Metric, Source};
use super::names::METRICS;
use super::reading::Reading;

/// Begins the names that one server's dashboards made common.
pub(super) const VLLM: &str = "vllm:";
/// The label that those dashboards choose a model by.
const MODEL_NAME: &str = "model_name";

/// Everything under our own names.
pub(super) fn own(metrics: &Metrics) -> String {
    let reading = Reading::take(metrics);
    let families = METRICS.iter().filter_map(|metric| family(metric, &reading));
    encode(&families.collect::<Vec<_>>())
}

/// What has a de-facto name, under that name. Empty until the model's name is known: it is a label.
pub(super) fn de_facto(metrics: &Metrics) -> String {
    let Some(served) = metrics.served.get() else { return String::new() };
    let reading = Reading::take(metrics);
    let families = METRICS.iter().filter_map(|metric| {
        let name = metric.de_facto?;
        let mut family = family(metric, &reading)?;
        family.set_name(name.to_owned());
        if name.starts_with(VLLM) {
            for metric in family.mut_metric() {
                let mut labels = metric.take_label();
                labels.push(label(MODEL_NAME, &served.model));
                metric.set_label(labels);
            }
        }
        Some(family)
    });
    encode(&families.collect::<Vec<_>>())
}

fn encode(families: &[MetricFamily]) -> String {
    TextEncoder::new().encode_to_string(families).expect("families are named and not empty")
}

/// One metric as it stands; `None` when it has no value now.
fn family(metric: &Metric, reading: &Reading<'_>) -> Option<MetricFamily> {
    let values: Vec<proto::Metric> = match metric.source {
        Source::One(read) => {
            let value = read(reading).map(|value| number(metric.kind, Vec::new(), value));
            value.into_iter().collect()
        }
        Source::Many(read) => {
            let samples = read(reading).into_iter();
            samples
                .map(|(values, value)| number(metric.kind, labels(metric, &values), value))
                .collect()
        }
        Source::Histograms(observed) => {
            let histograms = observed(reading.metrics).into_iter();
            histograms
                .map(|(values, histogram)| {
                    let mut value = histogram.metric();
                    value.set_label(labels(metric, &values));
                    value
                })
                .collect()
        }
    };
    if values.is_empty() {
        return None;
    }
    let mut family = MetricFamily::default();
    family.set_name(metric.name.to_owned());
    family.set_help(metric.help.to_owned());
    family.set_field_type(match metric.kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge => MetricType::GAUGE,
        Kind::Histogram => MetricType::HISTOGRAM,
    });
    family.set_metric(values);
    Some(family)
}

fn number(kind: Kind, labels: Vec<LabelPair>, value: f64) -> proto::Metric {
    let mut number = proto::Metric::from_label(labels);
    match kind {
        Kind::Counter => {
            let mut counter = Counter::default();
            counter.set_value(value);
            number.set_counter(counter);
        }
        Kind::Gauge => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            number.set_gauge(gauge);
        }
        Kind::Histogram => unreachable!("histograms come as histograms"),
    }
    number
}

fn labels(metric: &Metric, values: &[String]) -> Vec<LabelPair> {
    assert_eq!(metric.labels.len(), values.len(), "labels of {}", metric.name);
    metric.labels.iter().zip(values).map(|(name, value)| label(name, value)).collect()
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}
