"""The hook and the hosts: when a patch is told, and what is left of the hook in the host afterwards."""

from __future__ import annotations

import textwrap

import pytest

CALLS = "from sd_plugin.patches.opennmt import calls"


def test_a_host_module_imported_later_is_told_of_once(hosted):
    done = hosted.script(f"""
        import onmt, onmt.bin.train
        import onmt
        {CALLS}
        print(*calls)
    """)
    assert (done.stdout, done.stderr) == ("onmt onmt.bin.train\n", "")


def test_the_patch_is_not_loaded_before_its_host(hosted):
    hosted.script("""
        import json, sys
        assert "sd_plugin.patches" not in sys.modules
        import onmt
        assert "sd_plugin.patches.opennmt" in sys.modules
    """)


def test_the_patch_sees_a_complete_module(hosted):
    hosted.write("sd_plugin/patches/opennmt.py", "def on_import(module): print(module.value)")
    assert hosted.script("import onmt").stdout == "1\n"


def test_host_modules_imported_before_are_told_of_parents_first(hosted):
    done = hosted.script(f"""
        from sd_plugin import _autoload
        _autoload.uninstall()
        import onmt.bin.train
        _autoload.install()
        _autoload.install()
        import onmt.bin.train
        {CALLS}
        print(*calls)
    """)
    assert (done.stdout, done.stderr) == ("onmt onmt.bin.train\n", "")


def test_installing_twice_adds_one_finder_and_uninstalling_removes_it(hosted):
    hosted.script("""
        import sys
        from sd_plugin import _autoload
        _autoload.install()
        assert sys.meta_path.count(_autoload._finder) == 1
        _autoload.uninstall()
        _autoload.uninstall()
        assert _autoload._finder not in sys.meta_path
    """)


def test_switched_off_the_patch_is_never_loaded(hosted):
    hosted.script("import onmt, sys; assert 'sd_plugin.patches' not in sys.modules", SD_PLUGIN="0")


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ("def on_import(module):\n    raise RuntimeError('first\\nsecond')", "RuntimeError: first second"),
        (
            "import sd_plugin.errors as e\ndef on_import(module):\n    raise e.UsageError('bad option')",
            "UsageError: bad option",
        ),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: ("),
        ("class Own(BaseException): ...\ndef on_import(module): raise Own('x')", "Own: x"),
        (
            "class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute",
            "Mute (",
        ),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def on_import(module:", "SyntaxError: "),
        ("", "AttributeError: "),
    ],
)
def test_a_failing_patch_is_one_line_and_the_host_imports(hosted, patch, reason):
    hosted.write("sd_plugin/patches/opennmt.py", patch)
    done = hosted.script("import onmt, onmt.bin.train; print(onmt.value)")
    assert done.stdout == "1\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sd-plugin: onmt not patched: {reason}")


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "Own"])
def test_what_strikes_while_a_patch_is_told_is_the_programs(hosted, raised):
    """Ctrl-C, or the time limit of a test: handlers raise it wherever the program is."""
    hosted.write("sd_plugin/patches/opennmt.py", "import os\ndef on_import(module): os.kill(os.getpid(), 10)\n")
    done = hosted.script(f"""
        import signal

        class Own(BaseException): ...

        def handle(number, frame):
            raise {raised}

        signal.signal(10, handle)
        try:
            import onmt
        except {raised}:
            print("caught")
    """)
    assert (done.stdout, done.stderr) == ("caught\n", "")


def test_the_default_interrupt_passes_too(hosted):
    hosted.write("sd_plugin/patches/opennmt.py", "import os\ndef on_import(module): os.kill(os.getpid(), 2)\n")
    done = hosted.script("""
        import signal
        signal.signal(2, signal.default_int_handler)
        try:
            import onmt
        except KeyboardInterrupt:
            print("caught")
    """)
    assert (done.stdout, done.stderr) == ("caught\n", "")


def test_the_line_about_a_failing_patch_names_the_place(hosted):
    hosted.write("sd_plugin/patches/opennmt.py", "def on_import(module):\n    1 / 0\n")
    assert hosted.script("import onmt").stderr.rstrip().endswith("opennmt.py:2)")


def test_a_host_that_fails_to_import_fails_as_ever_and_its_patch_is_not_told(hosted):
    hosted.write("onmt/__init__.py", "raise KeyError('broken host')")
    done = hosted.script(f"""
        try:
            import onmt
        except KeyError as error:
            print(error)
        {CALLS}
        print(calls)
    """)
    assert (done.stdout, done.stderr) == ("'broken host'\n[]\n", "")


def test_a_missing_host_is_missing(bare, installed):
    code = textwrap.dedent("""
        try:
            import onmt
        except ModuleNotFoundError as error:
            print(error, error.name)
    """)
    assert installed.script(code).stdout == bare.script(code).stdout


def test_reloading_tells_again(hosted):
    done = hosted.script(f"""
        import importlib, onmt, onmt.bin.train
        importlib.reload(onmt)
        importlib.reload(onmt.bin.train)
        {CALLS}
        print(*calls)
        assert type(onmt.__loader__).__name__ == "SourceFileLoader"
    """)
    assert (done.stdout, done.stderr) == ("onmt onmt.bin.train onmt onmt.bin.train\n", "")


def test_the_host_is_left_with_its_own_loader(hosted):
    hosted.write("onmt/__init__.py", "own = __loader__, __spec__.loader\nclass Thing:\n    pass\n")
    hosted.write("onmt/data.txt", "resource")
    hosted.script("""
        import importlib.resources, inspect, pickle, pkgutil
        from importlib.machinery import SourceFileLoader
        import onmt
        for loader in (*onmt.own, onmt.__loader__, onmt.__spec__.loader):
            assert type(loader) is SourceFileLoader
        assert onmt.__spec__.loader.is_package("onmt")
        assert onmt.__spec__.submodule_search_locations
        assert "class Thing" in inspect.getsource(onmt.Thing)
        assert "own = " in inspect.getsource(onmt)
        assert importlib.resources.files("onmt").joinpath("data.txt").read_text() == "resource"
        assert pkgutil.get_data("onmt", "data.txt") == b"resource"
        assert isinstance(pickle.loads(pickle.dumps(onmt.Thing())), onmt.Thing)
    """)


def test_looking_at_a_host_without_importing_it_works(hosted):
    done = hosted.script(f"""
        import copy, importlib.util, sys
        spec = importlib.util.find_spec("onmt")
        assert "value = 1" in spec.loader.get_source("onmt")
        assert spec.loader.is_package("onmt") and spec.loader.get_code("onmt")
        assert spec.loader.path == spec.origin
        copy.copy(spec.loader)
        assert "onmt" not in sys.modules
        onmt = importlib.util.module_from_spec(spec)
        sys.modules["onmt"] = onmt
        spec.loader.exec_module(onmt)
        {CALLS}
        print(*calls, onmt.value)
    """)
    assert done.stdout == "onmt 1\n"


def test_a_host_module_can_be_run_as_a_program(hosted):
    hosted.write(
        "onmt/bin/train.py",
        """
        import inspect, sys
        from sd_plugin.patches.opennmt import calls

        def function():
            pass

        assert "def function" in inspect.getsource(function)
        assert __loader__.get_source("onmt.bin.train") == inspect.getsource(sys.modules[__name__])
        print(__name__, *calls)
        """,
    )
    done = hosted.run("-m", "onmt.bin.train")
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ onmt\n", "")


def test_a_lazily_loaded_host_is_told_of(hosted):
    done = hosted.script(f"""
        import importlib.util, sys
        spec = importlib.util.find_spec("onmt")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        onmt = sys.modules["onmt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(onmt)
        assert "sd_plugin.patches" not in sys.modules
        print(onmt.value)
        {CALLS}
        print(*calls)
    """)
    assert done.stdout == "1\nonmt\n"


def test_a_finder_that_searches_again_from_the_top_gets_along(hosted):
    done = hosted.script(f"""
        import importlib.util, sys

        class Searching:
            busy = False

            def find_spec(self, name, path=None, target=None):
                if self.busy or name != "onmt":
                    return None
                self.busy = True
                try:
                    return importlib.util.find_spec(name)
                finally:
                    self.busy = False

        {CALLS}
        for position in (0, 1):
            searching = Searching()
            sys.meta_path.insert(position, searching)
            import onmt
            assert type(onmt.__loader__).__name__ == "SourceFileLoader"
            del sys.modules["onmt"]
            sys.meta_path.remove(searching)
        print(*calls)
    """)
    assert done.stdout == "onmt onmt\n"


def test_a_stray_folder_of_the_hosts_name_is_no_host(installed, tmp_path):
    (tmp_path / "onmt").mkdir()
    code = "import onmt, sys; assert 'sd_plugin.patches' not in sys.modules"
    done = installed.run("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_importing_at_once_get_a_told_host_once(hosted):
    hosted.write("onmt/__init__.py", "import time\ntime.sleep(0.2)\nvalue = 1\n")
    done = hosted.script(f"""
        import threading
        from sd_plugin import _autoload

        def use():
            _autoload.install()
            import onmt
            {CALLS}
            assert calls == ["onmt"], calls
            done.append(onmt.value)

        done = []
        threads = [threading.Thread(target=use) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(done))
    """)
    assert (done.stdout, done.stderr) == ("8\n", "")


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_child_processes_are_hooked(hosted, tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import multiprocessing

            def child():
                import onmt
                {CALLS}
                print(*calls, flush=True)

            if __name__ == "__main__":
                process = multiprocessing.get_context({method!r}).Process(target=child)
                process.start()
                process.join()
                raise SystemExit(process.exitcode)
        """)
    )
    done = hosted.run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "onmt\n", "")


def test_every_hooked_module_is_declared_by_the_patch_of_its_host():
    from sd_plugin import patches
    from sd_plugin._autoload import ADDITIVE, HOOKS

    declared = {f"sd_plugin.patches.{name}": host.modules for name, host in patches.registry().items()}
    hooked: dict[str, list[str]] = {}
    for module, patch in HOOKS.items():
        hooked.setdefault(patch, []).append(module)
    assert {patch: sorted(modules) for patch, modules in hooked.items()} == {
        patch: sorted(modules) for patch, modules in declared.items()
    }
    assert set(ADDITIVE) <= set(declared)


def test_parents_are_hooked_before_their_children():
    from sd_plugin._autoload import HOOKS

    order = list(HOOKS)
    for name in order:
        parent = name.partition(".")[0]
        assert parent not in HOOKS or order.index(parent) <= order.index(name)


@pytest.mark.parametrize(
    ("environ", "reached"),
    [
        ({}, False),
        ({"SD_PLUGIN": "1"}, True),
        ({"SD_PLUGIN": "nr_st"}, True),
        ({"SD_PLUGIN": "0"}, False),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "opennmt"}, False),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "fastai, AWD_LSTM"}, True),
    ],
)
def test_a_host_to_be_replaced_is_reached_only_if_that_was_asked_for(hosted, environ, reached):
    hosted.write("weight_drop.py", "value = 1\n")
    hosted.write("sd_plugin/patches/awd_lstm.py", "def on_import(module): print('told of', module.__name__)\n")
    done = hosted.script("import weight_drop", **environ)
    assert done.stdout == ("told of weight_drop\n" if reached else "")


def test_any_program_on_torch_is_reached_only_by_name(hosted):
    hosted.write("torch/__init__.py", "value = 1\n")
    hosted.write("sd_plugin/patches/torch_nn/__init__.py", "def on_import(module): print('told of', module.__name__)\n")
    assert hosted.script("import torch", SD_PLUGIN="1").stdout == ""
    assert hosted.script("import torch", SD_PLUGIN="1", SD_PLUGIN_TARGETS="torch").stdout == "told of torch\n"


def test_installing_again_adds_what_the_environment_asks_for_by_then(hosted):
    hosted.write("weight_drop.py", "value = 1\n")
    hosted.write("sd_plugin/patches/awd_lstm.py", "def on_import(module): print('told of', module.__name__)\n")
    done = hosted.script("""
        import os, weight_drop
        from sd_plugin import _autoload
        os.environ["SD_PLUGIN"] = "1"
        _autoload.install()
        _autoload.install()
    """)
    assert done.stdout == "told of weight_drop\n"


def test_an_unknown_target_is_one_warning(hosted):
    done = hosted.script("import sys", SD_PLUGIN="1", SD_PLUGIN_TARGETS="opennmt,keras")
    (line,) = done.stderr.splitlines()
    assert "keras ignored" in line
    assert "awd_lstm" in line
