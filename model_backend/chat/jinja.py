"""The chat format as a Jinja template, for servers that render messages themselves.

The same rules as ``template.py``, with what a template cannot do: the TypeScript text of the tools
comes from the caller (``tools_ts_str``), each picture stands as one ``<|media_pad|>``, and text is
not kept apart from special tokens. Arguments of the caller: ``thinking`` (default true) and
``preserve_thinking`` (default false, as K2.5 has it).
"""

CHAT_TEMPLATE = """\
{%- macro content_of(message) -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- elif message.content -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\\n' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set is_thinking = thinking is not defined or thinking -%}
{%- set keeps_all = preserve_thinking is defined and preserve_thinking -%}
{%- set last = namespace(answer=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and not message.get('tool_calls') -%}
{%- set last.answer = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_system|>tool_declare<|im_middle|>' -}}
{%- if tools_ts_str is defined and tools_ts_str -%}
{{- tools_ts_str -}}
{%- else -%}
{{- tools | tojson(separators=(',', ':')) -}}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|im_user|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_assistant|>' -}}
{%- else -%}
{{- '<|im_system|>' -}}
{%- endif -%}
{{- (message.get('name') or message.role) + '<|im_middle|>' -}}
{%- if message.role == 'assistant' -%}
{%- set is_kept = is_thinking and (keeps_all or loop.index0 > last.answer) -%}
{{- '<think>' + ((message.get('reasoning_content') or '') if is_kept else '') + '</think>' -}}
{{- content_of(message) -}}
{%- if message.get('tool_calls') -%}
{{- '<|tool_calls_section_begin|>' -}}
{%- for call in message.tool_calls -%}
{%- set arguments = call.function.arguments -%}
{{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' -}}
{{- arguments if arguments is string else arguments | tojson -}}
{{- '<|tool_call_end|>' -}}
{%- endfor -%}
{{- '<|tool_calls_section_end|>' -}}
{%- endif -%}
{%- elif message.role == 'tool' -%}
{{- '## Return of ' + (message.get('tool_call_id') or '') + '\\n' + content_of(message) -}}
{%- else -%}
{{- content_of(message) -}}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_assistant|>assistant<|im_middle|><think>' + ('' if is_thinking else '</think>') -}}
{%- endif -%}
"""
