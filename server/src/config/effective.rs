//! Owns how the configuration in effect is printed: as a TOML file that can be used as it is, and
//! as JSON. Checks nothing.

use std::fmt::Write;

use clap::ArgMatches;
use serde_json::{Map, Value, json};

use super::error::Origin;
use super::layers::Layers;
use super::setting::{self, Kind, Setting};
use super::units::{ByteCount, TimeSpan, TimeSpanOrOff};
use super::{Config, EMBEDDED, ModelChoice, NONE};

/// Column at which comments begin, where the line before them is not longer.
const COMMENT_COLUMN: usize = 44;

/// The configuration as a TOML file. Each line says where its value comes from; what nobody set and
/// has no fixed default is a comment, so that the file means the same on other machines.
pub(crate) fn toml(layers: &Layers, flags: &ArgMatches, config: &Config) -> String {
    let mut out = format!(
        "# Effective configuration of slipstream {}. Use it with --config FILE.\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut heading = String::new();
    for setting in setting::all() {
        if setting.heading != heading {
            heading.clone_from(&setting.heading);
            out.push_str(&format!("\n# {heading}\n"));
        }
        let (line, comment) = match value(&setting, flags) {
            Some(value) => {
                let line = format!("{} = {}", setting.key, toml_value(&value));
                (line, layers.origin(&setting.flag).to_string())
            }
            None => unset(&setting, config),
        };
        let _ = writeln!(out, "{line:<COMMENT_COLUMN$} # {comment}"); // memory takes everything
    }
    out
}

/// The line and its comment for what nobody set.
fn unset(setting: &Setting, config: &Config) -> (String, String) {
    let meaning = setting.derived_default.unwrap_or_default();
    let line = match derived(setting, config) {
        Some(value) => format!("# {} = {}", setting.key, toml_value(&value)),
        None => format!("# {} is not set", setting.key),
    };
    (line, format!("default: {meaning}"))
}

/// The configuration as JSON: each setting with its value, the layer it comes from, and, where
/// nobody set it, what that means.
pub(crate) fn json(layers: &Layers, flags: &ArgMatches, config: &Config) -> Value {
    let mut settings = Map::new();
    for setting in setting::all() {
        let set = value(&setting, flags);
        let mut entry = Map::new();
        let value = set.clone().or_else(|| derived(&setting, config));
        entry.insert("value".to_owned(), value.unwrap_or(Value::Null));
        if let (None, Some(meaning)) = (set, setting.derived_default) {
            entry.insert("meaning".to_owned(), meaning.into());
        }
        add_origin(&mut entry, &layers.origin(&setting.flag));
        settings.insert(setting.key, Value::Object(entry));
    }
    json!({ "version": env!("CARGO_PKG_VERSION"), "settings": settings })
}

fn add_origin(entry: &mut Map<String, Value>, origin: &Origin) {
    let (source, details) = match origin {
        Origin::Default => ("default", vec![]),
        Origin::File { path, line } => {
            let path = path.display().to_string();
            ("file", vec![("file", json!(path)), ("line", json!(line))])
        }
        Origin::Environment { variable } => ("environment", vec![("variable", json!(variable))]),
        Origin::CommandLine => ("command_line", vec![]),
    };
    entry.insert("source".to_owned(), source.into());
    entry.extend(details.into_iter().map(|(name, value)| (name.to_owned(), value)));
}

/// The value that some layer or a fixed default gives.
fn value(setting: &Setting, flags: &ArgMatches) -> Option<Value> {
    let id = &setting.id;
    match &setting.kind {
        Kind::Boolean => flags.get_one::<bool>(id).map(|value| json!(value)),
        Kind::Size => flags.get_one::<ByteCount>(id).map(|size| json!(size.to_string())),
        Kind::Time => flags.get_one::<TimeSpan>(id).map(|time| json!(time.to_string())),
        Kind::TimeOrOff => flags.get_one::<TimeSpanOrOff>(id).map(|time| json!(time.to_string())),
        Kind::Integer => {
            let text = flags.get_raw(id)?.next()?.to_str()?;
            text.parse::<u64>().ok().map(|number| json!(number))
        }
        Kind::Choice(_) | Kind::Text => {
            flags.get_raw(id)?.next().map(|text| json!(text.to_string_lossy()))
        }
    }
}

/// What a setting without a fixed default became on this machine, where it is known by now.
fn derived(setting: &Setting, config: &Config) -> Option<Value> {
    let choice = |choice: Option<&ModelChoice>| match choice {
        Some(ModelChoice::Embedded) => json!(EMBEDDED),
        Some(ModelChoice::Path(path)) => json!(path.display().to_string()),
        None => json!(NONE),
    };
    match setting.flag.as_str() {
        "model" => Some(choice(Some(&config.models.verifier))),
        "draft-model" => Some(choice(config.models.draft.as_ref())),
        "threads" => Some(json!(config.models.threads)),
        _ => None, // the others depend on the model
    }
}

/// A value as TOML writes it. JSON's strings are TOML's, but for one character.
fn toml_value(value: &Value) -> String {
    value.to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::toml_value;

    #[test]
    fn any_text_survives_toml() {
        let text: String = ('\0'..='\u{ff}').chain("\u{2028}😀\"\\".chars()).collect();
        let line = format!("text = {}", toml_value(&serde_json::json!(text)));
        let table: toml::Table = toml::from_str(&line).expect("valid");
        assert_eq!(table["text"].as_str(), Some(text.as_str()));
    }
}
