//! The `slipstream` command. Everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    slipstream_server::cli::main()
}
