"""Tables of evaluation results, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text


@dataclass
class Table:
    """A title, a row of headings, and rows of cells; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def rich(self) -> rich.table.Table:
        """Return the table as the terminal shows it."""
        table = rich.table.Table(title=Text(self.title, "table.title"), title_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(Text(name), justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))  # brackets are no markup
        return table

    def markdown(self) -> str:
        """Without the title."""
        rows = ([cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(self.head))
        return "\n".join(lines)

    def html(self) -> str:
        """Without the title."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with commas for thousands; "-" for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Write a share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def suite_tables(numbers: dict[str, Any]) -> list[Table]:
    """What the suite's numbers (`ebt_megatron.evaluation.suite`) come to."""
    trained = numbers["trained steps"]
    tables = [
        Table(
            "Models: the same tokens unless said",
            [
                "model",
                "parameters (M)",
                "tokens (M)",
                "training TFLOPs",
                "inference MFLOPs a token",
                "loss",
                "perplexity",
                "right",
            ],
            [
                [
                    m["name"],
                    number(m["parameters"] / 1e6, 2),
                    number(m["tokens"] / 1e6, 2),
                    number(m["training flops"] / 1e12, 2),
                    number(m["inference flops a token"] / 1e6, 2),
                    number(m["loss"]),
                    number(m["perplexity"], 2),
                    percent(m["accuracy"]),
                ]
                for m in numbers["models"]
            ],
        ),
        Table(
            f"Thinking steps (trained with {trained})",
            ["steps", "loss", "perplexity", "right", "answer changed by the step"],
            [
                [
                    str(r["steps"]),
                    number(r["loss"]),
                    number(r["perplexity"], 2),
                    percent(r["accuracy"]),
                    percent(r["changed"]),
                ]
                for r in numbers["thinking"]
            ],
        ),
    ]
    if "starts" in numbers:
        names = list(numbers["starts"][0]["by"])
        tables.append(
            Table(
                "Several starts: perplexity (share of right answers) by what chooses",
                ["chosen by", *(f"M = {row['starts']}" for row in numbers["starts"])],
                [[name, *(_chosen(row["by"][name]) for row in numbers["starts"])] for name in names],
            )
        )
    if "dynamic compute" in numbers:
        dynamic = numbers["dynamic compute"]
        rows = [
            [f"{r['steps']} for all", number(r["steps"], 2), number(r["flops"] / 1e6, 2), number(r["perplexity"], 2)]
            for r in dynamic["fixed"]
        ]
        rows += [
            [
                f"until it moves less than {r['tolerance']:g}"
                if "tolerance" in r
                else f"until it is {r['confidence']:g} sure",
                number(r["steps"], 2),
                number(r["flops"] / 1e6, 2),
                number(r["perplexity"], 2),
            ]
            for r in dynamic["adaptive"]
        ]
        share = dynamic["flops to reach the trained steps' perplexity"]
        reached = "not reached" if share is None else f"reached with {percent(share)} of its FLOPs"
        tables.append(
            Table(
                f"Dynamic compute: perplexity of {trained} fixed steps (within 0.5 %) {reached}",
                ["steps", "mean steps", "MFLOPs a token", "perplexity"],
                rows,
            )
        )
    if "corruption" in numbers:
        head = [key for key in numbers["corruption"][0] if key != "kind"]
        tables.append(
            Table(
                "Which token is wrong: AUROC",
                ["tokens", *head],
                [[r["kind"], *(number(r[key]) for key in head)] for r in numbers["corruption"]],
            )
        )
    tables.append(
        Table(
            "Uncertainty of predictions",
            [
                "model, doubt",
                "rank correlation with loss",
                "AUROC of an error",
                "area under risk-coverage",
                "calibration error",
            ],
            [
                [
                    f"{model}, {name}",
                    number(d["rank correlation with loss"]),
                    number(d["AUROC of an error"]),
                    number(d["area under risk-coverage"]),
                    number(of["calibration error"]),
                ]
                for model, of in numbers["uncertainty"].items()
                for name, d in of["by"].items()
            ],
        )
    )
    if numbers.get("shifts"):
        tables.append(
            Table(
                "Other text, near to far",
                ["text", "shift", "gain over the first step", "perplexity", "baseline's", "AUROC by energy"],
                [
                    [
                        name,
                        number(r["shift"], 2),
                        percent(r["gain over the first step"]),
                        number(r["perplexity"][""], 1),
                        number(next(v for k, v in r["perplexity"].items() if k), 1),
                        number(r["AUROC of being other text, by energy"]),
                    ]
                    for name, r in sorted(numbers["shifts"].items(), key=lambda item: item[1]["shift"])
                ],
            )
        )
    return tables


def _chosen(row: dict[str, float]) -> str:
    right = f"({percent(row['accuracy'])})" if "accuracy" in row else ""
    return f"{number(row['perplexity'], 2)} {right}" if "perplexity" in row else right
