"""The opaque ops on CPU: registration, autograd, compile, DDP. The CPU key is the reference; Triton has its own test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mrmae.kernels import dispatch, mimic, pixels, reference

B, C, P, L, D = 2, 3, 8, 6, 8
VALUES = C * P * P
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def arguments(device: str) -> dict[str, tuple[Any, ...]]:
    """Positional arguments of every op, the differentiable tensors requiring gradients."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (B, 2 * P, 3 * P, C), dtype=torch.uint8).permute(0, 3, 1, 2).to(device)
    ids = torch.tensor([[0, 2, 5], [1, 3, 4]], device=device)
    scale, shift = torch.rand(C, device=device), torch.rand(C, device=device)
    student = torch.randn(B, 3, D, device=device)
    codes = torch.randint(-127, 128, (B, L, D), dtype=torch.int8, device=device)
    factors = (torch.rand(B, L, device=device).half(), torch.randn(D, device=device), torch.rand(D, device=device))
    pred, stats = torch.randn(B, 3, VALUES, device=device), torch.ones(2, B, 3, device=device)
    grad = torch.ones(B, 3, device=device)
    teacher = (codes, ids, *factors, None, None, None, "ln0", "mse", 1.0)
    centred = (codes, ids, *factors, torch.randn(L, D, device=device), factors[2], ids, "position", "mse", 1.0)
    product = torch.randint(0, 255, (B, L, 3), device=device).to(torch.uint8)
    group = torch.tensor([0, 1, 1, 2, 2, 2, 2], device=device)
    return {
        "gather_patches": (image, ids, scale, shift, P, torch.bfloat16),
        "embed_tokens": (
            student.clone().requires_grad_(),
            torch.randn(L, D, device=device, requires_grad=True),
            torch.randn(D, device=device, requires_grad=True),
            ids,
        ),
        "pixel_loss": (image, pred.clone().requires_grad_(), ids, scale, shift, P, True),
        "pixel_loss_backward": (grad, image, pred, ids, scale, shift, stats, P, True),
        "mimic_loss": (student.clone().requires_grad_(), *teacher),
        "mimic_loss of positions": (student.clone().requires_grad_(), *centred),
        "mimic_loss_backward": (grad, student, *teacher),
        "code_components": (product, ids, torch.randn(256, 7, device=device), group, B),
        "code_components of rows": (product[:, :3], None, torch.randn(256, 7, device=device), group, 2 * B),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(arguments("cpu")))
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mrmae, name.split()[0]).default, arguments(device)[name])


def losses(image: Tensor, pred: Tensor, student: Tensor, rest: dict[str, Any]) -> Tensor:
    """The kernels' share of a training step, through the opaque ops."""
    ids, scale, shift, codes = rest["ids"], rest["scale"], rest["shift"], rest["codes"]
    patches = pixels.gather_patches(image, ids, scale, shift, P, torch.float32)
    tokens = pixels.embed_tokens(patches @ rest["weight"], rest["position"], rest["cls_row"], ids)
    mimicry = mimic.mimic_loss(student + tokens[:, 1:], codes, ids, *6 * [None], "ln0", "mse", 1.0)
    return pixels.pixel_loss(image, pred * 2, ids, scale, shift, P, True).mean() + mimicry.mean() + tokens[:, 0].sum()


def reference_losses(image: Tensor, pred: Tensor, student: Tensor, rest: dict[str, Any]) -> Tensor:
    """The same through dispatch with kernels="torch"."""
    ids, codes = rest["ids"], rest["codes"]
    how = {"patch": P, "scale": rest["scale"], "shift": rest["shift"], "channels_last": False, "kernels": "torch"}
    patches = dispatch.gather_patches(image, ids, **how)
    tokens = dispatch.embed_tokens(patches @ rest["weight"], rest["position"], rest["cls_row"], ids, kernels="torch")
    mimicry = dispatch.mimic_loss(student + tokens[:, 1:], codes, ids, l=L, kernels="torch")
    return dispatch.pixel_loss(image, pred * 2, ids, **how).mean() + mimicry.mean() + tokens[:, 0].sum()


def step_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    all_of = arguments(device)
    image, ids, scale, shift, *_ = all_of["gather_patches"]
    student, position, cls_row, _ = all_of["embed_tokens"]
    weight = torch.randn(VALUES, D, device=device, requires_grad=True)
    rest = {"ids": ids, "scale": scale, "shift": shift, "codes": all_of["mimic_loss"][1]}
    rest |= {"position": position, "cls_row": cls_row, "weight": weight}
    return image, all_of["pixel_loss"][1], student, rest


def gradients_of(function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> list[Tensor]:
    loss = function(*inputs)
    leaves = [inputs[1], inputs[2], *(inputs[3][k] for k in ("position", "cls_row", "weight"))]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [losses, reference_losses])
def test_a_step_compiles_as_one_graph_with_the_same_loss_and_gradients(
    function: Callable[..., Tensor], device: str
) -> None:
    inputs = step_inputs(device)
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for ours, expected in zip(gradients_of(compiled, inputs), gradients_of(reference_losses, inputs)):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_product_codes_are_decoded_in_the_graph_of_the_loss(device: str) -> None:
    codes, ids, entries, group, n_rows = arguments(device)["code_components"]
    student = torch.randn(B, 3, D, device=device)
    book = (entries, group, torch.randn(7, D, device=device), torch.randn(D, device=device))

    def loss(student: Tensor) -> Tensor:
        values = dispatch.decode_codes(codes, ids, *book, n_rows=n_rows, kernels="torch")
        return dispatch.mimic_loss(student, values, ids, gathered=True, kernels="torch").mean()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(student), loss(student), rtol=2e-5, atol=1e-5)


@pytest.mark.gpu
def test_triton_and_torch_agree_to_fp32_rounding_through_dispatch() -> None:
    def step(kernels: str) -> Tensor:
        image, pred, student, rest = step_inputs("cuda")
        how = {"patch": P, "scale": rest["scale"], "shift": rest["shift"], "channels_last": False, "kernels": kernels}
        patches = dispatch.gather_patches(image, rest["ids"], **how)
        tokens = dispatch.embed_tokens(student, rest["position"], rest["cls_row"], rest["ids"], kernels=kernels)
        mimicry = dispatch.mimic_loss(student, rest["codes"], rest["ids"], kernels=kernels)
        pixel = dispatch.pixel_loss(image, pred, rest["ids"], **how)
        return torch.cat([x.flatten() for x in (patches, tokens, mimicry, pixel)])

    torch.testing.assert_close(step("triton"), step("torch"), rtol=2e-6, atol=1e-6)


def test_the_ops_equal_the_reference_and_its_autograd_in_float64() -> None:
    image, pred, student, rest = step_inputs("cpu")
    upstream = torch.randn(B, 3, dtype=torch.float64)
    pred, student = pred.detach().double().requires_grad_(), student.detach().double().requires_grad_()
    scale, shift = rest["scale"].double(), rest["shift"].double()
    for norm_pix in (True, False):
        ours = pixels.pixel_loss(image, pred, rest["ids"], scale, shift, P, norm_pix)
        truth = reference.pixel_loss(image, pred, rest["ids"], scale, shift, patch=P, norm_pix=norm_pix)
        (grad,), (expected,) = (torch.autograd.grad(x, pred, upstream) for x in (ours, truth))
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    for distance in dispatch.KINDS_OF_DISTANCE:
        rows = (rest["codes"], rest["ids"], *6 * [None])
        ours = mimic.mimic_loss(student, *rows, "l2", distance, 0.5)
        truth = reference.mimic_loss(student, *rows, target="l2", distance=distance, beta=0.5)
        (grad,), (expected,) = (torch.autograd.grad(x, student, upstream) for x in (ours, truth))
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


class Step(torch.nn.Module):
    """A model whose forward is the kernels: what DDP and autocast see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(D, VALUES)

    def forward(self, image: Tensor, student: Tensor, rest: dict[str, Any]) -> Tensor:
        pred = self.head(student)
        return pixels.pixel_loss(image, pred, rest["ids"], rest["scale"], rest["shift"], P, True).mean()


def test_ddp_and_autocast_give_the_gradient_of_the_plain_model(tmp_path: Any) -> None:
    image, _, student, rest = step_inputs("cpu")
    model = Step()
    (expected,) = torch.autograd.grad(model(image, student, rest), model.head.weight)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)(image, student, rest).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(model.head.weight.grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(image, student, rest)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, model.head.weight)
    assert grad.dtype == torch.float32 and (grad - expected).norm() < 0.02 * expected.norm()


def test_backward_keeps_the_inputs_and_two_numbers_per_patch_only() -> None:
    """What the opaque ops add to the memory of a step: the plain reference keeps an fp32 row per patch and token."""
    image, pred, student, rest = step_inputs("cpu")
    rows = (rest["codes"], rest["ids"], *6 * [None])
    known = {x.untyped_storage().data_ptr() for x in (image, pred, student, *rest.values())}

    def saved(call: Callable[[], Tensor]) -> int:
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in known:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call()
        return sum(kept.values()) if out.requires_grad else -1

    arguments = (image, pred, rest["ids"], rest["scale"], rest["shift"])
    assert saved(lambda: pixels.pixel_loss(*arguments, P, True)) == B * 3 * 2 * 4
    assert saved(lambda: reference.pixel_loss(*arguments, patch=P, norm_pix=True)) >= B * 3 * VALUES * 4
    assert saved(lambda: mimic.mimic_loss(student, *rows, "ln0", "mse", 1.0)) == 0
    how = {"target": "ln0", "distance": "mse", "beta": 1.0}
    assert saved(lambda: reference.mimic_loss(student, *rows, **how)) >= B * 3 * D * 4
