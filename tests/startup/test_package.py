"""The package's own namespace, and the front door of the patches."""

from __future__ import annotations

import pytest

import sd_plugin
import sd_plugin.patches
from sd_plugin.errors import UsageError


def test_every_public_name_is_listed():
    assert set(sd_plugin.__all__) == {"__version__", *sd_plugin._EXPORTS}
    assert set(sd_plugin.__all__) <= set(dir(sd_plugin))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        sd_plugin.no_such_name  # noqa: B018


def test_public_names_load_their_module_on_first_use(installed):
    installed.script("""
        import sys, sd_plugin
        assert "sd_plugin.errors" not in sys.modules
        assert sd_plugin.UsageError.__module__ == "sd_plugin.errors"
        from sd_plugin import UsageError
        assert UsageError is sd_plugin.UsageError
    """)


def test_a_public_name_is_not_shadowed_by_the_module_that_defines_it(installed):
    installed.write("sd_plugin/convert.py", "def convert(): return 'converted'\nother = 1\n")
    installed.script("""
        import sd_plugin
        from sd_plugin.convert import other
        import sd_plugin.convert, sd_plugin.errors
        assert sd_plugin.convert() == "converted"
        assert sd_plugin.errors.UsageError is sd_plugin.UsageError
        sd_plugin.convert = 3
        assert sd_plugin.convert == 3
    """)


@pytest.fixture
def standin(tmp_path, monkeypatch):
    (tmp_path / "standin.py").write_text(
        "NAME = 'Stand-in'\n"
        "calls = []\n"
        "def enable(**options): calls.append(options)\n"
        "def disable(): calls.append('disabled')\n"
    )
    (tmp_path / "_private.py").touch()
    monkeypatch.setattr(sd_plugin.patches, "__path__", [*sd_plugin.patches.__path__, str(tmp_path)])
    return "standin"


def test_enable_and_disable_reach_the_host_module(standin):
    sd_plugin.enable(standin, mode="nr_st")
    sd_plugin.disable(standin)
    from sd_plugin.patches.standin import calls

    assert calls == [{"mode": "nr_st"}, "disabled"]


def test_hosts_are_the_public_modules(standin):
    assert standin in sd_plugin.patches.hosts()
    assert not any(name.startswith("_") for name in sd_plugin.patches.hosts())


@pytest.mark.parametrize("host", ["no_such_host", "_private", ""])
def test_an_unknown_host_is_a_usage_error_naming_the_valid_ones(standin, host):
    with pytest.raises(UsageError, match=f"unknown host '{host}'; valid: .*standin"):
        sd_plugin.enable(host)
    with pytest.raises(UsageError, match="standin"):
        sd_plugin.disable(host)
