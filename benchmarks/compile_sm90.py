"""Compile every Triton kernel for an H100/H200 (sm_90) without a GPU and write what it uses to a table.

    python benchmarks/compile_sm90.py [--out benchmarks/results/compile_sm90.csv]

One row per kernel and shipped configuration: registers per thread, shared memory, spilled bytes. Rows of other versions
of Triton stay in the table. Exits with 1 when a configuration spills or needs more shared memory than an SM has.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a compiled kernel is wanted, whatever the tests' environment says

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from eosin.kernels.causal_conv import triton_impl as conv
from eosin.kernels.few_query_attention import triton_impl as few
from eosin.kernels.gated_attention import triton_impl as gate
from eosin.kernels.segment_pool import triton_impl as pool
from eosin.kernels.selective_scan import triton_impl as scan

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024
RESULTS = Path(__file__).parent / "results" / "compile_sm90.csv"
COLUMNS = ("triton", "kernel", "configuration", "warps", "registers", "shared_bytes", "spilled_bytes")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel in one shipped configuration.

    Parameters
    ----------
    kernel : triton.JITFunction
        What is compiled.
    name : str
        Which configuration, for the table.
    types : dict of str to str
        Triton's type of each run-time argument.
    constants : dict of str to value
        Compile-time arguments.
    warps : int
        Warps per program.
    """

    kernel: Any
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


def cases() -> Iterator[Case]:
    """Yield every configuration that the launchers can choose for the sizes of common encoders."""
    yield from _pool_cases()
    yield from _gate_cases()
    yield from _scan_cases()
    yield from _conv_cases()
    yield from _few_key_cases()


def _types(kernel: Any, constants: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
    """Return the type of every run-time argument: given ones, else a float32 pointer."""
    return {name: given.get(name, "*fp32") for name in kernel.arg_names if name not in constants}


def _case(kernel: Any, name: str, constants: dict[str, Any], given: dict[str, str], warps: int) -> Case:
    return Case(kernel, name, _types(kernel, constants, given), constants, warps)


def _pool_cases() -> Iterator[Case]:
    sizes = {"heads": "i32", "width": "i32"}
    tables = dict.fromkeys(("bags", "starts", "ends", "first"), "*i32") | {"row_index": "*i64"}
    for dtype, pointer in FLOATS.items():
        for heads in (1, 5, 64):
            blocks = pool.launch_sizes(200_000, heads, 1024)
            warps = blocks.pop("num_warps")
            blocks.pop("rows")
            narrower = {**blocks, "COLUMN_BLOCK": blocks["gradient_columns"]}
            for shape in (blocks, narrower):
                shape.pop("gradient_columns")
            given = sizes | tables | {"values": pointer, "d_values": pointer}
            for softmax in (True, False) if dtype == "fp32" else (True,):
                label = f"{dtype} heads={heads} softmax={softmax}"
                options = {"SOFTMAX": softmax, "NARROW": True}
                for gathered in (False, True) if heads == 1 else (False,):
                    more, place = options | {"GATHERED": gathered}, f"{label} gathered={gathered}"
                    yield _case(pool.pool_partial, place, blocks | more, given, warps)
                    yield _case(pool.score_gradient, place, narrower | more, given, warps)
                yield _case(pool.value_gradient, label, narrower | options, given, warps)
    constants = {"COLUMN_BLOCK": 256, "SOFTMAX": True}
    yield _case(pool.pool_combine, "fp32", constants, sizes | tables, 4)
    constants = {"LARGEST": True, "ROW_BLOCK": pool.TOPK_ROWS}
    given = {"offsets": "*i32", "counts": "*i32", "chosen": "*i1", "heads": "i32"}
    yield _case(pool.radix_select, "fp32", constants, given, 8)


def _gate_cases() -> Iterator[Case]:
    integers = dict.fromkeys(("n_rows", "hidden", "heads", "seed", "first_row", "dropped"), "i32")
    for dtype, pointer in FLOATS.items():
        for heads in (1, 5):
            for gated in (True, False):
                for dropout in (True, False) if gated else (False,):
                    blocks = gate.launch_sizes(256, heads, DTYPES[dtype])
                    warps = blocks.pop("num_warps")
                    constants = {**blocks, "GATED": gated, "ACTIVATION": 1, "DROPOUT": dropout}
                    given = integers | {"projected": pointer, "d_projected": pointer}
                    label = f"{dtype} heads={heads} gated={gated} dropout={dropout}"
                    yield _case(gate.gate_scores, label, constants, given, warps)
                    yield _case(gate.gate_gradient, label, constants, given, warps)
    yield from _one_pass_cases()


def _one_pass_cases() -> Iterator[Case]:
    given = {"starts": "*i32", "ends": "*i32", "row_index": "*i64", "width": "i32", "hidden": "i32"}
    for dtype in ("bf16", "fp16"):
        typed = given | dict.fromkeys(("values", "weight"), FLOATS[dtype])
        for width in (512, 1024):
            for hidden, gated in ((256, True), (128, False)):
                blocks = gate.one_pass_sizes(200_000, hidden, width)
                blocks.pop("rows")
                warps = blocks.pop("num_warps")
                constants = {**blocks, "GATED": gated, "ACTIVATION": 1, "MASKED": True, "NARROW": True}
                for gathered in (False, True):
                    label = f"{dtype} width={width} hidden={hidden} gated={gated} gathered={gathered}"
                    yield _case(gate.one_pass_partial, label, constants | {"GATHERED": gathered}, typed, warps)


def _scan_cases() -> Iterator[Case]:
    integers = dict.fromkeys(("width", "n_rows", "n_chunks", "items", "kept", "size"), "i32")
    tables = dict.fromkeys(("starts", "ends", "first"), "*i32")
    half = ("u", "delta", "b", "c", "z", "d_out", "out", "d_u", "d_delta", "d_z")
    for dtype, pointer in FLOATS.items():
        given = integers | tables | dict.fromkeys(half, pointer)
        blocks = {"n_states": 16, "STATES": 16, "CHANNELS": scan.CHANNELS}
        yield _case(scan.chunk_states, dtype, blocks, given, 1)
        for gated in (True, False):
            constants = {**blocks, "GATED": gated}
            label = f"{dtype} gated={gated}"
            yield _case(scan.chunk_outputs, label, constants, given, 1)
            yield _case(scan.chunk_adjoints, label, constants, given, 1)
            constants = {**constants, "GROUPED": scan.GROUPED_BLOCKS}
            yield _case(scan.chunk_gradients, label, constants, given, 1)
    for reverse in (True, False):
        constants = {"BLOCK": scan.CARRY_BLOCK, "REVERSE": reverse}
        yield _case(scan.carry, f"reverse={reverse}", constants, integers | tables, 4)


def _conv_cases() -> Iterator[Case]:
    given = {"source": "*i64", "begins": "*i32", "n_places": "i32", "width": "i32"}
    for dtype, pointer in FLOATS.items():
        typed = given | dict.fromkeys(("x", "out", "d_out", "d_before", "d_x"), pointer)
        constants = {
            "TAPS": 4,
            "ACTIVATED": True,
            "ROW_BLOCK": conv.ROW_BLOCK,
            "COLUMN_BLOCK": conv.COLUMN_BLOCK,
        }
        yield _case(conv.conv_forward, dtype, constants, typed, 4)
        yield _case(conv.conv_before_gradient, dtype, {**constants, "TAP_BLOCK": 4}, typed, 4)
        yield _case(conv.conv_row_gradient, dtype, constants, typed, 4)


def _few_key_cases() -> Iterator[Case]:
    sizes = dict.fromkeys(("n_keys", "width", "read_width", "heads"), "i32") | {"scale": "fp32"}
    tables = dict.fromkeys(("bags", "starts", "ends"), "*i32")
    for dtype, pointer in FLOATS.items():
        given = sizes | tables | dict.fromkeys(("queries", "keys", "values", "d_queries"), pointer)
        for n_keys, head_width in ((16, 64),) if dtype == "fp32" else ((16, 64), (64, 64), (128, 64)):
            kind = DTYPES[dtype]
            assert few.fits(n_keys, head_width, head_width, kind)
            blocks = few.launch_sizes(200_000, n_keys, head_width, head_width, kind)
            blocks.pop("rows")
            warps = blocks.pop("num_warps")
            label = f"{dtype} keys={n_keys} head width={head_width}"
            for kernel in (few.few_key_forward, few.few_key_gradient):
                yield _case(kernel, label, blocks | {"NARROW": True}, given, warps)


def compile_case(case: Case) -> dict[str, Any]:
    """Compile one configuration and return its row of the table."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in ("width", "hidden")
    }
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGET, options=options)
    registers, spilled = _resources(compiled.asm["ptx"])
    return dict(
        zip(
            COLUMNS,
            (
                triton.__version__,
                case.kernel.__name__,
                case.name,
                case.warps,
                registers,
                compiled.metadata.shared,
                spilled,
            ),
            strict=True,
        )
    )


def _resources(ptx: str) -> tuple[int, int]:
    """Assemble once more and return registers per thread and spilled bytes, which the cubin alone does not say."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(TARGET.arch).path,
            "-v",
            "--gpu-name=sm_90a",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))
    return registers, spilled


def _others(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the table's rows of other versions of Triton, and of kernels that were not compiled now."""
    made = {(row["triton"], row["kernel"]) for row in rows}
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if (row["triton"], row["kernel"]) not in made]


def main(arguments: list[str] | None = None) -> int:
    """Compile all cases, write the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="compile kernels whose name contains this")
    options = parser.parse_args(arguments)
    rows = []
    for case in cases():
        if options.only in case.kernel.__name__:
            rows.append(compile_case(case))
            print(*rows[-1].values(), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = _others(options.out, rows)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: (row["triton"], row["kernel"])))
    bad = [row for row in rows if row["spilled_bytes"] or row["shared_bytes"] > MAX_SHARED_BYTES]
    for row in bad:
        print(f"{row['kernel']} {row['configuration']}: {row['spilled_bytes']} bytes spilled")
    print(f"{len(rows)} configurations, {len(bad)} refused, {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
