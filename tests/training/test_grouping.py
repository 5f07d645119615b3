"""A step's loss is that of its sequences alone, whatever they are batched with and placed on."""

import functools
from typing import Any

import pytest
import torch
from run_training import Runs, check_near, told
from tiny import save_chats, tokenizer, whole
from torch.nn import functional as F

from dlora.data import Dataset, deal, load_examples
from dlora.data.collate import collate
from dlora.tasks import CAUSAL
from dlora.tasks.generation import MOST_NEW_TOKENS

SEQUENCES = 8
STILL = {"optimizer__lr": 0.0, "train__max_steps": 1, "train__global_batch_size": SEQUENCES}
ENGINES = [{"sharding__engine": engine, "sharding__base": "world"} for engine in ("fsdp2", "zero3")]
AGAIN = {"sharding__activation_checkpointing": True}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SEQUENCES))


@pytest.fixture(scope="module")
def command(words: Any, chats: str) -> Any:
    return functools.partial(words, data__train=chats)


def read(chats: str) -> Dataset:
    reading = {"key": "data.train", "format": "chat", "max_length": 1024}
    return load_examples(chats, tokenizer=tokenizer(), **reading)


@functools.cache
def loss_alone(path: str, chats: str) -> float:
    """Σ cross entropy / Σ targets, each sequence in a model that has seen no other."""
    data, losses, targets = read(chats), 0.0, 0
    assert min(data.lengths) < 48 < max(data.lengths)  # on both sides of what scalings start at
    for example in (data[i] for i in range(len(data))):
        labels = torch.from_numpy(example.labels).long()
        logits = whole(path)(torch.from_numpy(example.input_ids).long()[None]).logits[0, :-1]
        losses += float(F.cross_entropy(logits.detach(), labels[1:], reduction="sum"))
        targets += int((labels[1:] >= 0).sum())
    return losses / targets


@pytest.mark.parametrize(
    "model", ["longrope", "dynamic", "gpt2_dropout", "opt_dropout", "llama_dropout", "mixtral_aux"]
)
def test_the_loss_of_a_step_is_that_of_its_sequences_alone(
    run: Runs, saved_models: Any, chats: str, model: str
) -> None:
    wanted = loss_alone(saved_models(model), chats)
    hashes = set()
    groupings: list[tuple[int, int, dict[str, Any]]] = [(1, size, {}) for size in (1, 2, 4, 8)]
    groupings += [(1, 8, AGAIN), (2, 4, ENGINES[0] | AGAIN), (2, 2, ENGINES[1] | AGAIN)]
    for number, (world, size, settings) in enumerate(groupings):
        given = settings | STILL | {"model": model, "train__micro_batch_size": size}
        if number == 0:
            given |= {"data__eval": chats, "output__eval_every": 1}
        _, lines = run(str(number), world, **given)
        assert lines[-1]["loss"] == pytest.approx(wanted, rel=1e-6), given
        hashes.add(lines[-1]["batch_hash"])
        for line in lines:
            assert line.get("eval_loss", wanted) == pytest.approx(wanted, rel=1e-6)
    assert len(hashes) == 1


@pytest.mark.parametrize("model", ["gpt2_dropout", "opt_dropout", "longrope"])
def test_gradients_do_not_depend_on_the_grouping(run: Runs, model: str) -> None:
    """Nor on recomputation, which has to see the positions and the mode of the forward pass.

    SGD shows gradients as they are: AdamW makes a step of rounding where one is nearly zero.
    """
    settings = {"model": model, "train__max_steps": 3, "adapter__lora_dropout": 0.1}
    settings |= {"optimizer__name": "sgd", "optimizer__lr": 0.1}
    alone = run("alone", 1, **settings | {"train__micro_batch_size": 1})
    four, two = {"train__micro_batch_size": 4}, {"train__micro_batch_size": 2}
    check_near(run("again", 1, **AGAIN | settings | four), alone)
    check_near(run("two", 2, **ENGINES[0] | settings | two), alone)


def test_what_is_off_is_named(run: Runs) -> None:
    [(_, printed)], _ = run("run", 1, work=told, model="gpt2_dropout", **STILL)
    assert "model: its own resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1 are off in" in printed
    [(_, printed)], _ = run("plain", 1, work=told, model="gpt2", **STILL)
    assert "are off in training" not in printed


def own_auxiliary_loss(path: str, chats: str, world: int, size: int) -> float:
    """Σ targets · aux / Σ targets over the run's micro-batches, as the class computes it."""
    data, model, auxiliary, targets = read(chats), whole(path), 0.0, 0
    for micros in deal(range(len(data)), data.lengths, world, size):
        for ids in micros:
            batch = collate([data[i] for i in ids], 0)
            mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
            own = model(batch.input_ids, attention_mask=mask.long(), output_router_logits=True)
            auxiliary += float(own.aux_loss) * batch.num_targets
            targets += batch.num_targets
    return auxiliary / targets


@pytest.mark.parametrize(
    ("world", "size", "where"), [(1, 8, {}), (1, 2, AGAIN), (2, 3, ENGINES[0])]
)
def test_an_auxiliary_loss_is_reported(
    run: Runs, saved_models: Any, chats: str, world: int, size: int, where: dict[str, Any]
) -> None:
    settings = STILL | where | {"model": "mixtral_aux", "train__micro_batch_size": size}
    _, [line] = run("run", world, **settings)
    wanted = own_auxiliary_loss(saved_models("mixtral_aux"), chats, world, size)
    assert line["aux_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("where", ENGINES)
def test_an_auxiliary_loss_is_trained_alike_on_every_engine(
    run: Runs, where: dict[str, Any]
) -> None:
    """Of equal micro-batches: 4 of 2 sequences, on one rank and on two."""
    settings = {"model": "mixtral_aux", "train__global_batch_size": 8, "train__max_steps": 4}
    one = run("one", 1, train__micro_batch_size=2, **settings)
    two = run("two", 2, train__micro_batch_size=2, **settings, **where)
    check_near(two, one)
    for got, wanted in zip(two[1], one[1], strict=True):
        assert got["aux_loss"] == pytest.approx(wanted["aux_loss"], rel=1e-5)
    uneven = settings | {"train__global_batch_size": 1, "train__max_steps": 2}
    check_near(run("uneven", 2, **uneven, **where), run("single", 1, **uneven))


def test_samples_are_answers_to_each_prompt_alone(saved_models: Any, chats: str) -> None:
    data = read(chats)
    model = whole(saved_models("dynamic"))
    together = CAUSAL.answers(model, tokenizer(), data.first(4), pad_id=0)
    for number, (_, _, answer) in enumerate(together):
        example = data[number]
        start = int((example.labels >= 0).argmax())
        ids = torch.from_numpy(example.input_ids[:start]).long()[None]
        alone = whole(saved_models("dynamic")).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MOST_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        assert answer == tokenizer().decode(alone[0, start:], skip_special_tokens=True).strip()
