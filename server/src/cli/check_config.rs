//! `slipstream check-config`: everything that `serve` would check before it loads a model, and the
//! configuration in effect on stdout.

use std::io::{self, Write};

use super::existing_models;
use super::listen::Listen;
use crate::config::ServeFlags;
use crate::config::effective;
use crate::config::layers::Layers;
use crate::logging;

/// Flags of `slipstream check-config`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Takes the flags of serve. The output is a configuration file that can be used as it is; each line \
says where its value comes from: the default, a variable of the environment, a line of the file, \
or the command line. Loads no model; that the paths of models exist is checked.

Exit codes: 0 everything can be used, 2 something cannot, and stderr says what.

Examples:
  slipstream check-config > slipstream.toml
  slipstream check-config --config slipstream.toml --max-running 32")]
pub(super) struct CheckConfigFlags {
    /// Print JSON instead: for every setting its value and its source
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    serve: ServeFlags,
}

/// Checks and prints.
pub(super) fn run(flags: &CheckConfigFlags, layers: &Layers) -> anyhow::Result<()> {
    let serve = &flags.serve;
    Listen::new(serve)?;
    logging::filter(&serve.log.filter)?;
    let config = serve.config()?;
    existing_models(&config)?;
    let (_, matches) = layers.matches.subcommand().expect("this command was chosen");
    let mut out = io::stdout().lock();
    if flags.json {
        writeln!(out, "{:#}", effective::json(layers, matches, &config))?;
    } else {
        write!(out, "{}", effective::toml(layers, matches, &config))?;
    }
    Ok(())
}
