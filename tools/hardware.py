"""Stated rates of a GPU and its links, and how long operations and messages take by them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ebt_megatron.tools.ledger import Account

_MICRO = 1e-6


@dataclass(frozen=True)
class Hardware:
    """Figures of one GPU and its links.

    Attributes:
        tflops: matrix rate reached, TFLOP/s.
        bandwidth: between tensor-parallel ranks (inside a node), GB/s per GPU.
        network: between nodes, GB/s per GPU.
        hbm: of a GPU's own memory, GB/s.
        launch: the least that an operation takes, microseconds.
        latency: what each message and collective takes besides its bytes, microseconds.
    """

    tflops: float
    bandwidth: float
    network: float
    hbm: float = 3000.0
    launch: float = 5.0
    latency: float = 20.0

    def compute_seconds(self, account: Account) -> dict[str, float]:
        """Seconds of an account's operations by phase: each takes as long as its FLOPs, its bytes or its launch."""
        seconds: defaultdict[str, float] = defaultdict(float)
        flops_rate, bytes_rate = self.tflops * 1e12, self.hbm * 1e9
        for (phase, flops, moved), times in account.work.items():
            seconds[phase] += times * max(flops / flops_rate, moved / bytes_rate, self.launch * _MICRO)
        return seconds

    def collective_seconds(self, account: Account, sizes: dict[str, int]) -> dict[str, float]:
        """Seconds of an account's collectives, as rings, by what differs in their groups.

        Args:
            account: of a rank.
            sizes: ranks of an axis, by its name ("tensor", "data", "pipeline").
        """
        seconds: defaultdict[str, float] = defaultdict(float)
        for (operation, axes), traffic in account.collectives.items():
            ranks = 1
            for axis in axes.split(" x "):
                ranks *= sizes.get(axis, 1)
            link = self.bandwidth if axes == "tensor" else self.network
            rounds = 2 if operation.startswith("allreduce") else 1  # a ring reduces and then gathers
            moved = rounds * (ranks - 1) / ranks * traffic.size
            seconds[axes] += moved / (link * 1e9) + traffic.calls * self.latency * _MICRO
        return seconds

    def message_seconds(self, account: Account) -> float:
        """Seconds that a message between pipeline stages is on its way, in an account's mean; 0: there is none."""
        calls = sum(traffic.calls for traffic in account.messages.values())
        size = sum(traffic.size for traffic in account.messages.values())
        return size / calls / (self.network * 1e9) + self.latency * _MICRO if calls else 0.0
