//! `slipstream limits`: every limit there is, what operators set and what the protocol fixes.

use std::io::{self, Write};

use super::terminal::write_left_table;
use crate::config::reference;

/// Prints the tables.
pub(super) fn run() -> io::Result<()> {
    let (settings, fixed) = reference::limits_table();
    let mut out = io::stdout().lock();
    writeln!(out, "What operators set: by flag, environment or configuration file\n")?;
    write_left_table(&mut out, &settings)?;
    writeln!(out, "\nWhat the protocol fixes: the same on every server\n")?;
    write_left_table(&mut out, &fixed)
}
