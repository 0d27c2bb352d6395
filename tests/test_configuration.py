import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig, CLIPVisionConfig

from phi3v import Phi3VConfig, Phi3VForCausalLM

GOLDEN = Path(__file__).parent / "parity" / "data"
# The only keys of the official file that are not written back as they are: which kernel to use is not a property of a model,
# the remote code is named where it is, and transformers itself drops the rest.
NOT_WRITTEN = {"_attn_implementation", "_name_or_path", "auto_map", "transformers_version"}


@pytest.fixture
def official(tmp_path) -> Path:
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    return tmp_path


def test_official_config_is_read_as_it_is(official):
    config = AutoConfig.from_pretrained(official)
    assert type(config) is Phi3VConfig
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (3072, 32, 32064)
    assert (config.image_token_id, config.pad_token_id, config.stop_token_ids) == (32044, 32000, [32007, 32000])
    assert config.dtype == torch.bfloat16
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("longrope", 10000.0, 32)
    assert (len(rope["short_factor"]), len(rope["long_factor"])) == (48, 48)
    assert config.crop_tokens_per_side == 12


def test_attention_kernel_of_the_official_file_is_not_forced(official):
    assert json.loads((official / "config.json").read_text())["_attn_implementation"] == "flash_attention_2"
    with torch.device("meta"):
        assert Phi3VForCausalLM(AutoConfig.from_pretrained(official)).config._attn_implementation == "sdpa"
        eager = Phi3VForCausalLM._from_config(AutoConfig.from_pretrained(official), attn_implementation="eager")
    assert eager.config._attn_implementation == eager.config.vision_config._attn_implementation == "eager"


def test_saved_config_has_the_official_keys_and_values(official, tmp_path):
    AutoConfig.from_pretrained(official).save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    expected = json.loads((official / "config.json").read_text())
    for key in expected.keys() - NOT_WRITTEN:
        assert written.get(key) == expected[key], key
    # The official code refuses a rope_scaling with any further key, and reads rope_theta from its old place.
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert written["rope_scaling"]["type"] == "su"
    assert not {"rope_parameters", "_attn_implementation"} & written.keys()
    # The same classes, where they are: on the hub, not in the folder.
    repository = "microsoft/Phi-3.5-vision-instruct--"
    assert written["auto_map"] == {key: repository + name for key, name in expected["auto_map"].items()}


def test_a_config_made_here_has_the_official_fields_that_others_read(official, tmp_path):
    expected = json.loads((official / "config.json").read_text())
    tiny.config().save_pretrained(tmp_path / "made")
    written = json.loads((tmp_path / "made" / "config.json").read_text())
    for key in ("embd_layer", "img_processor"):
        assert written[key] == expected[key]


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}, {"rope_theta": 5000.0}])
def test_config_survives_a_round_trip_twice(changes, tmp_path):
    first = tiny.config(**changes)
    first.save_pretrained(tmp_path / "a")
    second = AutoConfig.from_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert first.rope_parameters == second.rope_parameters
    assert first.vision_config.to_dict() == second.vision_config.to_dict()
    assert (second.image_token_id, second.stop_token_ids) == (first.image_token_id, first.stop_token_ids)


def test_vision_tower_is_clip_vit_l_14_336_by_default():
    vision = Phi3VConfig().vision_config
    assert type(vision) is CLIPVisionConfig
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 336, 14)
    assert vision.hidden_act == "quick_gelu"


def test_partial_vision_config_changes_only_what_it_names():
    vision = Phi3VConfig(vision_config={"num_hidden_layers": 3}).vision_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.image_size) == (3, 1024, 336)
    assert Phi3VConfig().vision_config.num_hidden_layers == 24, "the defaults themselves must not change"


def test_whole_vision_config_is_taken_as_it_is():
    vision = CLIPVisionConfig(image_size=56, patch_size=7)
    config = Phi3VConfig(vision_config=vision)
    assert config.vision_config is vision
    assert config.crop_tokens_per_side == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [("hd_transform_order", "glb_sub"), ("use_hd_transform", False), ("with_learnable_separator", False)],
)
def test_other_image_layouts_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"embd_layer\.{key} is {value!r}, and only .* is supported"):
        Phi3VConfig(embd_layer={key: value})


@pytest.mark.parametrize(("size", "patch"), [(340, 14), (42, 14)])
def test_crop_that_is_not_an_even_number_of_patches_is_refused(size, patch):
    with pytest.raises(ValueError, match=f"image_size is {size}, expected a multiple of {2 * patch}"):
        Phi3VConfig(vision_config={"image_size": size, "patch_size": patch})


def test_full_size_model_has_exactly_the_official_names_and_shapes(official):
    with torch.device("meta"):
        model = Phi3VForCausalLM(AutoConfig.from_pretrained(official))
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == json.loads((GOLDEN / "keys_full.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_146_621_440
