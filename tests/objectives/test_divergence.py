"""NLL, KL and agreement of a model beside its base, against transformers and PEFT in float64."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import tiny_model
from causal_models import VOCABULARY, causal_model, quiet_peft, randomize_trainable
from sampling import sampled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlora import LoraConfig, attach, save_adapter
from dlora.data.collate import Batch, collate, packed
from dlora.data.encode import Example
from dlora.objectives import chunked_loss
from dlora.objectives.divergence import SUMS, Forgotten, measure

pytestmark = quiet_peft
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5}
LENGTHS = (11, 4, 17, 6)
WIDTH = 24  # of `causal_model`
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "head copied": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, embedding": ("tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "dora": ("llama", {"use_dora": True}),
    "conv1d": ("gpt2", {}),
    "soft cap": ("gemma2", {}),
    "scaled logits": ("cohere", {}),
}


def examples(targets: bool = True) -> list[Example]:
    """Texts of `LENGTHS` tokens, of which the first third are a prompt, and the second all."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(VOCABULARY, (length,), generator=generator).int().numpy()
        labels = ids.copy()
        labels[: length if number == 1 or not targets else length // 3] = -100
        made.append(Example(number, ids, labels))
    return made


def sums(base: nn.Module, tuned: nn.Module) -> dict[str, float]:
    """The `SUMS` of whole models, a text at a time, by the definitions."""
    found = dict.fromkeys(SUMS, 0.0)
    for example in examples():
        ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
        labels = torch.from_numpy(example.labels.astype("int64"))[1:]
        at = (labels >= 0).nonzero()[:, 0]
        with torch.no_grad():
            p, q = (
                torch.distributions.Categorical(logits=model(ids).logits[0, :-1][at].double())
                for model in (base, tuned)
            )
        kl = float(torch.distributions.kl_divergence(p, q).sum())
        n = len(at)
        found["tokens"] += n
        found["base_nll"] -= float(p.log_prob(labels[at]).sum())
        found["nll"] -= float(q.log_prob(labels[at]).sum())
        found["kl"] += kl
        found["agreed"] += float((p.probs.argmax(-1) == q.probs.argmax(-1)).sum())
        found["texts"] += n > 0
        for name, value in (("kl_kl", kl * kl), ("kl_tokens", kl * n), ("tokens_tokens", n * n)):
            found[name] += value
    return found


def adapted(kind: str, settings: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(a model with adapters that have learned, its untouched base)."""
    base = causal_model(kind, dtype)
    model = attach(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=4, **settings))
    randomize_trainable(model)
    chunked_loss.install(model)
    return model.eval(), base.eval()


def batches() -> list[Batch]:
    """All texts in a batch, in a row that they share, and each alone."""
    each = [collate([example], 0) for example in examples()]
    return [collate(examples(), 0), packed(examples(), 0), *each]


def found(model: nn.Module, batch: Batch) -> dict[str, float]:
    return dict(zip(SUMS, measure(model, batch).tolist(), strict=True))


@pytest.mark.parametrize(
    ("case", "dtype"),
    sampled(
        [("llama", torch.float32), *((case, torch.float64) for case in CASES)],
        [(case, torch.float32) for case in CASES],
    ),
)
def test_sums_are_those_of_the_base_and_of_peft_s_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 6)  # 3 tokens at a time
    model, base = adapted(*CASES[case], dtype)
    save_adapter(model, tmp_path)
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    if "tied" not in case:  # PEFT would merge the embedding's update into the head as well
        tuned = tuned.merge_and_unload()
    wanted = sums(base.double(), tuned.double())
    padded, shared, *alone = batches()
    tolerance = EXACT[dtype] if case != "dora" else max(EXACT[dtype], 1e-6)
    tolerance = max(tolerance, 3e-7)  # PEFT's file is in float32
    for batch in (padded, shared):
        assert found(model, batch) == pytest.approx(wanted, rel=tolerance)
    added = torch.stack([measure(model, batch) for batch in alone]).sum(0).tolist()
    assert added == pytest.approx(list(wanted.values()), rel=tolerance)
    assert wanted["kl"] > 0.1 and wanted["agreed"] < wanted["tokens"]


def test_a_class_with_logits_of_its_own(tmp_path: Path) -> None:
    """BERT's head is no function of a row of hidden states alone."""
    model = tiny_model("bert", is_decoder=True).eval()
    base = copy.deepcopy(model)
    attach(model, LoraConfig(r=3, lora_alpha=300, target_modules=["query"]))
    randomize_trainable(model)
    tuned = copy.deepcopy(model)
    chunked_loss.install(model)
    batch = collate(examples(), 0)
    wanted = sums(base, tuned)
    assert found(model, batch) == pytest.approx(wanted, rel=1e-4) and wanted["kl"] > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_without_an_update_has_forgotten_nothing(dtype: torch.dtype) -> None:
    """KL 0 exactly, both NLLs the same bits, and the switch is on again."""
    model = attach(causal_model("llama", dtype), LoraConfig(r=3))
    chunked_loss.install(model)
    figures = Forgotten.of(measure(model.eval(), batches()[0]))
    assert figures.kl == figures.kl_error == 0 and figures.agreement == 1
    assert figures.nll == figures.base_nll > 1
    randomize_trainable(model)
    assert Forgotten.of(measure(model, batches()[0])).kl > 0


def test_known_distributions() -> None:
    """KL(p‖q) of p = softmax(1, 0, −1), q = softmax(½, ½, −1), as in methods.md §16."""
    values = torch.zeros(len(SUMS), dtype=torch.float64)
    p, q = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5, 0.5, -1.0]])
    wanted = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert float(wanted) == pytest.approx(0.101566, abs=1e-6)
    values[:] = torch.tensor([1, 1, 1, wanted, 1, 1, wanted**2, wanted, 1])
    figures = Forgotten.of(values)
    assert figures.kl == pytest.approx(0.101566, abs=1e-6) and math.isnan(figures.kl_error)


def test_the_standard_error_is_that_of_a_ratio(tmp_path: Path) -> None:
    model, _ = adapted("llama", {}, torch.float32)
    each = [measure(model, collate([example], 0)) for example in examples()]
    kl, n = (torch.stack([x[SUMS.index(name)] for x in each]) for name in ("kl", "tokens"))
    there = n > 0
    ratio, count = kl.sum() / n.sum(), there.sum()
    residual = (kl - ratio * n)[there]
    wanted = (residual.var(correction=1) * count).sqrt() / n.sum()
    got = Forgotten.of(torch.stack(each).sum(0))
    assert got.kl_error == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("rows", [2, 3])
def test_no_more_logits_than_a_chunk_exist(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 2 * rows)
    model, _ = adapted("llama", {}, torch.float32)
    seen = Sizes()
    with seen:
        measure(model, collate(examples(), 0))
    assert seen.most == rows * VOCABULARY


class Sizes(TorchDispatchMode):
    """The most elements of a tensor over the vocabulary that is not a weight."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            is_wide = isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,)
            if is_wide and tensor.shape[0] != WIDTH:  # which is that of W0, transposed
                self.most = max(self.most, tensor.numel())
        return made


def test_a_batch_without_targets_adds_nothing() -> None:
    """Ranks that run short pass one through the model, and stay in step."""
    model, _ = adapted("llama", {}, torch.float32)
    passes: list[Tensor] = []
    model.register_forward_pre_hook(lambda *_: passes.append(torch.ones(())))
    assert not measure(model, collate([], 0)).any() and len(passes) == 2
