"""llama.cpp's own converter, told which pre-tokenizer the small tokenizer has.

    python convert_gguf.py CONVERTER ORDER OUT TYPE

Writes TYPE (f32, q8_0) into OUT/NAME.gguf for every folder of the order, and what could not be converted into
OUT/errors.json. The converter knows pre-tokenizers by a digest of what they do on one text, and refuses all others: a real
model's it knows, ours it cannot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

converter, order, out, kind = (
    Path(sys.argv[1]),
    json.loads(Path(sys.argv[2]).read_text()),
    Path(sys.argv[3]),
    sys.argv[4],
)
sys.path.insert(0, str(converter))
sys.path.insert(1, str(converter / "gguf-py"))

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
errors = {}
for name, folder in order["folders"].items():
    target = out / f"{name.replace('/', '-')}.gguf"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(target), "--outtype", kind]
    try:
        convert_hf_to_gguf.main()
    except (Exception, SystemExit) as error:
        errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:600]
(out / "errors.json").write_text(json.dumps(errors))
