"""Compile every Triton kernel for an H100 without having one; `test_triton.py` runs this in a process of its own.

The interpreter does not see what the compiler refuses: types that change in a loop, shapes
that are no constants. Prints one line a kernel.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebt_megatron.kernels import StepRule, triton_attention, triton_elementwise, triton_fp8, triton_vocabulary

POINTERS = {
    "LSE",
    "MU",
    "DELTA",
    "BETA",
    "GW",
    "TOP",
    "TOTAL",
    "FACTOR",
    "CENTRE",
    "ALPHA",
    "PP",
    "SCALE",
    "MEAN",
    "QUANTILES",
    "TABLE",
}  # always fp32
FIXED = {"OUT8": "*fp8e4nv", "SEG": "*i32", "FIRST": "*i32", "SECOND": "*i32", "COLUMN": "*i64"}
SHARED = 232448  # bytes a block can have on an H100
FLOATS = ("scale", "epsilon", "std")


def compile_kernel(function, wide=(), num_warps=4, num_stages=3, **constants):
    """Compile with bf16 data, fp32 for the pointers named in `wide`; arguments are as the launchers pass them."""
    switches = {p.name for p in function.params if p.is_constexpr}
    if switches != set(constants):
        raise TypeError(f"{function.__name__} has the constants {switches}, not {set(constants)}")
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in FIXED:
            signature[name] = FIXED[name]
        elif name in POINTERS or name in wide:
            signature[name] = "*fp32"
        elif (name.isupper() and len(name) > 1) or name in ("Q", "K", "V", "A", "X", "W", "Y", "E", "P"):
            signature[name] = "*bf16"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(function, signature, constexprs=constants)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED, f"{function.__name__} {constants}: {compiled.metadata.shared} bytes"
    print(f"{function.__name__} {constants}: {len(compiled.asm['ptx'])} bytes of PTX")


def main(names):
    at, el, vo = triton_attention, triton_elementwise, triton_vocabulary
    for size in (int(name.removeprefix("attention ")) for name in names if name.startswith("attention")):
        for kind, tangent, own, causal in (
            ("value", False, True, 1),
            ("tangent", True, True, 1),
            ("tangents of keys", True, False, 0),
            ("value", False, False, 9),
        ):
            flags = {"TANGENT": tangent, "CAUSAL": causal, "SEGMENTS": causal > 0}
            blocks = {name: at.launch_options(name, kind, size, 2) for name in ("forward", "queries", "keys")}
            compile_kernel(at._forward, OWN=own, **flags, **blocks["forward"])
            compile_kernel(at._queries_backward, OWN=own, **flags, **blocks["queries"])
            compile_kernel(at._keys_backward, KT=kind == "tangents of keys", **flags, **blocks["keys"])
    if "elementwise" in names:
        for tangent in (True, False):
            compile_kernel(el._rms_forward, TANGENT=tangent, BD=512)
            compile_kernel(el._rms_backward, TANGENT=tangent, WEIGHT=tangent, BD=512)
            compile_kernel(el._swiglu_forward, TANGENT=tangent, BF=1024)
            compile_kernel(el._swiglu_backward, TANGENT=tangent, BF=1024)
        for backward in (True, False):
            compile_kernel(el._heads, BACKWARD=backward, BP=512)
        compile_kernel(triton_fp8._round_rows, BR=triton_fp8._ROWS, BK=triton_fp8._COLUMNS)
    if "vocabulary" in names:
        for logits in (("Y", "NEXT"), ()):  # in fp32, in bf16
            compile_kernel(vo._embed, logits, BLOCK=1024)
            for rule in StepRule:
                on = {"BY_LOGITS": rule.by_logits, "FROM_P": rule.from_probabilities, "BLOCK": 1024}
                for flag in (True, False):
                    compile_kernel(vo._refine, (*logits, "Q"), KEEP=flag, **on)
                    compile_kernel(vo._update, (*logits, "Q"), STEP=flag, **on)
                compile_kernel(vo._direction, logits, BY_LOGITS=rule.by_logits, BLOCK=1024)
            compile_kernel(vo._noise, logits, GOLDEN=vo.GOLDEN, BLOCK=1024)


if __name__ == "__main__":
    main(sys.argv[1:])
