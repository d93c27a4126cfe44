"""Scaling laws fitted to losses of runs: L(x) = E + sum over axes of A x^-beta, with intervals, and with their power.

x is what is scaled (tokens, parameters, FLOPs ...), E the floor that no scale goes below, beta the exponent. A second
model scales faster if its beta is greater. Which of two floors and exponents fits is told apart badly by few runs, so
the *ratio* of exponents is reported, with one floor for both models and with a floor each.

A fit goes over a grid of exponents; for each of them the floor and the scales are a linear least squares problem
(variable projection, Golub & Pereyra 1973). From the best, all of them are refined together under a Huber loss of the
residuals of log L, summed and run to convergence (approach 3 of Hoffmann et al. 2022, arXiv 2203.15556, with the early
stop mended that Besiroglu et al. 2024, arXiv 2404.10102, found in it).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.stats import t as student

EXPONENTS = np.geomspace(0.02, 2.0, 24)  # the grid
_BOUNDS = (1e-3, 5.0)  # of exponents
_HUBER = 1.345  # robust standard deviations: 95 % efficient where residuals are normal
_LEAST_NOISE = 1e-5  # of log L, below which a residual is rounding


@dataclass(frozen=True)
class Law:
    """L(x) = floor + sum_k scales[k] x_k^-exponents[k]."""

    floor: float
    scales: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Losses [N] at x [N] or [N, axes]."""
        x = x.reshape(len(x), -1)
        return self.floor + (np.array(self.scales) * x ** -np.array(self.exponents)).sum(1)

    def slope(self, x: np.ndarray) -> np.ndarray:
        """-d log L / d log x of a law of one axis at x [N], the relative rate that the paper's percentages compare."""
        above = self.scales[0] * x ** -self.exponents[0]
        return self.exponents[0] * above / (self.floor + above)


@dataclass(frozen=True)
class Runs:
    """Runs of one model: x [N] or [N, axes] of each, and its loss [N]; seeds of a size have the same x."""

    x: np.ndarray
    loss: np.ndarray

    @property
    def axes(self) -> np.ndarray:
        """[N, axes]."""
        return self.x.reshape(len(self.x), -1).astype(np.float64)


def _design(models: Sequence[Runs], exponents: Sequence[np.ndarray], shared: bool) -> np.ndarray:
    """Columns of the linear part: floors (one, or one a model), then every model's scales."""
    rows, total = [], sum(m.axes.shape[1] for m in models)
    floors, done = 1 if shared else len(models), 0
    for i, (model, beta) in enumerate(zip(models, exponents, strict=True)):
        block = np.zeros((len(model.loss), floors + total))
        block[:, 0 if shared else i] = 1
        block[:, floors + done : floors + done + len(beta)] = model.axes**-beta
        done += len(beta)
        rows.append(block)
    return np.concatenate(rows)


def _start(models: Sequence[Runs], shared: bool) -> np.ndarray:
    """Floors, scales and exponents by variable projection over the grid, least squares of relative residuals."""
    loss = np.concatenate([m.loss for m in models])
    axes = [m.axes.shape[1] for m in models]
    # With a floor each, models are independent; with one floor the grid goes over all exponents together.
    grids = [EXPONENTS[:: 1 if sum(axes) < 3 else 4]] * sum(axes)
    best: tuple[float, np.ndarray] | None = None
    for betas in itertools.product(*grids):
        exponents = np.split(np.array(betas), np.cumsum(axes)[:-1])
        linear, misfit = nnls(_design(models, exponents, shared) / loss[:, None], np.ones(len(loss)))
        if best is None or misfit < best[0]:
            best = misfit, np.concatenate([linear, betas])
    assert best is not None
    return best[1]


def _predicted(models: Sequence[Runs], shared: bool, parameters: np.ndarray) -> np.ndarray:
    total = sum(m.axes.shape[1] for m in models)
    exponents = np.split(parameters[-total:], np.cumsum([m.axes.shape[1] for m in models])[:-1])
    return _design(models, exponents, shared) @ parameters[:-total]


def _refined(models: Sequence[Runs], shared: bool, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters under the Huber loss from a start, and the Jacobian of log L there."""
    loss = np.concatenate([m.loss for m in models])
    total = sum(m.axes.shape[1] for m in models)

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(_predicted(models, shared, p) / loss)

    low = np.concatenate([np.full(len(start) - total, 1e-12), np.full(total, _BOUNDS[0])])
    high = np.concatenate([np.full(len(start) - total, np.inf), np.full(total, _BOUNDS[1])])
    start = np.clip(start, low * 1.01, high * 0.99)
    spread = 1.4826 * float(np.median(np.abs(residuals(start))))
    found = least_squares(
        residuals,
        start,
        bounds=(low, high),
        x_scale=np.maximum(np.abs(start), 1e-6),
        loss="huber",
        f_scale=_HUBER * max(spread, _LEAST_NOISE),
        max_nfev=200,
    )
    return found.x, found.jac


def _laws(models: Sequence[Runs], shared: bool, parameters: np.ndarray) -> list[Law]:
    axes = [m.axes.shape[1] for m in models]
    floors = parameters[:1].repeat(len(models)) if shared else parameters[: len(models)]
    scales, exponents = np.split(parameters[1 if shared else len(models) :], 2)
    cuts = np.cumsum(axes)[:-1]
    parts = zip(floors, np.split(scales, cuts), np.split(exponents, cuts), strict=True)
    return [Law(float(e), tuple(a.tolist()), tuple(b.tolist())) for e, a, b in parts]


def fit(models: Sequence[Runs], shared_floor: bool = False) -> list[Law]:
    """The law of each model.

    Args:
        models: runs of each, at least as many sizes as a law has parameters.
        shared_floor: one E for all.
    """
    if not shared_floor and len(models) > 1:
        return [fit([model])[0] for model in models]
    return _laws(models, shared_floor, _refined(models, shared_floor, _start(models, shared_floor))[0])


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def holds(self, truth: float) -> bool:
        """Whether the interval has it."""
        return self.low <= truth <= self.high


def _noise(model: Runs, law: Law) -> np.ndarray:
    """Residuals of log L between seeds of a size, as wide as the noise of a run; of single seeds, from the law."""
    _, which = np.unique(model.axes, axis=0, return_inverse=True)
    which = which.reshape(-1)
    log, count = np.log(model.loss), np.bincount(which)
    if (count > 1).all():
        within = log - (np.bincount(which, log) / count)[which]
        return within * np.sqrt(count / (count - 1))[which]
    free = len(log) - 2 * model.axes.shape[1] - 1
    return (log - np.log(law(model.x))) * np.sqrt(len(log) / max(free, 1))


def ratio(first: Runs, second: Runs, shared_floor: bool, draws: int = 200, seed: int = 0) -> Estimate:
    """The ratio of two models' exponents, second over first, of laws of one axis, by bootstrap over whole runs.

    Every draw gives each run of a size the law's loss there and the noise of a run drawn from all of its model's. Its
    spread about the fit is widened by Student's t of the degrees of freedom that are left, as runs are few.

    Args:
        first, second: runs.
        shared_floor: one E for both.
        draws: fits.
        seed: of the draws.
    """
    models, draw = [first, second], np.random.default_rng(seed)
    start = _refined(models, True, _start(models, True))[0] if shared_floor else None
    laws = _laws(models, True, start) if start is not None else fit(models)
    noise = [_noise(model, law) for model, law in zip(models, laws, strict=True)]
    value, found = np.log(laws[1].exponents[0] / laws[0].exponents[0]), []
    begins = [np.array([law.floor, *law.scales, *law.exponents]) for law in laws]
    for _ in range(draws):
        drawn = [
            Runs(m.x, law(m.x) * np.exp(draw.choice(own, len(own))))
            for m, law, own in zip(models, laws, noise, strict=True)
        ]
        if start is not None:
            again = _laws(drawn, True, _refined(drawn, True, start)[0])
        else:
            parts = zip(drawn, begins, strict=True)
            again = [_laws([m], False, _refined([m], False, begin)[0])[0] for m, begin in parts]
        found.append(np.log(again[1].exponents[0] / again[0].exponents[0]))
    free = len(first.loss) + len(second.loss) - (5 if shared_floor else 6)
    wider = student.ppf(0.975, max(free, 1)) / student.ppf(0.975, 1e6)
    low, high = value + wider * (np.quantile(found, [0.025, 0.975]) - value)
    return Estimate(float(np.exp(value)), float(np.exp(low)), float(np.exp(high)))


def detectable(first: Law, second: Law, x: np.ndarray, noise: tuple[float, float], shared_floor: bool) -> float:
    """The least ratio of exponents above 1 that a plan finds in four of five studies, at the 95 % level.

    By the laws' Fisher information: no run is simulated.

    Args:
        first, second: the laws that are expected.
        x: [N], of the runs of each model that are planned, seeds and all.
        noise: the standard deviation of log L between seeds, of each model.
        shared_floor: one E for both.
    """
    models = [Runs(x, law(x)) for law in (first, second)]
    floors = [first.floor] if shared_floor else [first.floor, second.floor]
    parameters = np.array([*floors, *first.scales, *second.scales, *first.exponents, *second.exponents])
    step = 1e-6 * np.abs(parameters)
    predicted = partial(_predicted, models, shared_floor)
    jacobian = np.stack(
        [
            (np.log(predicted(parameters + d)) - np.log(predicted(parameters - d))) / (2 * d.sum())
            for d in np.diag(step)
        ],
        1,
    )
    weights = np.repeat(1 / np.array(noise), len(x))
    covariance = np.linalg.pinv((jacobian * weights[:, None]).T @ (jacobian * weights[:, None]), rcond=1e-14)
    gradient = np.zeros(len(parameters))
    gradient[-2:] = -1 / first.exponents[0], 1 / second.exponents[0]  # of the log of the ratio
    return float(np.exp((1.96 + 0.84) * np.sqrt(gradient @ covariance @ gradient)))
