"""`DloraTrainer`: PEFT's losses under the stock `Trainer`, files, and an exact resume."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import (
    arguments,
    fresh_state,
    lora,
    losses,
    peft_model,
    same_start,
    sequences,
    written,
)
from peft import PeftModel
from ranks import Pools
from tiny import tokenizer, whole
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer

import dlora
from dlora import AdaLoraConfig, LoraConfig, UsageError
from dlora.integrations.transformers import DloraTrainer

FULL = pytest.mark.full
STATES = ("replicated", "divided")
CASES = [
    pytest.param(*case, marks=[] if case in SAMPLE else FULL)
    for SAMPLE in [
        [
            (1, "fsdp2", "replicated", "lora"),
            (2, "fsdp2", "divided", "adalora"),
            (2, "zero3", "divided", "lora"),
        ]
    ]
    for case in product((1, 2), ("fsdp2", "zero3"), STATES, ("lora", "adalora", "pissa"))
]
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # so that the first is the best, and it stops early
    "max_grad_norm": 0.5,
    "activation_checkpointing": True,
}


def peft_losses(base: str, directory: Path) -> dict[str, Any]:
    """The stock `Trainer` with PEFT's model, which is evaluated and keeps its best."""
    fresh_state()
    trainer = Trainer(
        peft_model(base),
        arguments(directory, **EVALUATED),
        train_dataset=sequences(),
        eval_dataset=sequences(4, uneven=False),
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    return figures(trainer)


def dlora_losses(base: str, directory: Path, engine: str) -> dict[str, Any]:
    """The same with dlora's, on a base that is sharded over all ranks there are."""
    fresh_state()
    model = whole(base)
    dlora.attach(model, LoraConfig(r=4, lora_alpha=8))
    same_start(model)
    trainer = DloraTrainer(
        model,
        arguments(directory, **EVALUATED),
        train_dataset=sequences(),
        eval_dataset=sequences(4, uneven=False),
        callbacks=[EarlyStoppingCallback(2)],
        sharding={"engine": engine, "base": "world"},
    )
    trainer.train()
    return figures(trainer) | {"reductions": trainer.replica.reductions}


def figures(trainer: Trainer) -> dict[str, Any]:
    log = trainer.state.log_history
    return {
        "loss": losses(trainer),
        "grad_norm": [float(line["grad_norm"]) for line in log if "grad_norm" in line],
        "eval_loss": [line["eval_loss"] for line in log if "eval_loss" in line],
        "best": Path(trainer.state.best_model_checkpoint or "").name,
        "after": trainer.evaluate()["eval_loss"],
    }


def test_losses_are_those_of_peft(pools: Pools, saved_models: Any, tmp_path: Path) -> None:
    """Losses, norms before the clip, evaluation, early stopping and the best model."""
    base = saved_models("llama")
    wanted = pools(1).run(peft_losses, base, tmp_path / "peft")[0]
    assert len(wanted["loss"]) == 3  # it stopped early
    assert wanted["after"] == max(wanted["eval_loss"])  # and has its best again
    for ranks, engine in ((1, "fsdp2"), (2, "fsdp2"), (2, "zero3")):
        for got in pools(ranks).run(dlora_losses, base, tmp_path / f"{engine}{ranks}", engine):
            assert got.pop("reductions") == len(wanted["loss"])
            for name, expected in wanted.items():
                close = expected if name == "best" else pytest.approx(expected, rel=1e-5)
                assert got[name] == close, f"{name} on {ranks} ranks of {engine}"


def config_of(method: str, **settings: Any) -> LoraConfig:
    if method == "adalora":
        return AdaLoraConfig(init_r=6, target_r=2, tfinal=1, lora_dropout=0.2)  # T is Trainer's
    init = True if method == "lora" else method
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, lora_dropout=0.2)


def stopped_and_resumed(base: str, directory: Path, engine: str, state: str, method: str) -> Any:
    """Six steps, and the last three again from the checkpoint after three."""

    def trainer(name: str) -> DloraTrainer:
        fresh_state()
        return DloraTrainer(
            model=whole(base),
            args=arguments(
                directory / name,
                max_steps=6,
                save_strategy="steps",
                save_steps=3,
                bf16=True,
                weight_decay=0.01,
                lr_scheduler_type="cosine",
                warmup_steps=2,
            ),
            train_dataset=sequences(),
            processing_class=tokenizer(),
            dlora=config_of(method),
            sharding={"engine": engine, "base": "world", "optimizer_state": state},
            loraplus_lr_ratio=4.0,
        )

    torch.manual_seed(0)
    straight = trainer("straight")
    straight.train()
    optimizer = straight.optimizer.state_dict()
    rates = sorted({group["initial_lr"] for group in straight.optimizer.param_groups})
    torch.manual_seed(1)  # other adapters, until the checkpoint is read
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(directory / "straight" / "checkpoint-3"))
    pairs = zip(straight.replica.named.items(), resumed.replica.named.items(), strict=True)
    assert all(one == other and torch.equal(p, q) for (one, p), (other, q) in pairs)
    assert losses(straight) == losses(resumed)
    plain = straight.accelerator.unwrap_model(straight.model, keep_fp32_wrapper=False).eval()
    logits = plain(torch.arange(8)[None]).logits.detach()  # without autocast
    moments = sum(t.numel() for s in optimizer["state"].values() for t in s.values() if t.ndim)
    return {"rates": rates, "logits": logits, "moments": moments, "numel": straight.replica.numel}


@pytest.mark.parametrize(("ranks", "engine", "state", "method"), CASES)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    ranks: int,
    engine: str,
    state: str,
    method: str,
    pools: Pools,
    saved_models: Any,
    tmp_path: Path,
) -> None:
    base = saved_models("llama")
    found = pools(ranks).run(stopped_and_resumed, base, tmp_path, engine, state, method)
    assert found[0]["rates"] == [0.002, 0.008]
    assert found[0]["moments"] == 2 * found[0]["numel"]  # of all ranks, on rank 0
    checkpoint = tmp_path / "straight" / "checkpoint-6"
    for name, tensor in written(checkpoint).items():
        assert torch.equal(tensor, written(tmp_path / "resumed" / "checkpoint-6")[name])
    model = PeftModel.from_pretrained(whole(base), checkpoint).eval()
    with torch.no_grad():
        assert torch.allclose(model(torch.arange(8)[None]).logits, found[0]["logits"], atol=1e-4)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "optimizer.pt", "scheduler.pt", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    trained = 4 * found[0]["numel"]
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    tokenizer_size = (checkpoint / "tokenizer.json").stat().st_size
    assert size <= (1 + 2 + 2 * (method != "lora")) * trained + tokenizer_size + 200_000


def of_two_ranks(base: str, directory: Path, resume: str | None) -> dict[str, Any]:
    """Four steps over a base that transformers has sharded at load, or, resumed, over a whole one;
    the optimizer's state is divided wherever there are ranks to divide it."""
    fresh_state()
    loaded = {} if resume else {"distributed_config": {"fsdp_size": 2}}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **loaded)
    trainer = DloraTrainer(
        model,
        arguments(directory, save_strategy="steps", save_steps=2),
        train_dataset=sequences(),
        dlora=lora(),
        sharding={"optimizer_state": "divided"},
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.replica.named.items()}


def test_a_checkpoint_of_two_ranks_resumes_on_one(
    pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    base = saved_models("llama")
    on_two = pools(2).run(of_two_ranks, base, tmp_path / "two", None)[0]
    half = str(tmp_path / "two" / "checkpoint-2")
    on_one = pools(1).run(of_two_ranks, base, tmp_path / "one", half)[0]
    for name, tensor in on_two.items():
        apart = torch.linalg.norm(tensor - on_one[name]) / torch.linalg.norm(tensor)
        assert apart <= 1e-4, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"args": {"bf16_full_eval": True}}, "bf16_full_eval: it casts the adapters"),
        ({"sharding": {"place": "world"}}, "sharding: 'place' is no argument of dlora.shard"),
        ({"dlora": None}, "dlora: the model has no adapters; pass dlora=LoraConfig"),
        ({"dlora": AdaLoraConfig(), "args": {"max_steps": -1}}, "total_step: AdaLoRA needs the"),
        ({"model_init": whole}, "model_init: dlora shards one model"),
    ],
)
def test_what_would_break_it_is_refused(
    settings: dict[str, Any], message: str, saved_models: Any, tmp_path: Path
) -> None:
    args = arguments(tmp_path, **settings.pop("args", {}))
    given = {"model": whole(saved_models("llama")), "dlora": LoraConfig(r=2)} | settings
    with pytest.raises(UsageError, match=message):
        DloraTrainer(args=args, train_dataset=sequences(), **given)


def test_a_schedule_longer_than_the_training_is_refused(saved_models: Any, tmp_path: Path) -> None:
    fresh_state()
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9)
    model, args = whole(saved_models("llama")), arguments(tmp_path)
    trainer = DloraTrainer(model, args, train_dataset=sequences(), dlora=config)
    with pytest.raises(UsageError, match="total_step: AdaLoRA's schedule needs 9 steps"):
        trainer.train()


def test_the_model_of_peft_is_refused(saved_models: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has PEFT's adapters, which dlora does not train"):
        DloraTrainer(peft_model(saved_models("llama")), arguments(tmp_path))
