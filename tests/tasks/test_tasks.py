"""What tasks make of sequences and models, beside transformers' own losses."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from dlora.data.encode import NO_TARGET, Example
from dlora.tasks.classification import Classification
from dlora.tasks.seq2seq import Seq2Seq

LABELS = ("cat", "dog", "bird")
CLASSIFIERS: dict[str, Any] = {
    "bert": lambda: BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}  # fmt: skip
WRITERS: dict[str, Any] = {
    "t5": lambda: T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": lambda: BartConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=64,
    ),
}  # fmt: skip


def sequence(place: int, ids: list[int], labels: list[int]) -> Example:
    return Example(place, np.array(ids, np.int32), np.array(labels, np.int32))


def classified(place: int, ids: list[int], label: int) -> Example:
    return sequence(place, ids, [NO_TARGET] * (len(ids) - 1) + [label])


TEXTS = [
    classified(0, [5, 6, 7, 8, 9, 10, 11, 12, 13], 2),
    classified(1, [20, 21, 22], 0),
    classified(2, [30], 1),
]
PAIRS = [
    sequence(0, [5, 6, 7, 8, 2, 40, 41, 2], [NO_TARGET] * 5 + [40, 41, 2]),
    sequence(
        1, [9, 2, 42, 43, 44, 45, 46, 47, 48, 49, 50, 2], [NO_TARGET] * 2 + [*range(42, 51), 2]
    ),
]


def made(auto_class: Any, config: Any, task: Any) -> nn.Module:
    task.configure(config, 1)
    torch.manual_seed(0)
    model = auto_class.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_s_loss_is_the_sum_of_transformers_own_for_each_text(name: str) -> None:
    task = Classification(LABELS)
    model = made(AutoModelForSequenceClassification, CLASSIFIERS[name](), task)
    rows = [torch.tensor(e.input_ids, dtype=torch.int64)[None] for e in TEXTS]
    alone = [
        model(input_ids=row, labels=torch.tensor(e.labels[-1:], dtype=torch.int64))
        for row, e in zip(rows, TEXTS, strict=True)
    ]
    wanted = torch.stack([found.loss for found in alone]).sum()
    guesses = [int(found.logits.argmax()) for found in alone]
    task.install(model)
    batch = task.collate(TEXTS, pad_id=1)
    loss = model(**batch.inputs, targets=batch.targets, positions=batch.positions)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    summed, counts = task.evaluate(model, batch)
    torch.testing.assert_close(summed, loss)
    table = counts.view(3, 3)
    assert all(table[label, guess] for label, guess in zip((2, 0, 1), guesses, strict=True))
    assert table.sum() == batch.num_targets == 3


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_s_loss_is_the_sum_of_transformers_own_for_each_pair(name: str) -> None:
    task = Seq2Seq()
    model = made(AutoModelForSeq2SeqLM, WRITERS[name](), task)
    wanted = torch.zeros((), dtype=torch.float64)
    for example in PAIRS:
        split = int((example.labels != NO_TARGET).argmax())
        ids = torch.tensor(example.input_ids, dtype=torch.int64)[None]
        source, target = ids[:, :split], ids[:, split:]
        wanted += model(input_ids=source, labels=target).loss * target.numel()
    task.install(model)
    batch = task.collate(PAIRS, pad_id=model.config.pad_token_id)
    loss = model(**batch.inputs, targets=batch.targets, positions=batch.positions)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert batch.num_targets == 3 + 10


@pytest.mark.parametrize("task", [Classification(LABELS), Seq2Seq()], ids=lambda t: t.name)
def test_no_examples_are_a_batch_of_weight_zero(task: Any) -> None:
    classify = task.name == "classification"
    auto = AutoModelForSequenceClassification if classify else AutoModelForSeq2SeqLM
    model = made(auto, CLASSIFIERS["bert"]() if classify else WRITERS["t5"](), task)
    task.install(model)
    batch = task.collate([], pad_id=1)
    loss = model(**batch.inputs, targets=batch.targets, positions=batch.positions)
    loss.backward()
    assert loss == 0 and batch.num_targets == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(g.isnan().any() or g.any() for g in gradients)


def test_figures_are_those_of_counting_by_hand() -> None:
    wanted, found = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 0, 2]
    table = torch.zeros(4, 4)
    for w, f in zip(wanted, found, strict=True):
        table[w, f] += 1
    scores = []
    for label in range(3):  # the fourth label occurs nowhere
        right = sum(w == f == label for w, f in zip(wanted, found, strict=True))
        precision, recall = right / found.count(label), right / wanted.count(label)
        scores.append(2 * precision * recall / (precision + recall))
    figures = Classification((*LABELS, "fish")).figures(table.flatten())
    assert figures == pytest.approx({"accuracy": 5 / 7, "f1": sum(scores) / 3})
