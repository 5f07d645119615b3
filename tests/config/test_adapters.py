"""`adapters`: entries as the user writes them, and the configuration that each stands for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dlora.config.adapters import configs_of
from dlora.config.load import dump_yaml, load
from dlora.errors import UsageError

BASE: dict[str, Any] = {
    "model": {"path": "somewhere"},
    "data": {"train": "a.jsonl"},
    "output": {"dir": "runs/x"},
    "optimizer": {"lr": 1e-3},
}


def loaded(tmp_path: Path, adapters: Any, **sections: Any) -> Any:
    file = tmp_path / "run.yaml"
    common = {name: {**BASE.get(name, {}), **body} for name, body in sections.items()}
    file.write_text(yaml.safe_dump({**BASE, **common, "adapters": adapters}))
    return load(file)


def test_an_entry_stands_for_a_whole_configuration(tmp_path: Path) -> None:
    entries = [
        {"name": "a", "adapter": {"r": 4}, "train": {"epochs": 2}},
        {"name": "b", "optimizer": {"lr": 5e-4}, "data": {"train": "b.jsonl"}},
    ]
    config = loaded(tmp_path, entries, train={"max_steps": 7})
    a, b = configs_of(config).values()
    assert (a.adapter.r, a.optimizer.lr, a.data.train) == (4, 1e-3, "a.jsonl")
    assert (b.adapter.r, b.optimizer.lr, b.data.train) == (16, 5e-4, "b.jsonl")
    # An entry's own choice between two keys replaces the common one.
    assert (a.train.governed_by, b.train.governed_by, b.train.max_steps) == (
        "epochs",
        "max_steps",
        7,
    )
    assert [c.output.dir for c in (a, b)] == ["runs/x/adapters/a", "runs/x/adapters/b"]


def test_nobody_needs_common_data_where_each_has_its_own(tmp_path: Path) -> None:
    entries = [{"name": n, "data": {"train": f"{n}.jsonl"}} for n in "ab"]
    config = loaded(tmp_path, entries, data={})
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump({**BASE, "data": {}, "adapters": entries}))
    assert [c.data.train for c in configs_of(load(file)).values()] == ["a.jsonl", "b.jsonl"]
    assert [c.data.train for c in configs_of(config).values()] == ["a.jsonl", "b.jsonl"]


def test_what_is_written_loads_as_the_same(tmp_path: Path) -> None:
    entries = [
        {"name": "a", "adapter": {"method": "adalora", "init_r": 4, "target_r": 2}},
        {"name": "b", "train": {"epochs": 2}, "adapter": {"use_dora": True}},
    ]
    config = loaded(tmp_path, entries, data={"eval": "c.jsonl"})
    text = dump_yaml(config)
    (tmp_path / "again.yaml").write_text(text)
    again = load(tmp_path / "again.yaml")
    assert dump_yaml(again) == text
    for one, other in zip(configs_of(config).values(), configs_of(again).values(), strict=True):
        assert one == other


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ([], "adapters: expected a list of adapters, got []"),
        (["a"], "adapters: the entry 1 must be a mapping with a name, got 'a'"),
        ([{"adapter": {}}], "the entry 1: name: letters, digits, _ and - make a name, got null"),
        ([{"name": "../x"}], "the entry 1: name: letters, digits, _ and - make a name"),
        ([{"name": "default"}], "which means the adapter without one"),
        ([{"name": "a"}, {"name": "a"}], "adapters: the name a is there twice"),
        ([{"name": "a", "model": {}}], "adapters[a]: model is the same for all adapters"),
        ([{"name": "a", "adaptor": {}}], "adapters[a]: adaptor is not an option"),
        ([{"name": "a", "adapter": 3}], "adapters[a]: adapter must be a mapping of options"),
        ([{"name": "a", "adapter": {"rr": 3}}], "adapters[a]: adapter.rr is not an option"),
        ([{"name": "a", "optimizer": {"lr": "x"}}], "adapters[a]: optimizer.lr: expected float"),
        ([{"name": "a", "train": {"task": "causal"}}], "adapters[a]: train.task is the same for"),
        (
            [{"name": "a", "adapter": {"modules_to_save": ["lm_head"]}}, {"name": "b"}],
            "adapters[a]: adapter.modules_to_save: ['lm_head'] trains one adapter at a time",
        ),
        (
            [{"name": "a", "adapter": {"init_lora_weights": "lora_ga"}}],
            "adapter.init_lora_weights: lora_ga starts one adapter at a time",
        ),
        (
            [{"name": "a"}, {"name": "b", "optimizer": {"lr": -1}}],
            "adapters[b]: optimizer.lr: must be >= 0, got -1",
        ),
        (
            [{"name": "a", "optimizer": {"lr": -1}}, {"name": "b", "optimizer": {"lr": -1}}],
            "optimizer.lr: must be >= 0, got -1.0",
        ),
    ],
    ids=str,
)
def test_a_wrong_entry_is_one_line(tmp_path: Path, entries: Any, line: str) -> None:
    with pytest.raises(UsageError) as refused:
        loaded(tmp_path, entries)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "compile", True),
        ("train", "tokens_per_micro_batch", "auto"),
        ("data", "streaming", True),
        ("sharding", "optimizer_state", "divided"),
        ("output", "metrics_port", 9000),
        ("output", "remote", "memory://x"),
        ("output", "report_to", ["trackio"]),
        ("optimizer", "name", "lora_pro"),
    ],
    ids=str,
)
def test_what_follows_one_adapter_is_refused(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    with pytest.raises(UsageError, match=rf"{section}\.{key}: .*one adapter"):
        loaded(tmp_path, [{"name": "a"}, {"name": "b"}], **{section: {key: value}})


def test_what_all_share_may_act_for_some(tmp_path: Path) -> None:
    entries = [{"name": "a", "data": {"eval": "e.jsonl"}}, {"name": "b"}]
    loaded(tmp_path, entries, output={"eval_every": 3})
    with pytest.raises(UsageError, match=r"output\.eval_every: 3 cannot act"):
        loaded(tmp_path, [{"name": "a"}, {"name": "b"}], output={"eval_every": 3})


def test_a_word_of_the_command_line_replaces_the_list(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**BASE, "adapters": [{"name": "a"}]}))
    config = load(file, ["--adapters", "[{name: b, adapter: {r: 2}}]"])
    assert [member.name for member in config.adapters] == ["b"]
