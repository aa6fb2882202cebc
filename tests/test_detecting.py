"""Detections of many files: names, records, resuming, damaged files, three formats, several processes, the command."""
import functools
import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from handrecon import detecting
from handrecon.cli import app
from handrecon.detecting import coco_tables, detect_files, kept_record, name_sources, told
from handrecon.detector import HandFinder
from handrecon.keypoints import read_detections

ASKED = []


def answer(hands):
    at = lambda x, k: SimpleNamespace(x=x + 0.01 * k, y=0.2 + 0.02 * k, z=0.001 * k)
    return SimpleNamespace(hand_landmarks=[[at(x, k) for k in range(21)] for x, _ in hands], hand_world_landmarks=[[at(0.0, k) for k in range(21)] for _ in hands],
                           handedness=[[SimpleNamespace(category_name=side, score=0.9)] for _, side in hands])


class StandIn:
    "As many hands as the first pixel says, in steps of 80: none, a left one, or both."
    def detect(self, image):
        ASKED.append(image.shape)
        return answer([(0.1, "Left"), (0.5, "Right")][:round(int(image[0, 0, 0]) / 80)])

    def detect_for_video(self, image, milliseconds): return self.detect(image)
    def close(self): pass


def stand_in(*settings, video=False):
    return HandFinder(landmarker=StandIn(), video=video)


@pytest.fixture
def folder(tmp_path):
    ASKED.clear()
    detecting._picture_finder.cache_clear()
    (tmp_path / "in").mkdir()
    for name, hands in (("none", 0), ("one", 1), ("two", 2)):
        cv2.imwrite(str(tmp_path / "in" / f"{name}.png"), np.full((48, 64, 3), 80 * hands, np.uint8))
    return tmp_path / "in"


def film(path, frames=3):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(frames): writer.write(np.full((48, 64, 3), 80, np.uint8))
    writer.release()


def run(folder, **options):
    return detect_files([folder], folder.parent / "out", progress=False, **{"open_finder": stand_in, **options})


def test_openpose_keeps_sides_and_several_hands(folder):
    report = run(folder)
    assert (report.sources, report.frames, report.hands, report.without, report.problems) == (3, 3, 3, 1, [])
    found = read_detections(folder.parent / "out")
    assert found.names == ["none", "one", "two", "two"] and found.side == ["", "left", "left", "right"]
    assert found.xy[3, 0].tolist() == pytest.approx([32, 9.6])
    hands = json.loads((folder.parent / "out/hands/two.json").read_text())["frames"][0]["hands"]
    assert np.shape(hands[1]["world"]) == (21, 3) and hands[1]["score"] == 0.9 and hands[0]["box"] == pytest.approx([6.4, 9.6, 19.2, 28.8])


def test_s2hand_and_coco(folder):
    run(folder, format="s2hand")
    found = read_detections(folder.parent / "out/detections.json")
    assert found.names == ["one", "two", "two"] and found.xy[2, 0].tolist() == [32, 10]
    run(folder, format="coco")
    tables = json.loads((folder.parent / "out/coco.json").read_text())
    assert [i["file_name"] for i in tables["images"]] == ["none.png", "one.png", "two.png"]
    assert [(a["image_id"], a["category_id"], len(a["keypoints"])) for a in tables["annotations"]] == [(2, 1, 63), (3, 1, 63), (3, 2, 63)]
    assert len(ASKED) == 3                                             # the second format was made from the records


def test_folder_without_any_hand_writes_every_format(tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), np.zeros((8, 8, 3), np.uint8))
    for format in detecting.FORMATS: assert run(tmp_path / "in", format=format).without == 1
    assert len(read_detections(tmp_path / "out/detections.json")) == 0 and coco_tables({})["images"] == []


def test_resume_asks_only_for_what_is_missing_or_changed(folder):
    run(folder)
    (folder.parent / "out/hands/one.json").write_text("{ cut")
    cv2.imwrite(str(folder / "none.png"), np.full((50, 64, 3), 160, np.uint8))
    ASKED.clear()
    report = run(folder)
    assert sorted(ASKED) == [(48, 64, 3), (50, 64, 3)] and report.kept == 1 and report.hands == 5
    assert run(folder, max_hands=1).kept == 0 and run(folder, max_hands=1).kept == 3


def test_stopped_in_the_middle_goes_on(folder, monkeypatch):
    ask = detecting.detect_source

    def stopped(path, *rest):
        if path.stem == "two": raise KeyboardInterrupt
        return ask(path, *rest)
    monkeypatch.setattr(detecting, "detect_source", stopped)
    with pytest.raises(KeyboardInterrupt): run(folder)
    monkeypatch.undo()
    assert sorted(p.name for p in (folder.parent / "out/hands").iterdir()) == ["none.json", "one.json"]
    assert run(folder).kept == 2


def test_damaged_files_cost_a_sentence_each(folder):
    (folder / "cut.jpg").write_bytes(b"\xff\xd8 no more")
    (folder / "empty.mp4").write_bytes(b"")
    report = run(folder)
    assert report.sources == 3 and len(report.problems) == 2
    assert any("cut.jpg" in p and "not a picture" in p for p in report.problems) and any("empty.mp4" in p and "not a film" in p for p in report.problems)
    assert not (folder.parent / "out/hands/cut.json").exists()


def test_film_has_a_folder_with_a_file_a_frame(folder):
    film(folder / "clip.avi")
    assert run(folder).frames == 6
    found = read_detections(folder.parent / "out/clip")
    assert found.names == [f"clip_{i:012d}" for i in range(3)] and found.side == ["left"] * 3
    from handrecon.reconstruct import find_sources, pair_detections
    hands = [pair_detections(source, folder.parent / "out") for source in find_sources([folder / "clip.avi", folder / "two.png"])]
    assert [[h.side for h in frame] for frame in hands[0]] == [["left"]] * 3 and sorted(h.side for h in hands[1][0]) == ["left", "right"]


def test_several_processes_say_the_same(folder):
    one = run(folder)
    alone = read_detections(folder.parent / "out")
    many = detect_files([folder], folder.parent / "many", processes=2, progress=False, open_finder=stand_in)
    together = read_detections(folder.parent / "many")
    assert many == one and together.names == alone.names and torch.equal(together.xy, alone.xy)


def test_names_are_different_or_refused(folder):
    film(folder / "one.avi")
    assert list(name_sources([folder])) == ["none", "one_avi", "one_png", "two"]
    with pytest.raises(ValueError, match="two.png: its results would have the same name"): name_sources([folder, folder / "two.png"])
    with pytest.raises(ValueError, match="absent: no such file or folder"): name_sources([folder / "absent"])
    (folder / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: expected pictures"): name_sources([folder / "nothing"])


def test_records_of_others_are_no_records(tmp_path):
    for text in ("", "[]", '{"stamp": {}}', "[" * 100_000):
        (tmp_path / "r.json").write_text(text)
        assert kept_record(tmp_path / "r.json", {}) is None


def test_log_has_a_line_a_while(capsys):
    assert list(told(range(3), 3, True, every=0)) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[-1] == "detect: 3 of 3 files"


def test_command(folder, monkeypatch):
    out = folder.parent / "out"
    for line, words in (((str(folder), "--format", "yolo"), "format: expected one of openpose, s2hand, coco"), ((str(folder / "no"),), "no such file or folder")):
        got = CliRunner().invoke(app, ["detect", *line, "--out", str(out)])
        assert got.exit_code == 2 and words in got.output and len(got.output.strip().splitlines()) == 1 and not out.exists()
    for module in ("mediapipe", "mediapipe.tasks.python.vision"): monkeypatch.setitem(sys.modules, module, None)
    got = CliRunner().invoke(app, ["detect", str(folder), "--out", str(out)])
    assert got.exit_code == 2 and "pip install 'handrecon[detect]'" in got.output and len(got.output.strip().splitlines()) == 1 and not out.exists()


def test_command_does_all_others_and_tells_of_the_damaged(folder, monkeypatch):
    (folder / "cut.jpg").write_bytes(b"no")
    monkeypatch.setattr(detecting, "detect_files", functools.partial(detect_files, open_finder=stand_in))
    got = CliRunner().invoke(app, ["detect", str(folder), "--out", str(folder.parent / "out")])
    assert got.exit_code == 2 and "3 hands in 3 pictures of 3 files (1 without a hand; 0 files known from before)" in got.output and "cut.jpg" in got.output
    (folder / "cut.jpg").unlink()
    assert CliRunner().invoke(app, ["detect", str(folder), "--out", str(folder.parent / "out")]).exit_code == 0
