"""CPU tuning: what it changes, what it leaves alone, and that a program really starts again, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spec import runtime

ROOT = Path(runtime.__file__).parents[1]
PROGRAM = """
import json, os, sys
from spec.runtime import ensure_tuned
ensure_tuned()
keys = ("OMP_NUM_THREADS", "LD_PRELOAD", "ONPOLICY_TUNED", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND")
print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "name": __name__, "optimize": sys.flags.optimize,
                  "torch": "torch" in sys.modules, "env": {key: os.environ.get(key) for key in keys}}))
"""


def run(folder: Path, *arguments: str, **environment: str) -> dict:
    """What the program above reports when started as ``python -O -m program ARGUMENTS``."""
    (folder / "program.py").write_text(PROGRAM)
    tuned = ("OMP_NUM_THREADS", "LD_PRELOAD", "ONPOLICY_", "VLLM_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(tuned)}
    clean |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-O", "-m", "program", *arguments]
    process = subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return {**json.loads(out), "started": process.pid}


@pytest.mark.skipif(sys.platform != "linux", reason="tunes Linux only")
def test_the_program_starts_again_once_with_the_same_command_line(tmp_path: Path) -> None:
    found = run(tmp_path, "--optim.lr", "1e-4", "a b")
    assert found["env"]["ONPOLICY_TUNED"] == "1"
    assert found["pid"] == found["started"]  # replaced, not a child: signals and exit status reach it
    assert found["argv"] == ["--optim.lr", "1e-4", "a b"]
    assert found["name"] == "__main__" and found["optimize"] == 1 and not found["torch"]
    assert found["env"]["OMP_NUM_THREADS"] == str(
        len(runtime.physical_cores(os.sched_getaffinity(0))[: runtime.quota() or None])
    )
    assert found["env"]["LD_PRELOAD"] == (":".join(runtime.preloads()) or None)


@pytest.mark.skipif(sys.platform != "linux", reason="tunes Linux only")
def test_it_does_not_restart_where_it_should_not(tmp_path: Path) -> None:
    for arguments, environment in ((("--help",), {}), ((), {"ONPOLICY_NO_TUNE": "1"}), ((), {"ONPOLICY_TUNED": "1"})):
        found = run(tmp_path, *arguments, **environment)
        assert found["env"]["OMP_NUM_THREADS"] is None and found["env"]["LD_PRELOAD"] is None
        assert found["env"]["VLLM_NO_USAGE_STATS"] == "1"  # needs no restart


SAY_AND_END = """
import os
def execve(path, command, environment):
    print("restarts with", environment["OMP_NUM_THREADS"], "threads", flush=True)
    os._exit(0)
os.execve = execve
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tunes Linux only")
@pytest.mark.parametrize(
    ("program", "arguments"),
    (
        ("spec.generate", ("--target", "x", "--prompt", "y")),
        ("spec.bench", ("--target", "x", "--draft", "y", "--data", "z")),
        ("spec.audit", ("--target", "x")),
        ("spec.serve", ("--target", "x")),
    ),
)
def test_every_program_of_spec_is_tuned_and_its_help_is_quick(program: str, arguments, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SAY_AND_END)  # in place of the restart itself
    tuned = ("OMP_NUM_THREADS", "LD_PRELOAD", "ONPOLICY_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(tuned)}
    clean |= {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}

    def printed(*options: str) -> str:
        command = [sys.executable, "-m", program, *options]
        return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout

    assert printed(*arguments).startswith("restarts with ")
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        shown = printed("--help")
        seconds.append(time.perf_counter() - began)
        assert "--target" in shown and "restarts" not in shown
    assert min(seconds) < 2


@pytest.mark.skipif(sys.platform != "linux", reason="tunes Linux only")
def test_restarting_costs_little(tmp_path: Path) -> None:
    started = time.perf_counter()
    run(tmp_path)
    assert time.perf_counter() - started < 5  # generous for a busy machine; a restart loop would never end


def test_what_the_user_has_set_wins() -> None:
    libraries = ["/venv/lib/libiomp5.so", "/usr/lib/libtcmalloc_minimal.so.4"]
    plain = runtime.tuned_environment({}, [0, 2], None, libraries)
    assert plain == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "0,2", "LD_PRELOAD": ":".join(libraries)}
    set_by_user = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "3",
        "LD_PRELOAD": "/x/libjemalloc.so.2 /y/libfoo.so",
    }
    assert runtime.tuned_environment(set_by_user, [0, 2], None, libraries) == {
        "LD_PRELOAD": "/x/libjemalloc.so.2:/y/libfoo.so:/venv/lib/libiomp5.so"
    }
    # Nothing to change: no restart.
    assert runtime.tuned_environment({**plain, "HOME": "/"}, [0, 2], None, libraries) == {}


def test_threads_follow_cores_and_the_quota_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.tuned_environment({}, [0, 1, 2, 3], 2, [])["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(runtime, "_QUOTA", tmp_path / "cpu.max")
    assert runtime.quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert runtime.quota() is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert runtime.quota() == 2
    monkeypatch.setattr(runtime, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}").write_text(siblings + "\n")
    assert runtime.physical_cores({0, 1, 2, 3}) == [0, 1]
    assert runtime.physical_cores({2, 3}) == [2, 3]


def test_a_hidden_gpu_is_no_gpu() -> None:
    assert not runtime.gpu_present({"CUDA_VISIBLE_DEVICES": ""})
    assert not runtime.gpu_present({"CUDA_VISIBLE_DEVICES": "-1"})


def test_parallel_kernels_leave_the_number_of_torchs_threads_alone() -> None:
    program = "import torch, spec.models.kernels_numba; print(torch.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
