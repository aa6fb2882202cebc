"""The ledger: verdicts follow from numbers, records cannot lie, the page is fresh, missing runs are made once."""
import json
import math
import multiprocessing
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handrecon import ledger as C
from handrecon.claims import (
    CONTROLS, GATE, WORDS, Claim, Measured, Run, all_of, close, command, half_of, interval, not_comparable, ordering, ratio_at_least, ratio_at_most, student_factor, student_share, weigh, within)
from handrecon.ledger import (
    all_claims, expected_config, find_claims, ledger_row, measure, missing_runs, page, read_record, read_records, record_path, run_claim, update)
from handrecon.runs import RunError, config_hash

ROOT = Path(__file__).parent.parent
NUMBER = st.floats(0.1, 100)
SEEDED = st.lists(NUMBER, min_size=1, max_size=5).map(lambda x: Measured(dict(enumerate(x))))

TOY = Claim(
    id="toy", system="s2hand", sentence="A | B", where="Table 0", paper={"a, mm": 12.0, "b, mm": 13.0, "c": "better"}, seeds=3,
    runs=(Run("with", "smoke"), Run("without it", "smoke", {"w_ori": 0.0, "backbone": "small"})),
    ours={"a, mm": "with:self-supervised/PA-MPJPE", "b, mm": "without it:self-supervised/PA-MPJPE"}, verdict=ordering("a, mm", "b, mm"), seconds=5)


def fake(system, profile, dataset, data_root, overrides, out, seed, resume):
    "Stands in for `reproduce`."
    error = (11.0 if overrides else 10.0) + 0.1 * seed
    return C.runs.describe(system, profile, dataset, seed, C.runs.resolve(system, profile, overrides)) | {
        "version": "0", "commit": "e" * 40 + "+changes", "device": "cpu", "seconds": 3.0, "metrics": {"self-supervised": {"PA-MPJPE": error}}, "data_root": "/secret"}


@pytest.fixture
def done(tmp_path, monkeypatch):
    "A ledger whose toy claim is complete."
    monkeypatch.setattr(C, "reproduce", fake)
    assert run_claim(TOY, tmp_path / "results", tmp_path / "runs", say=lambda _: None) == []
    return tmp_path / "results"


# ── judges ──────────────────────────────────────────────────────────────────

@given(SEEDED)
def test_mean_and_spread(m):
    import statistics
    values = list(m.values.values())
    assert m.mean == pytest.approx(sum(values) / len(values))
    assert math.isnan(m.spread) if len(values) == 1 else m.spread == pytest.approx(statistics.stdev(values))


@given(SEEDED, SEEDED)
def test_ordering_cannot_hold_both_ways(a, b):
    words = {ordering("a", "b")({"a": a, "b": b}).word, ordering("b", "a")({"a": a, "b": b}).word}
    assert words & {"not reproduced", "contradicted"} and words <= set(WORDS[:4])
    if "contradicted" in words: assert "reproduced" in words      # one way is contradicted exactly where the other is shown


@given(SEEDED, SEEDED)
def test_one_seed_is_never_enough(a, b):
    first = {"a": Measured({0: a.values[0]}), "b": Measured({0: b.values[0]})}
    for judge in (ordering("a", "b"), ratio_at_most("a", "b", 1.1), ratio_at_least("a", "b", 0.9), within("a", 0, 1000), close("a", "b", 1000)):
        assert judge(first).word != "reproduced" and "one seed" in judge(first).because


@given(SEEDED, NUMBER, st.sampled_from([0.25, 2.0, 1024.0]))
def test_verdicts_do_not_depend_on_the_unit(a, shift, unit):
    ours = {"a": a, "b": Measured({s: v + shift for s, v in a.values.items()})}
    other = {label: Measured({s: v * unit for s, v in m.values.items()}) for label, m in ours.items()}   # a power of two: exact
    for judge in (ordering("a", "b"), ratio_at_most("a", "b", 0.7), ratio_at_least("a", "b", 0.7)):
        assert judge(ours).word == judge(other).word


@pytest.mark.parametrize("a, b, word", [
    ([10, 14, 12], [11, 15, 13], "reproduced"),          # seeds differ more than the two do, but in the same way
    ([10, 10, 10], [11, 11, 9.9], "direction only"),     # one seed says no
    ([10, 10, 10], [10.1, 10.1, 14], "direction only"),  # the interval holds zero
    ([10, 10], [99, 99], "direction only"), ([99, 99], [10, 10], "not reproduced"),      # two seeds decide nothing, either way
    ([10], [99], "direction only"), ([10, 10], [10, 10], "not reproduced"), ([11, 11, 11], [10, 10, 10], "contradicted"),
    ([10, 10, 10], [10, 10, 10], "not reproduced"), ([10, 10, 10], [9, 9, 10.9], "not reproduced")])
def test_ordering(a, b, word):
    verdict = ordering("a", "b")({"a": Measured(dict(enumerate(a))), "b": Measured(dict(enumerate(b)))})
    assert verdict.word == word and "b − a" in verdict.because


@pytest.mark.parametrize("judge, word", [
    (ratio_at_most("a", "b", 0.9), "reproduced"), (ratio_at_most("a", "b", 0.5), "direction only"), (ratio_at_most("b", "a", 0.9), "contradicted"),
    (ratio_at_most("b", "a", 1.35), "reproduced"), (ratio_at_most("b", "a", 1.1), "contradicted"), (ratio_at_most("b", "a", 1.26), "direction only"),
    (ratio_at_least("b", "a", 1.24), "direction only"), (ratio_at_least("b", "a", 1.1), "reproduced"), (ratio_at_least("b", "a", 3), "direction only"), (ratio_at_least("a", "b", 1), "contradicted"),
    (half_of("a", "b", 0.8), "reproduced"), (half_of("b", "a", 1.25), "reproduced"), (half_of("a", "b", 0.5), "direction only"),
    (within("a", 7, 9), "reproduced"), (within("a", high=8.0), "direction only"), (within("a", low=9), "contradicted"),
    (close("a", "b", 2.5), "reproduced"), (close("a", "b", 1), "contradicted"), (not_comparable("no"), "not comparable"),
    (all_of(within("a", 7, 9), ratio_at_most("a", "b", 0.5)), "direction only"), (all_of(within("a", 7, 9), within("z")), "not run")])
def test_judges(judge, word):
    ours = {"a": Measured({0: 8.1, 1: 7.8, 2: 8.0}), "b": Measured({0: 10.0, 1: 9.8, 2: 10.1})}
    assert judge(ours).word == word, judge(ours)
    assert "inf" not in judge(ours).because


@given(st.integers(1, 60), st.floats(0.01, 30))
def test_student_s_distribution_is_scipy_s(freedom, t):
    stats = pytest.importorskip("scipy.stats")
    assert student_share(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)
    assert student_factor(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6))
def test_intervals_are_scipy_s(values):
    stats = pytest.importorskip("scipy.stats")
    low, high = interval(dict(enumerate(values)))
    half = stats.t.ppf(0.975, len(values) - 1) * Measured(dict(enumerate(values))).spread / len(values) ** 0.5
    assert high - low == pytest.approx(2 * half, abs=1e-9) and low <= high


@given(SEEDED, st.floats(0.01, 10))
def test_more_of_the_same_never_weakens_a_word(m, amount):
    "Every seed twice: the interval shrinks around the same mean, so a shown thing stays shown."
    twice = dict(enumerate([*m.values.values()] * 2))
    region = (amount, math.inf)
    before, after = weigh(m.values, region, (0.0, math.inf)), weigh(twice, region, (0.0, math.inf))
    if before in ("reproduced", "contradicted"): assert after == before


def test_numbers_without_a_ratio_are_not_comparable():
    ours = {"a": Measured({0: -1.0, 1: 1.0, 2: 1.0}), "b": Measured({0: 2.0, 1: 2.0, 2: 2.0})}
    for judge in (ratio_at_most("a", "b", 0.9), ratio_at_least("b", "a", 1.1)): assert judge(ours).word == "not comparable"


def test_only_common_seeds_count():
    verdict = ordering("a", "b")({"a": Measured({0: 1.0, 1: 50.0}), "b": Measured({0: 2.0, 2: 3.0})})
    assert verdict.word == "direction only" and "one seed" in verdict.because
    assert ordering("a", "b")({"a": Measured({0: 1.0}), "b": Measured({1: 2.0})}).word == "not run"


# ── the gate ────────────────────────────────────────────────────────────────

def _gated(claim, results):
    row = ledger_row(claim, results)
    return row["verdict"], row["gate"]


def test_networks_like_the_mean_pose_are_not_judged(done):
    own = "with:self-supervised/PA-MPJPE"
    assert _gated(TOY, done)[0] == "reproduced"
    word, gate = _gated(replace(TOY, learned={own: "without it:self-supervised/PA-MPJPE"}), done)     # 10 of 11 mm
    assert word == "direction only" and gate["ratio"] > GATE
    backwards = replace(TOY, learned={own: own}, verdict=ordering("b, mm", "a, mm"))
    row = ledger_row(backwards, done)
    assert row["verdict"] == "not reproduced" and "not called contradicted, since the networks have not learned enough" in row["because"]
    assert "**fails**" in page([row])
    absent = _gated(replace(TOY, learned={own: "with:mean pose/PA-MPJPE"}), done)
    assert absent[0] == "reproduced" and absent[1]["ratio"] is None


def test_a_judge_that_a_control_passes_reproduces_nothing(done):
    same = {label: TOY.ours[label] for label in TOY.ours}
    word, gate = _gated(replace(TOY, controls={"untrained": same}), done)
    assert word == "direction only" and gate["controls"]["untrained"] == "PASSES"
    word, gate = _gated(replace(TOY, controls={"mean pose": {label: TOY.ours["a, mm"] for label in TOY.ours}}), done)
    assert word == "reproduced" and gate["controls"] == {"mean pose": "fails, as it should", "untrained": "control not run", "copies": "fails, as it should"}
    alike = replace(TOY, verdict=close("a, mm", "b, mm", 5.0))
    assert _gated(alike, done)[1]["controls"]["copies"] == "PASSES"
    assert _gated(replace(alike, controls={"copies": "alike"}), done)[0] == "reproduced"


def test_controls_of_our_claims_name_labels_of_the_claim():
    for claim in all_claims():
        for name, control in claim.controls.items():
            if isinstance(control, dict): assert set(control) <= set(claim.ours) and name in CONTROLS, claim.id


def test_no_row_that_fails_its_gate_is_called_reproduced():
    for claim in all_claims():
        row = ledger_row(claim, ROOT / "handbook/results")
        if (row["gate"]["ratio"] or 0) > GATE or "PASSES" in row["gate"]["controls"].values(): assert row["verdict"] not in ("reproduced", "contradicted"), claim.id
        if row["verdict"] == "reproduced": assert max(len(m["seeds"]) for m in row["ours"].values()) >= 3, claim.id


# ── records ─────────────────────────────────────────────────────────────────

def test_record_of_the_command_is_accepted(done):
    path = record_path(done, TOY, TOY.runs[1], 1)
    record = read_record(path, expected_config(TOY, TOY.runs[1], 1))
    assert record["seed"] == 1 and set(record) == set(C.RECORD) and "/secret" not in path.read_text()
    assert sorted(p.name for p in done.glob("toy/*")) == [*(f"{name}-seed{seed}.json" for name in ("with", "without it") for seed in range(3))]


def _rehashed(record): return record | {"hash": config_hash({name: record[name] for name in C.FIELDS})}


def test_record_begun_with_other_weights_is_refused(tmp_path):
    claim = next(c for c in C.all_claims() if c.id == "video-accuracy")
    expected = expected_config(claim, claim.runs[0], 0)
    made = {"version": "0", "commit": "f" * 40, "device": "cpu", "seconds": 1.0, "metrics": {}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(expected | made))
    assert read_record(path, expected)["begins_with"] == expected["begins_with"]
    older = {k: v for k, v in expected.items() if k != "hash"} | {"begins_with": {"s2hand": "0123456789ab"}}
    path.write_text(json.dumps(older | {"hash": config_hash(older)} | made))
    with pytest.raises(RunError, match="begins_with.s2hand is \"0123456789ab\", now"): read_record(path, expected)


@pytest.mark.parametrize("damage, words", [
    (lambda r: r | {"hash": "0" * 12}, "changed by hand"),
    (lambda r: r | {"seed": 7}, "changed by hand"),
    (lambda r: _rehashed(r | {"profile": "quick"}), "profile is \"quick\", now \"smoke\""),
    (lambda r: _rehashed(r | {"settings": r["settings"] | {"n_eval": 1}}), "n_eval is 1, now"),
    (lambda r: _rehashed(r | {"settings": {k: v for k, v in r["settings"].items() if k != "turn"}}), "turn is absent, now"),
    (lambda r: _rehashed(r | {"settings": r["settings"] | {"gone": 1}}), "gone is 1, now absent"),
    (lambda r: {k: v for k, v in r.items() if k != "commit"}, "no commit"), (lambda r: [], "something else"), (lambda r: "text", "something else")])
def test_record_that_lies_is_refused(done, damage, words):
    path = record_path(done, TOY, TOY.runs[0], 0)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(RunError) as problem: read_record(path, expected_config(TOY, TOY.runs[0], 0))
    assert words in str(problem.value) and str(path) in str(problem.value) and "expected" in str(problem.value) and "\n" not in str(problem.value)
    row = ledger_row(TOY, done)
    assert row["refused"] == [str(problem.value)] and row["records"] == 5
    assert row["verdict"] == "direction only" and "two seeds" in row["because"]      # the other seeds still count
    assert [(run.name, seed) for run, seed in missing_runs(TOY, done)] == [("with", 0)]


def test_record_that_is_no_json_is_refused(done):
    path = record_path(done, TOY, TOY.runs[0], 0)
    path.write_text(path.read_text()[:-9])
    assert "not JSON" in read_records(TOY, done)[1][0]


def test_a_metric_that_is_not_there_is_a_sentence(done):
    row = ledger_row(replace(TOY, ours={**TOY.ours, "b, mm": "without it:self-supervised/PA-MPJPEE"}), done)
    assert row["verdict"] == "not run" and "did you mean 'PA-MPJPE'?" in row["refused"][0]
    path = record_path(done, TOY, TOY.runs[0], 0)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"metrics": {"self-supervised": {"PA-MPJPE": math.nan}}}))
    assert "expected a number" in measure(TOY, read_records(TOY, done)[0])[1][0]


def test_no_records_no_verdict(tmp_path):
    row = ledger_row(TOY, tmp_path)
    assert (row["verdict"], row["ours"], row["records"]) == ("not run", {}, 0) and "none of its 6 runs" in row["because"] and row["command"] == "handrecon claims --run toy"
    gone = ledger_row(replace(TOY, runs=(Run("with", "smoek"), TOY.runs[1])), tmp_path)
    assert gone["verdict"] == "not run" and "did you mean 'smoke'?" in gone["because"]


@pytest.mark.parametrize("change, words", [
    (dict(id="Toy one"), "id"), (dict(seeds=0), "one seed"), (dict(runs=(Run("with"), Run("with"))), "once"), (dict(ours={"a": "wiht:x"}), "did you mean 'with'?")])
def test_claims_that_cannot_work(change, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")): replace(TOY, **change)


# ── running ─────────────────────────────────────────────────────────────────

def test_finished_runs_are_skipped_and_shared(done, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(C, "reproduce", lambda *a: calls.append(a) or fake(*a))
    said = []
    assert run_claim(TOY, done, tmp_path / "runs", say=said.append) == [] and not calls and "every record" in said[0]
    assert run_claim(replace(TOY, id="other"), done, tmp_path / "runs", say=said.append) == [] and not calls
    assert run_claim(TOY, done, tmp_path / "runs", seeds=4, say=said.append) == []
    assert [(a[4], a[6], a[7]) for a in calls] == [({}, 3, True), (TOY.runs[1].overrides, 3, True)]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fails_once(*a):
        if a[6] == 0 and not a[4]: raise RunError("the run stopped with OutOfMemory")
        return fake(*a)
    monkeypatch.setattr(C, "reproduce", fails_once)
    failures = run_claim(TOY, tmp_path / "results", tmp_path / "runs", say=lambda _: None)
    assert len(failures) == 1 and "OutOfMemory" in failures[0] and "with, seed 0" in failures[0]
    assert len(list((tmp_path / "results/toy").iterdir())) == 5


def _hold(folder, held, release):
    with C.alone(folder) as mine:
        assert mine
        held.set()
        release.wait(30)


def test_two_processes_do_not_make_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "reproduce", fake)
    folder = tmp_path / "runs" / f"s2hand-{expected_config(TOY, TOY.runs[0], 0)['hash']}"
    spawn = multiprocessing.get_context("fork")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(folder, held, release))
    other.start()
    assert held.wait(30)
    said = []
    assert run_claim(TOY, tmp_path / "results", tmp_path / "runs", say=said.append) == []
    assert any("another process" in line for line in said) and len(list((tmp_path / "results/toy").iterdir())) == 5
    release.set()
    other.join()
    assert run_claim(TOY, tmp_path / "results", tmp_path / "runs", say=said.append) == [] and len(list((tmp_path / "results/toy").iterdir())) == 6


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    "Killed half way, the run leaves no record and no lock; asked again, it goes on in the same folder."
    script = ("import time\nfrom pathlib import Path\nfrom handrecon import ledger as C\nfrom handrecon.claims import Claim, Run, within\n"
              "def half(system, profile, dataset, root, overrides, out, seed, resume):\n"
              "    (out / 'half').write_text('done')\n    time.sleep(60)\n"
              "C.reproduce = half\n"
              "claim = Claim('toy', 's2hand', 's', 'w', {}, (Run('with', 'smoke'),), 1, {'a': 'with:x'}, within('a'))\n"
              "C.run_claim(claim, Path('results'), Path('runs'))")
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("runs/*/half")) and process.poll() is None: time.sleep(0.05)
        process.kill()
    folder, = tmp_path.glob("runs/*")
    assert not (tmp_path / "results").exists() and (folder / "half").exists()
    calls = []
    monkeypatch.setattr(C, "reproduce", lambda *a: calls.append(a) or fake(*a))
    claim = replace(TOY, runs=TOY.runs[:1], seeds=1, ours={"a, mm": TOY.ours["a, mm"]})
    assert run_claim(claim, tmp_path / "results", tmp_path / "runs", say=lambda _: None) == []
    assert [(a[5], a[7]) for a in calls] == [(folder, True)]


def test_a_run_finished_by_other_code_begins_anew(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(C, "reproduce", lambda *a: calls.append(a) or fake(*a))
    config = expected_config(TOY, TOY.runs[0], 0)
    folder = tmp_path / "runs" / f"s2hand-{config['hash']}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(config | {"code": "older"}))
    run_claim(replace(TOY, seeds=1), tmp_path / "results", tmp_path / "runs", say=lambda _: None)
    assert [a[7] for a in calls] == [False, True]


# ── the page ────────────────────────────────────────────────────────────────

def test_page_shows_what_a_reader_needs(done):
    text = page([ledger_row(TOY, done)])
    for part in ("# Claims", "synthetic", "1 claims: 1 reproduced", "### toy", "**reproduced**", "| a, mm | 12 | 10.1 ± 0.1 (3) |", "| c | better | – |", "A \\| B",
                 command(TOY, TOY.runs[1], 0), "handrecon claims --run toy", "6 of 6 records", "eeeeeeeeee+changes", "Table 0"):
        assert part in text, part
    assert command(TOY, TOY.runs[1], 0) == "handrecon reproduce s2hand --profile smoke --set w_ori=0.0 --set backbone=small --seed 0"


def test_the_printed_command_makes_the_expected_run():
    import shlex

    from handrecon.cli import _settings
    run = Run("x", "smoke", {"w_ori": 2.5, "train.milestones": (0.25, 0.5), "train.steps": 7, "photo_moves_hand": True, "model.texture": "face"})
    claim = replace(TOY, runs=(run,), ours={}, verdict=within("a"))
    expected = expected_config(claim, run, 0)
    words = shlex.split(command(claim, run, 0))
    changes = _settings([words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert C.runs.describe("s2hand", "smoke", "synthetic", 0, C.runs.resolve("s2hand", "smoke", changes)) == expected


def test_device_profile_stands_in_its_own_column(done, monkeypatch, tmp_path):
    monkeypatch.setattr(C, "reproduce", fake)
    claim = replace(TOY, device_profile="quick")
    assert ledger_row(claim, done)["device_rows"] is None
    run_claim(C.at_profile(claim, "quick"), done, tmp_path / "runs", seeds=1, say=lambda _: None)
    row = ledger_row(claim, done)
    assert row["records"] == 6 and row["device_rows"]["records"] == 2 and row["device_rows"]["verdict"] == "direction only"
    text = page([row])
    assert "ours, quick (seeds)" in text and "| a, mm | 12 | 10.1 ± 0.1 (3) | 10 (1) |" in text and "At the profile quick" in text


def test_rows_are_json_and_the_page_is_fresh_or_not(done):
    handbook = done.parent / "book"
    (handbook).mkdir()
    done.rename(handbook / "results")
    rows = update(handbook, (TOY,))
    assert json.loads(json.dumps(rows)) == rows and (handbook / C.PICTURE).stat().st_size < 100_000
    assert set(rows[0]) >= {"id", "verdict", "paper", "ours", "seeds", "command", "commands"}
    update(handbook, (TOY,), check=True)
    record_path(handbook / "results", TOY, TOY.runs[0], 1).unlink()
    with pytest.raises(RunError, match="stale"): update(handbook, (TOY,), check=True)


def test_find_claims():
    assert find_claims("toy", (TOY,)) == find_claims("all", (TOY,)) == (TOY,)
    with pytest.raises(RunError, match="did you mean 'toy'"): find_claims("ty", (TOY,))


# ── the library's own claims ────────────────────────────────────────────────

def test_every_claim_is_judged_by_its_own_labels():
    claims = all_claims()
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.system in C.PAPERS and claim.sentence.endswith(".") and claim.where and claim.runs and claim.ours, claim.id
        verdict = claim.verdict({label: Measured({0: 1.0, 1: 1.1}) for label in claim.ours})
        assert verdict.word in WORDS[:5], f"{claim.id}: {verdict.because}"
        for run in claim.runs: assert expected_config(claim, run, 0)["hash"], (claim.id, run.name)


def test_the_committed_page_is_fresh():
    update(ROOT / "handbook", all_claims(), check=True)
    refused = [sentence for claim in all_claims() for sentence in read_records(claim, ROOT / "handbook/results")[1]]
    assert not refused, refused
