"""The command `training`: which subcommands there are. Owns no work of its own."""

import argparse
import os
import sys

# Spinning OpenMP threads make small networks several times slower on a machine that is not idle.
# Must be set before torch is loaded, as everything below does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from . import distill_tool, hf_directory, pair

COMMANDS = {
    "pair": (pair, "train the pair that slipstream ships, from the corpus to the model card"),
    "distill": (distill_tool, "make a draft for a verifier of your own"),
    "export-hf": (hf_directory, "turn a GGUF Llama into a Hugging Face directory"),
}


def main() -> int:
    """Runs one subcommand; a refusal is one line and status 2."""
    parser = argparse.ArgumentParser(prog="training", description="Training tools of slipstream.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=f"{summary}."))
    arguments = parser.parse_args()
    try:
        COMMANDS[arguments.command][0].run(arguments)
    except (ValueError, OSError) as error:
        print(f"training {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
