"""The built-in data set: its size, its parts, and that nothing is imported to make it."""

import sys
from typing import Any

import pytest

from dlora.data import builtin, load_examples
from dlora.data.builtin import builtin_records, first_sentence
from dlora.errors import UsageError


def sentences(name: str) -> list[str]:
    """The answers without their indent and quotes."""
    return [record["messages"][-1]["content"].strip(' "') for record in builtin_records(name)]


def test_sizes_and_order_and_that_the_library_is_read_not_imported():
    modules = set(sys.modules)
    train, held_out = builtin_records("docstrings"), builtin_records("docstrings-heldout")
    new = set(sys.modules) - modules
    # A file's own coding, and where the library lies, are all that it takes.
    assert all(name.startswith(("encodings.", "_sysconfigdata")) for name in new), new
    assert 5_000 <= len(train) + len(held_out) <= 10_000
    assert 128 <= len(held_out) <= 256
    everything = [str(record) for record in train + held_out]
    assert len(set(everything)) == len(everything)
    builtin._pairs.cache_clear()  # the same again, from the files
    assert builtin_records("docstrings") == train
    assert builtin_records("docstrings-heldout") == held_out


def test_no_held_out_sentence_is_trained_on():
    def key(sentence: str) -> str:
        return sentence.lower().rstrip(".")

    held_out = {key(sentence) for sentence in sentences("docstrings-heldout")}
    assert not held_out & {key(sentence) for sentence in sentences("docstrings")}


def test_records_are_signatures_and_sentences():
    records = builtin_records("docstrings") + builtin_records("docstrings-heldout")
    answers = {}
    for record in records:
        system, user, assistant = record["messages"]
        assert [turn["role"] for turn in record["messages"]] == ["system", "user", "assistant"]
        assert system["content"] == builtin.SYSTEM
        signature = user["content"]
        assert signature.startswith(("def ", "async def ", "class "))
        assert len(signature) <= builtin.SIGNATURE_CHARACTERS
        sentence = assistant["content"].removeprefix('    """').removesuffix('"""')
        assert assistant["content"] == f'    """{sentence}"""'
        assert sentence == " ".join(sentence.split())
        answers[signature] = sentence
    dumps = next(s for s in answers if s.startswith("def json.dumps(obj, *, skipkeys=False"))
    assert answers[dumps] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert answers["class json.decoder.JSONDecodeError(ValueError)"].startswith("Subclass of")
    assert any(s.startswith("async def asyncio.") for s in answers)
    assert not any(".test." in s.split("(")[0] or ".tests." in s.split("(")[0] for s in answers)
    assert not any("site-packages" in s or "idle_test" in s for s in answers)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One. Two.", "One."),
        ("  One\n    line.  Two.", "One line."),
        ("No stop\n\nSecond paragraph.", "No stop"),
        ("Like this, e.g. that. More.", "Like this, e.g. that."),
        ("Version 3.11 is meant! Yes.", "Version 3.11 is meant!"),
        ('Say "hello." Then go.', 'Say "hello."'),
    ],
)
def test_first_sentence(docstring: str, sentence: str):
    assert first_sentence(docstring) == sentence


def test_an_interpreter_without_its_library_is_an_error(tmp_path: Any, monkeypatch: Any):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    builtin._pairs.cache_clear()
    try:
        with pytest.raises(UsageError, match="no Python source under"):
            builtin_records("docstrings")
    finally:
        builtin._pairs.cache_clear()


def test_held_out_loads_as_chats(make_tokenizer: Any):
    tokenizer = make_tokenizer()
    data = load_examples(
        "builtin:docstrings-heldout",
        key="data.eval",
        format="chat",
        tokenizer=tokenizer,
        max_length=1024,
    )
    for example, sentence in zip(data, sentences("docstrings-heldout"), strict=True):
        targets = example.labels[example.labels >= 0]
        assert tokenizer.decode(targets) == f'    """{sentence}"""<|im_end|>'
