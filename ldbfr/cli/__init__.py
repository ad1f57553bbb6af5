"""The command line, `ldbfr`: one module for each group of its commands."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import tyro

from ldbfr.cli.archive import ArchiveCommands
from ldbfr.cli.evaluate import Evaluate
from ldbfr.cli.restore import Restore
from ldbfr.cli.studies import Ablations, StepBudget
from ldbfr.cli.train import StageChoice, Train
from ldbfr.cli.weights import Convert, Export, Presets
from ldbfr.doctor.command import Doctor
from ldbfr.errors import LDBFRError
from ldbfr.evaluation.testset_command import TestSetCommand

__all__ = ["StageChoice", "main"]


def main() -> None:
    """Entry point of the `ldbfr` command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    command = tyro.cli(
        Restore
        | Train
        | Export
        | Convert
        | Presets
        | Annotated[TestSetCommand, tyro.conf.subcommand("testset")]
        | Evaluate
        | Ablations
        | StepBudget
        | Annotated[ArchiveCommands, tyro.conf.subcommand("archive")]
        | Doctor,
        prog="ldbfr",
        description="Blind face restoration with LD-BFR.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    try:
        sys.exit(command())
    except LDBFRError as error:
        sys.exit(f"ldbfr: {error}")
    except KeyboardInterrupt:
        print("ldbfr: stopped; what is written is whole, the same command goes on from here", file=sys.stderr)
        sys.exit(130)
