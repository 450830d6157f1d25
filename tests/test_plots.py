"""The charts: what they say in which language, and a smoothed curve that does not lag."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure

from cllm import plots
from cllm.evaluate.results import Group, SystemScores
from cllm.plots import CHINESE_FONTS, draw_lengths, draw_loss, smoothed

TRAIN = [(step, 8 - step / 10) for step in range(1, 61)]


def test_the_smoothed_curve_follows_a_falling_loss() -> None:
    losses = [loss for _, loss in TRAIN]
    gaps = [abs(a - b) for a, b in zip(smoothed(losses), losses, strict=True)]
    assert max(gaps[20:40]) < 0.05 and max(gaps) < 0.5


def test_a_high_first_loss_is_soon_forgotten() -> None:
    assert smoothed([12.0] + [1.0] * 59)[20] < 1.1


@given(st.lists(st.floats(0, 20), min_size=1, max_size=300))
def test_the_smoothed_curve_stays_within_the_losses(losses: list[float]) -> None:
    curve = smoothed(losses)
    assert len(curve) == len(losses)
    assert min(losses) - 1e-9 <= min(curve) and max(curve) <= max(losses) + 1e-9


def test_noise_is_smoothed() -> None:
    curve = smoothed([1.0 + (-1) ** step * 0.5 for step in range(200)])
    assert max(curve[5:-5]) - min(curve[5:-5]) < 0.2


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the charts that are drawn say."""
    said: list[str] = []
    save = Figure.savefig

    def saving(self: Figure, target: Path) -> None:
        for axes in self.axes:
            said.extend([axes.get_xlabel(), axes.get_ylabel()])
            said.extend(axes.get_legend_handles_labels()[1])
        save(self, target)

    monkeypatch.setattr(Figure, "savefig", saving)
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    plots._chinese_font.cache_clear()
    return said


def draw(folder: Path) -> None:
    draw_loss(TRAIN, TRAIN[::20], folder / "loss.png")
    draw_lengths([1, 2, 30], folder / "lengths.png", "tokens", 20)


def list_fonts(fonts: list, known: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with these fonts, of which matplotlib has listed those that are `known`."""

    class Listing:
        get_default_size = staticmethod(font_manager.FontManager.get_default_size)
        ttflist = fonts

    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    monkeypatch.setattr(font_manager, "FontManager", Listing)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_without_a_chinese_font_the_charts_are_english(
    language: str, labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLM_LANG", language)
    latin = [font for font in font_manager.fontManager.ttflist if "DejaVu" in font.name]
    list_fonts(latin, latin, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path)
    assert len(labels) == 8 and all(label.isascii() and label for label in labels)


def test_with_a_chinese_font_the_charts_are_in_the_users_language(
    labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts = font_manager.FontManager().ttflist
    if not {font.name for font in fonts} & {*CHINESE_FONTS}:
        pytest.skip("no Chinese font here")
    list_fonts(fonts, [font for font in fonts if font.name not in CHINESE_FONTS], monkeypatch)
    monkeypatch.setenv("CLLM_LANG", "zh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks
        draw(tmp_path)
    assert len(labels) == 8 and not any(label.isascii() for label in labels)
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("chinese", [False, True])
def test_scores_are_named_in_the_users_language(
    chinese: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts = font_manager.FontManager().ttflist
    if chinese and not {font.name for font in fonts} & {*CHINESE_FONTS}:
        pytest.skip("no Chinese font here")
    plots._chinese_font.cache_clear()
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    monkeypatch.setenv("CLLM_LANG", "zh" if chinese else "en")
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, target: drawn.append(self))
    scores = dict.fromkeys(plots.PLOTTED, 50.0)
    group = {"1-4": Group(3, scores)}
    system = SystemScores(scores, {}, {}, {}, {}, group, {})
    plots.draw_scores({"base 4-shot": system, "adapter": system}, tmp_path / "scores.png")
    metrics, lengths = drawn[0].axes
    said = [label.get_text() for label in metrics.get_xticklabels()]
    said += [lengths.get_ylabel(), *metrics.get_legend_handles_labels()[1]]
    if chinese:
        names = ["语料\nBLEU", "ROUGE-L（字）", "逐条\nBLEU-4", "ROUGE-L（词）", "完全匹配"]
        assert said == [*names, "ROUGE-L（字）", "基座 4-shot", "适配器"]
    else:
        names = ["corpus\nBLEU", "ROUGE-L\ncharacters", "mean\nBLEU-4", "ROUGE-L\nwords", "exact"]
        assert said == [*names, "ROUGE-L characters", "base 4-shot", "adapter"]
