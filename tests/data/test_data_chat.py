"""Which tokens are targets, for the families of chat templates, by decoding the targets again."""

from typing import Any

import pytest
from refusals import refusal

from dlora.data import NO_TARGET, Dataset, load_examples
from dlora.errors import UsageError

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PLAIN_MARK = NO_END.replace("'\n' }}", "'### End\n' }}")
# The markers of turns are tokens, but nothing ends a turn (Zephyr without its EOS).
HEADERS_ONLY = NO_END.replace("m['role'] + ': '", "'<|user|>' + m['role'] + ': '")
NO_PROMPT = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
# Ends the last turn with another token than the earlier ones (gpt-oss).
RETURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<|return|>' }}"
    "{% else %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO_ENDS = NO_PROMPT.replace("'<|im_end|>\n'", "'<|end|><|im_end|>\n'")
# The EOS of a turn is written by the next message, and by nobody for the last.
LATE_END = (
    "{% for m in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token + 'assistant: ' }}{% endif %}"
)
# Drops the reasoning of all answers but the last, and writes an empty one there (Qwen3).
REASONING = (
    "{% for m in messages %}{% set c = m['content'] %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens the reasoning itself.
OPENED = REASONING.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
DROPS_ALL = REASONING.replace("{{ '<think>\n' + r + '\n</think>\n\n' }}", "")
UPPER = NO_PROMPT.replace("m['content']", "(m['content'] | upper)")

SINGLE = [("user", "Hi"), ("assistant", "Hello  there, é 😀!")]
MULTI = [
    ("user", "How are you?"),
    ("assistant", " I am fine. \n"),
    ("user", "I am fine."),
    ("assistant", "I am fine."),
]
WITH_SYSTEM = [("system", "Hello"), *MULTI]
THOUGHT = [("user", "Hi"), ("assistant", "<think>\nHm.\n\nWell.\n</think>\n\nHello.")]
THOUGHT_LAST = [*MULTI, *THOUGHT]
THOUGHT_FIRST = [*THOUGHT, *MULTI]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def load(
    jsonl: Any, tokenizer: Any, *chats: list[tuple[str, str]], max_length: int = 999
) -> Dataset:
    path = jsonl(*({"messages": messages(turns)} for turns in chats))
    return load_examples(
        path, key="data.train", format="chat", tokenizer=tokenizer, max_length=max_length
    )


def target_texts(tokenizer: Any, example: Any) -> list[str]:
    """The decoded runs of neighbouring targets."""
    runs: list[list[int]] = []
    previous = NO_TARGET
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (token, NO_TARGET)
        if label != NO_TARGET:
            runs = [*runs, [token]] if previous == NO_TARGET else [*runs[:-1], [*runs[-1], token]]
        previous = label
    return [tokenizer.decode(run) for run in runs]


CASES: dict[str, tuple[str | None, str, list[tuple[str, str]], list[str]]] = {
    "chatml": (None, "byte_level", SINGLE, ["Hello  there, é 😀!<|im_end|>"]),
    "chatml-trimmed-offsets": (None, "trimmed", SINGLE, ["Hello  there, é 😀!<|im_end|>"]),
    "chatml-multi": (
        None, "byte_level", MULTI, [" I am fine. \n<|im_end|>", "I am fine.<|im_end|>"],
    ),
    "chatml-multi-trimmed": (
        None, "trimmed", MULTI, [" I am fine. \n<|im_end|>", "I am fine.<|im_end|>"],
    ),
    "chatml-system": (
        None, "byte_level", WITH_SYSTEM, [" I am fine. \n<|im_end|>", "I am fine.<|im_end|>"],
    ),
    "inst": (INST, "metaspace", MULTI, [" I am fine. </s>", " I am fine. </s>"]),
    "inst-bytes": (INST, "byte_level", MULTI, [" I am fine. </s>", " I am fine. </s>"]),
    "inst-trimmed": (INST, "trimmed", MULTI, [" I am fine. </s>", " I am fine. </s>"]),
    "no-prompt": (
        NO_PROMPT, "byte_level", MULTI, [" I am fine. \n<|im_end|>", "I am fine.<|im_end|>"],
    ),
    "return": (RETURN, "byte_level", MULTI, [" I am fine. \n<|end|>", "I am fine.<|return|>"]),
    "two-ends": (
        TWO_ENDS, "byte_level", MULTI,
        [" I am fine. \n<|end|><|im_end|>", "I am fine.<|end|><|im_end|>"],
    ),
    "reasoning-none": (
        REASONING, "byte_level", MULTI, [" I am fine. \n<|im_end|>", "I am fine.<|im_end|>"],
    ),
    "reasoning": (
        REASONING, "byte_level", THOUGHT,
        ["<think>\nHm.\n\nWell.\n</think>\n\nHello.<|im_end|>"],
    ),
    "reasoning-last": (
        REASONING, "byte_level", THOUGHT_LAST,
        [
            " I am fine. \n<|im_end|>",
            "I am fine.<|im_end|>",
            "<think>\nHm.\n\nWell.\n</think>\n\nHello.<|im_end|>",
        ],
    ),
    "reasoning-opened": (
        OPENED, "byte_level", THOUGHT, ["Hm.\n\nWell.\n</think>\n\nHello.<|im_end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_targets_are_the_answers_and_their_end_of_turn(name: str, make_tokenizer: Any, jsonl: Any):
    template, kind, turns, expected = CASES[name]
    eos = {"eos_token": "</s>"} if template == INST else {}
    tokenizer = make_tokenizer(*([template] if template else []), kind=kind, **eos)
    example = load(jsonl, tokenizer, turns)[0]
    assert target_texts(tokenizer, example) == expected
    ids = tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
    assert example.input_ids.tolist() == ids


# The blank behind "assistant:" is the header's, but it is one token with the answer's first word.
NO_TOKEN_CASES = {
    "no-end": (NO_END, "", ""),
    "mark": (PLAIN_MARK, "### End", "### End"),
    "headers": (HEADERS_ONLY, "", ""),
    "late": (LATE_END, "</s>", ""),
}


@pytest.mark.parametrize("name", NO_TOKEN_CASES)
def test_eos_ends_an_answer_whose_template_has_no_end_of_turn(
    name: str, make_tokenizer: Any, jsonl: Any
):
    template, first_end, last_end = NO_TOKEN_CASES[name]
    tokenizer = make_tokenizer(template, eos_token="</s>")
    example = load(jsonl, tokenizer, MULTI)[0]
    expected = [" I am fine. \n" + first_end, " I am fine." + last_end + "</s>"]
    assert target_texts(tokenizer, example) == expected

    # The sequence is the template's up to the last answer's end, and the EOS behind it.
    text = tokenizer.apply_chat_template(messages(MULTI), tokenize=False)
    text = text[: text.rindex("I am fine.") + len("I am fine." + last_end)]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert example.input_ids.tolist() == [*ids, tokenizer.eos_token_id]
    assert example.labels[-1] == tokenizer.eos_token_id


def test_a_token_that_joins_header_and_answer_is_no_target(make_tokenizer: Any, jsonl: Any):
    joined = (
        "{% for m in messages %}{{ m['role'] + ': th' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer(joined)
    assert "Ġthe" in tokenizer.tokenize(": the")  # " th" of the header and "e" of the answer
    example = load(jsonl, tokenizer, [("user", "Hi"), ("assistant", "e fox")])[0]
    assert target_texts(tokenizer, example) == [" fox<|im_end|>"]


def test_the_answer_may_occur_elsewhere_in_the_conversation(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    turns = [("system", "yes"), ("user", "yes"), ("assistant", "yes"), ("user", "assistant\nyes")]
    example = load(jsonl, tokenizer, [*turns, ("assistant", "yes")])[0]
    assert target_texts(tokenizer, example) == ["yes<|im_end|>"] * 2
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    for end in [i for i, x in enumerate(example.labels) if x == NO_TARGET][:-1]:
        if example.labels[end + 1] != NO_TARGET:  # what stands before a run is the header
            assert example.input_ids[end + 1 - len(header) : end + 1].tolist() == header


def test_messages_behind_the_last_answer_are_left_out(make_tokenizer: Any, jsonl: Any):
    tokenizer = make_tokenizer()
    examples = load(jsonl, tokenizer, SINGLE, [*SINGLE, ("user", "Thanks!")])
    assert examples[0].input_ids.tolist() == examples[1].input_ids.tolist()
    assert examples[0].labels.tolist() == examples[1].labels.tolist()


def test_a_template_that_prints_the_date_gives_the_same_tokens_on_any_day(
    make_tokenizer: Any, jsonl: Any
):
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}" + NO_PROMPT
    tokenizer = make_tokenizer(dated)
    text = tokenizer.decode(load(jsonl, tokenizer, SINGLE)[0].input_ids)
    assert text.startswith("Today is 26 Jul 2024. <|im_start|>user")


REFUSED = {
    "reasoning-dropped": (REASONING, THOUGHT_FIRST, "changes the answer in message 2"),
    "reasoning-always-dropped": (DROPS_ALL, THOUGHT, "changes the answer in message 2"),
    "rewritten": (UPPER, SINGLE, "changes the answer in message 2"),
    "header-and-rewritten": (
        NO_PROMPT.replace("m['content']", "m['content'].replace('Hm.', 'Hm. ')"),
        THOUGHT,
        "changes the answer in message 2",
    ),
    "role": (INST, WITH_SYSTEM, "refuses this conversation: Only user and assistant roles"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_changes_or_refuses_is_an_error(name: str, make_tokenizer: Any, jsonl: Any):
    template, turns, expected = REFUSED[name]
    said = refusal(load, jsonl, make_tokenizer(template), turns)
    assert "data.jsonl:1: the model's chat template " + expected in said


TOKENIZER_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"template": None}, "data.train: chats need a chat template, but the model's tokenizer has"),
    ({"template": NO_END, "eos_token": None}, "no end-of-sequence token"),
]


@pytest.mark.parametrize(("options", "expected"), TOKENIZER_ERRORS)
def test_unfit_tokenizers(options: Any, expected: str, make_tokenizer: Any, jsonl: Any):
    with pytest.raises(UsageError, match=expected):
        load(jsonl, make_tokenizer(**options), SINGLE)


def test_a_slow_tokenizer_is_an_error(jsonl: Any):
    class Slow:
        is_fast = False
        chat_template = "x"

    with pytest.raises(UsageError, match=r"data.train: .*\(Slow\).*fast tokenizer"):
        load(jsonl, Slow(), SINGLE)


def test_wrong_offsets_are_an_error(make_tokenizer: Any, jsonl: Any):
    class Shifted:
        """A tokenizer whose offsets count one character too few."""

        def __init__(self, inner: Any):
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            batch = self.inner(*args, **kwargs)
            shifted = [[(s - 15, e - 15) for s, e in row] for row in batch["offset_mapping"]]
            return {"input_ids": batch["input_ids"], "offset_mapping": shifted}

    with pytest.raises(UsageError, match="offsets do not cover the end-of-turn token"):
        load(jsonl, Shifted(make_tokenizer()), SINGLE)
