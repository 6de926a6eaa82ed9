"""The report says what the workdirs hold, stands alone as one file, and refuses what is no run."""

import html.parser
import json
import logging
import math
import re

import numpy as np
import pytest

from mlm_jax.config import Config, EvaluationConfig, OptimizerConfig, StageConfig, TokenizerConfig, to_dict
from mlm_jax.errors import MachineError, UserError
from mlm_jax.report import write_report
from mlm_jax.report.charts import Curve, _thin
from mlm_jax.train.writer import METRICS_FILE, MetricWriter

STAGES = (StageConfig(steps=40, seq_len=128, batch_size=8), StageConfig(steps=20, seq_len=512, batch_size=4))
PROBE = "Paris is in [MASK]."
CONTINUATION = {"token": "s", "begins_word": False, "probability": 0.25}


def workdir(path, *, evaluate=True, last_step=60, own=(), **fields):
    """A run of two stages, logged every ten steps and evaluated every twenty."""
    cfg = Config(**{"name": "tiny", "stages": STAGES, **fields})
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(cfg)))
    with MetricWriter(path, cfg, 0, is_primary=True) as writer:
        for step in range(10, last_step + 1, 10):
            values = {"loss": 9 - step / 20, "accuracy": step / 200, "learning_rate": 1e-3, "grad_norm": 1.0}
            values |= {
                "tokens_per_second": 1000.0,
                "mfu": 0.25,
                "fill_rate": 0.5,
                "skipped": 0,
                "stage": int(step > 40),
            } | dict(own)
            if step == 30:
                values |= {"loss": math.nan, "grad_norm": math.inf, "skipped": 2}
            writer.write(step, "train", values)
            if evaluate and step % 20 == 0:
                loss = 8 - step / 20
                values = {"loss": loss, "perplexity": math.exp(loss), "accuracy": step / 250}
                values |= {"unigram_loss": 6.5, "unigram_accuracy": 0.0625, "tokens": 1000}
                fills = [[{"token": f"at{step}", "begins_word": True, "probability": 0.5}, CONTINUATION]]
                writer.write(step, "eval", {**values, "probes": [{"text": PROBE, "fills": fills}]})
    return path


def report(tmp_path, *workdirs):
    out = tmp_path / "new folder" / "report.html"
    write_report(workdirs, out)
    return out.read_text(encoding="utf-8")


def text_of(page):
    """What a reader sees, in one line."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


class Balance(html.parser.HTMLParser):
    """Fails at a tag that closes another element than the last one opened."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_the_headline_is_the_last_evaluation_beside_its_baseline(tmp_path):
    text = text_of(report(tmp_path, workdir(tmp_path / "a")))
    assert "tiny 4 layers of 256, vocabulary 8,192" in text
    assert f"5.000 unigram 6.500 {math.exp(5):.1f} unigram 665 24.0% unigram 6.2%" in text
    # 40 steps of 8 rows of 128 and 20 of 4 rows of 512, half full, at 1,000 tokens a second.
    assert "41k rows 50.0% full 1k MFU 25.0% 41 s without evaluation 60 of 60" in text
    assert "2 updates were skipped" in text


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    page = report(tmp_path, workdir(tmp_path / "a"), workdir(tmp_path / "b"))
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "default-src 'none'" in page
    for loading in (
        "<script",
        "<link",
        "<img",
        "<iframe",
        "@import",
        "src=",
        'href="http',
        "url(http",
        "<!DOCTYPE svg",
    ):
        assert loading not in page
    assert page.count("<svg role") == 5


def test_losses_and_metrics_of_an_objective_have_charts_of_their_own(tmp_path):
    plain = report(tmp_path, workdir(tmp_path / "plain"))
    spans = workdir(tmp_path / "spans", own={"sbo": 7.5, "sbo_accuracy": 0.125})
    both = report(tmp_path, tmp_path / "plain", spans)
    assert "Sbo" not in plain
    assert both.count("<h3>Sbo</h3>") == both.count("<h3>Sbo accuracy</h3>") == 1


def test_charts_take_their_colours_from_the_page(tmp_path):
    page = report(tmp_path, workdir(tmp_path / "a"), workdir(tmp_path / "b"))
    body = page[page.index("<body>") :]
    assert re.findall(r"#[0-9a-f]{6}\b", re.sub(r'"#\w+"', "", body)) == []
    assert {"var(--run0)", "var(--run1)", "var(--baseline)"} <= set(re.findall(r"var\(--\w+\)", body))


def test_the_same_runs_give_the_same_page(tmp_path):
    runs = [workdir(tmp_path / "a"), workdir(tmp_path / "b")]
    assert report(tmp_path, *runs) == report(tmp_path, *runs)


def test_names_tokens_and_texts_are_shown_and_not_interpreted(tmp_path):
    run = workdir(tmp_path / "a", name="<script>x</script>")
    fills = [[{"token": "<i>", "probability": 0.9}]]
    record = {"step": 60, "kind": "eval", "loss": 1.0, "probes": [{"text": "a < [MASK] & b", "fills": fills}]}
    with open(run / METRICS_FILE, "a") as file:
        file.write(json.dumps(record) + "\n")
    page = report(tmp_path, run)
    assert "<script" not in page
    assert "&lt;i&gt;" in page
    assert "a &lt; <b>[MASK]</b> &amp; b" in page


def test_filled_masks_are_listed_by_step_with_continued_words_marked(tmp_path):
    text = text_of(report(tmp_path, workdir(tmp_path / "a")))
    assert "Paris is in [MASK] . step 20 at20 50% - s 25% 40 at40 50% - s 25% 60 at60 50% - s 25%" in text


def test_long_runs_show_their_first_and_last_fills_and_some_between(tmp_path):
    stages = (StageConfig(steps=2000), StageConfig(steps=1))
    text = text_of(report(tmp_path, workdir(tmp_path / "a", stages=stages, last_step=2000)))
    steps = [int(step) for step in re.findall(r" at(\d+) 50%", text)]
    assert steps[0] == 20
    assert steps[-1] == 2000
    assert len(steps) == 8
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 20  # even, to one evaluation


def test_runs_side_by_side_are_told_apart_and_their_differences_marked(tmp_path):
    first = workdir(tmp_path / "slow")
    second = workdir(tmp_path / "fast", optimizer=OptimizerConfig(learning_rate=5e-3))
    page = report(tmp_path, first, second)
    text = text_of(page)
    assert text.index("slow") < text.index("fast")
    assert "what differs slow fast optimizer.learning_rate 0.0001 0.005 What they share" in text
    assert "<td>0.0001</td><td class=changed>0.005</td>" in page
    assert "different units" not in text
    assert page.count("stroke-dasharray: ") == 2  # one baseline in each of two charts: the text is the same


def test_runs_on_other_text_keep_their_own_baselines_and_a_warning(tmp_path):
    second = workdir(tmp_path / "b", name="other", tokenizer=TokenizerConfig(vocab_size=4096))
    page = report(tmp_path, workdir(tmp_path / "a"), second)
    assert "Losses per token then have different units" in page
    assert page.count("stroke-dasharray: ") == 4


def test_equal_configurations_are_said_to_be_equal(tmp_path):
    assert "the same configuration" in report(tmp_path, workdir(tmp_path / "a"), workdir(tmp_path / "b"))


def test_a_run_in_progress_without_evaluation_is_shown_as_far_as_it_is(tmp_path):
    page = report(tmp_path, workdir(tmp_path / "a", evaluate=False, last_step=10))
    text = text_of(page)
    assert "tiny has not been evaluated yet" in text
    assert "10 so far, of 60" in text
    assert "unigram baseline" not in text
    assert "Filled masks" not in text
    assert page.count("<svg role") == 5


def test_a_torn_line_is_left_out_and_said(tmp_path, caplog):
    run = workdir(tmp_path / "a")
    whole = report(tmp_path, run)
    with open(run / METRICS_FILE, "a") as file:
        file.write('{"step": 70, "kind": "tra')
    with caplog.at_level(logging.WARNING):
        assert report(tmp_path, run) == whole
    assert "1 unreadable" in caplog.text


def test_what_is_no_run_is_refused(tmp_path):
    run = workdir(tmp_path / "a")
    with pytest.raises(UserError, match=r"no config\.json"):
        write_report([run, tmp_path / "nowhere"], tmp_path / "out.html")
    with pytest.raises(UserError, match="1 to 8 runs, not 9"):
        write_report([run] * 9, tmp_path / "out.html")
    with pytest.raises(UserError, match=r"is a folder: name the HTML file to write, as in .*report\.html"):
        write_report([run], tmp_path)
    (run / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match="holds no measurement yet"):
        write_report([run], tmp_path / "out.html")
    (run / METRICS_FILE).unlink()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        write_report([run], tmp_path / "out.html")
    (run / "config.json").write_text("{")
    with pytest.raises(MachineError, match="damaged"):
        write_report([run], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_a_long_curve_is_thinned_by_means_over_what_was_measured():
    values = [None if step % 2 else float(step) for step in range(100_000)]
    values[:1000] = [None] * 1000
    steps, thinned = _thin(Curve(range(100_000), values, 0))
    assert len(steps) == 400
    assert np.isnan(thinned[:4]).all()
    np.testing.assert_allclose(thinned[4:], steps[4:], atol=1)


def test_probes_of_the_config_do_not_need_evaluations_of_all_runs(tmp_path):
    evaluation = EvaluationConfig(probes=(PROBE,))
    runs = workdir(tmp_path / "a"), workdir(tmp_path / "b", evaluate=False, evaluation=evaluation)
    assert "evaluation.probes" in report(tmp_path, *runs)
