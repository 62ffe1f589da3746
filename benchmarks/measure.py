"""What the benchmarks share: time, bytes moved, bytes saved for backward, memory, and the CSV rows."""

import csv
import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent
COLUMNS = (
    "kernel,provider,mode,shape,p20_ms,p50_ms,p80_ms,gb_per_s,pct_copy,minimal_bytes,moved_bytes,saved_bytes,peak_bytes,error,"
    "repeatable,device,torch,triton,commit,date"
).split(",")


def size(*tensors: Tensor) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


class CountBytes(TorchDispatchMode):
    """Bytes read and written by every operation that is no view; a gather reads the rows it picks."""

    PICKS = ("index.Tensor", "gather.default", "index_select.default")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    @staticmethod
    def real(t: Tensor) -> int:
        """Bytes of the distinct elements: an expanded dimension is read once."""
        return (
            t.element_size() * int(torch.tensor([n for n, s in zip(t.shape, t.stride()) if s]).prod())
            if t.numel()
            else 0
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func.__name__
        if is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "arange")):
            return out
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in self.PICKS:
            read = [t for t in read if t.dtype == torch.int64] + written
        self.bytes += sum(map(self.real, read)) + sum(map(self.real, written))
        return out


def saved_bytes(call: Callable[[dict[str, Any]], Tensor], x: dict[str, Any]) -> int:
    """Bytes that autograd keeps for backward, beyond the inputs themselves, which live anyway."""
    inputs = {t.untyped_storage().data_ptr() for t in x.values() if isinstance(t, Tensor)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in inputs:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(x)  # kept alive, so that no storage is counted under a reused address
    del out
    return sum(kept.values())


def moved_bytes(step: Callable[[dict[str, Any]], Any], x: dict[str, Any]) -> int:
    with CountBytes() as counter:
        step(x)
    return counter.bytes


def clock(device: str) -> Callable[[], float]:
    """Seconds. With one CPU thread, the time that thread had: a shared machine's other work does not count."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def time_ms(run: Callable[[int], Any], device: str, budget_s: float) -> tuple[float, float, float]:
    """p20, p50, p80 of at least 5 runs, until the budget is spent; the L2 cache is cleared before each on CUDA."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None
    now, times = clock(device), []
    for i in range(1 if flush is None else 5):
        run(i)
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        if flush is None:
            start = now()
            run(len(times))
            times.append((now() - start) * 1e3)
        else:
            flush.zero_()
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            run(len(times))
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return p20, statistics.median(times), p80


def copy_row(device: str, budget_s: float) -> dict[str, Any]:
    """A plain copy of a large buffer: the bandwidth this machine has now."""
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    p20, p50, p80 = time_ms(lambda _: target.copy_(source), device, budget_s)
    row = {"kernel": "copy", "provider": "torch", "mode": "forward", "shape": f"{size(source) >> 20}MiB"}
    return row | {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "gb_per_s": 2 * size(source) / p50 / 1e6,
        "pct_copy": 100.0,
    }


def peak_bytes(step: Callable[[dict[str, Any]], Any], x: dict[str, Any], device: str) -> int | str:
    if device != "cuda":
        return ""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(x)
    return torch.cuda.max_memory_allocated() - before


def cpu_name(model: str) -> str:
    threads = torch.get_num_threads()
    return f"CPU, {'1 thread, CPU time' if threads == 1 else f'{threads} threads'}, {model}"


def machine(device: str) -> dict[str, str]:
    """Where and with what the rows were measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(model),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def commit() -> str:
    """This checkout's commit, with `+` where a tracked file other than a result was changed on top of it."""
    git = ["git", "-C", str(ROOT.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    ask = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    return head + "+" * bool(subprocess.run(ask, capture_output=True, text=True).stdout.strip())


def shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def append(
    path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS, *, instead_of: Sequence[str] = ()
) -> None:
    """Add rows to a CSV, with a header in a new file. instead_of: columns; older rows that agree with a new one in all of
    them are dropped first."""
    new = [{k: str(shown(v)) for k, v in row.items()} for row in rows]
    old: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    if instead_of:
        measured = {tuple(row.get(name, "") for name in instead_of) for row in new}
        old = [row for row in old if tuple(row.get(name, "") for name in instead_of) not in measured]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])


def memory_mark(device: str) -> int | None:
    """Bytes in use now, with the peak counter set back to them: of the GPU, or resident; None where nobody counts them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is allocated now
        Path("/proc/self/clear_refs").write_text("5")
        return status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def memory_peak(device: str, mark: int | None) -> int | str:
    """The most bytes in use since `memory_mark`, beyond those of then; empty where nobody counts them."""
    if mark is None:
        return ""
    return (torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")) - mark


def status_bytes(name: str) -> int:
    """A field of this process's /proc status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10
