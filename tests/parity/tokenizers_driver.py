"""In the harness's environment: what transformers makes of texts with the tokenizers of some directories.

Reads JSON {directories, texts} from standard input; prints, for each directory, the ids of each text without and with
the special tokens that the tokenizer adds.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    from transformers import AutoTokenizer

    job = json.load(sys.stdin)
    out = []
    for directory in job["directories"]:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        out.append([[tokenizer.encode(t, add_special_tokens=add) for t in job["texts"]] for add in (False, True)])
    json.dump(out, sys.stdout)


main()
