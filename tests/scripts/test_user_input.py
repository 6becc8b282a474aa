"""What users give is valid, or refused in one line of bounded length: whatever it is, and never by another error."""

from __future__ import annotations

import datetime
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

# Without these the scripts end at once, and would end pytest.
pytest.importorskip("pydantic")
pytest.importorskip("yaml")
pytest.importorskip("typer")
pytest.importorskip("rich")
import awd_main
import machine_limits
import ner_main
import plain_yaml
import thread_limits
import torch
import training_settings
import typer_program
import user_input
import zaremba_main
from host_launcher import checked_options
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from training_settings import FLOAT32_MAX, Settings, parse_changes, read_settings
from user_input import INT64_MAX, STRICT, Number, Text, WholeNumber, WholeNumberText, validated

from sd_plugin import UsageError

from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MEDIUM = ROOT / "configs" / "zaremba_medium.yaml"
KEYS = list(Settings.model_fields)


def assert_told_well(error: UsageError) -> None:
    """A line that can be printed on any terminal, and read."""
    text = str(error)
    assert text and text.isprintable()
    assert len(text) <= 700
    text.encode()


def assert_usable(found: Settings) -> None:
    """Nothing that a training could stumble over is left in valid settings."""
    for key, value in found.model_dump().items():
        kind = {"data": str, "mode": str}.get(key, type(value))
        assert type(value) is kind in (str, int, float), key
        if kind is not str:
            assert math.isfinite(value) and 0 <= value <= (INT64_MAX if kind is int else math.inf), key
            assert math.copysign(1, value) == 1, key
    for epoch in {1, found.decay_after_epoch + 1, found.epochs // 2 + 1, found.epochs}:
        assert 0 < found.learning_rate_of(min(epoch, found.epochs)) <= FLOAT32_MAX


# Lone surrogates too, which UTF-8 cannot hold.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    # Longer numbers Hypothesis cannot show.
    st.sampled_from([0, 1, 10**20, 10**400, -(10**4000), 2**63, 2**63 - 1]),
    st.sampled_from(["1e-3", "nan", "-0.0", "1" * 5000, "random", "x" * 9000]),
    st.floats(),
    st.sampled_from([-0.0, 1e39, 1e300, 5e-324]),
    texts,
    st.binary(max_size=9),
    st.dates(),
    st.datetimes(),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.one_of(texts, st.integers()), inner, max_size=3),
    max_leaves=12,
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
@example(changes={"learning_rate_decay": 1e200})
@example(changes={"learning_rate_decay": 5e-324, "epochs": 2**63 - 1})
@example(changes={"learning_rate": 10**400})
def test_any_value_is_valid_or_refused(changes: dict[str, Any]) -> None:
    try:
        assert_usable(read_settings(MEDIUM, changes))
    except UsageError as error:
        assert_told_well(error)


@given(key=values.filter(lambda value: not isinstance(value, (list, dict))))
def test_any_key_is_valid_or_refused(key: Any) -> None:
    if key in KEYS:
        return
    with pytest.raises(UsageError, match="unknown key") as caught:
        read_settings(MEDIUM, {key: 1})
    assert_told_well(caught.value)


# What YAML has a meaning for, in any order.
yaml_texts = st.lists(
    st.one_of(
        st.sampled_from("[]{}&*!|>:-,?#%@'\"\\ \n\t~.<_"),
        st.sampled_from(["!!int ", "!!float ", "!!bool ", "!!binary ", "!!timestamp ", "!!omap ", "!!set "]),
        st.sampled_from(["&a ", "*a", "<<: ", "0x", "0b_", "1:2:3", "2026-13-45", "---\n", "...", "!!python/name:os "]),
        st.sampled_from([*KEYS, "1", "9" * 5000, ".inf", "true", "\\ud800", "\\0", "é", "[" * 30, "\x00", "\ud800"]),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


@given(key=st.sampled_from([*KEYS, "", "x", "a.b"]), text=yaml_texts)
@example(key="data", text="{a: &a [1,1,1,1], b: &b [*a,*a], c: [*b,*b]}")
@example(key="seed", text="[" * 3000)
@example(key="seed", text="{a: " * 3000)
@example(key="seed", text="- " * 3000)
@example(key="dropout", text="!!timestamp x")
@example(key="dropout", text="!!bool maybe")
def test_any_text_of_a_change_is_valid_or_refused(key: str, text: str) -> None:
    try:
        assert_usable(read_settings(MEDIUM, parse_changes([f"{key}={text}"])))
    except UsageError as error:
        assert_told_well(error)


@settings(max_examples=50)
@given(text=yaml_texts)
def test_any_file_is_valid_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("files") / "x.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError) as caught:
        read_settings(file, {})
    assert_told_well(caught.value)


def test_a_file_that_is_no_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="/dev/zero is no file of settings: it is larger than"):
        plain_yaml.read_yaml(Path("/dev/zero"))
    monkeypatch.setattr(plain_yaml, "FILE_BYTES", 4)
    (tmp_path / "x.yaml").write_text("a: 1")
    assert plain_yaml.read_yaml(tmp_path / "x.yaml") == {"a": 1}


@given(
    schema=st.sampled_from([ner_main.Numbers, *awd_main.SCHEMAS.values()]),
    data=st.data(),
    value=st.one_of(st.integers().map(str), st.floats().map(str), texts, st.sampled_from(["9" * 5000, "1e400"])),
)
def test_any_option_of_a_host_is_valid_or_refused(schema: type[BaseModel], data: st.DataObject, value: str) -> None:
    name = data.draw(st.sampled_from([field.alias for field in schema.model_fields.values()]))
    try:
        found = checked_options(schema, ["--other", f"{name}={value}", "-x"])
    except UsageError as error:
        assert_told_well(error)
        return
    assert all(math.isfinite(number) for number in vars(found).values() if isinstance(number, (int, float)))


class Example(BaseModel):
    model_config = STRICT

    count: Annotated[WholeNumber, Field(ge=1)] = 1
    text: Annotated[WholeNumberText, Field(ge=-1, le=9)] = 1
    share: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    rate: Annotated[Number, Field(gt=0)] | None = None
    any: Number = 0.0
    name: Text = ""
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "count must be a whole number from 1 to 2**63 - 1, got 0"),
        ({"count": True}, "count must be a whole number from 1 to 2**63 - 1, got True"),
        ({"count": 1.0}, "count must be a whole number from 1 to 2**63 - 1, got 1.0"),
        ({"count": "1"}, "count must be a whole number from 1 to 2**63 - 1, got '1'"),
        ({"text": "10"}, "text must be a whole number from -1 to 9, got '10'"),
        ({"share": 1}, "share must be a finite number of at least 0 and below 1, got 1"),
        ({"rate": "0"}, "rate must be a finite number above 0, got '0'"),
        ({"any": float("inf")}, "any must be a finite number, got inf"),
        ({"any": None}, "any must be a finite number, got None"),
        ({"name": 3}, "name must be text, got 3"),
        ({"kind": ["a"]}, "kind must be one of a, b, got ['a']"),
        ({3: 1, "x\n": 2}, "unknown key 3, 'x\\n'; valid: count, text, share, rate, any, name, kind"),
    ],
)
def test_messages_are_made_of_the_schema(given: dict[Any, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        validated(Example, given)
    assert str(caught.value) == said


def test_values_are_converted_where_they_may_be() -> None:
    found = validated(Example, {"text": " 7 ", "share": "1e-3", "rate": 2, "any": -0.0})
    assert (found.text, found.share, found.rate) == (7, 0.001, 2.0)
    assert type(found.rate) is float and math.copysign(1, found.any) == 1


@given(value=values)
def test_a_value_is_shown_in_bounded_length(value: Any) -> None:
    told = user_input.shown(value)
    assert told.isprintable() and len(told) <= user_input.VALUE_LENGTH
    if isinstance(value, (bool, datetime.date)) or (isinstance(value, int) and abs(value) < 10**9):
        assert told == repr(value)


def test_a_number_that_python_does_not_write_is_shown() -> None:
    assert user_input.shown(10**5000) == "a number of about 5,000 digits"
    for key in KEYS:
        with pytest.raises(UsageError, match=r"^(data|mode|\w+) must be .*, got a number of about 5,000 digits$"):
            read_settings(MEDIUM, {key: 10**5000})


def test_a_recursive_value_is_shown() -> None:
    value: list[Any] = []
    value.append(value)
    assert user_input.shown(value) == "[[[...]]]"


@pytest.mark.parametrize("signals", [1, 3])
def test_a_program_that_is_interrupted_while_it_imports_says_so_in_a_line(tmp_path: Path, signals: int) -> None:
    """In place of what takes seconds there are modules that take a minute."""
    for name in ("pydantic", "typer"):
        (tmp_path / f"{name}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    for script in ("zaremba_main", "ner_main", "awd_main", "demo", "get_data") if signals == 1 else ("zaremba_main",):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"],
            env={"PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "0", "SD_PLUGIN": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # What a shell starts in the background ignores it, and so would the program.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout
        assert process.stdout.readline() == "importing\n"
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE)[1] == "interrupted\n", script
        assert process.returncode == 130, script


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [(["--seed", "9" * 5000], "--seed"), (["--threads", "0"], "--threads"), (["--nonsense"], "--nonsense")],
)
def test_wrong_command_line_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], culprit: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["zaremba_main.py", str(MEDIUM), *arguments])
    with pytest.raises(SystemExit) as caught:
        typer_program.run_app(zaremba_main.app, "zaremba_main.py")
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    (line,) = err.splitlines()
    # The words are those of typer's version.
    assert line.startswith("error: ") and culprit in line and len(line) < 400


def test_help_is_no_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["zaremba_main.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        typer_program.run_app(zaremba_main.app, "zaremba_main.py")
    assert caught.value.code in (0, None)
    assert "--resume" in capsys.readouterr().out


def test_to_import_a_program_leaves_signals_alone() -> None:
    # Python's own, or, where the tests run in the background of a shell, none.
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------- the machine


def test_memory_is_that_of_the_machine_or_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_limits.memory()
    assert 2**28 < whole < 2**50
    # Both versions of cgroups; the limit of a group holds for those in it.
    monkeypatch.setattr(machine_limits, "_CGROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        (tmp_path / file).write_text("1000000\n")
    if Path("/proc/self/cgroup").read_text():
        assert machine_limits.memory() == 1_000_000
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        (tmp_path / file).write_text("max\n")
    unlimited = machine_limits.memory()
    assert unlimited >= whole
    monkeypatch.setattr(machine_limits.resource, "getrlimit", lambda _: (12345, 12345))
    assert machine_limits.memory() == 12345


@pytest.mark.parametrize("value", ["5", " +5 ", "0005", "100000", "1" * 5000, "100000,2"])
@pytest.mark.parametrize("name", thread_limits.VARIABLES)
def test_an_environment_that_asks_for_too_many_threads_is_bounded(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert thread_limits.bounded({name: value, "OTHER": "9"}) == {name: "4"}


@pytest.mark.parametrize("value", ["", "4", "1", "0", "-9", "many", "²", "4,9"])
def test_an_environment_that_does_not_is_left_alone(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert thread_limits.bounded(dict.fromkeys(thread_limits.VARIABLES, value)) == {}


def test_torch_is_bounded_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
        assert thread_limits.bound_torch() is None and torch.get_num_threads() == 3
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        note = "OMP_NUM_THREADS asked for 3 threads, and this machine has 2 processors: 2 threads are used"
        assert thread_limits.bound_torch() == note and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_with_both_figures() -> None:
    machine_limits.check_fits("it", 10, 10)
    with pytest.raises(UsageError, match=r"^it needs 1.5 GiB, and this GPU has 1 GiB$"):
        machine_limits.check_fits("it", 3 * 2**29, 2**30, "this GPU")


def test_settings_are_those_of_the_file_as_ever() -> None:
    """The identity of a training is made of them: no value may change its type."""
    found = read_settings(MEDIUM, {"learning_rate": 1}).model_dump()
    assert found["learning_rate"] == 1.0 and type(found["learning_rate"]) is float
    assert list(found) == KEYS == list(training_settings.Settings.model_fields)
    assert {key: type(value) for key, value in found.items()} == {
        key: {"data": str, "mode": str}.get(key, float if "rate" in key or key in FLOATS else int) for key in KEYS
    }


FLOATS = ("dropout", "init_range", "max_grad_norm")
