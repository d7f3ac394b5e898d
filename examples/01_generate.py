"""Generate with speculation, and see that plain decoding says the same."""

from foretoken import LLM, SamplingParams

llm = LLM("stories")  # or a local directory, or a hub id
params = SamplingParams(temperature=0.8, seed=7, max_new_tokens=60)

fast = llm.generate("Once upon a time", params)[0]
plain = llm.generate("Once upon a time", params, drafters=())[0]

print(fast.prompt + fast.text)
print(f"{len(fast.token_ids)} tokens in {fast.stats.num_steps} passes of the target,")
print(
    f"plain decoding took {plain.stats.num_steps}; same tokens: {fast.token_ids == plain.token_ids}"
)
