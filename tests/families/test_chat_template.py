"""Templates of strangers: the same texts as transformers writes, no way out of the sandbox, bounded time and memory."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lora_diffusion.core.files import builtin_path
from lora_diffusion.families.language.chat_template import ChatTemplate

LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{% set x = 1 %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{{ x }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Of llava-hf/llava-1.5-7b-hf, and a name that is set within an answer."""
TEMPLATES = {
    "builtin": (builtin_path("emoji-llava") / "chat_template.jinja").read_text("utf-8"),
    "llava-1.5": LLAVA_15,
    "namespace": "{% set ns = namespace(x='') %}{% for m in messages %}"
    "{% set ns.x = ns.x ~ m.role ~ (m.content|tojson) %}{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.x }}{{ eos_token }}\n",
    "blocks": "  {% if tools %}\n x\n{% endif %}\n{{ dict(a=1).a }}{{ messages[0].content|length }}"
    "{{ strftime_now('%Y') }}",
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was <b>ist</b> das? é 猫 😀 \" ' ${x}"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat.\n"}]},
]


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(builtin_path("emoji-llava"), trust_remote_code=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ask", [True, False])
def test_writes_what_transformers_writes(processor: Any, name: str, ask: bool) -> None:
    expected = processor.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=ask, tokenize=False
    )
    found = ChatTemplate(TEMPLATES[name]).render(MESSAGES, processor.tokenizer.special_tokens_map, ask=ask)
    assert found == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{", "unexpected 'end of template'"),
        ("{{ messages[0].content + 1 }}", "list"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "cannot hold '__class__'"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**9 }}", "MemoryError"),
        ("{{ 'a'|center(10**9) }}", "MemoryError"),
        ("{{ '%999999999d' % 1 }}", "MemoryError"),
        ("{{ 'a' * 10**7 }}", "writes too much"),
        (
            "{% set ns=namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "MemoryError",
        ),
    ],
)
def test_what_is_refused(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        ChatTemplate(template).render(MESSAGES, {}, ask=True)
    assert "\n" not in str(error.value)


def test_a_template_without_end_is_stopped_and_not_tried_again() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(endless)
    started = time.process_time()
    with pytest.raises(ValueError, match="more than 3 seconds"):
        template.render(MESSAGES, {}, ask=True)
    before = time.monotonic()
    for _ in range(100):
        with pytest.raises(ValueError, match="more than 3 seconds"):
            template.render(MESSAGES, {}, ask=True)
    assert time.monotonic() - before < 1
    assert time.process_time() - started < 1
