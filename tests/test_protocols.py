"""The table of protocols: every row complete, every count official, every deviation named."""
import re

import pytest

from handrecon import binocular, multihand, protocols, s2hand, s2hand_video
from handrecon.datasets import DATASETS, OFFICIAL_COUNTS
from handrecon.protocols import DEVIATIONS, PROTOCOLS, Split, protocol, require_whole

IDS = [f"{p.system}-{p.table}-{p.dataset}" for p in PROTOCOLS]


@pytest.mark.parametrize("row", PROTOCOLS, ids=IDS)
def test_a_row_is_complete(row):
    assert row.train and row.test.count > 0 and all(s.count > 0 and s.split and s.rule and s.unit for s in (*row.train, row.test))
    for field in ("table", "hand", "crop", "augmentation", "stages", "alignment", "metrics", "paper"): assert getattr(row, field), field
    assert row.system in protocols.PAPERS and all(s.dataset in DATASETS for s in (*row.train, row.test))
    assert row.deviations and set(row.deviations) <= set(DEVIATIONS) and len(set(row.deviations)) == len(row.deviations)
    assert row.test.split not in {s.split for s in row.train if s.dataset == row.test.dataset}


def test_counts_are_those_that_check_data_expects():
    for row in PROTOCOLS:
        official = OFFICIAL_COUNTS[row.test.dataset][row.test.split]
        assert official in (None, row.test.count)
        for split in row.train:
            whole = OFFICIAL_COUNTS[split.dataset][split.split]
            assert whole is None or split.count == whole or split.rule != "all of the split" and split.count < whole


def test_every_data_set_of_the_review_has_its_row():
    there = {(p.system, p.dataset) for p in PROTOCOLS}
    assert there >= {("s2hand", "freihand"), ("s2hand", "ho3d"), ("s2hand_video", "ho3d"), ("s2hand_video", "stb"), ("binocular", "stb"),
                     ("multihand", "freihand"), ("multihand", "ho3d"), ("multihand", "rhd"), ("multihand", "interhand")}
    assert {s.__name__.rpartition(".")[2] for s in (s2hand, s2hand_video, binocular, multihand)} == {p.system for p in PROTOCOLS}


def test_deviations_are_told_and_used():
    assert {name for p in PROTOCOLS for name in p.deviations} == set(DEVIATIONS)
    for name, d in DEVIATIONS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and d.kind in ("choice", "open", "unrun") and min(len(d.paper), len(d.here), len(d.why)) > 3


def test_look_up():
    assert protocol("s2hand", "freihand").test.count == 3960 and protocol("s2hand", "ho3d").train[0].count == 66034
    assert protocol("multihand", "freihand", "Table IV").table == "Table IV" and protocol("s2hand", "freihand", "S²HAND(V) Table 1") is protocol("s2hand", "freihand", "Table 2")
    assert len(protocols.protocols("multihand", "interhand")) == 2 and len(protocols.protocols()) == len(PROTOCOLS)
    with pytest.raises(ValueError, match="no paper's table is about s2hand on rhd: expected one of s2hand on freihand, Table 2"):
        protocol("s2hand", "rhd")


def test_a_score_of_some_is_refused():
    assert require_whole(protocol("s2hand", "freihand").test, 3960) == "3,960 of 3,960 pictures scored"
    for found in (3959, 0, 3961):
        with pytest.raises(ValueError, match=f"freihand evaluation: {found:,} of 3,960 pictures scored"):
            require_whole(Split("freihand", "evaluation", 3960), found)


def test_pages_hold_every_row_and_every_deviation():
    rows, told = protocols.protocols_page(), protocols.deviations_page()
    for p in PROTOCOLS:
        assert f"{p.table}: {p.dataset}" in rows and p.alignment in rows and p.crop in rows and f"{p.test.count:,}" in rows
        for name in p.deviations: assert f"[{name}](deviations.md#{name})" in rows
    for name, d in DEVIATIONS.items(): assert f"### {name}\n" in told and d.here in told and d.why in told
