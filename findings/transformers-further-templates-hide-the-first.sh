#!/bin/sh
# transformers: a file in additional_chat_templates/ makes the template of tokenizer_config.json go.
#
# A tokenizer has its chat template in tokenizer_config.json, as most published ones do, and someone
# adds a second template as additional_chat_templates/tool_use.jinja. One expects both: the first as
# the default, the second by its name. Seen with transformers 5.23.0: the tokenizer has tool_use
# alone, and the default is gone without a warning, until it is moved to chat_template.jinja.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 jinja2
cd "$place"
"$place/venv/bin/python" - <<'P'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder = Path("t")
words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
path = folder / "tokenizer_config.json"
path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "FIRST"}))


def read():
    """Return the templates of the folder, by name."""
    found = PreTrainedTokenizerFast.from_pretrained(folder).chat_template
    return found if isinstance(found, dict) else {"default": found}


seen = [read()]
(folder / "additional_chat_templates").mkdir()
(folder / "additional_chat_templates/tool_use.jinja").write_text("SECOND")
seen.append(read())
(folder / "chat_template.jinja").write_text("FIRST")
seen.append(read())
print("transformers", transformers.__version__)
for name, value in zip(("in the config", "and one more", "moved to a file"), seen, strict=True):
    print(f"  {name}: {value}")
both = {"default": "FIRST", "tool_use": "SECOND"}
sys.exit(seen != [{"default": "FIRST"}, {"tool_use": "SECOND"}, both])
P
