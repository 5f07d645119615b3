"""Whole runs of `train.task`: classification and sequence to sequence, beside PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification
from ranks import Pools
from run_training import Runs, check_near, command_line, same_bits
from sampling import full
from tiny import VOCABULARY, tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dlora import generate
from dlora.config.load import parse
from dlora.errors import UsageError
from dlora.evaluation import command as evaluation
from dlora.export import command as export
from dlora.sharding.topology import Topology
from dlora.training.prepare import prepare

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "vocab_size": VOCABULARY}
BASES: dict[str, Any] = {  # none of the first two has a head for a classification
    "bert": lambda: BertModel(BertConfig(**SIZES), add_pooling_layer=False),
    "pooled": lambda: BertModel(BertConfig(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
            eos_token_id=VOCABULARY - 2,
        )
    ),
}
WORDS = {"cat": "meow", "dog": "woof", "bird": "tweet"}
ROWS = [
    {"sound": f"{sound} {'!' * (number % 5)}", "label": name}
    for number in range(5)
    for name, sound in WORDS.items()
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """command(directory, base, **settings): the words of a run of the task that the base is for."""
    root = tmp_path_factory.mktemp("tasks")
    data = root / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    for name, build in BASES.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)

    def of(directory: Path, base: str, **settings: Any) -> list[str]:
        common = {
            "model__path": str(root / base),
            "data__train": str(data),
            "data__eval": str(data),
            "data__columns": {"text": "sound"},
            "train__task": "seq2seq" if base == "t5" else "classification",
            "output__eval_every": 10,
            "output__dir": str(directory),
        }
        return command_line(**common | settings)

    return of


@pytest.mark.parametrize(
    ("base", "engine"),
    [  # the other pairs differ in nothing that the tasks know of
        ("bert", "fsdp2"),
        ("llama", "zero3"),
        ("t5", "fsdp2"),
        full("bert", "zero3"),
        full("llama", "fsdp2"),
        full("t5", "zero3"),
    ],
)
def test_a_run_on_two_ranks_is_that_of_one_process_and_peft_has_its_figures(
    run: Runs, tmp_path: Path, base: str, engine: str
) -> None:
    one = run("one", 1, base)
    got = run("two", 2, base, sharding__engine=engine, sharding__base="world")
    check_near(trained(got), trained(one))
    names = {"eval_loss"} if base == "t5" else {"eval_loss", "eval_accuracy", "eval_f1"}
    said = {name: got[1][-1][name] for name in names}
    assert said == pytest.approx({name: one[1][-1][name] for name in names}, rel=1e-4)
    found = written(tmp_path / "two") if base == "t5" else classified(tmp_path / "two")
    assert said == pytest.approx(found, rel=1e-4)


def classified(run: Path) -> dict[str, float]:
    """Loss, accuracy and mean F1 of a run's adapter in PEFT, text by text."""
    labels = json.loads((run / "adapter/labels.json").read_text())["labels"]
    assert labels == sorted(WORDS)
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        str(run / "adapter"), num_labels=len(labels), dtype=torch.float32
    ).eval()
    loss, guesses = 0.0, []
    for row in ROWS:
        with torch.no_grad():
            logits = model(**tokenizer()(row["sound"], return_tensors="pt")).logits
        loss += float(F.cross_entropy(logits, torch.tensor([labels.index(row["label"])])))
        guesses.append(labels[int(logits.argmax())])
    pairs = list(zip([row["label"] for row in ROWS], guesses, strict=True))
    scores = []
    for label in labels:
        right = pairs.count((label, label))
        scores.append(2 * right / (sum(w == label for w, _ in pairs) + guesses.count(label)))
    return {
        "eval_loss": loss / len(ROWS),
        "eval_accuracy": sum(w == g for w, g in pairs) / len(pairs),
        "eval_f1": sum(scores) / len(scores),
    }


def written(run: Path) -> dict[str, float]:
    """The loss of a run's adapter in PEFT, over the tokens of all answers, pair by pair."""
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(str(run / "adapter"), dtype=torch.float32)
    model.eval()
    loss, tokens = 0.0, 0
    for row in ROWS:
        ids = tokenizer()(text_target=row["label"])["input_ids"]
        target = torch.tensor([[*ids, tokenizer().eos_token_id]])  # this tokenizer puts none
        given = tokenizer()(row["sound"], return_tensors="pt")
        with torch.no_grad():
            found = model(**given, labels=target)
        loss, tokens = loss + float(found.loss) * target.numel(), tokens + target.numel()
    return {"eval_loss": loss / tokens}


@pytest.mark.parametrize("base", ["pooled", "t5"])
def test_dropout_is_that_of_each_sequence_whatever_the_micro_batch(run: Runs, base: str) -> None:
    """Also in a pooler, which has one vector of each, and in a decoder that is shorter."""
    settings = {"adapter__lora_dropout": 0.2, "train__max_steps": 3}
    alone = run("alone", 1, base, train__micro_batch_size=1, **settings)
    check_near(*map(trained, (run("four", 1, base, train__micro_batch_size=4, **settings), alone)))


def trained(run: Any) -> Any:
    """A run without the lines that are evaluations alone."""
    results, lines = run
    return results, [line for line in lines if "loss" in line]


def test_what_a_classification_leaves_can_be_exported_and_tried(
    run: Runs, tmp_path: Path, capsys: Any
) -> None:
    """As a model of transformers with its labels, and as the label of a text; of both forms."""
    run("run", 1, "bert", train__max_steps=3, output__save_every=3)
    adapter = tmp_path / "run/adapter"
    peft = AutoPeftModelForSequenceClassification.from_pretrained(
        str(adapter), num_labels=3, dtype=torch.float32
    ).eval()
    text = tokenizer()("woof", return_tensors="pt")
    with torch.no_grad():
        wanted = peft(**text).logits
    for number, source in enumerate((adapter, tmp_path / "run/checkpoints/step-000003")):
        merged = tmp_path / f"merged-{number}"
        assert export.main(["--adapter", str(source), "--to", str(merged), "--merge"]) == 0
        model, found = AutoModelForSequenceClassification.from_pretrained(
            merged, output_loading_info=True, dtype=torch.float32
        )
        assert not found["missing_keys"]
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**text).logits, wanted, rtol=1e-5, atol=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged-0"
    ).config.id2label == dict(enumerate(sorted(WORDS)))
    capsys.readouterr()
    words = ["--adapter", str(adapter), "--prompt", "woof", "--dtype", "float32"]
    assert generate.main(words) == 0
    label, probability = capsys.readouterr().out.split()
    assert label == sorted(WORDS)[int(wanted.argmax())]
    assert float(probability.strip("()")) == pytest.approx(
        float(wanted.softmax(-1).max()), abs=1e-3
    )


def test_an_adapter_of_an_encoder_decoder_writes_what_peft_writes(
    run: Runs, tmp_path: Path, capsys: Any
) -> None:
    run("run", 1, "t5", train__max_steps=3)
    adapter = str(tmp_path / "run/adapter")
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(adapter, dtype=torch.float32).eval()
    given = tokenizer()("woof", return_tensors="pt")
    made = model.generate(**given, max_new_tokens=6, do_sample=False)
    capsys.readouterr()
    words = ["--adapter", adapter, "--prompt", "woof", "--max-new-tokens", "6"]
    assert generate.main([*words, "--dtype", "float32"]) == 0
    wanted = tokenizer().decode(made[0, 1:], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == wanted.strip()


def test_a_resumed_classification_is_the_uninterrupted_one(run: Runs, pools: Pools) -> None:
    settings = {"optimizer__schedule": "constant", "output__save_every": 3, "train__max_steps": 6}
    whole, _ = run("whole", 1, "bert", **settings)
    run("stopped", 1, "bert", **settings | {"train__max_steps": 3})
    again, _ = run("stopped", 1, "bert", **settings)
    assert same_bits(again[0]["tensors"], whole[0]["tensors"])
    assert any("classifier" in name for name in whole[0]["tensors"])


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([{"sound": "a", "label": 0.5}] * 2, {}, "'label' is 0.5; expected a name or a whole"),
        ([{"sound": "a", "label": "x"}] * 2, {}, "has 1 labels ('x')"),
        (ROWS, {"train__num_labels": 2}, "train.num_labels: is 2, but data.train has 3: 'bird'"),
        (ROWS, {"data__format": "alpaca"}, "data.format: alpaca cannot act: train.task"),
        (ROWS, {"data__columns": {"text": "noise"}}, "no column 'noise' (data.columns.text)"),
        (ROWS, {"train__task": "causal", "data__columns": None}, "no field 'messages'"),
        (ROWS, {"train__task": "seq2seq"}, "train.task: transformers has no model of llama for it"),
        (ROWS, {"train__task": "causal", "train__num_labels": 3}, "train.task is not classific"),
    ],
    ids=["float", "one label", "number", "format", "column", "causal", "seq2seq", "num_labels"],
)
def test_what_cannot_be_classified_is_refused(
    command: Any, tmp_path: Path, rows: Any, settings: Any, says: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    given = {"data__train": str(data), "data__eval": None, "output__eval_every": 0} | settings
    with pytest.raises(UsageError) as error:
        config = parse(command(tmp_path / "run", "llama", **given), prog="dlora.train").config
        prepare(config, Topology(0, 1, 1), lambda line: None)
    assert says in str(error.value)


def test_a_held_out_label_that_training_lacks_names_its_line(command: Any, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"sound": "moo", "label": "cow"}))
    words = command(tmp_path / "run", "llama", data__eval=str(held_out))
    config = parse(words, prog="dlora.train").config
    with pytest.raises(UsageError, match=r"held_out\.jsonl:1: 'label' is 'cow', which is none of"):
        prepare(config, Topology(0, 1, 1), lambda line: None)


@pytest.mark.parametrize("base", ["llama", full("t5")])
def test_dlora_eval_has_the_figures_of_the_run(run: Runs, tmp_path: Path, base: str) -> None:
    """The best by another figure than the loss; answers of an encoder-decoder are compared."""
    own: dict[str, Any] = {"output__keep_best": {"metric": "eval_f1"}}
    if base == "t5":
        own = {"output__keep_best": {"metric": "eval_chrf", "mode": "max"}}
        own |= {"output__eval_metrics": ["chrf"], "output__eval_max_new_tokens": 6}
    _, lines = run("run", 1, base, output__eval_every=5, **own)
    found = {line["step"]: line for line in lines if "eval_loss" in line and line["step"]}
    metric, best = own["output__keep_best"]["metric"], tmp_path / "run/best"
    about, to = json.loads((best / "best.json").read_text()), tmp_path / "to.json"
    assert about["value"] == max(line[metric] for line in found.values())
    argv = run.command(tmp_path / "run", base)
    words = ["--adapter", str(best), "--data", argv[argv.index("--data.eval") + 1]]
    scored = ["--metrics", "chrf", "--max-new-tokens", "6"]
    assert evaluation.main([*words, *(scored if base == "t5" else []), "--to", str(to)]) == 0
    figures = json.loads(to.read_text())["figures"]
    wanted = {k.removeprefix("eval_"): v for k, v in found[about["step"]].items() if "eval_" in k}
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    if base == "llama":
        with pytest.raises(UsageError, match="classification writes no answers"):
            evaluation.main([*words, *scored])
        with pytest.raises(UsageError, match="classification writes no answers"):
            parse([*argv, "--output.eval_metrics", "[chrf]"], "dlora.train")
