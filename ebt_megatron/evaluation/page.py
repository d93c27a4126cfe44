"""A page of plots and tables, as HTML with everything in it and as Markdown beside its pictures."""

from __future__ import annotations

import base64
import html
from pathlib import Path

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of text, the first of them the heads."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def html_table(rows: list[list[str]]) -> str:
    """The same as HTML."""
    cells = [[html.escape(c) for c in row] for row in rows]
    head = "".join(f"<th>{c}</th>" for c in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


class Page:
    """A page in the making.

    Args:
        title: heading.
    """

    def __init__(self, title: str):
        self.markdown = [f"# {title}\n"]
        self.html = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
                     f"<h1>{html.escape(title)}</h1>"]  # fmt: skip
        self.pictures: dict[str, bytes] = {}

    def picture(self, name: str, content: bytes, caption: str) -> None:
        """Add the bytes of a picture; its name ends in .png or .gif."""
        self.pictures[name] = content
        stem, _, kind = name.rpartition(".")
        self.markdown.append(f"![{stem}]({name})\n\n{caption}\n")
        data = base64.b64encode(content).decode()
        self.html.append(f'<p><img alt="{stem}" src="data:image/{kind};base64,{data}"><br>{html.escape(caption)}</p>')

    def table(self, heading: str, rows: list[list[str]]) -> None:
        """Add a table."""
        self.markdown.append(f"## {heading}\n\n{markdown_table(rows)}\n")
        self.html.append(f"<h2>{heading}</h2>{html_table(rows)}")

    def text(self, heading: str, text: str) -> None:
        """Add text to be shown as it is, commands say."""
        self.markdown.append(f"## {heading}\n\n```\n{text}\n```\n")
        self.html.append(f"<h2>{heading}</h2><pre>{html.escape(text)}</pre>")

    def write(self, output: Path) -> dict[str, Path]:
        """Write report.html, report.md and the pictures into `output`; returns their paths by name."""
        output.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, content in self.pictures.items():
            paths[name.rpartition(".")[0]] = output / name
            (output / name).write_bytes(content)
        paths["html"], paths["markdown"] = output / "report.html", output / "report.md"
        paths["html"].write_text("\n".join(self.html), encoding="utf-8")
        paths["markdown"].write_text("\n".join(self.markdown), encoding="utf-8")
        return paths
