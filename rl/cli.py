"""The command `siesta`.

    siesta train quickstart rl.tau=0.3
    siesta eval outputs/quickstart --out outputs/quickstart/eval
    siesta warmup-data recipe.yaml --out warmup_data

A command is a module with `main(arguments)` that returns the exit code; to add one, add a line to `COMMANDS`. It is
imported when it is called, so that help does not wait for torch. How a command ends, and `--debug`: `siesta.rl.exits`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from siesta.rl.exits import DEBUG_HELP, command

# Command -> module, what it does.
COMMANDS = {
    "train": ("siesta.rl.train", "run a recipe: model, warm-up, RL, evaluation, export, report"),
    "plan": ("siesta.rl.plan", "check a recipe; its memory, tokens and, like an earlier run, hours"),
    "eval": ("siesta.rl.checkpoint_eval", "measure checkpoints: modes, mode policy, frontier, calibration, baselines"),
    "warmup-data": ("siesta.rl.warmup_data", "write verified responses in every mode, for the warm-up"),
    "export": ("siesta.rl.export", "write a checkpoint of a run as a folder that vllm serve takes"),
    "report": ("siesta.rl.page", "write runs as one HTML page"),
    "chat": ("siesta.rl.chat", "talk to an exported model: shows mode, probability, tokens and time"),
    "doctor": ("siesta.rl.doctor", "what this machine has, what will be used, what is missing"),
    "sleep": ("siesta.rl.sleep.night", "consolidate contexts before their queries come, and keep the states"),
    "answer": ("siesta.rl.sleep.wake", "answer queries from the states of sleep"),
}


@command
def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    listed = "\n".join(f"  {name:<{max(map(len, COMMANDS))}}  {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="siesta",
        description=f"commands:\n{listed}",
        epilog=f"siesta COMMAND --help shows the arguments of a command.\n{DEBUG_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    options = parser.parse_args(arguments)
    module = import_module(COMMANDS[options.command][0])
    return module.main(options.arguments)


if __name__ == "__main__":
    sys.exit(main())
