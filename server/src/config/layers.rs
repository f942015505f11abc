//! Owns the order of the layers: command line, environment, configuration file, defaults. Keys of
//! the file become defaults of the flags, so clap decides and the same checks apply to all. Knows
//! what settings there are; knows no command.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use super::error::{ConfigError, Origin, PREFIX, variable};
use super::file::{self, Entry, FileError, nearest};
use super::flags::{CONFIG_FLAG, EXCLUSIVE};
use super::setting::{self, Setting};

/// Variables with our prefix that tests and benches read.
const TEST_VARIABLES: [&str; 11] = [
    "SLIPSTREAM_FLOOD_ONLY",
    "SLIPSTREAM_FLOOD_SECONDS",
    "SLIPSTREAM_RECORD_OUTPUT",
    "SLIPSTREAM_SIM_FIRST",
    "SLIPSTREAM_SIM_SECONDS",
    "SLIPSTREAM_SIM_SEED",
    "SLIPSTREAM_SIM_SEEDS",
    "SLIPSTREAM_TEST_ALONE",
    "SLIPSTREAM_UNRULY_CLIENTS",
    "SLIPSTREAM_UNRULY_SEED",
    "SLIPSTREAM_WRITE_DOCS",
];

/// Why the layers do not give settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// The command line or the environment cannot be read; or help was asked for.
    #[error(transparent)]
    Usage(#[from] Box<clap::Error>),
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Settings do not go together.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A command line with what environment and file add, and where each setting came from.
#[derive(Debug)]
pub(crate) struct Layers {
    /// What clap read.
    pub(crate) matches: ArgMatches,
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    /// Reads all layers for the subcommand that the arguments name.
    ///
    /// # Errors
    /// [`LayerError`] where one of them is wrong.
    pub(crate) fn read(command: &Command, args: &[OsString]) -> Result<Self, LayerError> {
        let parse =
            |command: &Command| command.clone().try_get_matches_from(args).map_err(Box::new);
        let first = parse(command)?;
        let Some((name, flags)) = first.subcommand() else {
            return Ok(Self { matches: first, origins: BTreeMap::new() });
        };
        let settings = setting::all();
        let entries = match config_path(flags) {
            Some(path) => file::read(&path, &settings)?,
            None => Vec::new(),
        };
        let known = command.find_subcommand(name).expect("clap knows what it parsed");
        let settings: Vec<Setting> =
            settings.into_iter().filter(|setting| arg_of(known, setting).is_some()).collect();
        let mut origins = BTreeMap::new();
        for setting in &settings {
            if let Some(origin) = origin(setting, flags, &entries) {
                origins.insert(setting.flag.clone(), origin);
            }
        }
        let losing = exclude(&mut origins)?;
        let mut command = command.clone();
        for setting in &settings {
            let loses = losing == Some(setting.flag.as_str());
            command = layered(command, name, (setting, loses), (&origins, &entries))?;
        }
        Ok(Self { matches: parse(&command)?, origins })
    }

    /// Where a setting's value came from.
    pub(crate) fn origin(&self, flag: &str) -> Origin {
        self.origins.get(flag).cloned().unwrap_or(Origin::Default)
    }

    /// The error with the layer that its value came from, where it is about a setting.
    pub(crate) fn explain(&self, error: ConfigError) -> ConfigError {
        let is_setting = setting::all().iter().any(|setting| setting.flag == error.flag());
        let origin = self.origin(error.flag());
        if is_setting { error.in_layer(origin) } else { error }
    }
}

/// The file to read, where the command reads one.
fn config_path(flags: &ArgMatches) -> Option<PathBuf> {
    flags.try_get_one::<PathBuf>(CONFIG_FLAG).ok().flatten().cloned()
}

/// The command's flag for this setting, if it has one.
fn arg_of<'a>(command: &'a Command, setting: &Setting) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_id().as_str() == setting.id)
}

/// The highest layer that sets this; `None` where only the default does.
fn origin(setting: &Setting, flags: &ArgMatches, entries: &[Entry]) -> Option<Origin> {
    match flags.value_source(&setting.id) {
        Some(ValueSource::CommandLine) => Some(Origin::CommandLine),
        Some(ValueSource::EnvVariable) => {
            Some(Origin::Environment { variable: setting.variable.clone() })
        }
        // Clap's enum may grow; what is neither of the two above was not set by anybody.
        Some(_) | None => {
            let entry = entries.iter().find(|entry| entry.key == setting.key)?;
            Some(entry.origin.clone())
        }
    }
}

/// Drops the lower one of two settings that exclude each other, and names it.
fn exclude(origins: &mut BTreeMap<String, Origin>) -> Result<Option<&'static str>, ConfigError> {
    let (one, other) = EXCLUSIVE;
    let (Some(first), Some(second)) = (origins.get(one), origins.get(other)) else {
        return Ok(None);
    };
    let loser = match rank(first).cmp(&rank(second)) {
        Ordering::Equal => {
            let problem = format!("excludes --{other}, and both are set: leave one of them out");
            return Err(ConfigError::new(one, problem).in_layer(first.clone()));
        }
        Ordering::Less => one,
        Ordering::Greater => other,
    };
    origins.remove(loser);
    Ok(Some(loser))
}

fn rank(origin: &Origin) -> u8 {
    match origin {
        Origin::Default => 0,
        Origin::File { .. } => 1,
        Origin::Environment { .. } => 2,
        Origin::CommandLine => 3,
    }
}

/// The command with what the file says about one setting, or without the variable that loses.
fn layered(
    command: Command,
    name: &str,
    (setting, loses): (&Setting, bool),
    (origins, entries): (&BTreeMap<String, Origin>, &[Entry]),
) -> Result<Command, LayerError> {
    let entry = entries.iter().find(|entry| entry.key == setting.key);
    if let Some(entry) = entry {
        let known = command.find_subcommand(name).expect("clap knows what it parsed");
        let arg = arg_of(known, setting).expect("the command has the setting");
        file::check_value(entry, arg)?;
    }
    let from_file = matches!(origins.get(&setting.flag), Some(Origin::File { .. }));
    let default = entry.filter(|_| from_file).map(|entry| entry.text.clone());
    Ok(command.mut_subcommand(name, |command| {
        command.mut_arg(&setting.id, |arg| match default {
            Some(text) => arg.default_value(text),
            None if loses => arg.env(Resettable::Reset),
            None => arg,
        })
    }))
}

/// The variable that a value clap does not take came from, if it came from one.
pub(crate) fn blamed_variable(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let ContextValue::String(arg) = error.get(ContextKind::InvalidArg)? else { return None };
    let flag = arg.strip_prefix("--")?.split([' ', '=', '[']).next()?;
    let name = variable(flag);
    let is_given = args
        .iter()
        .filter_map(|arg| arg.to_str())
        .any(|arg| arg.strip_prefix("--").is_some_and(|arg| arg.split('=').next() == Some(flag)));
    (!is_given && std::env::var_os(&name).is_some()).then_some(name)
}

/// What to warn of: variables of the environment with our prefix that nothing reads.
pub(crate) fn unknown_variables(command: &Command) -> Vec<String> {
    let mut known: Vec<String> = TEST_VARIABLES.map(str::to_owned).to_vec();
    collect_variables(command, &mut known);
    let known: Vec<&str> = known.iter().filter_map(|name| name.strip_prefix(PREFIX)).collect();
    let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    let mut unknown: Vec<String> = names
        .filter_map(|name| name.strip_prefix(PREFIX).map(str::to_owned))
        .filter(|name| !known.contains(&name.as_str()))
        .map(|name| {
            let meant = match nearest(&name, &known) {
                Some(near) => format!("did you mean {PREFIX}{near}?"),
                None => "`slipstream limits` lists what there is".to_owned(),
            };
            format!("the environment variable {PREFIX}{name} sets nothing; {meant}")
        })
        .collect();
    unknown.sort();
    unknown
}

fn collect_variables(command: &Command, into: &mut Vec<String>) {
    let names = command.get_arguments().filter_map(|arg| arg.get_env());
    into.extend(names.map(|name| name.to_string_lossy().into_owned()));
    for command in command.get_subcommands() {
        collect_variables(command, into);
    }
}
