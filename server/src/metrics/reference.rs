//! Owns the page of documentation that is made from the table. Knows no values.

use std::fmt::Write as _;

use super::names::METRICS;

/// What stands above the table.
const HEAD: &str = "\
# Metrics

Made from `server/src/metrics/names.rs`; a test compares.
`SLIPSTREAM_WRITE_DOCS=1 cargo test --release -p slipstream-tests documentation` writes it anew.

- `/metrics`: everything below, in Prometheus's text format 0.0.4. Counters begin at zero with the
  process.
- `/metrics/vllm`: what has a second name below, under that name, so that dashboards made for other
  servers work; `vllm:` metrics carry the label `model_name`. Empty until the model is loaded.
- `/health`: 200 while the process is sound, whatever its stage; 503 when the engine has been inside
  one step for longer than `--step-limit` or has ended. After twice the limit the server ends.
- `/ready`: 200 while requests are taken; 503 while loading, draining or unsound. A slow, failing or
  quarantined draft changes neither.
- `/version`: version, numerics version, instruction set, model and fingerprint.

All answer GET and HEAD. Another path gets 404, another gRPC method UNIMPLEMENTED. A metric without
a value, such as the model's name before it is loaded, is left out.

";

/// The text of `docs/metrics.md`.
#[must_use]
pub fn markdown() -> String {
    let mut text = HEAD.to_owned();
    text.push_str(
        "| name | kind | unit | labels | meaning | also as |\n|---|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        let labels: Vec<String> = metric.labels.iter().map(|name| format!("`{name}`")).collect();
        let also = metric.de_facto.map_or(String::new(), |name| format!("`{name}`"));
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {also} |",
            metric.name,
            metric.kind.name(),
            metric.unit.name(),
            labels.join(", "),
            metric.help,
        );
    }
    text
}
