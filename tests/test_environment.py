"""What a process needs before it starts: a GPU that torch can use, shared memory, batches prepared ahead."""

from types import SimpleNamespace

import pytest
import recipe
import torch

from finetuning import environment
from finetuning.environment import batches_ahead, check_shared_memory, prepare_process, runs_on_cpu
from finetuning.errors import InputError

PAGE = 17 * 3 * 336 * 336 * 4  # bytes at num_crops 16


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    yield from recipe.own_process(tmp_path, monkeypatch)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """`gpu(...)` makes torch and /dev look as on such a machine."""

    def look(
        usable: bool, device_files=("nvidia0", "nvidiactl"), cuda: str | None = "13.0", capability=(8, 0), built=()
    ):
        for name in device_files:
            (tmp_path / name).touch()
        monkeypatch.setattr(environment, "DEVICES", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(usable))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))

    return look


def test_a_gpu_that_cannot_be_used_is_not_passed_over_in_silence(gpu, monkeypatch):
    gpu(usable=False)
    with pytest.raises(
        InputError, match=r"expected one that torch .* can use, found an NVIDIA device.*CUDA_VISIBLE_DEVICES=-1"
    ):
        runs_on_cpu()
    assert runs_on_cpu(use_cpu=True)
    for asked in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
        assert runs_on_cpu()


@pytest.mark.parametrize(
    ("device_files", "cuda"), [((), "13.0"), (("nvidia-caps", "nvidiactl"), "13.0"), (("nvidia0",), None)]
)
def test_without_a_gpu_or_without_cuda_the_cpu_is_taken(gpu, device_files, cuda):
    gpu(usable=False, device_files=device_files, cuda=cuda)
    assert runs_on_cpu()


CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("capability", "built", "usable"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), ("sm_50", "sm_60", "sm_70", "sm_80"), True),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # by sm_86
        ((9, 0), ("sm_80", "sm_90a"), True),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),
        ((7, 0), ("compute_80",), False),
        ((12, 1), CUDA_13, True),
        ((10, 0), ("sm_90", "sm_120"), False),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_told(gpu, capability, built, usable):
    gpu(usable=True, capability=capability, built=built)
    if usable:
        assert not runs_on_cpu()
        return
    with pytest.raises(
        InputError, match=rf"has code for .*found Some GPU \(sm_{capability[0]}{capability[1]}\)"
    ) as caught:
        runs_on_cpu()
    assert ("cu126" in str(caught.value)) == (capability == (7, 0))


def test_other_makers_name_architectures_in_another_way(gpu):
    gpu(usable=True, cuda=None, built=("gfx90a",))
    assert not runs_on_cpu()


def test_no_cudnn_kernel_takes_a_mask_and_memory_grows_in_segments(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare_process(True, None, 60, 10**6)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert environment.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_what_the_user_says_of_memory_stays(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    prepare_process(True, None, 60, 10**6)
    assert "PYTORCH_ALLOC_CONF" not in environment.os.environ


@pytest.fixture
def shared_memory(monkeypatch, tmp_path):
    """`shared_memory(free)` makes so many bytes free."""

    def has(free: int):
        monkeypatch.setattr(environment, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    return has


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(shared_memory):
    shared_memory(64 * 2**20)  # of a container, unless it is told otherwise
    with pytest.raises(InputError, match=r"expected 184 MB for 1 x 4 workers .* found 67 MB; docker run --ipc=host"):
        check_shared_memory(4, 1, 16)
    check_shared_memory(0, 1, 16)
    check_shared_memory(4, 1, 1)
    shared_memory(8 * PAGE)
    check_shared_memory(4, 1, 16)
    with pytest.raises(InputError):
        check_shared_memory(4, 1, 16, prefetch=3)


@pytest.mark.parametrize(
    ("workers", "rounds", "free", "expected"),
    [
        (4, 64, 1000 * PAGE, 16),  # 64 micro-batches a step
        (4, 8, 1000 * PAGE, 2),
        (4, 1, 1000 * PAGE, 2),  # PyTorch's own
        (3, 64, 1000 * PAGE, 22),
        (4, 64, 80 * PAGE, 10),  # half of it
        (4, 64, 0, 2),
    ],
)
def test_the_batches_of_a_step_are_prepared_ahead(shared_memory, workers, rounds, free, expected):
    shared_memory(free)
    assert batches_ahead(workers, rounds, 1, 16) == expected


def test_a_run_prepares_its_steps_ahead_unless_it_is_told_how(tmp_path, shared_memory):
    folder = recipe.model_folder(tmp_path / "model")
    shared_memory(10**12)
    flags = ["--batch_size", "64", "--dataloader_num_workers", "4"]
    assert recipe.arguments(folder, *flags).dataloader_prefetch_factor == 16
    assert recipe.arguments(folder, *flags, "--dataloader_prefetch_factor", "3").dataloader_prefetch_factor == 3
    assert recipe.arguments(folder, "--dataloader_num_workers", "0").dataloader_prefetch_factor is None
