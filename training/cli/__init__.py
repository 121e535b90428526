"""The console command ``tinkercloud``: one module per command, assembled here."""

from __future__ import annotations

import sys

import typer

from training.cli import doctor, models, serve
from training.cli.output import print_error, print_versions
from training.core.errors import ConfigError

app = typer.Typer(
    name="tinkercloud",
    help="An open server for the Tinker training API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")


@app.command()
def version() -> None:
    """Print the versions of tinkercloud and of what it computes with."""
    print_versions()


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong usage or configuration (one line, no traceback)."""
    try:
        app()
    except ConfigError as error:
        print_error(str(error))
        sys.exit(2)
