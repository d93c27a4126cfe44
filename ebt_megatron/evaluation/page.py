"""A page of plots and tables: HTML with everything in it, by day and by night, and Markdown beside its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from ebt_megatron.core.files import write_whole
from ebt_megatron.evaluation.figures import colours, png_of
from ebt_megatron.evaluation.tables import Table

_STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;
padding:0 1em;color:#222;background:#fff}img{max-width:100%;height:auto}figure{margin:1.5em 0}figcaption{font-size:.9em;
opacity:.8}.wide{overflow-x:auto}table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px
solid #8884;text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#8882;padding:1em;
overflow:auto}.text{font-family:ui-monospace,monospace;font-size:.85em;overflow-wrap:anywhere;white-space:pre-wrap}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#181818}}"""


def _source(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


class Page:
    """A page in the making.

    Args:
        title: heading.
    """

    def __init__(self, title: str):
        self.markdown = [f"# {title}\n"]
        self.parts = [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        ]
        self.pictures: dict[str, bytes] = {}

    def figure(self, name: str, caption: str, draw: Callable[[], Figure]) -> None:
        """Add a plot, drawn by day and by night."""
        drawn = []
        for night in (False, True):
            with colours(night):
                drawn.append(png_of(draw()))
        self.picture(f"{name}.png", drawn[0], caption, drawn[1])

    def picture(self, name: str, content: bytes, caption: str, night: bytes | None = None) -> None:
        """Add the bytes of a picture, and of what stands for it by night; its name ends in .png or .gif."""
        self.pictures[name] = content
        stem, _, kind = name.rpartition(".")
        self.markdown.append(f"![{stem}]({name})\n\n{caption}\n")
        other = (
            "" if night is None else (f'<source media="(prefers-color-scheme: dark)" srcset="{_source(night, kind)}">')
        )
        self.parts.append(
            f'<figure id="{stem}"><picture>{other}<img alt="{stem}" src="{_source(content, kind)}"></picture>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def table(self, table: Table) -> None:
        """Add a table."""
        self.markdown.append(f"## {table.title}\n\n{table.markdown()}\n")
        self.parts.append(f"<h2>{html.escape(table.title)}</h2>{table.html()}")

    def text(self, heading: str, text: str) -> None:
        """Add text to be shown as it is, commands say."""
        self.markdown.append(f"## {heading}\n\n```\n{text}\n```\n")
        self.parts.append(f"<h2>{html.escape(heading)}</h2><pre>{html.escape(text)}</pre>")

    def html(self, part: str) -> None:
        """Add what only HTML can show."""
        self.parts.append(part)

    def write(self, output: Path) -> dict[str, Path]:
        """Write report.html, report.md and the pictures into `output`; returns their paths by name."""
        output.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, content in self.pictures.items():
            paths[name.rpartition(".")[0]] = output / name
            write_whole(output / name, content)
        paths["html"], paths["markdown"] = output / "report.html", output / "report.md"
        write_whole(paths["html"], "\n".join([*self.parts, "</html>"]))
        write_whole(paths["markdown"], "\n".join(self.markdown))
        return paths
