//! Owns a strict reader of Prometheus's text format 0.0.4, written from its description and not
//! from any encoder. Knows no metric.

use std::collections::{BTreeMap, BTreeSet};

/// Labels of one sample.
pub type Labels = BTreeMap<String, String>;

/// One line with a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its name, with `_bucket`, `_sum` or `_count` for parts of a histogram.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
    /// Its value.
    pub value: f64,
}

/// One metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its help.
    pub help: String,
    /// Its values.
    pub samples: Vec<Sample>,
}

/// A whole page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// Metrics by name.
    pub families: BTreeMap<String, Family>,
}

impl Page {
    /// Reads a page.
    ///
    /// # Errors
    /// The first line that the format does not have, or what a histogram lacks.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.is_empty() && !text.ends_with('\n') {
            return Err("the last line has no end".to_owned());
        }
        let mut families: Vec<Family> = Vec::new();
        for line in text.lines() {
            take_line(line, &mut families).map_err(|problem| format!("{problem}: {line:?}"))?;
        }
        let mut page = Self::default();
        for family in families {
            check(&family).map_err(|problem| format!("{}: {problem}", family.name))?;
            let name = family.name.clone();
            if page.families.insert(name.clone(), family).is_some() {
                return Err(format!("{name} comes twice"));
            }
        }
        Ok(page)
    }

    /// The value of the sample `name` with exactly these labels.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels: Labels = labels.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        let mut samples = self.families.values().flat_map(|family| &family.samples);
        let found = samples.find(|sample| sample.name == name && sample.labels == labels);
        found.map(|sample| sample.value)
    }

    /// The value of the one sample `name` without labels.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn number(&self, name: &str) -> f64 {
        self.value(name, &[]).unwrap_or_else(|| panic!("{name} is not shown"))
    }

    /// Whatever may only grow, by name and labels.
    #[must_use]
    pub fn growing(&self) -> BTreeMap<(String, Labels), f64> {
        let growing = self.families.values().filter(|family| family.kind != "gauge");
        let samples = growing.flat_map(|family| &family.samples);
        samples.map(|s| ((s.name.clone(), s.labels.clone()), s.value)).collect()
    }
}

fn take_line(line: &str, families: &mut Vec<Family>) -> Result<(), &'static str> {
    if let Some(rest) = line.strip_prefix("# HELP ") {
        let (name, help) = rest.split_once(' ').ok_or("a help without text")?;
        families.push(Family {
            name: name.to_owned(),
            kind: String::new(),
            help: help.to_owned(),
            samples: Vec::new(),
        });
        return if is_name(name, true) { Ok(()) } else { Err("a name that is none") };
    }
    let family = families.last_mut().ok_or("something before the first help")?;
    if let Some(rest) = line.strip_prefix("# TYPE ") {
        let (name, kind) = rest.split_once(' ').ok_or("a type without a kind")?;
        let is_known = ["counter", "gauge", "histogram"].contains(&kind);
        let is_in_order = name == family.name && family.kind.is_empty();
        kind.clone_into(&mut family.kind);
        return if is_known && is_in_order { Ok(()) } else { Err("a type out of place") };
    }
    if family.kind.is_empty() {
        return Err("a value before its type");
    }
    let sample = sample(line)?;
    let part = sample.name.strip_prefix(&family.name).ok_or("a value of another metric")?;
    let is_right = match family.kind.as_str() {
        "histogram" => ["_bucket", "_sum", "_count"].contains(&part),
        _ => part.is_empty(),
    };
    family.samples.push(sample);
    if is_right { Ok(()) } else { Err("a value that its kind does not have") }
}

fn is_name(name: &str, may_have_colon: bool) -> bool {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || c == '_' || (c == ':' && may_have_colon);
    name.chars().all(is_fine) && !name.starts_with(|c: char| c.is_ascii_digit()) && !name.is_empty()
}

fn sample(line: &str) -> Result<Sample, &'static str> {
    let name_len = line.find(['{', ' ']).ok_or("a value without a name")?;
    let (name, mut rest) = line.split_at(name_len);
    let mut labels = Labels::new();
    if let Some(mut inside) = rest.strip_prefix('{') {
        while !inside.starts_with('}') {
            let (label, tail) = inside.split_once("=\"").ok_or("a label without a value")?;
            let (value, tail) = quoted(tail)?;
            if !is_name(label, false) || labels.insert(label.to_owned(), value).is_some() {
                return Err("a label that is none, or twice");
            }
            inside = tail.strip_prefix(',').unwrap_or(tail);
        }
        rest = &inside[1..];
    }
    let value = rest.strip_prefix(' ').ok_or("no value")?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        _ => value.parse().map_err(|_| "a value that is no number")?,
    };
    if !is_name(name, true) {
        return Err("a name that is none");
    }
    Ok(Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quotation mark, and what follows it.
fn quoted(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((index, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[index + 1..])),
            '\\' => value.push(match chars.next() {
                Some((_, 'n')) => '\n',
                Some((_, c @ ('"' | '\\'))) => c,
                _ => return Err("an escape that is none"),
            }),
            _ => value.push(c),
        }
    }
    Err("a value without an end")
}

/// Checks what the lines of one metric must be together.
fn check(family: &Family) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for sample in &family.samples {
        if !seen.insert((&sample.name, &sample.labels)) {
            return Err(format!("comes twice: {:?}", sample.labels));
        }
        if family.kind != "gauge" && (sample.value < 0.0 || !sample.value.is_finite()) {
            return Err(format!("{} cannot have counted {}", sample.name, sample.value));
        }
    }
    if family.samples.is_empty() {
        return Err("has no values".to_owned());
    }
    if family.kind == "histogram" { check_histogram(family) } else { Ok(()) }
}

/// Bounds ascend to infinity, counts do not fall, and the last is the count of all.
fn check_histogram(family: &Family) -> Result<(), String> {
    let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    let mut ends: BTreeMap<Labels, [Option<f64>; 2]> = BTreeMap::new();
    for sample in &family.samples {
        let mut labels = sample.labels.clone();
        let bound = labels.remove("le");
        match (bound, sample.name.ends_with("_count")) {
            (Some(bound), _) if sample.name.ends_with("_bucket") => {
                let bound = bound.replace("+Inf", "inf").parse().map_err(|_| "an odd bound")?;
                buckets.entry(labels).or_default().push((bound, sample.value));
            }
            (None, true) => ends.entry(labels).or_default()[0] = Some(sample.value),
            (None, false) => ends.entry(labels).or_default()[1] = Some(sample.value),
            (Some(_), _) => return Err("a bound where none belongs".to_owned()),
        }
    }
    for (labels, buckets) in &buckets {
        let ascends = buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1);
        let last = buckets.last().ok_or("no buckets")?;
        let ends = ends.get(labels).ok_or("no count and sum")?;
        if !ascends || !last.0.is_infinite() || ends[0] != Some(last.1) || ends[1].is_none() {
            return Err(format!("buckets, count and sum do not fit: {buckets:?}, {ends:?}"));
        }
    }
    if buckets.len() == ends.len() { Ok(()) } else { Err("parts are missing".to_owned()) }
}
