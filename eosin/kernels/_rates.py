"""How fast this machine multiplies, by which library and in which type: a probe of some 50 ms, kept for the next time.

Processors of different makers and years differ by more than tables could say: the faster library for a product, and
whether half precision is faster at all. The answer is kept in ``$XDG_CACHE_HOME/eosin`` (``~/.cache/eosin``) per
processor and version of torch, so that runs on one machine take the same way and give the same bits.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from eosin.kernels._products import affine, convolution_gradient, uses_onednn

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_ROWS, _HIDDEN, _WIDTH, _ROUNDS = 3072, 128, 512, 4
_WORTH_ROUNDING = 1.5  # how much faster products must be in half precision, which costs conversions around them


@dataclass(frozen=True)
class Rates:
    """Operations per second of a core in products, in billions."""

    fp32: float  # of a layer by oneDNN, which returns a new tensor; 0 without it
    fp32_blas: float  # of a layer by the BLAS, which writes where the result is kept
    fp32_gradient: float  # of a weight, by the BLAS
    fp32_convolution: float  # the same, by oneDNN
    bf16: float  # the same in bfloat16; 0 without instructions for it
    bf16_blas: float
    bf16_gradient: float

    @property
    def convolves(self) -> bool:
        """Whether a weight's gradient is faster as that of a convolution."""
        return self.fp32_convolution > self.fp32_gradient

    def layers_by_blas(self, dtype: torch.dtype) -> bool:
        """Return whether a layer is faster by the BLAS than by oneDNN."""
        return self.bf16_blas > self.bf16 if dtype == torch.bfloat16 else self.fp32_blas > self.fp32

    @property
    def precision(self) -> str:
        """The faster of ``fp32`` and ``bf16`` for a training step."""
        if not self.bf16_gradient:
            return "fp32"
        wide = 1 / max(self.fp32, self.fp32_blas) + 1 / max(self.fp32_gradient, self.fp32_convolution)
        narrow = 1 / max(self.bf16, self.bf16_blas) + 1 / self.bf16_gradient
        return "bf16" if wide > _WORTH_ROUNDING * narrow else "fp32"


def faster_precision(device: torch.device) -> str:
    """Return ``bf16`` where products in it are clearly faster than in float32, else ``fp32``.

    A GPU is asked whether it has bf16, a CPU is measured once.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return of_this_machine().precision if device.type == "cpu" else "fp32"


def processor() -> str:
    """Return the processor's name and those of its instruction sets that matter here."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    has = (facts.get("flags") or facts.get("Features") or "").split()
    sets = " ".join(name for name in INSTRUCTIONS if name in has) or "instruction sets unknown"
    return f"{facts.get('model name') or platform.processor() or platform.machine()} ({sets})"


@cache
def of_this_machine() -> Rates:
    """Return the rates of this machine's CPU, measured unless they are kept from an earlier process."""
    key = f"{processor()} torch {torch.__version__}"
    kept = _kept()
    try:
        return Rates(**kept[key])
    except (KeyError, TypeError):
        found = measure()
        _keep(kept | {key: asdict(found)})
        return found


def measure() -> Rates:
    """Time products of the sizes of an attention's gate on one core, the alternatives in turn."""
    work: dict[str, Callable[[], object]] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        rows, weight, upstream = (
            torch.ones(size, dtype=dtype) for size in ((_ROWS, _WIDTH), (_HIDDEN, _WIDTH), (_ROWS, _HIDDEN))
        )
        layer, place = torch.empty_like(upstream), torch.empty_like(weight)
        if name == "bf16" and not _has_bf16():
            continue
        if uses_onednn(rows):
            work[name] = partial(_kept_affine, layer, rows, weight)
        work[f"{name}_blas"] = partial(torch.mm, rows, weight.T, out=layer)
        work[f"{name}_gradient"] = partial(torch.mm, upstream.T, rows, out=place)
        if name == "fp32" and uses_onednn(rows):
            work["fp32_convolution"] = partial(convolution_gradient, upstream, rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other, and for what else the machine does
    try:
        rounds = [{name: _seconds(run) for name, run in work.items()} for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    times = {name: min(one[name] for one in rounds[1:]) for name in work}
    operations = 2.0 * _ROWS * _HIDDEN * _WIDTH / 1e9
    names = Rates.__dataclass_fields__
    return Rates(**{name: round(operations / times[name], 1) if name in times else 0.0 for name in names})


def _kept_affine(place: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return place.copy_(affine(rows, weight))


def _has_bf16() -> bool:
    return any(name in processor() for name in ("avx512_bf16", "amx_bf16", " bf16"))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.process_time()  # of all threads; does not see other programs
    run()
    return time.process_time() - begin


def _path() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "eosin" / "rates.json"


def _kept() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_path().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(rates: dict[str, dict[str, float]]) -> None:
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        partial = _path().with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(rates, indent=1), "utf-8")
        partial.replace(_path())
    except (OSError, RuntimeError):  # a home that cannot be written: the next process measures again
        return
