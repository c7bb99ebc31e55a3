"""``prism-proxy doctor``: the findings, for people or as JSON."""

from __future__ import annotations

import json

import click

from prism.doctor import Finding, examine

__all__ = ["show"]


def show(as_json: bool) -> int:
    """Print what was found; 0 where nothing that is required is missing, 1 otherwise."""
    findings = examine()
    good = all(finding.ok for finding in findings if finding.required)
    if as_json:
        click.echo(json.dumps({"ok": good, "checks": [f.as_dict() for f in findings]}, indent=2))
    else:
        _print(findings, good)
    return 0 if good else 1


def _print(findings: list[Finding], good: bool) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark, colour = ("ok", "green") if finding.ok else ("missing", "red")
        if not finding.ok and not finding.required:
            colour = "yellow"
        line = Text(f"{mark:8}", style=colour)
        line.append(f"{finding.name}: ", style="bold").append(finding.detail, style="default")
        console.print(line)
        if not finding.ok:
            console.print(Text(f"        needed by {finding.roles}; without it: {finding.cost}"))
            console.print(Text(f"        remedy: {finding.remedy}"))
    optional = sum(not finding.ok for finding in findings if not finding.required)
    summary = "Prism can run here" if good else "Prism cannot run here as it is"
    console.print(f"\n{summary}{f'; {optional} optional items missing' if optional else ''}.")
