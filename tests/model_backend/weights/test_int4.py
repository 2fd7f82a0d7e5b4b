"""INT4: the layout of compressed-tensors bit by bit, and grids that are found again."""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import k25, nano, tiny
from swarm_sdk.model_backend.model.config_json import read_json
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights import int4
from swarm_sdk.model_backend.weights.checkpoint import load, save
from swarm_sdk.model_backend.weights.headers import read_headers
from swarm_sdk.model_backend.weights.layout import stored_tensors
from swarm_sdk.model_backend.weights.quantization import is_int4

EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"


def plain(weight: int4.Int4Weight) -> torch.Tensor:
    """The reference: every number by itself, in float64, rounded to bf16 once."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            word = int(weight.packed[row, column // 8]) & 0xFFFFFFFF
            code = ((word >> (4 * (column % 8))) & 15) - 8
            out[row, column] = code * float(weight.scale[row, column // 32])
    return out.to(torch.bfloat16)


codes_strategy = st.lists(st.integers(-8, 7), min_size=64, max_size=64)
scale_strategy = st.floats(2**-100, 2**100, width=32)


def weight_of(codes: list[int], scales: list[float]) -> int4.Int4Weight:
    packed = int4.pack(torch.tensor(codes).view(1, -1))
    return int4.Int4Weight(packed, torch.tensor([scales]).to(torch.bfloat16))


@given(codes=codes_strategy)
def test_packed_codes_come_back(codes: list[int]) -> None:
    assert int4.unpack(int4.pack(torch.tensor([codes]))).tolist() == [codes]


@given(codes=codes_strategy, scales=st.lists(scale_strategy, min_size=2, max_size=2))
def test_dequantised_numbers_are_those_of_the_plain_reference(
    codes: list[int], scales: list[float]
) -> None:
    weight = weight_of(codes, scales)
    assert torch.equal(int4.dequantize(weight), plain(weight))


@settings(max_examples=150)
@given(
    codes=codes_strategy,
    largest=st.integers(0, 8),
    scales=st.lists(scale_strategy, min_size=2, max_size=2),
)
def test_what_was_int4_once_is_quantised_without_loss(
    codes: list[int], largest: int, scales: list[float]
) -> None:
    codes = [max(-largest, min(largest, code)) for code in codes]
    w = int4.dequantize(weight_of(codes, scales))
    assert torch.equal(int4.dequantize(int4.quantize(w)), w)


@given(codes=codes_strategy, scales=st.lists(scale_strategy, min_size=2, max_size=2))
def test_a_group_that_uses_its_range_gives_the_same_bits_again(
    codes: list[int], scales: list[float]
) -> None:
    codes = [-8, 7, 5, *codes[3:32], -8, 7, 5, *codes[35:]]
    weight = weight_of(codes, scales)
    again = int4.quantize(int4.dequantize(weight))
    assert torch.equal(again.packed, weight.packed)
    assert torch.equal(again.scale, weight.scale)


def test_weights_that_never_were_int4_are_off_by_at_most_half_a_scale() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = int4.quantize(w)
    error = (int4.dequantize(weight).double() - w.double()).abs().unflatten(1, (-1, 32))
    # Half a scale, or 0.5 where 7.5 scales are cut to 7; and the roundings to bf16.
    assert (error <= weight.scale.double()[..., None] * 0.54).all()


@pytest.fixture(scope="module")
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import compressed_tensors.quantization.utils.helpers as scales
        from compressed_tensors.compressors.pack_quantized import helpers
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle import forward

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    return helpers, forward, scales, args


def test_the_bits_are_those_of_the_compressed_tensors_library(library: Any) -> None:
    helpers, forward, scales, args = library
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).float()
    w[5, 32:64] = 0
    groups = w.unflatten(1, (-1, 32))
    scale, zero = scales.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale = scale.to(torch.bfloat16)
    scale[5, 1] = torch.finfo(torch.bfloat16).eps  # as the library has it for weights of bf16
    codes = forward.quantize(w, scale.float(), zero, args, dtype=torch.int8)
    ours = int4.quantize(w)
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.packed, helpers.pack_to_int32(codes, 4))
    theirs = helpers.unpack_from_int32(ours.packed, 4, torch.Size(w.shape))
    assert torch.equal(int4.unpack(ours.packed), theirs)
    assert torch.equal(int4.dequantize(ours), forward.dequantize(theirs, ours.scale, args=args))


def test_the_layout_of_the_release_has_208_550_tensors_and_554_gib() -> None:
    stored = {tensor.name: tensor for tensor in stored_tensors(k25(), int4=True)}
    assert len(stored) == 208_550
    assert round(sum(tensor.num_bytes for tensor in stored.values()) / 2**30) == 554
    down = "language_model.model.layers.60.mlp.experts.383.down_proj.weight"
    shapes = {name.rpartition("_")[2]: stored[name] for name in stored if name.startswith(down)}
    assert {part: (one.dtype, one.shape) for part, one in shapes.items()} == {
        "packed": ("I32", (7168, 256)),
        "scale": ("BF16", (7168, 64)),
        "shape": ("I32", (2,)),
    }


def rounded(model: KimiModel) -> KimiModel:
    """The model whose experts are what INT4 keeps of them, and whose other weights are bf16."""
    copy = KimiModel(model.config)
    state = {}
    for name, value in model.state_dict().items():
        if ".mlp.experts." in name:
            state[name] = torch.stack([int4.dequantize(int4.quantize(one)) for one in value])
        else:
            state[name] = value if name.endswith("correction_bias") else value.to(torch.bfloat16)
    copy.load_state_dict({name: value.float() for name, value in state.items()})
    return copy.eval()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000], ids=["one file", "several"])
def test_an_int4_checkpoint_is_read_as_its_dequantised_weights(
    tiny_model: KimiModel, tmp_path: Path, max_shard_bytes: int
) -> None:
    save(tiny_model, tmp_path, max_shard_bytes=max_shard_bytes, is_int4=True)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (max_shard_bytes == 10**9)
    assert is_int4(read_json(tmp_path))
    assert {name: info.shape for name, info in read_headers(tmp_path).items()} == {
        stored.name: stored.shape for stored in stored_tensors(tiny(), int4=True)
    }
    wanted = rounded(tiny_model).state_dict()
    for name, value in load(tmp_path).state_dict().items():
        assert torch.equal(value, wanted[name]), name
    save(load(tmp_path), tmp_path / "again", is_int4=True)
    assert_same_tensors(tmp_path, tmp_path / "again")


def assert_same_tensors(a: Path, b: Path) -> None:
    one, two = (
        {name: v for file in x.glob("*.safetensors") for name, v in load_file(file).items()}
        for x in (a, b)
    )
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_logits_from_an_int4_checkpoint(
    parity: ModuleType, tiny_model: KimiModel, tmp_path: Path
) -> None:
    """With float32 arithmetic on the same weights, and in bf16 throughout."""
    from transformers import CompressedTensorsConfig, Kimi_K25ForConditionalGeneration

    save(tiny_model, tmp_path, is_int4=True)
    reference = Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    experts = reference.model.language_model.layers[1].mlp.experts.gate_up_proj
    ours_E = load(tmp_path, dtype=torch.bfloat16).layers[1].mlp.experts.gate_up_proj
    assert torch.equal(experts, ours_E)
    case = parity.cases(seed=0)["text"]
    in_bf16 = (
        parity.our_logits(load(tmp_path, dtype=torch.bfloat16), case).float(),
        parity.reference_logits(reference, case),
    )
    in_float32 = (
        parity.our_logits(load(tmp_path), case),
        parity.reference_logits(reference.float(), case),
    )
    ours_TV = in_float32[0]
    assert float(ours_TV.std()) > 0.3
    assert float((in_float32[0] - in_float32[1]).abs().max()) <= 1e-4
    assert float((in_bf16[0] - in_bf16[1]).abs().max()) <= 0.05
    dense = parity.our_logits(tiny_model, parity.cases(seed=0)["text"])
    assert float((ours_TV - dense).abs().max()) > 0.01, "INT4 changed nothing: was it used?"


def test_widths_that_no_group_divides_are_refused_by_name() -> None:
    import dataclasses

    text = dataclasses.replace(tiny().text_config, moe_intermediate_size=48)
    config = dataclasses.replace(tiny(), text_config=text)
    with pytest.raises(ConfigError, match=r"down_proj.weight has 48 columns; INT4 needs"):
        list(stored_tensors(config, int4=True))
    assert list(stored_tensors(nano(), int4=True))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("packed", None, "has no tensor"),
        ("scale", torch.zeros(32, 3, dtype=torch.bfloat16), r"has the shape \[32, 3\]"),
        ("packed", torch.zeros(32, 8), "holds F32, not I32"),
        ("shape", torch.tensor([32, 32], dtype=torch.int32), r"says \[32, 32\]"),
        ("scale", torch.full((32, 2), torch.nan, dtype=torch.bfloat16), "is damaged"),
    ],
)
def test_a_wrong_part_is_named_with_its_file(
    tiny_model: KimiModel, tmp_path: Path, part: str, value: torch.Tensor | None, message: str
) -> None:
    save(tiny_model, tmp_path, is_int4=True)
    path = tmp_path / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(path), f"{EXPERT}_{part}": value}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path)
    assert EXPERT in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_another_quantisation_is_refused(tiny_model: KimiModel, tmp_path: Path) -> None:
    save(tiny_model, tmp_path)
    config = tmp_path / "config.json"
    fp8 = '{"quantization_config": {"quant_method": "fp8", "format": "float-quantized"},'
    config.write_text(config.read_text().replace("{", fp8, 1))
    with pytest.raises(ConfigError, match=r"not read here \(fp8, float-quantized\)"):
        load(tmp_path)
