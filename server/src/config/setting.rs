//! Owns what a setting is: a flag of `serve` that has a variable of the environment, and with it a
//! key of the configuration file. Derived from clap's own description, so that there is one list.

use std::any::TypeId;

use clap::{Arg, Args, Command};

use super::bounds;
use super::error::key;
use super::flags::{CONFIG_FLAG, DERIVED_DEFAULTS, ServeFlags};
use super::units::{ByteCount, TimeSpan, TimeSpanOrOff};

/// What the values of a setting are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A number without a unit.
    Integer,
    /// `true` or `false`.
    Boolean,
    /// A size with a unit, or a number of bytes.
    Size,
    /// A time with its unit.
    Time,
    /// A time with its unit, or `off`.
    TimeOrOff,
    /// One of these.
    Choice(Vec<String>),
    /// Anything.
    Text,
}

/// One setting.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// Clap's name for it.
    pub(crate) id: String,
    /// The flag without its dashes.
    pub(crate) flag: String,
    /// The key in a configuration file.
    pub(crate) key: String,
    /// The variable of the environment.
    pub(crate) variable: String,
    /// The group it is shown in.
    pub(crate) heading: String,
    /// What its values are.
    pub(crate) kind: Kind,
    /// The default, where it is fixed.
    pub(crate) default: Option<String>,
    /// What it is otherwise.
    pub(crate) derived_default: Option<&'static str>,
    /// What it does.
    pub(crate) help: String,
}

/// All settings, in the order of `serve --help`.
pub(crate) fn all() -> Vec<Setting> {
    let command = ServeFlags::augment_args(Command::new("serve"));
    command.get_arguments().filter_map(setting).collect()
}

/// Whether this argument of a command is a setting.
pub(crate) fn is_setting(arg: &Arg) -> bool {
    arg.get_env().is_some() && arg.get_long().is_some_and(|flag| flag != CONFIG_FLAG)
}

fn setting(arg: &Arg) -> Option<Setting> {
    if !is_setting(arg) {
        return None;
    }
    let flag = arg.get_long()?;
    let default = arg.get_default_values().first().map(|text| text.to_string_lossy().into_owned());
    let derived = DERIVED_DEFAULTS.iter().find(|(name, _)| *name == flag);
    Some(Setting {
        id: arg.get_id().to_string(),
        flag: flag.to_owned(),
        key: key(flag),
        variable: arg.get_env()?.to_string_lossy().into_owned(),
        heading: arg.get_help_heading().unwrap_or("Options").to_owned(),
        kind: kind(arg),
        default,
        derived_default: derived.map(|(_, text)| *text),
        help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
    })
}

fn kind(arg: &Arg) -> Kind {
    let id = arg.get_value_parser().type_id();
    let is = |other: TypeId| id == other;
    if is(TypeId::of::<bool>()) {
        Kind::Boolean
    } else if is(TypeId::of::<usize>()) || is(TypeId::of::<u32>()) {
        Kind::Integer
    } else if is(TypeId::of::<ByteCount>()) {
        Kind::Size
    } else if is(TypeId::of::<TimeSpan>()) {
        Kind::Time
    } else if is(TypeId::of::<TimeSpanOrOff>()) {
        Kind::TimeOrOff
    } else if arg.get_possible_values().is_empty() {
        Kind::Text
    } else {
        let values = arg.get_possible_values();
        Kind::Choice(values.iter().map(|value| value.get_name().to_owned()).collect())
    }
}

impl Kind {
    /// What a value has to be, for messages.
    pub(crate) fn wanted(&self) -> String {
        match self {
            Self::Integer => "an integer of 0 or more without quotes".to_owned(),
            Self::Boolean => "true or false without quotes".to_owned(),
            Self::Size => "a size like \"512MiB\", or a number of bytes".to_owned(),
            Self::Time => "a time with its unit, like \"30s\"".to_owned(),
            Self::TimeOrOff => "a time with its unit, like \"30s\", or \"off\"".to_owned(),
            Self::Choice(values) => {
                let quoted: Vec<String> = values.iter().map(|value| format!("{value:?}")).collect();
                format!("one of {}", quoted.join(", "))
            }
            Self::Text => "a text in quotes".to_owned(),
        }
    }
}

impl Setting {
    /// The values it takes, for people.
    pub(crate) fn range(&self) -> String {
        let bounds = bounds::of(&self.flag).map(ToString::to_string);
        match (&self.kind, bounds) {
            (Kind::TimeOrOff, Some(bounds)) => format!("{bounds}, or off"),
            (Kind::Choice(values), _) => values.join(", "),
            (Kind::Boolean, _) => "true, false".to_owned(),
            (_, Some(bounds)) => bounds,
            (_, None) => String::new(),
        }
    }
}

/// Adds ranges and derived defaults to the help of a command's settings, from the tables that the
/// checks read.
pub(crate) fn describe(command: Command) -> Command {
    let command = command.mut_args(|arg| {
        let Some(setting) = setting(&arg) else { return arg };
        let mut help = setting.help.clone();
        let has_range = bounds::of(&setting.flag).is_some();
        if has_range {
            help = format!("{help} [range: {}]", setting.range());
        }
        if let Some(derived) = setting.derived_default {
            help = format!("{help} [default: {derived}]");
        }
        arg.help(help)
    });
    command.mut_subcommands(describe)
}

#[cfg(test)]
mod tests {
    use super::super::error::variable;
    use super::{Kind, all};
    use crate::config::bounds;

    #[test]
    fn every_setting_is_named_the_same_in_all_layers() {
        let settings = all();
        assert!(settings.len() > 30, "settings are missing");
        for setting in &settings {
            assert_eq!(setting.variable, variable(&setting.flag));
            let is_known = setting.default.is_some() != setting.derived_default.is_some();
            assert!(is_known, "--{} needs one default, fixed or derived", setting.flag);
        }
    }

    #[test]
    fn every_number_has_a_range_and_every_range_a_setting() {
        let settings = all();
        for setting in &settings {
            let is_number = match setting.kind {
                Kind::Integer | Kind::Size | Kind::Time | Kind::TimeOrOff => true,
                Kind::Boolean | Kind::Choice(_) | Kind::Text => false,
            };
            assert_eq!(bounds::of(&setting.flag).is_some(), is_number, "--{}", setting.flag);
        }
        for bounds in bounds::BOUNDS {
            assert!(settings.iter().any(|setting| setting.flag == bounds.flag), "{}", bounds.flag);
        }
    }
}
