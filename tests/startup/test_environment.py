"""Reading SD_PLUGIN."""

import pytest

from sd_plugin._environment import (
    DEFAULT_TARGETS,
    MODES,
    TARGETS,
    Switch,
    read_case,
    read_recurrent_dropout,
    read_switch,
)


@pytest.mark.parametrize("environ", [{}, {"SD_PLUGIN": ""}, {"SD_PLUGIN": "  "}])
def test_unset_adds_and_replaces_nothing(environ):
    assert read_switch(environ) == Switch(enabled=True, replace=False, mode=None, problem=None)


@pytest.mark.parametrize("value", ["0", "off", "false", "no", "OFF", " No "])
def test_off(value):
    assert read_switch({"SD_PLUGIN": value}) == Switch(enabled=False, replace=False)


@pytest.mark.parametrize("value", ["1", "on", "true", "yes", "On", "YES"])
def test_on_leaves_the_mode_open(value):
    assert read_switch({"SD_PLUGIN": value}) == Switch(enabled=True, replace=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_asks_for_replacement(mode):
    assert read_switch({"SD_PLUGIN": mode}) == Switch(enabled=True, replace=True, mode=mode)
    assert read_switch({"SD_PLUGIN": mode.upper()}).mode == mode


@pytest.mark.parametrize("value", ["2", "nr", "nr-st", "random,nr_st", "two\nlines"])
def test_anything_else_reads_as_unset_and_says_so_in_one_line(value):
    switch = read_switch({"SD_PLUGIN": value})
    assert (switch.enabled, switch.replace, switch.mode) == (True, False, None)
    assert repr(value) in switch.problem
    assert "\n" not in switch.problem
    assert all(mode in switch.problem for mode in MODES)


def test_switches_compare_by_value():
    assert Switch(True, True, "random") != Switch(True, True)
    assert len({Switch(True, False), Switch(True, False)}) == 1
    assert "mode='random'" in repr(Switch(True, True, "random"))


def test_targets_default_to_every_host_but_torch():
    assert read_switch({"SD_PLUGIN": "1"}).targets == DEFAULT_TARGETS
    assert set(TARGETS) - set(DEFAULT_TARGETS) == {"torch"}
    assert not read_switch({"SD_PLUGIN": "1"}).replaces("torch")


@pytest.mark.parametrize("text", ["torch", " Torch ,", "torch,torch"])
def test_targets_are_named_in_a_list(text):
    switch = read_switch({"SD_PLUGIN": "nr_st", "SD_PLUGIN_TARGETS": text})
    assert switch.targets == ("torch",)
    assert switch.replaces("torch")
    assert not switch.replaces("opennmt")
    assert switch.problem is None


def test_an_unknown_target_is_told_and_the_others_hold():
    switch = read_switch({"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "keras,fastai"})
    assert switch.targets == ("fastai",)
    assert "keras" in switch.problem
    assert all(name in switch.problem for name in TARGETS)


def test_targets_alone_replace_nothing():
    assert not read_switch({"SD_PLUGIN_TARGETS": "torch"}).replaces("torch")
    assert not read_switch({"SD_PLUGIN": "0", "SD_PLUGIN_TARGETS": "torch"}).replaces("torch")


def test_targets_name_the_patches():
    from sd_plugin import patches

    assert sorted(host.target for host in patches.registry().values()) == sorted(TARGETS)


def test_a_case_and_a_recurrent_dropout_are_read():
    assert read_case({}) is None
    assert read_case({"SD_PLUGIN_CASE": " iv "}) == "IV"
    assert read_recurrent_dropout({"SD_PLUGIN_RECURRENT_DROPOUT": " "}) is None
    assert read_recurrent_dropout({"SD_PLUGIN_RECURRENT_DROPOUT": "0.25"}) == 0.25


@pytest.mark.parametrize("text", ["V", "3", "III,IV"])
def test_no_case(text):
    with pytest.raises(ValueError, match=f"{text!r}.*I, II, III, IV"):
        read_case({"SD_PLUGIN_CASE": text})


@pytest.mark.parametrize("text", ["1", "-0.1", "half", "nan"])
def test_no_probability(text):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        read_recurrent_dropout({"SD_PLUGIN_RECURRENT_DROPOUT": text})
