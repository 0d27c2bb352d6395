"""--push_to_hub against a hub on the loopback: what goes there, what never does, loading it from there, and what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pushed
import pytest
import recipe
import tiny
import torch
from hub import Fault, Hub, use
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from finetuning.data import download
from finetuning.errors import InputError, RunError
from finetuning.training.loading import open_model, read_processor
from finetuning.training.saved import find_saved
from finetuning.training.upload import without_paths

own_process = pytest.fixture(autouse=True)(recipe.own_process)
pytestmark = pytest.mark.timeout(240)
TOKEN = "hf_secretsecretsecret"
PUSH = ["--push_to_hub", "--hub_model_id", pushed.PUSHED]
PROCESSOR = {
    *("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    "tokenizer_config.json",
}
ALWAYS = {"README.md", "curves.png", "run.json", *PROCESSOR}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("upload") / "base")


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    with Hub() as found:
        found.token = TOKEN
        pushed.fill(found, model)
        use(found.endpoint, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The hub of the tests speaks LFS; Xet's client would look for another server.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(download, "RETRY_AFTER", ())
        yield found
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


@pytest.fixture
def pages(tmp_path) -> Path:
    return recipe.docvqa_rows(tmp_path / "secret" / "pages", 6, 4)


def files(hub: Hub) -> dict[str, bytes]:
    return hub.repositories[pushed.PUSHED].files


def private(hub: Hub, *parts: str) -> list[str]:
    """Files of the repository that hold a text that is nobody's business."""
    return [name for name, data in files(hub).items() for part in parts if part.encode() in data]


def logits(model, processor) -> torch.Tensor:
    inputs = processor("<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n", [tiny.picture(90, 50)])
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_a_whole_model_is_pushed_and_loaded_from_there(hub, tmp_path, monkeypatch):
    output = pushed.run(monkeypatch, pushed.BASE, tmp_path / "out", *PUSH, *pushed.STRATEGIES["full"])
    assert files(hub).keys() == ALWAYS | WHOLE | {"report.html"}
    assert not private(hub, str(tmp_path), TOKEN, str(Path.home()) + "/")
    weights = load_file(output / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(pushed.PUSHED)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    found = find_saved(pushed.PUSHED)
    ours = open_model(found, torch.float32, False, torch.device("cpu"))
    expected = logits(ours, read_processor(found))
    assert torch.allclose(logits(model, AutoProcessor.from_pretrained(pushed.PUSHED)), expected, atol=1e-5)
    card = huggingface_hub.ModelCard.load(pushed.PUSHED)
    assert card.data.base_model == pushed.BASE
    assert card.data.datasets == ["nielsr/docvqa_1200_examples"]
    assert f'from_pretrained("{pushed.PUSHED}"' in card.text
    # The token stands in no file, of the hub or of this machine.
    assert not [path for path in output.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_an_adapter_is_pushed_and_loaded_from_there(strategy, hub, tmp_path, monkeypatch):
    if strategy == "qlora":
        pytest.importorskip("bitsandbytes")
    output = pushed.run(monkeypatch, pushed.BASE, tmp_path / "out", *PUSH, *pushed.STRATEGIES[strategy])
    assert files(hub).keys() == ALWAYS | ADAPTER | {"report.html"}
    assert not private(hub, str(tmp_path), TOKEN)
    there, here = find_saved(pushed.PUSHED), find_saved(str(output))
    assert there.base == pushed.BASE
    assert there.num_crops == 1
    assert there.in_4_bits == (strategy == "qlora")
    assert there.adapter != here.adapter
    cpu = torch.device("cpu")
    expected = logits(open_model(here, torch.float32, False, cpu), read_processor(here))
    assert torch.equal(logits(open_model(there, torch.float32, False, cpu), read_processor(there)), expected)


def test_own_rows_go_to_a_private_repository_only(hub, model, pages, tmp_path, monkeypatch, capsys):
    flags = [*PUSH, *pushed.STRATEGIES["lora"], "--data_dir", str(pages)]
    pushed.run(monkeypatch, model, tmp_path / "out", *flags)
    assert files(hub).keys() == ALWAYS | ADAPTER
    # No path, no row: ids, questions, answers.
    assert not private(hub, str(tmp_path), "secret", "page-6", "Which page is it?", "What is the number")
    printed = capsys.readouterr().out
    assert "report.html stays here, since it shows rows of --data_dir and the repository is public" in printed
    assert "the adapter's base is a folder of this machine; there it is called base, and must be given" in printed
    assert json.loads(files(hub)["adapter_config.json"])["base_model_name_or_path"] == "base"
    hub.repositories.pop(pushed.PUSHED)
    # The finished run, started again, only uploads; now with the report, whose paths are left out.
    pushed.run(monkeypatch, model, tmp_path / "out", *flags, "--hub_private_repo")
    assert hub.repositories[pushed.PUSHED].private
    assert files(hub).keys() == ALWAYS | ADAPTER | {"report.html"}
    assert b"page-6" in files(hub)["report.html"]
    assert not private(hub, str(tmp_path), "secret")


def test_checkpoints_are_pushed_as_hub_strategy_says(hub, tmp_path, monkeypatch):
    flags = [*PUSH, *pushed.STRATEGIES["lora"], "--save_steps", "1", "--hub_always_push"]
    pushed.run(monkeypatch, pushed.BASE, tmp_path / "every", *flags)
    assert hub.commits == ["Weights of checkpoint-1", "Weights of checkpoint-2", "Fine-tuned model, card and report"]
    assert not [name for name in files(hub) if "/" in name or name == "training_args.bin"]
    hub.commits.clear()
    pushed.run(monkeypatch, pushed.BASE, tmp_path / "end", *flags, "--hub_strategy", "end")
    assert hub.commits == ["Fine-tuned model, card and report"]
    with pytest.raises(InputError, match="--hub_strategy checkpoint: expected a private repository"):
        pushed.run(monkeypatch, pushed.BASE, tmp_path / "open", *flags, "--hub_strategy", "checkpoint")
    hub.repositories.pop(pushed.PUSHED)
    private = [*flags, "--hub_private_repo", "--hub_strategy", "checkpoint"]
    output = pushed.run(monkeypatch, pushed.BASE, tmp_path / "checkpoint", *private)
    found = {name.removeprefix("last-checkpoint/") for name in files(hub) if name.startswith("last-checkpoint/")}
    assert found == {path.name for path in (output / "checkpoint-2").iterdir()}


def test_the_name_of_the_folder_is_the_repositorys(hub, tmp_path, monkeypatch):
    pushed.run(
        monkeypatch, pushed.BASE, tmp_path / "mine", "--push_to_hub", "--hub_token", TOKEN, *pushed.STRATEGIES["lora"]
    )
    assert "README.md" in hub.repositories["me/mine"].files


def test_two_processes_push_once(hub, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    flags = [
        "--model_name_or_path",
        pushed.BASE,
        "--output_dir",
        str(tmp_path / "out"),
        "--dataloader_num_workers",
        "0",
    ]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "ranks"), "HF_HUB_DISABLE_XET": "1"}
    launched = {name: value for name, value in os.environ.items() if name not in recipe.LAUNCHER}
    found = subprocess.run(
        [*command, pushed.script.__file__, *flags, *pushed.SMALL, *PUSH, *pushed.STRATEGIES["lora"]],
        capture_output=True,
        text=True,
        env={**launched, **environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert found.returncode == 0, found.stderr
    assert hub.commits == ["Weights of checkpoint-2", "Fine-tuned model, card and report"]
    assert files(hub).keys() == ALWAYS | ADAPTER | {"report.html"}
    assert TOKEN not in found.stdout + found.stderr


# ---- what goes wrong


def refused(monkeypatch, tmp_path, *flags: str) -> str:
    """The one line of a run that ends before it has loaded a model or a row."""
    monkeypatch.setattr("finetuning.training.loading.find_saved", lambda *_, **__: pytest.fail("it went on"))
    with pytest.raises(InputError) as caught:
        pushed.run(monkeypatch, pushed.BASE, tmp_path / "out", *PUSH, *flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_login_it_ends_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "expected a login, found no token; run `hf auth login` or set HF_TOKEN" in refused(monkeypatch, tmp_path)
    assert not hub.requests


@pytest.mark.usefixtures("hub")
def test_a_token_that_may_not_write_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    line = refused(monkeypatch, tmp_path)
    assert "expected a token that may write to me/pushed" in line
    assert "401" in line
    assert "hf_other" not in line


def test_without_a_connection_it_ends_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "expected a connection, found HF_HUB_OFFLINE set" in refused(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.fault = Fault("500", on="/api/repos/create")
    assert "500 the hub has a fault" in refused(monkeypatch, tmp_path)
    use("http://127.0.0.1:9", tmp_path / "home", monkeypatch)
    assert "connection refused" in refused(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hub_model_id", "a/b/c"], "--hub_model_id a/b/c: expected OWNER/NAME"),
        (["--hub_model_id", "a b"], "--hub_model_id a b: expected OWNER/NAME"),
        (["--do_train", "False"], "--push_to_hub with --do_train False: expected one of them"),
        (["--hub_revision", "other"], "a branch that is there, found: 404"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_bad_flag_gets_one_line(flags, says, tmp_path, monkeypatch):
    assert says in refused(monkeypatch, tmp_path, *flags)


def test_an_upload_that_fails_loses_nothing(hub, tmp_path, monkeypatch, capsys):
    flags = [*PUSH, *pushed.STRATEGIES["lora"], "--hub_strategy", "end"]
    hub.fault = Fault("403", on="/commit/")
    with pytest.raises(RunError, match="the upload to me/pushed failed: .* the same command started again uploads it"):
        pushed.run(monkeypatch, pushed.BASE, tmp_path / "out", *flags)
    assert not files(hub)
    hub.fault = None
    capsys.readouterr()
    pushed.run(monkeypatch, pushed.BASE, tmp_path / "out", *flags)
    assert "this run is finished, nothing is trained or asked" in capsys.readouterr().out
    assert files(hub).keys() == ALWAYS | ADAPTER | {"report.html"}


def test_a_checkpoint_that_is_not_uploaded_is_a_line(hub, tmp_path, monkeypatch, capsys):
    hub.fault = Fault("403", on="/preupload/", times=1)
    pushed.run(monkeypatch, pushed.BASE, tmp_path / "out", *PUSH, *pushed.STRATEGIES["lora"])
    assert "warning: checkpoint-2 was not uploaded: " in capsys.readouterr().out
    assert "report.html" in files(hub)


def test_paths_become_names_but_not_in_pictures(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    args = type(
        "Args", (), {"output_dir": "out", "data_paths": [str(tmp_path / "data")], "model_name_or_path": "me/tiny"}
    )()
    text = f'--data_dir {tmp_path}/data --x "{tmp_path}/y" {os.path.expanduser("~")}/z base64,ab{tmp_path}/dataqq'
    assert without_paths(text, args) == f'--data_dir data --x "./y" ~/z base64,ab{tmp_path}/dataqq'
