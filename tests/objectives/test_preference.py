"""Losses over pairs of answers: TRL's losses, rewards and gradients, and autograd's in float64."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny import tokenizer, whole
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

import dlora
from dlora import LoraConfig
from dlora.data.encode import NO_TARGET, SECOND, Example
from dlora.data.pairs import collate_pairs
from dlora.objectives import chunked_loss
from dlora.objectives.dpo import Dpo, DpoOptions
from dlora.objectives.orpo import Orpo, OrpoOptions
from dlora.objectives.preference import Pairs, Pairwise
from dlora.objectives.reference import reference_of
from dlora.objectives.simpo import Simpo, SimpoOptions
from dlora.tasks.preference import Preference

BETA = 0.3


def pairs(chosen: Any, rejected: Any, *reference: Any, tokens: Any = (1, 1)) -> Pairs:
    given = [torch.tensor(x, dtype=torch.float64) for x in (chosen, rejected, *reference)]
    given += [torch.zeros_like(given[0])] * (4 - len(given))
    counts = [torch.tensor(x, dtype=torch.float64) for x in tokens]
    return Pairs(*given, *counts, torch.zeros_like(given[0]))


def test_the_golden_pair() -> None:
    """Of methods.md, §16."""
    found = pairs([-9.0], [-14.0], [-10.0], [-12.0])
    found.chosen.requires_grad_()
    found.rejected.requires_grad_()
    objective = Dpo(DpoOptions())
    loss = objective.losses(found).sum()
    assert loss.item() == pytest.approx(0.554355244, abs=1e-9)
    loss.backward()
    assert found.chosen.grad is not None and found.rejected.grad is not None
    assert found.chosen.grad.item() == pytest.approx(-0.042555748, abs=1e-9)
    assert found.rejected.grad.item() == pytest.approx(0.042555748, abs=1e-9)
    rewards = [each.item() for each in objective.rewards(found)]
    assert rewards == pytest.approx([0.1, -0.2])


def test_a_kl_is_that_of_two_known_distributions() -> None:
    """Of methods.md, §16: both ways."""
    from dlora.objectives.scored_targets import _kl

    p = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64).log_softmax(-1)
    q = torch.tensor([[0.5, 0.5, -1.0]], dtype=torch.float64).log_softmax(-1)
    assert _kl(q, p.clone()).item() == pytest.approx(0.101566, abs=1e-6)
    assert _kl(p, q.clone()).item() == pytest.approx(0.108690, abs=1e-6)


# -- a model, its pairs, and what they are in plain autograd ---------------------------------------

SIZES = ((3, 4, 2), (5, 1, 6), (2, 3, 3))  # tokens of prompt, chosen, rejected


def examples(vocabulary: int = 250) -> list[Example]:
    draw = np.random.default_rng(0)
    found = []
    for number, (prompt, *answers) in enumerate(SIZES):
        asked = draw.integers(0, vocabulary, prompt)
        ids, labels = [], []
        for count in answers:
            said = draw.integers(0, vocabulary, count)
            ids += [asked, said]
            labels += [np.full(prompt, NO_TARGET), said]
        labels[2][0] = SECOND
        whole_ids, whole_labels = (np.concatenate(x).astype(np.int32) for x in (ids, labels))
        found.append(Example(number, whole_ids, whole_labels))
    return found


def moved(model: nn.Module, scale: float = 0.05) -> None:
    """Adapters that do something."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_((noise * scale).to(parameter.dtype))
            assert "adapter" in name or not parameter.requires_grad


def prepared(
    saved: Any, objective: Pairwise, *, dtype: torch.dtype = torch.float64, **settings: Any
) -> Any:
    """A model, or that in a directory, with adapters and the loss of pairs."""
    model = (whole(saved) if isinstance(saved, str) else saved).to(dtype)
    task = Preference()
    task.objective = objective
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    task.check(skeleton)
    targets = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    dlora.attach(model, LoraConfig(**targets | settings))
    task.install(model)
    return model, task


def by_hand(model: Any, batch: Any, objective: Pairwise) -> Tensor:
    """The loss from whole logits, in autograd, with the reference in a forward of its own."""

    def rows() -> tuple[Tensor, Tensor]:
        z = model(input_ids=batch.input_ids).logits.log_softmax(-1)
        wanted = batch.targets.clamp(min=0)[..., None]
        return z, z.gather(-1, wanted)[..., 0] * (batch.targets != NO_TARGET)

    log_p, logp = rows()
    tokens = (batch.targets != NO_TARGET).sum(-1)
    half = len(tokens) // 2
    reference, kl = torch.zeros_like(logp).detach(), torch.zeros(half, dtype=logp.dtype)
    if objective.compares:
        with reference_of(model).acting():
            log_ref, reference = rows()
        each = (log_ref.exp() * (log_ref - log_p)).sum(-1) * (batch.targets != NO_TARGET)
        kl = each[:half].sum(-1) / tokens[:half]
    sums = [*logp.sum(-1).chunk(2), *reference.sum(-1).chunk(2), *tokens.double().chunk(2)]
    return objective.losses(Pairs(*sums, kl)).sum()


OBJECTIVES: dict[str, Pairwise] = {
    "sigmoid": Dpo(DpoOptions(beta=BETA)),
    "cdpo": Dpo(DpoOptions(beta=BETA, label_smoothing=0.2)),
    "robust": Dpo(DpoOptions(beta=BETA, loss_type="robust", label_smoothing=0.1)),
    "hinge": Dpo(DpoOptions(beta=BETA, loss_type="hinge")),
    "ipo": Dpo(DpoOptions(beta=BETA, loss_type="ipo")),
    "weighted": Dpo(DpoOptions(beta=BETA, sft_weight=0.7, kl_weight=1.3)),
    "orpo": Orpo(OrpoOptions(lambda_=0.4)),
    "simpo": Simpo(SimpoOptions(beta=2.0, gamma=0.5)),
}


@pytest.mark.parametrize(
    ("name", "settings", "joined"),
    [
        *((name, {}, True) for name in OBJECTIVES),
        # The head's own parameters are trained, or an adapter lies before the blocks.
        ("sigmoid", {"target_modules": ["q_proj", "lm_head"]}, True),
        ("weighted", {"modules_to_save": ["lm_head"]}, True),
        ("weighted", {"target_modules": ["embed_tokens", "down_proj"]}, False),
        ("sigmoid", {"use_dora": True}, True),
        ("sigmoid", {"init_lora_weights": "pissa"}, True),
    ],
)
def test_losses_and_gradients_are_those_of_whole_logits_in_float64(
    name: str, settings: Any, joined: bool, saved_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = OBJECTIVES[name]
    model, task = prepared(saved_models("llama"), objective, **settings)
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 4 * 259 * 5)  # five rows at a time
    batch = task.collate(examples(), 0)
    wanted = "joined" if joined else "apart"
    assert task.reference(model) == (wanted if objective.compares else "")
    if objective.compares and "init_lora_weights" not in settings:
        at_start = objective.loss(model, batch)
        assert objective.reported["margin"].item() == 0
        assert objective.reported["kl"].item() == pytest.approx(0, abs=1e-12)
        if name == "sigmoid":
            assert at_start.item() == pytest.approx(3 * math.log(2), abs=1e-12)
    moved(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = objective.loss(model, batch)
    found = torch.autograd.grad(loss, [*parameters.values()])
    right = by_hand(model, batch, objective)
    assert loss.item() == pytest.approx(right.item(), rel=1e-10)
    for path, one, other in zip(
        parameters, found, torch.autograd.grad(right, [*parameters.values()]), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-11), path
    with torch.no_grad():
        assert objective.loss(model, batch).item() == pytest.approx(right.item(), rel=1e-10)


@pytest.mark.parametrize("joined", [True, False])
def test_a_class_that_computes_whole_logits_itself(joined: bool) -> None:
    """BERT's decoder, which has layers between the blocks and the head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "vocab_size": 259}
    bert = BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval()
    objective = OBJECTIVES["weighted"]
    names = ["query", "value", *([] if joined else ["decoder"])]
    model, task = prepared(bert, objective, target_modules=names)
    assert task.in_chunks(model) is None
    assert task.reference(model) == ("joined" if joined else "apart")
    moved(model)
    batch = task.collate(examples(), 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss, right = objective.loss(model, batch), by_hand(model, batch, objective)
    assert loss.item() == pytest.approx(right.item(), rel=1e-10)
    for one, other in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(right, parameters), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-11)


def test_a_batch_without_pairs_has_zero_gradients_and_all_figures(saved_models: Any) -> None:
    objective = OBJECTIVES["weighted"]
    model, task = prepared(saved_models("llama"), objective)
    batch = task.collate([], 0)
    assert (batch.weight, batch.num_targets, batch.places) == (0, 0, 8)
    loss = objective.loss(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert {n: v.item() for n, v in objective.reported.items()} == dict.fromkeys(
        objective.figures, 0.0
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_the_base_is_left_as_it_is_and_a_copy_stands_still(saved_models: Any) -> None:
    """Adapters off give the untouched base bit for bit; a copy is what the policy was."""
    objective = Dpo(DpoOptions())
    for init in (True, "pissa", "milora", "orthogonal"):
        model, task = prepared(
            saved_models("llama"), objective, dtype=torch.float32, init_lora_weights=init
        )
        ids = torch.arange(8)[None]
        moved(model)
        with reference_of(model).acting():
            assert torch.equal(model(ids).logits, whole(saved_models("llama"))(ids).logits), init
    model, task = prepared(saved_models("llama"), objective, lora_dropout=0.3)
    moved(model)
    model.train()
    reference = reference_of(model)
    reference.copies = {
        n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
    }
    batch = task.collate(examples(), 0)
    model.eval()
    with torch.no_grad():
        objective.loss(model, batch)
        assert objective.reported["margin"].abs().item() < 1e-12
        before = model(ids).logits
        moved(model)
        after = model(ids).logits
        with reference.acting():
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, after)
        assert not torch.equal(before, after)
        model.train()  # dropout is the policy's alone
        with reference.acting():
            assert torch.equal(model(ids).logits, before)


# -- TRL -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer over a model with PEFT's adapters, and one of its batches."""
    from datasets import Dataset

    words = ["one", "two", "three", "four", "five", "six"]
    rows = [
        {"prompt": " ".join(words[: 1 + n]), "chosen": f" {words[n]} it is", "rejected": " no"}
        for n in range(3)
    ]
    settings = PeftConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(whole(saved_models("llama")), settings)
    directory = tmp_path_factory.mktemp("trl")
    how = {"beta": BETA, "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(directory), bf16=False, **how),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return trainer, next(iter(trainer.get_train_dataloader()))


def batch_of(inputs: Any) -> Any:
    """TRL's batch as ours."""
    rows = []
    for ids, seen, answer in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
    ):
        own = ids[seen.bool()].numpy().astype(np.int32)
        labels = np.where(answer[seen.bool()].numpy() == 1, own, NO_TARGET).astype(np.int32)
        rows.append((own, labels))
    found, half = [], len(rows) // 2
    for number in range(half):
        (one, labels), (other, more) = rows[number], rows[half + number]
        more = more.copy()
        more[0] = SECOND
        found.append(Example(number, np.concatenate([one, other]), np.concatenate([labels, more])))
    return collate_pairs(found, 0)


@pytest.mark.parametrize(
    ("kinds", "settings"),
    [
        (["sigmoid"], {}),
        (["hinge"], {"loss_type": "hinge"}),
        (["ipo"], {"loss_type": "ipo"}),
        (["robust"], {"loss_type": "robust", "label_smoothing": 0.1}),
    ],
)
def test_losses_rewards_and_gradients_are_those_of_trl(
    kinds: list[str], settings: Any, theirs: Any, saved_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, inputs = theirs
    monkeypatch.setattr(trainer, "loss_types", kinds)
    monkeypatch.setattr(trainer, "label_smoothing", settings.get("label_smoothing", 0.0))
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    trainer.model.train()
    wanted = trainer.compute_loss(trainer.model, dict(inputs))
    wanted.backward()
    objective = Dpo(DpoOptions(beta=BETA, **settings))
    model, task = prepared(saved_models("llama"), objective, dtype=torch.float32)
    weights = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    trained = {
        name.replace(".adapter.", "."): p for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    batch = batch_of(inputs)
    loss = objective.loss(model, batch) / batch.weight
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, parameter in trained.items():
        assert parameter.grad is not None and weights[name].grad is not None
        apart = torch.linalg.norm(parameter.grad - weights[name].grad)
        assert apart <= 1e-5 * torch.linalg.norm(weights[name].grad), name
    names = {"chosen": "rewards_chosen", "rejected": "rewards_rejected"}
    names |= {"margins": "margin", "accuracies": "accuracy"}
    for theirs_, ours in names.items():
        value = trainer._metrics["train"][f"rewards/{theirs_}"][-1]
        mean = objective.reported[ours].item() / batch.weight
        assert mean == pytest.approx(value, rel=1e-5, abs=1e-6), ours


def test_losses_without_a_reference_are_those_of_trl() -> None:
    chosen, rejected, tokens = [-9.0, -3.0], [-14.0, -2.5], ([4, 5], [6, 3])
    found = pairs(chosen, rejected, tokens=tokens)
    means = [(x / n).float() for x, n in ((found.chosen, found.chosen_tokens),)]
    means += [(found.rejected / found.rejected_tokens).float()]
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    orpo = SimpleNamespace(beta=0.4, accelerator=on_cpu)
    losses, *_ = ORPOTrainer.odds_ratio_loss(orpo, *means)
    ours = Orpo(OrpoOptions(lambda_=0.4)).losses(found)
    assert torch.allclose((-means[0] - losses).double(), ours, rtol=1e-5)
    simpo = SimpleNamespace(
        beta=2.0, simpo_gamma=0.5, loss_type="simpo", label_smoothing=0.0, alpha=0.0
    )
    simpo.accelerator = on_cpu
    losses, *rewards = CPOTrainer.cpo_loss(simpo, *means)
    objective = Simpo(SimpoOptions(beta=2.0, gamma=0.5))
    assert torch.allclose(losses.double(), objective.losses(found), rtol=1e-5)
    for theirs_, own in zip(rewards, objective.rewards(found), strict=True):
        assert torch.allclose(theirs_.double(), own, rtol=1e-5)


def test_an_answer_that_is_certain_has_a_finite_loss() -> None:
    for logp in (0.0, -1e-300, -1e-9, -700.0, -5e5):
        found = pairs([logp], [-1.0])
        found.chosen.requires_grad_()
        loss = Orpo(OrpoOptions()).losses(found).sum()
        loss.backward()
        assert torch.isfinite(loss) and found.chosen.grad is not None
        assert torch.isfinite(found.chosen.grad).all()
