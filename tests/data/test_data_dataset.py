"""The data set: truncation and its counts, plain text, views, fingerprints."""

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from templates import TEXT_ARGUMENTS as CHATML
from tokenizers import processors

from dlora.data import NO_TARGET, Dataset, load_examples
from dlora.data.encode import text_prompt
from dlora.errors import UsageError


def chat(question: str, answer: str) -> dict[str, Any]:
    roles = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def load(path: Any, tokenizer: Any, format: str = "chat", max_length: int = 999) -> Dataset:
    return load_examples(
        path, key="data.train", format=format, tokenizer=tokenizer, max_length=max_length
    )


def test_truncation_keeps_the_left_and_counts(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    records = [chat("Hi", "yes"), chat("Hi", "no " * 30), chat("Hi" * 200, "yes")]
    path = jsonl(*records)
    whole = load(path, tokenizer)
    assert [example.id for example in whole] == [0, 1, 2]
    assert str(whole.report).startswith("3 records: 3 kept with ")

    limit = len(whole[0]) + 2
    cut = load(path, tokenizer, max_length=limit)
    report = cut.report
    assert (report.records, report.kept, report.dropped, report.shortened) == (3, 2, 1, 1)
    assert report.longest == limit == len(cut[1])
    assert cut[1].input_ids.tolist() == whole[1].input_ids[:limit].tolist()
    assert cut[1].labels.tolist() == whole[1].labels[:limit].tolist()
    assert [example.id for example in cut] == [0, 1]  # positions in what was kept
    assert report.targets == sum(int((e.labels[1:] != NO_TARGET).sum()) for e in cut)
    assert report.targets == sum(e.num_targets for e in cut)
    assert cut.lengths.tolist() == [len(e) for e in cut]
    assert "\n" not in str(report)


def test_losing_only_what_carries_no_loss_is_not_shortening(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    path = jsonl(chat("Hi", "yes"))
    length = len(load(path, tokenizer)[0])
    for removed, shortened in ((1, 0), (2, 1)):  # the template's line break; the end-of-turn token
        data = load(path, tokenizer, max_length=length - removed)
        assert (data.report.shortened, len(data[0])) == (shortened, length - removed)


def test_nothing_left_is_an_error_with_counts(make_tokenizer: Any, jsonl: Any):
    expected = "data.train: none of 2 records has a target token within data.max_length 5; raise"
    with pytest.raises(UsageError, match=expected):
        load(jsonl(chat("Hi", "yes"), chat("a", "b")), make_tokenizer(), max_length=5)


def test_text_is_trained_on_every_token_and_an_eos(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer(None)
    example = load(jsonl({"text": "Hello there!"}), tokenizer, "text")[0]
    ids = [*tokenizer.encode("Hello there!"), tokenizer.eos_token_id]
    assert example.input_ids.tolist() == ids
    assert example.labels.tolist() == [NO_TARGET, *ids[1:]]
    assert example.num_targets == len(ids) - 1


def test_text_keeps_what_the_tokenizer_adds_and_no_second_eos(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer(None)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=special
    )
    example = load(jsonl({"text": "Hello"}), tokenizer, "text")[0]
    assert tokenizer.decode(example.input_ids) == "<s>Hello<|im_end|>"
    assert example.labels[0] == NO_TARGET
    assert example.labels[1:].tolist() == example.input_ids[1:].tolist()


def adding(tokenizer: Any, form: str) -> Any:
    """The tokenizer, which now adds special tokens as `form` says: "<s> $A"."""
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("form", ["<s> $A", "<s> $A <|im_end|>", "$A"])
@pytest.mark.parametrize("text", ["<s>Hello", "<s> Hello<|im_end|>", "Hello<|im_end|>"])
def test_a_text_has_its_ends_once(form: str, text: str, make_tokenizer: Any, jsonl: Any):
    tokenizer = adding(make_tokenizer(None), form)
    example = load(jsonl({"text": text}), tokenizer, "text")[0]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    wanted = tokenizer.encode(text, add_special_tokens=False)
    wanted = [bos] * ("<s>" in form and wanted[0] != bos) + wanted + [eos] * (wanted[-1] != eos)
    assert example.input_ids.tolist() == wanted
    assert example.labels.tolist() == [NO_TARGET, *wanted[1:]]
    if text.startswith("<s>") or "<s>" in form:  # a prompt to continue has the same beginning
        asked = text.removesuffix("<|im_end|>")
        assert text_prompt(tokenizer, asked) == wanted[:-1]


def test_a_completion_is_the_target_whatever_is_added_around(make_tokenizer: Any, jsonl: Any):
    record = {"prompt": "<s>Hello there", "completion": " How are"}
    for form in ("<s> $A", "<s> $A <|im_end|>", "$A"):
        tokenizer = adding(make_tokenizer(None), form)
        example = load(jsonl(record), tokenizer, "text")[0]
        assert tokenizer.decode(example.input_ids) == "<s>Hello there How are<|im_end|>"
        targets = example.input_ids[example.labels != NO_TARGET]
        assert tokenizer.decode(targets) == " How are<|im_end|>"


def test_a_chat_template_s_bos_stands_once(make_tokenizer: Any, jsonl: Any):
    tokenizer = adding(make_tokenizer("{{ bos_token }}" + CHATML), "<s> $A")
    example = load(jsonl(chat("Hi", "yes")), tokenizer)[0]
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_chat_template_writes_its_own_special_tokens(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    example = load(jsonl(chat("Hi", "yes")), tokenizer)[0]
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system")


def test_it_is_a_sequence_of_read_only_int32_views(make_tokenizer: Any, jsonl: Any):
    data = load(jsonl(*(chat("Hi", "yes" * i) for i in range(1, 6))), make_tokenizer())
    assert [e.id for e in data[1:4]] == [1, 2, 3]
    assert data[-1].id == 4
    with pytest.raises(IndexError):
        data[5]
    assert data[0].input_ids.dtype == data[0].labels.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        data[0].labels[0] = 1
    with pytest.raises(AttributeError):
        data[0].id = 3  # type: ignore[misc]


def test_fingerprint_is_the_documented_one_and_sees_every_change(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    records = [chat("Hi", "yes"), chat("Hello", "no")]
    data = load(jsonl(*records), tokenizer)
    expected = hashlib.sha256()
    for example in data:
        length = len(example)
        expected.update(struct.pack("<qq", example.id, length))
        expected.update(struct.pack(f"<{length}i", *example.input_ids.tolist()))
        expected.update(struct.pack(f"<{length}i", *example.labels.tolist()))
    assert data.fingerprint == expected.hexdigest()
    assert data.fingerprint == load(jsonl(*records, name="again.jsonl"), tokenizer).fingerprint
    others = [
        load(jsonl(*records[::-1]), tokenizer),
        load(jsonl(records[0]), tokenizer),
        load(jsonl(records[0], chat("Hello", "yes")), tokenizer),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_more_records_than_one_call_of_the_tokenizer(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    data = load(jsonl(*(chat("Hi", f"yes {i}") for i in range(1100))), tokenizer)
    assert len(data) == data.report.records == 1100
    for i in (0, 511, 512, 1099):
        assert tokenizer.decode(data[i].input_ids).endswith(f"yes {i}<|im_end|>\n")


def test_unknown_formats_and_formats_that_cannot_act(make_tokenizer: Any, jsonl: Any):
    with pytest.raises(UsageError, match=r"data.format: 'csv' is unknown; expected one of"):
        load("x", make_tokenizer(), "csv")
    with pytest.raises(UsageError, match=r"data.train builtin:docstrings contains chats"):
        load("builtin:docstrings", make_tokenizer(), "alpaca")
