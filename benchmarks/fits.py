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

import numpy as np
from scipy.linalg import block_diag
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

    def slope(self, x: np.ndarray, axis: int = 0) -> np.ndarray:
        """-d log L / d log x_axis at x [N] or [N, axes]: of the straight line in log space that touches there."""
        x = x.reshape(len(x), -1)
        return self.exponents[axis] * self.scales[axis] * x[:, axis] ** -self.exponents[axis] / self(x)


@dataclass(frozen=True)
class Runs:
    """Runs of one model: x [N] or [N, axes] of each, and its loss [N]; seeds of a size have the same x."""

    x: np.ndarray
    loss: np.ndarray

    @property
    def axes(self) -> np.ndarray:
        """[N, axes]."""
        return self.x.reshape(len(self.x), -1).astype(np.float64)


def _design(models: Sequence[Runs], exponents: np.ndarray) -> np.ndarray:
    """Columns of the linear part, of models with one floor: the floor, then every model's scales."""
    own = np.split(exponents, np.cumsum([m.axes.shape[1] for m in models])[:-1])
    scales = block_diag(*(m.axes**-betas for m, betas in zip(models, own, strict=True)))
    return np.concatenate([np.ones((len(scales), 1)), scales], 1)


def _exponents_of(models: Sequence[Runs]) -> int:
    return sum(model.axes.shape[1] for model in models)


def _predicted(models: Sequence[Runs], parameters: np.ndarray) -> np.ndarray:
    """Losses by a floor, scales and exponents, in this order."""
    exponents = _exponents_of(models)
    return _design(models, parameters[-exponents:]) @ parameters[:-exponents]


def _by_parameters(models: Sequence[Runs], parameters: np.ndarray) -> np.ndarray:
    """Derivatives of log losses by a floor, scales and exponents."""
    exponents = _exponents_of(models)
    design, log_x = _design(models, parameters[-exponents:]), block_diag(*(np.log(m.axes) for m in models))
    by_exponent = -design[:, 1:] * log_x * parameters[1:-exponents]
    return np.concatenate([design, by_exponent], 1) / (design @ parameters[:-exponents])[:, None]


def _start(models: Sequence[Runs]) -> np.ndarray:
    """A floor, scales and exponents by variable projection over the grid, least squares of relative residuals."""
    loss, exponents = np.concatenate([m.loss for m in models]), _exponents_of(models)
    best: tuple[float, np.ndarray] | None = None
    for betas in itertools.product(*[EXPONENTS[:: 1 if exponents < 3 else 4]] * exponents):
        linear, misfit = nnls(_design(models, np.array(betas)) / loss[:, None], np.ones(len(loss)))
        if best is None or misfit < best[0]:
            best = misfit, np.concatenate([linear, betas])
    assert best is not None
    return best[1]


def _refined(models: Sequence[Runs], start: np.ndarray) -> np.ndarray:
    """The parameters of least Huber loss, from a start."""
    loss, exponents = np.concatenate([m.loss for m in models]), _exponents_of(models)

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(_predicted(models, p) / loss)

    low = np.concatenate([np.full(len(start) - exponents, 1e-12), np.full(exponents, _BOUNDS[0])])
    high = np.concatenate([np.full(len(start) - exponents, np.inf), np.full(exponents, _BOUNDS[1])])
    start = np.clip(start, low * 1.01, high * 0.99)
    spread = 1.4826 * float(np.median(np.abs(residuals(start))))
    return least_squares(
        residuals,
        start,
        lambda p: _by_parameters(models, p),
        bounds=(low, high),
        x_scale=np.maximum(np.abs(start), 1e-6),
        loss="huber",
        f_scale=_HUBER * max(spread, _LEAST_NOISE),
        max_nfev=200,
    ).x


def _laws(models: Sequence[Runs], parameters: np.ndarray) -> list[Law]:
    cuts = np.cumsum([m.axes.shape[1] for m in models])[:-1]
    scales, exponents = (np.split(of, cuts) for of in np.split(parameters[1:], 2))
    floor = float(parameters[0])
    return [Law(floor, tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(scales, exponents, strict=True)]


def _together(models: Sequence[Runs], shared_floor: bool) -> list[Sequence[Runs]]:
    """The models that are fitted together: all with one floor, or each by itself."""
    return [models] if shared_floor else [[model] for model in models]


def fit(models: Sequence[Runs], shared_floor: bool = False) -> list[Law]:
    """The law of each model.

    Args:
        models: runs of each, at least as many sizes as a law has parameters.
        shared_floor: one E for all.
    """
    return [law for group in _together(models, shared_floor) for law in _laws(group, _refined(group, _start(group)))]


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


@dataclass(frozen=True)
class Ratios:
    """How much faster a second model scales than a first: second over first, of each axis.

    Attributes:
        exponents: of the laws' exponents.
        rates: of the laws' slopes in log space (`Law.slope`), in the geometric middle of the runs' x.
    """

    exponents: tuple[Estimate, ...]
    rates: tuple[Estimate, ...]


def middle_of(axes: np.ndarray) -> np.ndarray:
    """The geometric middle [1, axes] of runs."""
    return np.exp((np.log(axes.min(0)) + np.log(axes.max(0))) / 2)[None]


def _log_ratios(laws: Sequence[Law], middle: np.ndarray) -> np.ndarray:
    """Logs [2, axes] of a second law's exponents, and rates, over those of a first."""
    rates = [[law.slope(middle, axis).item() for axis in range(middle.shape[1])] for law in laws]
    return np.log(np.array([laws[1].exponents, rates[1]]) / np.array([laws[0].exponents, rates[0]]))


def ratios(first: Runs, second: Runs, shared_floor: bool, draws: int = 200, seed: int = 0) -> Ratios:
    """Ratios of two models' exponents and rates, second over first, by bootstrap over whole runs.

    Every draw gives each run of a size the law's loss there and the noise of a run drawn from all of its model's. Its
    spread about the fit is widened by Student's t of the degrees of freedom that are left, as runs are few.

    Args:
        first, second: runs.
        shared_floor: one E for both.
        draws: fits.
        seed: of the draws.
    """
    models, draw = [first, second], np.random.default_rng(seed)
    groups = _together(models, shared_floor)
    begins = [_refined(group, _start(group)) for group in groups]
    laws = [law for group, begin in zip(groups, begins, strict=True) for law in _laws(group, begin)]
    noise = [_noise(model, law) for model, law in zip(models, laws, strict=True)]
    middle = middle_of(np.concatenate([model.axes for model in models]))
    found = []
    for _ in range(draws):
        drawn = [
            Runs(m.x, law(m.x) * np.exp(draw.choice(own, len(own))))
            for m, law, own in zip(models, laws, noise, strict=True)
        ]
        refits = [(group, _refined(group, b)) for group, b in zip(_together(drawn, shared_floor), begins, strict=True)]
        found.append(_log_ratios([law for group, parameters in refits for law in _laws(group, parameters)], middle))
    value = _log_ratios(laws, middle)
    free = sum(len(m.loss) for m in models) - sum(len(begin) for begin in begins)
    wider = student.ppf(0.975, max(free, 1)) / student.ppf(0.975, 1e6)
    # "weibull": so many draws have an inner quantile otherwise, and the intervals hold too little
    low, high = value + wider * (np.quantile(found, [0.025, 0.975], axis=0, method="weibull") - value)
    exponents, rates = (
        tuple(Estimate(*numbers) for numbers in np.exp(np.stack(of, 1)).tolist())
        for of in zip(value, low, high, strict=True)
    )
    return Ratios(exponents, rates)


def detectable(first: Law, second: Law, x: np.ndarray, noise: tuple[float, float], shared_floor: bool) -> np.ndarray:
    """The least ratios above 1 that a plan finds in four of five studies: [exponents and rates, axes].

    At the 95 % level, by the laws' Fisher information: no run is simulated.

    Args:
        first, second: the laws that are expected.
        x: [N] or [N, axes], of the runs of each model that are planned, seeds and all.
        noise: the standard deviation of log L between seeds, of each model.
        shared_floor: one E for both.
    """
    groups = [[first, second]] if shared_floor else [[first], [second]]
    deviations = [noise] if shared_floor else [(noise[0],), (noise[1],)]
    models, middle = [Runs(x, law(x)) for law in (first, second)], middle_of(x.reshape(len(x), -1))
    starts = [
        np.array([g[0].floor, *(a for w in g for a in w.scales), *(b for w in g for b in w.exponents)]) for g in groups
    ]
    cuts = np.cumsum([len(start) for start in starts])[:-1]
    covariances = []
    for group, start, own in zip(_together(models, shared_floor), starts, deviations, strict=True):
        jacobian = _by_parameters(group, start) / np.repeat(np.array(own), len(x))[:, None]
        covariances.append(np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-14))

    def logs(parameters: np.ndarray) -> np.ndarray:
        parts = zip(_together(models, shared_floor), np.split(parameters, cuts), strict=True)
        return _log_ratios([law for group, part in parts for law in _laws(group, part)], middle).ravel()

    at = np.concatenate(starts)
    changes = np.diag(1e-6 * at)
    gradient = np.stack([(logs(at + d) - logs(at - d)) / (2 * d.sum()) for d in changes], 1)
    deviation = np.sqrt(np.diag(gradient @ block_diag(*covariances) @ gradient.T))
    return np.exp((1.96 + 0.84) * deviation).reshape(2, -1)
