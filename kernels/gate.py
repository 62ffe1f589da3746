"""The ahead-of-time gate: what the compiler makes of every kernel, without a GPU. `python -m mrmae.kernels.gate` prints the table.

Each case is the launch that the `triton_*.py` files would start for the shapes of a ViT-B/16 run, compiled for sm_80,
sm_90 and sm_100 with the launcher's own hints (an argument of 1 is a constant, a multiple of 16 is declared as one), then read back with
`cuobjdump` and `nvdisasm`: registers, stack, local (spill) instructions, shared memory in bytes, barriers, the widest global load and
store in bits, how many offsets are multiplied in 64 bits (those of samples), the patches or tokens of a program, and how many loads and stores of
each width its code has. Rows with code `before` are those of the kernels that these took the place of, `words` those of the pixel kernels
in between, which read every image in words of 64 bits.
"""

import csv
import io
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrmae.kernels.launch import OPTIONS, Launch

ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.int8: "i8",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
COLUMNS = (
    "case",
    "code",
    "sm",
    "warps",
    "registers",
    "stack",
    "local",
    "shared",
    "barriers",
    "load_bits",
    "store_bits",
    "int64_rows",
    "rows",
    "loads",
    "stores",
)
N, L, K, M = 4, 196, 49, 147


def image_batch(dtype: torch.dtype, *, channels: int = 3, side: int = 224, channels_last: bool = False) -> Tensor:
    """An image batch as the kernels get it: a [b, c, h, w] view."""
    if channels_last:
        return torch.zeros(N, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)
    return torch.zeros(N, channels, side, side, dtype=dtype)


def cropped_batch(width: int) -> Tensor:
    """224 columns and rows of interleaved images: 229 rows, so that the launcher cannot tell that images are an even number of words apart."""
    return torch.zeros(N, 229, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)[:, :, 3:227, width - 224 :]


def gather_case(image: Tensor, dtype: torch.dtype, patch: int = 16) -> Launch:
    from mrmae.kernels import triton_patches

    channels = image.shape[1]
    one, ids = torch.ones(channels), torch.zeros(N, K, dtype=torch.int64)
    out = torch.empty(N, K, channels * patch**2, dtype=dtype)
    return triton_patches.gather_patches(image, ids, one, one, out, patch=patch)


def embed_case(dtype: torch.dtype) -> Launch:
    from mrmae.kernels import triton_patches

    ids = torch.zeros(N, K, dtype=torch.int64)
    out = torch.empty(N, K + 1, 768)
    return triton_patches.embed_tokens(
        torch.zeros(N, K, 768, dtype=dtype), torch.zeros(L, 768), torch.zeros(768), ids, out
    )


def pixel_case(image: Tensor, dtype: torch.dtype, *, backward: bool, patch: int = 16) -> Launch:
    """pred is the strided tail of the decoder's [b, 1 + k + m, P] output; grad is a mean's: expanded."""
    from mrmae.kernels import triton_pixels

    channels = image.shape[1]
    one, ids = torch.ones(channels), torch.zeros(N, M, dtype=torch.int64)
    pred = torch.zeros(N, 1 + K + M, channels * patch**2, dtype=dtype)[:, 1 + K :]
    loss, stats = torch.empty(N, M), torch.empty(2, N, M)
    if not backward:
        return triton_pixels.pixel_loss(image, pred, ids, one, one, loss, stats, patch=patch, norm_pix=True)
    grad, out = torch.ones(()).expand(N, M), torch.empty(pred.shape, dtype=dtype)
    return triton_pixels.pixel_loss_backward(grad, image, pred, ids, one, one, stats, out, patch=patch)


def mimic_case(codes: torch.dtype, target: str, distance: str, *, backward: bool, d: int = 768) -> Launch:
    """student is the strided tail of [cls | tokens]; int8 codes come with all the quantiser's factors."""
    from mrmae.kernels import triton_mimic

    student = torch.zeros(N, 1 + K, d, dtype=torch.bfloat16)[:, 1:]
    ids, one = torch.zeros(N, K, dtype=torch.int64), torch.ones(d)
    factors = (
        (torch.ones(N, L, dtype=torch.float16), one, one)
        if codes in (torch.int8, torch.float8_e4m3fn)
        else (None, None, None)
    )
    stats = {"channel": (one, one, None), "position": (torch.ones(L, d), one, ids)}.get(
        target.partition("+")[0], (None, None, None)
    )
    rest = (ids, *factors, *stats, target, distance, 1.0)
    teacher = torch.zeros(N, L, d, dtype=codes)
    if backward:
        out = torch.empty(N, K, d, dtype=torch.bfloat16)
        return triton_mimic.mimic_loss_backward(torch.ones(()).expand(N, K), out, student, teacher, *rest)
    return triton_mimic.mimic_loss(torch.empty(N, K), student, teacher, *rest)


def decode_case(d: int = 768) -> Launch:
    """The 96 codes of each token, all components kept."""
    from mrmae.kernels import triton_mimic

    codes, ids = torch.zeros(N, L, d // 8, dtype=torch.uint8), torch.zeros(N, K, dtype=torch.int64)
    out, entries, group = torch.empty(N, K, d), torch.zeros(256, d), torch.arange(d) // 8
    return triton_mimic.code_components(out, codes, ids, entries, group)


U8, BF16, FP32 = torch.uint8, torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], Launch]] = {
    "gather u8 NCHW -> bf16": lambda: gather_case(image_batch(U8), BF16),
    "gather u8 NHWC -> bf16": lambda: gather_case(image_batch(U8, channels_last=True), BF16),
    "gather fp32 NCHW -> fp32": lambda: gather_case(image_batch(FP32), FP32),
    "gather u8 NHWC -> bf16, patch 14": lambda: gather_case(image_batch(U8, channels_last=True), BF16, 14),
    "gather u8 NHWC -> bf16, patch 8": lambda: gather_case(image_batch(U8, channels_last=True), BF16, 8),
    "gather u8 NHWC -> bf16, rows of 720 bytes": lambda: gather_case(cropped_batch(240), BF16),
    "gather u8 NHWC -> bf16, rows of 696 bytes": lambda: gather_case(cropped_batch(232), BF16),  # 8 x 87
    "gather fp32 NCHW -> bf16, 13 channels, patch 8": lambda: gather_case(
        image_batch(FP32, channels=13, side=112), BF16, 8
    ),
    "embed bf16 -> fp32": lambda: embed_case(BF16),
    "pixel forward u8 NCHW, bf16": lambda: pixel_case(image_batch(U8), BF16, backward=False),
    "pixel forward u8 NHWC, bf16": lambda: pixel_case(image_batch(U8, channels_last=True), BF16, backward=False),
    "pixel backward u8 NCHW, bf16": lambda: pixel_case(image_batch(U8), BF16, backward=True),
    "pixel backward u8 NHWC, bf16": lambda: pixel_case(image_batch(U8, channels_last=True), BF16, backward=True),
    "pixel forward u8 NHWC, bf16, 4 channels": lambda: pixel_case(
        image_batch(U8, channels=4, channels_last=True), BF16, backward=False
    ),
    "pixel backward u8 NHWC, bf16, patch 32": lambda: pixel_case(
        image_batch(U8, channels_last=True), BF16, backward=True, patch=32
    ),
    "pixel forward u8 NHWC, bf16, patch 14": lambda: pixel_case(
        image_batch(U8, channels_last=True), BF16, backward=False, patch=14
    ),
    "mimic forward int8, ln0 mse": lambda: mimic_case(torch.int8, "ln0", "mse", backward=False),
    "mimic backward int8, ln0 mse": lambda: mimic_case(torch.int8, "ln0", "mse", backward=True),
    "mimic forward int8, position mse": lambda: mimic_case(torch.int8, "position", "mse", backward=False),
    "mimic backward int8, position mse": lambda: mimic_case(torch.int8, "position", "mse", backward=True),
    "mimic forward int8, position+ln0 mse": lambda: mimic_case(torch.int8, "position+ln0", "mse", backward=False),
    "mimic backward int8, position+ln0 mse": lambda: mimic_case(torch.int8, "position+ln0", "mse", backward=True),
    "mimic forward fp16, l2 cosd": lambda: mimic_case(torch.float16, "l2", "cosd", backward=False),
    "mimic backward fp16, l2 cosd": lambda: mimic_case(torch.float16, "l2", "cosd", backward=True),
    "mimic forward int8, ln0 mse, 1280": lambda: mimic_case(torch.int8, "ln0", "mse", backward=False, d=1280),
    "mimic backward int8, ln0 mse, 1280": lambda: mimic_case(torch.int8, "ln0", "mse", backward=True, d=1280),
    "mimic forward int8, ln0 mse, 1536": lambda: mimic_case(torch.int8, "ln0", "mse", backward=False, d=1536),
    "mimic backward int8, ln0 mse, 1536": lambda: mimic_case(torch.int8, "ln0", "mse", backward=True, d=1536),
    "mimic backward int8, position mse, 1536": lambda: mimic_case(torch.int8, "position", "mse", backward=True, d=1536),
    "mimic forward e4m3, ln0 mse": lambda: mimic_case(torch.float8_e4m3fn, "ln0", "mse", backward=False),
    "mimic backward e4m3, ln0 mse": lambda: mimic_case(torch.float8_e4m3fn, "ln0", "mse", backward=True),
    "mimic forward int8, channel sl1, 1024": lambda: mimic_case(torch.int8, "channel", "sl1", backward=False, d=1024),
    "mimic backward int8, channel sl1, 1024": lambda: mimic_case(torch.int8, "channel", "sl1", backward=True, d=1024),
    "decode 96 codes": decode_case,
    "decode 128 codes": lambda: decode_case(1024),
}


def argument_hint(value: Any) -> tuple[str, Any, list[Any]]:
    """Type, constant or None, and attributes of one launch argument, as triton's launcher specialises it."""
    aligned = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", None, aligned  # the caching allocator aligns to 512 bytes
    if isinstance(value, float):
        return "fp32", None, []
    if value == 1:
        return "constexpr", 1, []
    return "i32" if abs(value) < 2**31 else "i64", None, aligned if value % 16 == 0 else []


def compile_for(launch: Launch, sm: int) -> Any:
    """The launch compiled for one architecture, no device needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hints = {name: argument_hint(value) for name, value in launch.arguments.items()}
    names = list(launch.kernel.arg_names)
    constants = {name: c for name, (_, c, _) in hints.items() if c is not None} | launch.constants
    signature = {name: "constexpr" if name in constants else hints[name][0] for name in names}
    attributes = {(names.index(name),): a for name, (_, _, a) in hints.items() if a}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": launch.warps, **OPTIONS})


def tool(name: str, content: bytes, *flags: str) -> str:
    """Output of one of the NVIDIA tools inside the triton wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([path, *flags, file.name], check=True, capture_output=True, text=True).stdout


def widest(sass: str, instruction: str) -> int:
    """Bits of the widest global load (LDG) or store (STG); 0 when there is none."""
    found = re.findall(rf"\b{instruction}\.E([.\w]*)", sass)
    return max((access_bits(suffix) for suffix in found), default=0)


def access_bits(suffix: str) -> int:
    """Bits of one access, from what follows `LDG.E`: 32 unless a width is named."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in suffix.split(".") if part in widths), 32)


def accesses(sass: str, instruction: str) -> str:
    """How many global loads (LDG) or stores (STG) of each width there are, as `8:24 128:3` (bits:count), in the code of one program."""
    counts = Counter(access_bits(suffix) for suffix in re.findall(rf"\b{instruction}\.E([.\w]*)", sass))
    return " ".join(f"{bits}:{n}" for bits, n in sorted(counts.items()))


def row_multiplications(ttir: str) -> int:
    """64-bit multiplications: the offsets of samples, which outgrow 32 bits; nothing else may need them."""
    return len(re.findall(r"arith\.muli .*: (?:tensor<[\dx]*)?i64", ttir))


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin, which is a 64-bit ELF file: its sections `.text.*`, 16 bytes an instruction."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, n, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(n)]
    start = sections[names][4]
    return b"".join(cubin[offset : offset + length] for name, _, _, _, offset, length in sections
                    if cubin.startswith(b".text.", start + name))  # fmt: skip


def disassembled(cubins: Sequence[bytes], sm: int) -> list[str]:
    """The instructions of each cubin as text, all from one call: nvdisasm takes a quarter of a second to begin."""
    codes = [machine_code(cubin) for cubin in cubins]
    text = tool("nvdisasm", b"".join(codes), "-c", "-ndf", "--binary", f"SM{sm}{'a' * (sm >= 90)}")
    lines = re.findall(r"^ +/\*[0-9a-f]{4,}\*/.*", text, re.M)
    assert len(lines) == sum(map(len, codes)) // 16, "nvdisasm gave other instructions than it was given"
    each = iter(lines)
    return ["\n".join(islice(each, len(code) // 16)) for code in codes]


def resources_of(launches: Sequence[Launch], sm: int) -> list[dict[str, int | str]]:
    """Rows of the table, without the names of their cases."""
    compiled = [compile_for(launch, sm) for launch in launches]
    codes = disassembled([one.asm["cubin"] for one in compiled], sm)
    return [seen_in(*each, sm=sm) for each in zip(launches, compiled, codes)]


def seen_in(launch: Launch, compiled: Any, sass: str, *, sm: int) -> dict[str, int | str]:
    """One row, from what the compiler made and its instructions."""
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", tool("cuobjdump", compiled.asm["cubin"], "-res-usage")))
    return {
        "sm": sm,
        "warps": launch.warps,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]) + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": int(compiled.metadata.shared),
        "barriers": len(re.findall(r"\bBAR\.", sass)),
        "load_bits": widest(sass, "LDG"),
        "store_bits": widest(sass, "STG"),
        "int64_rows": row_multiplications(compiled.asm["ttir"]),
        "rows": launch.rows,
        "loads": accesses(sass, "LDG"),
        "stores": accesses(sass, "STG"),
    }


def gate_rows() -> list[dict[str, Any]]:
    """Every case on every architecture."""
    found = [resources_of([case() for case in CASES.values()], sm) for sm in ARCHITECTURES]
    return [{"case": name, "code": "now", **row} for name, rows in zip(CASES, zip(*found)) for row in rows]


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The table as committed in benchmarks/results/kernels_gate.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.stdout.write(as_csv(gate_rows()))
