"""Compile every Triton kernel for GPUs that are not here: registers, spills, shared memory, and what limits it.

    python -m benchmarks.kernel_resources                                       # sm_80, sm_90, sm_100; all kernels
    python -m benchmarks.kernel_resources --capability 90 --family elementwise --output /tmp

It needs Triton and no GPU: Triton brings the assembler, which says what a kernel takes. No time is measured. A kernel
that asks for more shared memory than a block can have on a device ends the command with an error.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
import typer
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebt_megatron.core.cli import guarded
from ebt_megatron.core.files import write_whole
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.kernels import StepRule, triton_attention, triton_elementwise, triton_fp8, triton_vocabulary

FAMILIES = ("elementwise", "vocabulary", "attention 64", "attention 128", "attention 256")
RESULTS = Path("benchmarks/results")
_REGISTERS, _BLOCKS_A_SM, _RESERVED = 65536, 32, 1024  # of a multiprocessor; bytes of a block that CUDA keeps
_SUMS = ("LSE", "MU", "DELTA", "BETA", "GW", "TOP", "TOTAL", "FACTOR", "CENTRE", "ALPHA", "PP", "SCALE", "MEAN")
_FIXED = dict.fromkeys((*_SUMS, "QUANTILES", "TABLE"), "*fp32")  # whatever the data is
_FIXED |= {"OUT8": "*fp8e4nv", "SEG": "*i32", "FIRST": "*i32", "SECOND": "*i32", "COLUMN": "*i64"}
_NARROW, _FLOATS = ("Q", "K", "V", "A", "X", "W", "Y", "E", "P"), ("scale", "epsilon", "std")
_LENGTH = 2048  # S, of the call of attention whose limit is told


@dataclass(frozen=True)
class Device:
    """What a GPU has, by NVIDIA's CUDA programming guide (specifications by compute capability) and data sheets.

    Attributes:
        name: the product that the rates are of.
        shared: bytes of shared memory that a block may have, and that a multiprocessor has.
        threads: of a multiprocessor.
        matrix_rate: of dense bf16 products, FLOP/s.
        bandwidth: of its memory, byte/s.
    """

    name: str
    shared: tuple[int, int]
    threads: int
    matrix_rate: float
    bandwidth: float


DEVICES = {
    80: Device("A100 80 GB", (166912, 167936), 2048, 312e12, 2.039e12),
    90: Device("H100 SXM", (232448, 233472), 2048, 989e12, 3.35e12),
    100: Device("B200", (232448, 233472), 2048, 2250e12, 8.0e12),
}


@dataclass(frozen=True)
class Call:
    """A kernel as a launcher calls it.

    Attributes:
        function: the kernel.
        constants: its constexprs.
        wide: pointers that are fp32 besides those that always are.
        warps, stages: as launched.
        intensity: FLOP of the matrix unit a byte of memory, of the call that is told; 0: it has no matrix products.
        least: the first compute capability that has its types.
    """

    function: Any
    constants: dict[str, Any]
    wide: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    intensity: float = 0.0
    least: int = 80

    @property
    def shown(self) -> str:
        """The constants, for people."""
        return " ".join(f"{key}={int(value)}" for key, value in self.constants.items())

    def compiled(self, capability: int) -> Any:
        """What Triton makes of it, with bf16 data.

        Raises:
            TypeError: if `constants` are not the kernel's.
        """
        switches = {p.name for p in self.function.params if p.is_constexpr}
        if switches != set(self.constants):
            raise TypeError(f"{self.function.__name__} has the constants {switches}, not {set(self.constants)}")
        signature = {name: self._type(name) for name in self.function.arg_names}
        source = ASTSource(self.function, signature, constexprs=self.constants)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in _FIXED:
            return _FIXED[name]
        if name in self.wide:
            return "*fp32"
        if (name.isupper() and len(name) > 1) or name in _NARROW:
            return "*bf16"
        return "fp32" if name in _FLOATS else "i32"


def _attention_intensity(function: Any, kind: str, size: int) -> float:
    """FLOP a byte of one head's call at length _LENGTH, causal."""
    products = triton_attention.PRODUCTS[function.__name__][("value", "tangent", "tangents of keys").index(kind)]
    read_once = 8 * _LENGTH * size * 2 * (1 if kind == "value" else 2)  # about four tensors in, four out, in 16 bits
    return products * _LENGTH**2 * size / read_once


def calls(family: str, capability: int) -> Iterator[Call]:
    """Every call of a family of FAMILIES, as it is launched on a device of DEVICES."""
    at, el, vo = triton_attention, triton_elementwise, triton_vocabulary
    if family.startswith("attention"):
        size = int(family.removeprefix("attention "))
        functions = {"forward": at._forward, "queries": at._queries_backward, "keys": at._keys_backward}
        for kind, tangent, own, causal in (
            ("value", False, True, 1),
            ("tangent", True, True, 1),
            ("tangents of keys", True, False, 0),
            ("value", False, False, 9),
        ):
            flags = {"TANGENT": tangent, "CAUSAL": causal, "SEGMENTS": causal > 0}
            for kernel, function in functions.items():
                options = at.launch_options(kernel, kind, size, 2, DEVICES[capability].shared[0])
                warps, stages = options.pop("num_warps"), options.pop("num_stages")
                own_flags = {"KT": kind == "tangents of keys"} if kernel == "keys" else {"OWN": own}
                yield Call(
                    function,
                    {**flags, **own_flags, **options},
                    warps=warps,
                    stages=stages,
                    intensity=_attention_intensity(function, kind, size),
                )
    elif family == "elementwise":
        for tangent in (True, False):
            yield Call(el._rms_forward, {"TANGENT": tangent, "BD": 512})
            yield Call(el._rms_backward, {"TANGENT": tangent, "WEIGHT": tangent, "BD": 512})
            yield Call(el._swiglu_forward, {"TANGENT": tangent, "BF": 1024})
            yield Call(el._swiglu_backward, {"TANGENT": tangent, "BF": 1024})
        for backward in (True, False):
            yield Call(el._heads, {"BACKWARD": backward, "BP": 512})
        yield Call(triton_fp8._round_rows, {"BR": triton_fp8._ROWS, "BK": triton_fp8._COLUMNS}, least=89)
    else:
        block = {"BLOCK": 1024}
        for logits in (("Y", "NEXT"), ()):  # in fp32, in bf16
            yield Call(vo._embed, block, logits)
            for rule in StepRule:
                on = {"BY_LOGITS": rule.by_logits, "FROM_P": rule.from_probabilities, **block}
                for flag in (True, False):
                    yield Call(vo._refine, {"KEEP": flag, **on}, (*logits, "Q"))
                    yield Call(vo._update, {"STEP": flag, **on}, (*logits, "Q"))
                yield Call(vo._direction, {"BY_LOGITS": rule.by_logits, **block}, logits)
            yield Call(vo._noise, {"GOLDEN": vo.GOLDEN, **block}, logits)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, of a compiled kernel, by `cuobjdump`.

    Raises:
        ValueError: if it does not say.
    """
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {text[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def resources(call: Call, capability: int) -> dict[str, Any]:
    """What a call takes of a device.

    Raises:
        ValueError: if a block of it asks for more shared memory than there is.
    """
    device, compiled = DEVICES[capability], call.compiled(capability)
    registers, spilled = usage(compiled.asm["cubin"])
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    if shared > device.shared[0]:
        raise ValueError(
            f"{call.function.__name__} {call.shown} asks for {shared} bytes of shared memory, and a block of "
            f"sm_{capability} may have {device.shared[0]}"
        )
    blocks = min(
        _REGISTERS // (registers * threads),
        device.shared[1] // (shared + _RESERVED),
        device.threads // threads,
        _BLOCKS_A_SM,
    )
    ridge = device.matrix_rate / device.bandwidth
    return {
        "kernel": call.function.__name__,
        "constants": call.shown,
        "device": f"sm_{capability}",
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "warps": compiled.metadata.num_warps,
        "stages": call.stages,
        "warps a multiprocessor": blocks * compiled.metadata.num_warps,
        "limit": "matrix unit" if call.intensity > ridge else "memory",
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Of rows as `resources` gives them."""
    head = ["kernel", "constants", "device", "registers", "spilled, B", "shared, B", "warps", "stages", "warps an SM"]
    head.append("limit")
    return Table("What kernels take", head, [[str(value) for value in row.values()] for row in rows])


def main(
    capability: list[int] = typer.Option(list(DEVICES), help="Compute capabilities, e.g. 90 for an H100."),
    family: list[str] = typer.Option(list(FAMILIES), help="Of kernels."),
    output: Path = typer.Option(RESULTS, help="Folder of kernel-resources-DATE.{json,md}."),
) -> None:
    """Compile, and write the table."""

    def work() -> None:
        for wrong in (*set(capability) - set(DEVICES), *set(family) - set(FAMILIES)):
            raise typer.BadParameter(f"no '{wrong}': choose of {', '.join(map(str, DEVICES))}; {', '.join(FAMILIES)}")
        jobs = [(call, of) for of in capability for name in family for call in calls(name, of) if of >= call.least]
        console = Console(width=160)
        try:
            rows = [resources(*job) for job in track(jobs, "compile", console=console, transient=True)]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        about = {"date": date.today().isoformat(), "triton": triton.__version__}
        rates = "; ".join(
            f"sm_{of}: {d.name}, {d.matrix_rate / 1e12:.0f} TFLOP/s, {d.bandwidth / 1e12:.2f} TB/s, "
            f"{d.shared[0]:,} B of shared memory a block"
            for of, d in DEVICES.items()
            if of in capability
        )
        said = (
            f"Triton {about['triton']}, {about['date']}, bf16 data; compiled, not run. {rates}. The limit is the "
            "roofline's: memory, if a kernel has fewer FLOP a byte than the device; of attention, at "
            f"{_LENGTH} positions.\n\n"
        )
        output.mkdir(parents=True, exist_ok=True)
        stem = output / f"kernel-resources-{about['date']}"
        write_whole(
            stem.with_suffix(".json"),
            json.dumps(about | {"devices": {str(k): asdict(v) for k, v in DEVICES.items()}, "rows": rows}, indent=1)
            + "\n",
        )
        write_whole(stem.with_suffix(".md"), said + table(rows).markdown() + "\n")
        console.print(f"{len(rows)} kernels: {stem.with_suffix('.md')}", highlight=False)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
