"""Where the launcher placed this process: torchrun, Slurm, MPI, or none. Needs no torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import psutil

from ebt_megatron.core.errors import RecipeError


@dataclass(frozen=True)
class Launch:
    """The place of this process as its launcher says it, and how the ranks find each other.

    `master` is "host:port" of a store that rank 0 serves, "env" when torchrun's variables say it all, or
    "mpi" when rank 0 picks a port and tells the others through MPI.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    master: str


def _first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as 'gpu[003-007,9],login1'."""
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
        ).stdout
        return hosts.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        prefix, bracket, rest = nodelist.partition("[")
        if not bracket or "," in prefix:
            return nodelist.split(",")[0]
        return prefix + rest.split("]")[0].split(",")[0].split("-")[0]


def _slurm_port(job_id: str) -> int:
    """A port that every task of the job computes alike and that differs between jobs."""
    return 20000 + int(job_id) % 20000


def _check_torchrun(env: dict[str, str]) -> None:
    found = f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set"
    mend = "unset what another program left in the environment, or start with torchrun"
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise RecipeError(f"{found}, {' and '.join(missing)} not: {mend}")
    try:
        fits = 0 <= int(env["RANK"]) < int(env["WORLD_SIZE"]) and int(env["MASTER_PORT"]) >= 0
    except ValueError:
        fits = False
    if not fits:
        raise RecipeError(f"{found}, and MASTER_PORT={env['MASTER_PORT']}, which does not fit: {mend}")


def detect_launch(environ: dict[str, str] | None = None) -> Launch:
    """Read this process's place from the environment: torchrun, then Slurm, then MPI, else alone.

    Args:
        environ: the variables to read; default: os.environ.

    Raises:
        RecipeError: for variables of torchrun's that no torchrun can have set.
    """
    env = dict(os.environ) if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        _check_torchrun(env)
        return Launch("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), "env")
    master = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}" if {"MASTER_ADDR", "MASTER_PORT"} <= set(env) else ""
    # SLURM_PROCID alone is also set in a batch script's own shell, which is not a task of a step.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and "SLURM_NTASKS" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        return Launch(
            "slurm",
            int(env["SLURM_PROCID"]),
            int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])),
            int(env.get("SLURM_LOCALID", 0)),
            master or f"{_first_host(nodes)}:{_slurm_port(env.get('SLURM_JOB_ID', '0'))}",
        )
    for rank, size, local in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ):
        if rank in env and size in env:
            return Launch("mpi", int(env[rank]), int(env[size]), int(env.get(local, 0)), master or "mpi")
    return Launch("single", 0, 1, 0, "")


def attempts() -> dict[str, int]:
    """The launches that this process is of, and how often each has started it again.

    That is torchrun --max-restarts, named by the process that restarts, and Slurm's requeue, by the job.
    """
    env, found = os.environ, {}
    if "TORCHELASTIC_RESTART_COUNT" in env:
        agent = psutil.Process(os.getppid())
        name = f"torchrun {env.get('TORCHELASTIC_RUN_ID', '')} {agent.pid} {agent.create_time()}"
        found[name] = int(env["TORCHELASTIC_RESTART_COUNT"])
    if "SLURM_JOB_ID" in env:
        found[f"slurm {env['SLURM_JOB_ID']}"] = int(env.get("SLURM_RESTART_COUNT", 0))
    return found
