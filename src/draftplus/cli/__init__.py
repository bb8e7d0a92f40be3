"""The command line: a file for each command, which parses and prints. Starts without importing torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Annotated, Any

import typer

from draftplus import __version__
from draftplus.cli import data, evaluate, export, generate, plan, report, reward, sweep, train
from draftplus.cli.failures import in_one_line
from draftplus.cli.shared import examples
from draftplus.errors import Interrupted, UserError, printable
from draftplus.launcher import end_with_launcher

# typer brings its own copy of click in some versions, so its base class is reached through typer
CommandLineError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"draftplus {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples("Example:\n  draftplus train demo\n  draftplus generate runs/demo --prompt 'a cat' --seeds 0:16")
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Teach a text-to-image diffusion model what people prefer, without losing its variety (DRaFT, DRaFT+)."""


app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=sweep.EXAMPLES)(sweep.sweep)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=export.EXAMPLES)(export.export)
app.add_typer(reward.app, name="reward")
app.add_typer(data.app, name="data")


def main() -> None:
    """Runs a command. Exit status 0 for success, 2 for a user's mistake, 130 for Ctrl-C, 1 for anything else."""
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()  # the only one that signals reach
    if here:
        signal.signal(signal.SIGINT, _on_interrupt)
    end_with_launcher()
    try:
        app(sys.argv[1:] or ["--help"], prog_name="draftplus", standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except CommandLineError as error:
        _fail(f"{error.format_message().rstrip('.')}; see draftplus --help")
    except Interrupted as stopped:
        if stopped.args:
            print(f"draftplus: {printable(str(stopped))}", file=sys.stderr)
            sys.exit(130)
        sys.exit(1)
    except typer.Abort:
        sys.exit(1)
    except PermissionError as error:
        _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}; ask its owner, or use another file or directory"
        )
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter does not fail at exit
        sys.exit(1)
    except Exception as error:
        told = in_one_line(error)
        if told is not None:
            _fail(told, 1)
        traceback.print_exc()
        sys.exit(1)
    finally:
        if here and signal.getsignal(signal.SIGINT) is _on_interrupt:
            signal.signal(signal.SIGINT, before)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    # not KeyboardInterrupt, which click turns into a return value; and a second one ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Interrupted("interrupted")


def _fail(message: str, status: int = 2) -> None:
    print(f"draftplus: {printable(message)}", file=sys.stderr)
    sys.exit(status)
