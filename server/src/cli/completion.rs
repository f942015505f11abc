//! `slipstream completion`: a script that lets a shell complete the command line.

use std::io::{self, Write};

use clap_complete::Shell;

/// Flags of `slipstream completion`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  slipstream completion bash > ~/.local/share/bash-completion/completions/slipstream
  slipstream completion zsh > \"${fpath[1]}/_slipstream\"
  slipstream completion fish > ~/.config/fish/completions/slipstream.fish")]
pub(super) struct CompletionFlags {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub(super) fn run(flags: &CompletionFlags, mut command: clap::Command) -> io::Result<()> {
    // Into memory first: the generator does not report a reader that has gone.
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut command, "slipstream", &mut script);
    io::stdout().lock().write_all(&script)
}
