"""Many prompts at once, each with its own parameters; outputs arrive as they finish."""

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED

draft = EMBEDDED["stories"].draft
llm = LLM("stories", drafters=[f"draft-model:path={draft}", "prompt-lookup"])  # drafts are merged
prompts = ["One day, a cat", "Tom and Lily", "Once there was a big tree"]
params = [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.9, seed=1),
    SamplingParams(max_new_tokens=30, temperature=0.7, repetition_penalty=1.1, stop=(".",)),
]
for output in llm.generate_iter(prompts, params):
    guessed_by = dict(output.stats.accepted_by)
    reason = output.finish_reason.value
    print(f"[{output.index}] {reason}, seed {output.seed}, guessed by {guessed_by}")
    print(f"    {output.prompt}{output.text}")
