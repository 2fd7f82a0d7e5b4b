"""Generated dialogues, rendered by us and by the ``renderers`` package.

The package knows K2.5's format independently of us. It is run over a tokenizer whose ordinary
tokens are single characters, so its result is text with special tokens between; each stretch of
text is then encoded with our tokenizer and compared, id by id, with what ``ChatFormat`` gives.

The package encodes content as trusted text; so that look-alikes of special tokens in a dialogue
stay text there too, every ``<`` of the content is a private character while it works.
"""

import json
import random
from pathlib import Path

from renderers.configs import KimiK25RendererConfig
from renderers.kimi_k25 import KimiK25Renderer

from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import SPECIAL_NAMES
from swarm_sdk.model_backend.chat.train_tokenizer import train
from swarm_sdk.types import Image, Message, ToolCall, ToolSpec

GUARD = "\ue000"
FIRST_SPECIAL = 0x110000

WORDS = [
    "capital", "of", "France", "Zoë's", "北京市", "日本語", "don't", "3.14", "12345", "x", "ж",
    "\n", "  ", "\t", "<", "{}", '"', "\\", "//", "٣٤", "é", "नमस्ते", "😀",
    *SPECIAL_NAMES.values(),
    "<|tool_call_section_begin|>", "## Return of functions.f:0\n", "functions.f:0",
]  # fmt: skip


def small_tokenizer(num_base_tokens=700):
    """A tokenizer trained on our own source and some words, in well under a second."""
    source = Path(__file__).read_text(encoding="utf-8")
    return train([source, *[" ".join(WORDS)] * 3], num_base_tokens)


class CharTokenizer:
    """One token per character; specials behind the code points."""

    unk_token_id = None
    name_or_path = ""

    def __init__(self):
        self.ids = {name: FIRST_SPECIAL + slot for slot, name in SPECIAL_NAMES.items()}
        self.names = {token_id: name for name, token_id in self.ids.items()}

    def convert_tokens_to_ids(self, token):
        return self.ids.get(token)

    def encode(self, text, add_special_tokens=False):
        ids = []
        while text:
            name = next((n for n in self.ids if text.startswith(n)), None)
            ids.append(self.ids[name] if name else ord(text[0]))
            text = text[len(name) if name else 1 :]
        return ids

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.names.get(i) or chr(i) for i in ids)


# ---- generated dialogues ---------------------------------------------------------------------


def random_text(rng, most=12):
    return "".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randint(0, most)))


def random_schema(rng, depth, definitions):
    described = {"description": random_text(rng, 6)} if rng.random() < 0.5 else {}
    kinds = ["string", "integer", "number", "boolean", "enum", "union"]
    kinds += ["array", "object", "anyOf"] if depth else []
    kinds += ["$ref"] if definitions else []
    match rng.choice(kinds):
        case "string":
            limits = {"minLength": 1, "pattern": "^a.*$"} if rng.random() < 0.3 else {}
            default = {"default": random_text(rng, 3)} if rng.random() < 0.3 else {}
            return {"type": "string", **limits, **default, **described}
        case "integer" | "number" as kind:
            limits = {"minimum": rng.randint(0, 3), "maximum": 20} if rng.random() < 0.5 else {}
            default = {"default": rng.randint(0, 9)} if rng.random() < 0.5 else {}
            return {"type": kind, **limits, **default, **described}
        case "boolean":
            return {"type": "boolean", **described}
        case "enum":
            return {"enum": rng.sample(["a", "b c", 1, None, True, "é"], 3), **described}
        case "union":
            return {"type": ["string", rng.choice(["null", "array", "object"])], **described}
        case "array":
            item = random_schema(rng, depth - 1, definitions)
            return {"type": "array", "items": item, "minItems": 1, **described}
        case "object":
            return {**random_object(rng, depth - 1, definitions), **described}
        case "anyOf":
            options = [random_schema(rng, depth - 1, definitions) for _ in range(2)]
            return {"anyOf": options, **described}
        case "$ref":
            return {"$ref": rng.choice([f"#/$defs/{name}" for name in definitions]), **described}


def random_object(rng, depth, definitions):
    names = rng.sample(
        ["query", "limit", "agent", "prompt", "x1", "Zeta", "items_"], rng.randint(0, 4)
    )
    schema = {
        "type": "object",
        "properties": {name: random_schema(rng, depth, definitions) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
    }
    if rng.random() < 0.3:
        schema["additionalProperties"] = rng.choice([True, False, {"type": "string"}])
    return schema


def random_tool(rng, name):
    definitions = {
        key: {**random_object(rng, 0, ()), "description": random_text(rng, 3)}
        for key in rng.sample(["City", "Area", "Range"], rng.choice([0, 0, 1, 2]))
    }
    parameters = random_object(rng, 2, tuple(definitions))
    if definitions:
        parameters["$defs"] = definitions
    elif rng.random() < 0.2:
        parameters["properties"]["child"] = {"$ref": "#"}
    return ToolSpec(name, random_text(rng), parameters)


def random_dialogue(rng):
    """Messages of all roles with their tools; ends anywhere, also inside a tool loop."""
    tools = [
        random_tool(rng, name)
        for name in rng.sample(["f", "search", "create_subagent"], rng.randint(0, 3))
    ]
    messages = [Message("system", random_text(rng))] if rng.random() < 0.6 else []
    num_calls = 0
    for _ in range(rng.randint(1, 3)):
        images = tuple(Image(b"x", name="a.png") for _ in range(rng.choice([0, 0, 1, 2])))
        messages.append(Message("user", random_text(rng), images=images))
        for _ in range(rng.randint(0, 3) if tools else 0):
            calls = []
            for _ in range(rng.randint(1, 3)):
                name = rng.choice(tools).name
                arguments = {
                    key: rng.choice([random_text(rng), 5, None, [1.5, {"k": True}]])
                    for key in rng.sample(["query", "limit", "Zeta", "a"], rng.randint(0, 3))
                }
                raw = json.dumps(arguments, indent=1) if rng.random() < 0.3 else ""
                calls.append(ToolCall(f"functions.{name}:{num_calls}", name, arguments, raw))
                num_calls += 1
            messages.append(
                Message(
                    "assistant",
                    random_text(rng, 3),
                    reasoning=random_text(rng),
                    tool_calls=tuple(calls),
                )
            )
            messages += [
                Message("tool", random_text(rng), images[: rng.randint(0, 2)], tool_call_id=call.id)
                for call in calls
            ]
        if rng.random() < 0.7:
            messages.append(Message("assistant", random_text(rng), reasoning=random_text(rng)))
    return messages, tools


# ---- the reference ---------------------------------------------------------------------------


def guarded(value):
    if isinstance(value, str):
        return value.replace("<", GUARD).replace("[", "\ue001")
    if isinstance(value, dict):
        return {key: guarded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [guarded(item) for item in value]
    return value


def sorted_by_key(value):
    """As the stock tokenizer sorts tools before it declares them."""
    if isinstance(value, dict):
        return {key: sorted_by_key(value[key]) for key in sorted(value)}
    return [sorted_by_key(item) for item in value] if isinstance(value, list) else value


def unguarded(text):
    return text.replace(GUARD, "<").replace("\ue001", "[")


def to_chat_message(message, *, thinking=True):
    """The message as chat-completions servers take it."""
    text = {"type": "text", "text": message.content}
    image = {"type": "image", "image": "unread"}
    content = [*[image] * len(message.images), text] if message.images else message.content
    chat = {"role": message.role, "content": content}
    if message.role == "assistant":
        chat["reasoning_content"] = message.reasoning if thinking else ""
    if message.tool_calls:
        chat["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.raw_arguments or dict(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        chat["tool_call_id"] = message.tool_call_id
    return chat


def to_chat_tool(tool):
    return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def reference_ids(tokenizer, messages, tools, *, thinking=True, add_generation_prompt=True):
    """The dialogue as the ``renderers`` package renders it, as ids of ``tokenizer``."""
    renderer = KimiK25Renderer(CharTokenizer(), KimiK25RendererConfig(thinking=thinking))
    rendered = renderer.render(
        [guarded(to_chat_message(message, thinking=thinking)) for message in messages],
        tools=[sorted_by_key(guarded(to_chat_tool(tool))) for tool in tools],
        add_generation_prompt=add_generation_prompt,
        process_multimodal=False,
    )
    names = {name: token_id for token_id, name in tokenizer.special_names.items()}
    ids, text = [], ""
    for token_id in [*rendered.token_ids, None]:
        if token_id is not None and token_id < FIRST_SPECIAL:
            text += chr(token_id)
            continue
        ids += tokenizer.encode(unguarded(text))
        text = ""
        if token_id is not None:
            ids.append(names[SPECIAL_NAMES[token_id - FIRST_SPECIAL]])
    return ids


def parsed_by_reference(tokenizer, ids):
    """What the ``renderers`` package reads in a sampled turn: content, reasoning and calls."""
    chars, char_ids, run = CharTokenizer(), [], []
    for token_id in [*ids, None]:
        name = tokenizer.special_names.get(token_id)
        if token_id is not None and name is None:
            run.append(token_id)
            continue
        char_ids += [ord(character) for character in tokenizer.decode(run).replace("<", GUARD)]
        char_ids += [chars.ids[name]] if name else []
        run = []
    prompt = chars.encode("<|im_assistant|>assistant<|im_middle|><think>")
    parsed = KimiK25Renderer(chars).parse_response(char_ids, prompt_ids=prompt)
    calls = [
        (call.name, json.loads(unguarded(json.dumps(call.arguments, ensure_ascii=False))))
        for call in parsed.tool_calls
    ]
    return unguarded(parsed.content), unguarded(parsed.reasoning_content or ""), calls


def chat_format(tokenizer, *, thinking=True):
    """Ours with one media token a picture, as a template writes it."""
    return ChatFormat(tokenizer, thinking=thinking, has_vision=True, num_image_tokens=lambda _: 1)


def find_difference(num=200, seed=0, tokenizer=None):
    """The first generated dialogue on which the two renderings differ, or ``None``."""
    tokenizer = tokenizer or small_tokenizer()
    for number in range(num):
        rng = random.Random(f"{seed}/{number}")
        messages, tools = random_dialogue(rng)
        thinking = rng.random() < 0.75
        chat = chat_format(tokenizer, thinking=thinking)
        ours = chat.render_dialogue(
            messages, tools, preserve_thinking=False, add_generation_prompt=True
        )
        theirs = reference_ids(tokenizer, messages, tools, thinking=thinking)
        if ours != theirs:
            return number, tokenizer.decode(ours), tokenizer.decode(theirs)
    return None


def dialogues_equal(num=200):
    """Whether ``num`` generated dialogues give the same ids here and in the reference."""
    return find_difference(num) is None
