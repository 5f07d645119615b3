"""Chat templates of the shapes that models have, shortened."""

# Hermes and Qwen3: tools in the system turn, calls in <tool_call>, thinking of the last answer.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.content is string %}{%- set content = m.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set thought = '' %}{%- if m.reasoning_content is string %}"
    "{%- set thought = m.reasoning_content %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}"
    "{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}"
    "{%- set call = call.function or call %}"
    '{{- \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{%- if call.arguments is string %}{{- call.arguments }}"
    "{%- else %}{{- call.arguments | tojson }}{%- endif %}{{- '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# gpt-oss: channels, results that name the call before them, other ends for calls and the last turn.
HARMONY = (
    "{%- set ns = namespace(call=none) %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if m.tool_calls %}"
    "{%- if m.thinking and loop.last %}"
    "{{- '<|user|>assistant<|channel|>analysis' + m.thinking + '<|end|>' }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}{%- set ns.call = call.name %}"
    "{{- '<|user|>assistant to=' + call.name + ' ' + (call.arguments | tojson) + '<|call|>' }}"
    "{%- elif loop.last %}"
    "{%- if m.thinking %}"
    "{{- '<|user|>assistant<|channel|>analysis' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|user|>assistant<|channel|>final' + m.content + '<|return|>' }}"
    "{%- else %}{{- '<|user|>assistant<|channel|>final' + m.content + '<|end|>' }}"
    "{%- set ns.call = none %}{%- endif %}"
    "{%- elif m.role == 'tool' %}{%- if ns.call is none %}"
    "{{- raise_exception('a result without a call') }}{%- endif %}"
    "{{- '<|user|>' + ns.call + ' to=assistant ' + m.content + '<|end|>' }}"
    "{%- else %}{{- '<|user|>' + m.role + ': ' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|user|>assistant' }}{%- endif %}"
)
# Mistral: turns alternate, but for calls and results.
STRICT = (
    "{%- set ns = namespace(user=true) %}{%- for m in messages %}"
    "{%- if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{%- if (m.role == 'user') != ns.user %}{{- raise_exception('roles must alternate') }}"
    "{%- endif %}{%- set ns.user = not ns.user %}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{{- call.function | tojson }}{%- endfor %}{{- ']</s>' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '</s>' }}"
    "{%- else %}{{- raise_exception('no role ' + m.role) }}{%- endif %}{%- endfor %}"
)
# DeepSeek V3: arguments of calls are texts.
TEXT_ARGUMENTS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# SmolVLM and others of images: a content is a list of parts.
PARTS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- for part in m.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
EITHER = PARTS.replace(
    "{%- for part in m.content %}{%- if part.type",
    "{%- if m.content is string %}{{- m.content }}{%- else %}"
    "{%- for part in m.content %}{%- if part.type",
).replace("{%- endfor %}{{- '<|im_end|>", "{%- endfor %}{%- endif %}{{- '<|im_end|>", 1)
# Knows system, user and assistant, and drops all else.
THREE_ROLES = (
    "{%- for m in messages %}{%- if m.role in ('system', 'user', 'assistant') %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Llama 3 and Gemma in their marks of turns.
LLAMA = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|user|>' + m.role + '\n\n' + (m.content | trim) + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|user|>assistant\n\n' }}{%- endif %}"
)
