"""A Template in the languages of other programs: Jinja (Transformers, vLLM, SGLang, llama.cpp) and
Go (Ollama).

They render what `cllm.data.template.render` renders, for conversations without tools: how those are
announced and called stands in template.json only, and the Jinja text refuses them rather than write
what was never trained.
"""

from __future__ import annotations

from cllm.data.template import Template
from cllm.messages import UserError, to_json

_NO_TOOLS = "{{ raise_exception('this chat template was trained without tools') }}"


def _put(*parts: str) -> str:
    """Parts are Jinja expressions; "" and empty literals are left out."""
    kept = [part for part in parts if part not in ("", '""')]
    return "{{ " + " ~ ".join(kept) + " }}" if kept else ""


def jinja(template: Template) -> str:
    """The chat_template: variables messages, add_generation_prompt and tools, as Transformers gives
    them.
    """
    t = template
    if t.jinja:
        return t.jinja
    before, numbered, behind = t.user[0].partition("{round}")
    turn = "ns.turn" if numbered else ""
    system = ""
    if t.system is not None:
        given = "system is not none" if t.empty_system else "system"
        opening = " ~ ".join(
            (to_json(t.system[0]), "(system | trim)" if t.trim else "system", to_json(t.system[1]))
        )
        system = "{% if " + given + " %}{% set ns.opening = " + opening + " %}{% endif %}"
    later = ""
    if t.system and not t.merge_system:
        later = _put(to_json(t.system[0]), "content", to_json(t.system[1]))
        later = "{% elif m.role == 'system' %}" + later
    return "".join(
        [
            f"{{% if tools %}}{_NO_TOOLS}{{% endif %}}",
            "{% set system, rest = "
            + ("none" if t.default_system is None else to_json(t.default_system))
            + ", messages %}",
            "{% if messages and messages[0].role == 'system' %}"
            "{% set system, rest = messages[0].content, messages[1:] %}{% endif %}",
            "{% set ns = namespace(opening='', turn=0, query=-1) %}",
            system,
            _put(to_json(t.prefix)),
            "" if t.merge_system else "{{ ns.opening }}{% set ns.opening = '' %}",
            "{% for m in rest %}{% if m.role == 'user' %}"
            "{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
            if t.blocks
            else "",
            "{% for m in rest %}{% set content = m.content" + (" | trim" if t.trim else "") + " %}",
            "{% if m.role == 'assistant' %}",
            f"{{% if m.tool_calls %}}{_NO_TOOLS}{{% endif %}}",
            "{% if m.reasoning_content %}{% set content = '<think>\\n' ~ m.reasoning_content "
            "~ '\\n</think>\\n\\n' ~ content %}{% endif %}"
            if t.thinking in ("keep", "text")
            else "",
            _answer(t),
            later,
            f"{{% elif m.role == 'tool' %}}{_NO_TOOLS}",
            "{% else %}{% set ns.turn = ns.turn + (m.role == 'user') | int %}",
            _put(
                to_json(before), turn, to_json(behind), "ns.opening", "content", to_json(t.user[1])
            ),
            "{% set ns.opening = '' %}{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}" + _put(to_json(t.opening)) + "{% endif %}",
        ]
    )


def _answer(t: Template) -> str:
    parts = [to_json(t.assistant)]
    before = ""
    if t.blocks:
        strip = "strip()" if t.trim else r"strip('\n')"
        kept = (
            "content.split('</think>')[0].lstrip()[7:]." + strip if t.thinking == "keep" else "''"
        )
        before = (
            "{% set thought = '' %}"
            "{% if content.lstrip().startswith('<think>') and '</think>' in content %}"
            "{% set thought, content = "
            + kept
            + r", (content.split('</think>')[1:] | join('</think>')).lstrip('\n') %}{% endif %}"
        )
        shown = "true" if t.think_opened else "(loop.last or thought)"
        parts.append(
            "('<think>\\n' ~ thought ~ '\\n</think>\\n\\n' "
            f"if loop.index0 > ns.query and {shown} else '')"
        )
    closing = (
        f"({to_json(t.end)} if loop.last else {to_json(t.after)})"
        if t.final_end
        else to_json(t.end + t.after)
    )
    return before + _put(*parts, to_json(t.lead), "content", closing)


def go(template: Template) -> str:
    """Ollama's TEMPLATE, over .Messages and .System. Raises UserError for numbered rounds and
    chat_templates.
    """
    t = template
    if t.jinja or "{round}" in t.user[0]:
        raise UserError("export.ollama", template=t.name)

    def put(text: str) -> str:
        return "{{ " + to_json(text) + " }}" if text else ""

    later = merged = ""
    if t.system is not None:
        opening, closing = map(put, t.system)
        later = '{{ else if eq $m.Role "system" }}' + opening + "{{ $m.Content }}" + closing
        merged = (
            "{{ if and $.System (not $seen) }}" + opening + "{{ $.System }}" + closing + "{{ end }}"
        )
    return "".join(
        [
            put(t.prefix),
            "{{ $seen := false }}{{ range $i, $m := .Messages }}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{ if eq $m.Role "user" }}',
            put(t.user[0]),
            merged if t.merge_system else "",
            "{{ $seen = true }}{{ $m.Content }}",
            put(t.user[1]),
            '{{ else if eq $m.Role "assistant" }}',
            put(t.assistant + t.lead),
            "{{ $m.Content }}{{ if not $last }}",
            put(t.after if t.final_end else t.end + t.after),
            "{{ end }}",
            "" if t.merge_system else later,
            "{{ end }}",
            '{{ if and $last (ne $m.Role "assistant") }}',
            put(t.opening),
            "{{ end }}{{ end }}",
        ]
    )
