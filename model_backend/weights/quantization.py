"""``quantization_config`` of ``config.json``: which weights are INT4, in words. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.weights.layout import GROUP


def quantization_config() -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``: INT4 for the routed experts alone.

    Of the released checkpoint's, with the vision tower and the projector excluded by name; there
    they are in bf16 without being named.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": GROUP,
                    "observer": "minmax",
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": [
            "lm_head",
            "re:.*lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
            r"re:.*mlp\.gate$",
            "re:.*vision_tower.*",
            "re:.*mm_projector.*",
        ],
    }


def is_int4(config_json: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` describes INT4 experts; ``False`` where nothing is quantised.

    Raises:
        ConfigError: it describes another quantisation than the released checkpoint's.
    """
    found = found_quantization(config_json)
    if found is None:
        return False
    groups = found.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if groups else []
    wanted = {"num_bits": 4, "type": "int", "group_size": GROUP, "symmetric": True}
    if found.get("format") != "pack-quantized" or not all(
        {key: one.get(key) for key in wanted} == wanted for one in weights or [{}]
    ):
        raise ConfigError(
            "config.json describes a quantisation that is not read here "
            f"({found.get('quant_method')}, {found.get('format')}); only pack-quantized INT4 in "
            f"groups of {GROUP}, as Kimi K2.5 has it, or no quantisation"
        )
    return True


def with_quantization(config_json: Mapping[str, Any], *, int4: bool) -> dict[str, Any]:
    """Return ``config.json`` with or without INT4 experts; all else stays.

    The entry stands under ``text_config``, where the released checkpoint and ``transformers`` have
    it, and at the top, where SGLang looks for the method.
    """
    text = dict(config_json["text_config"])
    content = dict(config_json)
    for section in (content, text):
        section.pop("quantization_config", None)
        section.pop("compression_config", None)
        if int4:
            section["quantization_config"] = quantization_config()
    content["text_config"] = text
    return content


def found_quantization(config_json: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of a ``config.json`` that describes a quantisation, if there is one."""
    for section in (config_json, config_json.get("text_config")):
        if isinstance(section, Mapping):
            found = section.get("quantization_config") or section.get("compression_config")
            if isinstance(found, Mapping):
                return found
    return None
