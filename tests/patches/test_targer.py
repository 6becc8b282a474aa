"""targer's structured dropout, on a stand-in with its module and class interface: its results, and what stays stock.

The host itself is run in tests/hosts/test_targer.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_plugin import functional, hints, stats
from sd_plugin.errors import UsageError
from sd_plugin.patches import targer

from .. import counted, weights_only
from ..environ import clean
from ..forks import Forks
from ..patience import PATIENCE
from ..tolerances import assert_close, relative
from . import targer_stand_in as stand_in

Modules = dict[str, types.ModuleType]
Counted = dict[str, stats.Site]
SENTENCES, TAGS = stand_in.SENTENCES, stand_in.TAGS
STRUCTURED = ("nr_st", "nr_rh_st")
LAYER_FILE = Path("src", "layers", "layer_bilstm.py")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    stats.reset()
    yield
    targer.disable()
    stats.reset()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stand_in.copy(tmp_path / "targer")


@pytest.fixture
def host(folder: Path) -> Iterator[Modules]:
    with stand_in.imported(folder) as modules:
        yield modules


def new_tagger(host: Modules, name: str = "tagger_birnn_cnn_crf", **options: Any) -> Any:
    torch.manual_seed(5)
    return stand_in.tagger(host, name, **options).train()


def step(tagger: Any, seed: int = 7) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one training step whose dropouts follow from ``seed``."""
    torch.manual_seed(seed)
    tagger.zero_grad()
    loss = tagger.get_loss(SENTENCES, TAGS)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in tagger.named_parameters() if p.grad is not None}


def assert_same(result: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    """Equal but for the noise of float32."""
    assert result[0] == pytest.approx(expected[0], rel=relative(torch.float32))
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(result[1][name], gradient, name=name)


def lstm_input(tagger: Any) -> Tensor:
    """What the BiLSTM is given in one training step, ``[B, T, K]``."""
    seen: list[Tensor] = []
    hook = tagger.birnn_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    step(tagger)
    hook.remove()
    (z,) = seen
    return z


def zeros_per_step(z: Tensor) -> list[Tensor]:
    """For each time step, which columns are zero ``[rows, K]``, of the sentences that are not over."""
    lengths = torch.tensor([len(sentence) for sentence in SENTENCES])
    return [z[lengths > t, t] == 0 for t in range(z.shape[1])]


def attributes(host: Modules) -> dict[str, object]:
    """Everything that could be patched: attributes of the host's modules and classes, and of torch."""
    found: dict[str, object] = {"torch.load": torch.load, "torch.save": torch.save}
    for module in host.values():
        for name, value in vars(module).items():
            found[f"{module.__name__}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {f"{module.__name__}.{name}.{key}": inner for key, inner in vars(value).items()}
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] is not after[name]}


# --------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", stand_in.TAGGERS)
@pytest.mark.parametrize("mode", ["random", *STRUCTURED])
def test_nothing_dropped_is_the_original(host: Modules, name: str, mode: str) -> None:
    tagger = new_tagger(host, name, dropout_ratio=0.0)
    expected = step(tagger)
    targer.enable(mode)
    assert_same(step(tagger), expected)
    assert not stats.sites()


@pytest.mark.parametrize("name", stand_in.TAGGERS)
@pytest.mark.parametrize("mode", STRUCTURED)
def test_skipping_gives_what_dense_products_give(
    host: Modules, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger = new_tagger(host, name)
    targer.enable(mode)
    skipped = step(tagger)
    assert stats.sites()["birnn.input"].skipped > 0
    # The same dropped values without the note that they are zero: nr_st then runs torch's own LSTM.
    monkeypatch.setattr(hints, "carry", lambda source, source_steps, target, steps: target)
    monkeypatch.setattr(hints, "lookup", lambda tensor: None)
    stats.reset()
    dense = step(tagger)
    assert stats.sites()["birnn.input"].skipped == 0
    assert_same(skipped, dense)


@pytest.mark.parametrize("name", stand_in.TAGGERS)
@pytest.mark.parametrize("mode", ["random", *STRUCTURED])
def test_evaluation_is_the_originals(host: Modules, name: str, mode: str) -> None:
    tagger = new_tagger(host, name).eval()
    expected, tags = tagger.scores(SENTENCES), tagger.predict_tags_from_words(SENTENCES)
    targer.enable(mode)
    assert torch.equal(tagger.scores(SENTENCES), expected)
    assert tagger.predict_tags_from_words(SENTENCES) == tags
    assert not stats.sites()


def test_structured_pattern_is_the_batchs_and_the_steps_own(host: Modules) -> None:
    targer.enable("nr_st")
    patterns = zeros_per_step(lstm_input(new_tagger(host)))
    assert all((rows == rows[0]).all() for rows in patterns), "the same units for the whole batch"
    assert all(rows[0].sum() == 16 for rows in patterns), "half of 20 + 12"
    assert len({tuple(rows[0].tolist()) for rows in patterns}) == len(patterns), "new ones at each time step"


def test_locked_pattern_is_the_same_at_all_steps(host: Modules) -> None:
    targer.enable("nr_st", case="IV")
    patterns = zeros_per_step(lstm_input(new_tagger(host)))
    assert {tuple(row.tolist()) for rows in patterns for row in rows} == {tuple(patterns[0][0].tolist())}


def test_random_pattern_is_each_rows_own(host: Modules) -> None:
    targer.enable("random")
    rows = [tuple(row.tolist()) for rows in zeros_per_step(lstm_input(new_tagger(host))) for row in rows]
    assert len(set(rows)) == len(rows)


def test_locked_random_pattern_is_a_rows_own_at_all_steps(host: Modules) -> None:
    targer.enable("random", case="II")
    first, second, *_ = zeros_per_step(lstm_input(new_tagger(host)))
    # Sentences 0 and 1 have a second word.
    assert torch.equal(first[:2], second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("mode", ["random", "nr_st"])
def test_dropped_values_are_scaled(host: Modules, mode: str) -> None:
    tagger = new_tagger(host)
    targer.enable(mode)
    dropped = lstm_input(tagger)
    tagger.dropout.p = 0.0
    whole = lstm_input(tagger)
    kept = dropped != 0
    assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize("mode", ["random", *STRUCTURED])
def test_characters_are_no_longer_dropped(host: Modules, mode: str) -> None:
    tagger = new_tagger(host)
    seen: list[Tensor] = []
    tagger.char_cnn_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    step(tagger)
    targer.enable(mode)
    step(tagger)
    stock, moved = (characters[1, :5] for characters in seen)
    assert (stock == 0).any(), "the original drops them"
    assert not (moved == 0).any()


@pytest.mark.parametrize("name", ["tagger_birnn_crf", "tagger_birnn_cnn"])
def test_dropout_after_the_lstm_stays(host: Modules, name: str) -> None:
    tagger = new_tagger(host, name)
    seen: list[Tensor] = []
    tagger.lin_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    targer.enable("nr_st")
    step(tagger)
    rows = seen[0][1, :5] == 0
    assert 0.2 < rows.float().mean() < 0.8
    assert not (rows == rows[0]).all(), "random, as the original's"


@pytest.mark.parametrize(
    ("options", "recurrent"),
    [
        ({"mode": "nr_rh_st"}, 0.5),
        ({"mode": "nr_rh_st", "recurrent_dropout": 0.2}, 0.2),
        ({"mode": "nr_rh_st", "recurrent_dropout": 0.0}, None),
        ({"mode": "nr_st"}, None),
        ({}, 0.5),
    ],
)
def test_every_dropped_unit_is_skipped(host: Modules, options: dict[str, Any], recurrent: float | None) -> None:
    tagger = new_tagger(host)
    targer.enable(**options)
    for seed in range(3):
        step(tagger, seed)
    sites = stats.sites()
    expected = {"birnn.input": 0.5}
    if recurrent is not None:
        expected |= {"birnn.l0.recurrent": recurrent, "birnn.l0_reverse.recurrent": recurrent}
    assert sites.keys() == expected.keys()
    for name, p in expected.items():
        assert (sites[name].drawn, sites[name].used, sites[name].lost) == (3, 3, 0), name
        assert sites[name].dropped / sites[name].units == pytest.approx(p), name
        assert sites[name].skipped / sites[name].dense == pytest.approx(p), name


def test_recurrent_dropout_is_in_force(host: Modules) -> None:
    tagger = new_tagger(host, dropout_ratio=0.0)
    targer.enable("nr_rh_st", recurrent_dropout=0.5)
    losses = {step(tagger, seed)[0] for seed in range(3)}
    assert len(losses) == 3
    assert set(stats.sites()) == {"birnn.l0.recurrent", "birnn.l0_reverse.recurrent"}


@pytest.mark.parametrize(("case", "locked"), [("III", False), ("IV", True)])
def test_case_is_the_recurrent_dropouts_too(
    host: Modules, case: str, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    stock = functional.lstm_layer

    def lstm_layer(x: Tensor, state: Any, parameters: Any, call: functional.LayerCall) -> Any:
        assert call.recurrent.kept is not None
        drawn.append(call.recurrent.kept.indices)
        return stock(x, state, parameters, call)

    monkeypatch.setattr(functional, "lstm_layer", lstm_layer)
    targer.enable("nr_rh_st", case=case)
    step(new_tagger(host))
    forward, backward = drawn
    assert not torch.equal(forward, backward), "each direction has its own"
    for kept in drawn:
        assert (len({tuple(row.tolist()) for row in kept}) == 1) is locked


def test_random_mode_can_drop_the_state_at_random(host: Modules) -> None:
    tagger = new_tagger(host, dropout_ratio=0.0)
    targer.enable("random", recurrent_dropout=0.5)
    assert len({step(tagger, seed)[0] for seed in range(3)}) == 3
    assert not stats.sites(), "nothing of it can be skipped"


def test_another_kind_of_layer_stays_stock(host: Modules) -> None:
    tagger = new_tagger(host, rnn_type="GRU")
    expected = step(tagger)
    targer.enable("nr_rh_st")
    with pytest.warns(UserWarning, match="rnn_type GRU stays as it is"):
        result = step(tagger)
    assert_same(result, expected)
    assert not stats.sites()


def test_layer_by_itself_stays_stock(host: Modules) -> None:
    layer = new_tagger(host).birnn_layer
    z, mask = torch.randn(2, 3, 32), torch.ones(2, 3)
    expected = layer(z, mask)
    targer.enable("nr_rh_st")
    assert torch.equal(layer(z, mask), expected)


# ------------------------------------------------------------------------------------------ on and off


@pytest.mark.parametrize("mode", ["random", *STRUCTURED])
def test_disable_restores_every_attribute(host: Modules, mode: str) -> None:
    before = attributes(host)
    targer.enable(mode)
    assert targer.HOST.enabled()
    assert changed(before, attributes(host)) == set(targer.changes()), "it says what it changes"
    assert len(targer.changes()) == 2 + 1 + 4
    targer.enable("nr_st")
    targer.disable()
    assert not targer.HOST.enabled()
    assert not targer.changes()
    assert not changed(before, attributes(host))


def test_a_model_of_before_and_after(host: Modules) -> None:
    tagger = new_tagger(host)
    expected = step(tagger)
    targer.enable("nr_st")
    assert step(tagger)[0] != expected[0]
    targer.disable()
    result = step(tagger)
    assert result[0] == expected[0]
    assert all(torch.equal(result[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "fast"}, "mode must be one of random, nr_st, nr_rh_st, got 'fast'"),
        ({"case": "V"}, "case must be one of I, II, III, IV, got 'V'"),
        ({"mode": "random", "case": "III"}, "mode random has the cases I and II, not III"),
        ({"mode": "nr_st", "case": "I"}, "mode nr_st has the cases III and IV, not I"),
        ({"recurrent_dropout": 1.0}, r"recurrent_dropout must be in \[0, 1\), got 1.0"),
        ({"mode": "nr_st", "recurrent_dropout": 0.5}, "mode nr_st has no recurrent dropout"),
    ],
)
def test_wrong_arguments_change_nothing(host: Modules, options: dict[str, Any], told: str) -> None:
    before = attributes(host)
    with pytest.raises(UsageError, match=told):
        targer.enable(**options)
    assert not changed(before, attributes(host))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("self.pack(", "self.packed(", "LayerBiLSTM.forward does not use pack"),
        (
            "input_tensor, mask_tensor):",
            "input_tensor, mask):",
            r"LayerBiLSTM.forward takes \(self input_tensor mask\)",
        ),
        ("class LayerBiLSTM", "class LayerBilstm", "it has no LayerBiLSTM"),
    ],
)
def test_other_code_is_not_touched(tmp_path: Path, old: str, new: str, told: str) -> None:
    folder = stand_in.copy(tmp_path / "other")
    path = folder / LAYER_FILE
    with stand_in.imported(folder) as host:
        path.write_text(path.read_text().replace(old, new))
        before = attributes(host)
        with pytest.raises(UsageError, match=told):
            targer.enable("nr_st")
        assert not changed(before, attributes(host))
        assert not targer.HOST.enabled()


def test_module_from_elsewhere_is_not_touched(host: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("src.layers.layer_bilstm")
    other.__file__ = __file__
    other.LayerBiLSTM = host["layer_bilstm"].LayerBiLSTM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, other.__name__, other)
    before = attributes(host)
    with pytest.raises(UsageError, match=r"finds .*, not that of"):
        targer.enable("nr_st")
    assert not changed(before, attributes(host))


def test_host_that_is_not_on_the_path() -> None:
    stand_in.forget()
    with pytest.raises(UsageError, match="run in a checkout of targer"):
        targer.enable()


def test_what_the_host_lacks_is_told_as_it_is(folder: Path) -> None:
    path = folder / "src" / "models" / "tagger_base.py"
    path.write_text("import a_module_that_is_not_installed\n" + path.read_text())
    stand_in.forget()
    sys.path.insert(0, str(folder))
    try:
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
            targer.enable()
    finally:
        sys.path.remove(str(folder))
        stand_in.forget()


# ----------------------------------------------------------------------------------- as the hook calls it


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    for name in [name for name in os.environ if name.startswith("SD_PLUGIN")]:
        monkeypatch.delenv(name)

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "sites"),
    [
        ({"SD_PLUGIN": "1"}, 3),
        ({"SD_PLUGIN": "nr_rh_st"}, 3),
        ({"SD_PLUGIN": "nr_st"}, 1),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_RECURRENT_DROPOUT": "0"}, 1),
        ({"SD_PLUGIN": "nr_st", "SD_PLUGIN_CASE": "iv", "SD_PLUGIN_TARGETS": "targer"}, 1),
    ],
)
def test_switch_of_the_environment(
    host: Modules, environ: Callable[..., None], variables: dict[str, str], sites: int
) -> None:
    environ(**variables)
    targer.on_import(host["tagger_birnn_cnn_crf"])
    step(new_tagger(host))
    assert len(stats.sites()) == sites
    assert not any(site.lost for site in counted.sites().values())


@pytest.mark.parametrize(
    "variables", [{}, {"SD_PLUGIN": "0"}, {"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "opennmt,fastai"}]
)
def test_switched_off(host: Modules, environ: Callable[..., None], variables: dict[str, str]) -> None:
    environ(**variables)
    before = attributes(host)
    targer.on_import(host["tagger_birnn_cnn_crf"])
    assert not changed(before, attributes(host))


def test_environment_that_is_not_understood(host: Modules, environ: Callable[..., None]) -> None:
    environ(SD_PLUGIN="1", SD_PLUGIN_CASE="VII")
    before = attributes(host)
    with pytest.raises(ValueError, match="SD_PLUGIN_CASE"):
        targer.on_import(host["tagger_birnn_cnn_crf"])
    assert not changed(before, attributes(host))


def environment(**variables: str) -> dict[str, str]:
    """Nothing of the plugin is set but ``variables``."""
    kept = clean()
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def test_hook_patches_the_hosts_own_program(folder: Path, tmp_path: Path, fork: Forks) -> None:
    data = stand_in.write_data(tmp_path / "data")
    (folder / "vectors.txt").write_text("".join(f"{w.lower()} 0\n" for w in stand_in.WORDS))
    parts = [f"--{part}={data / part}.txt" for part in ("train", "dev", "test")]
    command = ["-m", "sd_plugin", "main.py", *parts, "--emb-fn=vectors.txt", "--save=model", "--epoch-num=1"]
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(SD_PLUGIN="1", SD_PLUGIN_REPORT="1"),
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    rows = [line.split() for line in done.stderr.splitlines() if line.startswith("  birnn")]
    # 40 sentences in batches of 10.
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("birnn.input", "4", "0"),
        ("birnn.l0.recurrent", "4", "0"),
        ("birnn.l0_reverse.recurrent", "4", "0"),
    ]
    resumed = fork(command[0], [*command[1:], "--load=model"], cwd=folder, env=environment(SD_PLUGIN="nr_st"))
    assert resumed.returncode == 0, resumed.stderr


# ----------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_holds_nothing_of_the_plugin(host: Modules, folder: Path, fork: Forks) -> None:
    targer.enable("nr_rh_st")
    tagger = new_tagger(host)
    step(tagger)
    tagger.save_tagger(str(folder / "model"))
    assert b"sd_plugin" not in (folder / "model").read_bytes()
    expected = tagger.predict_tags_from_words(SENTENCES)
    code = f"""
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "sd_plugin":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        import torch
        tagger = torch.load("model", weights_only=False)
        assert tagger.predict_tags_from_words({SENTENCES}) == {expected}
        print("loaded", any(name.startswith("sd_plugin.p") for name in sys.modules))
    """
    done = fork("-c", [textwrap.dedent(code)], cwd=folder, env=environment(SD_PLUGIN="0"))
    assert done.stdout == "loaded False\n", done.stderr


def test_host_loads_its_own_files_and_others_stay_strict(host: Modules, folder: Path) -> None:
    path = str(folder / "model")
    load = host["factory_tagger"].TaggerFactory.load
    targer.enable("nr_st")
    new_tagger(host).save_tagger(path)
    assert isinstance(load(path), host["tagger_base"].TaggerBase)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    if hasattr(torch.serialization, "add_safe_globals") and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6):
        with pytest.raises(Exception, match="weights_only"):
            torch.load(path)
        targer.disable()
        with pytest.raises(Exception, match="weights_only"):
            load(path)
        targer.patch_files(folder)
        assert not targer.HOST.enabled()
        assert isinstance(load(path), host["tagger_base"].TaggerBase)


def test_environment_inside_a_checkout_is_not_the_host(host: Modules, folder: Path) -> None:
    inside = folder / ".venv" / "lib"
    inside.mkdir(parents=True)
    (inside / "other_package.py").write_text("import torch\n\ndef load(path):\n    return torch.load(path)\n")
    path = str(folder / "model")
    targer.patch_files(folder)
    new_tagger(host).save_tagger(path)
    called: list[object] = []
    stock = torch.load
    sys.path.insert(0, str(inside))
    try:
        import other_package

        assert other_package.torch.load is stock
        if weights_only.is_default():
            with pytest.raises(Exception, match="weights_only"):
                called.append(other_package.load(path))
    finally:
        sys.path.remove(str(inside))
        sys.modules.pop("other_package", None)
    assert not called


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x80\x04."])
def test_damaged_file_is_named(host: Modules, folder: Path, content: bytes) -> None:
    path = folder / "model"
    path.write_bytes(content)
    targer.enable("nr_st")
    with pytest.raises(UsageError, match=r"model is damaged, or no file of targer") as caught:
        host["factory_tagger"].TaggerFactory.load(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_cut_file_is_named(host: Modules, folder: Path) -> None:
    path = folder / "model"
    targer.enable("nr_st")
    new_tagger(host).save_tagger(str(path))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"model is damaged"):
        host["factory_tagger"].TaggerFactory.load(str(path))


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("in the middle of it")


def test_failed_save_leaves_the_former_file(host: Modules, folder: Path) -> None:
    path = folder / "model"
    targer.patch_files(folder)
    tagger = new_tagger(host)
    tagger.save_tagger(str(path))
    before = path.read_bytes()
    tagger.extra = Unpicklable()
    with pytest.raises(RuntimeError, match="in the middle of it"):
        tagger.save_tagger(str(path))
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.glob("model*")) == ["model"], "and nothing else"


def test_kill_during_a_save_leaves_the_former_file(folder: Path, fork: Forks) -> None:
    code = """
        import os, signal, sys, torch
        from pathlib import Path
        from sd_plugin.patches import targer
        from src.models.tagger_birnn import TaggerBiRNN
        from src.seq_indexers.indexer import Indexer

        class Killing:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGKILL)

        targer.patch_files(Path.cwd())
        tagger = TaggerBiRNN(Indexer(["a"]), Indexer(["O"]))
        tagger.save_tagger("model")
        tagger.epoch = 2
        # A dictionary keeps its order: this comes last.
        tagger.zzz = Killing()
        tagger.save_tagger("model")
    """
    done = fork("-c", [textwrap.dedent(code)], cwd=folder, env=environment())
    assert done.returncode == -signal.SIGKILL, done.stderr
    with stand_in.imported(folder) as host:
        targer.patch_files(folder)
        tagger = host["factory_tagger"].TaggerFactory.load(str(folder / "model"))
    assert not hasattr(tagger, "epoch")


def test_a_link_is_followed(host: Modules, folder: Path) -> None:
    (folder / "elsewhere").write_bytes(b"old")
    (folder / "model").symlink_to(folder / "elsewhere")
    targer.patch_files(folder)
    new_tagger(host).save_tagger(str(folder / "model"))
    assert (folder / "model").is_symlink()
    assert len((folder / "elsewhere").read_bytes()) > 1000


# -------------------------------------------------------------------------------------- the declaration


def test_declaration(folder: Path) -> None:
    assert targer.HOST.name == "targer" and targer.HOST.target == "targer"
    (finding,) = (f for f in targer.HOST.find({"TARGER_DIR": str(folder)}) if f.where == str(folder))
    assert finding.problem is None
    (folder / "main.py").unlink()
    (finding,) = (f for f in targer.HOST.find({"TARGER_DIR": str(folder)}) if f.where == str(folder))
    assert finding.problem is not None and "it has no main.py" in finding.problem


def test_no_warning_of_our_own(host: Modules) -> None:
    targer.enable("nr_rh_st")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(new_tagger(host))
