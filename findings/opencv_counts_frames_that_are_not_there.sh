#!/usr/bin/env bash
# cv2.VideoCapture(...).get(CAP_PROP_FRAME_COUNT) is not a count: for Matroska and WebM, which store none, OpenCV multiplies the duration by the mean rate
# that FFmpeg guesses. A screen recording of variable frame rate, 24 frames over four seconds, is announced as having another number, and every frame
# decodes. Code that compares "frames read" with "frames promised" calls a sound file damaged. The times lie in CAP_PROP_POS_MSEC.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check opencv-python-headless==5.0.0.93 av==18.1.0 numpy==2.2.6
cat > "$work/try.py" <<'PY'
import sys, av, cv2, numpy as np
from fractions import Fraction
path = sys.argv[1] + "/screen.mkv"
times = [*range(0, 480, 40), *range(3000, 3480, 40)]                        # milliseconds: twelve frames, a pause, twelve frames
with av.open(path, "w") as out:
    stream = out.add_stream("mpeg4", rate=25)
    stream.width = stream.height = 64; stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    for i, ms in enumerate(times):
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), "rgb24")
        frame.pts, frame.time_base = ms, Fraction(1, 1000)
        for packet in stream.encode(frame): out.mux(packet)
    for packet in stream.encode(): out.mux(packet)
film = cv2.VideoCapture(path)
promised, seen = film.get(cv2.CAP_PROP_FRAME_COUNT), []
while True:
    at = film.get(cv2.CAP_PROP_POS_MSEC)
    ok, _ = film.read()
    if not ok: break
    seen.append(film.get(cv2.CAP_PROP_POS_MSEC))
print(f"OpenCV {cv2.__version__}: {promised:.0f} frames promised, {len(seen)} read; the last at {seen[-1]:.0f} ms")
assert len(seen) == 24 and promised != 24 and promised > 30
PY
"$work/env/bin/python" "$work/try.py" "$work"
