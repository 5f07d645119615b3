"""Distillation against autograd in float64 over whole logits, of PEFT and transformers."""

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from causal_models import VOCABULARY, causal_model, quiet_peft, randomize_trainable, relative_error
from torch import Tensor, nn

from dlora import LoraConfig, attach
from dlora.data.collate import Batch, collate, packed
from dlora.data.encode import Example
from dlora.lora.attach import attachment_of, trainable_parameters
from dlora.lora.dropout import SampleKeys
from dlora.objectives import chunked_loss
from dlora.objectives.distill import Distill, DistillOptions, likeliest
from dlora.objectives.teachers import OtherBase, OwnBase, TopK, Written, with_adapter

pytestmark = quiet_peft
EXACT = 1e-11
TARGETS = ["q_proj", "down_proj", "lm_head"]  # with a head that has an adapter


def batch_of(collated: Any) -> Batch:
    """Three sequences with a prompt each."""
    draw = np.random.default_rng(0)
    examples = []
    for number, length in enumerate((9, 14, 6)):
        ids = draw.integers(0, VOCABULARY, length).astype(np.int32)
        labels = ids.copy()
        labels[:3] = -100
        examples.append(Example(number, ids, labels))
    return collated(examples, 0)


def twins() -> tuple[nn.Module, Any]:
    """The same model with the same two adapters, the second one named `teacher`: ours, PEFT's."""
    base = causal_model("llama", torch.float64)
    settings: Any = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}
    other: Any = {"r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "lm_head"]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    theirs.add_adapter("teacher", peft.LoraConfig(**other))
    theirs = theirs.to(torch.float64)
    attach(base, LoraConfig(**settings))
    attach(base, LoraConfig(**other), name="teacher", is_trainable=False)
    randomize_trainable(base)
    found = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in trainable_parameters(base, "teacher").items():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(tensor.numel()))
            found[peft_name(name)].copy_(tensor)
        for name, tensor in trainable_parameters(base).items():
            found[peft_name(name)].copy_(tensor)
    return base, theirs


def peft_name(name: str) -> str:
    path, _, rest = name.partition(".adapter")
    own = "teacher" if rest.startswith("s.") else "default"
    return f"base_model.model.{path}.{rest.rpartition('.')[2]}.{own}.weight"


def reference(z: Tensor, teacher: Tensor, t: Tensor, c: float, w: float, T: float) -> Any:
    """(Σ L, Σ CE, Σ KL) of logits [N, V]."""
    ce = F.cross_entropy(z, t, reduction="sum")
    log_q, log_p = torch.log_softmax(z / T, -1), torch.log_softmax(teacher / T, -1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return c * ce + w * T**2 * kl, ce, kl


def rows(model: Any, batch: Batch) -> Any:
    """Logits and targets [N, …], a sequence at a time."""
    pieces = []
    for number, length in enumerate(batch.lengths):
        start = sum(batch.lengths[:number]) if batch.packed else 0
        row = 0 if batch.packed else number
        piece = slice(start, start + length)
        ids, targets = batch.input_ids[row, piece], batch.targets[row, piece]
        logits = model(input_ids=ids[None]).logits[0]
        pieces.append((logits[targets != -100], targets[targets != -100]))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


@pytest.mark.parametrize("collated", [collate, packed])
@pytest.mark.parametrize("teacher", ["base", "adapter", "other"])
@pytest.mark.parametrize(("c", "w", "T"), [(1.0, 1.0, 1.0), (0.3, 0.7, 2.5), (0.0, 1.0, 2.0)])
def test_loss_figures_and_gradients(
    teacher: str, collated: Any, c: float, w: float, T: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", {"cpu": 4 * VOCABULARY * 4})
    ours, theirs = twins()
    batch = batch_of(collated)
    other = causal_model("granite", torch.float64) if teacher == "other" else None
    with torch.no_grad():
        if teacher == "base":
            with theirs.disable_adapter():
                given = rows(theirs, batch)[0]
        elif other is not None:
            given = rows(other, batch)[0]
        else:
            theirs.set_adapter("teacher")
            given = rows(theirs, batch)[0]
            theirs.set_adapter("default")
    wanted = reference(*(rows(theirs, batch)[0], given, rows(theirs, batch)[1]), c, w, T)
    wanted[0].backward()

    chunked_loss.install(ours)
    objective = Distill(DistillOptions(temperature=T, weight=w, ce_weight=c))
    objective.teacher = OwnBase()
    if teacher == "adapter":
        objective.teacher = OwnBase(lambda model: with_adapter(model, "teacher"))
    if other is not None:
        chunked_loss.install(other.eval().requires_grad_(False))
        objective.teacher = OtherBase(other)
    loss = objective.loss(ours.train(), batch)
    loss.backward()
    assert relative_error(loss, wanted[0]) < EXACT
    assert relative_error(objective.reported["ce"], wanted[1]) < EXACT
    assert relative_error(objective.reported["kl"], wanted[2]) < EXACT
    found = dict(theirs.named_parameters())
    for name, tensor in trainable_parameters(ours).items():
        assert relative_error(tensor.grad, found[peft_name(name)].grad) < EXACT, name
    assert all(t.grad is None for t in trainable_parameters(ours, "teacher").values())


@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_the_likeliest_tokens_and_the_rest(k: int) -> None:
    """Of k + 1 events, by autograd; live, and from what a file has."""
    base, _ = twins()
    batch = batch_of(collate)
    chunked_loss.install(base)
    T, generator = 2.0, torch.Generator().manual_seed(0)
    z = torch.randn(23, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(23, VOCABULARY, generator=generator, dtype=torch.float64)
    p, q = torch.softmax(teacher / T, -1), torch.softmax(z / T, -1)
    top = p.topk(k)
    q_top = q.gather(1, top.indices)
    wanted = (top.values * (top.values / q_top).log()).sum()
    if k < VOCABULARY:
        p_rest, q_rest = 1 - top.values.sum(1), 1 - q_top.sum(1)
        wanted = wanted + (p_rest * (p_rest / q_rest).log()).sum()
    [dz] = torch.autograd.grad(T**2 * wanted, z)
    objective = Distill(DistillOptions(temperature=T, ce_weight=0.0, top_k=k))
    targets = torch.zeros(23, dtype=torch.int64)
    for given in (lambda piece: teacher[piece], TopK(top.indices, top.values.log())):
        objective.reported = {"ce": torch.zeros(()).double(), "kl": torch.zeros(()).double()}
        total, gradient = objective.criterion(given, targets)(z.detach(), slice(0, 23))
        assert relative_error(total, T**2 * wanted) < EXACT
        assert relative_error(gradient(), dz) < 1e-9

    # as it is written and read
    taken: list[TopK] = []
    live, written = copy.deepcopy(objective), copy.deepcopy(objective)
    live.teacher = OwnBase()

    def take(head: Any) -> Tensor:
        taken.append(likeliest(head, T, k))
        return head.hidden

    OwnBase().teach(base, batch, take)
    written.teacher = Written(lambda batch: taken[0])
    losses = [one.loss(base, batch) for one in (live, written)]
    assert relative_error(losses[1], losses[0]) < EXACT


def test_an_excluded_token_adds_nothing() -> None:
    """Some classes give −∞ to tokens that cannot be."""
    z = torch.randn(4, 9, dtype=torch.float64)
    teacher = torch.randn(4, 9, dtype=torch.float64)
    teacher[:, 3] = float("-inf")
    z[1:, 3] = float("-inf")
    objective = Distill(DistillOptions(ce_weight=0.0))
    objective.reported = {"ce": torch.zeros(()).double(), "kl": torch.zeros(()).double()}
    targets = torch.zeros(4, dtype=torch.int64)
    total, gradient = objective.criterion(lambda piece: teacher[piece], targets)(z, slice(0, 4))
    kept = [0, 1, 2, *range(4, 9)]
    p, q = torch.softmax(teacher, -1)[:, kept], torch.softmax(z, -1)[:, kept]
    assert relative_error(total, (p * (p / q).log()).sum()) < EXACT
    assert gradient().isfinite().all()


def test_a_teacher_draws_nothing() -> None:
    """Its loss depends on the dropout of what learns alone, and step 0 has no KL without it."""
    model = attach(causal_model("llama"), LoraConfig(r=3, lora_dropout=0.5, target_modules=TARGETS))
    chunked_loss.install(model.train())
    batch, objective = batch_of(collate), Distill(DistillOptions(ce_weight=0.0))
    objective.teacher = OwnBase()
    assert float(objective.loss(model, batch)) == 0.0  # B = 0
    randomize_trainable(model)
    losses = []
    for step in (0, 0, 1):
        keys = SampleKeys(0, step, batch.ids, batch.lengths, 0)
        with attachment_of(model).stream.keyed(keys):
            losses.append(float(objective.loss(model, batch)))
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert float(objective.loss(model, batch)) > 0


def test_the_measured_numbers() -> None:
    """KL(p‖q) of two known distributions, forward: the teacher first."""
    z, teacher = torch.tensor([[0.5, 0.5, -1.0]]).double(), torch.tensor([[1.0, 0, -1]]).double()
    objective = Distill(DistillOptions(ce_weight=0.0))
    objective.reported = {"ce": torch.zeros(()).double(), "kl": torch.zeros(()).double()}
    criterion = objective.criterion(lambda piece: teacher[piece], torch.tensor([0]))
    assert float(criterion(z, slice(0, 1))[0]) == pytest.approx(0.101566, abs=1e-6)
