"""Which backend is chosen, what a forced one does, and what is counted as a fallback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sd_plugin import kernels
from sd_plugin.kernels import BACKENDS, BackendError, choose, fallbacks, forced, gemm_fp, reference, status

CPU = torch.device("cpu")
_serial = count()
Register = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend forced, no fallback counted, and backends as they were afterwards."""
    monkeypatch.delenv("SD_PLUGIN_BACKEND", raising=False)
    before = dict(BACKENDS)
    fallbacks.clear()
    yield
    BACKENDS.clear()
    BACKENDS.update(before)
    fallbacks.clear()


class Fake(reference.Reference):
    """A backend whose products are all seven."""

    def __init__(self, name: str, unavailable: str | None, unsupported: str | None) -> None:
        self.name, self._unavailable, self._unsupported = name, unavailable, unsupported
        self.calls: list[torch.Tensor] = []

    def reason_unavailable(self) -> str | None:
        return self._unavailable

    def reason_unsupported(self, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return self._unsupported

    def gemm_fp(self, x: torch.Tensor, *others: object) -> torch.Tensor:
        self.calls.append(x)
        return torch.full((1,), 7.0)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Adds a backend that comes before all others."""

    def add(
        made_for: str | None = "cpu", unavailable: str | None = None, unsupported: str | None = None
    ) -> SimpleNamespace:
        # Whether a backend is available is asked once per process, so every one has a name of its own.
        name = f"fake{next(_serial)}"
        module = ModuleType(f"{kernels.__name__}.{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        backend = Fake(name, unavailable, unsupported)
        module.BACKEND = backend
        monkeypatch.setitem(sys.modules, module.__name__, module)
        others = dict(BACKENDS)
        BACKENDS.clear()
        BACKENDS.update({name: made_for, **others})
        return SimpleNamespace(name=name, module=module, calls=backend.calls)

    return add


def product() -> torch.Tensor:
    return gemm_fp(torch.ones(1, 1, 2), torch.ones(2, 1))


@pytest.mark.parametrize("value", ["", "auto", " AUTO "])
def test_auto_chooses_the_first_backend_that_can(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN_BACKEND", value)
    assert forced() is None
    able = (name for name, reason in status().items() if reason is None and BACKENDS[name] in (None, "cpu"))
    chosen = choose("gemm_fp", CPU, torch.float32)
    assert next(able) == chosen.name


def test_reference_is_always_available_and_last() -> None:
    assert status().keys() == BACKENDS.keys()
    *_, last = BACKENDS
    assert last == "reference"
    assert status()["reference"] is None


def test_a_preferred_backend_does_the_call(register: Register) -> None:
    fake = register()
    assert status()[fake.name] is None
    assert product().item() == 7
    assert len(fake.calls) == 1
    assert not fallbacks


def test_a_backend_for_another_device_is_no_fallback(register: Register) -> None:
    fake = register(made_for="cuda")
    assert product().item() == 2
    assert not fake.calls
    assert not fallbacks, "nothing slower than what the device allows was chosen"


def test_an_unavailable_backend_for_this_device_is_warned_about_once(
    register: Register, recwarn: pytest.WarningsRecorder
) -> None:
    fake = register(unavailable="no compiler; install g++")
    assert status()[fake.name] == "no compiler; install g++"
    for _ in range(3):
        assert product().item() == 2
    choose("lstm", CPU, torch.float64)
    (warning,) = recwarn.list
    assert warning.category is RuntimeWarning
    assert str(warning.message) == (
        f"sd-plugin: the {fake.name} backend cannot run, so the slower reference backend is used: no compiler; "
        "install g++. Or set SD_PLUGIN_BACKEND=reference to say so yourself"
    )
    assert not fallbacks


@pytest.mark.parametrize("made_for", ["cuda", None])
def test_an_unavailable_backend_for_something_else_is_passed_over_silently(
    register: Register, recwarn: pytest.WarningsRecorder, made_for: str | None
) -> None:
    register(made_for=made_for, unavailable="no GPU")
    assert product().item() == 2
    assert not fallbacks
    assert not recwarn.list


def test_an_unavailable_backend_is_not_warned_about_when_only_asked_or_when_forced_away(
    register: Register, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    register(unavailable="no compiler")
    assert choose("gemm_fp", CPU, torch.float32, counted=False).name != "fake"
    status()
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "reference")
    assert product().item() == 2
    assert not recwarn.list


def test_a_backend_that_cannot_do_a_call_is_counted(register: Register) -> None:
    fake = register(unsupported="too small")
    for _ in range(3):
        assert product().item() == 2
    assert fallbacks == {("gemm_fp", fake.name, "too small"): 3}


def test_forced_backend_does_the_call(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = register()
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "Reference")
    assert choose("gemm_fp", CPU, torch.float32) is reference.BACKEND
    assert product().item() == 2
    assert not fake.calls
    assert not fallbacks


def test_forced_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "abacus")
    with pytest.raises(BackendError, match=r"SD_PLUGIN_BACKEND=abacus is no backend; valid: auto, .*reference"):
        product()


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"unavailable": "no compiler"}, "no compiler"),
        ({"unsupported": "too small"}, "too small"),
        ({"made_for": "cuda"}, "runs on cuda tensors, got cpu"),
    ],
)
def test_forced_backend_that_cannot_is_an_error(
    register: Register, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str], words: str
) -> None:
    fake = register(**properties)
    monkeypatch.setenv("SD_PLUGIN_BACKEND", fake.name)
    with pytest.raises(BackendError, match=f"SD_PLUGIN_BACKEND={fake.name} cannot do gemm_fp: .*{words}"):
        product()
    assert not fallbacks


def test_a_backend_this_version_lacks_says_so(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    others = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"missing": "cpu", **others})
    assert "does not include it" in str(status()["missing"])
    assert product().item() == 2
    assert not recwarn.list
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "missing")
    with pytest.raises(BackendError, match="does not include it"):
        product()


def test_a_folder_left_by_another_version_is_no_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "left" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.setitem(BACKENDS, "left", "cpu")
    assert "does not include it" in str(status()["left"])


def test_a_backend_that_fails_to_import_is_unavailable(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = register()

    class Broken:
        """A finder and loader of a module whose own imports fail."""

        def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
            return ModuleSpec(fullname, self) if fullname == fake.module.__name__ else None

        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            raise ImportError("no module named cupy")

    monkeypatch.delitem(sys.modules, fake.module.__name__)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "no module named cupy" in str(status()[fake.name])
    with pytest.warns(RuntimeWarning, match="no module named cupy"):
        assert product().item() == 2


def test_no_backend_at_all_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"no backend can do gemm_fp on cpu torch\.int32"):
        choose("gemm_fp", CPU, torch.int32)
