"""A client's process: loads a tokenizer by its hub name, as the SDK's ``get_tokenizer()`` does, and
prints what it got. With ``--no-waiting`` the pauses between retries are skipped, nothing else."""

from __future__ import annotations

import json
import sys
import time


def main(name: str, *flags: str) -> None:
    if "--no-waiting" in flags:
        time.sleep = lambda seconds: None
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, fast=True)
    messages = [{"role": "user", "content": "Hi"}]
    print(
        json.dumps(
            {
                "tokens": tokenizer("in 2024, <|im_end|>")["input_ids"],
                "chat": tokenizer.apply_chat_template(messages, tokenize=False),
                "eos": tokenizer.eos_token_id,
                "model_type": AutoConfig.from_pretrained(name).model_type,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
