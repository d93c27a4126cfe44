"""Tables and curves of what the suite of pictures (`ebt_megatron.evaluation.picture_suite`) says of several runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebt_megatron.evaluation.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Suites = Mapping[str, Mapping[str, Any]]
_QUALITIES = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "mse": ("MSE", 1)}
_PROBED = {"features": "chosen layer and level", "last layer": "last layer, no noise", "untrained": "before training"}


@dataclass(frozen=True)
class Reading:
    """How a suite's numbers are read: as they are, or as intervals over seeds.

    Attributes:
        mean: of a number.
        half: the half-width of its interval.
        text: of a number, so many digits, and what it is multiplied by.
    """

    mean: Callable[[Any], float]
    half: Callable[[Any], float]
    text: Callable[[Any, int, float], str]


PLAIN = Reading(float, lambda number: 0.0, lambda number, digits, scale: f"{scale * number:.{digits}f}")


def tables(suites: Suites, reading: Reading = PLAIN, every: bool = False) -> list[Table]:
    """What the suites of several runs come to.

    Args:
        suites: by name of the run.
        reading: of their numbers.
        every: show every number of passes; else the first, the trained, the best and the most.
    """
    first = next(iter(suites.values()))
    out = [_denoising(suites, level, reading, every) for level in first.get("denoising", {})]
    probed = {name: of["probe"] for name, of in suites.items() if "probe" in of}
    if probed:
        rows = [
            [
                name,
                *(reading.text(of[key], 1, 100) for key in _PROBED),
                *(
                    reading.text(of[key], 0 if float(reading.mean(of[key])).is_integer() else 1, 1)
                    for key in ("layer", "level")
                ),
            ]
            for name, of in probed.items()
        ]
        numbers = next(iter(probed.values()))["numbers"]
        rows.append(["the pictures' own numbers", reading.text(numbers, 1, 100), "-", "-", "-", "-"])
        out.append(
            Table(
                "Linear probe: held-out pictures told right, %",
                ["features of", *_PROBED.values(), "layer chosen", "level chosen"],
                rows,
            )
        )
    for other in first.get("other pictures", {}):
        found = {name: of["other pictures"][other] for name, of in suites.items()}
        scores = dict.fromkeys(score for of in found.values() for score in of)
        out.append(
            Table(
                f"Telling {other} from held-out pictures: AUROC of a higher score",
                ["score", *found],
                [
                    [score, *(reading.text(of[score], 3, 1) if score in of else "-" for of in found.values())]
                    for score in scores
                ],
            )
        )
    return out


def _denoising(suites: Suites, level: str, reading: Reading, every: bool) -> Table:
    def cells(row: Mapping[str, Any]) -> list[str]:
        return [reading.text(row[key], digits, 1) for key, (_, digits) in _QUALITIES.items()]

    rows = [["the noised picture", "-", *cells(next(iter(suites.values()))["denoising"][level]["noised"])]]
    for name, of in suites.items():
        points = {int(reading.mean(row["passes"])): row for row in of["denoising"][level]["passes"]}
        best = max(points, key=lambda n: reading.mean(points[n]["psnr"]))
        trained = int(reading.mean(of["trained steps"]))
        shown = points if every else {min(points), trained, best, max(points)} & points.keys()
        rows += [[name, str(n), *cells(points[n])] for n in sorted(shown)]
    what = "" if every else ": the first, the trained, the best and the most passes"
    return Table(
        f"Denoising held-out pictures from level {level}{what}",
        ["model", "passes", *(label for label, _ in _QUALITIES.values())],
        rows,
    )


def curves(suites: Suites, reading: Reading = PLAIN) -> Figure:
    """PSNR and SSIM against the number of passes, at every level; names begin with EBT or DiT."""
    from ebt_megatron.evaluation.figures import BASELINE_COLOURS, EBT_COLOURS, NEUTRAL, figure_of, lettered

    levels = list(next(iter(suites.values()))["denoising"])
    figure, all_axes = figure_of(3.6 * 2 * len(levels), 2 * len(levels))
    colours = {"EBT": iter(EBT_COLOURS), "DiT": iter((*BASELINE_COLOURS, "#1d3f7a"))}
    shown = [(level, key) for level in levels for key in ("psnr", "ssim")]
    for name, of in suites.items():
        colour = next(colours[name[:3]])
        for axes, (level, key) in zip(all_axes, shown, strict=True):
            points = of["denoising"][level]["passes"]
            passes, means, halves = zip(
                *((reading.mean(p["passes"]), reading.mean(p[key]), reading.half(p[key])) for p in points), strict=True
            )
            axes.errorbar(passes, means, halves, fmt="o-", ms=3, capsize=2, color=colour, label=lettered(name))
    for axes, (level, key) in zip(all_axes, shown, strict=True):
        axes.axhline(reading.mean(of["denoising"][level]["noised"][key]), color=NEUTRAL, ls="--", lw=1)
        axes.set(xscale="log", xlabel="passes", title=f"{_QUALITIES[key][0]} from level {level}")
    all_axes[0].legend(frameon=False, fontsize=7)
    return figure
