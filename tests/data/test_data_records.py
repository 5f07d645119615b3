"""What a record says beside its texts: in the prompt as transformers puts it there, or said."""

import json
from typing import Any

import pytest
from refusals import refusal
from templates import (
    EITHER,
    HARMONY,
    LLAMA,
    PARTS,
    QWEN,
    STRICT,
    TEXT_ARGUMENTS,
    THREE_ROLES,
)
from test_data_chat import target_texts

from dlora.data import Dataset, load_examples
from dlora.data.template import set_template

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}
USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "I am fine."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4 degrees"}


def load(jsonl: Any, tokenizer: Any, *records: Any, format: str = "chat") -> Dataset:
    reading: dict[str, Any] = {"key": "data.train", "format": format, "max_length": 999}
    return load_examples(jsonl(*records), tokenizer=tokenizer, **reading)


def expected(tokenizer: Any, messages: list[Any], **variables: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False, **variables)
    return ids


BESIDE: dict[str, tuple[str, str, dict[str, Any], list[Any], dict[str, Any]]] = {
    "tools": ("chat", QWEN, {"messages": [USER, ANSWER], "tools": [TOOL]}, [USER, ANSWER],
              {"tools": [TOOL]}),
    "tools as text": ("chat", QWEN, {"messages": [USER, ANSWER], "tools": json.dumps([TOOL])},
                      [USER, ANSWER], {"tools": [TOOL]}),
    "no tools": ("chat", QWEN, {"messages": [USER, ANSWER], "tools": []}, [USER, ANSWER], {}),
    "functions": ("chat", QWEN, {"messages": [USER, ANSWER], "functions": [TOOL["function"]]},
                  [USER, ANSWER], {"tools": [TOOL]}),
    "sharegpt tools": ("sharegpt", QWEN, {"conversations": [
        {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "I am fine."}],
        "tools": json.dumps([TOOL])}, [USER, ANSWER], {"tools": [TOOL]}),
    "documents": ("chat", QWEN + "{%- for d in documents or [] %}{{- d.text }}{%- endfor %}",
                  {"messages": [USER, ANSWER], "documents": [{"title": "t", "text": "fox"}]},
                  [USER, ANSWER], {"documents": [{"title": "t", "text": "fox"}]}),
    "of the template's own": ("chat", "{{ date_string or '' }}" + QWEN,
                              {"messages": [USER, ANSWER], "date_string": "today"},
                              [USER, ANSWER], {"date_string": "today"}),
    "kwargs": ("chat", "{{ persona or '' }}" + QWEN,
               {"messages": [USER, ANSWER], "chat_template_kwargs": {"persona": "lazy dog"}},
               [USER, ANSWER], {"persona": "lazy dog"}),
    "system": ("chat", QWEN, {"messages": [USER, ANSWER], "system": "Be kind."},
               [{"role": "system", "content": "Be kind."}, USER, ANSWER], {}),
    "system twice": ("chat", QWEN, {"messages": [
        {"role": "system", "content": "Be kind."}, USER, ANSWER], "system": "Be kind."},
        [{"role": "system", "content": "Be kind."}, USER, ANSWER], {}),
    "sharegpt system twice": ("sharegpt", QWEN, {"conversations": [
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hello"},
        {"from": "bot", "value": "I am fine."}], "system": " Be kind."},
        [{"role": "system", "content": "Be kind."}, USER, ANSWER], {}),
    "history": ("alpaca", QWEN, {"instruction": "Hello", "output": "I am fine.",
                                 "history": [["What", "42"]], "system": "Be kind."},
                [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What"},
                 {"role": "assistant", "content": "42"}, USER, ANSWER], {}),
    "prompt and response": ("alpaca", QWEN, {"prompt": "Hello", "response": "I am fine."},
                            [USER, ANSWER], {}),
    "name": ("chat", QWEN.replace("m.role + '\n'", "m.role + ' ' + (m.name or '') + '\n'"),
             {"messages": [{**USER, "name": "fox"}, ANSWER]},
             [{**USER, "name": "fox"}, ANSWER], {}),
    "developer": ("chat", TEXT_ARGUMENTS,
                  {"messages": [{"role": "developer", "content": "Be kind."}, USER, ANSWER]},
                  [{"role": "developer", "content": "Be kind."}, USER, ANSWER], {}),
    "developer as system": ("chat", THREE_ROLES, {"messages": [
        {"role": "developer", "content": "Be kind."}, USER, ANSWER]},
        [{"role": "system", "content": "Be kind."}, USER, ANSWER], {}),
    "parts": ("chat", EITHER, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "lazy "}, {"type": "text", "text": "dog"}]}, ANSWER]},
        [{"role": "user", "content": [{"type": "text", "text": "lazy "},
                                      {"type": "text", "text": "dog"}]}, ANSWER], {}),
    "parts joined": ("chat", THREE_ROLES, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "lazy "}, {"type": "text", "text": "dog"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I am fine."}]}]},
        [{"role": "user", "content": "lazy dog"}, ANSWER], {}),
    "a template of parts": ("chat", PARTS, {"messages": [USER, ANSWER]},
                            [{**t, "content": [{"type": "text", "text": t["content"]}]}
                             for t in (USER, ANSWER)], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_the_messages_is_in_the_prompt_once(
    case: str, make_tokenizer: Any, jsonl: Any
) -> None:
    format, template, record, messages, variables = BESIDE[case]
    tokenizer = make_tokenizer(template)
    data = load(jsonl, tokenizer, record, format=format)
    assert data[0].input_ids.tolist() == expected(tokenizer, messages, **variables)
    assert target_texts(tokenizer, data[0])[-1].endswith("I am fine.<|im_end|>")
    assert "ignored" not in str(data.report)


def test_answers_of_a_history_are_trained_on(make_tokenizer: Any, jsonl: Any) -> None:
    record = {"instruction": "Hello", "output": "yes", "history": [["What", "42"]]}
    tokenizer = make_tokenizer(THREE_ROLES)
    data = load(jsonl, tokenizer, record, format="alpaca")
    assert target_texts(tokenizer, data[0]) == ["42<|im_end|>", "yes<|im_end|>"]


NO = [
    {"train": False},
    {"loss": False},
    {"loss_mask": 0},
    {"trainable": False},
    {"masked": True},
    {"weight": 0},
    {"training": "false"},
    {"loss": 0.0, "weight": 0},
    {"mask": 1},
]


@pytest.mark.parametrize("format", ["chat", "sharegpt"])
@pytest.mark.parametrize("mark", NO, ids=str)
def test_an_answer_marked_as_not_trained_on_is_no_target(
    mark: dict[str, Any], format: str, make_tokenizer: Any, jsonl: Any
) -> None:
    field, role, text = {
        "chat": ("messages", "role", "content"),
        "sharegpt": ("conversations", "from", "value"),
    }[format]
    tokenizer = make_tokenizer(THREE_ROLES)
    other = {
        k: v.replace("false", "true") if isinstance(v, str) else 1 - v for k, v in mark.items()
    }
    said: list[tuple[str, str, dict[str, Any]]] = [
        ("user", "Hello", mark), ("assistant", "no", mark), ("user", "What", {}),
        ("assistant", "yes", other), ("user", "What", {}), ("assistant", "no", mark),
    ]  # fmt: skip
    record = {field: [{role: r, text: t, **more} for r, t, more in said]}
    data = load(jsonl, tokenizer, record, format=format)
    assert target_texts(tokenizer, data[0]) == ["yes<|im_end|>"]
    messages = [{"role": r, "content": t} for r, t, _ in said]
    assert data[0].input_ids.tolist() == expected(tokenizer, messages)
    assert "ignored" not in str(data.report)


OF_RECORDS = [{"loss_mask": [0, 0, 0, 1]}, {"train": [None, False, None, True]}]


@pytest.mark.parametrize("mark", OF_RECORDS, ids=str)
def test_a_record_marks_its_messages(mark: Any, make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(THREE_ROLES)
    other = {"role": "assistant", "content": "no"}
    data = load(jsonl, tokenizer, {"messages": [USER, other, USER, ANSWER], **mark})
    assert target_texts(tokenizer, data[0]) == ["I am fine.<|im_end|>"]


def test_of_prompt_and_completion_the_completion_is_trained_on(
    make_tokenizer: Any, jsonl: Any
) -> None:
    tokenizer = make_tokenizer(THREE_ROLES)
    other = {"role": "assistant", "content": "no"}
    data = load(jsonl, tokenizer, {"prompt": [USER, other, USER], "completion": [ANSWER]})
    assert target_texts(tokenizer, data[0]) == ["I am fine.<|im_end|>"]
    data = load(jsonl, tokenizer, {"prompt": "Hello there", "completion": " How"}, format="text")
    assert target_texts(tokenizer, data[0]) == [" How<|im_end|>"]


THOUGHT = {"role": "assistant", "content": "42", "reasoning_content": "Hm. yes"}
END = "<|im_end|>"


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_thinking_is_what_the_template_makes_of_it(
    name: str, make_tokenizer: Any, jsonl: Any
) -> None:
    tokenizer = make_tokenizer(QWEN)
    turn = {"role": "assistant", "content": "42", name: "Hm. yes"}
    data = load(jsonl, tokenizer, {"messages": [USER, turn]})
    assert data[0].input_ids.tolist() == expected(tokenizer, [USER, turn])
    assert target_texts(tokenizer, data[0]) == [f"<think>\nHm. yes\n</think>\n\n42{END}"]
    parts = [{"type": "thinking", "thinking": "Hm. yes"}, {"type": "text", "text": "42"}]
    same = load(jsonl, tokenizer, {"messages": [USER, {**ANSWER, "content": parts}]})
    assert same.fingerprint == data.fingerprint


def test_thinking_that_the_template_strips_of_earlier_answers_is_counted(
    make_tokenizer: Any, jsonl: Any
) -> None:
    tokenizer = make_tokenizer(QWEN)
    messages = [USER, THOUGHT, USER, THOUGHT]
    data = load(jsonl, tokenizer, {"messages": messages}, {"messages": messages})
    assert data[0].input_ids.tolist() == expected(tokenizer, messages)
    last = f"<think>\nHm. yes\n</think>\n\n42{END}"
    assert target_texts(tokenizer, data[0]) == [f"42{END}", last]
    assert "thinking of 2 answers before the last left out by the chat template" in str(data.report)


def test_thinking_is_missed_although_its_words_are_elsewhere(
    make_tokenizer: Any, jsonl: Any
) -> None:
    tokenizer = make_tokenizer(QWEN)
    same = {"role": "assistant", "content": "yes", "thinking": "yes"}
    data = load(jsonl, tokenizer, {"messages": [USER, same, USER, {**same, "train": False}]})
    assert target_texts(tokenizer, data[0]) == [f"yes{END}"]
    assert data.report.left_out_thinking == 1
    data = load(jsonl, tokenizer, {"messages": [USER, {**same, "train": False}, USER, ANSWER]})
    assert data.report.left_out_thinking == 1


def test_thinking_that_the_template_never_writes_is_refused(
    make_tokenizer: Any, jsonl: Any
) -> None:
    for messages in ([USER, THOUGHT], [USER, THOUGHT, USER, ANSWER]):
        said = refusal(load, jsonl, make_tokenizer(THREE_ROLES), {"messages": messages})
        assert (
            "data.jsonl:1: the model's chat template leaves out the thinking of message 2" in said
        )


TEXT_CALL = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
AS_TEXT = {**CALLS, "tool_calls": [TEXT_CALL]}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


@pytest.mark.parametrize(
    "turn",
    [
        CALLS,
        AS_TEXT,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]},
    ],
)
def test_calls_of_tools_are_targets(turn: Any, make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(QWEN)
    record = {"messages": [USER, turn, RESULT, ANSWER], "tools": [TOOL]}
    data = load(jsonl, tokenizer, record)
    messages = [USER, CALLS, RESULT, ANSWER]
    assert data[0].input_ids.tolist() == expected(tokenizer, messages, tools=[TOOL])
    assert target_texts(tokenizer, data[0])[0] == WRITTEN + END
    assert target_texts(tokenizer, data[0])[1].endswith(f"I am fine.{END}")


def test_calls_with_thinking_and_a_text(make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(QWEN)
    turn = {**CALLS, "content": "yes", "thinking": "Hm.", "tool_calls": [CALL, CALL]}
    messages = [USER, turn, RESULT, RESULT, THOUGHT]
    data = load(jsonl, tokenizer, {"messages": messages})
    assert data[0].input_ids.tolist() == expected(tokenizer, messages)
    assert target_texts(tokenizer, data[0]) == [
        f"<think>\nHm.\n</think>\n\nyes\n{WRITTEN}\n{WRITTEN}{END}",
        f"<think>\nHm. yes\n</think>\n\n42{END}",
    ]


def test_sharegpt_s_calls_and_observations(make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(QWEN)
    turns = [("human", "Hello"), ("function_call", json.dumps(CALL["function"])),
             ("observation", "4 degrees"), ("gpt", "I am fine.")]  # fmt: skip
    record = {"conversations": [{"from": f, "value": v} for f, v in turns]}
    data = load(jsonl, tokenizer, record, format="sharegpt")
    assert data[0].input_ids.tolist() == expected(tokenizer, [USER, CALLS, RESULT, ANSWER])


def test_calls_in_a_template_that_needs_them_before_results(
    make_tokenizer: Any, jsonl: Any
) -> None:
    tokenizer = make_tokenizer(STRICT, eos_token="</s>")
    messages = [USER, CALLS, RESULT, ANSWER]
    data = load(jsonl, tokenizer, {"messages": messages})
    assert data[0].input_ids.tolist() == expected(tokenizer, messages)
    call = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn"}}]</s>'
    assert target_texts(tokenizer, data[0]) == [call, " I am fine.</s>"]


def test_channels_and_their_own_ends(make_tokenizer: Any, jsonl: Any) -> None:
    """Thinking goes before a later answer; a call, an answer and the last one end differently."""
    tokenizer = make_tokenizer(HARMONY.replace("<|call|>", "<|im_start|>"))
    messages = [USER, {**CALLS, "thinking": "Hm."}, RESULT, {**ANSWER, "thinking": "yes"}]
    data = load(jsonl, tokenizer, {"messages": messages})
    assert data[0].input_ids.tolist() == expected(tokenizer, messages)
    assert target_texts(tokenizer, data[0]) == [
        ' to=weather {"city": "Bonn"}<|im_start|>',
        "<|channel|>analysisyes<|end|><|user|>assistant<|channel|>finalI am fine.<|return|>",
    ]
    ends = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|return|>"])
    assert data.report.ends == sorted(ends)  # <|end|> stands inside of an answer
    data = load(jsonl, tokenizer, {"messages": [USER, ANSWER, USER, ANSWER]})
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|return|>"])
    assert data.report.ends == sorted(ends)


def test_arguments_that_the_template_wants_as_text(make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(TEXT_ARGUMENTS)
    data = load(jsonl, tokenizer, {"messages": [USER, CALLS, RESULT, ANSWER]})
    assert data[0].input_ids.tolist() == expected(tokenizer, [USER, AS_TEXT, RESULT, ANSWER])
    assert (
        target_texts(tokenizer, data[0])[0] == 'weather\n```json\n{"city": "Bonn"}\n```<|im_end|>'
    )


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "tool calls": (THREE_ROLES, "chat", {"messages": [USER, CALLS]},
                   "leaves out the tool calls of message 2"),
    "results": (THREE_ROLES, "chat", {"messages": [USER, ANSWER, RESULT, ANSWER]},
                "leaves out message 3 of role 'tool'"),
    "systems": (QWEN, "chat", {"messages": [{"role": "system", "content": "a"}, USER, ANSWER],
                               "system": "b"}, "'system' and a message of role 'system' say"),
    "image": (QWEN, "chat", {"messages": [{"role": "user", "content": [IMAGE]}, ANSWER]},
              "messages[0].content[0] is a part of type 'image_url'; only text parts"),
    "half": (QWEN, "chat", {"messages": [USER, {**ANSWER, "weight": 0.5}]},
             "messages[1] has 'weight': 0.5; expected true or false"),
    "both": (QWEN, "chat", {"messages": [USER, {**ANSWER, "weight": 1, "masked": True}]},
             "of which one says train and one does not"),
    "of a user": (QWEN, "chat", {"messages": [{**USER, "train": True}, ANSWER]},
                  "messages[0] asks to train on a message of role 'user'"),
    "all": (QWEN, "chat", {"messages": [USER, {**ANSWER, "train": False}]}, "nothing to train on"),
    "record": (QWEN, "alpaca", {"instruction": "a", "output": "b", "train": False},
               "nothing to train on"),
    "plain": (QWEN, "text", {"text": "a", "train": False}, "nothing to train on: 'train' says so"),
    "detail": (QWEN, "chat", {"messages": [USER, {**ANSWER, "train_detail": []}]},
               "'train_detail', which is not supported"),
    "count": (QWEN, "chat", {"messages": [USER, ANSWER], "loss_mask": [1]},
              "'loss_mask' has 1 values for 2 messages"),
    "tools": (QWEN, "chat", {"messages": [USER, ANSWER], "tools": "{"},
              "'tools' is a text that is no JSON"),
    "call": (QWEN, "sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]},
             "conversations[0].value is a text that is no JSON"),
    "thoughts": (QWEN, "chat", {"messages": [USER, {**ANSWER, "thinking": "a", "reasoning": "b"}]},
                 "different texts in 'thinking', 'reasoning'"),
    "history": (QWEN, "alpaca", {"instruction": "a", "output": "b", "history": [["a"]]},
                "history[0] is no pair"),
    "kwargs": (QWEN, "chat", {"messages": [USER, ANSWER],
                              "chat_template_kwargs": {"tokenize": True}},
               "'tokenize', which is not the record's to set"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_its_line(
    case: str, make_tokenizer: Any, jsonl: Any
) -> None:
    template, format, record, message = REFUSED[case]
    said = refusal(load, jsonl, make_tokenizer(template), record, format=format)
    assert "data.jsonl:1: " in said and message in said


def test_fields_that_nothing_reads_are_named_with_counts(make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(THREE_ROLES)
    records = [
        {"messages": [{**USER, "name": "fox", "id": None}, {**ANSWER, "id": 3}], "source": "web"},
        {"messages": [USER, ANSWER], "source": "web", "tools": [TOOL], "score": None},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"mood": 1}, "bos_token": "!"},
    ]
    data = load(jsonl, tokenizer, *records)
    assert data.report.ignored == {
        "message.id": 1, "message.name": 1, "source": 2, "tools": 1,
        "chat_template_kwargs.mood": 1, "bos_token": 1,
    }  # fmt: skip
    assert "ignored fields: source 2, " in str(data.report).replace("message.id 1, ", "").replace(
        "message.name 1, ", ""
    )
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "x"}}
    data = load(jsonl, tokenizer, {"messages": [{**USER, "content": [part]}, ANSWER]})
    assert data.report.ignored == {"message.content.cache_control": 1}
    data = load(jsonl, tokenizer, {"text": "a", "url": "b"}, format="text")
    assert data.report.ignored == {"url": 1}


def test_control_tokens_typed_in_texts_are_counted(make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer = make_tokenizer(THREE_ROLES)
    faked = "no<|im_end|>\n<|im_start|>user\nHello"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    data = load(jsonl, tokenizer, {"messages": [USER, {**ANSWER, "content": faked}]})
    assert target_texts(tokenizer, data[0]) == [f"{faked}<|im_end|>"]
    said = "control tokens typed in texts: <|im_end|> 1, <|im_start|> 1"
    assert said in str(data.report)
    data = load(jsonl, tokenizer, {"text": "<s>Hello<s> there<|im_end|>"}, format="text")
    assert "control tokens typed in texts: <s> 1" in str(data.report)
    assert "control" not in str(load(jsonl, tokenizer, {"text": "<s>Hello"}, format="text").report)


def test_a_template_and_defaults_of_the_user(make_tokenizer: Any, jsonl: Any) -> None:
    tokenizer, own = make_tokenizer(LLAMA), make_tokenizer(QWEN)
    set_template(tokenizer, QWEN, {"enable_thinking": False})
    record = {"messages": [USER, ANSWER]}
    assert load(jsonl, tokenizer, record).fingerprint == load(jsonl, own, record).fingerprint
    asked = {"add_generation_prompt": True, "tokenize": False}
    assert tokenizer.apply_chat_template([USER], **asked) == own.apply_chat_template(
        [USER], **asked, enable_thinking=False
    )
    assert tokenizer.apply_chat_template([USER], **asked, enable_thinking=True) == (
        own.apply_chat_template([USER], **asked)
    )


@pytest.mark.parametrize("value", [True, None, 3, -1.5, 'é "quoted" \\ {{ x }}\n😀'])
def test_defaults_of_a_template_have_their_values(value: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("\n{{ [x] | tojson }}{% if x %}y{% endif %}")
    plain = make_tokenizer(tokenizer.chat_template)
    set_template(tokenizer, None, {"x": value})
    assert tokenizer.apply_chat_template([USER], tokenize=False) == plain.apply_chat_template(
        [USER], tokenize=False, x=value
    )


def test_a_default_that_the_template_does_not_read_is_refused(make_tokenizer: Any) -> None:
    said = refusal(set_template, make_tokenizer(QWEN), None, {"enable_thinkin": False})
    assert "enable_thinkin cannot act" in said and "reads enable_thinking, tools" in said
    said = refusal(set_template, make_tokenizer(None), "{% if %}", {})
    assert said.startswith("data.chat_template: ")
