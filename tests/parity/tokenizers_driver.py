"""In the harness's environment: what transformers makes of texts with the tokenizers of some directories.

Reads JSON {directories, texts} from standard input; prints, for each directory, the ids of each text without and with
the special tokens that the tokenizer adds, and those of BOS and EOS.
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
        plain, special = ([tokenizer.encode(t, add_special_tokens=add) for t in job["texts"]] for add in (False, True))
        ends = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token")}
        out.append({"plain": plain, "special": special, "ends": {k: v for k, v in ends.items() if v is not None}})
    json.dump(out, sys.stdout)


main()
