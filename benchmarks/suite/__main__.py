"""``python -m suite [--quick] [NAME...]``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.markdown import Markdown

from prism.errors import PrismError

from . import latency, rules, throughput
from .document import refresh
from .machine import facts
from .results import Result, save
from .throughput import Context

EXPERIMENTS: dict[str, Callable[[Context], Result]] = {
    "get": throughput.get,
    "put": throughput.put,
    "small": throughput.small,
    "scaling": throughput.scaling,
    "skew": throughput.skew,
    "cost": throughput.cost,
    "mixed": throughput.mixed,
    "latency": latency.first_octet,
    "handoffs": latency.handoffs,
    "idle": latency.idle,
    "rules": rules.rules,
    "p4runtime": rules.p4runtime,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Fewer sizes, rounds and seconds.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Rounds of each comparison.")
@click.option("--seconds", type=click.FloatRange(1, 600), help="Seconds of each run.")
@click.option(
    "--results",
    default="benchmarks/results",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where JSON, tables and plots go.",
)
@click.option("--list", "listing", is_flag=True, help="List the experiments.")
@click.option(
    "--document", is_flag=True, help="Put the results there are into docs/performance.md; no runs."
)
def main(
    names: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    results: Path,
    listing: bool,
    document: bool,
) -> None:
    """Run experiments, all by default, and write their results."""
    if listing:
        for name, experiment in EXPERIMENTS.items():
            click.echo(f"{name:10s} {(experiment.__doc__ or '').strip().splitlines()[0]}")
        return
    if document:
        try:
            for path in refresh(results, Path("docs/performance.md"), EXPERIMENTS):
                click.echo(f"written: {path}")
        except PrismError as error:
            raise click.ClickException(str(error)) from None
        return
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        known = ", ".join(EXPERIMENTS)
        raise click.UsageError(f"no experiment {unknown[0]!r}; there are: {known}")
    if os.geteuid() != 0:
        raise click.ClickException("the lab makes network namespaces and needs root: use sudo")
    console = Console()
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.0f} s[/dim]  {text}", highlight=False)

    context = Context(rounds or (2 if quick else 5), seconds or (2 if quick else 5), quick, say)
    failed = 0
    for name in names or EXPERIMENTS:
        say(f"[bold]{name}[/bold]")
        known = facts()
        try:
            result = EXPERIMENTS[name](context)
        except PrismError as error:
            failed += 1
            console.print(f"[red]{name} failed:[/red] {error}", highlight=False)
            continue
        written = save(result, known, results)
        console.print(Markdown(result.markdown().split("\n![")[0]))
        say("written: " + ", ".join(str(path) for path in written))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
