"""The counters, the report, and the line at exit that shows a silent slow path."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import pytest
import torch

from sd_plugin import StructuredDropout, StructuredDropoutLSTM, StructuredLinear, report, stats
from sd_plugin.kernels import fallbacks

from ..forks import Forks
from ..more import more


def test_counts_of_a_product() -> None:
    """T=3, B=2, K=8 of which 6 are kept, N=5: forward, input gradient and weight gradient."""
    torch.manual_seed(0)
    x = torch.ones(3, 2, 8, requires_grad=True)
    layer = StructuredLinear(8, 5)
    y = layer(StructuredDropout(0.25, site="in")(x))
    site = stats.sites()["in"]
    assert (site.drawn, site.used, site.lost) == (1, 1, 0)
    assert (site.units, site.dropped) == (3 * 8, 3 * 2)
    assert (site.dense, site.skipped) == (3 * 2 * 5 * 8, 3 * 2 * 5 * 2)
    y.sum().backward()
    assert (site.dense, site.skipped) == (3 * 3 * 2 * 5 * 8, 3 * 3 * 2 * 5 * 2)


def test_counts_of_an_lstm() -> None:
    torch.manual_seed(0)
    lstm = StructuredDropoutLSTM(8, 4, bidirectional=True, recurrent_dropout=0.5, input_dropout=0.25, site="enc")
    # The input's gradient is computed only for who has one.
    lstm(torch.ones(3, 2, 8, requires_grad=True))[0].sum().backward()
    sites = stats.sites()
    assert set(sites) == {"enc.input", "enc.l0.recurrent", "enc.l0_reverse.recurrent"}
    rows, gates = 3 * 2, 4 * 4
    # Both directions multiply the input, each three times: FP, BP and WG.
    assert (sites["enc.input"].drawn, sites["enc.input"].used) == (1, 1)
    assert sites["enc.input"].dense == 2 * 3 * rows * gates * 8
    assert sites["enc.input"].skipped == 2 * 3 * rows * gates * 2
    for name in ("enc.l0.recurrent", "enc.l0_reverse.recurrent"):
        assert sites[name].dense == 3 * rows * gates * 4
        assert sites[name].skipped == 3 * rows * gates * 2
        assert sites[name].lost == 0


def test_random_dropout_has_no_site() -> None:
    StructuredDropout(0.5, "I")(torch.ones(3, 2, 8))
    StructuredDropoutLSTM(8, 4, recurrent_dropout=0.5, input_dropout=0.5, mode="random")(torch.ones(3, 2, 8))
    assert not stats.sites()
    assert report() == f"{stats.TITLE}: no unit was dropped"


def test_report_has_a_row_per_site() -> None:
    torch.manual_seed(0)
    StructuredLinear(8, 5)(StructuredDropout(0.25, site="used")(torch.ones(3, 2, 8)))
    for _ in range(2):
        StructuredDropout(0.5, site="of no use")(torch.ones(3, 2, 8))
    fallbacks["gemm_fp", "cuda", "too small"] += 4
    title, head, used, unused, total, sampling, fallen = report().splitlines()
    assert re.fullmatch(rf"{stats.TITLE} \(backend: \w+\)", title)
    assert [part.strip() for part in head.split("  ") if part.strip()] == [
        "site", "patterns", "units dropped", "multiply-adds skipped", "nothing to gain", "hints lost",
    ]  # fmt: skip
    assert used.split() == ["used", "1", "25.0%", "25.0%", "0", "0"]
    assert unused.split() == ["of", "no", "use", "2", "50.0%", "-", "0", "2"]
    assert len(head) == len(used) == len(unused), "columns are aligned"
    assert total.strip() == "0.06 of 0.24 k multiply-adds of these products skipped (25.0%)"
    assert sampling.endswith("round((1 - p) · H) of H are kept at every step, here 4 of 8, 6 of 8")
    assert fallen.strip() == "4 calls of gemm_fp passed over backend cuda: too small"


def test_reset_forgets() -> None:
    StructuredDropout(0.5)(torch.ones(3, 2, 8))
    fallbacks["gemm_fp", "cuda", "too small"] += 1
    stats.reset()
    assert not stats.sites()
    assert not fallbacks


def test_bernoulli_counts_what_is_expected_to_drop() -> None:
    torch.manual_seed(0)
    StructuredDropout(0.25, sampling="bernoulli")(torch.ones(100, 1, 8))
    site = stats.sites()["dropout"]
    assert site.dropped / site.units == pytest.approx(0.25)


def test_a_share_that_is_not_p_is_explained() -> None:
    """Of 32 units, p = 0.3 drops 10, which is 31.2%."""
    StructuredDropout(0.3, site="in")(torch.ones(3, 2, 32))
    assert report().splitlines()[2].split()[2] == "31.2%"
    assert report().splitlines()[-1].endswith("here 22 of 32")
    stats.reset()
    StructuredDropout(0.3, sampling="bernoulli")(torch.ones(3, 2, 32))
    assert "of H are kept" not in report(), "its number of units differs from step to step"


def test_the_explanation_names_a_few_widths_only() -> None:
    for width in range(11, 19):
        StructuredDropout(0.5)(torch.ones(1, 1, width))
    assert report().splitlines()[-1].endswith("here 6 of 11, 6 of 12, 6 of 13, 7 of 14, 8 of 15, 8 of 16, …")


DROP = "y = sd_plugin.StructuredDropout(0.5, site='emb')(torch.ones(3, 2, 4))"
USE = "sd_plugin.StructuredLinear(4, 2)(y)"
SLOW = "sd-plugin: slow path taken: dropped tensors that reached no skipping product: "


@pytest.mark.parametrize(
    ("lines", "setting", "start", "count"),
    [
        *more(([DROP, USE], "", "", 0)),
        ([DROP, USE, DROP], "", f"{SLOW}emb 1 of 2; backend fallbacks: 0", 1),
        *more(
            ([DROP, "sd_plugin.stats.reset()", DROP], "0", f"{SLOW}emb 1 of 1;", 1),
            ([DROP, USE, "sd_plugin.stats.fallbacks['gemm_fp', 'cuda', 'x'] = 3"], "", f"{SLOW}no hint lost; ", 1),
        ),
        ([DROP, USE], "1", f"{stats.TITLE} (backend: ", 5),
        *more((["sd_plugin.stats.reset()"], "1", "", 0), ([DROP, "sd_plugin.report()"], "1", "", 0)),
    ],
    ids=["used", "lost", "lost after a reset", "fallback", "asked for", "nothing to tell", "told before"],
)  # fmt: skip
def test_what_is_told_at_exit(fork: Forks, lines: list[str], setting: str, start: str, count: int) -> None:
    program = textwrap.dedent(
        """
        import torch
        import sd_plugin
        import sd_plugin.stats
        """
    ) + "\n".join(lines)
    done = fork("-c", [program], cwd=Path.cwd(), env={**os.environ, "SD_PLUGIN_REPORT": setting})
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == count
    assert done.stderr.startswith(start)
    assert done.stdout == ""
