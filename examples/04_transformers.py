"""A model that transformers has loaded, with Foretoken's loop in its `generate`."""

import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import foretoken
from foretoken.assets import EMBEDDED

pair = EMBEDDED["stories"]  # any model and draft of one vocabulary
model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(pair.target)
inputs = tokenizer("Once upon a time", return_tensors="pt")
options = {"max_new_tokens": 60, "do_sample": False}
fast = {
    "custom_generate": foretoken.hf.generate,
    "drafters": [f"draft-model:path={pair.draft}", "prompt-lookup"],
}
model.generate(**inputs, **options, **fast)  # the first call adapts the model

started_s = time.perf_counter()
plain = model.generate(**inputs, **options)
plain_s = time.perf_counter() - started_s
started_s = time.perf_counter()
output = model.generate(**inputs, **options, **fast, return_dict_in_generate=True)
fast_s = time.perf_counter() - started_s

print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(f"same tokens: {torch.equal(plain, output.sequences)}")
per_pass = output.stats[0].tokens_per_step
print(f"{per_pass:.1f} tokens per pass, {plain_s / fast_s:.1f} times as fast")
