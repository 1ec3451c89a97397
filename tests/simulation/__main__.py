"""Run the studies: see script/scale."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from simulation import figures, studies

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run what is asked for; tables on standard output, all of it in a JSON file."""
    parser = argparse.ArgumentParser(prog="script/scale", description="A cluster as a simulation.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of the kernels")
    parser.add_argument(
        "--only", action="append", choices=list(studies.STUDIES), help="one study; repeatable"
    )
    parser.add_argument("--to", type=Path, default=ROOT / "bench-output" / "scale.json")
    options = parser.parse_args()
    measured = figures.measured()
    content: dict[str, Any] = {"seed": options.seed, "quick": options.quick, "studies": {}}
    content["figures"] = vars(measured)
    if options.to.exists():
        content["studies"] = json.loads(options.to.read_text())["studies"]
    for name in options.only or studies.STUDIES:
        began = time.monotonic()
        rows = studies.STUDIES[name](measured, options.seed, 0.1 if options.quick else 1.0)
        content["studies"][name] = rows
        print(f"\n{name} ({time.monotonic() - began:.0f} s)\n{table(rows)}", flush=True)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten: {options.to}")


def table(rows: studies.Rows) -> str:
    """The rows as a Markdown table, without columns that are lists."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
