"""Reading SD_PLUGIN."""

import pytest

from sd_plugin._environment import MODES, Switch, read_switch


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
