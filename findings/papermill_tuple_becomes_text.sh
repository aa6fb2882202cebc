#!/usr/bin/env bash
# papermill 2.7.0 turns parameters into source code. Lists, dictionaries, numbers and None arrive as they left; a tuple arrives as the text
# "(0.7, 0.9)", also inside a dictionary, without a warning. Code that passes a configuration through papermill gets a str where it sent a tuple.
# Way out: hand over json.loads(json.dumps(parameters)), in which tuples are lists.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check papermill==2.7.0 ipykernel==6.29.5
cat > "$work/try.py" <<'PY'
import sys, nbformat, papermill
from pathlib import Path
folder = Path(sys.argv[1])
book = nbformat.v4.new_notebook()
book.cells = [nbformat.v4.new_code_cell("settings = {}", metadata={"tags": ["parameters"]}),
              nbformat.v4.new_code_cell("print(type(settings['as_list']).__name__, type(settings['as_tuple']).__name__, repr(settings['as_tuple']))")]
book.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
nbformat.write(book, folder / "in.ipynb")
done = papermill.execute_notebook(str(folder / "in.ipynb"), str(folder / "out.ipynb"), {"settings": {"as_list": [0.7, 0.9], "as_tuple": (0.7, 0.9)}}, progress_bar=False)
said = done.cells[-1].outputs[0].text.strip()
print("papermill", papermill.__version__, ":", said)
assert said == "list str '(0.7, 0.9)'", said
PY
"$work/env/bin/python" "$work/try.py" "$work" 2>/dev/null
