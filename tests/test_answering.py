"""Whatever ends a trained answer ends what is generated, here and by transformers from what is
written; the chat template of the training goes along."""

import json
from pathlib import Path
from typing import Any

import pytest
from chain import save_chain
from hostile import edit_json
from refusals import refusal
from safetensors.torch import load_file
from tiny import CHATML, save_chats, whole
from transformers import AutoTokenizer, GenerationConfig

from dlora import LoraConfig, attach, generate, save_adapter
from dlora.adapters.open_adapter import open_adapter
from dlora.data import load_examples
from dlora.data.stops import turn_ends
from dlora.export import command as export
from dlora.tasks import CAUSAL

FLOAT = ["--dtype", "float32", "--max-new-tokens", "24"]
IM_END, PAD = 257, 258


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chain(tmp_path_factory.mktemp("chain") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    model = attach(whole(base), LoraConfig(r=1, target_modules=["q_proj"]))
    save_adapter(model, base.with_name("adapter"), base_model_name_or_path=str(base))
    return base.with_name("adapter")


def printed(capsys: Any, *words: str) -> str:
    capsys.readouterr()
    assert generate.main([*words, "--prompt", "say", *FLOAT]) == 0
    return capsys.readouterr().out


def answered(directory: Path) -> str:
    """What transformers alone answers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = whole(directory).generate(**asked, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("settings", ["none", "null", "one", "several"])
def test_an_answer_ends_where_the_template_ends_a_turn(
    settings: str, base: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    """Whatever the base's own settings call an end."""
    file, text = base / "generation_config.json", (base / "generation_config.json").read_text()
    try:
        if settings == "none":
            file.unlink()
        else:
            edit_json(file, eos_token_id={"null": None, "one": PAD, "several": [PAD, 2]}[settings])
        assert printed(capsys, "--base", str(base)) == "one\n"
        assert printed(capsys, "--adapter", str(adapter)) == "one\n"
        words = ["--adapter", str(adapter), "--to"]
        export.main([*words, str(tmp_path / "merged"), "--merge"])
        assert answered(tmp_path / "merged") == "one"
        export.main([*words, str(tmp_path / "plain")])
        for directory in ("merged", "plain"):
            ends = GenerationConfig.from_pretrained(tmp_path / directory).eos_token_id
            assert ends == {"one": [PAD, IM_END], "several": [PAD, 2, IM_END]}.get(settings, IM_END)
    finally:
        file.write_text(text)


def test_samples_end_there_too(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_examples(
        str(save_chats(tmp_path / "c.jsonl", 2)),
        key="data.eval",
        format="chat",
        tokenizer=tokenizer,
        max_length=99,
    )
    answers = CAUSAL.answers(
        whole(base), tokenizer, data.first(2), pad_id=PAD, ends=data.report.ends
    )
    assert [answer for _, _, answer in answers] == ["one", "one"]


MARKS = CHATML.replace("'<|im_end|>\n'", "stop + '\n'")


def test_a_run_writes_the_template_and_the_ends_beside_its_adapter(
    run: Any, tmp_path: Path, capsys: Any
) -> None:
    """A base without a template, trained on one whose variable is set: everything follows."""
    base = save_chain(tmp_path / "base", template=False)
    (tmp_path / "t.jinja").write_text(MARKS)
    chats = str(save_chats(tmp_path / "c.jsonl", 4))
    run(
        "run",
        1,
        model__path=str(base),
        data__train=chats,
        data__chat_template=str(tmp_path / "t.jinja"),
        data__chat_template_kwargs={"stop": "<|im_end|>"},
        optimizer__lr=0.0,
        train__max_steps=1,
    )
    directory = tmp_path / "run"
    (tmp_path / "t.jinja").unlink()
    adapter = directory / "adapter"
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] == IM_END
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    reference = AutoTokenizer.from_pretrained(base)
    reference.chat_template = CHATML
    wanted = reference.apply_chat_template(turns, tokenize=False)
    for place in (adapter, *(directory / "checkpoints").glob("step-*")):
        assert open_adapter(place).answering.ends == (IM_END,)  # whatever the template tells
        assert printed(capsys, "--adapter", str(place)) == "one\n"
        words = ["--adapter", str(place), "--merge", "--to"]
        export.main([*words, str(tmp_path / place.name)])
        assert answered(tmp_path / place.name) == "one"
        exported = AutoTokenizer.from_pretrained(tmp_path / place.name)
        assert exported.apply_chat_template(turns, tokenize=False) == wanted
    beside = AutoTokenizer.from_pretrained(adapter)
    assert beside.apply_chat_template(turns, tokenize=False) == wanted
    assert load_file(adapter / "adapter_model.safetensors")


def test_ends_that_are_no_tokens_are_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    file = adapter / "generation_config.json"
    for value in ("x", [1.5], [True], -1):
        file.write_text(json.dumps({"eos_token_id": value}))
        said = refusal(generate.main, ["--adapter", str(adapter), "--prompt", "x"])
        assert said.startswith(f"{file}: eos_token_id: ")
    file.unlink()
    (adapter / "chat_template.jinja").write_text("{% if %}")
    said = refusal(generate.main, ["--adapter", str(adapter), "--prompt", "x"])
    assert said.startswith(f"{adapter}: ")
    (adapter / "chat_template.jinja").unlink()


def test_ends_of_templates(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert turn_ends(tokenizer) == [IM_END]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert turn_ends(tokenizer) == [PAD]  # what training appends
    for template in (None, "{{ raise_exception('no') }}", "{% if %}", "fixed"):
        tokenizer.chat_template = template
        assert turn_ends(tokenizer) == [PAD]
