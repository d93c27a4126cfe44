"""What says how well a score tells right from wrong, on arrays of positions."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive has a higher score than a negative (ties count half); nan without both.

    Args:
        score: [P], higher for what should be positive.
        positive: bool [P].
    """
    if positive.all() or not positive.any():
        return float("nan")
    return float(roc_auc_score(positive, score))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of two arrays [P]."""
    return float(spearmanr(a, b).statistic)


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv 1706.04599): |accuracy - confidence|, mean over positions.

    Args:
        confidence: [P] in [0, 1], the probability of the answer.
        right: bool [P].
        bins: of equal width, within which both are averaged.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    off = [abs((right[place == b] - confidence[place == b]).sum()) for b in range(bins)]
    return float(sum(off) / len(confidence))


def risk_coverage(uncertainty: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The error rate among the surest k positions, for k = 1 .. P (Geifman & El-Yaniv 2017, arXiv 1705.08500)."""
    wrong = ~right[np.argsort(uncertainty, kind="stable")]
    return np.cumsum(wrong) / np.arange(1, len(wrong) + 1)


def area_under_risk_coverage(uncertainty: np.ndarray, right: np.ndarray) -> float:
    """The mean of `risk_coverage` over all coverages: lower is better; a useless score gives the error rate."""
    return float(risk_coverage(uncertainty, right).mean())
