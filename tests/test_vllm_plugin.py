"""What the plugin for vLLM does before vLLM is there; the rest is in tests/serving."""

import pytest

from phi3v.vllm_plugin import refuse_adapter


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Phi3VProcessor"}')
    return tmp_path


@pytest.mark.parametrize("before", ["", "--model=", "name="])
def test_an_adapter_is_told_to_be_merged_in_one_line(adapter, before, capsys):
    with pytest.raises(SystemExit) as ended:
        refuse_adapter(["serve", "--port", "8000", f"{before}{adapter}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {adapter}: expected a whole model, found an adapter")
    assert f"python -m finetuning.merge {adapter} TO" in said
    assert said.count("\n") == 1


def test_a_model_and_an_adapter_of_another_model_are_left_to_vllm(adapter):
    (adapter / "config.json").write_text("{}")
    refuse_adapter([str(adapter)])
    (adapter / "config.json").unlink()
    (adapter / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    refuse_adapter([str(adapter)])
    (adapter / "processor_config.json").unlink()
    refuse_adapter([str(adapter)])


def test_arguments_that_are_no_paths_are_passed_over():
    refuse_adapter(["", "--seed", "1", '{"image": 9}', "x" * 10_000, "a\0b"])
