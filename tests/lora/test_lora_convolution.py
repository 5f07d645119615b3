"""LoRA of convolutions: PEFT's numbers and files, and W0 + ΔW written out in float64."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from beside_peft import check_steps
from causal_models import quiet_peft, randomize_trainable, relative_error
from masks import keep_mask
from refusals import refusal
from torch import Tensor, nn
from unet import CONVOLUTIONS, TARGETS, noisy, unet

from dlora import AdaLoraConfig, LoraConfig, attach, disabled, load_adapter, merge, save_adapter
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys

pytestmark = quiet_peft
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "rank_pattern": {"down": 3}}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_unet_trains_as_in_peft_and_goes_both_ways_through_files(
    dims: int, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    theirs = peft.get_peft_model(unet(dims), peft.LoraConfig(**SETTINGS))
    randomize_trainable(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = theirs.double()
    ours = load_adapter(unet(dims).double(), tmp_path / "theirs")

    def run(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        x, times, target = (t.double() for t in noisy(dims, seed=step))
        output = model(x, times)
        return output, F.mse_loss(output, target)

    check_steps(ours, theirs, 4, run, lr=1e-2)
    x, times, _ = (t.double() for t in noisy(dims, seed=9))
    save_adapter(ours, tmp_path / "ours")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(unet(dims), tmp_path / "ours").double()
        assert relative_error(loaded(x, times), ours(x, times)) < 1e-6
        merge(ours)
        assert relative_error(ours(x, times), loaded(x, times)) < 1e-6
        if dims < 3:  # where PEFT takes a kernel of 1×1×1 for one of 1×1
            for name, weight in loaded.merge_and_unload().named_parameters():
                assert relative_error(ours.get_parameter(name), weight) < 1e-6


# dims, arguments of the convolution, spatial sizes of x; `single` is an input without a batch.
CASES: dict[str, tuple[int, dict[str, Any], tuple[int, ...]]] = {
    "1d": (1, {"kernel_size": 3}, (7,)),
    "1d, same, even kernel": (1, {"kernel_size": 4, "padding": "same"}, (7,)),
    "1d, strided, no bias": (1, {"kernel_size": 3, "stride": 2, "bias": False}, (8,)),
    "2d": (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, (6, 5)),
    "2d, one place": (2, {"kernel_size": 1}, (4, 3)),
    "2d, same": (2, {"kernel_size": 3, "padding": "same", "bias": False}, (5, 4)),
    "2d, valid": (2, {"kernel_size": 2, "padding": "valid"}, (5, 4)),
    "3d": (3, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (0, 1, 1)}, (4, 5, 3)),
}
MEMORY = {2: torch.channels_last, 3: torch.channels_last_3d}


def base(case: str, dtype: torch.dtype) -> nn.Sequential:
    """One convolution of 4 → 6 channels, the same at every call."""
    dims, arguments, _ = CASES[case]
    torch.manual_seed(3)
    return nn.Sequential(CONVOLUTIONS[dims](4, 6, **arguments)).to(dtype).eval()


def layer(case: str, dtype: torch.dtype, config: LoraConfig | None = None) -> nn.Sequential:
    """The same, adapted."""
    model = base(case, dtype)
    attach(model, config or LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    randomize_trainable(model)
    return model


def images(case: str, dtype: torch.dtype, single: bool = False) -> Tensor:
    torch.manual_seed(4)
    x = torch.randn(*(() if single else (3,)), 4, *CASES[case][2], dtype=torch.float64)
    return x.to(dtype)


def written_out(model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y of W0 + s·B·A in float64, and the gradients of Σ sin(y)."""
    host, adapter = model[0], model[0].adapter
    parts = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}
    B = parts["lora_B"] * parts["lora_E"].mT if "lora_E" in parts else parts["lora_B"]
    update = adapter.scaling * (B @ parts["lora_A"]).view(host.weight.shape)
    x = x.detach().double().requires_grad_()
    bias = None if host.bias is None else host.bias.double()
    y = host._conv_forward(x, host.weight.double() + update, bias)
    y.sin().sum().backward()
    return y.detach(), {"x": x.grad} | {name: part.grad for name, part in parts.items()}


def computed(model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.detach().requires_grad_()
    y = model(x)
    y.double().sin().sum().backward()
    gradients = {name: p.grad for name, p in model[0].adapter.named_parameters()}
    return y.detach(), {"x": x.grad, **gradients}


def assert_close(model: nn.Sequential, x: Tensor, tolerance: float) -> Tensor:
    """The layer's output, once that and its gradients are those of the formed weight."""
    y, gradients = computed(model, x)
    wanted, wanted_gradients = written_out(model, x)
    assert relative_error(y, wanted) < tolerance
    for name, gradient in wanted_gradients.items():
        assert relative_error(gradients[name], gradient) < tolerance, name
    return y


@pytest.mark.parametrize("single", [False, True], ids=["batch", "single"])
@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_the_formed_weight(case: str, single: bool) -> None:
    assert_close(layer(case, torch.float64), images(case, torch.float64, single), 1e-13)


@pytest.mark.parametrize("case", ["2d", "2d, one place", "3d"])
def test_channels_last_in_channels_last_out(case: str) -> None:
    memory = MEMORY[CASES[case][0]]
    model = layer(case, torch.float32)
    x = images(case, torch.float32).to(memory_format=memory)
    y = assert_close(model, x, 1e-5)
    with disabled(model):
        assert y.stride() == model(x).stride()
    assert y.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("single", [False, True], ids=["batch", "single"])
@pytest.mark.parametrize("case", ["1d", "2d", "3d"])
def test_dropout_acts_on_the_input_of_the_update_alone(case: str, single: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.4, target_modules=["0"])
    model, x = layer(case, torch.float64, config).train(), images(case, torch.float64, single)
    torch.manual_seed(11)
    y = model(x)
    channels = -1 - CASES[case][0]
    torch.manual_seed(11)
    stream = attachment_of(model).stream
    keep = keep_mask(stream, x.movedim(channels, -1), 0.4, "0").movedim(-1, channels)
    assert 0 < keep.double().mean() < 1
    with disabled(model):
        plain = model(x)
    effect = written_out(model, x * keep / 0.6)[0] - model[0]._conv_forward(
        x * keep / 0.6, model[0].weight, model[0].bias
    )
    torch.testing.assert_close(y, plain + effect, rtol=1e-12, atol=1e-12)


def test_keyed_masks_reach_every_place_and_do_not_depend_on_the_batch() -> None:
    """A 1-d convolution's places are the tokens of a sequence; an image is a sequence's own."""
    config = LoraConfig(r=3, lora_dropout=0.5, target_modules=["0"])
    model, x = layer("1d", torch.float64, config).train(), images("1d", torch.float64)
    stream = attachment_of(model).stream
    with stream.keyed(SampleKeys(0, 1, (8, 9, 7), (7, 5, 7))):
        together = model(x)
    with stream.keyed(SampleKeys(0, 1, (7,), (7,))):
        alone = model(x[2:])
    torch.testing.assert_close(alone, together[2:], rtol=1e-12, atol=1e-12)
    images_of_two = torch.zeros(2, 9, 9, 4)
    with stream.keyed(SampleKeys(0, 1, (8, 9), (2, 3))):
        keep = keep_mask(stream, images_of_two, 0.5, "0")
    assert not keep[:, -1, -1].all() or not keep[:, -2].all()
    with stream.keyed(SampleKeys(0, 1, (9,), (3,))):
        assert torch.equal(keep_mask(stream, images_of_two[1:], 0.5, "0"), keep[1:])


def test_it_starts_as_peft_s_at_no_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(40, 8, 3))
    x = torch.randn(2, 40, 5, 5)
    before = model(x)
    attach(model, LoraConfig(r=32, target_modules=["0"]))
    assert torch.equal(model(x), before)
    A = model[0].adapter.lora_A.detach()
    assert A.abs().max() <= 360**-0.5
    assert A.std() == pytest.approx((3 * 360) ** -0.5, rel=0.02)


@pytest.mark.parametrize("case", ["1d", "2d", "3d"])
def test_adalora_prunes_and_exports_a_convolution(case: str, tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"])
    model, x = layer(case, torch.float32, config), images(case, torch.float32)
    assert_close(model, x, 1e-5)
    model[0].adapter.kept = torch.tensor([True, False, True, True])
    save_adapter(model, tmp_path)
    said = refusal(save_adapter, model, tmp_path / "own form", peft_type="ADALORA")
    assert said.startswith("peft_type: PEFT's ADALORA does not support the convo")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base(case, torch.float32), tmp_path)
        assert theirs.base_model.model[0].r["default"] == 3
        assert relative_error(theirs(x), model(x)) < 1e-5


class OwnForward(nn.Conv2d):
    """Computes something else than its class says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


REFUSED = {
    "groups": (nn.Conv2d(4, 6, 3, groups=2), "groups=2: W0 connects channels of one group"),
    "dilation": (nn.Conv1d(4, 6, 3, dilation=2), "dilation=(2,): in PEFT's form A is not dilated"),
    "padding": (
        nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"),
        "padding_mode='circular': in PEFT's form A sees zeros there",
    ),
    "forward": (OwnForward(4, 6, 3), "it has a forward of its own"),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), "Linear, Conv1D, Embedding and Conv1d, 2d, 3d can"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_such_form_is_refused_with_the_reason(case: str) -> None:
    module, reason = REFUSED[case]
    said = refusal(attach, nn.Sequential(module), LoraConfig(target_modules=["0"]))
    kind = type(module).__name__
    wanted = f"target_modules: 0 is a {kind}, which cannot carry an adapter ({reason}"
    assert said.startswith(wanted)
