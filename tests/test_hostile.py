"""Model folders, archives and pages made to harm: nothing is executed, nothing read or written outside, nothing waits."""

import ast
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import recipe
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import convert_ucf101
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.images import image_size, load_images
from finetuning.errors import InputError
from finetuning.training.loading import load_model, load_processor
from phi3v.processing_phi3_v import CHAT_TEMPLATE

ROOT = Path(__file__).parents[1]
SECONDS = 60
pytestmark = pytest.mark.timeout(SECONDS)
own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("base"))


class Canary:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **changes}))


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", **changes)


def vision(**changes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())["vision_config"]
        edit(folder, "config.json", vision_config={**found, **changes})

    return apply


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def huge(name: str) -> Callable[[Path], object]:
    """1 GB without taking the disk's space."""
    return lambda folder: os.truncate((folder / name).touch() or folder / name, 2**30)


def fifo(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def link(name: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def weights_outside(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")


def index(file: object) -> Callable[[Path], None]:
    """Shards, the first of which is said to be in `file`."""

    def apply(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        weight_map = {name: file for name in names} if not isinstance(file, list) else file
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Canary(folder.parent / "canary"), folder / "pytorch_model.bin")


def pickle_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(folder.parent / "canary")))


def header(length: int, content: bytes = b"{}") -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + content)


def overlapping(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    content = json.dumps({"model.norm.weight": tensor}).encode()
    header(len(content), content)(folder)


def other_dtype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, folder / "model.safetensors")


def tokenizer(**changes) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "tokenizer.json", **changes)


def more_tokens(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    extra = [{**found["added_tokens"][0], "id": 10_000 + i, "content": f"<{i}>"} for i in range(50)]
    edit(folder, "tokenizer.json", added_tokens=[*found["added_tokens"], *extra])


def image_processor(**changes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit(folder, "preprocessor_config.json", **changes)
        found = json.loads((folder / "processor_config.json").read_text())
        edit(folder, "processor_config.json", image_processor={**found.get("image_processor", {}), **changes})

    return apply


def foreign_code(model_type: str) -> Callable[[Path], None]:
    """Code beside the model, named wherever a folder can name it."""

    def apply(folder: Path) -> None:
        (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(folder.parent / 'canary')!r}).touch()\n")
        classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
        edit(folder, "config.json", model_type=model_type, auto_map=classes)
        edit(folder, "processor_config.json", auto_map={"AutoProcessor": "evil.P"})
        edit(folder, "preprocessor_config.json", auto_map={"AutoProcessor": "evil.P", "AutoImageProcessor": "evil.I"})
        edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
        edit(folder, "generation_config.json", custom_generate=str(folder))
        (folder / "custom_generate").mkdir()
        shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")

    return apply


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5)


REGEX = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
LONG = {"type": "Prepend", "prepend": "a" * 200_000}
REFUSED: dict[str, Callable[[Path], object]] = {
    "code of an unknown model": foreign_code("evil"),
    "10**7 layers": config(num_hidden_layers=10**7),
    "10**9 wide": config(hidden_size=10**9, num_attention_heads=1, num_key_value_heads=1),
    "10**9 tokens": config(vocab_size=10**9),
    "heads that do not divide": config(num_attention_heads=3),
    "no head": config(num_attention_heads=0),
    "groups that do not divide": config(num_attention_heads=4, num_key_value_heads=3),
    "-1 layers": config(num_hidden_layers=-1),
    "a text as a size": config(hidden_size="64"),
    "true as a size": config(num_hidden_layers=True),
    "a fraction as a size": config(hidden_size=64.5),
    "more layers than the weights": config(num_hidden_layers=3),
    "fewer layers than the weights": config(num_hidden_layers=1),
    "wider than the weights": config(hidden_size=128),
    "another vocabulary than the weights": config(vocab_size=5000),
    "10**9 labels": config(num_labels=10**9),
    "head_dim of 10**9": config(head_dim=10**9),
    "a position limit of 10**18": config(max_position_embeddings=10**18),
    "a padding token outside": config(pad_token_id=10**6),
    "an image token below 0": config(image_token_id=-1),
    "rope factors of another length": config(rope_scaling={"type": "su", "short_factor": [1] * 9, "long_factor": [1] * 9}),
    "rope factors as texts": config(rope_scaling={"type": "su", "short_factor": ["1"] * 16, "long_factor": ["1"] * 16}),
    "rope as a list": config(rope_scaling=[1]),
    "an activation of another module": config(hidden_act="os.system"),
    "quantised weights": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "weights by a path": config(transformers_weights="../outside.safetensors"),
    "a kernel of the hub": config(_attn_implementation="evil/kernel"),
    "a kernel of the hub for vision": vision(_attn_implementation="evil/kernel"),
    "10**7 vision layers": vision(num_hidden_layers=10**7),
    "crops of 10**9 pixels": vision(image_size=10**9),
    "patches of no pixel": vision(patch_size=0),
    "vision as a list": config(vision_config=[1]),
    "a layout that is not supported": config(embd_layer={"hd_transform_order": "glb_sub"}),
    "a config nested 10**5 deep": deep,
    "a config of 1 GB": huge("config.json"),
    "NaN": text("config.json", '{"model_type": "phi3_v", "rms_norm_eps": NaN}'),
    "1e999": text("config.json", '{"model_type": "phi3_v", "rms_norm_eps": 1e999}'),
    "a number of 10,000 digits": text("config.json", '{"model_type": "phi3_v", "vocab_size": 1' + "0" * 10_000 + "}"),
    "a config that is a list": text("config.json", "[]"),
    "a config that is empty": text("config.json", ""),
    "a config that is a pipe": fifo("config.json"),
    "a config that never ends": link("config.json", "/dev/zero"),
    "a tokenizer that is a pipe": fifo("tokenizer.json"),
    "a vocabulary that is a pipe": fifo("tokenizer.model"),
    "weights that are a pipe": fifo("model.safetensors"),
    "a tokenizer that never ends": link("tokenizer_config.json", "/dev/zero"),
    "a link to another file": link("special_tokens_map.json", "/etc/hostname"),
    "a link to itself": link("model.safetensors", "model.safetensors"),
    "weights outside": weights_outside,
    "an index that leaves the folder": index("../outside.safetensors"),
    "an index to anywhere": index("/etc/passwd"),
    "an index to a pickle": index("pytorch_model.bin"),
    "an index without its shard": index("model-00001-of-00001.safetensors"),
    "an index that is a list": index([]),
    "pickled weights": pickled,
    "a pickle by another name": pickle_by_another_name,
    "a header of 2**60 bytes": header(2**60),
    "a header of 2**63 bytes": header(2**63),
    "a header without tensors": header(2),
    "a tensor of 2**40 numbers": overlapping,
    "weights of 1 GB of nothing": huge("model.safetensors"),
    "weights as whole numbers": other_dtype,
    "a pattern that backtracks": tokenizer(normalizer=REGEX),
    "a page for each text": tokenizer(normalizer=LONG),
    "a tokenizer without a model": tokenizer(model=None),
    "a tokenizer of another kind": tokenizer(model={"type": "Evil", "vocab": {}}),
    "more tokens than embeddings": more_tokens,
    "a tokenizer of 1 GB": huge("tokenizer.json"),
    "a template of 1 GB": huge("chat_template.jinja"),
    "a folder of templates": lambda folder: (folder / "additional_chat_templates").mkdir(),
    "a vocabulary elsewhere": lambda folder: edit(folder, "tokenizer_config.json", vocab_file="/etc/passwd"),
    "an adapter beside the model": lambda folder: edit(folder, "adapter_config.json", base_model_name_or_path="evil/x"),
    "10**9 tokens a crop": image_processor(num_img_tokens=10**9),
    "a crop that is a text": image_processor(crop_size="28"),
    "a deviation of 0": image_processor(image_std=[0.0, 1.0, 1.0]),
    "a mean of two channels": image_processor(image_mean=[0.5, 0.5]),
    "a generation config that is a list": text("generation_config.json", "[1]"),
}  # fmt: skip

ENDLESS = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"
HARMLESS: dict[str, Callable[[Path], object]] = {
    "code beside a known model": foreign_code("phi3_v"),
    "an endless template": text("chat_template.jinja", ENDLESS),
    "an endless template of the tokenizer": lambda folder: edit(folder, "tokenizer_config.json", chat_template=ENDLESS),
    "a search through 10**6 beams": lambda folder: edit(folder, "generation_config.json", num_beams=10**6, max_length=10**9),
    "an adapter's weights without its config": lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80"),
    "a pickle beside the weights": lambda folder: torch.save(Canary(folder.parent / "canary"), folder / "pytorch_model.bin"),
}  # fmt: skip


def tree(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.fixture
def hostile(base, tmp_path, monkeypatch) -> Path:
    """A copy of a model folder; whoever asks on the terminal is told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return shutil.copytree(base, tmp_path / "hostile" / "folder")


def load(folder: Path):
    args = recipe.arguments(folder)
    return load_processor(args), load_model(args)


@pytest.mark.parametrize("harm", REFUSED.values(), ids=REFUSED)
def test_a_hostile_model_folder_is_refused_in_one_line(hostile, harm):
    harm(hostile)
    before, memory = tree(hostile.parent), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load(hostile)
    message = str(caught.value)
    assert time.monotonic() - start < 20
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    assert "expected" in message
    assert str(hostile) in message
    assert tree(hostile.parent) == before
    # kB; what a number in a file asks for is not taken.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000


@pytest.mark.parametrize("harm", HARMLESS.values(), ids=HARMLESS)
def test_what_a_folder_would_like_to_run_is_not_run(hostile, harm):
    harm(hostile)
    before = tree(hostile.parent)
    processor, model = load(hostile)
    assert tree(hostile.parent) == before
    assert processor.chat_template == processor.tokenizer.chat_template == CHAT_TEMPLATE
    assert processor.apply_chat_template([{"role": "user", "content": "Hello"}]).startswith("<|user|>\nHello")
    ids = torch.tensor([[1, 5, 6]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert output.shape[1] <= 5
    assert tree(hostile.parent) == before


@pytest.mark.parametrize("model_type", ["evil", "phi3_v"])
def test_a_script_asks_nothing_on_the_terminal(base, tmp_path, model_type):
    """Someone, or a pipe, says yes to everything."""
    folder = shutil.copytree(base, tmp_path / "hostile" / "folder")
    foreign_code(model_type)(folder)
    data = recipe.docvqa_rows(tmp_path / "data", train=1, test=1)
    (data / "images" / "1.png").unlink()  # So that the run ends once the model folder is read.
    script = ROOT / "finetune_hf_trainer_docvqa.py"
    result = subprocess.run(
        [sys.executable, script, "--model_name_or_path", folder, "--data_dir", data, "--num_crops", "2"],
        cwd=tmp_path,
        input="y\n" * 20,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1
    assert ("1.png" if model_type == "phi3_v" else "'evil'") in errors[0]
    assert "[y/N]" not in result.stdout + result.stderr
    assert not (tmp_path / "hostile" / "canary").exists()


def implicit(source: str) -> list[int]:
    """Lines of calls that read a folder's own classes and do not say that its code is not run."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "from_pretrained"
        # An adapter holds no code.
        and not ast.unparse(node.func).startswith(("super()", "PeftModel."))
        and "trust_remote_code=False" not in ast.unparse(node)
    ]


def test_every_call_says_that_no_code_of_a_folder_is_run():
    files = [
        *ROOT.glob("*.py"),
        *(file for room in ("finetuning", "benchmarks", "phi3v") for file in (ROOT / room).rglob("*.py")),
    ]
    found = {str(file.relative_to(ROOT)) for file in files if implicit(file.read_text())}
    assert not found
    assert implicit("AutoConfig.from_pretrained(folder)") == [1]
    assert implicit("AutoConfig.from_pretrained(folder, trust_remote_code=False)") == []


def test_weights_in_the_hubs_cache_are_links_and_load(base, tmp_path):
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(base, repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load(snapshot)


# ---- archives


def archive(path: Path, *members: tuple[tarfile.TarInfo, int], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, size in members:
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return path


def info(name: str, **values) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(found, key, value)
    return found


def truncated_claim(path: Path) -> Path:
    """A header that claims 2**33 bytes, and nothing behind it."""
    path.write_bytes(info("A/evil.avi", size=2**33).tobuf(tarfile.GNU_FORMAT))
    return path


def sparse(path: Path) -> Path:
    """A sparse member: 1 TB of zeros in 1 kB."""
    header = bytearray(info("A/evil.avi", size=512, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    header[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(512 + 1024))
    return path


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "up": lambda path: archive(path, (info("../../evil.avi"), 4)),
    "absolute": lambda path: archive(path, (info("/tmp/evil-of-the-tests.avi"), 4)),
    "a link": lambda path: archive(path, (info("A/evil.avi", type=tarfile.SYMTYPE, linkname="/etc/passwd"), 0)),
    "a hard link": lambda path: archive(path, (info("A/evil.avi", type=tarfile.LNKTYPE, linkname="/etc/passwd"), 0)),
    "a device": lambda path: archive(path, (info("A/evil.avi", type=tarfile.CHRTYPE, devmajor=1, devminor=5), 0)),
    "a pipe": lambda path: archive(path, (info("A/evil.avi", type=tarfile.FIFOTYPE), 0)),
    "1 GB of zeros": lambda path: archive(path, (info("A/evil.avi"), 2**30)),
    "1 TB of zeros": sparse,
    "a size that is not there": truncated_claim,
    "gzip in gzip": lambda path: path.write_bytes(zlib.compress(zlib.compress(bytes(10**7)))) and path,
    "no archive": lambda path: path.write_bytes(os.urandom(10_000)) and path,
    "an archive that is a pipe": lambda path: os.mkfifo(path) or path,
    "an archive that never ends": lambda path: path.symlink_to("/dev/zero") or path,
}


@pytest.mark.parametrize("harm", ARCHIVES.values(), ids=ARCHIVES)
def test_a_hostile_archive_is_refused_in_one_line(tmp_path, harm):
    path = harm(tmp_path / "evil.tar.gz")
    before, start = tree(tmp_path), time.monotonic()
    with pytest.raises(InputError) as caught:
        convert_ucf101.find_clips(convert_ucf101.list_archive(path), path)
    assert time.monotonic() - start < 20
    assert len(str(caught.value).splitlines()) == 1
    assert tree(tmp_path) == before
    assert not Path("/tmp/evil-of-the-tests.avi").exists()


# ---- pages


def png_of(width: int, height: int) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(99))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )  # fmt: skip


def cut(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(buffer, form)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(canary) (w) file closefile\nshowpage\n%%EOF\n"
)
TIFF = b"II*\0\x08\0\0\0" + b"\xff\xff" + b"\x00\x01\x04\0\xff\xff\xff\x7f\x08\0\0\0" * 1000
PAGES: dict[str, bytes] = {
    "a bomb of 10**10 pixels": png_of(100_000, 100_000),
    "a bomb of 2**62 pixels": png_of(2**31 - 1, 2**31 - 1),
    "no pixel": png_of(0, 0),
    "a PNG without its pixels": png_of(5000, 5000),
    "half a JPEG": cut("JPEG"),
    "half a WebP": cut("WEBP"),
    "half a TIFF": cut("TIFF"),
    "a program (PostScript)": EPS,
    "tags without end": TIFF,
    "text": b"no image",
    "nothing": b"",
    "half an AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(50),
    "half a DDS": b"DDS " + struct.pack("<I", 124) + bytes(100),
    "half a BLP": b"BLP2" + bytes(100),
}


def look(source) -> None:
    image_size(source)
    load_images(Conversation("evil", [Turn("What?", ["?"], [source])]))


@pytest.mark.parametrize("content", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "file"])
def test_a_hostile_page_is_refused_in_one_line(tmp_path, content, as_bytes):
    (tmp_path / "page.png").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        look({"bytes": content, "path": None} if as_bytes else str(tmp_path / "page.png"))
    assert len(str(caught.value).splitlines()) == 1
    assert tree(tmp_path) == before


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["pipe", "zero", "folder"])
def test_a_page_that_is_no_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "page.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(InputError) as caught:
        look(str(path))
    assert len(str(caught.value).splitlines()) == 1
