"""The table of docs/reliability.md."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chaos.matrix import KILL, ROWS, Result, Row

from tessera.local.folders import CHECKOUT

PAGE = CHECKOUT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by make chaos -->", "<!-- end of what make chaos writes -->"


def write(results: Sequence[Result], skipped: Mapping[str, str], figures: Mapping[str, Any], page: Path = PAGE) -> None:
    """Replaces what is between the two marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(results, skipped, figures)}{END}{after}")


def table(results: Sequence[Result], skipped: Mapping[str, str], figures: Mapping[str, Any]) -> str:
    """Markdown."""
    rows = {row.name: row for row in ROWS}
    lines = [
        f"`CHAOS_SEED={figures['seed']} make chaos` on {datetime.now(UTC):%Y-%m-%d}: {figures['faults']} faults, "
        f"{figures['events']:,} events, at least {figures['kills_per_service']} kills of each service.",
        "",
        "| row | fault | also holds | events | lost | doubled | reordered | stuck | recovered in | bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(result, rows.get(result.name)) for result in results]
    lines += ["", "| not played | because |", "|---|---|", *(f"| {name} | {reason} |" for name, reason in skipped.items())]
    lines += _kills(results)
    return "\n".join(lines) + "\n"


def _line(result: Result, row: Row | None) -> str:
    fault, condition, bound = (row.fault, row.condition, row.bound_seconds) if row else ("SIGKILL of every service", "-", 120.0)
    found = result.findings
    counts = f"{found['lost']} | {found['doubled']} | {found['reordered']} | {found['stuck'] + found['aborted']}"
    return f"| {result.name} | {fault} | {condition} | {result.events} | {counts} | {result.recovery_seconds:.1f} s | {bound:.0f} s |"


def _kills(results: Sequence[Result]) -> list[str]:
    (killed,) = [result for result in results if result.name == KILL] or [Result(KILL)]
    if not killed.kills:
        return []
    lines = ["", "| service | killed at |", "|---|---|"]
    told = {service: ", ".join(f"{point} {count}×" for point, count in sorted(died.items())) for service, died in killed.kills.items()}
    return lines + [f"| {service} | {points} |" for service, points in told.items()]
